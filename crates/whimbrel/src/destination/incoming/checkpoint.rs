//! Checkpoints on their way in: what comes goes into the cache, and is told of when all of it is
//! there.

use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use whimbrel_ram::{RamCache, Received};
use whimbrel_wire::package::decode_checkpoint;
use whimbrel_wire::{ColoMessage, Decoded, Delimiting};

use super::{Devices, Incoming, Replica, Setup};
use crate::destination::multifd::{Cached, Receivers, Target};
use crate::destination::placing::Placing;
use crate::error::Error;
use crate::hello::Features;
use crate::worker::Cancel;

/// Most bytes of the device state of a checkpoint.
const DEVICES_MAX: u64 = 256 << 20;

impl Incoming {
    /// All of the guest is here, and no page of it is on its way: from here on pages go to the cache
    /// instead. Gives that, and what ends the waits on all channels.
    pub(crate) fn become_secondary(&mut self) -> Result<(Arc<RamCache>, Cancel), Error> {
        let (Some(Replica { cache: Some(cache), .. }), Some(Setup { blocks, .. })) =
            (self.replica.clone(), self.setup.clone())
        else {
            return Err(Error::Refused("main channel: there is no RAM to be kept in step".into()));
        };
        let target = Arc::new(Target::cache(&cache, self.placed.clone()));
        let channels = std::mem::take(&mut self.silent);
        if !channels.is_empty() {
            self.receivers = Some(Receivers::start(channels, &target, &self.stop)?);
        }
        self.placing = Some(Placing::new(target, blocks));
        Ok((cache, self.stop.clone()))
    }

    /// The guest is here as a whole, and the first checkpoint can come.
    pub(crate) fn is_secondary(&mut self) -> Result<(), Error> {
        self.last_word_of_all()?;
        self.say_colo(ColoMessage::CheckpointReady)
    }

    /// Says one of COLO's words.
    pub(crate) fn say_colo(&mut self, message: ColoMessage) -> Result<(), Error> {
        let mut words = Vec::new();
        message.encode(&mut words);
        self.input.channel().send_bytes(&words)
    }

    /// Waits for the primary to ask for a checkpoint. Pages that come ahead of it are in the cache then,
    /// where they harm nothing, whatever becomes of the checkpoint.
    pub(crate) fn checkpoint_request(&mut self) -> Result<(), Error> {
        let result = self.wait_for_request();
        self.told_by_channels(result)
    }

    fn wait_for_request(&mut self) -> Result<(), Error> {
        loop {
            match self.input.next(|_, _| Ok(()))? {
                Some(Decoded::Colo(ColoMessage::CheckpointRequest)) => return Ok(()),
                Some(Decoded::Colo(ColoMessage::PagesAhead))
                    if self.agreed.has(Features::PAGES_AHEAD) =>
                {
                    self.loaded = false;
                }
                // Only behind that word: the decoder lets nothing else come here.
                Some(Decoded::Ram(record)) => self.record(record)?,
                Some(Decoded::SectionEnd(_) | Decoded::Footer(_) | Decoded::Eof) => {}
                // That of the migration before.
                Some(Decoded::VmDescription(_)) => {}
                Some(other) => return Err(self.meaningless(&other)),
                None => return Err(self.input.ended("the next checkpoint")),
            }
        }
    }

    /// Takes a checkpoint in: RAM into the cache, and the devices, which it gives.
    pub(crate) fn checkpoint(&mut self) -> Result<Devices, Error> {
        self.loaded = false;
        let result = self.take_checkpoint();
        self.told_by_channels(result)
    }

    fn take_checkpoint(&mut self) -> Result<Devices, Error> {
        loop {
            match self.input.next(|_, _| Ok(()))? {
                Some(Decoded::Ram(record)) => self.record(record)?,
                Some(Decoded::CheckpointFollows { len }) => return self.devices(len),
                Some(
                    Decoded::Colo(ColoMessage::VmstateSend)
                    | Decoded::SectionPart(_)
                    | Decoded::SectionEnd(_)
                    | Decoded::Footer(_)
                    | Decoded::Eof,
                ) => {}
                Some(other) => return Err(self.meaningless(&other)),
                None => return Err(self.input.ended("the rest of a checkpoint")),
            }
        }
    }

    fn devices(&mut self, len: u64) -> Result<Devices, Error> {
        let base = self.input.decoder().offset();
        let refused = |what: String| Error::Refused(format!("main channel, byte {base}: {what}"));
        if len > DEVICES_MAX {
            return Err(refused(format!("{len} bytes of device state, and {DEVICES_MAX} at most")));
        }
        let len = usize::try_from(len).expect("below 256 MiB");
        let bytes = self.input.take_many(len, "the devices of a checkpoint")?;
        let delimiting = self.input.decoder().delimiting();
        let state = decode_checkpoint(&bytes, base, delimiting)
            .map_err(|source| Error::Protocol { channel: "main", source })?;
        Ok(match delimiting {
            Delimiting::OwnLength => Devices::Own(state.sections),
            Delimiting::Footers => Devices::Qemu { early: Vec::new(), state: Box::new(state) },
        })
    }

    fn meaningless(&self, found: &Decoded) -> Error {
        let at = self.input.decoder().offset();
        Error::Refused(format!("main channel, before byte {at}: {found:?} has no meaning in COLO"))
    }

    /// Whatever this thread met when it was woken, what a channel has met was first.
    fn told_by_channels<T>(&self, result: Result<T, Error>) -> Result<T, Error> {
        let first = || self.receivers.as_ref().and_then(Receivers::take_failure);
        result.map_err(|error| first().unwrap_or(error))
    }

    /// Nothing more is to come: the source finds its connections closed.
    pub(crate) fn hang_up(mut self) {
        self.input.channel().hang_up();
    }
}

impl Target {
    /// Everything goes to `cache`, and is marked there.
    fn cache(cache: &Arc<RamCache>, placed: Arc<AtomicU64>) -> Target {
        Target {
            ram: cache.ram().clone(),
            content: Arc::new(Received::new(cache.ram())),
            fresh: false,
            arrived: None,
            placed,
            changes: None,
            cache: Some(Cached::Instead(cache.clone())),
        }
    }
}
