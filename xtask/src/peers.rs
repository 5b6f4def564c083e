//! `cargo xtask peers`: fetch the stock QEMUs, build the command, run the tests against them.

use std::path::PathBuf;

use anyhow::{Context as _, Result, ensure};
use whimbrel_peers::install::{FOLDER_VARIABLE, GIVEN_VARIABLE, install};
use whimbrel_peers::whimbrel::BINARY_VARIABLE;

use crate::step::{Log, Outcome};
use crate::test::in_ci;
use crate::workspace::Workspace;

/// Two guests at a time: a machine with two processors still gives each what it needs.
const THREADS: &str = "--test-threads=2";

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
    let mut skips = Vec::new();
    if args.qemu.is_none() {
        let lacking = fetch(workspace);
        for line in &lacking.said {
            println!("not run: {line}");
        }
        ensure!(lacking.said.is_empty() || !in_ci(), "CI skips nothing essential");
        skips = lacking.filters;
    }
    build_command(workspace, &mut Log::create(&workspace.target("xtask/build.log"))?)?;
    let mut command = tests(workspace, &skips);
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
    let lacking = fetch(workspace);
    build_command(workspace, log)?;
    let outcome = log.tests(tests(workspace, &lacking.filters).args(["--skip", "given::"]))?;
    Ok(match outcome {
        // What did run is in the log; what matters in the one line is what did not.
        Outcome::Passed(_) if !lacking.said.is_empty() => {
            Outcome::Skipped { why: lacking.said.join("; "), essential: true }
        }
        other => other,
    })
}

/// What could not be fetched: said in words, and as filters for the tests that need it.
struct Lacking {
    said: Vec<String>,
    filters: Vec<String>,
}

fn fetch(workspace: &Workspace) -> Lacking {
    let missing = install(&workspace.target("peers"));
    let mut lacking = Lacking { said: Vec::new(), filters: Vec::new() };
    for (peer, why) in missing.peers {
        lacking.said.push(format!("QEMU {}: {why}", peer.version()));
        lacking.filters.push(format!("v{}", peer.version().replace('.', "_")));
    }
    if let Some(why) = missing.linux {
        lacking.said.push(format!("the Linux guest: {why}"));
        lacking.filters.push("linux".to_owned());
    }
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
