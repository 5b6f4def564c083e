//! `whimbrel demo --mode colo`: a guest answers a client, its process is killed, and the client goes
//! on with the VM that was kept in step.

use std::fmt::Write;
use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use whimbrel::{ColoStats, Latency, MigrationStatus, MultifdCompression};
use whimbrel_vm::net::{Client, Hub, NetConfig};
use whimbrel_vm::{Accel, AccelChoice};

use super::chart::duration;
use super::child::Child;
use super::{AFTERWARDS, Demo};
use crate::failure::Failure;
use crate::monitor::SELF_CHECK;
use crate::progress::mib;

/// The client, in the network in which a VM's guest is if nobody says otherwise.
const CLIENT: NetConfig = NetConfig { mac: [0x52, 0x54, 0, 0x12, 0x34, 0x57], ip: [10, 0, 2, 2] };
const GUEST_IP: [u8; 4] = [10, 0, 2, 15];

/// How long anything may take that the demo waits for: a machine can be busy.
const LIMIT: Duration = Duration::from_secs(60);

/// What there is to tell.
struct Outcome {
    delay_ms: u64,
    memory: u64,
    channels: u8,
    workload: String,
    /// Until the primary was killed.
    in_step: Duration,
    stats: ColoStats,
    /// Answers, and the longest wait for one, before the primary was killed.
    before: (u64, Duration),
    /// From that moment to the next answer.
    takeover: Duration,
    /// Answers from the survivor.
    after: u64,
    check: Value,
}

pub(super) fn run(demo: &Demo) -> Result<(), Failure> {
    if demo.report.is_some() {
        return Err(Failure::new("'--report' shows a migration: not with '--mode colo'"));
    }
    if demo.vm.accel == AccelChoice::Kvm {
        return Err(Failure::new(
            "the guest on KVM has no driver for a network: take '--accel native' with '--mode colo'",
        ));
    }
    let folder = tempfile::Builder::new().prefix("whimbrel-demo-").tempdir()?;
    let outcome = keep_in_step(demo, folder.path())?;
    match demo.json {
        true => println!("{}", outcome.to_json()),
        false => print!("{}", outcome.summary()),
    }
    match outcome.is_verified() {
        true => Ok(()),
        false => Err(Failure::new(format!("not verified: {}", outcome.check))),
    }
}

fn keep_in_step(demo: &Demo, folder: &Path) -> Result<Outcome, Failure> {
    let hub = Hub::bind(&folder.join("hub"))?;
    let mut options = demo.vm.to_arguments();
    options.retain(|option| !option.starts_with("--accel="));
    options.push(format!("--accel={}", Accel::Native));
    options.push(format!("--net=unix:{}", folder.join("hub").display()));
    let mut primary = Child::start("primary", folder, &options, &[])?;
    // A process that was killed is there until it has been waited for.
    let fence = format!("--fence=while kill -0 {} 2>&-; do sleep 0.01; done", primary.id());
    let waits = ["--incoming=defer", &fence];
    let mut secondary = Child::start("secondary", folder, &options, &waits)?;
    let mut client = Client::new(CLIENT, GUEST_IP, 49152, hub.now());

    let delay_ms = demo.checkpoint_delay;
    for side in [&mut primary, &mut secondary] {
        side.qmp.set_capabilities_named(&[("return-path", true), ("x-colo", true)])?;
        if demo.channels > 0 {
            side.qmp.set_capability_named("multifd", true)?;
            side.qmp.set_parameters(json!({
                "multifd-channels": demo.channels,
                "multifd-compression": MultifdCompression::from(demo.compression),
            }))?;
        }
    }
    primary.qmp.set_parameters(json!({
        "x-checkpoint-delay": delay_ms,
        "max-bandwidth": demo.bandwidth,
    }))?;
    secondary.qmp.migrate_incoming("tcp:127.0.0.1:0")?;
    let report = secondary.qmp.query_migrate()?;
    let address = match report.raw["socket-address"][0]["port"].as_str() {
        Some(port) => format!("tcp:127.0.0.1:{port}"),
        None => return Err(Failure::new("the secondary does not say where it waits")),
    };
    if !demo.json {
        eprintln!(
            "a guest with {} of RAM answers a client over TCP, and a second VM is kept in step",
            mib(demo.vm.memory)
        );
    }
    if !hub.serve(&mut client, LIMIT, |client| client.answered() > 0)? {
        return Err(Failure::new("the guest does not answer the client"));
    }
    primary.qmp.migrate(&address)?;
    let begun = Instant::now();
    while primary.qmp.query_migrate()?.status.name() != MigrationStatus::Colo.name() {
        if begun.elapsed() > LIMIT {
            let raw = primary.qmp.query_migrate()?.raw;
            return Err(Failure::new(format!("the VMs do not come into step: {raw}")));
        }
        hub.serve(&mut client, Duration::from_millis(20), |_| false)?;
    }
    let in_step = Instant::now();
    client.forget_wait();
    let answered = client.answered();
    hub.serve(&mut client, Duration::from_millis(demo.in_step), |_| false)?;
    let stats = primary.qmp.query_migrate()?.info.colo.unwrap_or_default();
    let before = (client.answered() - answered, client.longest_wait());

    primary.kill()?;
    let (in_step, killed) = (in_step.elapsed(), hub.now());
    let answered = client.answered();
    // What was under way when it was killed may still come: the next answers are the survivor's.
    let goes_on = |client: &Client| client.answered() > answered + IN_FLIGHT;
    if !hub.serve(&mut client, LIMIT, goes_on)? {
        let raw = secondary.qmp.query_migrate()?.raw;
        return Err(Failure::new(format!("the client has no answer from the secondary: {raw}")));
    }
    let takeover = client.last_answer() - killed;
    hub.serve(&mut client, AFTERWARDS, |_| false)?;
    secondary.qmp.stop()?;
    let check = secondary.qmp.execute(SELF_CHECK, json!({}))?;
    let outcome = Outcome {
        delay_ms,
        memory: demo.vm.memory,
        channels: demo.channels,
        workload: demo.vm.workload.to_string(),
        in_step,
        stats,
        before,
        takeover,
        after: client.answered() - answered,
        check,
    };
    secondary.quit()?;
    Ok(outcome)
}

