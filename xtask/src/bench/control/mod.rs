//! `cargo xtask bench control`: how long `query-status` takes at both ends while a guest moves, on
//! processors that are busy: ours and QEMU's in turn.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::PathBuf;

use anyhow::{Context as _, Result};
use serde_json::{Value, json};

use self::stage::{Contender, End, Phase};
use super::contender::{Memory, Qemu, whimbrel};
use super::postcopy::guest::QemuGuest;
use super::postcopy::writer::Writer;
use super::sample::{keep, machine};
use super::scratch::Scratch;
use crate::workspace::Workspace;

pub(crate) mod asker;
mod busy;
mod stage;
mod stall;

/// What to measure.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The guest's memory, of which it writes to all but 512 MiB
    #[arg(long, default_value = "1G", value_parser = Memory::parse)]
    memory: Memory,
    /// How many times each contender runs
    #[arg(long, default_value_t = 5)]
    runs: u32,
    /// From one question to the next, in ms
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u64).range(1..))]
    every: u64,
    /// Threads that keep processors busy beside the guest; as many as there are processors if not
    /// said
    #[arg(long, default_value_t = processors())]
    busy: usize,
    /// Move RAM on so many multifd channels
    #[arg(long, default_value_t = 0, value_name = "N")]
    multifd: u8,
    /// Measure against this QEMU, instead of the newest one fetched
    #[arg(long, value_name = "PATH")]
    qemu: Option<PathBuf>,
    /// Leave a contender out
    #[arg(long, value_name = "WHO", value_parser = ["whimbrel", "qemu"])]
    without: Option<String>,
}

fn processors() -> usize {
    std::thread::available_parallelism().map_or(1, std::num::NonZero::get)
}

/// Measures, prints the table, keeps everything. Says whether every run succeeded.
pub(crate) fn run(workspace: &Workspace, args: &Args) -> Result<bool> {
    let without = args.without.as_deref();
    let writer = Writer::in_memory(u32::try_from(args.memory.bytes() >> 20)?)
        .context("the guest has between 513 MiB and 2 GiB of memory")?;
    let folder = Scratch::new()?;
    let binary = (without != Some("whimbrel")).then(|| whimbrel(workspace)).transpose()?;
    let qemu = match without {
        Some("qemu") => None,
        _ => {
            let qemu = Qemu::find(workspace, args.qemu.as_deref())?;
            let version = qemu.version()?;
            Some((QemuGuest::new(qemu, args.memory, writer, folder.path())?, version))
        }
    };
    let ours = binary.as_deref().map(|binary| Contender::Whimbrel { binary });
    let theirs = qemu.as_ref().map(|(guest, version)| Contender::Qemu { guest, version });
    let contenders: Vec<Contender<'_>> = ours.into_iter().chain(theirs).collect();
    if !asker::before_all_others() {
        println!(
            "the client waits for processors like everybody (no chrt, or not allowed): its waits are \
             in the times"
        );
    }

    let mut all = Times::default();
    let mut whole = true;
    for run in 1..=args.runs {
        // A B, then B A.
        let mut order: Vec<&Contender<'_>> = contenders.iter().collect();
        if run.is_multiple_of(2) {
            order.reverse();
        }
        for contender in order {
            let name = contender.name();
            match contender.sample(args, writer, folder.path()) {
                Ok(answers) => {
                    eprintln!("{run}/{}: {name}: {}", args.runs, worst(&answers));
                    for ((phase, end), times) in answers {
                        all.0.entry((phase, end, name.clone())).or_default().push(times);
                    }
                }
                Err(error) => {
                    println!("{run}/{}: {name}: FAILED: {error:#}", args.runs);
                    whole = false;
                }
            }
        }
    }
    println!("{}", all.table());
    let mut about = machine();
    about.insert("memory-bytes".to_owned(), json!(args.memory.bytes()));
    about.insert("runs".to_owned(), json!(args.runs));
    about.insert("every-ms".to_owned(), json!(args.every));
    about.insert("busy".to_owned(), json!(args.busy));
    about.insert("multifd-channels".to_owned(), json!(args.multifd));
    println!("kept in {}", keep(workspace, "control", about, all.json())?.display());
    Ok(whole)
}

