//! How fast bytes go, for a report.

use std::time::Duration;

use super::downtime::per_second;

/// A rate is told of times no shorter than this.
const WINDOW: Duration = Duration::from_millis(100);

/// Bytes a second, from a counter that is looked at now and then.
#[derive(Debug, Default)]
pub(crate) struct Rate {
    mark: Option<(Duration, u64)>,
}

impl Rate {
    /// The counter stands at `bytes`; gives the rate when enough time has passed to tell.
    pub(crate) fn sent(&mut self, bytes: u64, now: Duration) -> Option<u64> {
        let (since, before) = *self.mark.get_or_insert((now, bytes));
        let time = now.saturating_sub(since);
        if time < WINDOW {
            return None;
        }
        self.mark = Some((now, bytes));
        Some(per_second(bytes.saturating_sub(before), time))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rate_is_told_once_in_a_while() {
        let mut rate = Rate::default();
        let at = Duration::from_millis;
        assert_eq!(rate.sent(0, at(1000)), None);
        assert_eq!(rate.sent(500, at(1050)), None);
        assert_eq!(rate.sent(2000, at(1200)), Some(10_000));
        assert_eq!(rate.sent(2000, at(1201)), None);
        assert_eq!(rate.sent(2000, at(1300)), Some(0));
    }
}
