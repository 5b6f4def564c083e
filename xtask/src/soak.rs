//! `cargo xtask soak`: a guest that checks itself is moved back and forth, hundreds of times.

use anyhow::Result;

use crate::workspace::Workspace;

/// How often, and drawn from what.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// How many migrations
    #[arg(long, default_value_t = 200)]
    runs: u32,
    /// Draw what an earlier run has drawn
    #[arg(long)]
    seed: Option<u64>,
}

/// The test of the same name, its output shown.
pub(crate) fn run(workspace: &Workspace, args: &Args) -> Result<bool> {
    let mut command = workspace.cargo();
    command
        .args(["test", "--locked", "--release", "--package", "whimbrel", "--test", "soak"])
        .args(["--", "--nocapture"])
        .env("WHIMBREL_SOAK", args.runs.to_string());
    if let Some(seed) = args.seed {
        command.env("WHIMBREL_SEED", seed.to_string());
    }
    Ok(command.status()?.success())
}
