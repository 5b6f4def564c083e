//! How long things took, kept so that means and quantiles can be told at any time.

use std::time::Duration;

use hdrhistogram::Histogram;

use crate::status::Latency;

/// Durations, to about 1 %.
#[derive(Clone, Debug)]
pub(crate) struct Latencies {
    /// In ns.
    histogram: Histogram<u64>,
    sum: u128,
}

/// The longest that is told apart.
const LONGEST: Duration = Duration::from_secs(3600);

impl Default for Latencies {
    fn default() -> Latencies {
        let longest = u64::try_from(LONGEST.as_nanos()).expect("fits in 64 bits");
        let histogram = Histogram::new_with_max(longest, 2).expect("valid bounds");
        Latencies { histogram, sum: 0 }
    }
}

impl Latencies {
    pub(crate) fn record(&mut self, time: Duration) {
        let ns = time.as_nanos();
        self.sum += ns;
        self.histogram.saturating_record(u64::try_from(ns).unwrap_or(u64::MAX));
    }

    pub(crate) fn count(&self) -> u64 {
        self.histogram.len()
    }

    /// The mean in ns; 0 of nothing.
    pub(crate) fn mean_ns(&self) -> u64 {
        let mean = self.sum / u128::from(self.count().max(1));
        u64::try_from(mean).unwrap_or(u64::MAX)
    }

    pub(crate) fn summary(&self) -> Latency {
        let micros = |ns: u64| ns as f64 / 1000.0;
        let quantile = |q| micros(self.histogram.value_at_quantile(q));
        match self.count() {
            0 => Latency::default(),
            _ => Latency {
                mean: micros(self.mean_ns()),
                p50: quantile(0.5),
                p90: quantile(0.9),
                p99: quantile(0.99),
                max: micros(self.histogram.max()),
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_those_of_what_was_recorded() {
        let mut latencies = Latencies::default();
        assert_eq!(latencies.summary(), Latency::default());
        (1..=1000).for_each(|us| latencies.record(Duration::from_micros(us)));
        let Latency { mean, p50, p90, p99, max } = latencies.summary();
        for (found, expected) in
            [(mean, 500.5), (p50, 500.0), (p90, 900.0), (p99, 990.0), (max, 1000.0)]
        {
            assert!((found / expected - 1.0).abs() < 0.01, "{found} is not {expected}");
        }
    }

    #[test]
    fn what_lasts_for_ever_is_counted_too() {
        let mut latencies = Latencies::default();
        latencies.record(Duration::MAX);
        assert_eq!(latencies.count(), 1);
        assert!(latencies.summary().max >= 3.59e9);
    }
}
