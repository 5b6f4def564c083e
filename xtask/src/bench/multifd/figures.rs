//! What is measured of a migration, the table and the JSON it ends in.

use std::fmt::Write as _;

use serde_json::{Map, Value, json};

use super::scenario::{Compression, Method, Scenario};
use crate::bench::metric;
use crate::bench::sample::{Sample, Spread};

/// One migration, or one plain transfer.
#[derive(Debug, Clone, Copy)]
pub(super) struct Figures {
    /// Billions of bytes of guest memory, whatever was sent of it, per second.
    pub(super) gigabytes_per_second: f64,
    pub(super) source_cpu_per_gib: f64,
    pub(super) destination_cpu_per_gib: f64,
    pub(super) downtime_ms: Option<f64>,
    pub(super) total_ms: f64,
    /// What went over the wire, as the source says.
    pub(super) sent_gib: Option<f64>,
}

impl Figures {
    /// A plain transfer's.
    pub(super) fn of_plain(sample: Sample, gigabytes: f64) -> Self {
        Self {
            gigabytes_per_second: sample.gigabytes_per_second,
            source_cpu_per_gib: sample.source_cpu_per_gib,
            destination_cpu_per_gib: sample.destination_cpu_per_gib,
            downtime_ms: None,
            total_ms: gigabytes / sample.gigabytes_per_second * 1e3,
            sent_gib: None,
        }
    }

    fn cpu_per_gib(&self) -> f64 {
        self.source_cpu_per_gib + self.destination_cpu_per_gib
    }
}

type Metric = metric::Metric<Figures>;

const SPEED: Metric = Metric::new("gb-per-s", "GB/s", 2, |run| Some(run.gigabytes_per_second));
const CPU: Metric = Metric::new("cpu-s-per-gib", "CPU s/GiB", 2, |run| Some(run.cpu_per_gib()));
const SOURCE_CPU: Metric =
    Metric::new("source-cpu-s-per-gib", "source", 2, |run| Some(run.source_cpu_per_gib));
const DESTINATION_CPU: Metric = Metric::new("destination-cpu-s-per-gib", "destination", 2, |run| {
    Some(run.destination_cpu_per_gib)
});
const DOWNTIME: Metric = Metric::new("downtime-ms", "downtime ms", 0, |run| run.downtime_ms);
const TOTAL: Metric = Metric::new("total-time-ms", "total ms", 0, |run| Some(run.total_ms));
const SENT: Metric = Metric::new("sent-gib", "sent GiB", 2, |run| run.sent_gib);

const METRICS: [Metric; 7] = [SPEED, CPU, SOURCE_CPU, DESTINATION_CPU, DOWNTIME, TOTAL, SENT];

/// Whose figures these are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Who {
    Ours,
    Peer,
    Plain,
}

/// All runs of one contender in one scenario.
#[derive(Debug, Clone)]
pub(super) struct Row {
    pub(super) scenario: Scenario,
    pub(super) method: Method,
    pub(super) who: Who,
    pub(super) contender: String,
    pub(super) runs: Vec<Figures>,
}

impl Row {
    fn median(&self, metric: &Metric) -> Option<f64> {
        metric.spread(&self.runs).map(|spread| spread.median)
    }

    pub(super) fn json(&self, rows: &[Row]) -> Value {
        let mut object = Map::new();
        object.insert("scenario".into(), json!(self.scenario.to_string()));
        object.insert("method".into(), json!(self.method.to_string()));
        object.insert("contender".into(), json!(self.contender));
        object.extend(metric::spreads(&METRICS, &self.runs));
        for (name, metric) in [("gb-per-s-ratio", &SPEED), ("cpu-ratio", &CPU)] {
            object.insert(name.into(), json!(self.ratio(rows, metric)));
        }
        object.insert("of-plain".into(), json!(self.of_plain(rows)));
        let runs = self.runs.iter().map(|run| metric::figures(&METRICS, run).into());
        object.insert("runs".into(), Value::Array(runs.collect()));
        Value::Object(object)
    }

    fn is_beside(&self, other: &Row) -> bool {
        self.scenario == other.scenario
    }

