//! `cargo xtask bench kept`: a VM goes into a mapped-ram file and comes out again, by a QEMU alone
//! and by way of whimbrel, interleaved.
//!
//! The same stock QEMU has the guest in both cases. Alone it writes the file itself (capabilities
//! `mapped-ram` and `multifd`), and another starts from it. By way of whimbrel it migrates into
//! `whimbrel receive`, or waits for `whimbrel restore`, on as many channels as there are threads.
//! What is written counts as written when it is on the disk, whoever has to bring it there.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::{Map, Value, json};
use whimbrel_peers::wait;

use super::contender::{Memory, Qemu, Side, content_file, cpu_seconds, whimbrel};
use super::host_memory;
use super::sample::{Row, Sample, keep, machine, table};
use super::scratch::Scratch;
use crate::workspace::Workspace;

const START_MAX: Duration = Duration::from_secs(60);
const MIGRATION_MAX: Duration = Duration::from_secs(300);

/// What to measure.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The guest's memory
    #[arg(long, default_value = "2G", value_parser = Memory::parse)]
    memory: Memory,
    /// How many times each contender runs in each scenario
    #[arg(long, default_value_t = 5)]
    runs: u32,
    /// Measure against this QEMU, instead of the newest one fetched
    #[arg(long, value_name = "PATH")]
    qemu: Option<PathBuf>,
    /// Only scenarios that have this in their name
    #[arg(long, value_name = "PART")]
    scenario: Option<String>,
    /// Where the VM is kept: a folder on the disk that is to be measured, instead of the target
    /// directory
    #[arg(long, value_name = "FOLDER")]
    store: Option<PathBuf>,
}

/// Which way, and from where.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    Write,
    /// Nothing of the file is in the page cache.
    ReadCold,
    /// All of it is.
    ReadWarm,
}

#[derive(Clone, Copy, Debug)]
struct Scenario {
    name: &'static str,
    way: Way,
    direct: bool,
    threads: u8,
}

const fn scenario(name: &'static str, way: Way, direct: bool, threads: u8) -> Scenario {
    Scenario { name, way, direct, threads }
}

const SCENARIOS: [Scenario; 14] = [
    scenario("write, direct, 1", Way::Write, true, 1),
    scenario("write, direct, 2", Way::Write, true, 2),
    scenario("write, direct, 4", Way::Write, true, 4),
    scenario("write, buffered, 1", Way::Write, false, 1),
    scenario("write, buffered, 2", Way::Write, false, 2),
    scenario("write, buffered, 4", Way::Write, false, 4),
    scenario("read cold, direct, 1", Way::ReadCold, true, 1),
    scenario("read cold, direct, 2", Way::ReadCold, true, 2),
    scenario("read cold, direct, 4", Way::ReadCold, true, 4),
    scenario("read cold, buffered, 1", Way::ReadCold, false, 1),
    scenario("read cold, buffered, 2", Way::ReadCold, false, 2),
    scenario("read cold, buffered, 4", Way::ReadCold, false, 4),
    scenario("read warm, buffered, 1", Way::ReadWarm, false, 1),
    scenario("read warm, buffered, 2", Way::ReadWarm, false, 2),
];

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Who {
    Qemu,
    Whimbrel,
}

/// What every run needs.
struct Bench<'a> {
    args: &'a Args,
    qemu: Qemu,
    binary: PathBuf,
    /// For what must be in memory.
    folder: Scratch,
    content: PathBuf,
    file: KeptFile,
}

/// What is written and read. Dropped, it goes.
struct KeptFile(PathBuf);

impl Drop for KeptFile {
    fn drop(&mut self) {
        // It may never have been written.
        let _ = fs::remove_file(&self.0);
    }
}

