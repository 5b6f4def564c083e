//! `cargo xtask bench recovery`: links that break in postcopy. What is sent again because of it, and how
//! soon after the link's return the guest gets the page that it waits for.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context as _, Result};
use clap::ValueEnum;
use serde_json::{Value, json};

use self::back::{Contender, Stage};
use self::cable::Fault;
use self::cuts::Migration;
use self::figures::{Cuts, Kind, Row, cuts_table, returns_table};
use super::contender::{Memory, Qemu, whimbrel};
use super::host_memory;
use super::janitor::{Janitor, Trace};
use super::network::{Link, Network};
use super::postcopy::guest::QemuGuest;
use super::postcopy::idle;
use super::postcopy::writer::Writer;
use super::sample::{keep, machine};
use super::scratch::Scratch;
use crate::workspace::Workspace;

mod back;
mod cable;
mod cuts;
mod figures;
mod queues;
mod vm;

const CONGESTION: &str = "cubic";
/// What the guests write to that wait for pages: most of their memory was never touched, so that two
/// of 8 GiB fit into one machine. A bitmap is as long whatever is in the pages.
const WORKING_SET: &str = "512M";
/// A QEMU guest of so much memory writes to as much, wherever the rest of it lies.
const WRITER_MIB: u32 = 1024;

/// What to measure.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Many cuts in one migration; the link's return
    #[arg(long, default_value = "cuts,return", value_delimiter = ',')]
    parts: Vec<Part>,
    /// How often the link fails in one migration
    #[arg(long, default_value_t = 100)]
    cuts: u32,
    /// How it fails, a migration each
    #[arg(long, default_value = "reset,silent", value_delimiter = ',')]
    failures: Vec<Kind>,
    /// The memory of the guest whose link fails so often, all of it incompressible
    #[arg(long, default_value = "512M", value_parser = Memory::parse)]
    cut_memory: Memory,
    /// Its link, in Gbit/s: slow, so that the migration lasts and the link is full when it is cut
    #[arg(long, default_value = "0.1", value_parser = Link::parse)]
    cut_link: Link,
    /// The memory of the guest that waits for the link's return
    #[arg(long, default_value = "8G", value_parser = Memory::parse)]
    memory: Memory,
    /// Its link, in Gbit/s
    #[arg(long, default_value = "1", value_parser = Link::parse)]
    link: Link,
    /// How long the link is away, in seconds
    #[arg(long, default_value = "1,5", value_delimiter = ',')]
    away: Vec<u64>,
    /// What fails for so long, a migration each
    #[arg(long, default_value = "middle,cable", value_delimiter = ',')]
    faults: Vec<Fault>,
    /// How often in one migration, each of these
    #[arg(long, default_value_t = 5)]
    returns: usize,
    /// How many migrations of each contender
    #[arg(long, default_value_t = 3)]
    runs: u32,
    /// When a whimbrel takes a silent link for broken, in ms
    #[arg(long, default_value_t = 400)]
    silence_limit: u64,
    /// Whose returns: whimbrel to whimbrel, QEMU to QEMU
    #[arg(long, default_value = "ww,qq", value_delimiter = ',')]
    pairs: Vec<Who>,
    /// Measure against this QEMU, instead of the newest one fetched
    #[arg(long, value_name = "PATH")]
    qemu: Option<PathBuf>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Part {
    Cuts,
    Return,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Who {
    Ww,
    Qq,
}

/// Measures, prints the tables, keeps everything. Says whether every run succeeded, and reached what is
/// asked of it.
pub(crate) fn run(workspace: &Workspace, args: &Args) -> Result<bool> {
    // Dropped last, when nothing is in use any more.
    let mut janitor = Janitor::start()?;
    let folder = Scratch::new()?;
    janitor.will_make(&Trace::Folder(folder.path().to_owned()))?;
    janitor.allow_congestion(CONGESTION)?;
    let bench = Bench { args, binary: whimbrel(workspace)?, folder };
    let mut about = machine();
    about.insert("congestion".to_owned(), json!(CONGESTION));
    about.insert("silence-limit-ms".to_owned(), json!(args.silence_limit));
    let mut rows: Vec<Value> = Vec::new();
    let mut whole = true;
    if args.parts.contains(&Part::Cuts) {
        let network = Network::build(&mut janitor, "cuts", args.cut_link, CONGESTION)?;
        about.insert("cut-memory-bytes".to_owned(), json!(args.cut_memory.bytes()));
        about.insert("cut-link-mbit-per-s".to_owned(), json!(args.cut_link.mbit_per_s));
        let (all, ran) = bench.cuts(&network);
        println!("{}", cuts_table(&all));
        whole &= ran && all.iter().all(Cuts::is_reached);
        rows.extend(all.iter().map(Cuts::json));
    }
    if args.parts.contains(&Part::Return) {
        let network = Network::build(&mut janitor, "return", args.link, CONGESTION)?;
        let round_trip = idle::round_trip(&network)?;
        let round_trip_ms = round_trip["median-us"].as_f64().context("no round trip")? / 1e3;
        about.insert("memory-bytes".to_owned(), json!(args.memory.bytes()));
        about.insert("link-mbit-per-s".to_owned(), json!(args.link.mbit_per_s));
        about.insert("idle-round-trip".to_owned(), round_trip);
        let (all, ran) = bench.returns(workspace, &network)?;
        println!("{}", returns_table(&all, round_trip_ms));
        println!("idle round trip: {round_trip_ms:.3} ms");
        whole &= ran && all.iter().all(|row| row.is_reached(round_trip_ms));
        rows.extend(all.iter().map(|row| row.json(round_trip_ms)));
    }
    println!("kept in {}", keep(workspace, "recovery", about, rows)?.display());
    Ok(whole)
}

struct Bench<'a> {
    args: &'a Args,
    binary: PathBuf,
    folder: Scratch,
}

