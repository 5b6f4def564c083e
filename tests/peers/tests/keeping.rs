//! Out of a stock QEMU, into a file that whimbrel keeps, and back into a stock QEMU.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde_json::json;
use whimbrel_peers::guest::{BootSector, Guest, Linux};
use whimbrel_peers::install::Peer;
use whimbrel_peers::journey::{Journey, Transport};
use whimbrel_peers::on_each_peer;

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

/// Deltas come only from the third time on that a page is sent. So the link is slow (the guest's
/// counters take it several turns of its limiter, in which all of them change again), and no
/// downtime is granted that they would fit into.
fn boot_sector_with_xbzrle(peer: Peer) -> Result<()> {
    let guest = BootSector { seed: 15 };
    let journey = Journey::new(peer.machine(), &guest)?;
    let mut source = journey.boot(peer)?;
    let slow = json!({ "downtime-limit": 1, "max-bandwidth": 4_000_000 });
    source.qmp.execute("migrate-set-parameters", &slow)?;
    let kept = journey.keep(&mut source, Transport::Tcp, &["xbzrle"])?;
    let report = source.qmp.execute("query-migrate", &json!({}))?;
    let bytes = report["xbzrle-cache"]["bytes"].as_u64();
    ensure!(bytes > Some(0), "no delta was on the wire: {report}");
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
