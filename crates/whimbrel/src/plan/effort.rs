//! How hard to compress, by what the pages then take to be sent.
//!
//! There is no model of the link, of the processors or of the other side here: what counts is how
//! long a packet took from its first byte packed to its last one sent, whatever it waited for. Now
//! and then some packets are packed otherwise, as a trial, and whichever way sends more pages is
//! kept. A trial that can only lose is broken off, and the more one has cost, the longer it is
//! until the next.

use std::time::Duration;

/// Wire bytes of a channel that its socket and that of the other side can take in without
/// anything having passed the link. Where less effort makes more bytes, what the first of them
/// tell is too good.
const BUFFERED: u64 = 8 << 20;

/// Packets a channel has to send before a rate is told by them.
const PACKETS: u64 = 6;

/// Nor is it told by less time than this, and a trial not broken off before half of it: threads
/// that share processors take turns of milliseconds.
const TIME: Duration = Duration::from_millis(30);

/// How much faster more effort has to be, or less of it may be slower at most: less leaves
/// processors to the guest, and noise should not have its way.
const MORE_GAINS: f64 = 1.03;
const LESS_GAINS: f64 = 0.98;

/// Where rates differ by less than this factor a trial lasts [`LONGER`]: it costs little.
const CLOSE: f64 = 1.1;
const LONGER: u32 = 4;

/// A trial whose rate is below this part of the usual one is broken off.
const LOST: f64 = 0.85;

/// The part of the time that trials may cost, and when the rate has changed of itself.
const COST: f64 = 0.02;
const COST_OF_CHANGE: f64 = 0.06;

/// A change of the rate by this factor makes it worth trying again.
const CHANGE: f64 = 1.3;

/// Between two trials at least, and at most where they cost nothing to speak of.
const PAUSE_MIN: Duration = Duration::from_millis(100);
const PAUSE_MAX: Duration = Duration::from_secs(5);

/// One packet that has gone out.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Gone {
    /// The rung it was packed at.
    pub(crate) rung: usize,
    /// Bytes of its pages.
    pub(crate) pages: u64,
    /// Bytes of its data.
    pub(crate) wire: u64,
    /// From the packet before it, or from its own beginning if its channel had nothing to do.
    pub(crate) took: Duration,
}

/// Chooses among rungs: 0 is not to compress at all, and each further one takes longer and makes
/// fewer bytes than the one before.
#[derive(Debug)]
pub(crate) struct Effort {
    rungs: usize,
    channels: u64,
    rung: usize,
    usual: Tally,
    /// The usual rate when it was compared last.
    compared: Option<f64>,
    trial: Option<Trial>,
    /// The neighbour that is tried next.
    next: Direction,
    /// When less may be tried again, and more.
    rests: [Rest; 2],
    /// Until then the buffers may still be full of what a trial has left in them.
    deaf: Duration,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Direction {
    Less,
    More,
}

/// Between trials in one direction.
#[derive(Debug, Clone, Copy)]
struct Rest {
    /// No trial before this, and none before that if the rate has changed.
    until: Duration,
    until_of_change: Duration,
    pause: Duration,
}

impl Rest {
    const NONE: Rest =
        Rest { until: Duration::ZERO, until_of_change: Duration::ZERO, pause: PAUSE_MIN };

    /// A trial has been lost, which cost so much.
    fn after(&mut self, cost: Duration, now: Duration) {
        self.pause = (2 * self.pause).min(PAUSE_MAX);
        self.until = now + self.pause.max(cost.div_f64(COST));
        self.until_of_change = now + PAUSE_MIN.max(cost.div_f64(COST_OF_CHANGE));
    }
}

#[derive(Debug)]
struct Trial {
    rung: usize,
    began: Duration,
    /// All of it, and what came behind the part that buffers may have taken in.
    all: Tally,
    settled: Tally,
}

/// Pages and the time that they took, on all channels.
#[derive(Debug, Default, Clone, Copy)]
struct Tally {
    packets: u64,
    pages: u64,
    wire: u64,
    took: Duration,
}

impl Tally {
    fn add(&mut self, gone: Gone) {
        self.packets += 1;
        self.pages += gone.pages;
        self.wire += gone.wire;
        self.took += gone.took;
    }

    /// Makes way for what is newer.
    fn fade(&mut self) {
        self.packets /= 2;
        self.pages /= 2;
        self.wire /= 2;
        self.took /= 2;
    }

    /// Bytes of pages a second and channel.
    fn rate(&self) -> f64 {
        self.pages as f64 / self.took.as_secs_f64().max(1e-9)
    }

