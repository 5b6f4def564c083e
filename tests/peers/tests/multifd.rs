//! Pages on several channels, out of a stock QEMU into a file and out of the file into a stock
//! QEMU: every byte of memory compared, at every number of channels, with every compression.

use std::path::Path;

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use whimbrel_peers::guest::{BootSector, Guest, Linux};
use whimbrel_peers::install::Peer;
use whimbrel_peers::journey::{Journey, MIGRATION_MAX, Transport};
use whimbrel_peers::multifd::{Compression, Multifd, ZeroPages};
use whimbrel_peers::qemu::Qemu;
use whimbrel_peers::{on_each_peer, wait};

/// A machine type that ends every section by a mark, where the newer ones end a round.
const FLUSHES_SECTIONS: &str = "pc-q35-8.0";

const TRANSPORTS: [Transport; 2] = [Transport::Tcp, Transport::Unix];

/// Without us: what a stock pair can do here.
fn qemu_to_qemu(peer: Peer, machine: &str) -> Result<()> {
    let guest = BootSector { seed: 101 };
    let journey = Journey::new(machine, &guest)?;
    let mut source = journey.boot(peer)?;
    for compression in Compression::ALL {
        let multifd = Multifd { compression, ..Multifd::of(3) };
        let mut destination = journey.incoming_stopped(peer)?;
        multifd.agree(&mut destination)?;
        let uri = journey.listen(&mut destination, Transport::Tcp, &[])?;
        multifd.set(&mut source)?;
        source.migrate_away(&uri, &[], MIGRATION_MAX)?;
        destination.wait_migrated(MIGRATION_MAX)?;
        source.memory()?.check_same(&destination.memory()?, &[])?;
        if compression == Compression::Zstd(1) {
            destination.qmp.execute("cont", &json!({}))?;
            return journey.check_arrived(&source, &destination);
        }
        source.qmp.execute("cont", &json!({}))?;
    }
    Ok(())
}

/// What `--multifd` brings out of a source is what its memory is: proven by the plain way back.
fn in_by(
    journey: &Journey<'_>,
    peer: Peer,
    source: &mut Qemu,
    transport: Transport,
    multifd: &Multifd,
) -> Result<Qemu> {
    let kept = journey
        .keep_by_multifd(source, transport, multifd, |_| Ok(()))
        .with_context(|| format!("in by {multifd}"))?;
    expect_used(source, multifd)?;
    let mut destination = journey.incoming_stopped(peer)?;
    let uri = journey.listen(&mut destination, Transport::Unix, &[])?;
    let kept = kept.to_str().context("a path in UTF-8")?;
    journey.whimbrel(&["restore", kept, &uri])?.succeeded()?;
    destination.wait_migrated(MIGRATION_MAX)?;
    let same = source.memory()?.check_same(&destination.memory()?, &[]);
    same.with_context(|| format!("in by {multifd}"))?;
    Ok(destination)
}

/// The channels carried the guest, not the main one.
fn expect_used(source: &mut Qemu, multifd: &Multifd) -> Result<()> {
    let report = source.qmp.execute("query-migrate", &json!({}))?;
    let bytes = report["ram"]["multifd-bytes"].as_u64();
    ensure!(bytes > Some(100_000), "{multifd}: nothing went over the channels: {report}");
    Ok(())
}

/// Runs on what has arrived last, and checks all it says.
fn runs_on(journey: &Journey<'_>, source: &Qemu, mut destination: Qemu) -> Result<()> {
    destination.qmp.execute("cont", &json!({}))?;
    journey.check_arrived(source, &destination)
}

fn comes_in(peer: Peer, machine: &str, guest: &dyn Guest, all: &[Multifd]) -> Result<()> {
    let journey = Journey::new(machine, guest)?;
    let mut source = journey.boot(peer)?;
    let mut last = None;
    for (multifd, transport) in all.iter().zip(TRANSPORTS.into_iter().cycle()) {
        if last.take().is_some() {
            // It has not moved: the one before was only looked at.
            source.qmp.execute("cont", &json!({}))?;
        }
        last = Some(in_by(&journey, peer, &mut source, transport, multifd)?);
    }
    runs_on(&journey, &source, last.context("nothing was tried")?)
}

fn goes_out(
    (from, to): (Peer, Peer),
    machine: &str,
    guest: &dyn Guest,
    all: &[Multifd],
) -> Result<()> {
    let journey = Journey::new(machine, guest)?;
    let mut source = journey.boot(from)?;
    let kept = journey.keep(&mut source, Transport::Tcp, &[])?;
    let memory = source.memory()?;
    let mut last = None;
    for (multifd, transport) in all.iter().zip(TRANSPORTS.into_iter().cycle()) {
        drop(last.take());
        let out = || -> Result<Qemu> {
            let mut destination = journey.restore_by_multifd(&kept, to, transport, multifd)?;
            memory.check_same(&destination.memory()?, &[])?;
            Ok(destination)
        };
        last = Some(out().with_context(|| format!("out by {multifd}"))?);
    }
    runs_on(&journey, &source, last.context("nothing was tried")?)
}

