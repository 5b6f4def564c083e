//! What is measured of two VMs in step, the table and the JSON it ends in.

use std::fmt::Write as _;
use std::time::Duration;

use serde_json::{Map, Value, json};
use whimbrel_peers::qmp::Event;

use super::scenario::Scenario;
use crate::bench::metric;
use crate::bench::sample::Spread;

/// One run: a pair in step for some seconds.
#[derive(Debug, Clone, Default)]
pub(super) struct Figures {
    /// How long the primary's guest stood still each time, by the stamps of its events, in ms; sorted.
    pub(super) stops_ms: Vec<f64>,
    /// The primary's own account, where it gives one.
    pub(super) primary: Option<Value>,
    /// The secondary's own account, where it gives one.
    pub(super) secondary: Option<Value>,
    /// Pages that were sent, while it stood still or ran.
    pub(super) pages: Option<f64>,
    /// Bytes that were sent.
    pub(super) bytes: Option<f64>,
    /// How long it was measured.
    pub(super) seconds: f64,
    pub(super) primary_cpu_s: f64,
    pub(super) secondary_cpu_s: f64,
}

/// From each STOP to the RESUME behind it, in ms; sorted.
pub(super) fn stops_ms(events: &[Event]) -> Vec<f64> {
    let (mut stopped, mut stops) = (None, Vec::new());
    for event in events {
        match event.name.as_str() {
            "STOP" => stopped = Some(event.at),
            "RESUME" => {
                let span = stopped.take().map(|since: Duration| event.at.saturating_sub(since));
                stops.extend(span.map(|span| span.as_secs_f64() * 1e3));
            }
            _ => {}
        }
    }
    stops.sort_by(f64::total_cmp);
    stops
}

impl Figures {
    fn mean(&self) -> Option<f64> {
        let count = u32::try_from(self.stops_ms.len()).ok().filter(|count| *count > 0)?;
        Some(self.stops_ms.iter().sum::<f64>() / f64::from(count))
    }

    /// The least that `percent` of the stops do not exceed.
    fn quantile(&self, percent: usize) -> Option<f64> {
        let rank = (self.stops_ms.len() * percent).div_ceil(100);
        self.stops_ms.get(rank.checked_sub(1)?).copied()
    }

    fn checkpoints(&self) -> Option<f64> {
        let count = u32::try_from(self.stops_ms.len()).ok().filter(|count| *count > 0)?;
        Some(f64::from(count))
    }

    /// A time of one side's own account, in ms.
    fn own(side: Option<&Value>, of: &str, what: &str) -> Option<f64> {
        Some(side?[of][what].as_f64()? / 1e3)
    }

    fn memory(&self, what: &str) -> Option<f64> {
        Self::own(self.primary.as_ref(), "memory-us", what)
    }

    /// A count of the primary's own account, for each of its checkpoints.
    fn own_each(&self, of: &str) -> Option<f64> {
        let own = self.primary.as_ref()?;
        let checkpoints = own["checkpoints"].as_f64().filter(|count| *count > 0.0)?;
        Some(own[of].as_f64()? / checkpoints)
    }
}

type Metric = metric::Metric<Figures>;

const CHECKPOINTS: Metric = Metric::new("checkpoints", "checkpoints", 0, Figures::checkpoints);
const STOP_MEAN: Metric = Metric::new("stop-mean-ms", "stop mean", 2, Figures::mean);
const STOP_P50: Metric = Metric::new("stop-p50-ms", "p50", 2, |run| run.quantile(50));
const STOP_P99: Metric = Metric::new("stop-p99-ms", "p99", 2, |run| run.quantile(99));
const MEMORY_MEAN: Metric = Metric::new("memory-mean-ms", "memory mean", 2, |r| r.memory("mean"));
const MEMORY_P50: Metric = Metric::new("memory-p50-ms", "p50", 2, |run| run.memory("p50"));
const MEMORY_P99: Metric = Metric::new("memory-p99-ms", "p99", 2, |run| run.memory("p99"));
const PAGES: Metric = Metric::new("pages-in-the-stop", "pages in it", 0, |r| r.own_each("pages"));
const SENT_PAGES: Metric = Metric::new("pages-a-checkpoint", "pages in all", 0, |run| {
    Some(run.pages? / run.checkpoints()?)
});
const SENT: Metric = Metric::new("sent-mib-a-checkpoint", "sent MiB", 1, |run| {
    Some(run.bytes? / f64::from(1 << 20) / run.checkpoints()?)
});
const SECONDARY: Metric = Metric::new("secondary-stop-mean-ms", "secondary busy", 2, |run| {
    Figures::own(run.secondary.as_ref(), "stop-us", "mean")
});
const PRIMARY_CPU: Metric =
    Metric::new("primary-cpu", "primary CPU", 2, |run| Some(run.primary_cpu_s / run.seconds));
