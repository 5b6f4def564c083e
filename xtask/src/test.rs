//! `cargo xtask test`: every check of the project, in order of how fast it can fail.

use std::process::Command;

use anyhow::{Result, ensure};

use crate::faults;
use crate::peers;
use crate::step::{Log, Outcome, Step, Tally};
use crate::tools::cargo_tool;
use crate::workspace::Workspace;

/// Which steps to run.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Run only this step (may be given more than once)
    #[arg(long, value_name = "STEP")]
    only: Vec<String>,
    /// Leave this step out (may be given more than once)
    #[arg(long, value_name = "STEP")]
    skip: Vec<String>,
    /// Print the steps and stop
    #[arg(long)]
    list: bool,
}

const STEPS: &[Step] = &[
    Step { name: "format", about: "cargo fmt --check", run: format },
    Step { name: "clippy", about: "cargo clippy, warnings are errors", run: clippy },
    Step { name: "docs", about: "rustdoc, warnings are errors", run: docs },
    Step { name: "licences", about: "cargo deny: licences, bans, sources", run: licences },
    Step { name: "advisories", about: "cargo deny: RustSec advisories", run: advisories },
    Step {
        name: "tests",
        about: "unit, property, golden, documentation and end-to-end tests",
        run: tests,
    },
    Step { name: "loom", about: "the page map's atomics under every interleaving", run: loom },
    Step { name: "corpus", about: "every fuzz target over its corpus", run: corpus },
    Step { name: "faults", about: "200 migrations that fail on purpose", run: faults::step },
    Step { name: "peers", about: "against stock QEMUs", run: peers::step },
];

/// Whether this run follows CI's rules.
pub(crate) fn in_ci() -> bool {
    std::env::var("CI").is_ok_and(|value| value == "true" || value == "1")
}

/// Runs the steps asked for. Says whether none failed.
pub(crate) fn run(workspace: &Workspace, args: &Args, ci: bool) -> Result<bool> {
    if args.list {
        for step in STEPS {
            println!("{:<12} {}", step.name, step.about);
        }
        return Ok(true);
    }
    for named in args.only.iter().chain(&args.skip) {
        ensure!(
            STEPS.iter().any(|step| step.name == named),
            "no step {named:?}: cargo xtask test --list names them"
        );
    }
    let mut sum = Tally::default();
    for step in STEPS {
        let named = |list: &[String]| list.iter().any(|name| name == step.name);
        if named(&args.skip) || !(args.only.is_empty() || named(&args.only)) {
            continue;
        }
        sum += step.report(workspace, ci);
    }
    println!("{} passed, {} failed, {} skipped", sum.passed, sum.failed, sum.skipped);
    Ok(sum.failed == 0)
}

fn format(workspace: &Workspace, log: &mut Log) -> Result<Outcome> {
    let workspace_wide = log.check(workspace.cargo().args(["fmt", "--all", "--check"]))?;
    let fuzz = workspace.path("fuzz/Cargo.toml");
    if matches!(workspace_wide, Outcome::Failed(_)) || !fuzz.is_file() {
        return Ok(workspace_wide);
    }
    log.check(workspace.cargo().args(["fmt", "--check", "--manifest-path"]).arg(fuzz))
}

fn clippy(workspace: &Workspace, log: &mut Log) -> Result<Outcome> {
    log.check(workspace.cargo().args([
        "clippy",
        "--workspace",
        "--all-targets",
        "--all-features",
        "--locked",
        "--",
        "-Dwarnings",
    ]))
}

fn docs(workspace: &Workspace, log: &mut Log) -> Result<Outcome> {
    log.check(
        workspace
            .cargo()
            // The command's documentation is its --help, and its name is the library's.
            .args(["doc", "--workspace", "--all-features", "--lib", "--no-deps", "--locked"])
            .env("RUSTDOCFLAGS", "-Dwarnings"),
    )
}

fn deny(workspace: &Workspace, log: &mut Log) -> Result<Command> {
    let mut command = Command::new(cargo_tool(workspace, log, "cargo-deny")?);
    command.arg("--manifest-path").arg(workspace.path("Cargo.toml")).arg("--locked");
    Ok(command)
}

fn licences(workspace: &Workspace, log: &mut Log) -> Result<Outcome> {
    let mut command = deny(workspace, log)?;
    log.check(command.args(["check", "licenses", "bans", "sources"]))
}

fn advisories(workspace: &Workspace, log: &mut Log) -> Result<Outcome> {
    let mut command = deny(workspace, log)?;
    let (success, printed) = log.capture(command.args(["check", "advisories"]))?;
    if success {
        return Ok(Outcome::Passed(Tally { passed: 1, ..Tally::default() }));
    }
    // No network rule of ours can be at fault when the database itself is out of reach, and no
    // verdict was given on any crate: said, counted as skipped, and not fatal even in CI.
    match printed.lines().find(|line| line.contains("failed to fetch advisory database")) {
        Some(_) => Ok(Outcome::Skipped {
            why: "the RustSec advisory database cannot be fetched from this network".to_owned(),
            essential: false,
        }),
        None => Ok(Outcome::Failed(Tally::default())),
    }
}

fn tests(workspace: &Workspace, log: &mut Log) -> Result<Outcome> {
    // The peer tests need QEMUs, and are a step of their own.
    log.tests(workspace.cargo().args([
        "test",
        "--workspace",
        "--all-features",
        "--locked",
        "--no-fail-fast",
        "--exclude",
        "whimbrel-peers",
    ]))
}

fn loom(workspace: &Workspace, log: &mut Log) -> Result<Outcome> {
    log.tests(
        workspace
            .cargo()
            .args(["test", "--package", "whimbrel-ram", "--test", "loom", "--release", "--locked"])
            // Another set of flags would rebuild everything in the common directory each time.
            .env("CARGO_TARGET_DIR", workspace.target("loom"))
            .env("RUSTFLAGS", "--cfg loom"),
    )
}

fn corpus(workspace: &Workspace, log: &mut Log) -> Result<Outcome> {
    let manifest = workspace.path("fuzz/Cargo.toml");
    if !manifest.is_file() {
        return Ok(Outcome::Skipped { why: "no fuzz/ in this tree".to_owned(), essential: true });
    }
    log.tests(
        workspace
            .cargo()
            .args(["test", "--manifest-path"])
            .arg(manifest)
            .env("CARGO_TARGET_DIR", workspace.target("fuzz")),
    )
}