fn stock_pair(peer: Peer) -> Result<()> {
    qemu_to_qemu(peer, peer.machine())
}

fn boot_sector_comes_in(peer: Peer) -> Result<()> {
    let all = Multifd::some_of_each(peer);
    comes_in(peer, peer.machine(), &BootSector { seed: 102 }, &all)
}

fn boot_sector_goes_out(peer: Peer) -> Result<()> {
    let all = Multifd::some_of_each(peer);
    goes_out((peer, peer), peer.machine(), &BootSector { seed: 103 }, &all)
}

const LINUX: [Multifd; 2] =
    [Multifd { compression: Compression::Zstd(1), ..Multifd::of(4) }, Multifd::of(2)];

fn linux_comes_in(peer: Peer) -> Result<()> {
    comes_in(peer, peer.machine(), &Linux::new()?, &LINUX)
}

fn linux_goes_out(peer: Peer) -> Result<()> {
    goes_out((peer, peer), peer.machine(), &Linux::new()?, &LINUX)
}

/// Round after round, what was sent is sent again with another content: the later one has to stay,
/// whichever channels the two took. The link is slow: the guest's counters take it several turns
/// of its limiter, in which all of them change again.
fn boot_sector_in_many_rounds(peer: Peer) -> Result<()> {
    let guest = BootSector { seed: 104 };
    let packed = Multifd { compression: Compression::Zlib(1), ..Multifd::of(3) };
    for multifd in [Multifd::of(4), packed] {
        let journey = Journey::new(peer.machine(), &guest)?;
        let mut source = journey.boot(peer)?;
        let set = |qemu: &mut Qemu, parameters: Value| {
            qemu.qmp.execute("migrate-set-parameters", &parameters).map(drop)
        };
        set(&mut source, json!({ "downtime-limit": 1, "max-bandwidth": 4_000_000 }))?;
        let kept = journey.keep_by_multifd(&mut source, Transport::Tcp, &multifd, |source| {
            rounds(source, multifd.compression)?;
            set(source, json!({ "downtime-limit": 300, "max-bandwidth": 0 }))
        })?;
        let destination = journey.restore_by_multifd(&kept, peer, Transport::Unix, &multifd)?;
        let mut destination = destination;
        source.memory()?.check_same(&destination.memory()?, &[])?;
        runs_on(&journey, &source, destination)?;
    }
    Ok(())
}

/// Waits until RAM has been sent several times over, if that takes time: pages of one counter
/// pack so well that all of them fit into a moment.
fn rounds(source: &mut Qemu, compression: Compression) -> Result<()> {
    let enough = if compression == Compression::None { 5 } else { 3 };
    wait::until(&format!("{enough} rounds"), MIGRATION_MAX, || {
        let report = source.qmp.execute("query-migrate", &json!({}))?;
        let goes_on = report["status"] == "active" || report["status"] == "setup";
        let enough = report["ram"]["dirty-sync-count"].as_u64() >= Some(enough);
        ensure!(enough || goes_on, "it ended before: {report}");
        Ok(enough.then_some(()))
    })
}

/// The channels of one side are not those of the other: nothing is kept, and the guest stays.
fn channels_that_do_not_fit(peer: Peer) -> Result<()> {
    let guest = BootSector { seed: 105 };
    // More than it waits for, and channels where none are expected.
    for (at_source, here) in [(4, Some("2")), (2, None)] {
        let journey = Journey::new(peer.machine(), &guest)?;
        let mut source = journey.boot(peer)?;
        let kept = journey.file("kept");
        let arguments: Vec<&str> = here.iter().flat_map(|count| ["--multifd", count]).collect();
        let (mut receiver, uri) = journey.receiving_with(Transport::Tcp, &kept, &arguments)?;
        Multifd::of(at_source).set(&mut source)?;
        source.qmp.migrate(&uri)?;
        let said = receiver.wait(MIGRATION_MAX)?.refused()?;
        ensure!(said.contains("multifd"), "the error does not say why: {said}");
        ensure!(!kept.exists(), "something was kept");
        wait::until("the source's end", MIGRATION_MAX, || {
            let report = source.qmp.execute("query-migrate", &json!({}))?;
            Ok((report["status"] == "failed").then_some(()))
        })?;
        ensure!(source.qmp.run_state()? == "running", "the source's guest has stopped");
    }
    Ok(())
}

