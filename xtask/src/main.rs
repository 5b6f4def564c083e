//! Every habit of the project behind one command: `cargo xtask`.
//!
//! One file per habit; what CI runs is `cargo xtask ci`, the same steps as `cargo xtask test`
//! with the rule that nothing essential may be skipped.

#![forbid(unsafe_code)]

use std::process::ExitCode;

use clap::{Parser, Subcommand};

use crate::workspace::Workspace;

mod bench;
mod faults;
mod fuzz;
mod peers;
mod soak;
mod step;
mod test;
mod tools;
mod workspace;

/// Tests, fuzzing, benchmarks and peer tests of whimbrel.
#[derive(Debug, Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask", max_term_width = 100)]
struct Cli {
    #[command(subcommand)]
    habit: Habit,
}

#[derive(Debug, Subcommand)]
enum Habit {
    /// Everything that must pass before a change is proposed
    Test(test::Args),
    /// What CI runs: `test`, where an essential step that cannot run is a failure
    Ci(test::Args),
    /// Only the tests against stock QEMUs
    Peers(peers::Args),
    /// Every fuzz target for a while, from the seeds and what earlier runs found
    Fuzz(fuzz::Args),
    /// A guest that checks itself, moved back and forth hundreds of times by roads drawn from a seed
    Soak(soak::Args),
    /// Migrations whose link and processes fail on purpose, drawn from a seed
    Faults(faults::Args),
    /// Measurements, ours and the peer's interleaved
    #[command(subcommand)]
    Bench(bench::Bench),
}

fn main() -> ExitCode {
    let habit = Cli::parse().habit;
    let done = Workspace::find().and_then(|workspace| match habit {
        Habit::Test(args) => test::run(&workspace, &args, test::in_ci()),
        Habit::Ci(args) => test::run(&workspace, &args, true),
        Habit::Peers(args) => peers::run(&workspace, &args),
        Habit::Fuzz(args) => fuzz::run(&workspace, &args),
        Habit::Soak(args) => soak::run(&workspace, &args),
        Habit::Faults(args) => faults::run(&workspace, &args),
        Habit::Bench(which) => bench::run(&workspace, &which),
    });
    match done {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("cargo xtask: {error:#}");
            ExitCode::FAILURE
        }
    }
}
