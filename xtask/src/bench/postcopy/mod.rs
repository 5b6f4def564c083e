//! `cargo xtask bench postcopy`: a guest that writes at random, moved by postcopy over slow links
//! with a queue behind the sender, by every pair of contenders in turn.

use std::cell::RefCell;
use std::collections::HashMap;
use std::path::PathBuf;

use anyhow::{Context as _, Result, ensure};
use clap::ValueEnum;
use serde_json::{Map, Value, json};

use self::figures::{Row, line, table};
use self::guest::QemuGuest;
use self::pair::{Mode, Pages, Pair, Scenario};
use self::stage::Stage;
use self::writer::Writer;
use super::contender::{Memory, Qemu, whimbrel};
use super::host_memory;
use super::janitor::{Janitor, Trace};
use super::network::{Link, Network};
use super::sample::{keep, machine};
use super::scratch::Scratch;
use crate::workspace::Workspace;

mod clock;
mod figures;
pub(super) mod guest;
mod helper;
pub(crate) mod idle;
pub(super) mod pair;
mod stage;
pub(super) mod writer;

/// What to measure.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The links, in Gbit/s
    #[arg(long, default_value = "1,2.5,10", value_delimiter = ',', value_parser = Link::parse)]
    link: Vec<Link>,
    /// The host pages behind the guest's memory
    #[arg(long, default_value = "4k,2M", value_delimiter = ',')]
    pages: Vec<Pages>,
    /// One channel; or one for urgent pages beside it; or multifd beside both
    #[arg(long, default_value = "plain,preempt", value_delimiter = ',')]
    modes: Vec<Mode>,
    /// From whom to whom
    #[arg(long, default_value = "qq,ww,wq,qw", value_delimiter = ',')]
    pairs: Vec<Pair>,
    /// How many times each pair runs in each scenario
    #[arg(long, default_value_t = 3)]
    runs: u32,
    /// The guest's memory, of which it writes to all but 512 MiB
    #[arg(long, default_value = "2G", value_parser = Memory::parse)]
    memory: Memory,
    /// Measure against this QEMU, instead of the newest one fetched
    #[arg(long, value_name = "PATH")]
    qemu: Option<PathBuf>,
    /// What both hosts' TCP is set to
    #[arg(long, default_value = "cubic")]
    congestion: Congestion,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Congestion {
    Cubic,
    Bbr,
}

impl Congestion {
    fn name(self) -> &'static str {
        match self {
            Self::Cubic => "cubic",
            Self::Bbr => "bbr",
        }
    }
}

/// Measures, prints the table, keeps everything. Says whether every run succeeded.
pub(crate) fn run(workspace: &Workspace, args: &Args) -> Result<bool> {
    let writer = Writer::in_memory(u32::try_from(args.memory.bytes() >> 20)?)
        .context("--memory must be above 512M and at most 2G: the guest lies below its devices")?;
    // Dropped last, when nothing is in use any more.
    let mut janitor = Janitor::start()?;
    let folder = Scratch::new()?;
    janitor.will_make(&Trace::Folder(folder.path().to_owned()))?;
    let qemu = match args.pairs.iter().any(|pair| *pair != Pair::Ww) {
        true => Some(Qemu::find(workspace, args.qemu.as_deref())?),
        false => None,
    };
    let version = qemu.as_ref().map(Qemu::version).transpose()?.unwrap_or_default();
    let whimbrel = match args.pairs.iter().any(|pair| pair.has_whimbrel()) {
        true => Some(whimbrel(workspace)?),
        false => None,
    };
    janitor.allow_congestion(args.congestion.name())?;
    let qemu =
        qemu.map(|qemu| QemuGuest::new(qemu, args.memory, writer, folder.path())).transpose()?;
    let stage = Stage {
        qemu,
        whimbrel,
        memory: args.memory,
        writer,
        folder: folder.path(),
        kept: RefCell::new(HashMap::new()),
    };
    let pairs = able(&stage, &args.pairs, &version)?;
    let mut rows = Vec::new();
    let mut idle = Map::new();
    let mut whole = pairs.len() == args.pairs.len();
    for link in &args.link {
        let name = link.mbit_per_s.to_string();
        let congestion = args.congestion.name();
        let network = Network::build(&mut janitor, &name, *link, congestion)?;
        let round_trip = idle::round_trip(&network)?;
        eprintln!("{link}: idle round trip {} us", round_trip["median-us"]);
        idle.insert(link.to_string(), round_trip);
        for (pages, mode) in both(&args.pages, &args.modes) {
            let scenario = Scenario { link: *link, pages, mode };
            whole &=
                measure(&stage, &pairs, scenario, args.runs, (&network, &mut janitor), &mut rows);
        }
    }
    println!("{}", table(&rows));
    for (link, round_trip) in &idle {
        println!("idle round trip at {link}: {round_trip}");
    }
    let mut about = machine();
    about.extend([
        ("memory-bytes".to_owned(), json!(args.memory.bytes())),
        ("working-set-mib".to_owned(), json!(writer.working_set_mib())),
        ("runs-each".to_owned(), json!(args.runs)),
        ("congestion".to_owned(), json!(args.congestion.name())),
        ("idle-round-trip".to_owned(), Value::Object(idle)),
    ]);
    let rows = rows.iter().map(Row::json).collect();
    println!("kept in {}", keep(workspace, "postcopy", about, rows)?.display());
    Ok(whole)
}

