//! Rates of single parts, measured by the parts' own examples, which print one JSON object.

use anyhow::{Context as _, Result, bail};
use serde_json::Value;

use crate::workspace::Workspace;

/// Runs an example of a package, and gives its JSON object.
pub(crate) fn of_example(
    workspace: &Workspace,
    package: &str,
    example: &str,
    arguments: &[&str],
) -> Result<Value> {
    let output = workspace
        .cargo()
        .args(["run", "--quiet", "--release", "--locked", "--package", package])
        .args(["--example", example, "--"])
        .args(arguments)
        .output()?;
    let complaints = String::from_utf8_lossy(&output.stderr);
    if !output.status.success() {
        bail!("{package}'s {example}: {}", complaints.lines().last().unwrap_or("no reason"));
    }
    let printed = String::from_utf8_lossy(&output.stdout);
    serde_json::from_str(printed.trim())
        .with_context(|| format!("{package}'s {example} printed no JSON object"))
}
