//! `cargo xtask bench multifd`: RAM over several channels, compressed or not, encrypted or not, ours
//! and QEMU's in turn, and the physical limit beside them.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};

use self::content::Content;
use self::engine::{Engine, Setup};
use self::figures::{Figures, Row, Who, line, table};
use self::scenario::{Compression, Guest, Method, Room, Scenario, Tls};
use super::contender::{Memory, Qemu, whimbrel};
use super::host_memory;
use super::janitor::{Janitor, Trace};
use super::network::{Between, DESTINATION_ADDRESS, Network, Way};
use super::plain::{self, Transfer};
use super::sample::{keep, machine};
use super::scratch::Scratch;
use crate::workspace::Workspace;

mod content;
mod engine;
mod figures;
mod memory_copy;
mod moving;
mod scenario;
pub(in crate::bench) mod ticker;

/// What both hosts' TCP is set to, as in the other benches.
const CONGESTION: &str = "cubic";

/// What to measure. Every option that takes several values is a dimension: less of it takes less
/// time.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// How many channels (0: without multifd)
    #[arg(long, default_value = "1,2,4,8", value_delimiter = ',')]
    channels: Vec<u8>,
    /// How they compress
    #[arg(long, default_value = "none,zlib,zstd,auto", value_delimiter = ',')]
    compression: Vec<Compression>,
    /// Whether they are encrypted
    #[arg(long, default_value = "off,on", value_delimiter = ',')]
    tls: Vec<Tls>,
    /// 'loopback', or a link between two network namespaces in Gbit/s (needs root)
    #[arg(long, default_value = "loopback,10", value_delimiter = ',', value_parser = Between::parse)]
    link: Vec<Between>,
    /// What the guest does
    #[arg(long, default_value = "idle,dirtying", value_delimiter = ',')]
    guest: Vec<Guest>,
    /// What the guest's memory holds
    #[arg(long, default_value = "random,mixed", value_delimiter = ',')]
    content: Vec<Content>,
    /// The destination's memory before anything arrives
    #[arg(long, default_value = "preallocated", value_delimiter = ',')]
    room: Vec<Room>,
    /// The guest's memory
    #[arg(long, default_value = "4G", value_parser = Memory::parse)]
    memory: Memory,
    /// How many times each contender runs in each scenario
    #[arg(long, default_value_t = 3)]
    runs: u32,
    /// How many pages a second a dirtying guest writes to
    #[arg(long, default_value_t = 20_000, value_name = "PAGES")]
    dirty_rate: u32,
    #[arg(long, default_value_t = 1)]
    zlib_level: u8,
    #[arg(long, default_value_t = 1)]
    zstd_level: u8,
    /// Switch on zero-copy-send, where it is neither compressed nor encrypted
    #[arg(long)]
    zero_copy: bool,
    /// Certificates of both sides, laid out as QEMU's, instead of some that 'whimbrel tls' makes
    #[arg(long, value_name = "FOLDER")]
    credentials: Option<PathBuf>,
    /// Measure against this QEMU, instead of the newest one fetched
    #[arg(long, value_name = "PATH")]
    qemu: Option<PathBuf>,
    /// Leave a contender out (may be given more than once)
    #[arg(long, value_name = "WHO", value_parser = ["whimbrel", "qemu", "plain"])]
    without: Vec<String>,
}

/// Somebody who moves the memory, in one scenario.
enum Contestant {
    Engine(Engine, Method),
    Plain(Transfer),
}

