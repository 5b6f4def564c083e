//! A stock QEMU that dies in postcopy, and ends that were told different things: one clear line,
//! an error exit, and nobody hangs.

use std::fs;
use std::path::Path;

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use whimbrel_peers::guest::{BootSector, Guest as _};
use whimbrel_peers::install::Peer;
use whimbrel_peers::journey::{Journey, MIGRATION_MAX, Transport};
use whimbrel_peers::memory::{BLOCK, Backing};
use whimbrel_peers::qemu::Qemu;
use whimbrel_peers::{on_each_peer, wait};

fn text(path: &Path) -> Result<&str> {
    path.to_str().context("a path in UTF-8")
}

const PLAIN: &[&str] = &["events", "postcopy-ram"];
const PREEMPT: &[&str] = &["events", "postcopy-ram", "postcopy-preempt"];

/// The destination dies when its guest runs: we say that the guest was there.
fn destination_dies(peer: Peer, capabilities: &[&str], more: &[&str]) -> Result<()> {
    let guest = BootSector { seed: 81 };
    let journey = Journey::new(peer.machine(), &guest)?;
    let mut source = journey.boot(peer)?;
    let kept = journey.keep(&mut source, Transport::Tcp, &[])?;
    let (mut destination, uri) = journey.waiting(peer, Transport::Tcp, capabilities)?;
    let slow = ["restore", text(&kept)?, &uri, "--postcopy", "--bandwidth", "64k"];
    let mut restore = journey.start_whimbrel(&[&slow, more].concat())?;
    wait_for_status(&mut destination, "postcopy-active")?;
    destination.qmp.wait_event("RESUME", MIGRATION_MAX)?;
    drop(destination);
    let said = restore.wait(MIGRATION_MAX)?.refused()?;
    ensure!(said.contains("had been handed over"), "nothing is said of the guest: {said}");
    // The file is as good as before.
    let destination = journey.restore(&kept, peer, Transport::Tcp, &[])?;
    journey.check_arrived(&source, &destination)
}

fn the_destination_dies(peer: Peer) -> Result<()> {
    destination_dies(peer, PLAIN, &[])
}

fn the_destination_dies_with_preempt(peer: Peer) -> Result<()> {
    destination_dies(peer, PREEMPT, &["--preempt"])
}

fn wait_for_status(qemu: &mut Qemu, status: &str) -> Result<()> {
    wait::until(&format!("the state {status}"), MIGRATION_MAX, || {
        let report = qemu.qmp.execute("query-migrate", &json!({}))?;
        Ok((report["status"] == status).then_some(()))
    })
}

/// The source dies when its guest is ours and RAM is not: what has come is kept as a part, of which
/// no QEMU can begin.
fn source_dies(peer: Peer, capabilities: &[&str], more: &[&str]) -> Result<()> {
    let guest = BootSector { seed: 82 };
    let journey = Journey::new(peer.machine(), &guest)?;
    let mut source = journey.boot(peer)?;
    fs::create_dir(journey.file("store"))?;
    let kept = journey.file("store/kept");
    let arguments = [&["--touch", "random"], more].concat();
    let (mut receiver, uri) = journey.receiving_with(Transport::Tcp, &kept, &arguments)?;
    source.qmp.enable(capabilities)?;
    let slow = json!({ "max-bandwidth": 1_000_000, "max-postcopy-bandwidth": 100_000 });
    source.qmp.execute("migrate-set-parameters", &slow)?;
    source.qmp.migrate(&uri)?;
    source.qmp.execute("migrate-start-postcopy", &json!({}))?;
    wait_for_status(&mut source, "postcopy-active")?;
    wait::until("requests for pages", MIGRATION_MAX, || {
        let report = source.qmp.execute("query-migrate", &json!({}))?;
        Ok((report["ram"]["postcopy-requests"].as_u64() > Some(10)).then_some(()))
    })?;
    drop(source);
    let said = receiver.wait(MIGRATION_MAX)?.refused()?;
    let part = journey.file("store/kept.part");
    let told = format!("what has come is kept in {}", text(&part)?);
    ensure!(said.contains(&told), "it is not said that a part was kept: {said}");
    let left: Vec<_> = fs::read_dir(journey.file("store"))?.collect();
    ensure!(left.len() == 1 && part.exists(), "left behind: {left:?}");
    let whole = journey.file("whole");
    let join = ["rescue", "join", text(&part)?, "-o", text(&whole)?];
    let said = journey.whimbrel(&join)?.refused()?;
    ensure!(said.contains("pages of RAM are in neither part"), "{said}");
    let said = journey.whimbrel(&[&join[..], &["--lost=poison"]].concat())?.refused()?;
    ensure!(said.contains("no QEMU can be told so"), "{said}");
    ensure!(!whole.exists(), "a QEMU would take zeros for what is lost");
    Ok(())
}

