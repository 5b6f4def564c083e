//! `cargo xtask fuzz`: every target for a while, from the golden seeds, the corpus that is kept, and
//! what earlier runs found.

mod progress;

use std::collections::VecDeque;
use std::ffi::OsString;
use std::fs;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};

use self::progress::{Progress, Row, table};
use crate::step::Log;
use crate::tools::cargo_tool;
use crate::workspace::Workspace;

/// How often running targets are looked at.
const POLL: Duration = Duration::from_millis(200);

/// How long, and what.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Seconds for each target
    #[arg(long, value_name = "N", default_value_t = 60)]
    seconds: u64,
    /// Only this target (may be given more than once)
    #[arg(long, value_name = "T")]
    target: Vec<String>,
    /// How many targets at a time
    #[arg(long, value_name = "N", default_value_t = 2)]
    jobs: usize,
    /// When all have run, keep in the repository the inputs that reach all that any has reached
    #[arg(long)]
    minimise: bool,
}

/// Most mebibytes that one allocation may have, in any code that runs.
const ALLOCATION_MAX: u32 = 64;

/// Most mebibytes that a target may have in memory, the sanitizer's own included.
const RSS_MAX: u32 = 2048;

/// Seconds after which an input is a finding: it takes milliseconds, or waits for ever.
const INPUT_SECONDS_MAX: u32 = 60;

/// Runs the targets and says for each how far it came. Says whether nothing was found.
pub(crate) fn run(workspace: &Workspace, args: &Args) -> Result<bool> {
    let manifest = workspace.path("fuzz/Cargo.toml");
    ensure!(manifest.is_file(), "no fuzz/ in this tree");
    let mut log = Log::create(&workspace.target("xtask/fuzz.log"))?;
    let fuzzer = Fuzzer::new(workspace, &mut log)?;

    let mut seed = workspace.cargo();
    seed.args(["run", "--manifest-path"]).arg(&manifest).args(["--bin", "seed"]);
    let (seeded, said) = log.capture(seed.env("CARGO_TARGET_DIR", workspace.target("fuzz")))?;
    ensure!(seeded, "the seeds cannot be made: {}", said.lines().last().unwrap_or_default());

    let (listed, list) = log.capture(fuzzer.command().arg("list"))?;
    ensure!(listed, "cargo fuzz list: {list}");
    // It lists the program that makes the seeds too.
    let is_target = |name: &&str| workspace.path(&format!("fuzz/fuzz_targets/{name}.rs")).is_file();
    let all: Vec<&str> = list.lines().map(str::trim).filter(is_target).collect();
    ensure!(!all.is_empty(), "cargo fuzz lists no target: {list}");
    for target in &args.target {
        ensure!(all.contains(&target.as_str()), "no target {target:?}, only {}", all.join(", "));
    }
    let (built, said) = log.capture(fuzzer.command().arg("build").args(fuzzer.build_options()))?;
    ensure!(built, "the targets do not build: {}", said.lines().last().unwrap_or_default());

    let wanted = all
        .iter()
        .filter(|name| args.target.is_empty() || args.target.iter().any(|target| target == **name));
    let mut waiting: VecDeque<&str> = wanted.copied().collect();
    let chosen: Vec<&str> = waiting.iter().copied().collect();
    let mut running: Vec<Target> = Vec::new();
    let mut rows = Vec::new();
    loop {
        while running.len() < args.jobs.max(1) {
            let Some(name) = waiting.pop_front() else { break };
            running.push(fuzzer.start(workspace, name, args.seconds)?);
        }
        if running.is_empty() {
            break;
        }
        std::thread::sleep(POLL);
        let mut at = 0;
        while let Some(target) = running.get_mut(at) {
            match target.child.try_wait()? {
                Some(status) => rows.push(running.swap_remove(at).report(status.success())),
                None => at += 1,
            }
        }
    }
    rows.sort_by_key(|row| chosen.iter().position(|name| *name == row.target));
    println!("\n{}", table(&rows));
    let clean = rows.iter().all(Row::is_clean);
    if args.minimise && clean {
        minimise(workspace, &fuzzer, &chosen, &mut log)?;
    }
    Ok(clean)
}

