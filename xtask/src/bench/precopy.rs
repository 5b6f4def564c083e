//! `cargo xtask bench precopy`: one channel over loopback, ours and QEMU's interleaved, with a
//! plain transfer of as many bytes as the floor.

use std::path::{Path, PathBuf};

use anyhow::Result;
use serde_json::{Map, Value, json};

use super::contender::{Contender, Memory, Qemu, Scenario, content_file, whimbrel};
use super::network::Way;
use super::plain::Transfer;
use super::sample::{Row, Sample, keep, machine, table};
use super::scratch::Scratch;
use super::{host_memory, plain, rates};
use crate::workspace::Workspace;

/// What to measure against what.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The guest's memory
    #[arg(long, default_value = "2G", value_parser = Memory::parse)]
    memory: Memory,
    /// How many times each contender runs in each scenario
    #[arg(long, default_value_t = 7)]
    runs: u32,
    /// Measure against this QEMU, instead of the newest one fetched
    #[arg(long, value_name = "PATH")]
    qemu: Option<PathBuf>,
    /// Only this scenario: 'preallocated', 'not touched before' or 'all zero'
    #[arg(long, value_name = "NAME")]
    scenario: Option<String>,
    /// Leave a contender out (may be given more than once)
    #[arg(long, value_name = "WHO", value_parser = ["whimbrel", "qemu", "plain"])]
    without: Vec<String>,
}

const SCENARIOS: [Scenario; 3] = [
    Scenario { name: "preallocated", incompressible: true, preallocated: true },
    Scenario { name: "not touched before", incompressible: true, preallocated: false },
    Scenario { name: "all zero", incompressible: false, preallocated: false },
];

/// Measures, prints the table, keeps everything. Says whether every run succeeded.
pub(crate) fn run(workspace: &Workspace, args: &Args) -> Result<bool> {
    let contenders = contenders(workspace, args)?;
    let folder = Scratch::new()?;
    let content = content_file(folder.path(), args.memory)?;
    let mut rows = Vec::new();
    let mut whole = true;
    for scenario in SCENARIOS {
        if args.scenario.as_ref().is_some_and(|only| only != scenario.name) {
            continue;
        }
        whole &= measure(args, &contenders, scenario, &folder, &content, &mut rows);
    }
    println!("{}", table(&rows, "QEMU"));
    let mut about = about(args);
    for (package, example, arguments) in
        [("whimbrel-ram", "zero_scan", &["1024"][..]), ("whimbrel-wire", "rates", &[])]
    {
        match rates::of_example(workspace, package, example, arguments) {
            Ok(value) => {
                println!("{example}: {value}");
                about.insert(example.to_owned(), value);
            }
            Err(error) => {
                println!("not measured: {error:#}");
                whole = false;
            }
        }
    }
    println!(
        "kept in {}",
        keep(workspace, "precopy", about, rows.iter().map(Row::json).collect())?.display()
    );
    Ok(whole)
}

/// One scenario: every contender in turn, and over again.
fn measure(
    args: &Args,
    contenders: &[Contender],
    scenario: Scenario,
    folder: &Scratch,
    content: &Path,
    rows: &mut Vec<Row>,
) -> bool {
    type Measurement<'a> = (String, Box<dyn Fn() -> Result<Sample> + 'a>);
    let mut measurements: Vec<Measurement<'_>> = Vec::new();
    for contender in contenders {
        let sample = move || contender.sample(scenario, args.memory, folder.path(), content);
        measurements.push((contender.name(), Box::new(sample)));
    }
    // A plain transfer knows no zero pages, and its memory is its own.
    let transfer = Transfer { memory: args.memory, connections: 1, zero_copy: false };
    if scenario.preallocated && !args.leaves_out("plain") {
        measurements.push((
            "plain send and receive".to_owned(),
            Box::new(move || plain::sample(transfer, Way::Loopback)),
        ));
    }
    let mut ours: Vec<Row> = measurements
        .iter()
        .map(|(name, _)| Row {
            scenario: scenario.name.to_owned(),
            contender: name.clone(),
            samples: Vec::new(),
        })
        .collect();
    let mut whole = true;
    for run in 1..=args.runs {
        let mut order: Vec<_> = measurements.iter().zip(&mut ours).collect();
        // A B, then B A: who comes second finds the memory that the first has just freed.
        if run.is_multiple_of(2) {
            order.reverse();
        }
        for ((name, sample), row) in order {
            if scenario.incompressible && !scenario.preallocated {
                // For a source that fills its memory, a destination, and what a kernel keeps back.
                if let Err(error) = host_memory::take(args.memory.bytes() * 6) {
                    println!("memory is as it comes: {error:#}");
                }
            }
            match sample() {
                Ok(sample) => {
                    eprintln!(
                        "{} {run}/{}: {name}: {:.2} GB/s",
                        scenario.name, args.runs, sample.gigabytes_per_second
                    );
                    row.samples.push(sample);
                }
                Err(error) => {
                    println!("{} {run}/{}: {name}: FAILED: {error:#}", scenario.name, args.runs);
                    whole = false;
                }
            }
        }
    }
    rows.append(&mut ours);
    whole
}

impl Args {
    fn leaves_out(&self, who: &str) -> bool {
        self.without.iter().any(|without| without == who)
    }
}

fn contenders(workspace: &Workspace, args: &Args) -> Result<Vec<Contender>> {
    let mut contenders = Vec::new();
    if !args.leaves_out("whimbrel") {
        contenders.push(Contender::Whimbrel { binary: whimbrel(workspace)? });
    }
    if !args.leaves_out("qemu") {
        let qemu = Qemu::find(workspace, args.qemu.as_deref())?;
        let version = qemu.version()?;
        contenders.push(Contender::Qemu { qemu, version });
    }
    Ok(contenders)
}

/// What the numbers mean nothing without.
fn about(args: &Args) -> Map<String, Value> {
    let mut about = machine();
    about.insert("memory-bytes".to_owned(), json!(args.memory.bytes()));
    about.insert("runs".to_owned(), json!(args.runs));
    about
}
