//! What the background of a postcopy may send while urgent pages go.

/// One byte in so many goes to the background while urgent pages take all they can.
const PART: u64 = 8;

/// Keeps the background's share small while urgent pages are sent, and above nothing: a guest that
/// never stops asking must not starve it.
#[derive(Debug, Default)]
pub(crate) struct Share {
    /// Urgent bytes when the background went last.
    urgent: u64,
    /// Bytes of its own since it had a claim to any.
    owed: u64,
}

impl Share {
    /// Whether the background may send although an urgent page is on its way; `urgent` bytes of
    /// those have gone so far.
    pub(crate) fn may_go(&mut self, urgent: u64) -> bool {
        let earned = urgent.saturating_sub(self.urgent) / PART;
        self.owed = self.owed.saturating_sub(earned);
        self.urgent += earned * PART;
        self.owed == 0
    }

    /// The background has sent `bytes`.
    pub(crate) fn went(&mut self, bytes: u64) {
        self.owed = bytes;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn beside_urgent_pages_without_end_it_gets_its_part() {
        let (mut share, mut urgent, mut background) = (Share::default(), 0, 0);
        while urgent < 1 << 30 {
            if share.may_go(urgent) {
                share.went(64 << 10);
                background += 64 << 10;
            }
            urgent += 4096;
        }
        let ratio = background as f64 / urgent as f64;
        assert!((0.12..0.13).contains(&ratio), "{ratio}");
    }

    #[test]
    fn quiet_time_is_not_saved_up() {
        let mut share = Share::default();
        assert!(share.may_go(0));
        share.went(1000);
        assert!(!share.may_go(4000));
        assert!(share.may_go(80_000));
        share.went(1000);
        assert!(!share.may_go(80_001));
    }
}