/// The memory of a source that was killed lay in a file: with what had come its guest is whole, and
/// goes on in another QEMU where it was.
fn a_killed_source_comes_back_from_its_memory(peer: Peer) -> Result<()> {
    let guest = BootSector { seed: 87 };
    let journey = Journey::new(peer.machine(), &guest)?;
    let journey = journey.in_memory_of(Backing::File, Backing::Ordinary);
    let mut source = journey.boot(peer)?;
    let kept = journey.file("kept");
    let (mut receiver, uri) = journey.receiving(Transport::Tcp, &kept)?;
    source.qmp.enable(PLAIN)?;
    // What is written again and again is never sent whole, and hardly anything of it once it has gone.
    let slow = json!({
        "max-bandwidth": 4_000_000, "max-postcopy-bandwidth": 4096, "downtime-limit": 1,
    });
    source.qmp.execute("migrate-set-parameters", &slow)?;
    source.qmp.migrate(&uri)?;
    wait::until("a whole round", MIGRATION_MAX, || {
        let report = source.qmp.execute("query-migrate", &json!({}))?;
        Ok((report["ram"]["dirty-sync-count"].as_u64() > Some(2)).then_some(()))
    })?;
    source.qmp.execute("migrate-start-postcopy", &json!({}))?;
    wait_for_status(&mut source, "postcopy-active")?;
    // A page that comes after the guest shows that the guest has come.
    wait::until("pages after the guest", MIGRATION_MAX, || {
        let report = source.qmp.execute("query-migrate", &json!({}))?;
        Ok((report["ram"]["postcopy-bytes"].as_u64() > Some(8192)).then_some(()))
    })?;
    let before = source.console.written();
    drop(source);
    let said = receiver.wait(MIGRATION_MAX)?.refused()?;
    ensure!(said.contains("what has come is kept in"), "it is not said: {said}");

    let (part, whole) = (journey.file("kept.part"), journey.file("whole"));
    let memory = journey.file("source.ram");
    let shown = journey.whimbrel(&["inspect", text(&part)?, "--json"])?.succeeded()?;
    let shown: Value = serde_json::from_str(&shown.output)?;
    ensure!(shown["missing-pages"].as_u64() > Some(0), "nothing was missing: {shown}");
    let length = fs::metadata(&memory)?.len();
    let description = json!({
        "version": 1,
        "machine": shown["machine"],
        "blocks": [{ "name": BLOCK, "length": length, "offset": 0 }],
    });
    fs::write(journey.file("source.ram.json"), description.to_string())?;
    let join = ["rescue", "join", text(&part)?, text(&memory)?, "-o", text(&whole)?];
    journey.whimbrel(&join)?.succeeded()?;
    let destination = journey.restore(&whole, peer, Transport::Tcp, &[])?;
    destination.console.wait_for(guest.settled_lines(), MIGRATION_MAX)?;
    guest.check_continues(&before, &destination.console.written())
}

fn the_source_dies(peer: Peer) -> Result<()> {
    source_dies(peer, PLAIN, &[])
}

fn the_source_dies_with_preempt(peer: Peer) -> Result<()> {
    source_dies(peer, PREEMPT, &["--preempt"])
}

/// A destination that was not told what we were, or of another page size: it refuses, we say so,
/// and its guest never ran.
fn refused(peer: Peer, capabilities: &[&str], more: &[&str]) -> Result<()> {
    let guest = BootSector { seed: 83 };
    let journey = Journey::new(peer.machine(), &guest)?;
    let mut source = journey.boot(peer)?;
    let kept = journey.keep(&mut source, Transport::Tcp, &[])?;
    let (destination, uri) = journey.waiting(peer, Transport::Tcp, capabilities)?;
    let postcopy = ["restore", text(&kept)?, &uri, "--postcopy"];
    let said = journey.whimbrel(&[&postcopy, more].concat())?.refused()?;
    ensure!(!said.is_empty(), "a refusal without a reason");
    ensure!(destination.console.written().is_empty(), "the guest ran all the same");
    Ok(())
}