fn worst(answers: &stage::Answers) -> String {
    let one = |((phase, end), times): &((Phase, End), Vec<f64>)| {
        let max = times.iter().copied().fold(0.0, f64::max);
        format!("{}, {}: {max:.1} ms of {}", phase.name(), end.name(), times.len())
    };
    answers.iter().map(one).collect::<Vec<_>>().join("; ")
}

/// How long answers took, in ms: a list for each run.
#[derive(Debug, Default)]
struct Times(BTreeMap<(Phase, End, String), Vec<Vec<f64>>>);

impl Times {
    /// Markdown: what is going on, at which end, and each contender beside the other.
    fn table(&self) -> String {
        let mut text = String::from(
            "| phase | end | contender | answers | p50 ms | p99 ms | max ms | longest of each run |\n\
             |---|---|---|---|---|---|---|---|\n",
        );
        let ends = [End::Destination, End::Source];
        let places = Phase::ALL.into_iter().flat_map(|phase| ends.map(|end| (phase, end)));
        for (phase, end) in places {
            for ((_, _, contender), runs) in
                self.0.iter().filter(|((p, e, _), _)| (*p, *e) == (phase, end))
            {
                let Some(quantiles) = Quantiles::of(runs.iter().flatten().copied()) else {
                    continue;
                };
                let max =
                    |run: &Vec<f64>| format!("{:.1}", run.iter().copied().fold(0.0, f64::max));
                let each: Vec<String> = runs.iter().map(max).collect();
                let Quantiles { count, p50, p99, max } = quantiles;
                // Writing to a String cannot fail.
                let _ = writeln!(
                    text,
                    "| {} | {} | {contender} | {count} | {p50:.2} | {p99:.2} | {max:.1} | {} |",
                    phase.name(),
                    end.name(),
                    each.join(", ")
                );
            }
        }
        text
    }

    fn json(&self) -> Vec<Value> {
        let row = |((phase, end, contender), runs): (&(Phase, End, String), &Vec<Vec<f64>>)| {
            let quantiles = Quantiles::of(runs.iter().flatten().copied())
                .map(|q| json!({ "count": q.count, "p50": q.p50, "p99": q.p99, "max": q.max }));
            json!({
                "phase": phase.name(),
                "end": end.name(),
                "contender": contender,
                "ms": quantiles,
                "runs": runs,
            })
        };
        self.0.iter().map(row).collect()
    }
}

/// Of all answers there are.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Quantiles {
    count: usize,
    p50: f64,
    p99: f64,
    max: f64,
}

impl Quantiles {
    /// `None` of nothing.
    fn of(times: impl Iterator<Item = f64>) -> Option<Self> {
        let mut times: Vec<f64> = times.collect();
        times.sort_by(f64::total_cmp);
        let max = *times.last()?;
        // The least that so many of a hundred do not exceed.
        let at = |percent: usize| times[(times.len() * percent).div_ceil(100) - 1];
        Some(Self { count: times.len(), p50: at(50), p99: at(99), max })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_of_what_was_measured() {
        assert_eq!(Quantiles::of(std::iter::empty()), None);
        let hundred = (1..=100).rev().map(f64::from);
        let expected = Quantiles { count: 100, p50: 50.0, p99: 99.0, max: 100.0 };
        assert_eq!(Quantiles::of(hundred), Some(expected));
        let one = Quantiles { count: 1, p50: 7.0, p99: 7.0, max: 7.0 };
        assert_eq!(Quantiles::of(std::iter::once(7.0)), Some(one));
    }

    #[test]
    fn runs_are_pooled_and_their_longest_told() {
        let mut times = Times::default();
        let key = (Phase::Loaded, End::Destination, "ours".to_owned());
        times.0.insert(key, vec![vec![1.0, 2.0], vec![3.5]]);
        let table = times.table();
        let line = "| loaded link | destination | ours | 3 | 2.00 | 3.50 | 3.5 | 2.0, 3.5 |";
        assert!(table.contains(line), "{table}");
    }
}