/// Measures, prints the table, keeps everything. Says whether every run succeeded.
pub(crate) fn run(workspace: &Workspace, args: &Args) -> Result<bool> {
    let engines = engines(workspace, args)?;
    // Dropped last, when nothing is in use any more.
    let mut janitor = Janitor::start()?;
    let folder = Scratch::new()?;
    janitor.will_make(&Trace::Folder(folder.path().to_owned()))?;
    let setup = Setup {
        memory: args.memory,
        dirty_rate: args.dirty_rate,
        zlib_level: args.zlib_level,
        zstd_level: args.zstd_level,
        zero_copy: args.zero_copy,
        credentials: credentials(workspace, args, folder.path())?,
        folder: folder.path().to_owned(),
    };
    let mut bench = Bench { args, engines, setup, rows: Vec::new(), whole: true };
    for between in &args.link {
        let network = match between {
            Between::Loopback => None,
            Between::Link(link) => {
                janitor.allow_congestion(CONGESTION)?;
                let name = link.mbit_per_s.to_string();
                Some(Network::build(&mut janitor, &name, *link, CONGESTION)?)
            }
        };
        let way = network.as_ref().map_or(Way::Loopback, Way::Link);
        for content in &args.content {
            let file = content.write(folder.path(), args.memory)?;
            for scenario in args.scenarios(*between, *content) {
                bench.measure(scenario, (&file, way));
            }
            std::fs::remove_file(file)?;
        }
    }
    let Bench { rows, whole, .. } = bench;
    println!("{}", table(&rows));
    let copies = memory_copy::rates(&args.channels)?;
    println!("memory to memory, GB/s by threads: {copies}");
    let mut about = machine();
    about.extend([
        ("memory-bytes".to_owned(), json!(args.memory.bytes())),
        ("runs-each".to_owned(), json!(args.runs)),
        ("dirty-pages-per-s".to_owned(), json!(args.dirty_rate)),
        ("zlib-level".to_owned(), json!(args.zlib_level)),
        ("zstd-level".to_owned(), json!(args.zstd_level)),
        ("zero-copy-send".to_owned(), json!(args.zero_copy)),
        ("memory-copy-gb-per-s".to_owned(), copies),
    ]);
    let rows: Vec<Value> = rows.iter().map(|row| row.json(&rows)).collect();
    println!("kept in {}", keep(workspace, "multifd", about, rows)?.display());
    Ok(whole)
}

struct Bench<'a> {
    args: &'a Args,
    engines: Vec<Engine>,
    setup: Setup,
    rows: Vec<Row>,
    /// Every run succeeded so far.
    whole: bool,
}

impl Bench<'_> {
    /// One scenario: every contestant in turn, and over again.
    fn measure(&mut self, scenario: Scenario, (content, way): (&Path, Way<'_>)) {
        let mut ours: Vec<(Contestant, Row)> = self
            .contestants(scenario)
            .into_iter()
            .map(|contestant| {
                let row = contestant.row(scenario);
                (contestant, row)
            })
            .collect();
        for run in 1..=self.args.runs {
            let mut order: Vec<_> = ours.iter_mut().collect();
            // A B, then B A: who comes second finds the machine as the first has left it.
            if run.is_multiple_of(2) {
                order.reverse();
            }
            for (contestant, row) in order {
                if scenario.room == Room::Untouched
                    && let Err(error) =
                        host_memory::take_what_there_is(self.args.memory.bytes() * 6)
                {
                    println!("memory is as it comes: {error:#}");
                }
                let measured = match contestant {
                    Contestant::Engine(engine, method) => {
                        moving::run(engine, (scenario, *method), &self.setup, (content, way))
                    }
                    Contestant::Plain(transfer) => plain::sample(*transfer, way)
                        .map(|sample| Figures::of_plain(sample, transfer.memory.gigabytes())),
                };
                let Row { method, contender, .. } = row;
                let head = format!("{scenario} {run}/{}: {method}: {contender}", self.args.runs);
                match measured {
                    Ok(figures) => {
                        eprintln!("{head}: {}", line(&figures));
                        row.runs.push(figures);
                    }
                    Err(error) => {
                        println!("{head}: FAILED: {error:#}");
                        self.whole = false;
                    }
                }
            }
        }
        self.rows.extend(ours.into_iter().map(|(_, row)| row));
    }

    /// Those that can do it; of those that cannot it is said.
    fn contestants(&mut self, scenario: Scenario) -> Vec<Contestant> {
        let mut contestants = Vec::new();
        for method in self.args.methods(scenario) {
            for engine in &self.engines {
                if engine.is_qemu() && method.compression == Compression::Auto {
                    continue; // Not something that it could ever have.
                }
                match engine.obstacle(scenario, method, &self.setup) {
                    None => contestants.push(Contestant::Engine(engine.clone(), method)),
                    Some(why) => {
                        println!("skipped: {scenario}, {method}: {}: {why}", engine.name());
                        self.whole = false;
                    }
                }
            }
        }
        if !self.args.leaves_out("plain") {
            contestants.push(Contestant::Plain(Transfer {
                memory: self.args.memory,
                connections: u32::from(scenario.channels.max(1)),
                zero_copy: false,
            }));
        }
        contestants
    }
}

