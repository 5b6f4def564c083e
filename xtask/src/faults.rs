//! `cargo xtask faults`: migrations whose link and processes fail on purpose, drawn from a seed.

use std::process::Command;

use anyhow::{Result, ensure};
use whimbrel_peers::memory::HugePages;

use crate::step::{Log, Outcome, Tally};
use crate::workspace::Workspace;

/// How many the step of `cargo xtask test` does, and from what they are drawn.
const STEP_RUNS: u64 = 200;
const STEP_SEED: u64 = 1;
/// Most of a run is waiting.
const STEP_JOBS: u64 = 3;
/// Pages of 2 MiB that a run takes at most: 16 MiB on each side.
const HUGE_PAGES: u64 = 16;

/// How many runs, and drawn from what.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// How many runs
    #[arg(long, default_value_t = STEP_RUNS)]
    runs: u64,
    /// Draw what an earlier time has drawn
    #[arg(long, default_value_t = STEP_SEED)]
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
    /// Runs at the same time
    #[arg(long, default_value_t = STEP_JOBS)]
    jobs: u64,
}

/// How both programs are built.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Profile {
    /// As the tests are: built already when they have run.
    Dev,
    Release,
}

/// `cargo xtask faults`, its output shown as it comes.
pub(crate) fn run(workspace: &Workspace, args: &Args) -> Result<bool> {
    let _held = huge_pages(args.jobs);
    build(workspace, &mut Log::create(&workspace.target("xtask/build.log"))?, Profile::Release)?;
    let mut command = harness(workspace, Profile::Release, args.jobs);
    command
        .args(["--runs", &args.runs.to_string(), "--seed", &args.seed.to_string()])
        .args(["--from", &args.from.to_string()]);
    if let Some(run) = args.only {
        command.args(["--only", &run.to_string()]);
    }
    if let Some(mode) = &args.mode {
        command.args(["--mode", mode]);
    }
    Ok(command.status()?.success())
}

/// The step of `cargo xtask test`.
pub(crate) fn step(workspace: &Workspace, log: &mut Log) -> Result<Outcome> {
    let _held = huge_pages(STEP_JOBS);
    build(workspace, log, Profile::Dev)?;
    let mut command = harness(workspace, Profile::Dev, STEP_JOBS);
    command.args(["--runs", &STEP_RUNS.to_string(), "--seed", &STEP_SEED.to_string()]);
    let (success, _) = log.capture(&mut command)?;
    Ok(match success {
        true => Outcome::Passed(Tally { passed: STEP_RUNS, ..Tally::default() }),
        // Which of them is in the log, each with how to replay it.
        false => Outcome::Failed(Tally::default()),
    })
}

/// Not every user may reserve them: the harness says so and does without.
fn huge_pages(jobs: u64) -> Option<HugePages> {
    HugePages::reserve(HUGE_PAGES * jobs).ok()
}

fn build(workspace: &Workspace, log: &mut Log, profile: Profile) -> Result<()> {
    let mut command = workspace.cargo();
    command.args(["build", "--locked", "--package=whimbrel-cli", "--package=whimbrel-faults"]);
    if profile == Profile::Release {
        command.arg("--release");
    }
    let (built, said) = log.capture(&mut command)?;
    ensure!(built, "whimbrel or its fault harness does not build:\n{said}");
    Ok(())
}

fn harness(workspace: &Workspace, profile: Profile, jobs: u64) -> Command {
    let folder = if profile == Profile::Release { "release" } else { "debug" };
    let program = |name: &str| workspace.target(&format!("{folder}/{name}"));
    let mut command = Command::new(program("whimbrel-faults"));
    command
        .arg("--whimbrel")
        .arg(program("whimbrel"))
        .arg("--folder")
        .arg(workspace.target("faults"))
        .args(["--jobs", &jobs.to_string()]);
    command
}
