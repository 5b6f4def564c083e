//! A stock QEMU sends its guest by postcopy to `whimbrel receive`, which touches pages in an order
//! of its own while they come; what it has kept is then restored.

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use whimbrel_peers::guest::{BootSector, Guest, Linux};
use whimbrel_peers::install::Peer;
use whimbrel_peers::journey::{Journey, MIGRATION_MAX, Transport};
use whimbrel_peers::memory::Backing;
use whimbrel_peers::qemu::Qemu;
use whimbrel_peers::{on_each_peer, wait};

/// When the source goes over to postcopy.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum GoesOver {
    /// As soon as it takes the command.
    AtOnce,
    /// When a part of its RAM has been sent.
    Halfway,
    /// When its guest has dirtied what had been sent.
    AfterARound,
}

/// How one guest comes.
#[derive(Debug, Clone, Copy)]
struct Way {
    from: Peer,
    to: Peer,
    transport: Transport,
    preempt: bool,
    memory: Backing,
    goes_over: GoesOver,
}

impl Way {
    fn of(peer: Peer) -> Self {
        Self {
            from: peer,
            to: peer,
            transport: Transport::Tcp,
            preempt: false,
            memory: Backing::Ordinary,
            goes_over: GoesOver::AtOnce,
        }
    }

    fn with_preempt(self) -> Self {
        Self { preempt: true, ..self }
    }

    fn by_unix(self) -> Self {
        Self { transport: Transport::Unix, ..self }
    }

    fn in_huge_pages(self) -> Self {
        Self { memory: Backing::Huge, ..self }
    }

    fn halfway(self) -> Self {
        Self { goes_over: GoesOver::Halfway, ..self }
    }

    fn after_a_round(self) -> Self {
        Self { goes_over: GoesOver::AfterARound, ..self }
    }
}

/// Has the source send its guest at a rate at which it never gets done by precopy.
fn send_by_postcopy(source: &mut Qemu, uri: &str, way: Way, rate: u32) -> Result<()> {
    let capabilities: &[&str] = match way.preempt {
        true => &["postcopy-ram", "postcopy-preempt"],
        false => &["postcopy-ram"],
    };
    source.qmp.enable(capabilities)?;
    let slow = json!({
        "downtime-limit": 1, "max-bandwidth": rate, "max-postcopy-bandwidth": rate,
    });
    source.qmp.execute("migrate-set-parameters", &slow)?;
    source.qmp.migrate(uri)?;
    let (figure, enough) = match way.goes_over {
        GoesOver::AtOnce => ("transferred", 0),
        GoesOver::Halfway => ("transferred", u64::from(rate)),
        GoesOver::AfterARound => ("dirty-sync-count", 3),
    };
    wait::until(&format!("{enough} {figure}"), MIGRATION_MAX, || {
        let report = source.qmp.execute("query-migrate", &json!({}))?;
        let far_enough = enough == 0 || report["ram"][figure].as_u64() >= Some(enough);
        Ok(far_enough.then_some(()))
    })?;
    source.qmp.execute("migrate-start-postcopy", &json!({}))?;
    source.wait_migrated(MIGRATION_MAX)
}

/// Bytes a second for each MiB of the guest's memory. What the guests here dirty is more, and most
/// pages are touched before they come by themselves.
const RATE: u32 = 125_000;

/// Takes the guest in; gives what `whimbrel receive` said of it.
fn keep_by_postcopy(
    journey: &Journey<'_>,
    source: &mut Qemu,
    way: Way,
    rate: u32,
) -> Result<Value> {
    let kept = journey.file("kept");
    let mut arguments = vec!["--json", "--touch", "random"];
    if way.preempt {
        arguments.push("--preempt");
    }
    let (mut receiver, uri) = journey.receiving_with(way.transport, &kept, &arguments)?;
    let sent = send_by_postcopy(source, &uri, way, rate);
    let ended = receiver.wait(MIGRATION_MAX)?;
    sent.with_context(|| format!("whimbrel says {:?}", ended.complaints))?;
    let report = ended.succeeded()?.json()?;
    ensure!(kept.is_file(), "whimbrel receive ended well but kept nothing");
    Ok(report)
}

