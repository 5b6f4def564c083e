//! QEMU to QEMU, without us: what a stock pair can do here, which is what ours is measured by.
//! When one of these fails, the harness or the machine is at fault, not whimbrel.

use anyhow::Result;
use whimbrel_peers::guest::{BootSector, Guest, Linux};
use whimbrel_peers::install::Peer;
use whimbrel_peers::journey::{Journey, MIGRATION_MAX, Transport};
use whimbrel_peers::on_each_peer;

fn qemu_to_qemu(from: Peer, to: Peer, machine: &str, guest: &dyn Guest) -> Result<()> {
    let journey = Journey::new(machine, guest)?;
    let mut source = journey.boot(from)?;
    let (destination, uri) = journey.waiting(to, Transport::Tcp, &[])?;
    source.migrate_away(&uri, &[], MIGRATION_MAX)?;
    journey.check_arrived(&source, &destination)
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
