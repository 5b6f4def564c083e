//! What is measured of a migration, the table and the JSON it ends in.

use std::fmt::Write as _;

use anyhow::{Context as _, Result};
use serde_json::{Map, Value, json};

use crate::bench::metric;
use crate::bench::sample::Spread;

/// The faults of one guest, from the first instruction at its destination to the last page.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Faults {
    pub(super) count: u64,
    pub(super) mean_us: f64,
    pub(super) p50_us: f64,
    pub(super) p90_us: f64,
    pub(super) p99_us: f64,
    pub(super) max_us: f64,
}

impl Faults {
    /// As whimbrel reports them.
    pub(super) fn of_report(report: &Value) -> Result<Self> {
        let latency = &report["latency-us"];
        let figure = |name: &str| {
            latency[name].as_f64().with_context(|| format!("no latency-us.{name} in {report}"))
        };
        Ok(Self {
            count: report["count"].as_u64().with_context(|| format!("no count in {report}"))?,
            mean_us: figure("mean")?,
            p50_us: figure("p50")?,
            p90_us: figure("p90")?,
            p99_us: figure("p99")?,
            max_us: figure("max")?,
        })
    }
}

/// One migration.
#[derive(Debug, Clone)]
pub(super) struct Figures {
    pub(super) faults: Faults,
    /// From the moment the guest may run at the destination until all of it is there.
    pub(super) phase_s: f64,
    /// From the last instruction at the source to the first at the destination.
    pub(super) downtime_ms: Option<f64>,
    pub(super) source_cpu_s: f64,
    pub(super) destination_cpu_s: f64,
    /// What the two sides themselves say of its faults, where they do.
    pub(super) own: Value,
}

type Metric = metric::Metric<Figures>;

#[expect(clippy::cast_precision_loss, reason = "a count of faults is far below 2^53")]
const METRICS: [Metric; 10] = [
    Metric::new("faults", "faults", 0, |run| Some(run.faults.count as f64)),
    Metric::new("mean-us", "mean us", 0, |run| Some(run.faults.mean_us)),
    Metric::new("p50-us", "p50", 0, |run| Some(run.faults.p50_us)),
    Metric::new("p90-us", "p90", 0, |run| Some(run.faults.p90_us)),
    Metric::new("p99-us", "p99", 0, |run| Some(run.faults.p99_us)),
    Metric::new("max-us", "max", 0, |run| Some(run.faults.max_us)),
    Metric::new("phase-s", "phase s", 2, |run| Some(run.phase_s)),
    Metric::new("downtime-ms", "downtime ms", 0, |run| run.downtime_ms),
    Metric::new("source-cpu-s", "source CPU s", 1, |run| Some(run.source_cpu_s)),
    Metric::new("destination-cpu-s", "destination CPU s", 1, |run| Some(run.destination_cpu_s)),
];

/// Of these the table has the spread, and the ratio to the baseline's.
const COMPARED: [&str; 3] = ["mean-us", "p99-us", "phase-s"];

/// All runs of one pair of contenders in one scenario.
#[derive(Debug, Clone)]
pub(super) struct Row {
    /// Such as `1 Gbit/s, 4k, preempt`.
    pub(super) scenario: String,
    pub(super) contender: String,
    /// Whether the others of this scenario are compared with it.
    pub(super) is_baseline: bool,
    pub(super) runs: Vec<Figures>,
}

impl Row {
    pub(super) fn json(&self) -> Value {
        let mut object = Map::new();
        object.insert("scenario".into(), json!(self.scenario));
        object.insert("contender".into(), json!(self.contender));
        object.extend(metric::spreads(&METRICS, &self.runs));
        let runs = self.runs.iter().map(|run| {
            let mut figures = metric::figures(&METRICS, run);
            figures.insert("reported".into(), run.own.clone());
            Value::Object(figures)
        });
        object.insert("runs".into(), runs.collect());
        Value::Object(object)
    }
}

/// One run in one line, for whoever waits.
pub(super) fn line(figures: &Figures) -> String {
    metric::line(&METRICS, figures)
}

