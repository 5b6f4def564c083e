//! A postcopy whose link breaks, with a stock QEMU at one end, or at both.

use std::time::Duration;

use anyhow::{Result, ensure};
use serde_json::json;
use whimbrel_peers::guest::BootSector;
use whimbrel_peers::install::Peer;
use whimbrel_peers::journey::{Journey, MIGRATION_MAX};
use whimbrel_peers::on_each_peer;
use whimbrel_peers::qemu::Qemu;

/// So slow that there is always something left to be sent.
const SLOW: &str = "200k";

fn unlimited(source: &mut Qemu) -> Result<()> {
    let parameters = json!({ "max-bandwidth": 0, "max-postcopy-bandwidth": 0 });
    source.qmp.execute("migrate-set-parameters", &parameters).map(drop)
}

/// Two QEMUs, and a whimbrel that does nothing but drive them: a broken link is news to it.
fn driven(peer: Peer, more: &[&str]) -> Result<()> {
    let guest = BootSector { seed: 91 };
    let journey = Journey::new(peer.machine(), &guest)?;
    let mut source = journey.boot(peer)?;
    let mut destination = journey.incoming(peer)?;
    let (from, to) = (source.other_control(), destination.other_control());
    let command = ["migrate", &from, &to, "--postcopy", "--postcopy-after=0", "--bandwidth", SLOW];
    let mut migrate = journey.start_whimbrel(&[&command, more].concat())?;
    for breaks_at_source in [true, false, true] {
        source.wait_status("postcopy-active", MIGRATION_MAX)?;
        destination.wait_status("postcopy-active", MIGRATION_MAX)?;
        std::thread::sleep(Duration::from_millis(200));
        let side = if breaks_at_source { &mut source } else { &mut destination };
        side.qmp.execute("migrate-pause", &json!({}))?;
    }
    // Not as soon as the command was given: until then it may not have broken yet.
    std::thread::sleep(Duration::from_millis(200));
    source.wait_status("postcopy-active", MIGRATION_MAX)?;
    unlimited(&mut source)?;
    let ended = migrate.wait(MIGRATION_MAX)?.succeeded()?;
    ensure!(ended.output.contains("migrated "), "{}", ended.output);
    source.wait_migrated(MIGRATION_MAX)?;
    destination.wait_migrated(MIGRATION_MAX)?;
    journey.check_arrived(&source, &destination)
}

fn migrate_recovers_two_qemus(peer: Peer) -> Result<()> {
    driven(peer, &[])
}

fn migrate_recovers_two_qemus_with_preempt(peer: Peer) -> Result<()> {
    driven(peer, &["--preempt"])
}

/// Nothing is done by itself where that was not wanted: one line says what is missing where.
fn migrate_leaves_two_qemus_alone(peer: Peer) -> Result<()> {
    let guest = BootSector { seed: 92 };
    let journey = Journey::new(peer.machine(), &guest)?;
    let mut source = journey.boot(peer)?;
    let mut destination = journey.incoming(peer)?;
    let (from, to) = (source.other_control(), destination.other_control());
    let command = ["migrate", &from, &to, "--postcopy", "--postcopy-after=0", "--bandwidth", SLOW];
    let mut migrate = journey.start_whimbrel(&[&command[..], &["--no-recover"]].concat())?;
    destination.wait_status("postcopy-active", MIGRATION_MAX)?;
    source.wait_status("postcopy-active", MIGRATION_MAX)?;
    source.qmp.execute("migrate-pause", &json!({}))?;
    let said = migrate.wait(MIGRATION_MAX)?.refused()?;
    for part in [
        "the source says postcopy-paused",
        "the destination says postcopy-paused",
        "the destination needs 'migrate-recover'",
        "the source needs 'migrate' with 'resume'",
    ] {
        ensure!(said.contains(part), "{part:?} is not said: {said}");
    }

    // What it says is what helps.
    let uri = json!({ "uri": "tcp:127.0.0.1:0" });
    destination.qmp.execute("migrate-recover", &uri)?;
    let report = destination.qmp.execute("query-migrate", &json!({}))?;
    let port = report["socket-address"][0]["port"].as_str().unwrap_or_default().to_owned();
    let again = json!({ "uri": format!("tcp:127.0.0.1:{port}"), "resume": true });
    source.qmp.execute("migrate", &again)?;
    source.wait_status("postcopy-active", MIGRATION_MAX)?;
    unlimited(&mut source)?;
    source.wait_migrated(MIGRATION_MAX)?;
    destination.wait_migrated(MIGRATION_MAX)?;
    journey.check_arrived(&source, &destination)
}

on_each_peer!(
    migrate_recovers_two_qemus,
    migrate_recovers_two_qemus_with_preempt,
    migrate_leaves_two_qemus_alone,
);
