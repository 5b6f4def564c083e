//! `cargo xtask bench colo`: two VMs in step. For how long the guest stands still for a checkpoint, ours
//! and QEMU's in turn, by the stamps of the primary's STOP and RESUME.

use std::path::PathBuf;

use anyhow::Result;
use serde_json::{Value, json};

use self::figures::{Row, line, table};
use self::pair::{Contender, Setup, too_old};
use self::scenario::Scenario;
use super::contender::{Memory, Qemu, whimbrel};
use super::host_memory;
use super::janitor::{Janitor, Trace};
use super::network::{Between, Network, Way};
use super::sample::{keep, machine};
use super::scratch::Scratch;
use crate::workspace::Workspace;

mod figures;
mod pair;
mod scenario;

/// What both hosts' TCP is set to, as in the other benches.
const CONGESTION: &str = "cubic";

/// What to measure: 512 MiB at 20 and 100 MiB/s and an idle GiB, over loopback, if nothing else is
/// said.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The full matrix: 1 and 4 GiB, 0 to 400 MiB/s, loopback and 10 Gbit/s, 0, 2 and 4 channels
    #[arg(long)]
    all: bool,
    /// The guest's memory, where the matrix is not the one above
    #[arg(long, value_delimiter = ',', value_parser = Memory::parse)]
    memory: Vec<Memory>,
    /// What the guest dirties, in MiB/s, a page of 4 KiB at a time (0: nothing)
    #[arg(long, value_delimiter = ',', value_name = "MIB")]
    dirty: Vec<u32>,
    /// How many multifd channels (0: without multifd)
    #[arg(long, value_delimiter = ',')]
    channels: Vec<u8>,
    /// 'loopback', or a link between two network namespaces in Gbit/s (needs root)
    #[arg(long, value_delimiter = ',', value_parser = Between::parse)]
    link: Vec<Between>,
    /// The time between two checkpoints, in ms
    #[arg(long, default_value_t = 600, value_name = "MS")]
    delay: u32,
    /// How long each pair is measured
    #[arg(long, default_value_t = 20, value_name = "S")]
    seconds: u32,
    /// How many times each contender runs in each scenario
    #[arg(long, default_value_t = 1)]
    runs: u32,
    /// Measure against a pair of this QEMU, of 11.1 or later
    #[arg(long, value_name = "PATH")]
    qemu: Option<PathBuf>,
    /// Measure this whimbrel as well, such as a build of another state of the tree
    #[arg(long, value_name = "PATH")]
    other: Option<PathBuf>,
}

/// Measures, prints the table, keeps everything. Says whether every run succeeded.
pub(crate) fn run(workspace: &Workspace, args: &Args) -> Result<bool> {
    let contenders = contenders(workspace, args)?;
    // Dropped last, when nothing is in use any more.
    let mut janitor = Janitor::start()?;
    let folder = Scratch::new()?;
    janitor.will_make(&Trace::Folder(folder.path().to_owned()))?;
    let setup =
        Setup { delay_ms: args.delay, seconds: args.seconds, folder: folder.path().to_owned() };
    let (mut rows, mut whole) = (Vec::new(), true);
    for between in args.links() {
        let network = match between {
            Between::Loopback => None,
            Between::Link(link) => {
                janitor.allow_congestion(CONGESTION)?;
                let name = link.mbit_per_s.to_string();
                Some(Network::build(&mut janitor, &name, link, CONGESTION)?)
            }
        };
        let way = network.as_ref().map_or(Way::Loopback, Way::Link);
        for scenario in args.scenarios(between) {
            whole &= measure(args, &contenders, (scenario, &setup, way), &mut rows);
        }
    }
    println!("{}", table(&rows));
    let mut about = machine();
    about.extend([
        ("runs-each".to_owned(), json!(args.runs)),
        ("seconds".to_owned(), json!(args.seconds)),
        ("checkpoint-delay-ms".to_owned(), json!(args.delay)),
        ("congestion".to_owned(), json!(CONGESTION)),
    ]);
    let rows: Vec<Value> = rows.iter().map(Row::json).collect();
    println!("kept in {}", keep(workspace, "colo", about, rows)?.display());
    Ok(whole)
}