/// A destination that waits for another number of channels, or for none, or that unpacks another
/// way: one line says so, in a time that a user can wait.
fn a_destination_that_does_not_fit(peer: Peer) -> Result<()> {
    let guest = BootSector { seed: 111 };
    let journey = Journey::new(peer.machine(), &guest)?;
    let mut source = journey.boot(peer)?;
    let kept = journey.keep(&mut source, Transport::Tcp, &[])?;
    let kept = kept.to_str().context("a path in UTF-8")?;
    let zlib = Multifd { compression: Compression::Zlib(1), ..Multifd::of(2) };
    for there in [Some(Multifd::of(4)), Some(Multifd::of(1)), Some(zlib), None] {
        let mut destination = journey.incoming_stopped(peer)?;
        if let Some(multifd) = there {
            multifd.agree(&mut destination)?;
        }
        let uri = journey.listen(&mut destination, Transport::Tcp, &[])?;
        let said = journey.whimbrel(&["restore", kept, &uri, "--multifd", "2"])?.refused();
        let said = said.with_context(|| format!("against {there:?}"))?;
        // A QEMU that dies of it does not say why: then its channel or its answer is named.
        ensure!(said.contains("channel") || said.contains("answer"), "{there:?}: {said}");
        ensure!(destination.console.written().is_empty(), "the guest ran");
    }
    let destination = journey.restore(Path::new(kept), peer, Transport::Tcp, &[])?;
    journey.check_arrived(&source, &destination)
}

on_each_peer!(
    stock_pair,
    boot_sector_comes_in,
    boot_sector_goes_out,
    boot_sector_in_many_rounds,
    linux_comes_in,
    linux_goes_out,
    channels_that_do_not_fit,
    a_destination_that_does_not_fit,
);

/// QEMU's own rule, at either end: postcopy and multifd exclude each other before 10.1. 7.2 has no
/// rule, and does not survive it (docs/peers.md).
mod v10_0_with_postcopy {
    use super::*;

    #[test]
    #[ignore = "needs stock QEMUs: cargo xtask peers"]
    fn it_is_refused() -> Result<()> {
        let guest = BootSector { seed: 106 };
        let journey = Journey::new(Peer::V10_0.machine(), &guest)?;
        let mut waiting = journey.incoming_stopped(Peer::V10_0)?;
        for both in [["multifd", "postcopy-ram"], ["postcopy-ram", "multifd"]] {
            let refused = waiting.qmp.enable(&both).err().context("both are taken")?;
            let said = refused.to_string();
            ensure!(said.contains("Postcopy is not yet compatible with multifd"), "{said}");
        }
        Ok(())
    }
}

/// Machine types at whose sections' ends both sides wait for all channels.
mod v10_0_flushing_sections {
    use super::*;

    const PEER: Peer = Peer::V10_0;

    #[test]
    #[ignore = "needs stock QEMUs: cargo xtask peers"]
    fn stock_pair() -> Result<()> {
        qemu_to_qemu(PEER, FLUSHES_SECTIONS)
    }

    #[test]
    #[ignore = "needs stock QEMUs: cargo xtask peers"]
    fn boot_sector_comes_in() -> Result<()> {
        let all = Multifd::some_of_each(PEER);
        comes_in(PEER, FLUSHES_SECTIONS, &BootSector { seed: 107 }, &all)
    }

    #[test]
    #[ignore = "needs stock QEMUs: cargo xtask peers"]
    fn boot_sector_goes_out() -> Result<()> {
        let all = Multifd::some_of_each(PEER);
        goes_out((PEER, PEER), FLUSHES_SECTIONS, &BootSector { seed: 108 }, &all)
    }
}

/// The machine type is the older one's: it flushes per section, and zero pages are told on the
/// main channel, unless the newer side is asked for more than the older one could.
mod v10_0_from_v7_2 {
    use super::*;

    #[test]
    #[ignore = "needs stock QEMUs: cargo xtask peers"]
    fn boot_sector_goes_out() -> Result<()> {
        let all = Multifd::some_of_each(Peer::V10_0);
        let way = (Peer::V7_2, Peer::V10_0);
        goes_out(way, Peer::V7_2.machine(), &BootSector { seed: 109 }, &all)
    }

    #[test]
    #[ignore = "needs stock QEMUs: cargo xtask peers"]
    fn boot_sector_comes_back() -> Result<()> {
        let all = [None, Some(ZeroPages::None), Some(ZeroPages::Legacy)]
            .map(|zero_pages| Multifd { zero_pages, ..Multifd::of(2) });
        let way = (Peer::V10_0, Peer::V7_2);
        goes_out(way, Peer::V7_2.machine(), &BootSector { seed: 110 }, &all)
    }

    #[test]
    #[ignore = "needs stock QEMUs: cargo xtask peers"]
    fn linux_goes_out() -> Result<()> {
        let way = (Peer::V7_2, Peer::V10_0);
        goes_out(way, Peer::V7_2.machine(), &Linux::new()?, &LINUX)
    }
}
