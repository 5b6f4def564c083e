//! The `whimbrel` command.
//!
//! Exit status 0 means that what was asked for was done and verified; every error is one line on
//! the standard error.
#![forbid(unsafe_code)]

mod demo;
mod drive;
mod failure;
mod fence;
mod file_access;
mod inspect;
mod migrate;
mod monitor;
mod multifd_options;
mod network;
mod progress;
mod receive;
mod receiving;
mod recover_options;
mod recovery;
mod rescue;
mod restore;
mod signals;
mod standby;
mod tls;
mod tls_options;
mod vm;
mod vm_options;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Live migration for virtual machines, speaking QEMU's migration protocol.
#[derive(Debug, Parser)]
#[command(name = "whimbrel", version, propagate_version = true, max_term_width = 100)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Migrate a busy guest between two processes on this machine, and verify its memory.
    Demo(demo::Demo),
    /// Run the reference VM: a guest that keeps checking its own memory.
    Vm(vm::RunVm),
    /// Drive a migration between two VMs through their QMP sockets (whimbrel's or QEMU's).
    Migrate(migrate::Migrate),
    /// Take in a migration from QEMU or whimbrel and keep it in a file.
    Receive(receive::Receive),
    /// Send a kept VM to a QEMU or whimbrel that waits for it.
    Restore(restore::Restore),
    /// Keep the newest checkpoint of a guest that runs elsewhere, for when its host is lost.
    Standby(standby::Standby),
    /// Bring back a guest of which one side of a postcopy is gone for good.
    Rescue(rescue::Rescue),
    /// Make a CA and certificates, for migration over TLS.
    Tls(tls::Tls),
    /// Show what a recorded stream or a kept VM holds, and what is wrong with it.
    Inspect(inspect::Inspect),
}

fn main() -> ExitCode {
    let result = match Cli::parse().command {
        Command::Demo(demo) => demo.run(),
        Command::Vm(vm) => vm.run(),
        Command::Migrate(migrate) => migrate.run(),
        Command::Receive(receive) => receive.run(),
        Command::Restore(restore) => restore.run(),
        Command::Standby(standby) => standby.run(),
        Command::Rescue(rescue) => rescue.run(),
        Command::Tls(tls) => tls.run(),
        Command::Inspect(inspect) => inspect.run(),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            eprintln!("whimbrel: {failure}");
            ExitCode::FAILURE
        }
    }
}
