//! A kept guest goes to a stock QEMU by postcopy: it runs there, and its RAM follows.

use std::path::Path;

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::{Value, json};
use whimbrel_peers::guest::{BootSector, Guest, Linux};
use whimbrel_peers::install::Peer;
use whimbrel_peers::journey::{Journey, MIGRATION_MAX, SETTLE_MAX, Transport};
use whimbrel_peers::memory::Backing;
use whimbrel_peers::qemu::Qemu;
use whimbrel_peers::whimbrel::Whimbrel;
use whimbrel_peers::{on_each_peer, wait};

/// How one guest goes.
#[derive(Debug, Clone, Copy)]
struct Way {
    from: Peer,
    to: Peer,
    transport: Transport,
    preempt: bool,
    memory: Backing,
}

impl Way {
    fn of(peer: Peer) -> Self {
        let (transport, memory) = (Transport::Tcp, Backing::Ordinary);
        Self { from: peer, to: peer, transport, preempt: false, memory }
    }

    fn with_preempt(self) -> Self {
        Self { preempt: true, ..self }
    }

    fn by_unix(self) -> Self {
        Self { transport: Transport::Unix, ..self }
    }

    fn into_huge_pages(self) -> Self {
        Self { memory: Backing::Huge, ..self }
    }

    fn capabilities(self) -> &'static [&'static str] {
        match self.preempt {
            true => &["events", "postcopy-ram", "postcopy-preempt"],
            false => &["events", "postcopy-ram"],
        }
    }

    fn journey<'a>(&self, guest: &'a dyn Guest) -> Result<Journey<'a>> {
        Ok(Journey::new(self.from.machine(), guest)?.in_memory_of(Backing::Ordinary, self.memory))
    }

    /// Starts `whimbrel restore --postcopy`; what nobody asks for goes at `bandwidth`.
    fn restore(
        self,
        journey: &Journey<'_>,
        kept: &Path,
        uri: &str,
        bandwidth: &str,
    ) -> Result<Whimbrel> {
        let kept = kept.to_str().context("a path in UTF-8")?;
        let mut arguments = vec!["restore", kept, uri, "--postcopy", "--json"];
        arguments.extend(["--bandwidth", bandwidth]);
        if self.preempt {
            arguments.push("--preempt");
        }
        if self.memory == Backing::Huge {
            arguments.extend(["--page-size", "2M"]);
        }
        journey.start_whimbrel(&arguments)
    }
}

/// Waits until the guest has said something more, on RAM that has not come as a whole.
fn runs_before_its_ram(destination: &mut Qemu, restore: &mut Whimbrel) -> Result<()> {
    wait::until("the guest's first words", SETTLE_MAX, || {
        let says = !whimbrel_peers::console::reports(&destination.console.written()).is_empty();
        // In this order: what had been said before was said while RAM was missing.
        let report = destination.qmp.execute("query-migrate", &json!({}))?;
        match report["status"].as_str() {
            Some("postcopy-active") if says => Ok(Some(())),
            Some("active" | "postcopy-active" | "setup") | None => {
                if !restore.is_running()? {
                    restore.wait(MIGRATION_MAX)?.succeeded()?;
                }
                Ok(None)
            }
            _ => {
                bail!("no postcopy under way: {report}, whimbrel {:?}", restore.wait(MIGRATION_MAX))
            }
        }
    })
    .with_context(|| format!("QEMU says {:?}", destination.complaint()))
}

fn restored(destination: &mut Qemu, restore: &mut Whimbrel) -> Result<Value> {
    let ended = restore.wait(MIGRATION_MAX)?;
    let said = destination.complaint();
    let report = ended.succeeded().with_context(|| format!("QEMU says {said:?}"))?.json()?;
    destination.wait_migrated(MIGRATION_MAX)?;
    Ok(report)
}

/// The whole way, with all checks. The guest runs long before `bandwidth` has brought its RAM.
fn goes(way: Way, guest: &dyn Guest, bandwidth: &str) -> Result<()> {
    let journey = way.journey(guest)?;
    let mut source = journey.boot(way.from)?;
    let kept = journey.keep(&mut source, Transport::Tcp, &[])?;
    let (mut destination, uri) = journey.waiting(way.to, way.transport, way.capabilities())?;
    let mut restore = way.restore(&journey, &kept, &uri, bandwidth)?;
    runs_before_its_ram(&mut destination, &mut restore)?;
    let report = restored(&mut destination, &mut restore)?;
    let asked = report["ram"]["postcopy-requests"].as_u64();
    ensure!(asked > Some(0), "the guest asked for no page: {report}");
    journey.check_arrived(&source, &destination)?;
    ran_on_before(&mut destination)?;
    destination.qmp.execute("stop", &json!({}))?;
    guest
        .written()
        .map_or(Ok(()), |written| source.memory()?.check_same(&destination.memory()?, &written))
}

