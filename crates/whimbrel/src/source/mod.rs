//! Guest RAM → wire: the source of a migration.
//!
//! `source/main` goes through the states, a file each: [`setup`], [`precopy`], then either
//! [`switchover`] and [`handover`], or [`postcopy`], which gives the guest away ([`package`]) and
//! sends the rest over one [`session`] after the other, each with its [`background`]. [`pages`] and
//! [`out`] are the road of a page on this side, [`answers`] reads what the destination says; in
//! postcopy it is read by `source/urgent` ([`urgent`]), which [`said`] and [`wanted`] join to
//! `source/main`.

pub(crate) mod ahead;
pub(crate) mod answers;
mod background;
pub(crate) mod handover;
mod held;
mod hot;
pub(crate) mod multifd;
pub(crate) mod out;
mod package;
mod pages;
pub(crate) mod postcopy;
mod precopy;
pub(crate) mod recover;
mod said;
mod session;
pub(crate) mod setup;
pub(crate) mod switchover;
pub(crate) mod undo;
mod urgent;
mod wanted;
mod xbzrle;

use std::sync::Arc;
use std::time::Duration;

use whimbrel_ram::PageMap;
use whimbrel_wire::Command;

use crate::channel::Route;
use crate::colo::Replication;
use crate::colo::primary::{self, Primary};
use crate::colo::rounds::Rounds;
use crate::error::Error;
use crate::guest::{Guest, RunRight};
use crate::hello::{Features, PING_PARKED};
use crate::objects::Router;
use crate::recovery::{self, WayOn};
use crate::report::{EndsFailed, Report, add};
use crate::settings::{Capabilities, Capability, Current};
use crate::status::{Event, MigrationStatus, RunState};
use crate::worker::{Cancel, Links};
use multifd::{Channels, Crew, Dialect, Opening, Terms};
use postcopy::{Failed, HandOver, Postcopy};
use precopy::{Precopy, Switch};
use recover::Ways;
use setup::{PINGS_AT_SETUP, Stream};
use undo::Logging;

/// Everything one outgoing migration is given.
#[derive(Debug)]
pub(crate) struct Job {
    pub(crate) guest: Arc<Guest>,
    pub(crate) route: Route,
    pub(crate) capabilities: Capabilities,
    /// Shared with the control side: most parameters can be changed while the migration runs.
    pub(crate) router: Router,
    pub(crate) report: Arc<Report>,
    pub(crate) cancel: Cancel,
    /// `migrate-continue`.
    pub(crate) proceed: Cancel,
    /// `migrate-start-postcopy`.
    pub(crate) postcopy: Cancel,
    /// The connections in postcopy: `migrate-pause`, and the end.
    pub(crate) links: Links,
    /// `migrate` with `resume`.
    pub(crate) resume: Arc<WayOn<Route>>,
    /// With capability `x-colo`.
    pub(crate) colo: Arc<Replication>,
}

impl Job {
    pub(crate) fn parameters(&self) -> &Current {
        self.router.parameters()
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
pub(crate) enum Held {
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
            // What is left of the guest's RAM is kept here, in the VM.
            job.report.set_error(error.text_of_pause());
            job.set_status(MigrationStatus::PostcopyPaused);
            job.links.wait_for_end();
        }
    }
}

/// A migration that has been announced.
struct Begun<'j> {
    stream: Stream,
    channels: Option<(Channels, Opening)>,
    map: PageMap,
    log: Logging<'j>,
}

fn migrate(job: &Job, held: &mut Held) -> Result<(), Failed> {
    let Begun { mut stream, mut channels, map, log } = prepare(job).map_err(Failed::Before)?;
    let ends = match &channels {
        Some((channels, _)) => Ok(channels.stop().clone()),
        None => job.cancel.part().map_err(Error::system("making an eventfd")),
    };
    let ends = &ends.map_err(Failed::Before)?;
    let switch = match &mut channels {
        None => send_first(job, held, &mut stream, &map, &log, (None, ends)),
        Some((channels, _)) => {
            let ram = job.guest.vm().ram();
            // A kernel that cannot tell what was touched has every page looked at.
            let terms = Terms {
                ram,
                report: &job.report,
                log: Some(log.log()),
                content: ram.touched().ok(),
                supply: None,
                beside: None,
            };
            let lead = |crew: &Crew<'_>| {
                send_first(job, held, &mut stream, &map, &log, (Some(crew), ends))
            };
            channels.send(&map, terms, lead)
        }
    };
    if let Err(error) = &switch
        && job.colo.has_begun()
    {
        drop((stream, channels)); // If the secondary is not dead it is to know.
        log.delivered();
        primary::go_on_alone(job, held, error);
        return Ok(());
    }
    let switch = switch.map_err(|error| {
        stream.out.channel().heed(job.cancel.clone());
        Failed::Before(stream.explain(error))
    })?;
    match switch {
        Switch::Precopy => guest_last(job, held, stream, channels, log).map_err(Failed::Before),
        Switch::Postcopy => guest_first(job, held, stream, channels, map, log),
    }
}

