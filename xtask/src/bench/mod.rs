//! `cargo xtask bench`: measurements, the contenders interleaved in one run so that whatever else
//! the machine does falls on all of them alike.

use anyhow::Result;

use crate::workspace::Workspace;

mod colo;
mod contender;
mod control;
mod host_memory;
mod janitor;
mod kept;
mod metric;
mod multiboot;
mod multifd;
mod network;
mod plain;
mod postcopy;
mod precopy;
mod rates;
mod recovery;
mod sample;
mod scratch;
mod zero_copy;

/// What to measure.
#[derive(Debug, clap::Subcommand)]
pub(crate) enum Bench {
    /// One channel of precopy over loopback: ours, QEMU's, and a plain send and receive
    Precopy(precopy::Args),
    /// Postcopy over slow links, from and to ours and QEMU: what its faults wait (needs root)
    Postcopy(postcopy::Args),
    /// Links that break in postcopy: what is sent again, and how soon it goes on (needs root)
    Recovery(recovery::Args),
    /// Multifd: several channels, compressed, encrypted, over loopback and slow links (these need root)
    Multifd(multifd::Args),
    /// Two VMs in step (COLO): for how long the guest stands still (slow links need root)
    Colo(colo::Args),
    /// Whether sending without a copy (MSG_ZEROCOPY) pays on this machine
    ZeroCopy(zero_copy::Args),
    /// How long the control sockets take to answer while a guest moves, ours and QEMU's
    Control(control::Args),
    /// A VM into a file and out of it, by way of whimbrel and by QEMU alone (cold reads need root)
    Kept(kept::Args),
    /// One end of the plain transfer: a process of its own, so that its processor time is
    #[command(hide = true)]
    PlainEnd(plain::Args),
    /// One end of an idle link
    #[command(hide = true)]
    RoundTripEnd(postcopy::idle::Args),
    /// A client of a control socket
    #[command(hide = true)]
    ControlAsker(control::asker::Args),
    /// Undoes what a bench has made, when the bench is gone
    #[command(hide = true)]
    Janitor,
}

/// Measures. Says whether every run succeeded.
pub(crate) fn run(workspace: &Workspace, which: &Bench) -> Result<bool> {
    match which {
        Bench::Precopy(args) => precopy::run(workspace, args),
        Bench::Postcopy(args) => postcopy::run(workspace, args),
        Bench::Recovery(args) => recovery::run(workspace, args),
        Bench::Multifd(args) => multifd::run(workspace, args),
        Bench::Colo(args) => colo::run(workspace, args),
        Bench::ZeroCopy(args) => zero_copy::run(workspace, args),
        Bench::Control(args) => control::run(workspace, args),
        Bench::ControlAsker(args) => control::asker::run(args),
        Bench::Kept(args) => kept::run(workspace, args),
        Bench::PlainEnd(args) => plain::run(args),
        Bench::RoundTripEnd(args) => postcopy::idle::run(args),
        Bench::Janitor => janitor::run(),
    }
}
