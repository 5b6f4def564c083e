//! `cargo xtask faults`: migrations whose link and processes fail on purpose, drawn from a seed.

use std::ffi::OsString;
use std::process::Command;

use anyhow::{Result, ensure};

use crate::step::{Log, Outcome, Tally};
use crate::workspace::Workspace;

/// How many the step of `cargo xtask test` does, and from what they are drawn.
const STEP_RUNS: u64 = 200;
const STEP_SEED: u64 = 1;
/// Most of a run is waiting.
const STEP_JOBS: u64 = 3;

/// How many runs, and drawn from what: the harness knows its options, and tells of them.
#[derive(Debug, clap::Args)]
#[command(disable_help_flag = true)]
pub(crate) struct Args {
    /// What the harness is told; --help has it tell of its options
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, value_name = "OPTION")]
    options: Vec<OsString>,
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
    build(workspace, &mut Log::create(&workspace.target("xtask/build.log"))?, Profile::Release)?;
    Ok(harness(workspace, Profile::Release).args(&args.options).status()?.success())
}

/// The step of `cargo xtask test`.
pub(crate) fn step(workspace: &Workspace, log: &mut Log) -> Result<Outcome> {
    build(workspace, log, Profile::Dev)?;
    let mut command = harness(workspace, Profile::Dev);
    command
        .args(["--runs", &STEP_RUNS.to_string(), "--seed", &STEP_SEED.to_string()])
        .args(["--jobs", &STEP_JOBS.to_string()]);
    let (success, _) = log.capture(&mut command)?;
    Ok(match success {
        true => Outcome::Passed(Tally { passed: STEP_RUNS, ..Tally::default() }),
        // Which of them is in the log, each with how to replay it.
        false => Outcome::Failed(Tally::default()),
    })
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

fn harness(workspace: &Workspace, profile: Profile) -> Command {
    let folder = if profile == Profile::Release { "release" } else { "debug" };
    let program = |name: &str| workspace.target(&format!("{folder}/{name}"));
    let mut command = Command::new(program("whimbrel-faults"));
    command
        .arg("--whimbrel")
        .arg(program("whimbrel"))
        .arg("--folder")
        .arg(workspace.target("faults"));
    command
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Faults {
        #[command(flatten)]
        args: Args,
    }

    #[test]
    fn the_harness_is_told_all_of_it() {
        for told in
            ["", "--help", "-h", "--runs 9 --seed 1", "--only=7 --mode preempt,tls --jobs 4"]
        {
            let words: Vec<_> = told.split_whitespace().collect();
            let all = ["faults"].iter().chain(&words);
            let Faults { args } = Faults::try_parse_from(all).expect("taken as it is");
            assert_eq!(args.options, words, "{told}");
        }
    }
}
