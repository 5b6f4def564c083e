//! Counts of many runs, as the tables of docs/reliability.md.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;

use crate::phase::Phase;
use crate::plan::{Action, Way};
use crate::run::{Outcome, Verdict};

/// What came of all runs.
#[derive(Debug, Default)]
pub(crate) struct Summary {
    verdicts: Vec<Verdict>,
}

/// A table of counts.
#[derive(Debug, Default)]
struct Table {
    rows: Vec<(String, BTreeMap<&'static str, u64>)>,
}

impl Table {
    fn row<'v>(&mut self, name: &str, counted: impl Iterator<Item = &'static str> + 'v) {
        let mut counts = BTreeMap::new();
        counted.for_each(|column| *counts.entry(column).or_insert(0) += 1);
        if !counts.is_empty() {
            self.rows.push((name.to_owned(), counts));
        }
    }

    /// The columns of `order` that anything was counted in.
    fn write(&self, text: &mut String, corner: &str, order: &[&'static str]) {
        let used: BTreeSet<&str> =
            self.rows.iter().flat_map(|(_, row)| row.keys().copied()).collect();
        let columns: Vec<&&str> = order.iter().filter(|name| used.contains(**name)).collect();
        let _ = write!(text, "| {corner} | all |");
        for column in &columns {
            let _ = write!(text, " {column} |");
        }
        let _ = writeln!(text, "\n|---|---:|{}", "---:|".repeat(columns.len()));
        for (name, counts) in &self.rows {
            let _ = write!(text, "| {name} | {} |", counts.values().sum::<u64>());
            for column in &columns {
                let count = counts.get(**column).map(|count| format!(" {count}"));
                let _ = write!(text, "{} |", count.unwrap_or_default());
            }
            text.push('\n');
        }
    }
}

impl Summary {
    pub(crate) fn add(&mut self, verdict: Verdict) {
        self.verdicts.push(verdict);
    }

    pub(crate) fn failures(&self) -> impl Iterator<Item = &Verdict> {
        self.verdicts.iter().filter(|verdict| verdict.failure.is_some())
    }

    /// Everything, in Markdown.
    pub(crate) fn text(&self) -> String {
        let mut text = self.sentences();
        self.by_mode(&mut text);
        self.by_phase(&mut text);
        self.by_fault(&mut text);
        text
    }

    fn sentences(&self) -> String {
        let runs = self.verdicts.len();
        let faults = self.verdicts.iter().flat_map(|verdict| &verdict.faults);
        let (fired, drawn) =
            (faults.clone().filter(|(_, at)| at.is_some()).count(), faults.count());
        let failed = self.failures().count();
        let mut text = format!(
            "{runs} runs, {drawn} faults drawn, {fired} of them happened; {failed} runs failed.\n"
        );
        let lost_link: Vec<&Verdict> =
            self.verdicts.iter().filter(|verdict| verdict.paused && verdict.of_link).collect();
        let of =
            |outcome| lost_link.iter().filter(|verdict| verdict.outcome == Some(outcome)).count();
        let recovered = of(Outcome::Recovered);
        let _ = writeln!(
            text,
            "In {} runs the link alone failed in postcopy, to be recovered by itself: {recovered} did{}, \
             in {} the destination had everything and the source was not told, {} were resumed by \
             hand, {} stayed paused.",
            lost_link.len(),
            share(recovered, lost_link.len()),
            of(Outcome::MovedUntold),
            of(Outcome::Resumed),
            of(Outcome::Paused),
        );
        let hand = self.verdicts.iter().filter(|verdict| verdict.by_hand).count();
        let _ = writeln!(text, "In {hand} runs somebody had to end or resume the migration.");
        let mut times: Vec<u64> = self.verdicts.iter().map(|verdict| verdict.millis).collect();
        times.sort_unstable();
        if let (Some(middle), Some(last)) = (times.get(times.len() / 2), times.last()) {
            let _ = writeln!(text, "A run took {middle} ms (median), {last} ms at most.");
        }
        text
    }

