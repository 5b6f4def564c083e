//! The background of a postcopy: all pages that nobody asked for, and on a single channel those
//! that somebody did.
//!
//! It claims little at a time, and only what the channel takes at once: what is claimed cannot go
//! on the urgent channel any more. What it has begun of a host page that somebody waits for, it
//! finishes first and unpaced.

use std::time::Duration;

use whimbrel_ram::{Asked, PageMap, Sweep, TARGET_PAGE};
use whimbrel_wire::encode_end_of_section;

use super::out::Out;
use super::pages::Pages;
use super::said::Said;
use super::setup::RAM_SECTION;
use super::wanted::Wanted;
use crate::error::Error;
use crate::plan::{Pace, Share};
use crate::report::{Report, add, set};
use crate::settings::Parameters;

/// How long it steps back for urgent pages at once.
const STEP_BACK: Duration = Duration::from_millis(1);

/// How long it waits at most before it looks again whether somebody asks.
const LOOK: Duration = Duration::from_millis(20);

/// Bytes claimed and sent at once.
const PIECE: usize = 64 << 10;

/// The sender of the rest.
pub(super) struct Background<'a> {
    pub(super) map: &'a PageMap,
    pub(super) pages: Pages<'a>,
    pub(super) sweep: Sweep,
    pub(super) report: &'a Report,
    pub(super) parameters: &'a (dyn Fn() -> Parameters + Sync),
    pub(super) wanted: &'a Wanted,
    pub(super) said: &'a Said,
}

impl Background<'_> {
    /// Sends until nothing is left, as one PART of the `ram` section.
    pub(super) fn run(mut self, out: &mut Out) -> Result<(), Error> {
        RAM_SECTION.encode_part(out.words());
        let now = || self.report.started().elapsed();
        let mut pace = Pace::new((self.parameters)().max_postcopy_bandwidth, now());
        let mut share = Share::default();
        loop {
            if self.said.is_over() {
                // It says why, or has a last word before everything was sent.
                return Err(Error::PeerGone);
            }
            let before = out.bytes();
            let asked = self.take_asked(out)?;
            if !asked && !self.pages.is_waited_for() {
                if self.map.pending() == 0 && !self.pages.has_begun_one() {
                    break;
                }
                if self.wanted.is_urgent() && !share.may_go(self.wanted.urgent_bytes()) {
                    self.wanted.wait(STEP_BACK);
                    continue;
                }
                pace.set_rate((self.parameters)().max_postcopy_bandwidth, now());
                let wait = pace.wait(now());
                if wait > Duration::ZERO {
                    self.wanted.wait(wait.min(LOOK));
                    continue;
                }
            }
            out.channel().ready_to_send(None)?;
            self.gather(out)?;
            out.flush()?;
            self.pages.sent();
            let bytes = out.bytes() - before;
            share.went(bytes);
            if !asked {
                pace.sent(bytes, now());
            }
            self.tell(out, bytes);
        }
        encode_end_of_section(out.words());
        RAM_SECTION.encode_footer(out.words());
        out.flush()
    }

    /// Sends the page that was asked for first, where such pages go on this channel.
    fn take_asked(&mut self, out: &mut Out) -> Result<bool, Error> {
        if self.pages.has_begun_one() {
            return Ok(false);
        }
        while let Some(page) = self.wanted.next() {
            match self.map.claim(page) {
                Asked::Claimed(claim) => {
                    let unit = self.map.unit(page.block);
                    self.pages.gather_claim(claim, out, PIECE)?;
                    self.wanted
                        .follow(page.block, whimbrel_ram::TargetPage(page.target_pages(unit).end));
                    return Ok(true);
                }
                Asked::AlreadySent | Asked::UnderWay => self.report.already_sent(),
            }
        }
        Ok(false)
    }

    /// A piece of what is next.
    fn gather(&mut self, out: &mut Out) -> Result<(), Error> {
        if self.pages.has_begun_one() || out.gathered() >= PIECE {
            return self.pages.gather_open(out, PIECE);
        }
        if let Some((block, page)) = self.wanted.take_hint() {
            self.sweep.go_on_from(block, page);
        }
        self.sweep.set_batch(u32::try_from(PIECE / TARGET_PAGE.bytes()).unwrap_or(1).min(64));
        self.pages.gather(self.map, &mut self.sweep, None, out, PIECE)?;
        Ok(())
    }

    fn tell(&self, out: &Out, bytes: u64) {
        let counters = &self.report.counters;
        let urgent = self.wanted.urgent_bytes();
        add(&counters.background_bytes, bytes);
        set(
            &counters.postcopy_bytes,
            counters.background_bytes.load(std::sync::atomic::Ordering::Relaxed) + urgent,
        );
        set(&counters.transferred, out.bytes() + urgent);
        set(&counters.remaining, self.map.pending() * TARGET_PAGE.bytes() as u64);
    }
}
