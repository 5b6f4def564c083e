//! Guest RAM → wire: the source of a migration.
//!
//! `source/main` goes through the states, a file each: [`setup`], [`precopy`], [`switchover`],
//! [`handover`]. [`pages`] and [`out`] are the road of a page on this side, [`answers`] reads what the
//! destination says.

pub(crate) mod answers;
pub(crate) mod handover;
pub(crate) mod out;
mod pages;
mod precopy;
pub(crate) mod setup;
mod switchover;
mod undo;
mod xbzrle;

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use whimbrel_ram::PageMap;

use crate::address::Address;
use crate::channel;
use crate::error::Error;
use crate::guest::{Guest, RunRight};
use crate::report::{EndsFailed, Report, add};
use crate::settings::{Capabilities, Capability, Parameters};
use crate::status::{Event, MigrationStatus, RunState};
use crate::worker::Cancel;

/// Everything one outgoing migration is given.
#[derive(Debug)]
pub(crate) struct Job {
    pub(crate) guest: Arc<Guest>,
    pub(crate) address: Address,
    pub(crate) capabilities: Capabilities,
    /// Shared with the control side: most can be changed while the migration runs.
    pub(crate) parameters: Arc<Mutex<Parameters>>,
    pub(crate) report: Arc<Report>,
    pub(crate) cancel: Cancel,
    /// `migrate-continue`.
    pub(crate) proceed: Cancel,
    /// `migrate-start-postcopy`.
    pub(crate) postcopy: Cancel,
    /// `migrate-pause`.
    pub(crate) pause: Cancel,
}

impl Job {
    pub(crate) fn parameters(&self) -> Parameters {
        self.parameters.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(crate) fn has(&self, capability: Capability) -> bool {
        self.capabilities.has(capability)
    }

    /// Time since the migration began.
    pub(crate) fn now(&self) -> Duration {
        self.report.started().elapsed()
    }

    /// Changes the state, and tells whoever listens.
    pub(crate) fn set_status(&self, status: MigrationStatus) {
        if self.report.set_status(status) {
            self.guest.emit(&Event::Migration(status));
        }
    }
}

/// How the guest stands when its migration ends.
#[derive(Debug)]
enum Held {
    /// It runs, or is stopped on request: the right is where it was.
    Untouched,
    /// It was stopped for the switchover; `before` says in which state it had been.
    Stopped { right: RunRight, before: RunState },
    /// The right has been given up.
    GivenUp,
}

/// Moves the guest away. The body of `source/main`.
pub(crate) fn run(job: &Job) {
    let _guard = EndsFailed(&job.report);
    job.guest.emit(&Event::Migration(MigrationStatus::Setup));
    let mut held = Held::Untouched;
    let outcome = migrate(job, &mut held);
    // Also after success: a guest kept in a file may be told to run on here.
    job.guest.vm().throttle(0);
    match outcome {
        Ok(()) => job.set_status(MigrationStatus::Completed),
        Err(error) => undo::undo(job, held, error),
    }
}

fn migrate(job: &Job, held: &mut Held) -> Result<(), Error> {
    let channel = channel::connect(&job.address, &job.cancel)?;
    if job.has(Capability::ReturnPath) && !channel.is_two_way() {
        return Err(Error::Refused(format!(
            "{}: capability return-path needs a way back, which this transport has not; \
             switch it off or use tcp: or unix:",
            job.address
        )));
    }
    let vm = job.guest.vm();
    let ram = vm.ram();
    let log = undo::Logging::start(vm.dirty_log())?;
    let map = PageMap::new(ram);
    map.fill();
    // The first take of a log that is armed lazily says that every page is dirty. Better now than
    // after the first pass, which sends every page anyway.
    log.take_into(&map)?;
    add(&job.report.counters.dirty_sync_count, 1);
    if job.has(Capability::Events) {
        job.guest.emit(&Event::MigrationPass(1));
    }
    let mut stream = setup::begin(job, channel)?;
    job.report.setup_is_done();
    job.set_status(MigrationStatus::Active);
    let mut precopy = precopy::Precopy::new(job, &map, log);
    precopy.run(&mut stream)?;
    let log = precopy.into_log();
    switchover::stop(job, held)?;
    switchover::send_rest(job, &map, &log, &mut stream)?;
    let devices = switchover::device_sections(job, held)?;
    handover::hand_over(job, held, stream, &devices)?;
    log.delivered();
    Ok(())
}