/// By QEMU's own events: the guest was resumed before the migration was complete.
fn ran_on_before(destination: &mut Qemu) -> Result<()> {
    let resumed = destination.qmp.wait_event("RESUME", MIGRATION_MAX)?;
    loop {
        let event = destination.qmp.wait_event("MIGRATION", MIGRATION_MAX)?;
        if event.data["status"] == "completed" {
            ensure!(
                resumed.at < event.at,
                "RESUME at {:?}, completed at {:?}",
                resumed.at,
                event.at
            );
            return Ok(());
        }
    }
}

/// Slow enough that the guest, which asks for most of its 9 MiB itself, has said something long
/// before the rest of it (the firmware, half a MiB) has come.
const BOOT_SECTOR_RATE: &str = "128k";
const LINUX_RATE: &str = "4M";

fn boot_sector_by_tcp(peer: Peer) -> Result<()> {
    goes(Way::of(peer), &BootSector { seed: 61 }, BOOT_SECTOR_RATE)
}

fn boot_sector_by_tcp_with_preempt(peer: Peer) -> Result<()> {
    goes(Way::of(peer).with_preempt(), &BootSector { seed: 62 }, BOOT_SECTOR_RATE)
}

fn boot_sector_by_unix(peer: Peer) -> Result<()> {
    goes(Way::of(peer).by_unix(), &BootSector { seed: 63 }, BOOT_SECTOR_RATE)
}

fn boot_sector_by_unix_with_preempt(peer: Peer) -> Result<()> {
    goes(Way::of(peer).by_unix().with_preempt(), &BootSector { seed: 64 }, BOOT_SECTOR_RATE)
}

fn boot_sector_into_huge_pages(peer: Peer) -> Result<()> {
    goes(Way::of(peer).into_huge_pages(), &BootSector { seed: 65 }, BOOT_SECTOR_RATE)
}

fn boot_sector_into_huge_pages_with_preempt(peer: Peer) -> Result<()> {
    let way = Way::of(peer).into_huge_pages().with_preempt();
    goes(way, &BootSector { seed: 66 }, BOOT_SECTOR_RATE)
}

fn linux_by_unix(peer: Peer) -> Result<()> {
    goes(Way::of(peer).by_unix(), &Linux::new()?, LINUX_RATE)
}

fn linux_by_tcp_with_preempt(peer: Peer) -> Result<()> {
    goes(Way::of(peer).with_preempt(), &Linux::new()?, LINUX_RATE)
}

/// Into a QEMU that does not run it, every byte can be compared; and nothing is asked for.
fn a_guest_that_does_not_run_arrives_as_it_was(peer: Peer) -> Result<()> {
    for memory in [Backing::Ordinary, Backing::Huge] {
        let way = Way { memory, ..Way::of(peer).with_preempt() };
        let guest = BootSector { seed: 67 };
        let journey = way.journey(&guest)?;
        let mut source = journey.boot(way.from)?;
        let kept = journey.keep(&mut source, Transport::Tcp, &[])?;
        let mut destination = journey.incoming_stopped(peer)?;
        let uri = journey.listen(&mut destination, way.transport, way.capabilities())?;
        restored(&mut destination, &mut way.restore(&journey, &kept, &uri, "0")?)?;
        source.memory()?.check_same(&destination.memory()?, &[])?;
        ensure!(destination.console.written().is_empty(), "the guest ran before it was told to");
        destination.qmp.execute("cont", &json!({}))?;
        journey.check_arrived(&source, &destination)?;
    }
    Ok(())
}

on_each_peer!(
    boot_sector_by_tcp,
    boot_sector_by_tcp_with_preempt,
    boot_sector_by_unix,
    boot_sector_by_unix_with_preempt,
    boot_sector_into_huge_pages,
    boot_sector_into_huge_pages_with_preempt,
    linux_by_unix,
    linux_by_tcp_with_preempt,
    a_guest_that_does_not_run_arrives_as_it_was,
);

/// The machine type is the older one's: the newer one wants its urgent channel early, too.
mod v10_0_from_v7_2 {
    use super::*;

    const WAY: Way = Way {
        from: Peer::V7_2,
        to: Peer::V10_0,
        transport: Transport::Tcp,
        preempt: true,
        memory: Backing::Ordinary,
    };

    #[test]
    #[ignore = "needs stock QEMUs: cargo xtask peers"]
    fn boot_sector_with_preempt() -> Result<()> {
        goes(WAY, &BootSector { seed: 68 }, BOOT_SECTOR_RATE)
    }

    #[test]
    #[ignore = "needs stock QEMUs: cargo xtask peers"]
    fn linux_with_preempt() -> Result<()> {
        goes(WAY, &Linux::new()?, LINUX_RATE)
    }
}
