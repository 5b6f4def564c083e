//! The reference VMs of this bench, and what both parts do with them.

use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use serde_json::json;
use whimbrel_peers::qmp::{Event, Qmp};

use crate::bench::contender::{Memory, Side};
use crate::bench::network::{DESTINATION_ADDRESS, End, Network};

/// For anything that is waited for.
pub(super) const MIGRATION_MAX: Duration = Duration::from_secs(300);
const CAPABILITIES: [&str; 4] = ["events", "return-path", "postcopy-ram", "postcopy-preempt"];

/// Starts one: the source with its guest, the destination waiting.
pub(super) fn start(
    binary: &Path,
    folder: &Path,
    network: &Network,
    end: End,
    memory: Memory,
    options: &[&str],
) -> Result<Side> {
    let mut command = Command::new(binary);
    command.args(["vm", "--accel", "native", "--vcpus", "1", "--serial", "none"]);
    command.args(["--memory", &memory.argument()]).args(options);
    if end == End::Destination {
        command.args(["--incoming", "defer"]);
    }
    command.arg("--qmp");
    Side::start(network.at(end, &command), &folder.join(name(end)), |socket| {
        format!("unix:{}", socket.display())
    })
}

/// What the files of an end are called.
pub(super) fn name(end: End) -> &'static str {
    match end {
        End::Source => "source",
        End::Destination => "destination",
    }
}

/// Sets both ends, and has the destination wait; says where.
pub(super) fn prepare(source: &mut Qmp, destination: &mut Qmp, silence_ms: u64) -> Result<String> {
    for qmp in [&mut *source, &mut *destination] {
        qmp.execute("migrate-set-parameters", &json!({ "silence-limit": silence_ms }))?;
    }
    listen(source, destination)
}

/// The same for any VMM.
pub(super) fn listen(source: &mut Qmp, destination: &mut Qmp) -> Result<String> {
    source.enable(&CAPABILITIES)?;
    destination.enable(&CAPABILITIES)?;
    wait_at(destination, "migrate-incoming")
}

/// Has a destination wait, by this command; says where.
pub(super) fn wait_at(destination: &mut Qmp, command: &str) -> Result<String> {
    destination.execute(command, &json!({ "uri": format!("tcp:{DESTINATION_ADDRESS}:0") }))?;
    let report = destination.execute("query-migrate", &json!({}))?;
    let port = report["socket-address"][0]["port"].as_str().context("no port to go to")?;
    Ok(format!("tcp:{DESTINATION_ADDRESS}:{port}"))
}

/// Migrates, by postcopy at once; both ends are in it then.
pub(super) fn begin_postcopy(source: &mut Qmp, destination: &mut Qmp, uri: &str) -> Result<()> {
    source.migrate(uri)?;
    until(source, "active", MIGRATION_MAX)?;
    source.execute("migrate-start-postcopy", &json!({}))?;
    until(source, "postcopy-active", MIGRATION_MAX)?;
    until(destination, "postcopy-active", MIGRATION_MAX)?;
    Ok(())
}

/// Waits for a state that is still to be told of; gives when it began.
pub(super) fn until(qmp: &mut Qmp, status: &str, limit: Duration) -> Result<Duration> {
    let begun = Instant::now();
    loop {
        let left = limit.saturating_sub(begun.elapsed());
        let Event { data, at, .. } =
            qmp.wait_event("MIGRATION", left).with_context(|| format!("waiting for {status}"))?;
        match data["status"].as_str() {
            Some(now) if now == status => return Ok(at),
            Some(ended @ ("failed" | "cancelled" | "completed")) => {
                bail!("the migration is {ended}, not {status}")
            }
            Some(_) | None => {}
        }
    }
}
