//! Sending RAM while the guest runs, again and again, until what is left is little enough.

use std::sync::atomic::Ordering;
use std::time::Duration;

use whimbrel_ram::{PageMap, Sweep, TARGET_PAGE};
use whimbrel_wire::encode_end_of_section;

use super::Job;
use super::pages::{BATCH_MAX, Pages};
use super::setup::{RAM_SECTION, Stream};
use super::undo::Logging;
use super::xbzrle::Deltas;
use crate::error::Error;
use crate::plan::{Convergence, Next, Pace, Throttle};
use crate::report::{add, set};
use crate::settings::Capability;
use crate::status::Event;

/// How long one PART lasts, so that decisions are taken often enough.
const PART: Duration = Duration::from_millis(50);

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
    sweep: Sweep,
    pages: Pages<'j>,
    pace: Pace,
    convergence: Convergence,
    throttle: Throttle,
    bytes_at_sync: u64,
}

impl<'j> Precopy<'j> {
    pub(super) fn new(job: &'j Job, map: &'j PageMap, log: &'j Logging<'j>) -> Precopy<'j> {
        let now = job.now();
        let ram = job.guest.vm().ram();
        Precopy {
            job,
            map,
            log,
            sweep: map.sweep(),
            pages: Pages::new(
                ram,
                &job.report,
                job.has(Capability::Xbzrle).then(|| Deltas::new(job)),
            )
            .leave_untouched(),
            pace: Pace::new(job.parameters().max_bandwidth, now),
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
                return Ok(Switch::Postcopy);
            }
            let parameters = self.job.parameters();
            let pending = self.map.pending() * TARGET_PAGE.bytes() as u64;
            self.tell(pending);
            match self.convergence.next(pending, fresh, turn_done, &parameters) {
                Next::SwitchOver => return Ok(Switch::Precopy),
                Next::Sync => {
                    self.sync(stream)?;
                    // What has not been sent once cannot be a delta of anything.
                    self.pages.first_pass_is_over();
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
    fn sync(&mut self, stream: &Stream) -> Result<(), Error> {
        let dirtied = self.log.take_into(self.map)?;
        let now = self.job.now();
        let passes = self.job.report.counters.dirty_sync_count.fetch_add(1, Ordering::Relaxed) + 1;
        self.convergence.synced(dirtied, now);
        set(&self.job.report.counters.dirty_pages_rate, self.convergence.dirty_pages_rate());
        if self.job.has(Capability::Events) {
            self.job.guest.emit(&Event::MigrationPass(passes));
        }
        let bytes = stream.out.bytes();
        let sent = bytes - std::mem::replace(&mut self.bytes_at_sync, bytes);
        if self.job.has(Capability::AutoConverge) {
            let dirtied = dirtied * TARGET_PAGE.bytes() as u64;
            let parameters = self.job.parameters();
            if let Some(percent) = self.throttle.synced(&parameters, dirtied, sent, now) {
                self.job.guest.vm().throttle(percent);
                self.job.report.counters.throttle_percent.store(percent, Ordering::Relaxed);
            }
        }
        Ok(())
    }

    /// One PART of the `ram` section; says whether the sweep has come to its end in it.
    fn part(&mut self, stream: &mut Stream) -> Result<bool, Error> {
        RAM_SECTION.encode_part(stream.out.words());
        let end = self.job.now() + PART;
        let mut turn_done = false;
        while !turn_done && self.job.now() < end && !self.job.postcopy.is_set() {
            let before = stream.out.bytes() - stream.out.gathered() as u64;
            self.pace.set_rate(self.job.parameters().max_bandwidth, self.job.now());
            let batch = self.pace.batch(BATCH_MAX);
            let log = self.log;
            let out = &mut stream.out;
            turn_done = self.pages.gather(self.map, &mut self.sweep, Some(log), out, batch)?;
            stream.flush()?;
            self.pages.sent();
            let bytes = stream.out.bytes() - before;
            add(&self.job.report.counters.precopy_bytes, bytes);
            let wait = self.pace.sent(bytes, self.job.now());
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
        stream.check_answers()?;
        Ok(turn_done)
    }

    fn tell(&self, pending: u64) {
        let parameters = self.job.parameters();
        let counters = &self.job.report.counters;
        let bandwidth = self.convergence.bandwidth(&parameters);
        set(&counters.remaining, pending);
        set(&counters.bytes_per_second, bandwidth);
        set(&counters.pages_per_second, bandwidth / TARGET_PAGE.bytes() as u64);
        if let Some(expected) = self.convergence.expected_downtime(pending, &parameters) {
            let ms = u64::try_from(expected.as_millis()).unwrap_or(u64::MAX);
            set(&counters.expected_downtime_ms, ms);
        }
    }
}