const SECONDARY_CPU: Metric =
    Metric::new("secondary-cpu", "secondary CPU", 2, |run| Some(run.secondary_cpu_s / run.seconds));

const METRICS: [Metric; 13] = [
    CHECKPOINTS,
    STOP_MEAN,
    STOP_P50,
    STOP_P99,
    MEMORY_MEAN,
    MEMORY_P50,
    MEMORY_P99,
    PAGES,
    SENT_PAGES,
    SENT,
    SECONDARY,
    PRIMARY_CPU,
    SECONDARY_CPU,
];

/// All runs of one contender in one scenario.
#[derive(Debug, Clone)]
pub(super) struct Row {
    pub(super) scenario: Scenario,
    pub(super) contender: String,
    pub(super) runs: Vec<Figures>,
}

impl Row {
    pub(super) fn json(&self) -> Value {
        let mut object = Map::new();
        object.insert("scenario".into(), json!(self.scenario.to_string()));
        object.insert("contender".into(), json!(self.contender));
        object.extend(metric::spreads(&METRICS, &self.runs));
        let run = |run: &Figures| {
            let mut figures = metric::figures(&METRICS, run);
            figures.insert("stops-ms".into(), json!(run.stops_ms));
            figures.insert("primary".into(), json!(run.primary));
            figures.insert("secondary".into(), json!(run.secondary));
            Value::Object(figures)
        };
        object.insert("runs".into(), self.runs.iter().map(run).collect());
        Value::Object(object)
    }

    fn cells(&self, metrics: &[Metric]) -> String {
        let cell = |metric: &Metric| {
            let spread = metric.spread(&self.runs);
            let median = |Spread { median, .. }| format!("{median:.*}", metric.decimals);
            spread.map_or("-".to_owned(), median)
        };
        metrics.iter().map(cell).collect::<Vec<_>>().join(" | ")
    }
}

/// One run in one line, for whoever waits.
pub(super) fn line(figures: &Figures) -> String {
    metric::line(&METRICS, figures)
}

/// The rows as a Markdown table: the medians of all runs, times in ms.
pub(super) fn table(rows: &[Row]) -> String {
    let heads: Vec<&str> = METRICS.iter().map(|metric| metric.head).collect();
    let mut text = format!("| scenario | contender | {} |\n", heads.join(" | "));
    text.push_str(&"|---".repeat(heads.len() + 2));
    text.push_str("|\n");
    for row in rows {
        let Row { scenario, contender, .. } = row;
        // Writing to a String cannot fail.
        let _ = writeln!(text, "| {scenario} | {contender} | {} |", row.cells(&METRICS));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::contender::Memory;
    use crate::bench::network::Between;

    fn event(name: &str, ms: u64) -> Event {
        Event { name: name.to_owned(), data: Value::Null, at: Duration::from_millis(ms) }
    }

    #[test]
    fn a_stop_is_from_stop_to_resume() {
        let events = [
            event("RESUME", 5), // That of the migration's own end.
            event("STOP", 10),
            event("RESUME", 17),
            event("MIGRATION", 18),
            event("STOP", 20),
            event("RESUME", 23),
            event("STOP", 30), // Still in it when the measurement ends.
        ];
        assert_eq!(stops_ms(&events), [3.0, 7.0]);
    }

    #[test]
    fn a_row_has_what_its_runs_have() {
        let run = Figures {
            stops_ms: (1..=200).map(f64::from).collect(),
            primary: Some(json!({
                "checkpoints": 200,
                "pages": 4000,
                "memory-us": { "mean": 1500.0, "p50": 1000.0, "p99": 2000.0 },
            })),
            pages: Some(6000.0),
            bytes: Some(200.0 * f64::from(1 << 20)),
            seconds: 10.0,
            primary_cpu_s: 5.0,
            secondary_cpu_s: 2.5,
            secondary: None,
        };
        let scenario = Scenario {
            between: Between::Loopback,
            memory: Memory::parse("512M").unwrap(),
            dirty_mib_per_s: 20,
            channels: 0,
        };
        let row = Row { scenario, contender: "ours".into(), runs: vec![run] };
        let table = table(std::slice::from_ref(&row));
        let expected = "| ours | 200 | 100.50 | 100.00 | 198.00 | 1.50 | 1.00 | 2.00 | 20 | 30 | \
                        1.0 | - | 0.50 | 0.25 |";
        assert!(table.ends_with(&format!("{expected}\n")), "{table}");
        assert_eq!(row.json()["stop-p99-ms"]["median"], 198.0);
        let nothing = Row { runs: vec![Figures { seconds: 1.0, ..Figures::default() }], ..row };
        assert!(nothing.cells(&METRICS).starts_with("- | - | - |"));
    }
}