impl Bench<'_> {
    /// A migration for each kind of failure; and whether all of them ended well.
    fn cuts(&self, network: &Network) -> (Vec<Cuts>, bool) {
        let Args { failures, cuts, cut_memory, silence_limit, .. } = self.args;
        let migration = Migration {
            binary: &self.binary,
            folder: self.folder.path(),
            network,
            memory: *cut_memory,
            cuts: *cuts,
            silence_ms: *silence_limit,
        };
        let (mut all, mut whole) = (Vec::new(), true);
        for kind in failures {
            match migration.run(*kind) {
                Ok(figures) => all.push(figures),
                Err(error) => {
                    println!("{kind}: FAILED: {error:#}");
                    whole = false;
                }
            }
        }
        (all, whole)
    }

    /// Every contender in turn, and over again.
    fn returns(&self, workspace: &Workspace, network: &Network) -> Result<(Vec<Row>, bool)> {
        let Args { memory, silence_limit, away, faults, returns, runs, pairs, qemu, .. } =
            self.args;
        let qemu = match pairs.contains(&Who::Qq) {
            true => Some(Qemu::find(workspace, qemu.as_deref())?),
            false => None,
        };
        let version = qemu.as_ref().map(Qemu::version).transpose()?.unwrap_or_default();
        let writer = Writer::in_memory(WRITER_MIB).context("too little for a writer")?;
        let folder = self.folder.path();
        let guest = qemu.map(|qemu| QemuGuest::new(qemu, *memory, writer, folder)).transpose()?;
        let stage = Stage { folder, network, memory: *memory, silence_ms: *silence_limit };
        let ours = Contender::Whimbrel { binary: &self.binary, working_set: WORKING_SET };
        let mut contenders = Vec::new();
        for who in pairs {
            contenders.push(match (who, &guest) {
                (Who::Qq, Some(guest)) => (format!("QEMU {version}"), Contender::Qemu { guest }),
                (Who::Qq, None) => anyhow::bail!("this run has no QEMU"),
                (Who::Ww, _) => ("whimbrel".to_owned(), ours.clone()),
            });
        }
        let mut rows: Vec<Row> = Vec::new();
        for (fault, outage_s) in
            faults.iter().flat_map(|fault| away.iter().map(move |seconds| (fault, seconds)))
        {
            rows.extend(contenders.iter().map(|(name, contender)| Row {
                contender: name.clone(),
                is_ours: matches!(contender, Contender::Whimbrel { .. }),
                fault: *fault,
                outage_s: Duration::from_secs(*outage_s).as_secs_f64(),
                returns: Vec::new(),
            }));
        }
        let outages: Vec<Duration> =
            away.iter().map(|seconds| Duration::from_secs(*seconds)).collect();
        let outages = outages.repeat(*returns);
        let mut whole = true;
        for run in 1..=*runs {
            let mut order: Vec<_> = faults
                .iter()
                .flat_map(|fault| contenders.iter().map(move |contender| (*fault, contender)))
                .collect();
            // A B, then B A: who comes second finds the machine as the first has left it.
            if run.is_multiple_of(2) {
                order.reverse();
            }
            for (fault, (name, contender)) in order {
                host_memory::take_what_there_is(memory.bytes() / 4)?;
                match stage.run(contender, fault, &outages) {
                    Ok(found) => {
                        for back in found {
                            eprintln!("{run}/{runs}: {fault}, {name}: {}", figures::line(&back));
                            let row = rows.iter_mut().find(|row| {
                                row.contender == *name
                                    && row.fault == fault
                                    && row.outage_s == back.outage_s
                            });
                            row.context("an outage of no row")?.returns.push(back);
                        }
                    }
                    Err(error) => {
                        println!("{run}/{runs}: {fault}, {name}: FAILED: {error:#}");
                        whole = false;
                    }
                }
            }
        }
        Ok((rows, whole))
    }
}
