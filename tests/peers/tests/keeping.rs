//! Out of a stock QEMU, into a file that whimbrel keeps, and back into a stock QEMU.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde_json::json;
use whimbrel_peers::guest::{BootSector, Guest, Linux};
use whimbrel_peers::install::Peer;
use whimbrel_peers::journey::{Journey, MIGRATION_MAX, Transport};
use whimbrel_peers::{on_each_peer, wait};

fn there_and_back(
    (from, to): (Peer, Peer),
    guest: &dyn Guest,
    transport: Transport,
    source_capabilities: &[&str],
    destination_capabilities: &[&str],
) -> Result<()> {
    let journey = Journey::new(from.machine(), guest)?;
    let mut source = journey.boot(from)?;
    let kept = journey.keep(&mut source, transport, source_capabilities)?;
    let destination = journey.restore(&kept, to, transport, destination_capabilities)?;
    journey.check_arrived(&source, &destination)
}

fn boot_sector_by_tcp(peer: Peer) -> Result<()> {
    there_and_back((peer, peer), &BootSector { seed: 11 }, Transport::Tcp, &[], &[])
}

fn boot_sector_by_unix(peer: Peer) -> Result<()> {
    there_and_back((peer, peer), &BootSector { seed: 12 }, Transport::Unix, &[], &[])
}

fn boot_sector_with_return_path(peer: Peer) -> Result<()> {
    let guest = BootSector { seed: 13 };
    there_and_back((peer, peer), &guest, Transport::Tcp, &["return-path"], &["return-path"])
}

fn boot_sector_with_postcopy_never_used(peer: Peer) -> Result<()> {
    let guest = BootSector { seed: 14 };
    there_and_back((peer, peer), &guest, Transport::Tcp, &["postcopy-ram"], &[])
}

fn linux_by_tcp(peer: Peer) -> Result<()> {
    there_and_back((peer, peer), &Linux::new()?, Transport::Tcp, &[], &[])
}

fn linux_by_unix_with_return_path(peer: Peer) -> Result<()> {
    there_and_back((peer, peer), &Linux::new()?, Transport::Unix, &["return-path"], &[])
}

/// Deltas come only when a page is sent again, so the migration is held in its iterations until
/// there were some.
fn boot_sector_with_xbzrle(peer: Peer) -> Result<()> {
    /// A downtime that no amount of dirty memory fits, and one that this guest's always does.
    const NEVER_MS: u64 = 1;
    const AT_ONCE_MS: u64 = 2000;
    const DELTAS_MIN: u64 = 300;
    let guest = BootSector { seed: 15 };
    let journey = Journey::new(peer.machine(), &guest)?;
    let mut source = journey.boot(peer)?;
    let kept = journey.file("kept");
    let (mut receiver, uri) = journey.receiving(Transport::Tcp, &kept)?;
    let qmp = &mut source.qmp;
    qmp.enable(&["xbzrle"])?;
    let slow = json!({ "downtime-limit": NEVER_MS, "max-bandwidth": 20_000_000 });
    qmp.execute("migrate-set-parameters", &slow)?;
    qmp.migrate(&uri)?;
    wait::until("deltas on the wire", MIGRATION_MAX, || {
        let report = qmp.execute("query-migrate", &json!({}))?;
        ensure!(report["status"] != "failed", "the migration failed: {report}");
        let sent = report["xbzrle-cache"]["pages"].as_u64().unwrap_or(0);
        Ok((sent >= DELTAS_MIN).then_some(()))
    })?;
    qmp.execute("migrate-set-parameters", &json!({ "downtime-limit": AT_ONCE_MS }))?;
    source.wait_migrated(MIGRATION_MAX)?;
    receiver.wait(MIGRATION_MAX)?.succeeded()?;
    let destination = journey.restore(&kept, peer, Transport::Tcp, &[])?;
    journey.check_arrived(&source, &destination)
}

/// A guest that was stopped when it was kept is stopped when it is restored.
fn a_stopped_guest_stays_stopped(peer: Peer) -> Result<()> {
    let guest = BootSector { seed: 16 };
    let journey = Journey::new(peer.machine(), &guest)?;
    let mut source = journey.boot(peer)?;
    source.qmp.execute("stop", &json!({}))?;
    let kept = journey.keep(&mut source, Transport::Tcp, &[])?;
    let mut destination = journey.restore(&kept, peer, Transport::Tcp, &[])?;
    std::thread::sleep(Duration::from_millis(300));
    ensure!(destination.console.written().is_empty(), "the guest ran before it was told to");
    let state = destination.qmp.run_state()?;
    ensure!(state == "paused", "the guest is {state}");
    destination.qmp.execute("cont", &json!({}))?;
    journey.check_arrived(&source, &destination)
}

/// What is kept can be restored more than once, and is not changed by it.
fn restored_twice(peer: Peer) -> Result<()> {
    let guest = BootSector { seed: 17 };
    let journey = Journey::new(peer.machine(), &guest)?;
    let mut source = journey.boot(peer)?;
    let kept = journey.keep(&mut source, Transport::Tcp, &[])?;
    let before = std::fs::read(&kept)?;
    for time in ["the first", "the second"] {
        let destination = journey.restore(&kept, peer, Transport::Tcp, &[]).context(time)?;
        journey.check_arrived(&source, &destination).context(time)?;
    }
    ensure!(std::fs::read(&kept)? == before, "restoring changed the file");
    Ok(())
}

on_each_peer!(
    boot_sector_by_tcp,
    boot_sector_by_unix,
    boot_sector_with_return_path,
    boot_sector_with_postcopy_never_used,
    boot_sector_with_xbzrle,
    linux_by_tcp,
    linux_by_unix_with_return_path,
    a_stopped_guest_stays_stopped,
    restored_twice,
);

/// The machine type is the older one's, which the newer one still offers.
mod v10_0_from_v7_2 {
    use super::*;

    #[test]
    #[ignore = "needs stock QEMUs: cargo xtask peers"]
    fn boot_sector_by_tcp() -> Result<()> {
        let guest = BootSector { seed: 18 };
        there_and_back((Peer::V7_2, Peer::V10_0), &guest, Transport::Tcp, &[], &[])
    }

    #[test]
    #[ignore = "needs stock QEMUs: cargo xtask peers"]
    fn linux_by_tcp() -> Result<()> {
        there_and_back((Peer::V7_2, Peer::V10_0), &Linux::new()?, Transport::Tcp, &[], &[])
    }
}
