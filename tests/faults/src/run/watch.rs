//! Who ran the guest, and when: never two at the same time.

use std::collections::BTreeSet;
use std::time::Instant;

use anyhow::{Result, ensure};

use crate::plan::Side;
use crate::vm::{Heard, What};

/// What both sides have told.
#[derive(Debug, Default)]
pub(super) struct Watch {
    /// Of each side: when its guest began to run or to stand still, by its own clock, which is the
    /// other's, too.
    runs: [Vec<(u64, bool)>; 2],
    statuses: [BTreeSet<String>; 2],
    gone: [bool; 2],
    armed: Vec<(usize, Instant)>,
}

impl Watch {
    pub(super) fn heard(&mut self, side: Side, heard: Heard) {
        match heard.what {
            What::Stop => self.runs[side as usize].push((heard.micros, false)),
            What::Resume => self.runs[side as usize].push((heard.micros, true)),
            What::Migration(status) => {
                self.statuses[side as usize].insert(status);
            }
        }
    }

    /// Nothing runs there any more.
    pub(super) fn gone(&mut self, side: Side) {
        self.gone[side as usize] = true;
    }

    /// Whether a side has told of this state.
    pub(super) fn has_told(&self, side: Side, status: &str) -> bool {
        self.statuses[side as usize].contains(status)
    }

    /// A fault is due then.
    pub(super) fn arm(&mut self, fault: usize, at: Instant) {
        if self.armed.iter().all(|(armed, _)| *armed != fault) {
            self.armed.push((fault, at));
        }
    }

    /// The faults that are.
    pub(super) fn due(&self, now: Instant) -> Vec<usize> {
        self.armed.iter().filter(|(_, at)| *at <= now).map(|(fault, _)| *fault).collect()
    }

    /// That the two have never run at the same time: the source's guest stood still whenever the
    /// destination's began to run, and did not run again.
    pub(super) fn check(&self) -> Result<()> {
        let [source, destination] = &self.runs;
        let Some(&(began, _)) = destination.iter().find(|(_, runs)| *runs) else { return Ok(()) };
        if self.gone[Side::Destination as usize] {
            // Its guest is gone with it: another may run now.
            return Ok(());
        }
        let before = source.iter().rfind(|(at, _)| *at <= began);
        // Nothing told is a guest that runs, as it did from the beginning.
        let ran = before.is_none_or(|(_, runs)| *runs) && !self.gone[Side::Source as usize];
        ensure!(!ran, "two guests run: the destination's since {began} us, and the source's");
        let again = source.iter().find(|(at, runs)| *at > began && *runs);
        ensure!(
            again.is_none(),
            "two guests run: the destination's since {began} us, and the source's again: {again:?}"
        );
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn watch(told: &[(Side, u64, What)]) -> Watch {
        let mut watch = Watch::default();
        for (side, micros, what) in told {
            watch.heard(*side, Heard { micros: *micros, what: what.clone() });
        }
        watch
    }

    #[test]
    fn one_after_the_other_is_well() {
        use Side::{Destination, Source};
        watch(&[]).check().unwrap();
        watch(&[(Source, 5, What::Stop), (Source, 9, What::Resume)]).check().unwrap();
        watch(&[(Source, 5, What::Stop), (Destination, 6, What::Resume)]).check().unwrap();
        watch(&[(Destination, 6, What::Resume), (Source, 5, What::Stop)]).check().unwrap();
    }

    #[test]
    fn both_at_the_same_time_is_not() {
        use Side::{Destination, Source};
        for told in [
            &[(Destination, 6, What::Resume)][..],
            &[(Source, 7, What::Stop), (Destination, 6, What::Resume)],
            &[(Source, 5, What::Stop), (Destination, 6, What::Resume), (Source, 8, What::Resume)],
            &[(Source, 4, What::Stop), (Source, 5, What::Resume), (Destination, 6, What::Resume)],
        ] {
            let mut watch = watch(told);
            assert!(watch.check().is_err(), "{told:?}");
            watch.gone(Destination);
            watch.check().unwrap();
        }
    }

    #[test]
    fn a_source_that_was_killed_runs_nothing() {
        let mut watch = watch(&[(Side::Destination, 6, What::Resume)]);
        watch.gone(Side::Source);
        watch.check().unwrap();
    }

    #[test]
    fn a_fault_is_due_once_its_time_has_come() {
        let (mut watch, now) = (Watch::default(), Instant::now());
        watch.arm(3, now);
        watch.arm(4, now + std::time::Duration::from_secs(60));
        watch.arm(3, now + std::time::Duration::from_secs(60));
        assert_eq!(watch.due(now), [3]);
    }
}
