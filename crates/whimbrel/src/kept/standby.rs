//! A secondary of COLO without a guest: it takes in checkpoint after checkpoint, and when the primary
//! is lost it has the newest that is complete, as a kept VM.
//!
//! A checkpoint arrives in a cache beside the one before it; its primary goes on as soon as all of it
//! is there, and it is made the newest meanwhile.

use std::path::Path;

use whimbrel_ram::GuestRam;
use whimbrel_ram::dirty::DirtyBits;
use whimbrel_wire::{BlockList, ColoMessage, Configuration};

use super::keeper::{configuration_of_file, configuration_with_all_ram, ram_as_announced, write};
use super::writing::Writing;
use super::{KeptSummary, Receiver};
use crate::channel::Arrivals;
use crate::colo::flush::flush;
use crate::destination::incoming::{Arrived, Devices, Host, Incoming};
use crate::error::Error;
use crate::recovery;

/// A checkpoint that has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StandbyProgress {
    /// How many are complete; the first is the end of the migration that COLO begins with.
    pub checkpoints: u64,
    /// Pages in the newest.
    pub pages: u64,
}

/// What a standby had when its primary was lost.
#[derive(Clone, Debug, PartialEq)]
pub struct StoodBy {
    /// What has been kept of it.
    pub kept: KeptSummary,
    /// How many checkpoints had been complete; 0 is that only the migration before the first was.
    pub checkpoints: u64,
    /// How the primary was lost.
    pub lost: String,
}

impl Receiver {
    /// Waits for a primary with capability `x-colo`, a stock QEMU or a whimbrel, and takes its
    /// checkpoints until it is lost; then the newest that is complete is written to `path`.
    /// `told` is called for each, and must not block for long.
    ///
    /// Whoever lets the VM go on from there must know that the primary runs no more.
    ///
    /// # Errors
    /// When there never was a complete one, or it cannot be written; and on request
    /// ([`stopper`](Receiver::stopper)).
    pub fn stand_by(
        self,
        path: &Path,
        told: &mut dyn FnMut(StandbyProgress),
    ) -> Result<StoodBy, Error> {
        let Receiver { listener, cancel, placed, multifd, parameters, access, .. } = self;
        let listener = listener.waiting_no_longer_than(recovery::silence(&parameters));
        let arrivals = Arrivals::wait(&listener, multifd, &cancel)?;
        let uuid = Some(arrivals.uuid).filter(|uuid| *uuid != [0; 16]);
        let mut newest = Newest { uuid, ..Newest::default() };
        let stop = arrivals.stop.clone();
        let mut incoming = Incoming::new(arrivals).kept_in_step().with_progress(placed);
        let arrived = listener.greeting(multifd > 0, &stop, || incoming.receive(&mut newest));
        drop(listener); // A second primary finds nobody.
        let whole = arrived.and_then(|arrived| {
            match arrived {
            Arrived::Whole => Ok(()),
            Arrived::GuestFirst(_) => Err(Error::Refused(
                "main channel: the source goes over to postcopy, and is to be kept in step: switch \
                 postcopy-ram off there, and x-colo on"
                    .into(),
            )),
        }
        });
        if let Err(error) = whole {
            incoming.fail();
            return Err(error);
        }
        let mut checkpoints = 0;
        let lost = match newest.keep_in_step(&mut incoming, &mut checkpoints, told) {
            Err(Ended::Lost(_)) if cancel.is_set() => return Err(Error::Cancelled),
            Err(Ended::Lost(error)) => error,
            Err(Ended::Broken(error)) => return Err(error),
            Ok(never) => match never {},
        };
        incoming.hang_up();
        let (Some(ram), Some(devices)) = (&newest.ram, newest.devices) else {
            panic!("a stream that was received was loaded");
        };
        let configuration = configuration_of_file(newest.configuration.as_ref())?;
        let mut writing = Writing::begin(path, &configuration, ram, access, &cancel)?;
        let kept = write(&mut writing, &configuration, ram, devices, true)?;
        writing.keep()?;
        Ok(StoodBy { kept, checkpoints, lost: lost.to_string() })
    }
}

/// Why no further checkpoint comes.
enum Ended {
    /// The primary, or the connection, is.
    Lost(Error),
    /// What is here is.
    Broken(Error),
}

/// The newest checkpoint that is complete.
#[derive(Debug, Default)]
struct Newest {
    configuration: Option<Configuration>,
    uuid: Option<[u8; 16]>,
    ram: Option<GuestRam>,
    devices: Option<Devices>,
}

impl Newest {
    fn keep_in_step(
        &mut self,
        incoming: &mut Incoming,
        checkpoints: &mut u64,
        told: &mut dyn FnMut(StandbyProgress),
    ) -> Result<std::convert::Infallible, Ended> {
        let (cache, _) = incoming.become_secondary().map_err(Ended::Broken)?;
        let ram = self.ram.clone().expect("become_secondary has found it");
        // Nobody writes it but checkpoints.
        let nothing = DirtyBits::none(&ram);
        incoming.is_secondary().map_err(Ended::Lost)?;
        told(StandbyProgress { checkpoints: 0, pages: 0 });
        loop {
            incoming.checkpoint_request().map_err(Ended::Lost)?;
            // There is no guest that would have to stand still.
            incoming.say_colo(ColoMessage::CheckpointReply).map_err(Ended::Lost)?;
            let devices = incoming.checkpoint().map_err(Ended::Lost)?;
            let said = incoming
                .say_colo(ColoMessage::VmstateReceived)
                .and_then(|()| incoming.say_colo(ColoMessage::VmstateLoaded));
            // It is complete, whatever becomes of the primary.
            let pages = flush(&cache, &ram, &nothing).map_err(Ended::Broken)?;
            self.load(devices).map_err(Ended::Broken)?;
            *checkpoints += 1;
            told(StandbyProgress { checkpoints: *checkpoints, pages });
            said.map_err(Ended::Lost)?;
        }
    }
}

impl Host for Newest {
    fn configure(&mut self, configuration: &Configuration) -> Result<(), Error> {
        self.configuration = Some(configuration_with_all_ram(configuration, self.uuid)?);
        Ok(())
    }

    fn ram(&mut self, announced: &BlockList) -> Result<GuestRam, Error> {
        // And the cache.
        let ram = ram_as_announced(announced, 2)?;
        self.ram = Some(ram.clone());
        Ok(ram)
    }

    fn ram_is_fresh(&self) -> bool {
        true // Made above.
    }

    fn takes_postcopy(&self) -> bool {
        false
    }

    fn takes_small_pieces(&self) -> bool {
        false
    }

    fn load(&mut self, devices: Devices) -> Result<(), Error> {
        self.devices = Some(match (devices, self.devices.take()) {
            // Sections that came before RAM come once.
            (Devices::Qemu { early, state }, Some(Devices::Qemu { early: before, .. }))
                if early.is_empty() =>
            {
                Devices::Qemu { early: before, state }
            }
            (devices, _) => devices,
        });
        Ok(())
    }

    fn run(&mut self) -> Result<(), Error> {
        Ok(()) // There is nothing to run.
    }

    fn vcpu_threads(&self) -> Vec<u32> {
        Vec::new()
    }
}
