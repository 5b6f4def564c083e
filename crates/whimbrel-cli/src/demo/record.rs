//! What was seen of a migration while it went on.

use std::time::Duration;

use serde_json::{Value, json};
use whimbrel_control::{Client, PeerEvent};

use crate::drive::Look;
use crate::monitor::GUEST_PROGRESS;

/// Between two questions to the guest at the destination: they cost it what they take.
const ASK: Duration = Duration::from_millis(10);

/// Bytes that had gone by a moment.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Sample {
    pub(super) after: Duration,
    pub(super) bytes: u64,
    pub(super) postcopy: bool,
}

/// How fast RAM went for a while.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Rate {
    pub(super) bytes_per_second: f64,
    pub(super) postcopy: bool,
}

/// Takes down every look at a migration.
#[derive(Debug)]
pub(super) struct Record {
    samples: Vec<Sample>,
    /// A connection of its own to the destination.
    guest: Option<Client>,
    asked: Option<Duration>,
    /// What the guest had done there when it was last known that pages were missing.
    updates: u64,
}

impl Record {
    /// With a connection to the destination, to see what the guest does there in postcopy.
    pub(super) fn new(guest: Option<Client>) -> Record {
        Record { samples: Vec::new(), guest, asked: None, updates: 0 }
    }

    pub(super) fn look(&mut self, look: &Look<'_>) {
        let postcopy = look.source.status.is_postcopy();
        if let Some(ram) = &look.source.info.ram {
            self.samples.push(Sample { after: look.after, bytes: ram.transferred, postcopy });
        }
        let there = look.destination.is_some_and(|report| report.status.is_postcopy());
        let due = self.asked.is_none_or(|asked| look.after - asked >= ASK);
        if there
            && due
            && let Some(guest) = &mut self.guest
        {
            self.asked = Some(look.after);
            // What it says counts only if pages are still missing after it was said.
            let progress = guest.execute(GUEST_PROGRESS, json!({})).unwrap_or(Value::Null);
            let still = guest.query_migrate().is_ok_and(|report| report.status.is_postcopy());
            if let Some(updates) = progress["updates"].as_u64().filter(|_| still) {
                self.updates = self.updates.max(updates);
            }
        }
    }

    /// How many updates the guest had done at the destination while pages were missing: at least.
    pub(super) fn updates_meanwhile(&self) -> u64 {
        self.updates
    }

    pub(super) fn into_samples(self) -> Vec<Sample> {
        self.samples
    }
}

/// The rate over the whole time of the samples, in `columns` parts of the same length. Between two
/// samples the bytes are taken to have gone evenly.
pub(super) fn rates(samples: &[Sample], columns: usize) -> Vec<Rate> {
    let (Some(first), Some(last)) = (samples.first(), samples.last()) else { return Vec::new() };
    let total = last.after.saturating_sub(first.after).as_secs_f64();
    if total == 0.0 {
        return Vec::new();
    }
    let at = |column: usize| first.after.as_secs_f64() + total * column as f64 / columns as f64;
    let rate = |column: usize| {
        let (from, to) = (at(column), at(column + 1));
        let bytes = bytes_by(samples, to) - bytes_by(samples, from);
        Rate {
            bytes_per_second: bytes.max(0.0) / (to - from),
            postcopy: in_postcopy(samples, (from + to) / 2.0),
        }
    };
    (0..columns).map(rate).collect()
}

fn bytes_by(samples: &[Sample], time: f64) -> f64 {
    let next = samples.partition_point(|sample| sample.after.as_secs_f64() < time);
    let Some(after) = samples.get(next) else {
        return samples.last().map_or(0.0, |sample| sample.bytes as f64);
    };
    let Some(before) = next.checked_sub(1).map(|at| samples[at]) else {
        return after.bytes as f64;
    };
    let (from, to) = (before.after.as_secs_f64(), after.after.as_secs_f64());
    let part = (time - from) / (to - from);
    before.bytes as f64 + part * (after.bytes as f64 - before.bytes as f64)
}

/// Whether a migration is in postcopy then: from its first sample in that state to its end.
fn in_postcopy(samples: &[Sample], time: f64) -> bool {
    let began = samples.iter().find(|sample| sample.postcopy);
    began.is_some_and(|sample| sample.after.as_secs_f64() <= time)
}

/// How long a source was in postcopy, by its events: none if it never was.
pub(super) fn postcopy_time(events: &[PeerEvent]) -> Option<Duration> {
    let time = |event: &PeerEvent| {
        Duration::from_secs(event.seconds) + Duration::from_micros(event.microseconds.into())
    };
    let states = || {
        let state = |event: &PeerEvent| Some((event.migration_status()?, time(event)));
        events.iter().filter_map(state)
    };
    let (_, began) = states().find(|(status, _)| status.is_postcopy())?;
    let (_, ended) = states().find(|(status, at)| !status.is_running() && *at >= began)?;
    Some(ended - began)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(ms: u64, bytes: u64, postcopy: bool) -> Sample {
        Sample { after: Duration::from_millis(ms), bytes, postcopy }
    }

    #[test]
    fn rates_are_of_equal_parts_of_the_time() {
        let samples = [
            sample(0, 0, false),
            sample(100, 1000, false),
            sample(200, 1000, true),
            sample(400, 5000, false),
        ];
        let rates = rates(&samples, 4);
        let expected = [(10_000.0, false), (0.0, false), (20_000.0, true), (20_000.0, true)];
        assert_eq!(rates.len(), expected.len());
        for (rate, (bytes, postcopy)) in rates.iter().zip(expected) {
            assert!((rate.bytes_per_second - bytes).abs() < 1.0, "{rate:?} {bytes}");
            assert_eq!(rate.postcopy, postcopy, "{rate:?}");
        }
        // Nothing is lost, however it is divided up.
        for columns in [1, 3, 7, 64] {
            let sum: f64 = super::rates(&samples, columns)
                .iter()
                .map(|rate| rate.bytes_per_second * 0.4 / columns as f64)
                .sum();
            assert!((sum - 5000.0).abs() < 1.0, "{columns}: {sum}");
        }
    }

    #[test]
    fn too_few_samples_are_no_rate() {
        assert_eq!(rates(&[], 10), []);
        assert_eq!(rates(&[sample(5, 100, false)], 10), []);
    }

    fn event(status: &str, microseconds: u32) -> PeerEvent {
        let data = json!({ "status": status });
        PeerEvent { name: "MIGRATION".into(), data, seconds: 7, microseconds }
    }

    #[test]
    fn postcopy_lasts_from_its_first_state_to_the_end() {
        let states =
            ["setup", "active", "device", "postcopy-device", "postcopy-active", "completed"];
        let events: Vec<_> =
            (1..).zip(states).map(|(number, status)| event(status, number * 1000)).collect();
        assert_eq!(postcopy_time(&events), Some(Duration::from_millis(2)));
        assert_eq!(postcopy_time(&events[..3]), None);
        assert_eq!(postcopy_time(&events[..5]), None, "it has not ended");
    }
}
