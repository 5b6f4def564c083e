//! `cargo xtask peers`: fetch the stock QEMUs, build the command, run the tests against them.

use std::path::PathBuf;

use anyhow::{Context as _, Result, ensure};
use whimbrel_peers::install::{FOLDER_VARIABLE, GIVEN_VARIABLE, install};
use whimbrel_peers::memory::HugePages;
use whimbrel_peers::whimbrel::BINARY_VARIABLE;

use crate::step::{Log, Outcome};
use crate::test::in_ci;
use crate::workspace::Workspace;

/// Two guests at a time: a machine with two processors still gives each what it needs.
const THREADS: &str = "--test-threads=2";

/// Pages of 2 MiB for two tests at a time, with a source and a destination of 32 MiB each.
const HUGE_PAGES: u64 = 2 * 2 * 16;

/// Which peer.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Test against this QEMU, instead of those fetched
    #[arg(long, value_name = "PATH")]
    qemu: Option<PathBuf>,
    /// Run only the tests whose name contains this
    filter: Option<String>,
}

/// `cargo xtask peers`, its output shown as it comes.
pub(crate) fn run(workspace: &Workspace, args: &Args) -> Result<bool> {
    let mut lacking = Lacking::default();
    if args.qemu.is_none() {
        lacking = fetch(workspace);
    }
    let _held = lacking.huge_pages();
    for line in &lacking.said {
        println!("not run: {line}");
    }
    ensure!(!lacking.essential || !in_ci(), "CI skips nothing essential");
    build_command(workspace, &mut Log::create(&workspace.target("xtask/build.log"))?)?;
    let mut command = tests(workspace, &lacking.filters);
    match &args.qemu {
        Some(path) => {
            let path = path.canonicalize().with_context(|| path.display().to_string())?;
            command.env(GIVEN_VARIABLE, path).arg("given::");
        }
        None => {
            command.args(["--skip", "given::"]);
        }
    }
    Ok(command.args(&args.filter).status()?.success())
}

/// The step of `cargo xtask test`.
pub(crate) fn step(workspace: &Workspace, log: &mut Log) -> Result<Outcome> {
    let mut lacking = fetch(workspace);
    let _held = lacking.huge_pages();
    build_command(workspace, log)?;
    let outcome = log.tests(tests(workspace, &lacking.filters).args(["--skip", "given::"]))?;
    Ok(match outcome {
        // What did run is in the log; what matters in the one line is what did not.
        Outcome::Passed(_) if !lacking.said.is_empty() => {
            Outcome::Skipped { why: lacking.said.join("; "), essential: lacking.essential }
        }
        other => other,
    })
}

/// What is not to be had: said in words, and as filters for the tests that need it.
#[derive(Default)]
struct Lacking {
    said: Vec<String>,
    filters: Vec<String>,
    /// Something is among it that every machine can have.
    essential: bool,
}

impl Lacking {
    /// Huge pages for the time of the tests; not every user may reserve them.
    fn huge_pages(&mut self) -> Option<HugePages> {
        match HugePages::reserve(HUGE_PAGES) {
            Ok(held) => Some(held),
            Err(why) => {
                self.said.push(format!("memory in huge pages: {why:#}"));
                self.filters.push("huge".to_owned());
                None
            }
        }
    }
}

fn fetch(workspace: &Workspace) -> Lacking {
    let missing = install(&workspace.target("peers"));
    let mut lacking = Lacking::default();
    for (peer, why) in missing.peers {
        lacking.said.push(format!("QEMU {}: {why}", peer.version()));
        lacking.filters.push(format!("v{}", peer.version().replace('.', "_")));
    }
    if let Some(why) = missing.linux {
        lacking.said.push(format!("the Linux guest: {why}"));
        lacking.filters.push("linux".to_owned());
    }
    lacking.essential = !lacking.said.is_empty();
    lacking
}

fn build_command(workspace: &Workspace, log: &mut Log) -> Result<()> {
    let (built, said) =
        log.capture(workspace.cargo().args(["build", "--locked", "--package", "whimbrel-cli"]))?;
    ensure!(built, "the whimbrel command does not build:\n{said}");
    Ok(())
}

fn tests(workspace: &Workspace, skips: &[String]) -> std::process::Command {
    let mut command = workspace.cargo();
    command
        .args(["test", "--locked", "--no-fail-fast", "--package", "whimbrel-peers", "--"])
        .args([THREADS, "--include-ignored"])
        .args(skips.iter().flat_map(|skip| ["--skip", skip]))
        .env(FOLDER_VARIABLE, workspace.target("peers"))
        .env(BINARY_VARIABLE, workspace.target("debug/whimbrel"))
        // An error here says what happened; where it was made is noise.
        .env("RUST_LIB_BACKTRACE", "0");
    command
}
