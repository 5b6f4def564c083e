//! What was measured: samples, their medians and spread, the table and the file they end in.

use std::fmt::Write as _;
use std::fs;
use std::path::PathBuf;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, Result};
use serde_json::{Map, Value, json};

use crate::workspace::Workspace;

/// One transfer.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Sample {
    /// Billions of bytes of memory per second.
    pub(crate) gigabytes_per_second: f64,
    /// Processor seconds per GiB of memory, user and system, at the source.
    pub(crate) source_cpu_per_gib: f64,
    /// The same at the destination.
    pub(crate) destination_cpu_per_gib: f64,
}

/// All samples of one contender in one scenario.
#[derive(Debug, Clone)]
pub(crate) struct Row {
    pub(crate) scenario: String,
    pub(crate) contender: String,
    pub(crate) samples: Vec<Sample>,
}

/// The middle one, the least and the greatest.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Spread {
    pub(crate) median: f64,
    pub(crate) least: f64,
    pub(crate) greatest: f64,
}

impl Spread {
    /// `None` of nothing.
    pub(crate) fn of(values: impl IntoIterator<Item = f64>) -> Option<Self> {
        let mut values: Vec<f64> = values.into_iter().collect();
        values.sort_by(f64::total_cmp);
        let (least, greatest) = (*values.first()?, *values.last()?);
        let middle = values.len() / 2;
        let median = match values.len() % 2 {
            0 => f64::midpoint(values[middle - 1], values[middle]),
            _ => values[middle],
        };
        Some(Self { median, least, greatest })
    }

    fn cell(self) -> String {
        format!("{:.2} ({:.2}..{:.2})", self.median, self.least, self.greatest)
    }

    pub(crate) fn json(self) -> Value {
        json!({ "median": self.median, "min": self.least, "max": self.greatest })
    }
}

impl Row {
    pub(crate) fn speed(&self) -> Option<Spread> {
        Spread::of(self.samples.iter().map(|sample| sample.gigabytes_per_second))
    }

    fn source(&self) -> Option<Spread> {
        Spread::of(self.samples.iter().map(|sample| sample.source_cpu_per_gib))
    }

    fn destination(&self) -> Option<Spread> {
        Spread::of(self.samples.iter().map(|sample| sample.destination_cpu_per_gib))
    }

    pub(crate) fn json(&self) -> Value {
        let samples: Vec<Value> = self
            .samples
            .iter()
            .map(|sample| {
                json!({
                    "gb-per-s": sample.gigabytes_per_second,
                    "source-cpu-s-per-gib": sample.source_cpu_per_gib,
                    "destination-cpu-s-per-gib": sample.destination_cpu_per_gib,
                })
            })
            .collect();
        json!({
            "scenario": self.scenario,
            "contender": self.contender,
            "gb-per-s": self.speed().map(Spread::json),
            "source-cpu-s-per-gib": self.source().map(Spread::json),
            "destination-cpu-s-per-gib": self.destination().map(Spread::json),
            "samples": samples,
        })
    }
}

/// The rows as a Markdown table; `baseline` is the contender that ratios are taken against.
pub(crate) fn table(rows: &[Row], baseline: &str) -> String {
    let mut text = String::from(
        "| scenario | contender | GB/s, median (min..max) | ratio | source CPU s/GiB | \
         destination CPU s/GiB |\n|---|---|---|---|---|---|\n",
    );
    for row in rows {
        let (Some(speed), Some(source), Some(destination)) =
            (row.speed(), row.source(), row.destination())
        else {
            continue;
        };
        let base = rows
            .iter()
            .find(|other| other.scenario == row.scenario && other.contender.starts_with(baseline))
            .and_then(Row::speed);
        let ratio =
            base.map_or("-".to_owned(), |base| format!("{:.2}", speed.median / base.median));
        let Row { scenario, contender, .. } = row;
        let (speed, source, destination) = (speed.cell(), source.cell(), destination.cell());
        // Writing to a String cannot fail.
        let _ = writeln!(
            text,
            "| {scenario} | {contender} | {speed} | {ratio} | {source} | {destination} |"
        );
    }
    text
}

/// The machine, without which no figure means anything.
pub(crate) fn machine() -> Map<String, Value> {
    let first = |path: &str, name: &str| {
        let text = fs::read_to_string(path).unwrap_or_default();
        let line = text.lines().find(|line| line.starts_with(name)).unwrap_or_default();
        line.split_once(':').map_or(line, |(_, value)| value).trim().to_owned()
    };
    let processors = std::thread::available_parallelism().map_or(0, std::num::NonZero::get);
    [
        ("processor", json!(first("/proc/cpuinfo", "model name"))),
        ("processors", json!(processors)),
        ("kernel", json!(first("/proc/sys/kernel/osrelease", ""))),
    ]
    .into_iter()
    .map(|(name, value)| (name.to_owned(), value))
    .collect()
}

/// Keeps everything below the target directory; says where.
pub(crate) fn keep(
    workspace: &Workspace,
    name: &str,
    about: Map<String, Value>,
    rows: Vec<Value>,
) -> Result<PathBuf> {
    let seconds = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
    let path = workspace.target(&format!("bench/{name}-{seconds}.json"));
    let folder = path.parent().context("a file lies in a folder")?;
    fs::create_dir_all(folder)?;
    let mut document = about;
    document.insert("rows".to_owned(), Value::Array(rows));
    fs::write(&path, format!("{:#}\n", Value::Object(document)))?;
    Ok(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_is_the_middle_one() {
        assert_eq!(Spread::of([]), None);
        let odd = Spread::of([3.0, 1.0, 2.5]).unwrap();
        assert_eq!(odd, Spread { median: 2.5, least: 1.0, greatest: 3.0 });
        assert_eq!(Spread::of([4.0, 1.0, 2.0, 3.0]).unwrap().median, 2.5);
    }

    #[test]
    fn ratios_are_within_a_scenario() {
        let row = |scenario, contender: &str, speed| Row {
            scenario: str::to_owned(scenario),
            contender: contender.to_owned(),
            samples: vec![Sample {
                gigabytes_per_second: speed,
                source_cpu_per_gib: 0.1,
                destination_cpu_per_gib: 0.2,
            }],
        };
        let rows = [row("a", "ours", 3.0), row("a", "QEMU 1", 2.0), row("b", "ours", 5.0)];
        let table = table(&rows, "QEMU");
        assert!(table.contains("| a | ours | 3.00 (3.00..3.00) | 1.50 |"), "{table}");
        assert!(table.contains("| b | ours | 5.00 (5.00..5.00) | - |"), "{table}");
    }
}