    /// What this row is held against: the peer doing the same; where there is no peer that can, the
    /// better of our own fixed methods.
    fn baseline<'a>(&self, rows: &'a [Row]) -> Option<&'a Row> {
        if self.who != Who::Ours {
            return None;
        }
        let alike = |who, compression| {
            rows.iter().find(|other| {
                let method = Method { compression, ..self.method };
                self.is_beside(other) && other.who == who && other.method == method
            })
        };
        match self.method.compression {
            Compression::Auto => [Compression::None, Compression::Zstd]
                .into_iter()
                .filter_map(|fixed| alike(Who::Ours, fixed))
                .filter(|row| row.median(&SPEED).is_some())
                .max_by(|one, other| {
                    let speed = |row: &Row| row.median(&SPEED).unwrap_or_default();
                    speed(one).total_cmp(&speed(other))
                }),
            fixed => alike(Who::Peer, fixed),
        }
    }

    fn ratio(&self, rows: &[Row], metric: &Metric) -> Option<f64> {
        let base = self.baseline(rows)?.median(metric)?;
        (base > 0.0).then(|| self.median(metric).map(|median| median / base))?
    }

    /// Its speed against that of plain send and receive on as many connections.
    fn of_plain(&self, rows: &[Row]) -> Option<f64> {
        let plain = rows.iter().find(|other| self.is_beside(other) && other.who == Who::Plain)?;
        Some(self.median(&SPEED)? / plain.median(&SPEED)?)
    }

    fn cells(&self, rows: &[Row]) -> String {
        let spread = |metric: &Metric| match metric.spread(&self.runs) {
            Some(Spread { median, least, greatest }) => {
                let decimals = metric.decimals;
                format!("{median:.decimals$} ({least:.decimals$}..{greatest:.decimals$})")
            }
            None => "-".to_owned(),
        };
        let plain = |metric: &Metric| match self.median(metric) {
            Some(median) => format!("{median:.*}", metric.decimals),
            None => "-".to_owned(),
        };
        let ratio =
            |value: Option<f64>| value.map_or("-".to_owned(), |value| format!("{value:.2}"));
        [
            spread(&SPEED),
            ratio(self.ratio(rows, &SPEED)),
            ratio(self.of_plain(rows)),
            format!("{} + {}", plain(&SOURCE_CPU), plain(&DESTINATION_CPU)),
            ratio(self.ratio(rows, &CPU)),
            spread(&DOWNTIME),
            plain(&TOTAL),
            plain(&SENT),
        ]
        .join(" | ")
    }
}

/// One run in one line, for whoever waits.
pub(super) fn line(figures: &Figures) -> String {
    metric::line(&METRICS, figures)
}

/// The rows as a Markdown table: medians, spreads, ratios.
pub(super) fn table(rows: &[Row]) -> String {
    let mut text = String::from(
        "| scenario | method | contender | GB/s, median (min..max) | ratio | of plain | CPU s/GiB, \
         source + destination | CPU ratio | downtime ms | total ms | sent GiB |\n\
         |---|---|---|---|---|---|---|---|---|---|---|\n",
    );
    for row in rows {
        let Row { scenario, method, contender, .. } = row;
        // Writing to a String cannot fail.
        let _ = writeln!(text, "| {scenario} | {method} | {contender} | {} |", row.cells(rows));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::multifd::content::Content;
    use crate::bench::multifd::scenario::{Guest, Room, Tls};
    use crate::bench::network::Between;

    fn row(channels: u8, compression: Compression, who: Who, speeds: &[f64]) -> Row {
        Row {
            scenario: Scenario {
                between: Between::Loopback,
                content: Content::Random,
                guest: Guest::Idle,
                room: Room::Preallocated,
                channels,
            },
            method: Method { compression, tls: Tls::Off },
            who,
            contender: format!("{who:?}"),
            runs: speeds
                .iter()
                .map(|&gigabytes_per_second| Figures {
                    gigabytes_per_second,
                    source_cpu_per_gib: 1.0 / gigabytes_per_second,
                    destination_cpu_per_gib: 0.5,
                    downtime_ms: None,
                    total_ms: 1000.0,
                    sent_gib: Some(4.0),
                })
                .collect(),
        }
    }

    #[test]
    fn ours_is_held_against_the_peer_doing_the_same() {
        let rows = [
            row(2, Compression::None, Who::Ours, &[4.0, 2.0, 3.0]),
            row(2, Compression::None, Who::Peer, &[2.0]),
            row(2, Compression::Zstd, Who::Peer, &[1.0]),
            row(4, Compression::None, Who::Peer, &[1.0]),
            row(2, Compression::None, Who::Plain, &[6.0]),
        ];
        let table = table(&rows);
        let lines: Vec<&str> = table.lines().collect();
        assert_eq!(
            lines[2],
            "| loopback, random, 2 channels | none | Ours | 3.00 (2.00..4.00) | 1.50 | 0.50 | \
             0.33 + 0.50 | 0.83 | - | 1000 | 4.00 |"
        );
        assert!(lines[3].contains("| Peer | 2.00 (2.00..2.00) | - | 0.33 |"), "{table}");
        assert!(lines[5].contains("| Peer | 1.00 (1.00..1.00) | - | - |"), "{table}");
        let json = rows[0].json(&rows);
        assert_eq!(json["gb-per-s-ratio"], 1.5);
        assert_eq!(json["runs"][1]["gb-per-s"], 2.0);
    }

    #[test]
    fn auto_is_held_against_the_better_of_ours() {
        let rows = [
            row(2, Compression::None, Who::Ours, &[3.0]),
            row(2, Compression::Zstd, Who::Ours, &[2.0]),
            row(2, Compression::Zlib, Who::Ours, &[9.0]),
            row(2, Compression::Auto, Who::Ours, &[2.7]),
        ];
        let ratio = rows[3].ratio(&rows, &SPEED).unwrap();
        assert!((ratio - 0.9).abs() < 1e-9, "{ratio}");
        assert_eq!(rows[2].ratio(&rows, &SPEED), None);
    }
}
