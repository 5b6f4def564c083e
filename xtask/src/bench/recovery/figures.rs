//! What is measured of a recovery, what is asked of it, the tables and the JSON they end in.

use std::fmt;
use std::fmt::Write as _;

use clap::ValueEnum;
use serde_json::{Map, Value, json};

use super::cable::Fault;
use crate::bench::metric;
use crate::bench::sample::Spread;

/// Pages sent again, for each that was in flight.
const AGAIN_MAX: f64 = 1.02;
/// From the link's return to the first page: so many round trips, and so many ms.
const ROUND_TRIPS_MAX: f64 = 3.0;
const BACK_MAX_MS: f64 = 50.0;

/// How a link fails.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum Kind {
    /// Both sides find their connections reset at once
    Reset,
    /// Nobody is told: both sides notice by the silence
    Silent,
}

impl fmt::Display for Kind {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::Reset => "reset",
            Self::Silent => "silent",
        })
    }
}

/// One migration with many cuts, in pages.
#[derive(Debug, Clone)]
pub(super) struct Cuts {
    pub(super) kind: Kind,
    /// By the source's count, zero pages included.
    pub(super) sent: u64,
    pub(super) of_guest: u64,
    /// While the guest still ran at the source: what it wrote to afterwards is sent again.
    pub(super) before: u64,
    /// At the destination, which had them.
    pub(super) came_twice: u64,
    /// In flight at each cut.
    pub(super) at_cut: Vec<u64>,
    /// The same with what the source had written when it gave the connections up.
    pub(super) given_up: Vec<u64>,
    pub(super) seconds: f64,
}

impl Cuts {
    /// All that was sent beyond once each, whatever for.
    pub(super) fn again(&self) -> u64 {
        self.sent.saturating_sub(self.of_guest)
    }

    /// Pages sent again for each in flight, at the cuts and when the connections were given up.
    fn ratios(&self) -> [f64; 2] {
        [&self.at_cut, &self.given_up]
            .map(|flight| float(self.again()) / float(flight.iter().sum()))
    }

    /// Who is not told of a cut cannot but write into the dead link: that is on its way, too.
    pub(super) fn is_reached(&self) -> bool {
        self.ratios()[1] <= AGAIN_MAX
    }

    pub(super) fn json(&self) -> Value {
        let [of_cut, of_given_up] = self.ratios();
        json!({
            "part": "cuts",
            "kind": self.kind.to_string(),
            "cuts": self.at_cut.len(),
            "pages-sent": self.sent,
            "pages-of-guest": self.of_guest,
            "pages-before-postcopy": self.before,
            "pages-again": self.again(),
            "pages-came-twice": self.came_twice,
            "pages-in-flight": self.at_cut,
            "pages-given-up": self.given_up,
            "again-of-in-flight": of_cut,
            "again-of-given-up": of_given_up,
            "reached": self.is_reached(),
            "seconds": self.seconds,
        })
    }
}

/// Markdown.
pub(super) fn cuts_table(all: &[Cuts]) -> String {
    let mut text = String::from(
        "| failure | cuts | pages of the guest | sent again | in flight at the cuts | ratio | when \
         given up | ratio | aim | reached | came twice | before postcopy | s |\n\
         |---|---|---|---|---|---|---|---|---|---|---|---|---|\n",
    );
    for cuts in all {
        let [at_cut, given_up] = cuts.ratios();
        let sum = |flight: &[u64]| flight.iter().sum::<u64>();
        // Writing to a String cannot fail.
        let _ = writeln!(
            text,
            "| {} | {} | {} | {} | {} | {at_cut:.3} | {} | {given_up:.3} | {AGAIN_MAX} | {} | {} | {} \
             | {:.0} |",
            cuts.kind,
            cuts.at_cut.len(),
            cuts.of_guest,
            cuts.again(),
            sum(&cuts.at_cut),
            sum(&cuts.given_up),
            yes(cuts.is_reached()),
            cuts.came_twice,
            cuts.before,
            cuts.seconds,
        );
    }
    text
}

/// One return of the link.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Return {
    pub(super) outage_s: f64,
    /// Until the guest was seen to go on.
    pub(super) first_page_ms: f64,
    /// When it was last asked and had not.
    pub(super) still_ms: f64,
    /// What the threads of both processes waited for a processor until then, all together: where that
    /// is much, it is the machine that was measured.
    pub(super) waited_ms: f64,
    /// Until the source told that it is `postcopy-active`.
    pub(super) active_ms: f64,
}

type Metric = metric::Metric<Return>;

const METRICS: [Metric; 4] = [
    Metric::new("first-page-ms", "first page ms", 1, |back| Some(back.first_page_ms)),
    Metric::new("seen-within-ms", "seen within ms", 1, |back| {
        Some(back.first_page_ms - back.still_ms)
    }),
    Metric::new("waited-for-processor-ms", "waited for a processor ms", 1, |back| {
        Some(back.waited_ms)
    }),
    Metric::new("active-ms", "postcopy-active ms", 1, |back| Some(back.active_ms)),
];

/// All returns of one contender after outages of one length.
#[derive(Debug, Clone)]
pub(super) struct Row {
    pub(super) contender: String,
    pub(super) is_ours: bool,
    pub(super) fault: Fault,
    pub(super) outage_s: f64,
    pub(super) returns: Vec<Return>,
}

impl Row {
    /// How many were in time, by this round trip in ms.
    fn in_time(&self, round_trip_ms: f64) -> usize {
        let limit = limit_ms(round_trip_ms);
        self.returns.iter().filter(|back| back.first_page_ms <= limit).count()
    }

