//! Files that one side wrote and the other reads: mapped-ram both ways, and plain streams.

use std::path::Path;

use anyhow::{Context as _, Result, ensure};
use serde_json::json;
use whimbrel_peers::guest::{BootSector, Guest, Linux};
use whimbrel_peers::install::Peer;
use whimbrel_peers::journey::{Journey, MIGRATION_MAX, Transport};
use whimbrel_peers::on_each_peer;
use whimbrel_peers::qemu::Qemu;

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

/// The same files, written and read by several threads, past the page cache and through it.
mod v10_0_mapped_ram_in_parallel {
    use super::*;

    /// How a QEMU goes about a mapped-ram file.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    enum By {
        OneThread,
        Multifd,
        MultifdDirect,
    }

    const ALL: [By; 3] = [By::OneThread, By::Multifd, By::MultifdDirect];

    impl By {
        /// Tells the QEMU; gives the capabilities that it takes.
        fn tell(self, qemu: &mut Qemu) -> Result<&'static [&'static str]> {
            if self == By::OneThread {
                return Ok(&["mapped-ram"]);
            }
            let direct = self == By::MultifdDirect;
            let parameters = json!({ "multifd-channels": 3, "direct-io": direct });
            // It wants to know of multifd before it is told of its channels.
            qemu.qmp.enable(&["multifd"])?;
            qemu.qmp.execute("migrate-set-parameters", &parameters)?;
            Ok(&["mapped-ram", "multifd"])
        }

        /// Has the guest of `source` written into a file.
        fn write(self, journey: &Journey<'_>, source: &mut Qemu) -> Result<std::path::PathBuf> {
            let path = journey.file("written-by-qemu");
            source.qmp.execute("migrate-set-parameters", &json!({ "max-bandwidth": 0 }))?;
            let capabilities = self.tell(source)?;
            let uri = format!("file:{}", path.display());
            source.migrate_away(&uri, capabilities, MIGRATION_MAX)?;
            Ok(path)
        }

        /// A QEMU that starts from a file by itself.
        fn start(self, journey: &Journey<'_>, file: &Path) -> Result<Qemu> {
            let mut destination = journey.incoming(Peer::V10_0)?;
            let capabilities = self.tell(&mut destination)?;
            destination.listen(&format!("file:{}", file.display()), capabilities)?;
            destination.wait_migrated(MIGRATION_MAX)?;
            Ok(destination)
        }
    }

    /// What whimbrel keeps with several threads, QEMU starts from in all its ways.
    fn starts_from_ours(from: Peer, guest: &dyn Guest, options: &[&str]) -> Result<()> {
        let journey = Journey::new(from.machine(), guest)?;
        let mut source = journey.boot(from)?;
        let kept = journey.file("kept");
        let (mut receiver, uri) = journey.receiving_with(Transport::Unix, &kept, options)?;
        source.migrate_away(&uri, &["return-path"], MIGRATION_MAX)?;
        receiver.wait(MIGRATION_MAX)?.succeeded()?;
        for by in ALL {
            let destination = by.start(&journey, &kept).with_context(|| format!("{by:?}"))?;
            journey.check_arrived(&source, &destination).with_context(|| format!("{by:?}"))?;
        }
        Ok(())
    }

    /// What QEMU has written in one of its ways is restored in all of ours.
    fn restores_from_qemus(guest: &dyn Guest, by: By, ways: &[&[&str]]) -> Result<()> {
        let journey = Journey::new(Peer::V10_0.machine(), guest)?;
        let mut source = journey.boot(Peer::V10_0)?;
        let written = by.write(&journey, &mut source)?;
        let before = std::fs::read(&written)?;
        for way in ways {
            let mut destination = journey.incoming(Peer::V10_0)?;
            let capabilities: &[&str] = match way.contains(&"--multifd") {
                true => {
                    destination.qmp.enable(&["multifd"])?;
                    let channels = json!({ "multifd-channels": 3 });
                    destination.qmp.execute("migrate-set-parameters", &channels)?;
                    &["multifd", "return-path"]
                }
                false => &[],
            };
            let uri = journey.listen(&mut destination, Transport::Unix, capabilities)?;
            let arguments = [&["restore", text(&written)?, &uri], *way].concat();
            let restored = journey.whimbrel(&arguments)?.succeeded();
            restored.with_context(|| format!("{by:?} {way:?}: {:?}", destination.complaint()))?;
            destination.wait_migrated(MIGRATION_MAX)?;
            let arrived = journey.check_arrived(&source, &destination);
            arrived.with_context(|| format!("{by:?} {way:?}"))?;
        }
        ensure!(std::fs::read(&written)? == before, "restoring changed the file");
        Ok(())
    }

    const MANY: &[&str] = &["--threads=4", "--direct-io=off"];
    const DIRECT: &[&str] = &["--threads=3", "--direct-io"];
    const DIRECT_ON_CHANNELS: &[&str] = &["--threads=2", "--direct-io", "--multifd", "3"];

    #[test]
    #[ignore = "needs stock QEMUs: cargo xtask peers"]
    fn boot_sector_starts_from_what_many_threads_wrote() -> Result<()> {
        starts_from_ours(Peer::V10_0, &BootSector { seed: 41 }, MANY)
    }

    #[test]
    #[ignore = "needs stock QEMUs: cargo xtask peers"]
    fn boot_sector_starts_from_what_was_written_past_the_page_cache() -> Result<()> {
        starts_from_ours(Peer::V10_0, &BootSector { seed: 42 }, DIRECT)
    }

    #[test]
    #[ignore = "needs stock QEMUs: cargo xtask peers"]
    fn boot_sector_of_v7_2_starts_from_what_was_written_past_the_page_cache() -> Result<()> {
        starts_from_ours(Peer::V7_2, &BootSector { seed: 43 }, DIRECT)
    }

    #[test]
    #[ignore = "needs stock QEMUs: cargo xtask peers"]
    fn linux_starts_from_what_was_written_past_the_page_cache() -> Result<()> {
        starts_from_ours(Peer::V10_0, &Linux::new()?, DIRECT)
    }

    #[test]
    #[ignore = "needs stock QEMUs: cargo xtask peers"]
    fn boot_sector_restores_from_qemus_multifd() -> Result<()> {
        let ways = [MANY, DIRECT, DIRECT_ON_CHANNELS];
        restores_from_qemus(&BootSector { seed: 44 }, By::Multifd, &ways)
    }

    #[test]
    #[ignore = "needs stock QEMUs: cargo xtask peers"]
    fn boot_sector_restores_from_qemus_direct_io() -> Result<()> {
        let ways = [MANY, DIRECT, DIRECT_ON_CHANNELS];
        restores_from_qemus(&BootSector { seed: 45 }, By::MultifdDirect, &ways)
    }

    #[test]
    #[ignore = "needs stock QEMUs: cargo xtask peers"]
    fn linux_restores_from_qemus_direct_io() -> Result<()> {
        restores_from_qemus(&Linux::new()?, By::MultifdDirect, &[DIRECT, DIRECT_ON_CHANNELS])
    }
}