/// The whole way: by postcopy into a file, and from there by precopy and by postcopy.
fn comes(way: Way, guest: &dyn Guest) -> Result<()> {
    let journey = Journey::new(way.from.machine(), guest)?.in_memory_of(way.memory, way.memory);
    let mut source = journey.boot(way.from)?;
    let report = keep_by_postcopy(&journey, &mut source, way, RATE * guest.mebibytes())?;
    let waited_for = report["faults"]["count"].as_u64();
    ensure!(waited_for > Some(0), "no page was waited for: {report}");
    let at_source = source.memory()?;
    let kept = journey.file("kept");
    let kept = kept.to_str().context("a path in UTF-8")?;
    let mut by_postcopy = vec!["--postcopy"];
    if way.memory == Backing::Huge {
        by_postcopy.extend(["--page-size", "2M"]);
    }
    for more in [&[][..], &by_postcopy] {
        let mut destination = journey.incoming_stopped(way.to)?;
        let capabilities: &[&str] = if more.is_empty() { &[] } else { &["postcopy-ram"] };
        let uri = journey.listen(&mut destination, way.transport, capabilities)?;
        journey.whimbrel(&[&["restore", kept, &uri], more].concat())?.succeeded()?;
        destination.wait_migrated(MIGRATION_MAX)?;
        at_source.check_same(&destination.memory()?, &[])?;
        destination.qmp.execute("cont", &json!({}))?;
        journey.check_arrived(&source, &destination)?;
    }
    Ok(())
}

fn boot_sector_at_once(peer: Peer) -> Result<()> {
    comes(Way::of(peer), &BootSector { seed: 71 })
}

fn boot_sector_at_once_with_preempt(peer: Peer) -> Result<()> {
    comes(Way::of(peer).with_preempt(), &BootSector { seed: 72 })
}

fn boot_sector_after_a_round_by_unix(peer: Peer) -> Result<()> {
    comes(Way::of(peer).after_a_round().by_unix(), &BootSector { seed: 73 })
}

fn boot_sector_after_a_round_by_unix_with_preempt(peer: Peer) -> Result<()> {
    comes(Way::of(peer).after_a_round().by_unix().with_preempt(), &BootSector { seed: 74 })
}

fn boot_sector_from_huge_pages(peer: Peer) -> Result<()> {
    comes(Way::of(peer).in_huge_pages(), &BootSector { seed: 75 })
}

fn boot_sector_from_huge_pages_after_a_round_with_preempt(peer: Peer) -> Result<()> {
    let way = Way::of(peer).in_huge_pages().after_a_round().with_preempt();
    comes(way, &BootSector { seed: 76 })
}

fn linux_at_once_with_preempt(peer: Peer) -> Result<()> {
    comes(Way::of(peer).with_preempt(), &Linux::new()?)
}

fn linux_halfway(peer: Peer) -> Result<()> {
    comes(Way::of(peer).halfway(), &Linux::new()?)
}

on_each_peer!(
    boot_sector_at_once,
    boot_sector_at_once_with_preempt,
    boot_sector_after_a_round_by_unix,
    boot_sector_after_a_round_by_unix_with_preempt,
    boot_sector_from_huge_pages,
    boot_sector_from_huge_pages_after_a_round_with_preempt,
    linux_at_once_with_preempt,
    linux_halfway,
);

/// The machine type is the older one's: the newer one ends its urgent channel with a mark, too.
mod v10_0_from_v7_2 {
    use super::*;

    #[test]
    #[ignore = "needs stock QEMUs: cargo xtask peers"]
    fn boot_sector_with_preempt() -> Result<()> {
        let way = Way { to: Peer::V10_0, ..Way::of(Peer::V7_2) };
        comes(way.with_preempt(), &BootSector { seed: 77 })
    }
}