    /// All of them, not most. With a cable it is the kernels that are waited for.
    pub(super) fn is_reached(&self, round_trip_ms: f64) -> bool {
        !self.is_ours
            || self.fault != Fault::Middle
            || self.in_time(round_trip_ms) == self.returns.len()
    }

    pub(super) fn json(&self, round_trip_ms: f64) -> Value {
        let mut object = Map::new();
        object.insert("part".into(), json!("return"));
        object.insert("contender".into(), json!(self.contender));
        object.insert("fault".into(), json!(self.fault.to_string()));
        object.insert("outage-s".into(), json!(self.outage_s));
        object.insert("aim-ms".into(), json!(limit_ms(round_trip_ms)));
        object.insert("in-time".into(), json!(self.in_time(round_trip_ms)));
        object.extend(metric::spreads(&METRICS, &self.returns));
        let runs = self.returns.iter().map(|back| Value::Object(metric::figures(&METRICS, back)));
        object.insert("runs".into(), runs.collect());
        Value::Object(object)
    }
}

/// What is asked of the first page.
pub(super) fn limit_ms(round_trip_ms: f64) -> f64 {
    ROUND_TRIPS_MAX * round_trip_ms + BACK_MAX_MS
}

/// One return in one line, for whoever waits.
pub(super) fn line(back: &Return) -> String {
    format!("{} s away: {}", back.outage_s, metric::line(&METRICS, back))
}

/// Markdown: medians and their spread.
pub(super) fn returns_table(rows: &[Row], round_trip_ms: f64) -> String {
    let mut text = String::from("| what fails | for s | contender | returns |");
    for metric in &METRICS {
        // Writing to a String cannot fail.
        let _ = write!(text, " {} (min..max) |", metric.head);
    }
    let _ = writeln!(text, " in time, of {:.1} ms |", limit_ms(round_trip_ms));
    let _ = writeln!(text, "{}|", "|---".repeat(METRICS.len() + 5));
    for row in rows {
        let Row { fault, outage_s, contender, returns, .. } = row;
        let _ = write!(text, "| {fault} | {outage_s} | {contender} | {} |", returns.len());
        for metric in &METRICS {
            let cell = metric.spread(&row.returns).map_or("-".to_owned(), |spread| {
                let (Spread { median, least, greatest }, decimals) = (spread, metric.decimals);
                format!("{median:.decimals$} ({least:.decimals$}..{greatest:.decimals$})")
            });
            let _ = write!(text, " {cell} |");
        }
        let _ = writeln!(text, " {} |", row.in_time(round_trip_ms));
    }
    text
}

fn yes(reached: bool) -> &'static str {
    if reached { "yes" } else { "no" }
}

#[expect(clippy::cast_precision_loss, reason = "counts of pages are far below 2^53")]
fn float(count: u64) -> f64 {
    count as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cuts(sent: u64, at_cut: Vec<u64>, given_up: Vec<u64>) -> Cuts {
        let (kind, of_guest, before, came_twice) = (Kind::Silent, 1000, 2, 1);
        Cuts { kind, sent, of_guest, before, came_twice, at_cut, given_up, seconds: 3.0 }
    }

    #[test]
    fn pages_sent_again_are_judged_by_what_was_given_up() {
        let run = cuts(1102, vec![40, 40], vec![50, 50]);
        assert_eq!(run.again(), 102);
        assert!(run.is_reached());
        assert!(!cuts(1103, vec![50, 50], vec![50, 50]).is_reached());
        let table = cuts_table(std::slice::from_ref(&run));
        let row = "| silent | 2 | 1000 | 102 | 80 | 1.275 | 100 | 1.020 | 1.02 | yes | 1 | 2 | 3 |";
        assert!(table.contains(row), "{table}");
        assert_eq!(run.json()["pages-given-up"][1], 50);
    }

    fn row(is_ours: bool, times: &[f64]) -> Row {
        let of = |first_page_ms: &f64| Return {
            outage_s: 1.0,
            first_page_ms: *first_page_ms,
            still_ms: first_page_ms - 0.5,
            waited_ms: 7.0,
            active_ms: first_page_ms * 2.0,
        };
        let returns = times.iter().map(of).collect();
        Row { contender: "it".into(), is_ours, fault: Fault::Middle, outage_s: 1.0, returns }
    }

    #[test]
    fn every_return_has_to_be_in_time() {
        // The limit is 53 ms.
        assert!(row(true, &[10.0, 53.0]).is_reached(1.0));
        assert!(!row(true, &[10.0, 20.0, 53.1]).is_reached(1.0));
        assert!(row(false, &[900.0]).is_reached(1.0));
        assert!(Row { fault: Fault::Cable, ..row(true, &[900.0]) }.is_reached(1.0));
    }

    #[test]
    fn the_table_has_medians_and_their_spread() {
        let table = returns_table(&[row(true, &[10.0, 20.0, 60.0])], 1.0);
        let line = "| middle | 1 | it | 3 | 20.0 (10.0..60.0) | 0.5 (0.5..0.5) | 7.0 (7.0..7.0) | 40.0 (20.0..120.0) | 2 |";
        assert!(table.contains(line), "{table}");
        let json = row(true, &[10.0, 20.0, 60.0]).json(1.0);
        assert_eq!(json["first-page-ms"]["median"], 20.0);
        assert_eq!((&json["in-time"], &json["aim-ms"]), (&json!(2), &json!(53.0)));
    }
}
