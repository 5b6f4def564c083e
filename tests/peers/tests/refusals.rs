//! Peers that do not fit, links that break, files that are not what they should be: one clear
//! line, an error exit, and nothing half-written left behind.

use std::fs;
use std::net::TcpListener;
use std::path::Path;

use anyhow::{Context as _, Result, ensure};
use serde_json::json;
use whimbrel_peers::guest::BootSector;
use whimbrel_peers::install::Peer;
use whimbrel_peers::journey::{Journey, MIGRATION_MAX, Transport};
use whimbrel_peers::{on_each_peer, wait};

fn text(path: &Path) -> Result<&str> {
    path.to_str().context("a path in UTF-8")
}

/// The destination refuses; we say so, and its guest never ran.
fn another_machine_type(peer: Peer) -> Result<()> {
    let guest = BootSector { seed: 31 };
    let journey = Journey::new(peer.machine(), &guest)?;
    let mut source = journey.boot(peer)?;
    let kept = journey.keep(&mut source, Transport::Tcp, &[])?;
    let mut other = journey.incoming_as(peer, "pc-q35-6.2")?;
    let uri = other.listen("tcp:127.0.0.1:0", &[])?;
    let said = journey.whimbrel(&["restore", text(&kept)?, &uri])?.refused()?;
    ensure!(!said.is_empty(), "a refusal without a reason");
    let status = other.wait_exit(MIGRATION_MAX)?;
    ensure!(!status.success(), "QEMU took a guest of another machine type");
    ensure!(other.console.written().is_empty(), "the guest ran all the same");
    // What was refused by one can still be taken by another.
    drop(other);
    let destination = journey.restore(&kept, peer, Transport::Tcp, &[])?;
    journey.check_arrived(&source, &destination)
}

/// The source dies in the middle: nothing is kept, nothing is left.
fn source_dies(peer: Peer) -> Result<()> {
    let guest = BootSector { seed: 32 };
    let journey = Journey::new(peer.machine(), &guest)?;
    let mut source = journey.boot(peer)?;
    fs::create_dir(journey.file("store"))?;
    let kept = journey.file("store/kept");
    let (mut receiver, uri) = journey.receiving(Transport::Tcp, &kept)?;
    source.qmp.execute("migrate-set-parameters", &json!({ "max-bandwidth": 2_000_000 }))?;
    source.qmp.migrate(&uri)?;
    wait::until("some pages", MIGRATION_MAX, || {
        let report = source.qmp.execute("query-migrate", &json!({}))?;
        Ok((report["ram"]["transferred"].as_u64() > Some(500_000)).then_some(()))
    })?;
    drop(source);
    receiver.wait(MIGRATION_MAX)?.refused()?;
    let left: Vec<_> = fs::read_dir(journey.file("store"))?.collect();
    ensure!(left.is_empty(), "left behind: {left:?}");
    Ok(())
}

/// The source takes its guest back: it runs on, and nothing is kept.
fn source_cancels(peer: Peer) -> Result<()> {
    let guest = BootSector { seed: 33 };
    let journey = Journey::new(peer.machine(), &guest)?;
    let mut source = journey.boot(peer)?;
    let kept = journey.file("kept");
    let (mut receiver, uri) = journey.receiving(Transport::Tcp, &kept)?;
    source.qmp.execute("migrate-set-parameters", &json!({ "max-bandwidth": 2_000_000 }))?;
    source.qmp.migrate(&uri)?;
    wait::until("the first pages", MIGRATION_MAX, || {
        let report = source.qmp.execute("query-migrate", &json!({}))?;
        Ok((report["ram"]["transferred"].as_u64() > Some(500_000)).then_some(()))
    })?;
    source.qmp.execute("migrate_cancel", &json!({}))?;
    receiver.wait(MIGRATION_MAX)?.refused()?;
    ensure!(!kept.exists(), "a migration that was cancelled was kept");
    let state = source.qmp.run_state()?;
    ensure!(state == "running", "the source's guest is {state}");
    Ok(())
}

/// A stream cut anywhere, and one with a changed byte in its header: refused, nothing kept.
fn damaged_stream(peer: Peer) -> Result<()> {
    let guest = BootSector { seed: 34 };
    let journey = Journey::new(peer.machine(), &guest)?;
    let mut source = journey.boot(peer)?;
    let written = journey.write_file(&mut source, peer, false)?;
    let whole = fs::read(&written)?;
    let kept = journey.file("kept");
    let mut damaged: Vec<Vec<u8>> = [3, 20, 700, whole.len() / 2, whole.len() - 60_000]
        .map(|length| whole[..length].to_vec())
        .to_vec();
    let mut version = whole.clone();
    version[7] = 2;
    damaged.push(version);
    for bytes in damaged {
        let length = bytes.len();
        fs::write(journey.file("damaged"), bytes)?;
        let uri = format!("file:{}", journey.file("damaged").display());
        let said = journey
            .whimbrel(&["receive", &uri, "--store", text(&kept)?])?
            .refused()
            .with_context(|| format!("{length} of {} bytes", whole.len()))?;
        ensure!(!kept.exists(), "kept something after {said:?}");
    }
    Ok(())
}

on_each_peer!(another_machine_type, source_dies, source_cancels, damaged_stream);

/// No peer at all.
#[test]
#[ignore = "needs the command: cargo xtask peers"]
fn nobody_listens() -> Result<()> {
    let guest = BootSector { seed: 35 };
    let journey = Journey::new("none", &guest)?;
    let missing = journey.file("missing");
    let said = journey.whimbrel(&["restore", text(&missing)?, "tcp:127.0.0.1:1"])?.refused()?;
    ensure!(said.contains("missing"), "the error names no file: {said}");
    Ok(())
}

/// A port that is taken.
#[test]
#[ignore = "needs the command: cargo xtask peers"]
fn port_in_use() -> Result<()> {
    let guest = BootSector { seed: 36 };
    let journey = Journey::new("none", &guest)?;
    let taken = TcpListener::bind("127.0.0.1:0")?;
    let uri = format!("tcp:{}", taken.local_addr()?);
    let kept = journey.file("kept");
    let said = journey.whimbrel(&["receive", &uri, "--store", text(&kept)?])?.refused()?;
    ensure!(said.contains("in use"), "the error does not say why: {said}");
    ensure!(!kept.exists(), "a file was left");
    Ok(())
}
