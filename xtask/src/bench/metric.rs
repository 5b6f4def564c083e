//! One figure of a run: what it is called, and how to get it.

use serde_json::{Map, Value, json};

use super::sample::Spread;

/// A figure of the runs `R`.
#[derive(Debug, Clone, Copy)]
pub(super) struct Metric<R> {
    /// Its name in JSON.
    pub(super) name: &'static str,
    /// Its head in the table.
    pub(super) head: &'static str,
    pub(super) decimals: usize,
    /// `None` where a run has no such figure.
    pub(super) of: fn(&R) -> Option<f64>,
}

impl<R> Metric<R> {
    pub(super) const fn new(
        name: &'static str,
        head: &'static str,
        decimals: usize,
        of: fn(&R) -> Option<f64>,
    ) -> Self {
        Self { name, head, decimals, of }
    }

    pub(super) fn spread(&self, runs: &[R]) -> Option<Spread> {
        Spread::of(runs.iter().filter_map(self.of))
    }
}

/// One run in one line, for whoever waits.
pub(super) fn line<R>(metrics: &[Metric<R>], run: &R) -> String {
    let figure = |metric: &Metric<R>| {
        let Metric { head, decimals, of, .. } = metric;
        Some(format!("{head} {:.decimals$}", of(run)?))
    };
    metrics.iter().filter_map(figure).collect::<Vec<_>>().join(", ")
}

/// The figures of one run, by their names.
pub(super) fn figures<R>(metrics: &[Metric<R>], run: &R) -> Map<String, Value> {
    metrics.iter().map(|metric| (metric.name.to_owned(), json!((metric.of)(run)))).collect()
}

/// The medians and spreads of all runs, by the names of what was measured.
pub(super) fn spreads<R>(metrics: &[Metric<R>], runs: &[R]) -> Map<String, Value> {
    let spread = |metric: &Metric<R>| json!(metric.spread(runs).map(Spread::json));
    metrics.iter().map(|metric| (metric.name.to_owned(), spread(metric))).collect()
}
