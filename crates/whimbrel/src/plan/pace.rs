//! How fast: `max-bandwidth` as a budget of bytes that grows with time.

use std::time::Duration;

/// How far the budget may run ahead: unused time is not saved up beyond this.
const BURST: Duration = Duration::from_millis(100);

/// Keeps the bytes sent at or below a rate.
#[derive(Debug)]
pub(crate) struct Pace {
    bytes_per_second: u64,
    /// When the bytes sent so far are paid for.
    paid_until: Duration,
}

impl Pace {
    /// A rate of `bytes_per_second`; 0 is without limit.
    pub(crate) fn new(bytes_per_second: u64, now: Duration) -> Pace {
        Pace { bytes_per_second, paid_until: now }
    }

    /// Changes the rate from now on.
    pub(crate) fn set_rate(&mut self, bytes_per_second: u64, now: Duration) {
        if bytes_per_second != self.bytes_per_second {
            self.bytes_per_second = bytes_per_second;
            self.paid_until = self.paid_until.min(now);
        }
    }

    /// `bytes` have been sent; gives how long to wait before sending more.
    pub(crate) fn sent(&mut self, bytes: u64, now: Duration) -> Duration {
        if self.bytes_per_second == 0 {
            return Duration::ZERO;
        }
        let nanoseconds = u128::from(bytes) * 1_000_000_000 / u128::from(self.bytes_per_second);
        let cost = Duration::from_nanos(u64::try_from(nanoseconds).unwrap_or(u64::MAX));
        self.paid_until = self.paid_until.max(now.saturating_sub(BURST)).saturating_add(cost);
        self.paid_until.saturating_sub(now)
    }

    /// How long to wait until what was sent is paid for.
    pub(crate) fn wait(&self, now: Duration) -> Duration {
        if self.bytes_per_second == 0 {
            return Duration::ZERO;
        }
        self.paid_until.saturating_sub(now)
    }

    /// How many bytes to send at once, at most `most`: a hundredth of a second's worth, so that a
    /// slow rate is even, and a change of it soon felt.
    pub(crate) fn batch(&self, most: usize) -> usize {
        const LEAST: usize = 16 << 10;
        match self.bytes_per_second {
            0 => most,
            rate => usize::try_from(rate / 100).unwrap_or(most).clamp(LEAST, most),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_a_limit_nothing_waits() {
        let mut pace = Pace::new(0, Duration::ZERO);
        assert_eq!(pace.sent(u64::MAX, Duration::ZERO), Duration::ZERO);
    }

    #[test]
    fn a_rate_is_kept_over_time_whatever_the_pieces() {
        for piece in [1 << 10, 100 << 10, 3 << 20] {
            let mut pace = Pace::new(10 << 20, Duration::ZERO);
            let (mut now, mut sent) = (Duration::ZERO, 0u64);
            while sent < 100 << 20 {
                now += pace.sent(piece, now);
                sent += piece;
            }
            let rate = sent as f64 / now.as_secs_f64();
            let ratio = rate / f64::from(10 << 20);
            assert!((0.97..1.05).contains(&ratio), "pieces of {piece}: {ratio}");
        }
    }

    #[test]
    fn idle_time_is_not_saved_up_beyond_the_burst() {
        let mut pace = Pace::new(1 << 20, Duration::ZERO);
        let later = Duration::from_secs(60);
        let wait = pace.sent(1 << 20, later);
        assert!(wait >= Duration::from_millis(899), "{wait:?}");
    }
}