/// Measures, prints the table, keeps everything. Says whether every run succeeded.
pub(crate) fn run(workspace: &Workspace, args: &Args) -> Result<bool> {
    let qemu = Qemu::find(workspace, args.qemu.as_deref())?;
    let version = qemu.version()?;
    let folder = Scratch::new()?;
    let content = content_file(folder.path(), args.memory)?;
    let store = args.store.clone().unwrap_or_else(|| workspace.target("bench"));
    fs::create_dir_all(&store)?;
    let file = KeptFile(store.join(format!("kept-{}", std::process::id())));
    let bench = Bench { args, qemu, binary: whimbrel(workspace)?, folder, content, file };
    let (mut rows, mut whole) = (Vec::new(), true);
    let is_asked_for = |scenario: &&Scenario| {
        args.scenario.as_ref().is_none_or(|part| scenario.name.contains(part.as_str()))
    };
    for scenario in SCENARIOS.iter().filter(is_asked_for) {
        let row = |contender: String| Row {
            scenario: scenario.name.to_owned(),
            contender,
            samples: Vec::new(),
        };
        let mut of_qemu = row(format!("QEMU {version}"));
        let mut of_whimbrel = row("whimbrel".to_owned());
        for run in 1..=args.runs {
            let mut order = [(Who::Qemu, &mut of_qemu), (Who::Whimbrel, &mut of_whimbrel)];
            if run.is_multiple_of(2) {
                order.reverse();
            }
            for (who, row) in order {
                // For a QEMU, a receiver or the page cache, and what a kernel keeps back.
                if let Err(error) = host_memory::take_what_there_is(args.memory.bytes() * 4) {
                    println!("memory is as it comes: {error:#}");
                }
                match bench.sample(scenario, who) {
                    Ok(sample) => {
                        let (name, speed) = (&row.contender, sample.gigabytes_per_second);
                        eprintln!("{} {run}/{}: {name}: {speed:.2} GB/s", scenario.name, args.runs);
                        row.samples.push(sample);
                    }
                    Err(error) => {
                        println!("{}: {}: FAILED: {error:#}", scenario.name, row.contender);
                        whole = false;
                    }
                }
            }
        }
        rows.extend([of_whimbrel, of_qemu]);
    }
    println!("{}", table(&rows, "QEMU"));
    let rows = rows.iter().map(Row::json).collect();
    println!("kept in {}", keep(workspace, "kept", about(args), rows)?.display());
    Ok(whole)
}

impl Bench<'_> {
    fn sample(&self, scenario: &Scenario, who: Who) -> Result<Sample> {
        match scenario.way {
            Way::Write => self.write(scenario, who),
            Way::ReadCold | Way::ReadWarm => self.read(scenario, who),
        }
    }

    /// A QEMU with this backend as its memory.
    fn start(&self, name: &str, backend: &str, incoming: bool) -> Result<Side> {
        let mut command = self.qemu.command()?;
        let size = format!("size={}", self.args.memory.bytes());
        command
            .args(["-accel", "tcg", "-machine", "q35,memory-backend=ram", "-nodefaults"])
            .args(["-display", "none", "-m", &self.args.memory.argument()])
            .args(["-object", &format!("{backend},id=ram,{size}"), "-S"]);
        if incoming {
            command.args(["-incoming", "defer"]);
        }
        command.arg("-qmp");
        Side::start(command, &self.folder.path().join(name), |socket| {
            format!("unix:{},server=on,wait=off", socket.display())
        })
    }

    /// Says on how many channels it migrates, and how.
    fn prepare(&self, side: &mut Side, scenario: &Scenario, by_file: bool) -> Result<()> {
        let several = by_file || scenario.threads > 1;
        let capabilities: &[&str] = match (several, by_file) {
            (true, true) => &["events", "multifd", "mapped-ram"],
            (true, false) => &["events", "multifd", "return-path"],
            (false, _) => &["events", "return-path"],
        };
        side.qmp.enable(capabilities)?;
        let mut parameters = json!({ "max-bandwidth": 0, "multifd-channels": scenario.threads });
        if by_file {
            parameters["direct-io"] = json!(scenario.direct);
        }
        side.qmp.execute("migrate-set-parameters", &parameters)?;
        Ok(())
    }

    fn whimbrel(&self, scenario: &Scenario, arguments: &[&str]) -> Result<Ours> {
        let (threads, channels) = (scenario.threads.to_string(), scenario.threads.to_string());
        let direct = if scenario.direct { "--direct-io=on" } else { "--direct-io=off" };
        let mut command = Command::new(&self.binary);
        command.args(arguments).args(["--threads", &threads, direct]);
        if scenario.threads > 1 {
            command.args(["--multifd", &channels]);
        }
        Ours::start(command, &self.folder.path().join("whimbrel"))
    }

    fn write(&self, scenario: &Scenario, who: Who) -> Result<Sample> {
        let file = &self.file.0;
        // The one of the run before, whose blocks are to be free again.
        let _ = fs::remove_file(file);
        let content = self.content.display();
        let backend = format!("memory-backend-file,share=on,mem-path={content}");
        let mut source = self.start("source", &backend, false)?;
        self.prepare(&mut source, scenario, who == Who::Qemu)?;
        let store = file.display().to_string();
        let socket = self.folder.path().join("socket");
        let ours = match who {
            Who::Qemu => None,
            Who::Whimbrel => {
                let _ = fs::remove_file(&socket);
                let uri = format!("unix:{}", socket.display());
                let ours = self.whimbrel(scenario, &["receive", &uri, "--store", &store])?;
                wait::until("whimbrel receive to listen", START_MAX, || {
                    Ok(socket.exists().then_some(()))
                })?;
                Some(ours)
            }
        };
        let uri = match who {
            Who::Qemu => format!("file:{store}"),
            Who::Whimbrel => format!("unix:{}", socket.display()),
        };
        let (before, begun) = (source.cpu()?, Instant::now());
        source.qmp.migrate(&uri)?;
        source.qmp.wait_migrated(MIGRATION_MAX)?;
        let receiver_cpu = ours.map_or(Ok(0.0), Ours::finish)?;
        File::open(file)?.sync_all()?;
        let seconds = begun.elapsed().as_secs_f64();
        Ok(self.made(seconds, source.cpu()? - before, receiver_cpu))
    }

    fn read(&self, scenario: &Scenario, who: Who) -> Result<Sample> {
        let file = &self.file.0;
        if !file.exists() {
            self.write(&Scenario { direct: true, threads: 2, ..*scenario }, Who::Qemu)?;
        }
        let mut destination = self.start("destination", "memory-backend-ram,prealloc=on", true)?;
        self.prepare(&mut destination, scenario, who == Who::Qemu)?;
        match scenario.way {
            Way::ReadCold => {
                fs::write("/proc/sys/vm/drop_caches", "3").context("dropping caches (root)")?;
                host_memory::take_what_there_is(self.args.memory.bytes() * 3)?;
            }
            Way::ReadWarm | Way::Write => {
                std::io::copy(&mut File::open(file)?, &mut std::io::sink())?;
            }
        }
        let store = file.display().to_string();
        let (before, begun) = (destination.cpu()?, Instant::now());
        let restore_cpu = match who {
            Who::Qemu => {
                let from = json!({ "uri": format!("file:{store}") });
                destination.qmp.execute("migrate-incoming", &from)?;
                0.0
            }
            Who::Whimbrel => {
                let socket = self.folder.path().join("socket");
                let _ = fs::remove_file(&socket);
                let uri = format!("unix:{}", socket.display());
                destination.qmp.execute("migrate-incoming", &json!({ "uri": uri }))?;
                self.whimbrel(scenario, &["restore", &store, &uri])?.finish()?
            }
        };
        destination.qmp.wait_migrated(MIGRATION_MAX)?;
        let seconds = begun.elapsed().as_secs_f64();
        Ok(self.made(seconds, restore_cpu, destination.cpu()? - before))
    }

    fn made(&self, seconds: f64, source: f64, destination: f64) -> Sample {
        let memory = self.args.memory;
        Sample {
            gigabytes_per_second: memory.gigabytes() / seconds,
            source_cpu_per_gib: source / memory.gib(),
            destination_cpu_per_gib: destination / memory.gib(),
        }
    }
}