/// Requests that a client has under way.
const IN_FLIGHT: u64 = 4;

impl Outcome {
    fn is_verified(&self) -> bool {
        self.check["passed"] == true && self.after > 0 && self.stats.checkpoints > 0
    }

    fn to_json(&self) -> Value {
        let ms = |time: Duration| time.as_micros() as f64 / 1000.0;
        json!({
            "mode": "colo",
            "accel": Accel::Native.name(),
            "workload": self.workload,
            "memory-bytes": self.memory,
            "channels": self.channels,
            "status": "completed",
            "x-checkpoint-delay": self.delay_ms,
            "x-colo": self.stats,
            "in-step-ms": ms(self.in_step),
            "answers-before": self.before.0,
            "longest-wait-before-ms": ms(self.before.1),
            "takeover-ms": ms(self.takeover),
            "answers-after": self.after,
            "verified": self.is_verified(),
            "self-check": self.check,
        })
    }

    fn summary(&self) -> String {
        let mut text = String::new();
        let mut row = |name: &str, value: &str| {
            let _infallible = writeln!(text, "{name:<11} {value}");
        };
        let us = |time: Duration| duration(time.as_micros() as f64);
        let stats = &self.stats;
        let pages = stats.pages.checked_div(stats.checkpoints).unwrap_or(0);
        let rate = self.before.0 as f64 / self.in_step.as_secs_f64();
        row(
            "in step",
            &format!(
                "{}: {} checkpoints, {} ms and their own time apart, {pages} pages each",
                us(self.in_step),
                stats.checkpoints,
                self.delay_ms
            ),
        );
        row("", "");
        row("", "              mean       p50       p90       p99       max");
        for (name, Latency { mean, p50, p90, p99, max }) in
            [("guest stop", stats.stop_us), ("memory", stats.memory_us)]
        {
            let cells = [mean, p50, p90, p99, max].map(|us| format!("{:>10}", duration(us)));
            row(name, &format!("        {}", cells.concat()));
        }
        row("", "");
        row(
            "client",
            &format!(
                "{} answers ({rate:.0}/s), {} at most for one: held until a checkpoint is complete",
                self.before.0,
                us(self.before.1)
            ),
        );
        row("killed", "the primary (SIGKILL)");
        row(
            "client",
            &format!(
                "goes on after {} on the same connection: {} answers, each checked",
                us(self.takeover),
                self.after
            ),
        );
        let verified = match self.is_verified() {
            true => format!("{} updates of the guest, self-check passed", self.check["updates"]),
            false => format!("no: {}", self.check),
        };
        row("verified", &verified);
        let lines: Vec<&str> = text.lines().map(str::trim_end).collect();
        lines.join("\n") + "\n"
    }
}