/// The rows as a Markdown table: medians, the spread of what is compared, ratios to the baseline.
pub(super) fn table(rows: &[Row]) -> String {
    let heads: Vec<String> = METRICS.iter().map(head).collect();
    let mut text = format!("| link, pages, mode | contender | {} |\n", heads.join(" | "));
    text.push_str(&"|---".repeat(METRICS.len() + 2));
    text.push_str("|\n");
    for row in rows {
        let baseline =
            rows.iter().find(|other| other.is_baseline && other.scenario == row.scenario);
        let cells: Vec<String> = METRICS.iter().map(|metric| cell(row, baseline, metric)).collect();
        // Writing to a String cannot fail.
        let _ = writeln!(text, "| {} | {} | {} |", row.scenario, row.contender, cells.join(" | "));
    }
    text
}

fn head(metric: &Metric) -> String {
    match COMPARED.contains(&metric.name) {
        true => format!("{} (min..max), ratio", metric.head),
        false => metric.head.to_owned(),
    }
}

fn cell(row: &Row, baseline: Option<&Row>, metric: &Metric) -> String {
    let Metric { decimals, name, .. } = metric;
    let Some(spread) = metric.spread(&row.runs) else { return "-".to_owned() };
    let Spread { median, least, greatest } = spread;
    if !COMPARED.contains(name) {
        return format!("{median:.decimals$}");
    }
    let mut cell = format!("{median:.decimals$} ({least:.decimals$}..{greatest:.decimals$})");
    if let Some(base) = baseline.and_then(|baseline| metric.spread(&baseline.runs))
        && base.median > 0.0
        && !row.is_baseline
    {
        let _ = write!(cell, ", {:.3}", median / base.median);
    }
    cell
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(mean_us: f64, downtime_ms: Option<f64>) -> Figures {
        let faults =
            Faults { count: 7, mean_us, p50_us: 1.0, p90_us: 2.0, p99_us: 3.0, max_us: 4.0 };
        Figures {
            faults,
            phase_s: 13.5,
            downtime_ms,
            source_cpu_s: 1.0,
            destination_cpu_s: 2.0,
            own: Value::Null,
        }
    }

    fn row(scenario: &str, is_baseline: bool, runs: Vec<Figures>) -> Row {
        let contender = if is_baseline { "QEMU" } else { "ours" };
        Row { scenario: scenario.into(), contender: contender.into(), is_baseline, runs }
    }

    #[test]
    fn ratios_are_to_the_baseline_of_the_same_scenario() {
        let rows = [
            row("a", true, vec![run(100.0, Some(9.0)), run(300.0, None), run(200.0, None)]),
            row("a", false, vec![run(50.0, None)]),
            row("b", false, vec![run(70.0, None)]),
        ];
        let table = table(&rows);
        let lines: Vec<&str> = table.lines().collect();
        assert!(lines[2].starts_with("| a | QEMU | 7 | 200 (100..300) | 1 |"), "{table}");
        assert!(lines[2].contains("| 13.50 (13.50..13.50) | 9 |"), "{table}");
        assert!(lines[3].starts_with("| a | ours | 7 | 50 (50..50), 0.250 |"), "{table}");
        assert!(lines[3].contains(", 1.000 | - |"), "{table}");
        assert!(lines[4].starts_with("| b | ours | 7 | 70 (70..70) |"), "{table}");
    }

    #[test]
    fn the_json_has_every_run() {
        let json = row("a", true, vec![run(100.0, None), run(300.0, Some(4.0))]).json();
        assert_eq!(json["mean-us"]["median"], 200.0);
        assert_eq!(json["runs"][1]["mean-us"], 300.0);
        assert_eq!(json["downtime-ms"]["max"], 4.0);
        assert_eq!(json["runs"][0]["downtime-ms"], Value::Null);
    }

    #[test]
    fn whimbrels_report_is_read_whole() {
        let latency = json!({ "mean": 1.5, "p50": 1, "p90": 2, "p99": 3, "max": 4 });
        let report = json!({ "count": 3, "latency-us": latency });
        assert_eq!(Faults::of_report(&report).unwrap().mean_us, 1.5);
        let error = Faults::of_report(&json!({ "count": 3 })).unwrap_err().to_string();
        assert!(error.contains("latency-us.mean"), "{error}");
    }
}