impl Contestant {
    fn row(&self, scenario: Scenario) -> Row {
        let (method, who, contender) = match self {
            Self::Engine(engine, method) => {
                let who = if engine.is_qemu() { Who::Peer } else { Who::Ours };
                (*method, who, engine.name())
            }
            Self::Plain(_) => (Method::PLAIN, Who::Plain, "plain send and receive".to_owned()),
        };
        Row { scenario, method, who, contender, runs: Vec::new() }
    }
}

impl Args {
    fn leaves_out(&self, who: &str) -> bool {
        self.without.iter().any(|without| without == who)
    }

    fn scenarios(&self, between: Between, content: Content) -> Vec<Scenario> {
        let mut scenarios = Vec::new();
        for &room in &self.room {
            for &guest in &self.guest {
                for &channels in &self.channels {
                    scenarios.push(Scenario { between, content, guest, room, channels });
                }
            }
        }
        scenarios
    }

    fn methods(&self, scenario: Scenario) -> Vec<Method> {
        let mut methods = Vec::new();
        for &tls in &self.tls {
            for &compression in &self.compression {
                // The main channel alone does not compress.
                if scenario.channels > 0 || compression == Compression::None {
                    methods.push(Method { compression, tls });
                }
            }
        }
        methods
    }
}

/// Where the certificates are, if any are needed.
fn credentials(workspace: &Workspace, args: &Args, folder: &Path) -> Result<Option<PathBuf>> {
    if let Some(given) = &args.credentials {
        return Ok(Some(given.canonicalize().context(given.display().to_string())?));
    }
    if !args.tls.contains(&Tls::On) {
        return Ok(None);
    }
    let whimbrel = whimbrel(workspace)?;
    let (authority, host) = (folder.join("authority"), folder.join("host"));
    let make = |arguments: &mut Command| -> Result<()> {
        let output = arguments.output()?;
        let complaint = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "whimbrel tls: {}", complaint.trim());
        Ok(())
    };
    make(Command::new(&whimbrel).args(["tls", "ca", "--dir"]).arg(&authority))?;
    let addresses = ["127.0.0.1", DESTINATION_ADDRESS].map(|address| format!("--ip={address}"));
    make(
        Command::new(&whimbrel)
            .args(["tls", "host", "--name", "localhost", "--ca"])
            .arg(&authority)
            .arg("--dir")
            .arg(&host)
            .args(addresses),
    )?;
    Ok(Some(host))
}

fn engines(workspace: &Workspace, args: &Args) -> Result<Vec<Engine>> {
    ensure!(
        args.memory.bytes() >= 512 << 20,
        "--memory must be 512M or more: a dirtying guest's working set lies above 256 MiB"
    );
    let mut engines = Vec::new();
    if !args.leaves_out("whimbrel") {
        engines.push(Engine::Whimbrel { binary: whimbrel(workspace)? });
    }
    if !args.leaves_out("qemu") {
        let qemu = Qemu::find(workspace, args.qemu.as_deref())?;
        let version = qemu.version()?;
        engines.push(Engine::Qemu { qemu, version });
    }
    Ok(engines)
}
