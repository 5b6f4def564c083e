//! A postcopy whose link breaks, with a stock QEMU at one end, or at both.

use std::fs;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde_json::json;
use whimbrel_peers::guest::BootSector;
use whimbrel_peers::install::Peer;
use whimbrel_peers::journey::{Journey, MIGRATION_MAX, Transport, free_port};
use whimbrel_peers::on_each_peer;
use whimbrel_peers::qemu::Qemu;
use whimbrel_peers::wait;

/// So slow that there is always something left to be sent.
const SLOW: &str = "200k";

fn unlimited(source: &mut Qemu) -> Result<()> {
    let parameters = json!({ "max-bandwidth": 0, "max-postcopy-bandwidth": 0 });
    source.qmp.execute("migrate-set-parameters", &parameters).map(drop)
}

/// Waits until a QEMU has really given its guest away: it says `postcopy-active` before, and one whose
/// link is broken then says `failed` and runs its guest, which the destination may be doing too.
fn wait_gone(source: &mut Qemu) -> Result<()> {
    wait::until("the source to send pages behind its guest", MIGRATION_MAX, || {
        let report = source.qmp.execute("query-migrate", &json!({}))?;
        let sent = report["ram"]["postcopy-bytes"].as_u64().unwrap_or(0);
        Ok((report["status"] == "postcopy-active" && sent > 0).then_some(()))
    })
}

/// Breaks the link at one side, as soon as it takes that, and waits until both have noticed.
fn break_link(source: &mut Qemu, destination: &mut Qemu, at_source: bool) -> Result<()> {
    source.wait_status("postcopy-active", MIGRATION_MAX)?;
    destination.wait_status("postcopy-active", MIGRATION_MAX)?;
    std::thread::sleep(Duration::from_millis(200));
    let side = if at_source { &mut *source } else { &mut *destination };
    // A recovery that broke by itself takes another.
    wait::until("a side to pause", MIGRATION_MAX, || {
        Ok(side.qmp.execute("migrate-pause", &json!({})).ok())
    })?;
    wait_paused(source)?;
    wait_paused(destination)
}

/// Two QEMUs, and a whimbrel that does nothing but drive them: a broken link is news to it. With
/// preempt nothing holds back the pages that are asked for, and a guest that ran would have asked for
/// all of them before the link has been broken as often as it should be.
fn driven(peer: Peer, preempt: bool) -> Result<()> {
    let guest = BootSector { seed: 91 };
    let journey = Journey::new(peer.machine(), &guest)?;
    let mut source = journey.boot(peer)?;
    let mut destination = match preempt {
        true => journey.incoming_stopped(peer)?,
        false => journey.incoming(peer)?,
    };
    let more: &[&str] = if preempt { &["--preempt"] } else { &[] };
    let (from, to) = (source.other_control(), destination.other_control());
    let command = ["migrate", &from, &to, "--postcopy", "--postcopy-after=0", "--bandwidth", SLOW];
    for side in [&mut source, &mut destination] {
        side.qmp.enable(&["events"])?;
    }
    let mut migrate = journey.start_whimbrel(&[&command, more].concat())?;
    wait_gone(&mut source)?;
    for at_source in [true, false, true] {
        break_link(&mut source, &mut destination, at_source)?;
    }
    source.wait_status("postcopy-active", MIGRATION_MAX)?;
    unlimited(&mut source)?;
    let ended = migrate.wait(MIGRATION_MAX)?.succeeded()?;
    ensure!(ended.output.contains("migrated "), "{}", ended.output);
    source.wait_migrated(MIGRATION_MAX)?;
    destination.wait_migrated(MIGRATION_MAX)?;
    if preempt {
        destination.qmp.execute("cont", &json!({}))?;
    }
    journey.check_arrived(&source, &destination)
}

fn migrate_recovers_two_qemus(peer: Peer) -> Result<()> {
    driven(peer, false)
}

