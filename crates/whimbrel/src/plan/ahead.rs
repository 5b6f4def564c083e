//! When dirty pages go ahead of a checkpoint (COLO), so that little is left for the time in which the
//! guest stands still.

use std::time::Duration;

/// What takes no longer than this to send is left for the stop.
const WORTH_IT: Duration = Duration::from_millis(1);

/// Rounds before one checkpoint at most.
const ROUNDS_MAX: usize = 4;

/// A round is followed by another one if what is dirtied meanwhile is this share of it at most.
const SHRINKS: f64 = 0.5;

/// A round has not paid if more than this share of it was dirty again in less than half of the time: the
/// guest writes the same pages all the time.
const PAYS: f64 = 0.75;

/// Before how many checkpoints no round is sent after one that has not paid: the guest may become another.
const PAUSE: u32 = 16;

/// The first round may take this share of the time between two checkpoints.
const FIRST: f64 = 0.75;

/// Fewer pages say nothing of how long a page takes.
const TELLING: u64 = 1024;

/// How long a page takes before anything tells, in seconds: 1 GB/s.
const PAGE: f64 = 4e-6;

/// A guest that nothing is known of is sent ahead for the first time in this last part of the time between
/// two checkpoints.
const UNKNOWN: u32 = 4;

/// The time of a round is not known to the last bit: it begins earlier by this share of it, and that. Too
/// late costs the guest more than too early.
const SLACK: f64 = 0.25;
const SLACK_AT_LEAST: f64 = 1e-3;

/// Decides when a round of dirty pages is sent while the guest runs: as late as it can be, so that
/// few of its pages are dirtied again before the checkpoint; and another one behind it, if that
/// makes the rest much smaller.
///
/// It learns from what it is told.
#[derive(Debug, Default)]
pub(crate) struct Ahead {
    /// How long a page takes, in seconds; rather too long than too short.
    page: Option<f64>,
    /// Dirty pages when the log is taken for the first time since a checkpoint.
    first: Option<f64>,
    /// Pages that are dirtied in a second, as seen over the time of a round.
    rate: Option<f64>,
    /// Dirty pages when the log was taken last, and how many that were in a second.
    last: (f64, f64),
    /// Before how many checkpoints there is to be no round.
    pause: u32,
    /// How often the log was taken since the last checkpoint.
    taken: usize,
}

fn learn(known: &mut Option<f64>, now: f64) {
    *known = Some(known.map_or(now, |before| f64::midpoint(before, now)));
}

impl Ahead {
    /// The log was taken, `since` so long after the last time, and had so many dirty pages.
    pub(crate) fn taken(&mut self, dirty: u64, since: Duration) {
        let dirty = dirty as f64;
        let rate = dirty / since.as_secs_f64().max(1e-3);
        match self.taken {
            0 => {
                learn(&mut self.first, dirty);
                // Rather too little: over a long time many updates fall on pages that are dirty already.
                self.rate.get_or_insert(rate);
            }
            before => {
                learn(&mut self.rate, rate);
                let (last, last_rate) = self.last;
                if before == 1 && dirty > last * PAYS && rate > last_rate * 2.0 {
                    self.pause = PAUSE;
                }
            }
        }
        self.last = (dirty, rate);
        self.taken += 1;
    }

    /// So many pages were sent in so much time.
    pub(crate) fn sent(&mut self, pages: u64, took: Duration) {
        if pages >= TELLING {
            // Once a host may be busy with something else altogether.
            let most = self.page.map_or(f64::INFINITY, |before| before * 2.0);
            let now = (took.as_secs_f64() / pages as f64).min(most);
            learn(&mut self.page, now);
            self.page = self.page.map(|learnt| learnt.max(now));
        }
    }

    /// A checkpoint is complete.
    pub(crate) fn checkpoint(&mut self) {
        self.taken = 0;
        self.pause = self.pause.saturating_sub(1);
    }