/// A whimbrel that runs to its end. Dropped before, it is killed.
struct Ours {
    child: Child,
    complaints: PathBuf,
}

impl Ours {
    fn start(mut command: Command, files: &Path) -> Result<Self> {
        let complaints = files.with_extension("stderr");
        let child = command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(File::create(&complaints)?)
            .spawn()
            .with_context(|| format!("{} did not start", command.get_program().display()))?;
        Ok(Self { child, complaints })
    }

    /// Waits for its end; gives its processor time, which is known until it is reaped.
    fn finish(mut self) -> Result<f64> {
        let process = self.child.id();
        wait::until("whimbrel to end", MIGRATION_MAX, || {
            let stat = fs::read_to_string(format!("/proc/{process}/stat"))?;
            let state = stat.rsplit_once(')').map(|(_, rest)| rest.trim_start());
            Ok(state.is_some_and(|rest| rest.starts_with('Z')).then_some(()))
        })?;
        let seconds = cpu_seconds(process)?;
        let status = self.child.wait()?;
        if !status.success() {
            bail!("whimbrel: {}", fs::read_to_string(&self.complaints)?.trim());
        }
        ensure!(seconds > 0.0, "whimbrel took no time");
        Ok(seconds)
    }
}

impl Drop for Ours {
    fn drop(&mut self) {
        // Both fail only for a process that is gone, which is what is wanted.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What the numbers mean nothing without.
fn about(args: &Args) -> Map<String, Value> {
    let mut about = machine();
    about.insert("memory-bytes".to_owned(), json!(args.memory.bytes()));
    about.insert("runs".to_owned(), json!(args.runs));
    about
}
