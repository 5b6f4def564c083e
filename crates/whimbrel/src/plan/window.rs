//! How much of the link the background takes, so that an urgent page finds it empty.
//!
//! A page that somebody waits for travels on a connection of its own, but through the same queue
//! of the same link, and a connection that is sent as fast as it goes keeps that queue full. So
//! the background is held a little below what the link can carry. How much that is only a full
//! link tells: for a few milliseconds in each fifth of a second the background is held by its
//! window alone, which fills the link with a queue as short as we like, and is measured.
//!
//! While nobody waits there is no rate, only a window wide enough that nothing is lost.

use std::collections::VecDeque;
use std::time::Duration;

use crate::channel::link::{Facts, Flow};

/// The queue that the window leaves room for while somebody waits, as time. It also is how late the
/// thread that refills it may come.
const QUEUE: Duration = Duration::from_micros(120);

/// The same beside a rate, where the window is only a bound for what is wrong with the rate.
const PACED_QUEUE: Duration = Duration::from_micros(180);

/// A round trip longer than the shortest by this shows a queue, which a rate should not leave.
const QUEUE_SEEN: Duration = Duration::from_micros(110);

/// The queue that may build while nobody waits.
const IDLE_QUEUE: Duration = Duration::from_millis(4);

/// Thousandths of the link that the background takes while somebody waits.
const SHARE: u64 = 965;

/// What it takes at the least, if a queue shows nevertheless: what looks like a queue may as well be
/// a processor that is busy.
const SHARE_LEAST: u64 = 925;

/// Nobody waits when nobody has asked for so long.
const PATIENCE: Duration = Duration::from_secs(1);

/// A probe takes at least this, and the paced phase after it this many times as long.
const PROBE: Duration = Duration::from_millis(8);
const PACED_PROBES: u32 = 24;
const PACED_MOST: Duration = Duration::from_secs(2);

/// How long the best rate counts.
const MEMORY: Duration = Duration::from_millis(700);

/// For so long the background does not hold back after it was seen to be of no use.
const RELEASE: Duration = Duration::from_secs(2);

/// A window below this starves the sender, whatever the link.
const WINDOW_LEAST: u64 = 16 << 10;
const WINDOW_MOST: u64 = 64 << 20;

/// The first window, and the least while nobody waits.
const WINDOW_FIRST: u64 = 64 << 10;
const IDLE_LEAST: u64 = 256 << 10;

/// A link that is faster than this, and short, is held by a window alone: the queue it leaves is as
/// short as time goes, and a rate, which the kernel keeps a tenth too late where processors are
/// busy, costs more than it saves.
const PACED_LINK_MOST: u64 = 600 << 20;
const FAST_LINK_RTT: Duration = Duration::from_micros(500);
const FAST_QUEUE: Duration = Duration::from_micros(200);

/// A rate below this is one that was not measured.
const RATE_LEAST: u64 = 1 << 20;
const CORRECTION_MOST: u64 = 1300;

/// One call to the kernel sends this much: what is in front of an urgent page at the least.
const PIECE: Duration = Duration::from_micros(70);
const PIECE_LEAST: usize = 8 << 10;
const PIECE_MOST: usize = 64 << 10;
const IDLE_PIECE_MOST: usize = 1 << 20;

/// What to do until [`Window::next`] is asked again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Outflow {
    /// How the connection is held.
    pub(crate) flow: Flow,
    /// Bytes to send at once, about.
    pub(crate) piece: usize,
    /// When to ask again.
    pub(crate) again: Duration,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// Nothing is known: the window grows with the rate until the rate no longer follows.
    Startup { stalls: u32 },
    /// Nobody waits: a wide window.
    Idle,
    /// Held by a short window, to see what the link can carry, which counts from `from`.
    Probe { from: Duration },
    /// Held by a rate; a queue showed at `queued` of the `looks`.
    Paced { target: u64, looks: u32, queued: u32 },
    /// Holding back was of no use: others fill the queue.
    Released,
}