/// Connects, and begins to watch what the guest writes.
fn prepare(job: &Job) -> Result<Begun<'_>, Error> {
    let mut channel = job.route.connect("main", &job.cancel, &job.links)?;
    if job.wants_answers() && !channel.is_two_way() {
        return Err(Error::Refused(format!(
            "{}: capabilities return-path and postcopy-ram need a way back, which this transport \
             has not; switch them off or use tcp: or unix:",
            job.route.address
        )));
    }
    let vm = job.guest.vm();
    let parameters = job.parameters().get();
    let channels = match job.has(Capability::Multifd) {
        false => None,
        true => {
            let zeros = parameters.zero_page_detection;
            let opening = Opening {
                uuid: vm.uuid().unwrap_or_default(),
                dialect: Dialect { mark_each_section: false, zeros },
                zero_copy: job.has(Capability::ZeroCopySend),
                channels: parameters.multifd_channels,
            };
            let channels =
                Channels::connect(&job.route, &job.cancel, &job.links, &opening, &parameters)?;
            channel.heed(channels.stop().clone());
            Some((channels, opening))
        }
    };
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
    let dialect = channels.as_ref().map(|(channels, _)| channels.dialect());
    let mut stream = setup::begin(job, channel, dialect)?;
    if let Some(answers) = &mut stream.answers {
        answers.wait_no_longer_than(recovery::silence(&parameters));
    }
    job.report.setup_is_done();
    job.set_status(MigrationStatus::Active);
    Ok(Begun { stream, channels, map, log })
}

/// RAM while the guest runs; and where the guest goes last, the rest of it, too. With capability
/// `x-colo` it does not go, and this returns when it is to go on alone.
fn send_first(
    job: &Job,
    held: &mut Held,
    stream: &mut Stream,
    map: &PageMap,
    log: &Logging<'_>,
    (crew, ends): (Option<&Crew<'_>>, &Cancel),
) -> Result<Switch, Error> {
    let switch = Precopy::new(job, map, log, crew).run(stream)?;
    if switch == Switch::Precopy {
        switchover::stop(job, held)?;
        switchover::send_rest(job, map, log, crew, stream)?;
        if job.has(Capability::XColo) {
            let rounds = Rounds::new();
            let mut primary = Primary { job, held, map, log, crew, stream, rounds };
            match primary.run(ends)? {}
        }
    }
    Ok(switch)
}

/// Precopy's end: all of RAM has gone, then the guest.
fn guest_last(
    job: &Job,
    held: &mut Held,
    stream: Stream,
    channels: Option<(Channels, Opening)>,
    log: Logging<'_>,
) -> Result<(), Error> {
    let devices = switchover::device_sections(job, held)?;
    handover::hand_over(job, held, stream, &devices)?;
    log.delivered();
    // The destination has said that it has everything.
    if let Some((channels, _)) = channels {
        let _ = channels.finish();
    }
    Ok(())
}

/// Postcopy: the guest goes, then the rest of RAM.
fn guest_first(
    job: &Job,
    held: &mut Held,
    mut stream: Stream,
    mut channels: Option<(Channels, Opening)>,
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
            true => Some(postcopy::open_urgent(&job.route, &job.cancel, &job.links)?),
            false => None,
        };
        if let Some((channels, _)) = &mut channels
            && agreed.has(Features::MULTIFD_GOES_ON)
        {
            channels.end_round()?;
            // One that broke on the way must be known before the guest is given away.
            Command::Ping(PING_PARKED).encode(stream.out.words());
            stream.out.flush()?;
            let answers = stream.answers.as_mut().expect("looked at above");
            answers.wait_for_pong(stream.out.channel(), PING_PARKED)?;
        }
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
        parameters: job.parameters(),
        cancel: &job.cancel,
        links: &job.links,
        content: None,
        hot: Some(hot),
        urgent_ends_with_mark: false,
        channels,
        route: job.route.clone(),
        ways: Ways { told: Some(&job.resume), other: &|| job.router.other() },
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

    fn stands(&mut self, status: MigrationStatus) {
        if status == MigrationStatus::PostcopyActive {
            self.job.report.forget_error();
        }
        self.job.set_status(status);
    }

    fn paused(&mut self, reason: &Error) {
        self.job.report.set_error(reason.text_of_pause());
        self.job.set_status(MigrationStatus::PostcopyPaused);
    }
}
