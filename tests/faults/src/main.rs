//! Faults on purpose: two `whimbrel vm`, a link between them that fails as a seed says, and after
//! each run every invariant checked. `cargo xtask faults` builds both and starts this.
//!
//! The road of a run: [`plan`] draws it, [`run`] starts the two processes ([`vm`]) and the link
//! ([`proxy`]), waits for what comes of it and judges that; [`summary`] counts.
#![forbid(unsafe_code)]

mod census;
mod dice;
mod only;
mod phase;
mod plan;
mod proxy;
mod run;
mod summary;
mod vm;

use std::fs::{self, File};
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::Instant;

use anyhow::{Context as _, Result, ensure};
use clap::Parser;
use whimbrel_peers::memory::HugePages;

use crate::only::Only;
use crate::plan::Plan;
use crate::run::{Setting, Verdict};
use crate::summary::Summary;

/// After so many failures there is enough to look at.
const FAILURES_MAX: usize = 25;
/// Huge pages of 2 MiB that a run takes, at most: 16 MiB on each side.
const HUGE_PAGES: u64 = 16;

/// Migrations whose link and processes fail, drawn from a seed.
#[derive(Debug, Parser)]
#[command(name = "whimbrel-faults", max_term_width = 100)]
struct Arguments {
    /// The command under test; `cargo xtask faults` says it
    #[arg(long, value_name = "PATH", required_unless_present = "count")]
    whimbrel: Option<PathBuf>,
    /// Only count again what came of earlier runs: their results.jsonl, which is told while they go on
    #[arg(long, value_name = "FILE")]
    count: Vec<PathBuf>,
    /// How many runs
    #[arg(long, default_value_t = 200)]
    runs: u64,
    /// Draw what an earlier time has drawn
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// The first run's number
    #[arg(long, default_value_t = 0)]
    from: u64,
    /// This run alone: how a failure is replayed
    #[arg(long, value_name = "RUN")]
    only: Option<u64>,
    /// What all runs have in common: precopy, postcopy, preempt, multifd or multifd-preempt, and tls,
    /// huge, tcp, unix, with commas between them
    #[arg(long)]
    mode: Option<String>,
    /// Runs at the same time: most of one is waiting
    #[arg(long, default_value_t = 3)]
    jobs: u64,
    /// Where the logs of failed runs, the results and the summary go; `cargo xtask faults` says it
    #[arg(long, value_name = "DIR", default_value = "faults")]
    folder: PathBuf,
}

fn main() -> ExitCode {
    match Arguments::parse().run() {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("whimbrel-faults: {error:#}");
            ExitCode::FAILURE
        }
    }
}

impl Arguments {
    fn run(&self) -> Result<bool> {
        let whimbrel = match (&self.whimbrel, &self.count[..]) {
            (Some(whimbrel), []) => whimbrel,
            (_, files) => return count(files),
        };
        let only: Only = match &self.mode {
            None => Only::default(),
            Some(words) => words.parse().map_err(anyhow::Error::msg)?,
        };
        fs::create_dir_all(&self.folder)?;
        let keys = tempfile::Builder::new().prefix("wf-keys-").tempdir()?;
        // Not every user may reserve them.
        let huge = HugePages::reserve(HUGE_PAGES * self.jobs);
        if let Err(why) = &huge {
            println!("no huge pages ({why}): guests that should lie in them do not");
        }
        let setting = Setting {
            binary: whimbrel.canonicalize().context("--whimbrel")?,
            credentials: credentials(whimbrel, keys.path())?,
            kept: self.folder.join("failed"),
            huge: huge.is_ok(),
        };
        let (from, runs) = match self.only {
            Some(run) => (run, 1),
            None => (self.from, self.runs),
        };
        let begun = Instant::now();
        let summary = self.all(&setting, from..from + runs, only)?;
        let text = summary.text();
        print!("{text}");
        fs::write(self.folder.join("summary.md"), &text)?;
        println!("seed {}, {:.0} s", self.seed, begun.elapsed().as_secs_f64());
        Ok(summary.failures().next().is_none())
    }

    fn all(&self, setting: &Setting, runs: std::ops::Range<u64>, only: Only) -> Result<Summary> {
        let results =
            Mutex::new((Summary::default(), File::create(self.folder.join("results.jsonl"))?));
        let next = AtomicU64::new(runs.start);
        let work = || -> Result<()> {
            loop {
                let index = next.fetch_add(1, Ordering::Relaxed);
                if index >= runs.end {
                    return Ok(());
                }
                let plan = Plan::draw(self.seed, index, only);
                if self.only.is_some() {
                    println!("{plan}");
                }
                let verdict = run::run(setting, &plan);
                self.tell(setting, &plan, &verdict);
                let mut results = results.lock().expect("no job panics with it");
                writeln!(results.1, "{}", serde_json::to_string(&verdict)?)?;
                results.0.add(verdict);
                if results.0.failures().count() >= FAILURES_MAX {
                    next.store(runs.end, Ordering::Relaxed);
                }
            }
        };
        thread::scope(|scope| -> Result<()> {
            let jobs: Vec<_> = (0..self.jobs.max(1))
                .map(|job| {
                    thread::Builder::new().name(format!("job-{job}")).spawn_scoped(scope, work)
                })
                .collect::<std::io::Result<_>>()?;
            jobs.into_iter().try_for_each(|job| job.join().expect("a job that does not panic"))
        })?;
        Ok(results.into_inner().expect("no job panics with it").0)
    }

    fn tell(&self, setting: &Setting, plan: &Plan, verdict: &Verdict) {
        if let Some(why) = &verdict.failure {
            let mode = self.mode.as_ref().map(|mode| format!(" --mode {mode}")).unwrap_or_default();
            let kept = setting.kept.join(format!("{}-{}", plan.seed, plan.index));
            println!(
                "FAILED: {why}\n{plan}\n  replay: cargo xtask faults --seed {} --only {}{mode}\n  \
                 logs: {}",
                plan.seed,
                plan.index,
                kept.display()
            );
        } else if self.only.is_some() {
            let outcome = verdict.outcome.map_or("?", |outcome| outcome.name());
            println!("{}", verdict.story);
            println!("{outcome}, {} ms, {:?}", verdict.millis, verdict.faults);
        } else if (plan.index + 1).is_multiple_of(100) {
            println!("run {} is over", plan.index + 1);
        }
    }
}

/// Counts what came of earlier runs.
fn count(files: &[PathBuf]) -> Result<bool> {
    let mut summary = Summary::default();
    for file in files {
        let text = fs::read_to_string(file).with_context(|| file.display().to_string())?;
        for line in text.lines() {
            summary.add(serde_json::from_str(line).with_context(|| line.to_owned())?);
        }
    }
    print!("{}", summary.text());
    Ok(summary.failures().next().is_none())
}

/// A CA and credentials for this machine, made by the command itself.
fn credentials(whimbrel: &Path, folder: &Path) -> Result<PathBuf> {
    let (ca, host) = (folder.join("ca"), folder.join("host"));
    let make = |arguments: &[&str], paths: &[(&str, &Path)]| -> Result<()> {
        let mut command = Command::new(whimbrel);
        command.arg("tls").args(arguments);
        for (option, path) in paths {
            command.arg(option).arg(path);
        }
        let status = command.stdout(Stdio::null()).status()?;
        ensure!(status.success(), "whimbrel tls {arguments:?} ended with {status}");
        Ok(())
    };
    make(&["ca"], &[("--dir", &ca)])?;
    make(&["host", "--name=localhost", "--ip=127.0.0.1"], &[("--ca", &ca), ("--dir", &host)])?;
    Ok(host)
}