    fn by_mode(&self, text: &mut String) {
        let mut table = Table::default();
        let outcome = |verdict: &Verdict| verdict.outcome.map_or("failed", Outcome::name);
        for way in Way::ALL {
            let runs = self.verdicts.iter().filter(|verdict| verdict.way == way.name());
            table.row(way.name(), runs.map(outcome));
        }
        table.row("of all, with TLS", self.verdicts.iter().filter(|v| v.tls).map(outcome));
        table.row("of all, in huge pages", self.verdicts.iter().filter(|v| v.huge).map(outcome));
        table.row("all", self.verdicts.iter().map(outcome));
        text.push_str("\nRuns, by mode and what came of them:\n\n");
        table.write(text, "mode", &outcomes());
    }

    fn by_phase(&self, text: &mut String) {
        let mut table = Table::default();
        let phase = |at: &Option<Phase>| at.map_or("never", Phase::name);
        let faults = || self.verdicts.iter().flat_map(|verdict| &verdict.faults);
        for kind in Action::KINDS {
            let of_kind = faults().filter(|(name, _)| name == kind);
            table.row(kind, of_kind.map(|(_, at)| phase(at)));
        }
        table.row("all", faults().map(|(_, at)| phase(at)));
        let mut order: Vec<&str> = Phase::ALL.iter().map(|phase| phase.name()).collect();
        order.push("never");
        text.push_str("\nFaults, by kind and the phase in which they happened:\n\n");
        table.write(text, "fault", &order);
    }

    fn by_fault(&self, text: &mut String) {
        let mut table = Table::default();
        for kind in Action::KINDS {
            let alone = self.verdicts.iter().filter(|verdict| {
                let mut fired = verdict.faults.iter().filter(|(_, at)| at.is_some());
                fired.next().is_some_and(|(name, _)| name == kind) && fired.next().is_none()
            });
            table.row(kind, alone.map(|verdict| verdict.outcome.map_or("failed", Outcome::name)));
        }
        text.push_str("\nRuns in which one fault happened, by its kind and what came of them:\n\n");
        table.write(text, "fault", &outcomes());
    }
}

fn outcomes() -> Vec<&'static str> {
    Outcome::ALL.iter().map(|outcome| outcome.name()).chain(["failed"]).collect()
}

fn share(part: usize, whole: usize) -> String {
    match whole {
        0 => String::new(),
        _ => format!(" ({:.2} %)", part as f64 * 100.0 / whole as f64),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn verdict(way: Way, fault: &str, at: Option<Phase>, outcome: Outcome) -> Verdict {
        Verdict {
            seed: 1,
            index: 1,
            way: way.name().into(),
            tls: false,
            huge: false,
            faults: vec![(fault.into(), at)],
            of_link: true,
            outcome: Some(outcome),
            paused: outcome == Outcome::Recovered,
            by_hand: false,
            millis: 100,
            failure: None,
            story: String::new(),
        }
    }

    #[test]
    fn runs_are_counted_by_what_came_of_them() {
        let mut summary = Summary::default();
        summary.add(verdict(Way::Precopy, "cut", Some(Phase::Ram), Outcome::Stayed));
        summary.add(verdict(Way::Precopy, "delay", None, Outcome::Moved));
        summary.add(verdict(Way::Preempt, "cut", Some(Phase::Postcopy), Outcome::Recovered));
        let failed = Verdict {
            failure: Some("lost".into()),
            outcome: None,
            ..verdict(Way::Preempt, "flip", Some(Phase::Setup), Outcome::Moved)
        };
        summary.add(failed);
        assert_eq!(summary.failures().count(), 1);
        let text = summary.text();
        for line in [
            "4 runs, 4 faults drawn, 3 of them happened; 1 runs failed.",
            "In 1 runs the link alone failed in postcopy, to be recovered by itself: 1 did (100.00 %), \
             in 0 the destination had everything and the source was not told, 0 were resumed by \
             hand, 0 stayed paused.",
            "| mode | all | moved | recovered | stayed | failed |",
            "| precopy | 2 | 1 | | 1 | |",
            "| preempt | 2 | | 1 | | 1 |",
            "| fault | all | setup | RAM | postcopy | never |",
            "| cut | 2 | | 1 | 1 | |",
            "| delay | 1 | | | | 1 |",
            "| cut | 2 | | 1 | 1 | |",
        ] {
            assert!(text.lines().any(|found| found == line), "no line '{line}' in:\n{text}");
        }
    }
}
