//! The background of a postcopy: all pages that nobody asked for, and on a single channel those
//! that somebody did.
//!
//! It claims little at a time, and only what the channel takes at once: what is claimed cannot go
//! on the urgent channel any more. What it has begun of a host page that somebody waits for, it
//! finishes first and unpaced.

use std::time::Duration;

use whimbrel_ram::{Asked, PageMap, Sweep, TARGET_PAGE, TargetPage};
use whimbrel_wire::{Command, encode_end_of_section};

use super::held::Held;
use super::hot::Hot;
use super::multifd::Crew;
use super::out::Out;
use super::pages::Pages;
use super::said::Said;
use super::setup::RAM_SECTION;
use super::wanted::Wanted;
use crate::error::Error;
use crate::plan::{Pace, Rate, Share};
use crate::recovery::{Beat, PING_BEAT};
use crate::report::{Report, add, get, set};
use crate::settings::Current;

/// How long it steps back for urgent pages at once.
const STEP_BACK: Duration = Duration::from_millis(1);

/// How long it waits at most before it looks again whether somebody asks.
const LOOK: Duration = Duration::from_millis(20);

/// The sender of the rest.
pub(super) struct Background<'a> {
    pub(super) map: &'a PageMap,
    pub(super) pages: Pages<'a>,
    pub(super) sweep: Sweep,
    pub(super) report: &'a Report,
    pub(super) parameters: &'a Current,
    pub(super) wanted: &'a Wanted,
    pub(super) said: &'a Said,
    pub(super) held: Held,
    /// What goes before the rest.
    pub(super) hot: Option<Hot>,
    /// How fast it all goes, for the report.
    pub(super) rate: Rate,
    /// When to ask the destination whether it is there.
    pub(super) beat: Beat,
}

fn begin_part(out: &mut Out) {
    out.name_blocks_again();
    RAM_SECTION.encode_part(out.words());
}

fn end_part(out: &mut Out) {
    encode_end_of_section(out.words());
    RAM_SECTION.encode_footer(out.words());
}

impl Background<'_> {
    /// Bytes a second that nobody asked for.
    fn bandwidth(&self) -> u64 {
        self.parameters.with(|p| p.max_postcopy_bandwidth)
    }

    /// Sends until nothing is left, as PARTs of the `ram` section; `beside` send, too.
    pub(super) fn run(mut self, out: &mut Out, beside: Option<&Crew<'_>>) -> Result<Beat, Error> {
        begin_part(out);
        let now = || self.report.started().elapsed();
        let mut pace = Pace::new(self.bandwidth(), now());
        let mut share = Share::default();
        loop {
            if self.said.is_over() {
                // It says why, or has a last word before everything was sent.
                return Err(Error::PeerGone);
            }
            let before = out.bytes();
            if !self.pages.has_begun_one() && self.beat.is_due() {
                // Between two PARTs, where commands stand.
                end_part(out);
                Command::Ping(PING_BEAT).encode(out.words());
                begin_part(out);
                out.flush()?;
            }
            // Also all the rest of a host page that somebody waits for: no pace is kept with it.
            let asked = self.take_asked(out)? || self.pages.is_waited_for();
            pace.set_rate(self.bandwidth(), now());
            let wait = pace.wait(now());
            if !asked {
                if self.map.pending() == 0 && !self.pages.has_begun_one() {
                    break;
                }
                if self.wanted.is_urgent() && !share.may_go(self.wanted.urgent_bytes()) {
                    self.wanted.wait(STEP_BACK);
                    continue;
                }
                if wait > Duration::ZERO {
                    self.wanted.wait(wait.min(LOOK));
                    continue;
                }
            }
            self.held.look(out.channel(), self.wanted, now());
            out.channel().ready_to_send(None)?;
            // What nobody asked for goes along only where that is paid for.
            let alone = asked && wait > Duration::ZERO;
            match alone {
                true => self.pages.gather_open(out, self.held.piece)?,
                false => self.gather(out)?,
            }
            out.flush()?;
            self.pages.sent();
            let bytes = out.bytes() - before;
            share.went(bytes);
            if !alone {
                pace.sent(bytes, now());
            }
            self.tell(out, bytes, beside.map_or(0, Crew::bytes));
        }
        self.held.let_go(out.channel());
        end_part(out);
        out.flush()?;
        Ok(self.beat)
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
                    self.pages.gather_claim(claim, out, self.held.piece)?;
                    self.wanted.follow(page.block, TargetPage(page.target_pages(unit).end));
                    return Ok(true);
                }
                Asked::AlreadySent | Asked::UnderWay => self.report.already_sent(),
            }
        }
        Ok(false)
    }

    /// A piece of what is next.
    fn gather(&mut self, out: &mut Out) -> Result<(), Error> {
        let piece = self.held.piece;
        if self.pages.has_begun_one() || out.gathered() >= piece {
            return self.pages.gather_open(out, piece);
        }
        if let Some((block, page)) = self.wanted.take_hint() {
            self.sweep.go_on_from(block, page);
            if let Some(hot) = &mut self.hot {
                hot.go_on_from(block, page);
            }
        }
        self.gather_hot(out)?;
        if out.gathered() > 0 {
            return Ok(());
        }
        let batch = u32::try_from(piece / TARGET_PAGE.bytes()).unwrap_or(u32::MAX);
        self.sweep.set_batch(batch.clamp(1, u64::BITS));
        self.pages.gather(self.map, &mut self.sweep, None, out, piece)?;
        Ok(())
    }

    /// A piece of what goes before the rest, if there is any near.
    fn gather_hot(&mut self, out: &mut Out) -> Result<(), Error> {
        let Some(hot) = &mut self.hot else { return Ok(()) };
        let piece = self.held.piece;
        while out.gathered() < piece && !out.is_full() && !self.pages.has_begun_one() {
            let Some(page) = hot.next(self.map) else { break };
            if let Asked::Claimed(claim) = self.map.claim(page) {
                self.pages.gather_claim(claim, out, piece)?;
            }
        }
        if hot.is_over() {
            self.hot = None;
        }
        Ok(())
    }

    fn tell(&mut self, out: &Out, bytes: u64, beside: u64) {
        let counters = &self.report.counters;
        let urgent = self.wanted.urgent_bytes();
        add(&counters.background_bytes, bytes);
        let sent = get(&counters.background_bytes) + urgent + beside;
        set(&counters.postcopy_bytes, sent);
        set(&counters.transferred, out.bytes() + urgent);
        set(&counters.remaining, self.map.pending() * TARGET_PAGE.bytes() as u64);
        if let Some(rate) = self.rate.sent(sent, self.report.started().elapsed()) {
            set(&counters.bytes_per_second, rate);
            set(&counters.pages_per_second, rate / TARGET_PAGE.bytes() as u64);
        }
    }
}
