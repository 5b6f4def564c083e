//! `cargo xtask fuzz`: every target for a while, from the golden seeds and from what earlier runs
//! found.

use std::collections::VecDeque;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};

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
}

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
    let all: Vec<&str> = list.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
    for target in &args.target {
        ensure!(all.contains(&target.as_str()), "no target {target:?}, only {}", all.join(", "));
    }
    let (built, said) = log.capture(fuzzer.command().arg("build").args(fuzzer.target_folder()))?;
    ensure!(built, "the targets do not build: {}", said.lines().last().unwrap_or_default());

    let wanted = all
        .iter()
        .filter(|name| args.target.is_empty() || args.target.iter().any(|target| target == **name));
    let mut waiting: VecDeque<&str> = wanted.copied().collect();
    let mut running: Vec<Target> = Vec::new();
    let mut clean = true;
    loop {
        while running.len() < args.jobs.max(1) {
            let Some(name) = waiting.pop_front() else { break };
            running.push(fuzzer.start(workspace, name, args.seconds)?);
        }
        if running.is_empty() {
            return Ok(clean);
        }
        std::thread::sleep(POLL);
        let mut at = 0;
        while let Some(target) = running.get_mut(at) {
            match target.child.try_wait()? {
                Some(status) => clean &= running.swap_remove(at).report(status.success()),
                None => at += 1,
            }
        }
    }
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

    fn target_folder(&self) -> [PathBuf; 2] {
        ["--target-dir".into(), self.build.clone()]
    }

    fn start(&self, workspace: &Workspace, name: &str, seconds: u64) -> Result<Target> {
        let log = workspace.target(&format!("xtask/fuzz-{name}.log"));
        let file = fs::File::create(&log).with_context(|| log.display().to_string())?;
        let child = self
            .command()
            .arg("run")
            .args(self.target_folder())
            .arg(name)
            .arg("--")
            .arg(format!("-max_total_time={seconds}"))
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
    /// One line. Says whether nothing was found.
    fn report(&self, success: bool) -> bool {
        let Self { name, log, .. } = self;
        let Progress { executions, coverage, corpus } = Progress::read(log);
        // A target that executed nothing has not been fuzzed, whatever it exits with.
        let clean = success && executions > 0;
        let verdict = if clean { "nothing found" } else { "FAILED" };
        println!(
            "{name}: {executions} executions, coverage {coverage}, corpus {corpus}: {verdict}"
        );
        if !clean {
            let text = fs::read(log).unwrap_or_default();
            let text = String::from_utf8_lossy(&text);
            let telling = ["ERROR", "panicked", "Test unit written", "error:", "Failing input"];
            for line in text.lines().filter(|line| telling.iter().any(|word| line.contains(word))) {
                println!("    {line}");
            }
            println!("    all of it: {}", log.display());
        }
        clean
    }
}

#[derive(Debug, Default, PartialEq, Eq)]
struct Progress {
    executions: u64,
    coverage: u64,
    corpus: u64,
}

impl Progress {
    fn read(log: &Path) -> Self {
        let text = fs::read(log).unwrap_or_default();
        Self::parse(&String::from_utf8_lossy(&text))
    }

    /// From libFuzzer's lines `#2048 pulse cov: 12 ft: 34 corp: 5/67b ..` and its final counts.
    fn parse(text: &str) -> Self {
        let mut progress = Self::default();
        for line in text.lines() {
            let mut words = line.split_whitespace();
            while let Some(word) = words.next() {
                let value = match word {
                    "cov:" => &mut progress.coverage,
                    "corp:" => &mut progress.corpus,
                    "stat::number_of_executed_units:" => &mut progress.executions,
                    _ => continue,
                };
                let number = words.next().and_then(|word| word.split('/').next()?.parse().ok());
                *value = number.unwrap_or(*value);
            }
        }
        progress
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn libfuzzers_last_word_counts() {
        let text = "#2\tINITED cov: 10 ft: 11 corp: 1/1b exec/s: 0 rss: 40Mb\n\
            #4096\tpulse  cov: 120 ft: 340 corp: 25/670b lim: 4096\n\
            stat::number_of_executed_units: 5000\n";
        assert_eq!(Progress::parse(text), Progress { executions: 5000, coverage: 120, corpus: 25 });
    }
}