fn a_destination_without_postcopy_refuses(peer: Peer) -> Result<()> {
    refused(peer, &[], &[])
}

fn a_destination_with_other_pages_refuses(peer: Peer) -> Result<()> {
    refused(peer, PLAIN, &["--page-size", "2M"])
}

/// A source that sends pages on a connection that we were not told of.
fn preempt_only_at_the_source(peer: Peer) -> Result<()> {
    let guest = BootSector { seed: 84 };
    let journey = Journey::new(peer.machine(), &guest)?;
    let mut source = journey.boot(peer)?;
    let kept = journey.file("kept");
    let (mut receiver, uri) =
        journey.receiving_with(Transport::Tcp, &kept, &["--touch", "random"])?;
    source.qmp.enable(PREEMPT)?;
    let slow = json!({ "max-bandwidth": 1_000_000, "max-postcopy-bandwidth": 4_000_000 });
    source.qmp.execute("migrate-set-parameters", &slow)?;
    source.qmp.migrate(&uri)?;
    source.qmp.execute("migrate-start-postcopy", &json!({}))?;
    let said = receiver.wait(MIGRATION_MAX)?.refused()?;
    ensure!(said.contains("postcopy-preempt"), "it is not said why: {said}");
    ensure!(!kept.exists(), "a guest without all its pages was kept");
    Ok(())
}

/// The other way round nothing is missing: the connection that we wait for never comes.
fn preempt_only_here(peer: Peer) -> Result<()> {
    let guest = BootSector { seed: 85 };
    let journey = Journey::new(peer.machine(), &guest)?;
    let mut source = journey.boot(peer)?;
    let kept = journey.file("kept");
    let (mut receiver, uri) = journey.receiving_with(Transport::Tcp, &kept, &["--preempt"])?;
    source.qmp.enable(PLAIN)?;
    source.qmp.execute("migrate-set-parameters", &json!({ "max-bandwidth": 1_000_000 }))?;
    source.qmp.migrate(&uri)?;
    source.qmp.execute("migrate-start-postcopy", &json!({}))?;
    receiver.wait(MIGRATION_MAX)?.succeeded()?;
    source.wait_migrated(MIGRATION_MAX)?;
    let destination = journey.restore(&kept, peer, Transport::Tcp, &[])?;
    journey.check_arrived(&source, &destination)
}

/// Interrupted, it says so, and where the guest is now.
fn an_interrupted_restore_says_where_the_guest_is(peer: Peer) -> Result<()> {
    let guest = BootSector { seed: 86 };
    let journey = Journey::new(peer.machine(), &guest)?;
    let mut source = journey.boot(peer)?;
    let kept = journey.keep(&mut source, Transport::Tcp, &[])?;
    let (mut destination, uri) = journey.waiting(peer, Transport::Tcp, PREEMPT)?;
    let slow = ["restore", text(&kept)?, &uri, "--postcopy", "--preempt", "--bandwidth", "64k"];
    let mut restore = journey.start_whimbrel(&slow)?;
    destination.qmp.wait_event("RESUME", MIGRATION_MAX)?;
    restore.interrupt()?;
    let said = restore.wait(MIGRATION_MAX)?.refused()?;
    for part in ["cancelled", "had been handed over"] {
        ensure!(said.contains(part), "{part:?} is not said: {said}");
    }
    // The guest may run on until it touches what is missing; the destination keeps it.
    wait_for_status(&mut destination, "postcopy-paused")
}

on_each_peer!(
    the_destination_dies,
    the_destination_dies_with_preempt,
    the_source_dies,
    the_source_dies_with_preempt,
    a_killed_source_comes_back_from_its_memory,
    a_destination_without_postcopy_refuses,
    a_destination_with_other_pages_refuses,
    preempt_only_at_the_source,
    preempt_only_here,
    an_interrupted_restore_says_where_the_guest_is,
);
