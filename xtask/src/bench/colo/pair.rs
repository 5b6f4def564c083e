//! The contenders: how a pair of each is started, brought into step, and measured.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use serde_json::{Value, json};
use whimbrel_peers::qmp::{Event, Qmp};
use whimbrel_peers::wait;

use super::figures::{Figures, stops_ms};
use super::scenario::Scenario;
use crate::bench::contender::{Qemu, Side};
use crate::bench::multifd::ticker;
use crate::bench::network::{End, Way};

/// From power on to the first tick: the firmware, without KVM.
const BOOT_MAX: Duration = Duration::from_secs(60);
/// The migration that COLO begins with.
const BEGIN_MAX: Duration = Duration::from_secs(120);

/// Who keeps a guest in step.
#[derive(Debug, Clone)]
pub(super) enum Contender {
    Whimbrel { binary: PathBuf },
    Qemu { qemu: Qemu, version: String },
}

/// What does not change from run to run.
#[derive(Debug, Clone)]
pub(super) struct Setup {
    pub(super) delay_ms: u32,
    pub(super) seconds: u32,
    /// For what is made for each run.
    pub(super) folder: PathBuf,
}

/// The first version whose primary stays in step, and needs nothing on its command line for it.
const QEMU_MIN: (u32, u32) = (11, 1);

/// Why a QEMU of this version cannot be measured, if it cannot.
pub(super) fn too_old(version: &str) -> Option<String> {
    let mut parts = version.split('.').map(str::parse::<u32>);
    let (major, minor) = QEMU_MIN;
    match (parts.next(), parts.next()) {
        (Some(Ok(one)), Some(Ok(other))) if (one, other) >= QEMU_MIN => None,
        (Some(Ok(_)), Some(Ok(_))) => Some(format!(
            "its COLO is another one, or broken (QEMU 10.0 as a primary ends as a plain migration): \
             {major}.{minor} or later is needed"
        )),
        _ => Some(format!("{version:?} is no version that can be told from {major}.{minor}")),
    }
}

impl Contender {
    pub(super) fn name(&self) -> String {
        match self {
            Self::Whimbrel { .. } => "whimbrel".to_owned(),
            Self::Qemu { version, .. } => format!("QEMU {version}"),
        }
    }

    /// One pair: brought into step, and kept so for some seconds.
    pub(super) fn run(&self, scenario: Scenario, setup: &Setup, way: Way<'_>) -> Result<Figures> {
        let mut primary = self.start(End::Source, scenario, setup, way)?;
        let mut secondary = self.start(End::Destination, scenario, setup, way)?;
        for qmp in [&mut primary.qmp, &mut secondary.qmp] {
            configure(qmp, scenario, setup)?;
        }
        let uri = json!({ "uri": format!("tcp:{}:0", way.destination()) });
        secondary.qmp.execute("migrate-incoming", &uri)?;
        let report = secondary.qmp.execute("query-migrate", &json!({}))?;
        let port = report["socket-address"][0]["port"].as_str().context("no port to go to")?;
        if matches!(self, Self::Qemu { .. }) {
            settle(&mut primary.qmp, setup)?;
        }
        primary.qmp.migrate(&format!("tcp:{}:{port}", way.destination()))?;
        until_in_step(&mut primary.qmp)?;

        let before = query(&mut primary.qmp)?;
        let cpu = (primary.cpu()?, secondary.cpu()?);
        // Their events wait in the sockets meanwhile: nobody reads, and nobody is disturbed.
        std::thread::sleep(Duration::from_secs(setup.seconds.into()));
        let cpu = (primary.cpu()? - cpu.0, secondary.cpu()? - cpu.1);
        let after = query(&mut primary.qmp)?;
        let events = events_so_far(&mut primary.qmp)?;
        let beside = secondary.qmp.execute("query-migrate", &json!({}))?;
        let stops_ms = stops_ms(&events);
        if stops_ms.is_empty() {
            bail!("no STOP and RESUME of a checkpoint in {} s", setup.seconds);
        }
        let more = |of: &dyn Fn(&Value) -> Option<f64>| Some(of(&after)? - of(&before)?);
        let own = |report: &Value| report.get("x-colo").cloned();
        Ok(Figures {
            stops_ms,
            primary: own(&after),
            secondary: own(&beside),
            pages: more(&|report| {
                let ram = &report["ram"];
                Some(ram["normal"].as_f64()? + ram["duplicate"].as_f64()?)
            }),
            bytes: more(&|report| report["ram"]["transferred"].as_f64()),
            seconds: f64::from(setup.seconds),
            primary_cpu_s: cpu.0,
            secondary_cpu_s: cpu.1,
        })
    }