fn migrate_recovers_two_qemus_with_preempt(peer: Peer) -> Result<()> {
    driven(peer, true)
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
    wait_gone(&mut source)?;
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

/// A QEMU's postcopy to a whimbrel, paused three times by the QEMU and told to go on.
fn into_receive(peer: Peer, capabilities: &[&str], more: &[&str]) -> Result<()> {
    let guest = BootSector { seed: 93 };
    let journey = Journey::new(peer.machine(), &guest)?;
    let mut source = journey.boot(peer)?;
    let kept = journey.file("kept");
    let arguments = [&["--touch", "random", "--auto-recover=on"], more].concat();
    let (mut receiver, uri) = journey.receiving_with(Transport::Tcp, &kept, &arguments)?;
    source.qmp.enable(capabilities)?;
    let slow = json!({ "max-bandwidth": 200_000, "max-postcopy-bandwidth": 200_000 });
    source.qmp.execute("migrate-set-parameters", &slow)?;
    source.qmp.migrate(&uri)?;
    source.qmp.execute("migrate-start-postcopy", &json!({}))?;
    wait_gone(&mut source)?;
    for _ in 0..3 {
        source.wait_status("postcopy-active", MIGRATION_MAX)?;
        std::thread::sleep(Duration::from_millis(200));
        source.qmp.execute("migrate-pause", &json!({}))?;
        source.wait_status("postcopy-paused", MIGRATION_MAX)?;
        ensure!(receiver.is_running()?, "it gave up: {}", receiver.wait(MIGRATION_MAX)?.complaints);
        source.qmp.execute("migrate", &json!({ "uri": uri, "resume": true }))?;
    }
    source.wait_status("postcopy-active", MIGRATION_MAX)?;
    unlimited(&mut source)?;
    source.wait_migrated(MIGRATION_MAX)?;
    receiver.wait(MIGRATION_MAX)?.succeeded()?;
    let destination = journey.restore(&kept, peer, Transport::Tcp, &[])?;
    journey.check_arrived(&source, &destination)
}

const PLAIN: &[&str] = &["events", "postcopy-ram"];
const PREEMPT: &[&str] = &["events", "postcopy-ram", "postcopy-preempt"];

fn receive_goes_on(peer: Peer) -> Result<()> {
    into_receive(peer, PLAIN, &[])
}

fn receive_goes_on_with_preempt(peer: Peer) -> Result<()> {
    into_receive(peer, PREEMPT, &["--preempt"])
}

/// It has been paused: that may be over by now.
fn wait_paused(side: &mut Qemu) -> Result<()> {
    loop {
        let event = side.qmp.wait_event("MIGRATION", MIGRATION_MAX)?;
        if event.data["status"] == "postcopy-paused" {
            return Ok(());
        }
    }
}

/// A whimbrel's postcopy to a QEMU, paused by the QEMU: at first the way that it came is gone, and the
/// QEMU is told to wait elsewhere; the second time it still listens there, and need not be told.
fn out_of_restore(peer: Peer, capabilities: &[&str], more: &[&str]) -> Result<()> {
    let guest = BootSector { seed: 94 };
    let journey = Journey::new(peer.machine(), &guest)?;
    let mut source = journey.boot(peer)?;
    let kept = journey.keep(&mut source, Transport::Tcp, &[])?;
    // A guest that ran would ask for all of its pages within a second.
    let mut destination = journey.incoming_stopped(peer)?;
    let uri = journey.listen(&mut destination, Transport::Unix, capabilities)?;
    let elsewhere = format!("tcp:127.0.0.1:{}", free_port()?);
    let recover_uri = format!("--recover-uri={elsewhere}");
    let kept = kept.to_str().context("a path in UTF-8")?;
    let restore = ["restore", kept, &uri, "--postcopy", "--bandwidth=400k", "--auto-recover=on"];
    let more = [&[recover_uri.as_str()], more].concat();
    let mut restore = journey.start_whimbrel(&[&restore[..], &more].concat())?;
    destination.wait_status("postcopy-active", MIGRATION_MAX)?;
    fs::remove_file(uri.trim_start_matches("unix:"))?;
    for told in [true, false] {
        std::thread::sleep(Duration::from_millis(300));
        destination.qmp.execute("migrate-pause", &json!({}))?;
        wait_paused(&mut destination)?;
        if told {
            std::thread::sleep(Duration::from_millis(300));
            destination.wait_status("postcopy-paused", MIGRATION_MAX)?;
            destination.qmp.execute("migrate-recover", &json!({ "uri": elsewhere }))?;
        }
        destination.wait_status("postcopy-active", MIGRATION_MAX)?;
        ensure!(restore.is_running()?, "it gave up: {}", restore.wait(MIGRATION_MAX)?.complaints);
    }
    restore.wait(MIGRATION_MAX)?.succeeded()?;
    destination.wait_migrated(MIGRATION_MAX)?;
    destination.qmp.execute("cont", &json!({}))?;
    journey.check_arrived(&source, &destination)
}

fn restore_goes_on(peer: Peer) -> Result<()> {
    out_of_restore(peer, PLAIN, &[])
}

fn restore_goes_on_with_preempt(peer: Peer) -> Result<()> {
    out_of_restore(peer, PREEMPT, &["--preempt"])
}

on_each_peer!(
    receive_goes_on,
    receive_goes_on_with_preempt,
    restore_goes_on,
    restore_goes_on_with_preempt,
    migrate_recovers_two_qemus,
    migrate_recovers_two_qemus_with_preempt,
    migrate_leaves_two_qemus_alone,
);
