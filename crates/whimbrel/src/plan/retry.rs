//! When to try again to reach a peer that could not be reached.

use std::time::Duration;

/// The pause before the first try, and the shortest there is.
const SHORTEST: Duration = Duration::from_millis(20);
/// The longest. However long the peer has been away, its guest waits for a page when it is back: a try
/// costs one packet, and what comes after it has its own time to take.
const LONGEST: Duration = Duration::from_millis(30);
/// A pause is this part of the time that the peer has been away.
const PART: u32 = 100;

/// The tries of one outage.
#[derive(Clone, Debug)]
pub(crate) struct Retry {
    since: Duration,
    next: Duration,
}

impl Retry {
    /// The peer has gone, now. The first try is due at once: it may be the link's doing, and be over.
    pub(crate) fn new(now: Duration) -> Retry {
        Retry { since: now, next: now }
    }

    /// Whether a try is due; then the next one is due a pause later.
    pub(crate) fn is_due(&mut self, now: Duration) -> bool {
        if now < self.next {
            return false;
        }
        let away = now.saturating_sub(self.since);
        self.next = now + (away / PART).clamp(SHORTEST, LONGEST);
        true
    }

    /// How long it is to the next try.
    pub(crate) fn wait(&self, now: Duration) -> Duration {
        self.next.saturating_sub(now)
    }

    /// How long the peer has been away.
    pub(crate) fn away(&self, now: Duration) -> Duration {
        now.saturating_sub(self.since)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tries_come_at_once_then_a_little_more_seldom() {
        let ms = Duration::from_millis;
        let mut retry = Retry::new(ms(500));
        assert!(retry.is_due(ms(500)));
        assert!(!retry.is_due(ms(519)));
        assert_eq!(retry.wait(ms(505)), ms(15));
        assert!(retry.is_due(ms(520)));
        assert!(retry.is_due(ms(3_000)));
        assert_eq!(retry.wait(ms(3_000)), ms(25), "a hundredth of two and a half seconds");
        assert!(retry.is_due(ms(1_000_500)));
        assert_eq!(retry.wait(ms(1_000_500)), ms(30));
        assert_eq!(retry.away(ms(1_000_500)), ms(1_000_000));
    }

    #[test]
    fn a_peer_that_comes_back_is_looked_for_within_30_ms_however_long_it_was_away() {
        for away in [0, 37, 900, 4_000, 60_000] {
            let (mut retry, mut now) = (Retry::new(Duration::ZERO), Duration::ZERO);
            let back = Duration::from_millis(away);
            while now < back || !retry.is_due(now) {
                if now < back {
                    retry.is_due(now);
                }
                now += Duration::from_millis(1);
            }
            let found = now - back;
            assert!(found <= Duration::from_millis(30), "{away}: {found:?}");
        }
    }
}