/// Holds the background to what leaves the link's queue empty.
#[derive(Debug)]
pub(crate) struct Window {
    phase: Phase,
    /// When the phase ends, for those that end by the clock.
    until: Duration,
    /// Since when a rate is being measured, and the bytes acknowledged by then.
    mark: Option<(Duration, u64)>,
    /// Rates measured, with their times.
    rates: VecDeque<(Duration, u64)>,
    /// The highest rate ever measured.
    peak: u64,
    /// Thousandths of the rate that is meant that have to be set for it to be reached: the kernel
    /// sends a little late.
    correction: u64,
    /// When the rate was adjusted.
    adjusted: Duration,
    /// The shortest round trip seen since a time.
    shortest: (Duration, Duration),
}

impl Window {
    pub(crate) fn new() -> Window {
        Window {
            phase: Phase::Startup { stalls: 0 },
            until: Duration::ZERO,
            mark: None,
            rates: VecDeque::new(),
            peak: 0,
            correction: 1000,
            adjusted: Duration::ZERO,
            shortest: (Duration::ZERO, Duration::MAX),
        }
    }

    /// Bytes a second that the link can carry, as far as it is known.
    pub(crate) fn link_rate(&self) -> u64 {
        self.rates.iter().map(|&(_, rate)| rate).max().unwrap_or(0)
    }

    /// What to do from `now` on. `waited` is how long ago a page was last asked for; `None` when
    /// there never was one.
    pub(crate) fn next(
        &mut self,
        now: Duration,
        facts: &Facts,
        waited: Option<Duration>,
    ) -> Outflow {
        let facts = &sane(facts);
        let awaited = waited.is_some_and(|waited| waited < PATIENCE);
        match self.phase {
            Phase::Startup { stalls } => self.startup(now, facts, stalls, awaited),
            Phase::Idle if awaited => self.held(now, facts),
            Phase::Idle => self.idle_on(now, facts),
            Phase::Probe { .. } | Phase::Paced { .. } if !awaited => self.idle(now, facts),
            Phase::Probe { from } => self.probe_on(now, facts, from),
            Phase::Paced { .. } if now < self.until => self.adjust(now, facts),
            Phase::Paced { target, looks, queued } => {
                self.settle(now, facts, target, looks > 2 * queued);
            }
            Phase::Released => self.released_on(now, facts, awaited),
        }
        self.give_up_in_vain(now, facts);
        self.outflow(facts)
    }

    fn startup(&mut self, now: Duration, facts: &Facts, stalls: u32, awaited: bool) {
        const STALLS: u32 = 3;
        let best = self.link_rate();
        let Some(rate) = self.measured(now, facts, (PROBE / 2).max(2 * facts.rtt)) else { return };
        self.learn(now, rate);
        let stalls = if rate > best + best / 4 { 0 } else { stalls + 1 };
        match (stalls < STALLS, awaited) {
            (true, _) => self.phase = Phase::Startup { stalls },
            (false, true) => self.held(now, facts),
            (false, false) => self.idle(now, facts),
        }
    }

    fn idle(&mut self, now: Duration, facts: &Facts) {
        self.phase = Phase::Idle;
        self.mark = Some((now, facts.acked));
        self.shortest = (now, Duration::MAX);
    }

    fn idle_on(&mut self, now: Duration, facts: &Facts) {
        if let Some(rate) = self.measured(now, facts, probe_time(facts)) {
            self.learn(now, rate);
        }
    }

    /// Somebody waits from now on.
    fn held(&mut self, now: Duration, facts: &Facts) {
        self.shortest = (now, Duration::MAX);
        self.pace(now, facts);
    }

    fn probe(&mut self, now: Duration, facts: &Facts) {
        // What is acknowledged during the first round trip was sent before.
        let from = now + facts.rtt + PROBE / 8;
        self.phase = Phase::Probe { from };
        self.until = from + probe_time(facts);
        self.mark = None;
    }

