//! How much to slow the guest down: `auto-converge`.

use std::time::Duration;

use crate::settings::Parameters;

/// Rounds shorter than this say too little of how fast the guest dirties.
const PERIOD_MIN: Duration = Duration::from_secs(1);

/// Slows the guest down step by step while it dirties faster than the link.
#[derive(Debug, Default)]
pub(crate) struct Throttle {
    percent: u8,
    rounds_too_fast: u8,
    period_start: Duration,
    dirtied: u64,
    sent: u64,
}

impl Throttle {
    /// The dirty log was taken: `dirtied` bytes since the last time, while `sent` went out. Gives
    /// the new percentage where it changes.
    pub(crate) fn synced(
        &mut self,
        parameters: &Parameters,
        dirtied: u64,
        sent: u64,
        now: Duration,
    ) -> Option<u8> {
        self.dirtied += dirtied;
        self.sent += sent;
        if now.saturating_sub(self.period_start) < PERIOD_MIN {
            return None;
        }
        let trigger =
            u128::from(self.sent) * u128::from(parameters.throttle_trigger_threshold) / 100;
        let too_fast = u128::from(self.dirtied) > trigger;
        let (dirtied, sent) = (self.dirtied, self.sent);
        *self = Throttle {
            percent: self.percent,
            rounds_too_fast: self.rounds_too_fast + u8::from(too_fast),
            period_start: now,
            ..Throttle::default()
        };
        // Twice in all: one odd period is no reason to punish a guest.
        if !too_fast || self.rounds_too_fast < 2 {
            return None;
        }
        self.rounds_too_fast = 0;
        let next = self.next(parameters, dirtied, sent);
        (next != self.percent).then(|| {
            self.percent = next;
            next
        })
    }

    fn next(&self, parameters: &Parameters, dirtied: u64, sent: u64) -> u8 {
        if self.percent == 0 {
            return parameters.cpu_throttle_initial;
        }
        let mut step = parameters.cpu_throttle_increment;
        if parameters.cpu_throttle_tailslow {
            // What would make the guest dirty no more than goes out: its running share times
            // sent / dirtied.
            let running = u64::from(100 - self.percent);
            let wanted = running.saturating_mul(sent) / dirtied.max(1);
            let enough = u8::try_from(running.saturating_sub(wanted)).unwrap_or(u8::MAX);
            step = step.min(enough.max(1));
        }
        self.percent.saturating_add(step).min(parameters.max_cpu_throttle)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn run(parameters: &Parameters, dirtied: u64, sent: u64, periods: u64) -> Vec<u8> {
        let mut throttle = Throttle::default();
        let periods = (1..=periods).map(Duration::from_secs);
        periods.filter_map(|now| throttle.synced(parameters, dirtied, sent, now)).collect()
    }

    #[test]
    fn a_guest_slower_than_the_link_is_left_alone() {
        assert!(run(&Parameters::default(), 40 * MIB, 100 * MIB, 50).is_empty());
    }

    #[test]
    fn a_faster_one_is_slowed_every_second_period_up_to_the_limit() {
        let steps = run(&Parameters::default(), 400 * MIB, 100 * MIB, 40);
        assert_eq!(steps, [20, 30, 40, 50, 60, 70, 80, 90, 99]);
    }

    #[test]
    fn tailslow_takes_small_steps_near_the_balance() {
        let tailslow = Parameters { cpu_throttle_tailslow: true, ..Parameters::default() };
        let steps = run(&tailslow, 101 * MIB, 100 * MIB, 8);
        assert_eq!(steps, [20, 21, 22, 23]);
    }

    #[test]
    fn many_syncs_within_a_period_count_together() {
        let mut throttle = Throttle::default();
        let parameters = Parameters::default();
        for tenth in 1..20u64 {
            let now = Duration::from_millis(tenth * 100);
            assert_eq!(throttle.synced(&parameters, 9 * MIB, 10 * MIB, now), None, "{tenth}");
        }
        let now = Duration::from_millis(2000);
        assert_eq!(throttle.synced(&parameters, 9 * MIB, 10 * MIB, now), Some(20));
    }
}
