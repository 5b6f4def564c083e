//! Files that one side wrote and the other reads: mapped-ram both ways, and plain streams.

use std::path::Path;

use anyhow::{Context as _, Result, ensure};
use whimbrel_peers::guest::{BootSector, Guest, Linux};
use whimbrel_peers::install::Peer;
use whimbrel_peers::journey::{Journey, Transport};
use whimbrel_peers::on_each_peer;

/// The proof that our mapped-ram file is right: a stock QEMU starts from it, without us.
fn starts_from_kept(from: Peer, to: Peer, guest: &dyn Guest) -> Result<()> {
    let journey = Journey::new(from.machine(), guest)?;
    let mut source = journey.boot(from)?;
    let kept = journey.keep(&mut source, Transport::Tcp, &[])?;
    let destination = journey.start_from(&kept, to)?;
    journey.check_arrived(&source, &destination)
}

/// A stream that QEMU wrote into a file is one like any other.
fn plain_file_is_read(peer: Peer) -> Result<()> {
    let guest = BootSector { seed: 21 };
    let journey = Journey::new(peer.machine(), &guest)?;
    let mut source = journey.boot(peer)?;
    let written = journey.write_file(&mut source, peer, false)?;
    let path = text(&written)?;
    let kept = journey.file("kept");
    let kept_path = text(&kept)?;
    journey.whimbrel(&["receive", &format!("file:{path}"), "--store", kept_path])?.succeeded()?;
    let destination = journey.restore(&kept, peer, Transport::Tcp, &[])?;
    journey.check_arrived(&source, &destination)
}

/// A stream that QEMU wrote, and what we keep of it.
fn inspect_names_the_sections(peer: Peer) -> Result<()> {
    let guest = BootSector { seed: 26 };
    let journey = Journey::new(peer.machine(), &guest)?;
    let mut source = journey.boot(peer)?;
    let written = journey.write_file(&mut source, peer, false)?;
    let kept = journey.file("kept");
    let (path, kept_path) = (text(&written)?, text(&kept)?);
    journey.whimbrel(&["receive", &format!("file:{path}"), "--store", kept_path])?.succeeded()?;
    check_inspected(&journey, &written)?;
    check_inspected(&journey, &kept)
}

fn check_inspected(journey: &Journey<'_>, file: &Path) -> Result<()> {
    let seen = journey.whimbrel(&["inspect", text(file)?])?.succeeded()?.output;
    for name in ["pc-q35-", "ram", "pc.ram", "globalstate", "virtio-blk"] {
        ensure!(seen.contains(name), "inspect of {} does not name {name}: {seen}", file.display());
    }
    let as_json = journey.whimbrel(&["inspect", text(file)?, "--json"])?.succeeded()?.json()?;
    ensure!(as_json.is_object(), "inspect --json: {as_json}");
    Ok(())
}

fn text(path: &Path) -> Result<&str> {
    path.to_str().context("a path in UTF-8")
}

on_each_peer!(plain_file_is_read, inspect_names_the_sections);

/// The format came with QEMU 9.0.
mod v10_0_mapped_ram {
    use super::*;

    fn mapped_ram_of_qemu(guest: &dyn Guest) -> Result<()> {
        let peer = Peer::V10_0;
        let journey = Journey::new(peer.machine(), guest)?;
        let mut source = journey.boot(peer)?;
        let written = journey.write_file(&mut source, peer, true)?;
        let destination = journey.restore(&written, peer, Transport::Tcp, &[])?;
        journey.check_arrived(&source, &destination)
    }

    #[test]
    #[ignore = "needs stock QEMUs: cargo xtask peers"]
    fn boot_sector_restores_from_qemus() -> Result<()> {
        mapped_ram_of_qemu(&BootSector { seed: 22 })
    }

    #[test]
    #[ignore = "needs stock QEMUs: cargo xtask peers"]
    fn linux_restores_from_qemus() -> Result<()> {
        mapped_ram_of_qemu(&Linux::new()?)
    }

    #[test]
    #[ignore = "needs stock QEMUs: cargo xtask peers"]
    fn boot_sector_starts_from_ours() -> Result<()> {
        starts_from_kept(Peer::V10_0, Peer::V10_0, &BootSector { seed: 23 })
    }

    #[test]
    #[ignore = "needs stock QEMUs: cargo xtask peers"]
    fn linux_starts_from_ours() -> Result<()> {
        starts_from_kept(Peer::V10_0, Peer::V10_0, &Linux::new()?)
    }

    #[test]
    #[ignore = "needs stock QEMUs: cargo xtask peers"]
    fn boot_sector_kept_from_v7_2_starts_from_ours() -> Result<()> {
        starts_from_kept(Peer::V7_2, Peer::V10_0, &BootSector { seed: 24 })
    }

    #[test]
    #[ignore = "needs stock QEMUs: cargo xtask peers"]
    fn inspect_names_the_sections_of_qemus() -> Result<()> {
        let guest = BootSector { seed: 27 };
        let journey = Journey::new(Peer::V10_0.machine(), &guest)?;
        let mut source = journey.boot(Peer::V10_0)?;
        let written = journey.write_file(&mut source, Peer::V10_0, true)?;
        check_inspected(&journey, &written)
    }

    /// The harness itself: QEMU's own file, read by QEMU.
    #[test]
    #[ignore = "needs stock QEMUs: cargo xtask peers"]
    fn boot_sector_starts_from_qemus() -> Result<()> {
        let guest = BootSector { seed: 25 };
        let journey = Journey::new(Peer::V10_0.machine(), &guest)?;
        let mut source = journey.boot(Peer::V10_0)?;
        let written = journey.write_file(&mut source, Peer::V10_0, true)?;
        let destination = journey.start_from(&written, Peer::V10_0)?;
        journey.check_arrived(&source, &destination)
    }
}