    fn probe_on(&mut self, now: Duration, facts: &Facts, from: Duration) {
        if now < from {
            return;
        }
        if self.mark.is_none() {
            self.mark = Some((now, facts.acked));
            self.until = now + probe_time(facts);
        }
        if now >= self.until {
            if let Some(rate) = self.measured(now, facts, Duration::ZERO) {
                self.learn(now, rate);
            }
            self.pace(now, facts);
        }
    }

    fn pace(&mut self, now: Duration, facts: &Facts) {
        let target = share(self.link_rate(), SHARE);
        self.phase = Phase::Paced { target, looks: 0, queued: 0 };
        self.until = now + (PACED_PROBES * probe_time(facts)).min(PACED_MOST);
        self.mark = Some((now, facts.acked));
    }

    /// Gives way a little where a queue shows, and takes it back where none does.
    fn adjust(&mut self, now: Duration, facts: &Facts) {
        let (least, most) = (share(self.link_rate(), SHARE_LEAST), share(self.link_rate(), SHARE));
        let due = now >= self.adjusted + (PROBE / 4).max(2 * facts.rtt);
        let Phase::Paced { target, looks, queued } = &mut self.phase else { return };
        if !due {
            return;
        }
        self.adjusted = now;
        *looks += 1;
        if facts.rtt <= facts.min_rtt + facts.min_rtt / 4 + QUEUE_SEEN {
            *target = share(*target, 1010).min(most);
            return;
        }
        *queued += 1;
        if *target > least {
            *target = share(*target, 980).max(least);
        } else {
            // What is known of the link is wrong, or what shows is no queue but a busy processor:
            // then a rate does no good, and a window is enough.
            self.probe(now, facts);
        }
    }

    /// Learns from a paced phase that went to its end; `even` if it left the queue empty.
    fn settle(&mut self, now: Duration, facts: &Facts, target: u64, even: bool) {
        let reached = self.measured(now, facts, Duration::ZERO).unwrap_or(0);
        if reached > 0 && even {
            let needed = u128::from(self.correction) * u128::from(target) / u128::from(reached);
            let needed = u64::try_from(needed).unwrap_or(u64::MAX);
            self.correction = needed.clamp(1000, CORRECTION_MOST);
        } else {
            self.correction -= (self.correction - 1000) / 4;
        }
        self.probe(now, facts);
    }

    fn release(&mut self, now: Duration, facts: &Facts) {
        self.phase = Phase::Released;
        self.until = now + RELEASE;
        self.mark = Some((now, facts.acked));
    }

    fn released_on(&mut self, now: Duration, facts: &Facts, awaited: bool) {
        if let Some(rate) = self.measured(now, facts, probe_time(facts)) {
            self.learn(now, rate);
        }
        if now >= self.until {
            if awaited { self.held(now, facts) } else { self.idle(now, facts) }
        }
    }

    /// Holds nothing back for a while if the queue was never as short as our window must have made
    /// it, were it ours.
    fn give_up_in_vain(&mut self, now: Duration, facts: &Facts) {
        const SLACK: Duration = Duration::from_millis(2);
        let queue = match self.phase {
            Phase::Startup { .. } | Phase::Released => return,
            Phase::Idle => IDLE_QUEUE,
            Phase::Probe { .. } | Phase::Paced { .. } => PACED_QUEUE,
        };
        let (since, shortest) = self.shortest;
        let shortest = shortest.min(facts.rtt);
        self.shortest = (since, shortest);
        if now < since + PACED_PROBES * probe_time(facts) {
            return;
        }
        self.shortest = (now, Duration::MAX);
        // By the best rate, since a rate that is low now may be so because others fill the queue.
        let ours = time(self.window(facts, queue), self.peak).max(queue);
        if shortest > facts.min_rtt + facts.min_rtt / 4 + 3 * ours + SLACK {
            self.release(now, facts);
        }
    }

