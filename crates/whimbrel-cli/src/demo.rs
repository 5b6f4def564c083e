//! `whimbrel demo`: a busy guest moves between two processes, and its memory is verified.

mod child;
mod verdict;

use std::time::Duration;

use clap::{Args, ValueEnum};
use serde_json::{Value, json};
use whimbrel_vm::parse_size;

use crate::failure::Failure;
use crate::migrate::Run;
use crate::monitor::{RAM_DIGEST, SELF_CHECK, VM_INFO};
use crate::progress::mib;
use crate::vm_options::VmOptions;
use child::Child;
use verdict::Verdict;

/// Migrate a busy guest between two processes on this machine.
#[derive(Debug, Args)]
pub(crate) struct Demo {
    /// How to migrate
    #[arg(long, default_value = "precopy")]
    mode: Mode,
    #[command(flatten)]
    vm: VmOptions,
    /// Bytes a second at most, with k, M, G; 0 is without limit
    #[arg(long, default_value = "0", value_parser = parse_size, value_name = "RATE")]
    bandwidth: u64,
    /// How long the guest may stand still, in ms
    #[arg(long, default_value_t = 300, value_name = "MS")]
    downtime_limit: u64,
    /// Do not slow down a guest that dirties memory faster than the link
    #[arg(long)]
    no_auto_converge: bool,
    /// How long the guest runs before it is moved, in ms
    #[arg(long, default_value_t = 500, value_name = "MS")]
    warm_up: u64,
    /// Give up when it has not converged after so many seconds
    #[arg(long, default_value_t = 120, value_name = "SECONDS")]
    timeout: u64,
    /// Print one JSON object, under QMP's names
    #[arg(long)]
    json: bool,
}

/// How to migrate.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Mode {
    /// All of RAM before the guest runs at the destination.
    Precopy,
}

/// How long the guest runs at the destination before it is asked how it is.
const AFTERWARDS: Duration = Duration::from_millis(500);

impl Demo {
    pub(crate) fn run(self) -> Result<(), Failure> {
        let folder = tempfile::Builder::new().prefix("whimbrel-demo-").tempdir()?;
        let options = self.vm.to_arguments();
        let mut source = Child::start("source", folder.path(), &options, &[])?;
        // The destination stands still at first, so that its RAM can be compared.
        let waits = ["--incoming=defer", "--paused"];
        let mut destination = Child::start("destination", folder.path(), &options, &waits)?;
        let report = self.migrate(&mut source, &mut destination)?;
        let verdict = verify(&mut source, &mut destination)?;
        let info = source.qmp.execute(VM_INFO, json!({}))?;
        self.tell(&report, &verdict, &info);
        source.quit()?;
        destination.quit()?;
        match verdict.failure() {
            None => Ok(()),
            Some(why) => Err(Failure::new(why)),
        }
    }

    fn migrate(&self, source: &mut Child, destination: &mut Child) -> Result<Value, Failure> {
        std::thread::sleep(Duration::from_millis(self.warm_up));
        if !self.json {
            let info = source.qmp.execute(VM_INFO, json!({}))?;
            eprintln!(
                "a guest with {} of RAM runs '{}' on {}; moving it to another process",
                mib(self.vm.memory),
                self.vm.workload,
                info["accel"].as_str().unwrap_or("?"),
            );
        }
        for side in [&mut *source, &mut *destination] {
            side.qmp.set_capability_named("return-path", true)?;
        }
        source.qmp.set_capability_named("auto-converge", !self.no_auto_converge)?;
        source.qmp.set_parameters(json!({
            "max-bandwidth": self.bandwidth,
            "downtime-limit": self.downtime_limit,
        }))?;
        let timeout = Some(Duration::from_secs(self.timeout));
        let mut run = Run { from: &mut source.qmp, to: &mut destination.qmp, timeout };
        run.go("tcp:127.0.0.1:0")
    }

    fn tell(&self, report: &Value, verdict: &Verdict, info: &Value) {
        let mode = self.mode.to_possible_value().map(|m| m.get_name().to_owned());
        let mut object = json!({
            "mode": mode,
            "accel": info["accel"],
            "dirty-log": info["dirty-log"],
            "workload": info["workload"],
            "memory-bytes": self.vm.memory,
            "page-size": self.vm.page_size.bytes(),
            "status": report["status"],
            "total-time": report["total-time"],
            "setup-time": report["setup-time"],
            "downtime": report["downtime"],
            "ram": report["ram"],
            "verified": verdict.failure().is_none(),
            "guest-updates": verdict.updates(),
        });
        if self.json {
            if let Some(why) = verdict.failure() {
                object["error-desc"] = why.into();
            }
            println!("{object}");
            return;
        }
        let number = |name: &str| report[name].as_u64().unwrap_or(0);
        let ram = |name: &str| report["ram"][name].as_u64().unwrap_or(0);
        println!("status      {}", report["status"].as_str().unwrap_or("?"));
        println!("total time  {} ms (setup {} ms)", number("total-time"), number("setup-time"));
        println!("downtime    {} ms", number("downtime"));
        println!(
            "RAM         {} of {} sent, {} pages with content, {} zero, {} passes",
            mib(ram("transferred")),
            mib(ram("total")),
            ram("normal"),
            ram("duplicate"),
            ram("dirty-sync-count"),
        );
        println!("verified    {verdict}");
    }
}

/// Compares all of RAM while both guests stand still, then lets the guest go on and asks it.
fn verify(source: &mut Child, destination: &mut Child) -> Result<Verdict, Failure> {
    let left = source.qmp.execute(RAM_DIGEST, json!({}))?;
    let arrived = destination.qmp.execute(RAM_DIGEST, json!({}))?;
    let before = destination.qmp.execute(SELF_CHECK, json!({}))?;
    destination.qmp.cont()?;
    std::thread::sleep(AFTERWARDS);
    destination.qmp.stop()?;
    let after = destination.qmp.execute(SELF_CHECK, json!({}))?;
    Ok(Verdict { left, arrived, before, after })
}