/// One scenario: every contender in turn, and over again.
fn measure(
    args: &Args,
    contenders: &[(String, Contender)],
    (scenario, setup, way): (Scenario, &Setup, Way<'_>),
    rows: &mut Vec<Row>,
) -> bool {
    let row = |(name, _): &(String, Contender)| Row {
        scenario,
        contender: name.clone(),
        runs: Vec::new(),
    };
    let mut ours: Vec<Row> = contenders.iter().map(row).collect();
    let mut whole = true;
    for run in 1..=args.runs {
        let mut order: Vec<_> = contenders.iter().zip(&mut ours).collect();
        // A B, then B A: who comes second finds the machine as the first has left it.
        if run.is_multiple_of(2) {
            order.reverse();
        }
        for ((name, contender), row) in order {
            // Two guests and a cache.
            if let Err(error) = host_memory::take_what_there_is(scenario.memory.bytes() * 3) {
                println!("memory is as it comes: {error:#}");
            }
            let head = format!("{scenario} {run}/{}: {name}", args.runs);
            match contender.run(scenario, setup, way) {
                Ok(figures) => {
                    eprintln!("{head}: {}", line(&figures));
                    row.runs.push(figures);
                }
                Err(error) => {
                    println!("{head}: FAILED: {error:#}");
                    whole = false;
                }
            }
        }
    }
    rows.append(&mut ours);
    whole
}

/// Those that can; of those that cannot it is said.
fn contenders(workspace: &Workspace, args: &Args) -> Result<Vec<(String, Contender)>> {
    let ours = Contender::Whimbrel { binary: whimbrel(workspace)? };
    let mut contenders = vec![(ours.name(), ours)];
    if let Some(path) = &args.other {
        let binary = path.canonicalize()?;
        contenders.push(("whimbrel, the other".to_owned(), Contender::Whimbrel { binary }));
    }
    let Some(path) = &args.qemu else {
        println!("skipped: QEMU's own pair: name one of 11.1 or later with --qemu PATH");
        return Ok(contenders);
    };
    let qemu = Qemu::find(workspace, Some(path))?;
    let version = qemu.version()?;
    match too_old(&version) {
        Some(why) => println!("skipped: QEMU {version}: {why}"),
        None => {
            let contender = Contender::Qemu { qemu, version };
            contenders.push((contender.name(), contender));
        }
    }
    Ok(contenders)
}

impl Args {
    fn links(&self) -> Vec<Between> {
        match (self.link.is_empty(), self.all) {
            (false, _) => self.link.clone(),
            (true, false) => vec![Between::Loopback],
            (true, true) => {
                ["loopback", "10"].iter().filter_map(|link| Between::parse(link).ok()).collect()
            }
        }
    }

    fn scenarios(&self, between: Between) -> Vec<Scenario> {
        let memory = |text: &str| Memory::parse(text).expect("a size");
        let plain = self.memory.is_empty() && self.dirty.is_empty() && !self.all;
        let guests: Vec<(Memory, u32)> = if plain {
            vec![(memory("512M"), 20), (memory("512M"), 100), (memory("1G"), 0)]
        } else {
            let sizes = match (self.memory.is_empty(), self.all) {
                (false, _) => self.memory.clone(),
                (true, true) => vec![memory("1G"), memory("4G")],
                (true, false) => vec![memory("512M")],
            };
            let rates = match self.dirty.is_empty() {
                false => self.dirty.clone(),
                true => vec![0, 50, 100, 200, 400],
            };
            sizes.iter().flat_map(|size| rates.iter().map(|rate| (*size, *rate))).collect()
        };
        let channels = match (self.channels.is_empty(), self.all) {
            (false, _) => self.channels.clone(),
            (true, true) => vec![0, 2, 4],
            (true, false) => vec![0, 2],
        };
        let mut scenarios = Vec::new();
        for (memory, dirty_mib_per_s) in guests {
            for &channels in &channels {
                scenarios.push(Scenario { between, memory, dirty_mib_per_s, channels });
            }
        }
        scenarios
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;

    use super::*;

    #[derive(clap::Parser)]
    struct Line {
        #[command(flatten)]
        args: Args,
    }

    fn scenarios(options: &[&str]) -> Vec<String> {
        let line = ["bench"].iter().chain(options);
        let args = Line::parse_from(line).args;
        let all = |between| args.scenarios(between);
        args.links().into_iter().flat_map(all).map(|one| one.to_string()).collect()
    }

    #[test]
    fn what_is_not_said_is_the_small_matrix() {
        let small = scenarios(&[]);
        assert_eq!(small.len(), 6);
        assert_eq!(small[0], "loopback, 512M, 20 MiB/s, no multifd");
        assert_eq!(small[5], "loopback, 1024M, idle, multifd 2");
        assert_eq!(scenarios(&["--all"]).len(), 2 * 2 * 5 * 3);
        let one = scenarios(&["--all", "--memory=2G", "--dirty=7", "--channels=1", "--link=1"]);
        assert_eq!(one, ["1 Gbit/s, 2048M, 7 MiB/s, multifd 1"]);
    }
}