    /// How long before the checkpoint the next round is to begin; `None` is not at all.
    /// Checkpoints are `between` apart, the log was taken `since` so long ago, and a page takes
    /// `least` by the rate that is allowed.
    pub(crate) fn lead(
        &self,
        between: Duration,
        since: Duration,
        least: Duration,
    ) -> Option<Duration> {
        let (Some(first), Some(rate)) = (self.first, self.rate) else {
            return Some(between / UNKNOWN);
        };
        if self.pause > 0 {
            return None;
        }
        let page = self.page.unwrap_or(PAGE).max(least.as_secs_f64());
        let again = rate * page;
        let mut round = match self.taken {
            0 => first * page,
            _ => rate * since.as_secs_f64() * page,
        };
        let pays = |round: f64, number: usize| {
            number < ROUNDS_MAX
                && round > WORTH_IT.as_secs_f64()
                && match number {
                    0 => round <= between.as_secs_f64() * FIRST,
                    _ => again <= SHRINKS,
                }
        };
        let mut lead = 0.0;
        for number in self.taken.. {
            if !pays(round, number) {
                break;
            }
            lead += round;
            round *= again;
        }
        let slack = (lead * SLACK).max(SLACK_AT_LEAST);
        (lead > 0.0).then(|| Duration::from_secs_f64((lead + slack).min(between.as_secs_f64())))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BETWEEN: Duration = Duration::from_millis(600);
    const PAGE: Duration = Duration::from_micros(2);

    /// A guest that dirties so many pages a second, each another one, is sent at 2 µs a page: gives how
    /// many pages all rounds before a checkpoint have, how many there are, and how many pages are left
    /// for the stop.
    fn checkpoint(plan: &mut Ahead, rate: u64) -> (u64, usize, u64) {
        checkpoint_of(plan, &|time| pages_in(time, rate))
    }

    fn pages_in(time: Duration, rate: u64) -> u64 {
        u64::try_from(time.as_micros()).unwrap() * rate / 1_000_000
    }

    /// The same of a guest that dirties so many pages in so much time.
    fn checkpoint_of(plan: &mut Ahead, dirties: &dyn Fn(Duration) -> u64) -> (u64, usize, u64) {
        let (mut now, mut taken) = (Duration::ZERO, Duration::ZERO);
        let (mut ahead, mut rounds) = (0, 0);
        let dirty = |now: Duration, taken: Duration| dirties(now - taken);
        let send = |plan: &mut Ahead, pages: u64| {
            let took = PAGE * u32::try_from(pages).unwrap();
            plan.sent(pages, took);
            took
        };
        while let Some(lead) = plan.lead(BETWEEN, now - taken, Duration::ZERO) {
            now = now.max(BETWEEN.saturating_sub(lead));
            let pages = dirty(now, taken);
            plan.taken(pages, now - taken);
            taken = now;
            now += send(plan, pages);
            (ahead, rounds) = (ahead + pages, rounds + 1);
        }
        now = now.max(BETWEEN);
        let rest = dirty(now, taken);
        plan.taken(rest, now - taken);
        send(plan, rest);
        plan.checkpoint();
        (ahead, rounds, rest)
    }

    fn settled(rate: u64) -> (u64, usize, u64) {
        let mut plan = Ahead::default();
        assert!(checkpoint(&mut plan, rate).1 > 0, "nothing is known yet");
        (0..10).map(|_| checkpoint(&mut plan, rate)).last().unwrap()
    }

    #[test]
    fn little_is_left_for_the_stop_and_little_is_sent_twice() {
        for (rate, most_rounds) in [(5_000, 1), (25_000, 2), (50_000, 3), (100_000, 4)] {
            let (ahead, rounds, rest) = settled(rate);
            let all = pages_in(BETWEEN, rate);
            assert!((1..=most_rounds).contains(&rounds), "{rate}: {rounds} rounds");
            assert!(rest < all / 20, "{rate}: {rest} of {all} are left");
            assert!(ahead + rest < all * 14 / 10, "{rate}: {ahead} ahead of {all}");
        }
    }

    #[test]
    fn what_is_sent_in_no_time_is_left_for_the_stop() {
        assert_eq!(settled(200).1, 0);
        assert_eq!(settled(0).1, 0);
    }

    #[test]
    fn pages_that_are_written_all_the_time_are_seldom_sent_ahead() {
        let mut plan = Ahead::default();
        let hot = |time: Duration| pages_in(time, 1_000_000).min(2000);
        let all: Vec<_> = (0..100).map(|_| checkpoint_of(&mut plan, &hot)).collect();
        let with_rounds = all.iter().filter(|(_, rounds, _)| *rounds > 0).count();
        assert!((2..20).contains(&with_rounds), "{with_rounds} of 100");
        // When it has become another, that is seen.
        let calm: Vec<_> = (0..20).map(|_| checkpoint(&mut plan, 5_000)).collect();
        assert!(calm.last().unwrap().2 < 150, "{calm:?}");
    }

    #[test]
    fn a_guest_that_is_faster_than_the_link_is_not_chased() {
        assert_eq!(settled(2_000_000).1, 0);
        // As fast as the link for all that is allowed.
        let mut plan = Ahead::default();
        checkpoint(&mut plan, 50_000);
        let slow = Duration::from_micros(32);
        assert_eq!(plan.lead(BETWEEN, Duration::ZERO, slow), None);
        assert!(plan.lead(BETWEEN, Duration::ZERO, PAGE).is_some());
    }
}
