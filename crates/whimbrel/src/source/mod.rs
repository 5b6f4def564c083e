//! Guest RAM → wire: the source of a migration.
//!
//! `source/main` goes through the states, a file each: [`setup`], [`precopy`], then either
//! [`switchover`] and [`handover`], or [`postcopy`] with its [`background`]. [`pages`] and [`out`]
//! are the road of a page on this side, [`answers`] reads what the destination says; in postcopy it
//! is read by `source/urgent` ([`urgent`]), which [`said`] and [`wanted`] join to `source/main`.

pub(crate) mod answers;
mod background;
pub(crate) mod handover;
mod hot;
pub(crate) mod out;
mod pages;
pub(crate) mod postcopy;
mod precopy;
mod said;
pub(crate) mod setup;
mod switchover;
mod undo;
mod urgent;
mod wanted;
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
use crate::worker::{Cancel, Links};
use postcopy::{Failed, HandOver, Postcopy};
use precopy::{Precopy, Switch};
use setup::{PINGS_AT_SETUP, Stream};
use undo::Logging;

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
    /// The connections in postcopy: `migrate-pause`, and the end.
    pub(crate) links: Links,
}

impl Job {
    pub(crate) fn parameters(&self) -> Parameters {
        self.parameters.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(crate) fn has(&self, capability: Capability) -> bool {
        self.capabilities.has(capability)
    }

    /// Whether the destination is to answer.
    pub(crate) fn wants_answers(&self) -> bool {
        self.has(Capability::ReturnPath) || self.has(Capability::PostcopyRam)
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
    let outcome = {
        let _doubt = job.guest.handing_over();
        migrate(job, &mut held)
    };
    // Also after success: a guest kept in a file may be told to run on here.
    job.guest.vm().throttle(0);
    match outcome {
        Ok(()) => job.set_status(MigrationStatus::Completed),
        Err(Failed::Before(error)) => undo::undo(job, held, error),
        Err(Failed::After(error)) => {
            job.report.set_error(error.text_of_pause());
            job.set_status(MigrationStatus::PostcopyPaused);
            // What is left of the guest's RAM is kept here, in the VM.
            job.links.wait_for_end();
        }
    }
}

fn migrate(job: &Job, held: &mut Held) -> Result<(), Failed> {
    let (mut stream, map, log) = prepare(job).map_err(Failed::Before)?;
    let switch = Precopy::new(job, &map, &log).run(&mut stream).map_err(Failed::Before)?;
    match switch {
        Switch::Precopy => guest_last(job, held, stream, &map, log).map_err(Failed::Before),
        Switch::Postcopy => guest_first(job, held, stream, map, log),
    }
}

/// Connects, and begins to watch what the guest writes.
fn prepare(job: &Job) -> Result<(Stream, PageMap, Logging<'_>), Error> {
    let channel = channel::connect("main", &job.address, &job.cancel, &job.links)?;
    if job.wants_answers() && !channel.is_two_way() {
        return Err(Error::Refused(format!(
            "{}: capabilities return-path and postcopy-ram need a way back, which this transport \
             has not; switch them off or use tcp: or unix:",
            job.address
        )));
    }
    let vm = job.guest.vm();
    let ram = vm.ram();
    let log = Logging::start(vm.dirty_log())?;
    let map = PageMap::new(ram);
    map.fill();
    // The first take of a log that is armed lazily says that every page is dirty. Better now than
    // after the first pass, which sends every page anyway.
    log.take_into(&map)?;
    add(&job.report.counters.dirty_sync_count, 1);
    if job.has(Capability::Events) {
        job.guest.emit(&Event::MigrationPass(1));
    }
    let stream = setup::begin(job, channel)?;
    job.report.setup_is_done();
    job.set_status(MigrationStatus::Active);
    Ok((stream, map, log))
}

/// Precopy's end: all of RAM goes, then the guest.
fn guest_last(
    job: &Job,
    held: &mut Held,
    mut stream: Stream,
    map: &PageMap,
    log: Logging<'_>,
) -> Result<(), Error> {
    switchover::stop(job, held)?;
    switchover::send_rest(job, map, &log, &mut stream)?;
    let devices = switchover::device_sections(job, held)?;
    handover::hand_over(job, held, stream, &devices)?;
    log.delivered();
    Ok(())
}

/// Postcopy: the guest goes, then the rest of RAM.
fn guest_first(
    job: &Job,
    held: &mut Held,
    mut stream: Stream,
    map: PageMap,
    log: Logging<'_>,
) -> Result<(), Failed> {
    let ram = job.guest.vm().ram();
    let mut prepare = || {
        let answers = stream.answers.as_mut().expect("postcopy-ram opens the return path");
        // Then the destination has the main channel, and cannot take another one for it.
        answers.wait_for_pongs(stream.out.channel(), PINGS_AT_SETUP)?;
        let agreed = answers.agreed();
        let urgent = match job.has(Capability::PostcopyPreempt) {
            true => Some(postcopy::open_urgent(&job.address, &job.cancel, &job.links)?),
            false => None,
        };
        switchover::stop(job, held)?;
        let hot = log.take_bits_into(&map)?;
        add(&job.report.counters.dirty_sync_count, 1);
        let sections = switchover::device_sections(job, held)?;
        // Whatever it said while the guest was being stopped, it said in time.
        stream.check_answers()?;
        Ok((agreed, urgent, sections, hot))
    };
    let (agreed, urgent, sections, hot) = prepare().map_err(Failed::Before)?;
    let map = postcopy::map_for(agreed, ram, map);
    let postcopy = Postcopy {
        ram,
        report: &job.report,
        parameters: &|| job.parameters(),
        cancel: &job.cancel,
        links: &job.links,
        content: None,
        hot: Some(hot),
        urgent_ends_with_mark: false,
    };
    let mut away = Away { job, held, before: None };
    postcopy.run(&map, stream, urgent, sections, &mut away)?;
    log.delivered();
    Ok(())
}

/// Gives the guest of a VM that runs here away.
struct Away<'h, 'j> {
    job: &'j Job,
    held: &'h mut Held,
    before: Option<RunState>,
}

impl HandOver for Away<'_, '_> {
    fn give_up(&mut self) {
        if let Held::Stopped { right, before } = std::mem::replace(self.held, Held::GivenUp) {
            self.job.guest.give_up_right(right);
            self.before = Some(before);
        }
    }

    fn take_back(&mut self) {
        if let (Some(before), Some(right)) = (self.before, self.job.guest.right_is_returned()) {
            *self.held = Held::Stopped { right, before };
        }
    }

    fn gone(&mut self) {
        self.job.guest.right_is_taken();
        self.job.set_status(MigrationStatus::PostcopyActive);
    }
}