    fn start(&self, end: End, scenario: Scenario, setup: &Setup, way: Way<'_>) -> Result<Side> {
        let (mut command, option) = match self {
            Self::Whimbrel { binary } => (whimbrel(binary, scenario), "--qmp"),
            Self::Qemu { qemu, .. } => (qemu_command(qemu.command()?, scenario, setup)?, "-qmp"),
        };
        if end == End::Destination {
            let option = if option == "-qmp" { "-incoming" } else { "--incoming" };
            command.args([option, "defer"]);
        }
        command.arg(option);
        let name = match end {
            End::Source => "primary",
            End::Destination => "secondary",
        };
        Side::start(way.at(end, command), &setup.folder.join(name), |socket| match self {
            Self::Whimbrel { .. } => format!("unix:{}", socket.display()),
            Self::Qemu { .. } => format!("unix:{},server=on,wait=off", socket.display()),
        })
    }
}

fn whimbrel(binary: &Path, scenario: Scenario) -> Command {
    let working_set = scenario.working_set_mib();
    let workload = match scenario.pages_per_second() {
        0 => "idle,working-set=1M".to_owned(),
        rate => format!("uniform,rate={rate},working-set={working_set}M"),
    };
    let mut command = Command::new(binary);
    command.args(["vm", "--accel", "native", "--vcpus", "1", "--serial", "none"]).args([
        "--memory",
        &scenario.memory.argument(),
        "--workload",
        &workload,
    ]);
    command
}

fn qemu_command(mut command: Command, scenario: Scenario, setup: &Setup) -> Result<Command> {
    let image = setup.folder.join("guest");
    let content = match scenario.pages_per_second() {
        0 => ticker::still(),
        rate => ticker::image(rate, scenario.working_set_mib()),
    };
    fs::write(&image, content)?;
    command
        .args(["-accel", "tcg", "-machine", "q35", "-nodefaults", "-no-user-config"])
        .args(["-display", "none", "-m", &scenario.memory.argument(), "-kernel"])
        .arg(image);
    Ok(command)
}

fn configure(qmp: &mut Qmp, scenario: Scenario, setup: &Setup) -> Result<()> {
    let mut capabilities = vec!["events", "return-path", "x-colo"];
    let mut parameters = json!({ "x-checkpoint-delay": setup.delay_ms, "max-bandwidth": 0 });
    if scenario.channels > 0 {
        capabilities.push("multifd");
        parameters["multifd-channels"] = json!(scenario.channels);
    }
    qmp.enable(&capabilities)?;
    qmp.execute("migrate-set-parameters", &parameters).map(drop)
}

/// Waits until the guest of a QEMU has booted.
fn settle(qmp: &mut Qmp, setup: &Setup) -> Result<()> {
    let piece = setup.folder.join("piece");
    let place =
        json!({ "val": ticker::RECORD_AT, "size": ticker::RECORD_BYTES, "filename": piece });
    wait::until("the guest to begin", BOOT_MAX, || {
        qmp.execute("pmemsave", &place)?;
        Ok(ticker::ticks(&fs::read(&piece)?).filter(|ticks| *ticks > 0).map(drop))
    })
}

fn until_in_step(qmp: &mut Qmp) -> Result<()> {
    loop {
        let event = qmp.wait_event("MIGRATION", BEGIN_MAX)?;
        match event.data["status"].as_str() {
            Some("colo") => return Ok(()),
            Some(ended @ ("failed" | "cancelled" | "completed")) => {
                let report = qmp.execute("query-migrate", &json!({}))?;
                let why = report["error-desc"].as_str().unwrap_or("no reason");
                bail!("it is {ended}, and not in step: {why}")
            }
            Some(_) | None => {}
        }
    }
}

/// The primary's report, while it is in step.
fn query(qmp: &mut Qmp) -> Result<Value> {
    let report = qmp.execute("query-migrate", &json!({}))?;
    match report["status"].as_str() {
        Some("colo") => Ok(report),
        _ => bail!("it is in step no more: {report}"),
    }
}

/// All that came before the last answer.
fn events_so_far(qmp: &mut Qmp) -> Result<Vec<Event>> {
    let mut events = Vec::new();
    while let Ok(event) = qmp.next_event(Duration::ZERO) {
        events.push(event);
    }
    if events.iter().any(|event| event.name == "COLO_EXIT") {
        bail!("the pair has fallen apart");
    }
    Ok(events)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_qemu_that_does_not_stay_in_step_is_told_from_one_that_does() {
        for fine in ["11.1.0", "11.1.3", "11.2", "12.0.50"] {
            assert_eq!(too_old(fine), None, "{fine}");
        }
        for old in ["7.2.22", "10.0.2", "10.2.2", "11.0.4"] {
            assert!(too_old(old).unwrap().contains("11.1 or later"), "{old}");
        }
        assert!(too_old("unknown").unwrap().contains("no version"));
    }
}
