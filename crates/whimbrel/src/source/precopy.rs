//! Sending RAM while the guest runs, again and again, until what is left is little enough.

use std::sync::atomic::Ordering;
use std::time::Duration;

use whimbrel_ram::{PageMap, Sweep, TARGET_PAGE};
use whimbrel_wire::encode_end_of_section;

use super::Job;
use super::multifd::Crew;
use super::pages::{BATCH_MAX, Pages};
use super::setup::{RAM_SECTION, Stream};
use super::undo::Logging;
use super::xbzrle::Deltas;
use crate::error::Error;
use crate::plan::{Convergence, Next, Pace, Throttle};
use crate::report::{add, set};
use crate::settings::{Capability, Parameters};
use crate::status::Event;

/// How long one PART lasts, so that decisions are taken often enough.
const PART: Duration = Duration::from_millis(50);

/// How long the channels are left alone at most.
const LOOK: Duration = Duration::from_millis(10);

/// How the guest is to be switched over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Switch {
    /// Little enough is left: all of it goes while the guest stands still.
    Precopy,
    /// On request: what is left goes after the guest.
    Postcopy,
}

/// The state `active`.
#[derive(Debug)]
pub(super) struct Precopy<'j> {
    job: &'j Job,
    map: &'j PageMap,
    log: &'j Logging<'j>,
    road: Road<'j>,
    convergence: Convergence,
    throttle: Throttle,
    bytes_at_sync: u64,
}

/// How the pages go.
#[derive(Debug)]
enum Road<'j> {
    /// On the main channel.
    Main { pages: Box<Pages<'j>>, sweep: Sweep, pace: Pace },
    /// On multifd channels. `turn`: they have begun something that is not marked as ended.
    Channels { crew: &'j Crew<'j>, turn: bool },
}

