//! Cargo's own tools that the habits need, installed below the target directory and kept.

use std::path::PathBuf;

use anyhow::{Result, bail};

use crate::step::Log;
use crate::workspace::Workspace;

/// Where `name` is, after installing it if neither we nor the user has it.
pub(crate) fn cargo_tool(workspace: &Workspace, log: &mut Log, name: &str) -> Result<PathBuf> {
    let ours = workspace.target("tools").join("bin").join(name);
    if ours.is_file() {
        return Ok(ours);
    }
    if let Some(theirs) = in_path(name) {
        return Ok(theirs);
    }
    let (installed, printed) = log.capture(
        workspace
            .cargo()
            .args(["install", "--locked", "--quiet", "--root"])
            .arg(workspace.target("tools"))
            // Shared between the tools, and kept apart from the workspace's own artifacts.
            .env("CARGO_TARGET_DIR", workspace.target("tools/build"))
            .arg(name),
    )?;
    if !installed {
        let why = printed.lines().last().unwrap_or("no reason given");
        bail!("cargo install {name} failed: {why}");
    }
    Ok(ours)
}

fn in_path(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path).map(|folder| folder.join(name)).find(|tool| tool.is_file())
}