/// Leaves of each target's corpus only what adds to the coverage, and keeps that.
fn minimise(workspace: &Workspace, fuzzer: &Fuzzer, targets: &[&str], log: &mut Log) -> Result<()> {
    for target in targets {
        let mut command = fuzzer.command();
        command.arg("cmin").args(fuzzer.build_options()).arg(target);
        let (done, said) = log.capture(&mut command)?;
        ensure!(done, "cargo fuzz cmin {target}: {}", said.lines().last().unwrap_or_default());
    }
    let mut keep = workspace.cargo();
    keep.args(["run", "--manifest-path"]).arg(workspace.path("fuzz/Cargo.toml"));
    keep.args(["--bin", "keep", "--"]).args(targets);
    let (kept, said) = log.capture(keep.env("CARGO_TARGET_DIR", workspace.target("fuzz")))?;
    ensure!(kept, "the corpus cannot be kept: {}", said.lines().last().unwrap_or_default());
    said.lines().filter(|line| line.contains(" inputs in ")).for_each(|line| println!("{line}"));
    Ok(())
}

/// How `cargo fuzz` is called here.
struct Fuzzer {
    nightly: bool,
    tools: PathBuf,
    root: PathBuf,
    build: PathBuf,
}

impl Fuzzer {
    fn new(workspace: &Workspace, log: &mut Log) -> Result<Self> {
        let tool = cargo_tool(workspace, log, "cargo-fuzz")?;
        let toolchains = Command::new("rustup").args(["toolchain", "list"]).output();
        let nightly = toolchains
            .is_ok_and(|output| String::from_utf8_lossy(&output.stdout).contains("nightly-"));
        Ok(Self {
            nightly,
            tools: tool.parent().context("a tool lies in a folder")?.to_owned(),
            root: workspace.path("."),
            build: workspace.target("fuzz-run"),
        })
    }

    /// `cargo fuzz`, which needs flags of a nightly: with one if there is one, and otherwise with
    /// the stable compiler told to take them.
    fn command(&self) -> Command {
        let mut command = match self.nightly {
            true => {
                let mut command = Command::new("rustup");
                command.args(["run", "nightly", "cargo"]);
                command
            }
            false => {
                let mut command = Command::new("cargo");
                command.env("RUSTC_BOOTSTRAP", "1");
                command
            }
        };
        let path = std::env::var_os("PATH").unwrap_or_default();
        let folders = std::iter::once(self.tools.clone()).chain(std::env::split_paths(&path));
        if let Ok(path) = std::env::join_paths(folders) {
            command.env("PATH", path);
        }
        // What cargo tells the commands it runs would bind the inner cargo to our toolchain.
        for variable in ["CARGO", "RUSTUP_TOOLCHAIN", "CARGO_TARGET_DIR"] {
            command.env_remove(variable);
        }
        command.arg("fuzz").current_dir(&self.root).stdin(Stdio::null());
        command
    }

    fn build_options(&self) -> [OsString; 2] {
        ["--target-dir".into(), self.build.clone().into()]
    }

    fn start(&self, workspace: &Workspace, name: &str, seconds: u64) -> Result<Target> {
        let log = workspace.target(&format!("xtask/fuzz-{name}.log"));
        let file = fs::File::create(&log).with_context(|| log.display().to_string())?;
        let child = self
            .command()
            .arg("run")
            .args(self.build_options())
            .arg(name)
            .arg("--")
            .arg(format!("-max_total_time={seconds}"))
            .arg(format!("-malloc_limit_mb={ALLOCATION_MAX}"))
            .arg(format!("-rss_limit_mb={RSS_MAX}"))
            .arg(format!("-timeout={INPUT_SECONDS_MAX}"))
            .arg("-print_final_stats=1")
            .stdout(file.try_clone()?)
            .stderr(file)
            .spawn()?;
        Ok(Target { name: name.to_owned(), log, child })
    }
}

/// A target being fuzzed. Its run is bounded by libFuzzer itself.
struct Target {
    name: String,
    log: PathBuf,
    child: Child,
}

impl Target {
    /// One line, and where something was found, what.
    fn report(&self, success: bool) -> Row {
        let Self { name, log, .. } = self;
        let text = fs::read(log).unwrap_or_default();
        let text = String::from_utf8_lossy(&text);
        let row = Row { target: name.clone(), success, progress: Progress::parse(&text) };
        println!("{row}");
        if !row.is_clean() {
            let telling = ["ERROR", "panicked", "Test unit written", "error:", "Failing input"];
            for line in text.lines().filter(|line| telling.iter().any(|word| line.contains(word))) {
                println!("    {line}");
            }
            println!("    all of it: {}", log.display());
        }
        row
    }
}
