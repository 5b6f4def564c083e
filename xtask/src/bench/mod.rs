//! `cargo xtask bench`: measurements.
#[derive(Debug, clap::Subcommand)]
pub(crate) enum Bench {}
pub(crate) fn run(_w: &crate::workspace::Workspace, which: &Bench) -> anyhow::Result<bool> {
    match *which {}
}