impl<'j> Precopy<'j> {
    pub(super) fn new(
        job: &'j Job,
        map: &'j PageMap,
        log: &'j Logging<'j>,
        crew: Option<&'j Crew<'j>>,
    ) -> Precopy<'j> {
        let now = job.now();
        let ram = job.guest.vm().ram();
        let road = match crew {
            Some(crew) => Road::Channels { crew, turn: false },
            None => {
                let deltas = job.has(Capability::Xbzrle).then(|| Deltas::new(job));
                let pages = Pages::new(ram, &job.report, deltas).leave_untouched();
                let pace = Pace::new(job.parameters().with(|p| p.max_bandwidth), now);
                Road::Main { pages: Box::new(pages), sweep: map.sweep(), pace }
            }
        };
        Precopy {
            job,
            map,
            log,
            road,
            convergence: Convergence::new(now),
            throttle: Throttle::default(),
            bytes_at_sync: 0,
        }
    }

    /// Iterates until it is time for the switchover.
    pub(super) fn run(&mut self, stream: &mut Stream) -> Result<Switch, Error> {
        let mut turn_done = false;
        let mut fresh = false;
        loop {
            if self.job.postcopy.is_set() {
                self.end_turn(stream)?;
                return Ok(Switch::Postcopy);
            }
            let pending = self.map.pending() * TARGET_PAGE.bytes() as u64;
            self.tell(pending);
            let next = |p: &Parameters| self.convergence.next(pending, fresh, turn_done, p);
            match self.job.parameters().with(next) {
                Next::SwitchOver => return Ok(Switch::Precopy),
                Next::Sync => {
                    self.sync(stream)?;
                    // What has not been sent once cannot be a delta of anything.
                    match &mut self.road {
                        Road::Main { pages, .. } => pages.first_pass_is_over(),
                        Road::Channels { crew, .. } => crew.first_pass_is_over(),
                    }
                    (fresh, turn_done) = (true, false);
                }
                Next::Iterate => {
                    turn_done = self.part(stream)?;
                    fresh = false;
                }
            }
        }
    }

    /// Takes the dirty log.
    fn sync(&mut self, stream: &mut Stream) -> Result<(), Error> {
        // A page that is dirty again may go on another channel than before.
        self.end_turn(stream)?;
        let dirtied = self.log.take_into(self.map)?;
        let now = self.job.now();
        let passes = self.job.report.counters.dirty_sync_count.fetch_add(1, Ordering::Relaxed) + 1;
        self.convergence.synced(dirtied, now);
        set(&self.job.report.counters.dirty_pages_rate, self.convergence.dirty_pages_rate());
        if self.job.has(Capability::Events) {
            self.job.guest.emit(&Event::MigrationPass(passes));
        }
        let bytes = self.bytes(stream);
        let sent = bytes - std::mem::replace(&mut self.bytes_at_sync, bytes);
        if self.job.has(Capability::AutoConverge) {
            let dirtied = dirtied * TARGET_PAGE.bytes() as u64;
            let throttle = &mut self.throttle;
            let percent = |p: &Parameters| throttle.synced(p, dirtied, sent, now);
            if let Some(percent) = self.job.parameters().with(percent) {
                self.job.guest.vm().throttle(percent);
                self.job.report.counters.throttle_percent.store(percent, Ordering::Relaxed);
            }
        }
        Ok(())
    }

    /// Bytes sent and gathered so far, on all channels.
    fn bytes(&self, stream: &Stream) -> u64 {
        let beside = match &self.road {
            Road::Main { .. } => 0,
            Road::Channels { crew, .. } => crew.bytes(),
        };
        stream.out.bytes() + beside
    }

    /// Sends for the time of one PART of the `ram` section; says whether the sweep has come to its
    /// end in it.
    fn part(&mut self, stream: &mut Stream) -> Result<bool, Error> {
        let end = self.job.now() + PART;
        let turn_done = match &self.road {
            Road::Main { .. } => self.part_on_main(stream, end)?,
            Road::Channels { crew, .. } => self.part_on_channels(crew, stream)?,
        };
        stream.check_answers()?;
        Ok(turn_done)
    }

    fn part_on_main(&mut self, stream: &mut Stream, end: Duration) -> Result<bool, Error> {
        let Road::Main { pages, sweep, pace } = &mut self.road else {
            unreachable!("looked at by the caller");
        };
        RAM_SECTION.encode_part(stream.out.words());
        let mut turn_done = false;
        while !turn_done && self.job.now() < end && !self.job.postcopy.is_set() {
            let before = stream.out.bytes() - stream.out.gathered() as u64;
            pace.set_rate(self.job.parameters().with(|p| p.max_bandwidth), self.job.now());
            let batch = pace.batch(BATCH_MAX);
            turn_done = pages.gather(self.map, sweep, Some(self.log), &mut stream.out, batch)?;
            stream.flush()?;
            pages.sent();
            let bytes = stream.out.bytes() - before;
            add(&self.job.report.counters.precopy_bytes, bytes);
            let wait = pace.sent(bytes, self.job.now());
            if wait > Duration::ZERO {
                stream.out.channel().pause(wait)?;
            }
            let now = self.job.now();
            self.convergence.sent(bytes, now);
            set(&self.job.report.counters.transferred, stream.out.bytes());
        }
        encode_end_of_section(stream.out.words());
        RAM_SECTION.encode_footer(stream.out.words());
        stream.flush()?;
        Ok(turn_done)
    }

    /// Lets the channels send; what is said on the main channel is only what they cannot say.
    fn part_on_channels(&mut self, crew: &Crew<'_>, stream: &mut Stream) -> Result<bool, Error> {
        let before = self.bytes(stream);
        crew.set_rate(Some(self.job.parameters().with(|p| p.max_bandwidth)));
        crew.set_agreed(stream.agreed());
        if let Road::Channels { turn, .. } = &mut self.road
            && !std::mem::replace(turn, true)
        {
            crew.begin();
        }
        let end = self.job.now() + PART;
        while !crew.wait(LOOK)? && self.job.now() < end && !self.job.postcopy.is_set() {}
        let turn_done = crew.has_walked();
        if turn_done || crew.dialect().mark_each_section {
            self.end_turn(stream)?;
        }
        let bytes = self.bytes(stream) - before;
        add(&self.job.report.counters.precopy_bytes, bytes);
        self.convergence.sent(bytes, self.job.now());
        set(&self.job.report.counters.transferred, stream.out.bytes());
        Ok(turn_done)
    }

    /// Everything the channels have begun is delivered before what comes next.
    fn end_turn(&mut self, stream: &mut Stream) -> Result<(), Error> {
        let Road::Channels { crew, turn } = &mut self.road else { return Ok(()) };
        if !std::mem::replace(turn, false) {
            return Ok(());
        }
        // One that has walked to the end only finishes what it has begun.
        if !crew.has_walked() {
            crew.halt();
        }
        while !crew.wait(PART)? {
            stream.check_answers()?;
        }
        RAM_SECTION.encode_part(stream.out.words());
        crew.mark(&mut stream.out);
        encode_end_of_section(stream.out.words());
        RAM_SECTION.encode_footer(stream.out.words());
        stream.flush()
    }

    fn tell(&self, pending: u64) {
        let counters = &self.job.report.counters;
        let told = |p: &Parameters| {
            (self.convergence.bandwidth(p), self.convergence.expected_downtime(pending, p))
        };
        let (bandwidth, expected) = self.job.parameters().with(told);
        set(&counters.remaining, pending);
        set(&counters.bytes_per_second, bandwidth);
        set(&counters.pages_per_second, bandwidth / TARGET_PAGE.bytes() as u64);
        if let Some(expected) = expected {
            let ms = u64::try_from(expected.as_millis()).unwrap_or(u64::MAX);
            set(&counters.expected_downtime_ms, ms);
        }
    }
}