    /// The rate since the mark, and a new mark, if `least` has gone by.
    fn measured(&mut self, now: Duration, facts: &Facts, least: Duration) -> Option<u64> {
        let Some((since, acked)) = self.mark else {
            self.mark = Some((now, facts.acked));
            return None;
        };
        let elapsed = now.saturating_sub(since);
        if elapsed < least.max(Duration::from_millis(1)) {
            return None;
        }
        self.mark = Some((now, facts.acked));
        let bytes = u128::from(facts.acked.saturating_sub(acked));
        Some(u64::try_from(bytes * 1_000_000 / elapsed.as_micros()).unwrap_or(u64::MAX))
    }

    fn learn(&mut self, now: Duration, rate: u64) {
        self.rates.push_back((now, rate));
        self.peak = self.peak.max(rate);
        while self.rates.len() > 1 && self.rates[0].0 + MEMORY < now {
            self.rates.pop_front();
        }
    }

    fn outflow(&self, facts: &Facts) -> Outflow {
        let rate = self.link_rate();
        let piece = page_multiple(bytes(rate, PIECE)).clamp(PIECE_LEAST, PIECE_MOST);
        let (window, paced, piece) = match self.phase {
            Phase::Startup { .. } => {
                let window = self.window(facts, QUEUE).saturating_mul(5) / 2;
                (Some(window.clamp(WINDOW_FIRST, WINDOW_MOST)), None, piece)
            }
            Phase::Idle => {
                let window = self.window(facts, IDLE_QUEUE).max(IDLE_LEAST);
                let piece = page_multiple(window / 4).clamp(PIECE_MOST, IDLE_PIECE_MOST);
                (Some(window), None, piece)
            }
            Phase::Probe { .. } => (Some(self.window(facts, QUEUE)), None, piece),
            Phase::Paced { .. } if is_fast(rate, facts) => {
                (Some(self.window(facts, FAST_QUEUE)), None, piece)
            }
            Phase::Paced { target, .. } => {
                let paced = share(target, self.correction).max(RATE_LEAST);
                (Some(self.window(facts, PACED_QUEUE).max(2 * piece as u64)), Some(paced), piece)
            }
            Phase::Released => (None, None, IDLE_PIECE_MOST),
        };
        let again = (PROBE / 4).max(facts.rtt / 2).min(PROBE * 4);
        Outflow { flow: Flow { window, rate: paced }, piece, again }
    }

    /// Bytes under way that keep the link busy and `queue` of it waiting.
    fn window(&self, facts: &Facts, queue: Duration) -> u64 {
        let time = facts.min_rtt + facts.min_rtt / 4 + queue;
        bytes(self.link_rate(), time).clamp(WINDOW_LEAST, WINDOW_MOST)
    }
}

/// TCP says nonsense before it has measured anything.
fn sane(facts: &Facts) -> Facts {
    const MOST: Duration = Duration::from_secs(1);
    Facts { rtt: facts.rtt.min(MOST), min_rtt: facts.min_rtt.min(facts.rtt).min(MOST), ..*facts }
}

fn is_fast(rate: u64, facts: &Facts) -> bool {
    rate > PACED_LINK_MOST && facts.min_rtt < FAST_LINK_RTT
}

fn probe_time(facts: &Facts) -> Duration {
    PROBE.max(3 * facts.rtt)
}

fn share(rate: u64, thousandths: u64) -> u64 {
    u64::try_from(u128::from(rate) * u128::from(thousandths) / 1000).unwrap_or(u64::MAX)
}

fn bytes(rate: u64, time: Duration) -> u64 {
    u64::try_from(u128::from(rate) * time.as_micros() / 1_000_000).unwrap_or(u64::MAX)
}

/// How long `bytes` take.
fn time(bytes: u64, rate: u64) -> Duration {
    let micros = u128::from(bytes) * 1_000_000 / u128::from(rate.max(1));
    Duration::from_micros(u64::try_from(micros).unwrap_or(u64::MAX)).min(Duration::from_secs(60))
}

fn page_multiple(bytes: u64) -> usize {
    usize::try_from(bytes & !0xfff).unwrap_or(usize::MAX)
}

#[cfg(test)]
mod tests;
