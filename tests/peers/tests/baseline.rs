//! QEMU to QEMU, without us: what a stock pair can do here, which is what ours is measured by.
//! When one of these fails, the harness or the machine is at fault, not whimbrel.

#![expect(missing_docs, reason = "tests")]

use std::time::Duration;

use anyhow::Result;
use whimbrel_peers::guest::{BootSector, Guest, Linux};
use whimbrel_peers::install::Peer;
use whimbrel_peers::on_each_peer;
use whimbrel_peers::qemu::{Begin, Machine};

/// From boot to a guest well under way, on a busy machine without KVM.
const SETTLE_MAX: Duration = Duration::from_secs(240);
const MIGRATION_MAX: Duration = Duration::from_secs(120);

fn qemu_to_qemu(from: Peer, to: Peer, machine: &str, guest: &dyn Guest) -> Result<()> {
    let folder = tempfile::tempdir()?;
    let source = Machine { peer: from, machine, guest };
    let mut source = source.start(folder.path(), "source", Begin::Boot)?;
    source.console.wait_for(guest.settled_lines(), SETTLE_MAX)?;
    let destination = Machine { peer: to, machine, guest };
    let mut destination = destination.start(folder.path(), "destination", Begin::Incoming)?;
    let uri = destination.listen("tcp:127.0.0.1:0", &[])?;
    source.migrate_away(&uri, &[], MIGRATION_MAX)?;
    destination.console.wait_for(guest.settled_lines(), SETTLE_MAX)?;
    guest.check_continues(&source.console.written(), &destination.console.written())
}

fn boot_sector_moves(peer: Peer) -> Result<()> {
    qemu_to_qemu(peer, peer, peer.machine(), &BootSector { seed: 1 })
}

fn linux_moves(peer: Peer) -> Result<()> {
    qemu_to_qemu(peer, peer, peer.machine(), &Linux::new()?)
}

on_each_peer!(boot_sector_moves, linux_moves);

mod v10_0_from_v7_2 {
    use super::*;

    #[test]
    #[ignore = "needs stock QEMUs: cargo xtask peers"]
    fn boot_sector_moves() -> Result<()> {
        qemu_to_qemu(Peer::V7_2, Peer::V10_0, "pc-q35-7.2", &BootSector { seed: 2 })
    }

    #[test]
    #[ignore = "needs stock QEMUs: cargo xtask peers"]
    fn linux_moves() -> Result<()> {
        qemu_to_qemu(Peer::V7_2, Peer::V10_0, "pc-q35-7.2", &Linux::new()?)
    }
}
