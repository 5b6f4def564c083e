//! When to switch over: as soon as what is left fits into the downtime limit.

use std::time::Duration;

use crate::settings::Parameters;

/// The bandwidth is measured over windows of at least this.
const WINDOW: Duration = Duration::from_millis(100);

/// What a source does next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Next {
    /// Go on with the pages known to be dirty.
    Iterate,
    /// Take the dirty log, then ask again.
    Sync,
    /// Stop the guest and send the rest.
    SwitchOver,
}

/// Measures the link and compares it with what is left.
#[derive(Debug)]
pub(crate) struct Convergence {
    window_start: Duration,
    window_bytes: u64,
    /// Bytes of RAM a second that go out when nothing holds them back; 0 before it is known.
    bandwidth: u64,
    synced_at: Duration,
    dirty_rate: u64,
}

impl Convergence {
    pub(crate) fn new(now: Duration) -> Convergence {
        Convergence {
            window_start: now,
            window_bytes: 0,
            bandwidth: 0,
            synced_at: now,
            dirty_rate: 0,
        }
    }

    /// `bytes` went out by `now`.
    pub(crate) fn sent(&mut self, bytes: u64, now: Duration) {
        self.window_bytes += bytes;
        let window = now.saturating_sub(self.window_start);
        if window < WINDOW {
            return;
        }
        self.bandwidth = per_second(self.window_bytes, window);
        self.window_start = now;
        self.window_bytes = 0;
    }

    /// The dirty log was taken, and `pages` were in it.
    pub(crate) fn synced(&mut self, pages: u64, now: Duration) {
        self.dirty_rate = per_second(pages, now.saturating_sub(self.synced_at));
        self.synced_at = now;
    }

    /// Pages the guest dirties in a second, as of the last sync.
    pub(crate) fn dirty_pages_rate(&self) -> u64 {
        self.dirty_rate
    }

    /// Bytes a second that the switchover can count on.
    pub(crate) fn bandwidth(&self, parameters: &Parameters) -> u64 {
        match parameters.avail_switchover_bandwidth {
            0 => self.bandwidth,
            told => told,
        }
    }

    /// Bytes that fit into the downtime limit.
    pub(crate) fn threshold(&self, parameters: &Parameters) -> u64 {
        let bytes = u128::from(self.bandwidth(parameters)) * u128::from(parameters.downtime_limit);
        u64::try_from(bytes / 1000).unwrap_or(u64::MAX)
    }

    /// How long the switchover would take with `pending` bytes left; `None` before it is known.
    pub(crate) fn expected_downtime(
        &self,
        pending: u64,
        parameters: &Parameters,
    ) -> Option<Duration> {
        let bandwidth = self.bandwidth(parameters);
        (bandwidth > 0).then(|| Duration::from_secs_f64(pending as f64 / bandwidth as f64))
    }

    /// `pending` bytes are known to be left; `fresh` when the dirty log was taken just now, and
    /// `turn_done` when every page known to be dirty has been looked at since.
    pub(crate) fn next(
        &self,
        pending: u64,
        fresh: bool,
        turn_done: bool,
        parameters: &Parameters,
    ) -> Next {
        // Nothing left is little enough for any limit, a downtime limit of 0 included.
        let little = pending == 0 || pending <= self.threshold(parameters);
        match (little, fresh, turn_done) {
            (true, true, _) => Next::SwitchOver,
            (true, false, _) | (false, false, true) => Next::Sync,
            (false, true, _) | (false, false, false) => Next::Iterate,
        }
    }
}

/// How many a second that is.
pub(super) fn per_second(count: u64, time: Duration) -> u64 {
    let micros = time.as_micros().max(1);
    u64::try_from(u128::from(count) * 1_000_000 / micros).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn measured(bytes_per_second: u64) -> Convergence {
        let mut convergence = Convergence::new(Duration::ZERO);
        convergence.sent(bytes_per_second / 10, WINDOW);
        convergence
    }

    #[test]
    fn the_cases_of_the_decision() {
        let parameters = Parameters { downtime_limit: 100, ..Parameters::default() };
        let convergence = measured(1_000_000);
        assert_eq!(convergence.threshold(&parameters), 100_000);
        for (pending, fresh, turn_done, expected) in [
            (100_001, true, true, Next::Iterate),
            (100_001, true, false, Next::Iterate),
            (100_001, false, false, Next::Iterate),
            (100_001, false, true, Next::Sync),
            (100_000, false, false, Next::Sync),
            (100_000, false, true, Next::Sync),
            (100_000, true, false, Next::SwitchOver),
            (0, true, true, Next::SwitchOver),
        ] {
            let next = convergence.next(pending, fresh, turn_done, &parameters);
            assert_eq!(next, expected, "{pending} {fresh} {turn_done}");
        }
    }

    #[test]
    fn nothing_left_switches_over_even_with_no_downtime_allowed() {
        let parameters = Parameters { downtime_limit: 0, ..Parameters::default() };
        assert_eq!(measured(1).next(0, true, true, &parameters), Next::SwitchOver);
        assert_eq!(measured(u64::MAX / 2).next(1, true, true, &parameters), Next::Iterate);
    }

    #[test]
    fn a_bandwidth_that_is_told_counts_instead_of_the_measured_one() {
        let parameters = Parameters {
            downtime_limit: 1000,
            avail_switchover_bandwidth: 7,
            ..Parameters::default()
        };
        assert_eq!(measured(1_000_000).threshold(&parameters), 7);
    }

    #[test]
    fn expected_downtime_follows_from_what_is_left() {
        let convergence = measured(1_000_000);
        let parameters = Parameters::default();
        let expected = convergence.expected_downtime(500_000, &parameters).unwrap();
        assert_eq!(expected.as_millis(), 500);
        let unknown = Convergence::new(Duration::ZERO);
        assert_eq!(unknown.expected_downtime(1, &parameters), None);
    }
}