/// The pairs that can run, with their names.
fn able(stage: &Stage<'_>, pairs: &[Pair], version: &str) -> Result<Vec<(Pair, String)>> {
    let mut able = Vec::new();
    for pair in pairs {
        let name = pair.name(version);
        match stage.obstacle(*pair)? {
            Some(why) => println!("skipped: {name}: {why}"),
            None => able.push((*pair, name)),
        }
    }
    ensure!(!able.is_empty(), "no pair of contenders can run");
    Ok(able)
}

fn both(pages: &[Pages], modes: &[Mode]) -> Vec<(Pages, Mode)> {
    pages.iter().flat_map(|pages| modes.iter().map(|mode| (*pages, *mode))).collect()
}

/// One scenario: every pair in turn, and over again.
fn measure(
    stage: &Stage<'_>,
    pairs: &[(Pair, String)],
    scenario: Scenario,
    runs: u32,
    (network, janitor): (&Network, &mut Janitor),
    rows: &mut Vec<Row>,
) -> bool {
    let pairs: Vec<_> = pairs.iter().filter(|(pair, _)| scenario.mode.is_for(*pair)).collect();
    let mut ours: Vec<Row> = pairs
        .iter()
        .map(|(pair, name)| Row {
            scenario: scenario.to_string(),
            contender: name.clone(),
            is_baseline: *pair == Pair::Qq,
            runs: Vec::new(),
        })
        .collect();
    let mut whole = true;
    for run in 1..=runs {
        let mut order: Vec<_> = pairs.iter().zip(&mut ours).collect();
        // A B, then B A: who comes second finds the machine as the first has left it.
        if run.is_multiple_of(2) {
            order.reverse();
        }
        for ((pair, name), row) in order {
            if let Err(error) = make_room(stage, scenario.pages, janitor) {
                println!("memory is as it comes: {error:#}");
            }
            match stage.run(*pair, scenario, network) {
                Ok(figures) => {
                    eprintln!("{scenario} {run}/{runs}: {name}: {}", line(&figures));
                    row.runs.push(figures);
                }
                Err(error) => {
                    println!("{scenario} {run}/{runs}: {name}: FAILED: {error:#}");
                    whole = false;
                }
            }
        }
    }
    rows.append(&mut ours);
    whole
}

/// Memory for both sides, and none of it a run's to fetch from the host below.
fn make_room(stage: &Stage<'_>, pages: Pages, janitor: &mut Janitor) -> Result<()> {
    let both_sides = stage.memory.bytes() * 2;
    if pages == Pages::Huge && janitor.keep_huge_pages(u32::try_from(both_sides >> 21)?)? {
        host_memory::take_huge(both_sides)?;
    }
    // Huge folios for the one and single pages for the other, as a VMM and a postcopy take them.
    host_memory::take(both_sides)
}