    fn tells(&self, packets: u64, time: Duration) -> bool {
        self.packets >= packets && self.took >= time
    }
}

impl Effort {
    /// So many rungs, beginning with `rung`.
    pub(crate) fn new(rungs: usize, rung: usize) -> Effort {
        assert!(rung < rungs, "one of the rungs");
        Effort {
            rungs,
            channels: 0,
            rung,
            usual: Tally::default(),
            compared: None,
            trial: None,
            next: Direction::More,
            rests: [Rest::NONE; 2],
            deaf: Duration::ZERO,
        }
    }

    /// One channel more.
    pub(crate) fn join(&mut self) {
        self.channels += 1;
    }

    /// For the next packet, of whatever channel.
    pub(crate) fn rung(&self) -> usize {
        self.trial.as_ref().map_or(self.rung, |trial| trial.rung)
    }

    /// A packet has gone out.
    pub(crate) fn gone(&mut self, gone: Gone, now: Duration) {
        let (packets, time) = self.enough();
        let Some(trial) = &mut self.trial else {
            if gone.rung == self.rung && now >= self.deaf {
                self.usual.add(gone);
                if self.usual.tells(4 * packets, 4 * time) {
                    self.usual.fade();
                }
            }
            self.begin(now);
            return;
        };
        // What was packed before the trial began says nothing of it.
        if gone.rung != trial.rung {
            return;
        }
        let fewer = trial.rung < self.rung;
        trial.all.add(gone);
        if !fewer || trial.all.wire > self.channels * BUFFERED {
            trial.settled.add(gone);
        }
        let usual = self.usual.rate();
        let lost = trial.all.tells(packets / 2, time / 2) && trial.all.rate() < LOST * usual;
        let settled = trial.settled.rate();
        let is_close = settled < CLOSE * usual && usual < CLOSE * settled;
        let longer = if is_close { LONGER } else { 1 };
        if lost || trial.settled.tells(packets * u64::from(longer), time * longer) {
            let gains = if fewer { LESS_GAINS } else { MORE_GAINS };
            let won = !lost && settled >= gains * usual;
            self.end(won, now);
        }
    }

    /// The packets, and the time of all channels together, that tell a rate.
    fn enough(&self) -> (u64, Duration) {
        let channels = u32::try_from(self.channels).unwrap_or(u32::MAX).max(1);
        (PACKETS * u64::from(channels), TIME * channels)
    }

    /// Begins a trial, if it is time for one.
    fn begin(&mut self, now: Duration) {
        let (packets, time) = self.enough();
        if !self.usual.tells(packets, time) {
            return;
        }
        let usual = self.usual.rate();
        let has_changed = self
            .compared
            .is_some_and(|compared| usual > compared * CHANGE || usual * CHANGE < compared);
        let neighbour = |direction: Direction| {
            let rest = &self.rests[direction as usize];
            let until = if has_changed { rest.until_of_change } else { rest.until };
            match direction {
                _ if now < until => None,
                Direction::Less => self.rung.checked_sub(1),
                Direction::More => Some(self.rung + 1).filter(|rung| *rung < self.rungs),
            }
        };
        let directions = [self.next, self.next.other()];
        let Some((rung, direction)) =
            directions.into_iter().find_map(|way| Some((neighbour(way)?, way)))
        else {
            return;
        };
        if has_changed {
            self.rests.iter_mut().for_each(|rest| rest.pause = PAUSE_MIN);
        }
        self.next = direction.other();
        self.compared = Some(usual);
        let (all, settled) = Default::default();
        self.trial = Some(Trial { rung, began: now, all, settled });
    }

    fn end(&mut self, won: bool, now: Duration) {
        let Some(trial) = self.trial.take() else { return };
        if won {
            // On in the same direction, at once; back only for a reason.
            self.next = if trial.rung < self.rung { Direction::Less } else { Direction::More };
            self.rung = trial.rung;
            self.usual = trial.settled;
            self.compared = Some(self.usual.rate());
            self.rests = [Rest::NONE; 2];
            return;
        }
        // What the time of the trial would have carried, and did not; and as long again, at most,
        // until the buffers are as they were.
        let part = (1.0 - trial.all.rate() / self.usual.rate()).clamp(0.0, 1.0);
        let took = now.saturating_sub(trial.began);
        let cost = took.mul_f64(part);
        self.deaf = now + took;
        let direction = if trial.rung < self.rung { Direction::Less } else { Direction::More };
        self.rests[direction as usize].after(cost, now);
    }
}

impl Direction {
    fn other(self) -> Direction {
        match self {
            Direction::Less => Direction::More,
            Direction::More => Direction::Less,
        }
    }
}

#[cfg(test)]
mod tests;
