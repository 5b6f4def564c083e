//! One migration, its control sockets asked all the while.

use std::net::SocketAddr;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, Result, bail};
use serde_json::json;
use whimbrel_peers::qmp::{Event, Qmp};

use super::Args;
use super::asker::{Answer, Asker};
use super::busy::Busy;
use super::stall::Link;
use crate::bench::contender::Side;
use crate::bench::postcopy::guest::{QemuGuest, whimbrel_command};
use crate::bench::postcopy::pair::Pages;
use crate::bench::postcopy::writer::Writer;

const MIGRATION_MAX: Duration = Duration::from_secs(300);
/// How long the guest of a whimbrel runs before it moves; a QEMU's says when it is ready.
const SETTLE: Duration = Duration::from_secs(2);
/// How long the link is all but idle.
const IDLE: Duration = Duration::from_secs(3);
/// What goes over it then, in bytes a second.
const IDLE_BANDWIDTH: u64 = 16 << 20;
/// How long it is full, at least.
const LOADED: Duration = Duration::from_secs(2);
/// How long it stands still in the middle of a device section.
const STALL: Duration = Duration::from_secs(3);
/// Long enough that a guest which writes as fast as it can is switched over after one pass.
const DOWNTIME_MS: u64 = 5000;

/// Who is measured.
#[derive(Debug)]
pub(super) enum Contender<'a> {
    Whimbrel { binary: &'a Path },
    Qemu { guest: &'a QemuGuest, version: &'a str },
}

/// What is going on at one end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Phase {
    /// RAM goes over a link that is all but idle.
    Idle,
    /// RAM goes as fast as it can.
    Loaded,
    /// The guest stands still, and the rest goes as fast as it can.
    Switchover,
    /// The link stands still in the middle of a device section.
    Stalled,
}

impl Phase {
    pub(super) const ALL: [Self; 4] = [Self::Idle, Self::Loaded, Self::Switchover, Self::Stalled];

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Idle => "idle link",
            Self::Loaded => "loaded link",
            Self::Switchover => "switchover",
            Self::Stalled => "stalled in a device section",
        }
    }
}

/// Which end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum End {
    Source,
    Destination,
}

impl End {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Source => "source",
            Self::Destination => "destination",
        }
    }
}

/// How long the answers of one phase took at one end, in ms.
pub(super) type Answers = Vec<((Phase, End), Vec<f64>)>;

impl Contender<'_> {
    pub(super) fn name(&self) -> String {
        match self {
            Self::Whimbrel { .. } => "whimbrel".to_owned(),
            Self::Qemu { version, .. } => format!("QEMU {version}"),
        }
    }

    /// Two migrations: one over a link that is idle and then loaded, and one over a link that stands
    /// still where devices are.
    pub(super) fn sample(&self, args: &Args, writer: Writer, folder: &Path) -> Result<Answers> {
        let mut answers = self.over_a_link_that_works(args, writer, folder)?;
        answers.extend(self.over_a_link_that_stalls(args, writer, folder)?);
        Ok(answers)
    }

    fn over_a_link_that_works(
        &self,
        args: &Args,
        writer: Writer,
        folder: &Path,
    ) -> Result<Answers> {
        let mut pair = self.start(args, writer, folder)?;
        let uri = format!("tcp:{}", pair.listens_at()?);
        let limit = json!({ "max-bandwidth": IDLE_BANDWIDTH, "downtime-limit": 1 });
        pair.source.qmp.execute("migrate-set-parameters", &limit)?;
        let (asked, _busy) = (pair.ask(args)?, Busy::start(args.busy)?);
        pair.source.qmp.migrate(&uri)?;
        let active = until(&mut pair.source.qmp, "active")?;
        std::thread::sleep(IDLE);
        let unlimited = json!({ "max-bandwidth": 0 });
        pair.source.qmp.execute("migrate-set-parameters", &unlimited)?;
        let loaded = now()?;
        std::thread::sleep(LOADED);
        let soon = json!({ "downtime-limit": DOWNTIME_MS });
        pair.source.qmp.execute("migrate-set-parameters", &soon)?;
        let stopped = pair.source.qmp.wait_event("STOP", MIGRATION_MAX)?.at;
        let gone = until(&mut pair.source.qmp, "completed")?;
        let resumed = pair.destination.qmp.wait_event("RESUME", MIGRATION_MAX)?.at;
        let [source, destination] = asked.map(Asker::finish);
        let (source, destination) = (source?, destination?);
        Ok(vec![
            ((Phase::Idle, End::Source), within(&source, active, loaded)),
            ((Phase::Idle, End::Destination), within(&destination, active, loaded)),
            ((Phase::Loaded, End::Source), within(&source, loaded, stopped)),
            ((Phase::Loaded, End::Destination), within(&destination, loaded, stopped)),
            ((Phase::Switchover, End::Source), within(&source, stopped, gone)),
            ((Phase::Switchover, End::Destination), within(&destination, stopped, resumed)),
        ])
    }

    fn over_a_link_that_stalls(
        &self,
        args: &Args,
        writer: Writer,
        folder: &Path,
    ) -> Result<Answers> {
        let mut pair = self.start(args, writer, folder)?;
        let link = Link::to(pair.listens_at()?)?;
        let unlimited = json!({ "max-bandwidth": 0, "downtime-limit": DOWNTIME_MS });
        pair.source.qmp.execute("migrate-set-parameters", &unlimited)?;
        let (asked, _busy) = (pair.ask(args)?, Busy::start(args.busy)?);
        pair.source.qmp.migrate(&format!("tcp:{}", link.address))?;
        link.wait_for_stall(MIGRATION_MAX)?;
        let stalled = now()?;
        std::thread::sleep(STALL);
        let over = now()?;
        link.go_on()?;
        until(&mut pair.source.qmp, "completed")?;
        pair.destination.qmp.wait_event("RESUME", MIGRATION_MAX)?;
        let [source, destination] = asked.map(Asker::finish);
        Ok(vec![
            ((Phase::Stalled, End::Source), within(&source?, stalled, over)),
            ((Phase::Stalled, End::Destination), within(&destination?, stalled, over)),
        ])
    }

    /// A source whose guest writes as fast as it can, and a destination that waits.
    fn start(&self, args: &Args, writer: Writer, folder: &Path) -> Result<Pair> {
        let start = |incoming: bool| {
            let files = folder.join(if incoming { "destination" } else { "source" });
            let asked = files.with_extension("asked");
            let mut command = match self {
                Self::Whimbrel { binary } => {
                    whimbrel_command(binary, args.memory, writer, Pages::Small, incoming)
                }
                Self::Qemu { guest, .. } => guest.command(Pages::Small, incoming)?,
            };
            if let Self::Qemu { .. } = self {
                // One monitor serves one client.
                with_monitor(&mut command, &asked);
            }
            Side::start(command, &files, |socket| match self {
                Self::Whimbrel { .. } => format!("unix:{}", socket.display()),
                Self::Qemu { .. } => monitor(socket),
            })
        };
        let (destination, source) = (start(true)?, start(false)?);
        let extension = if matches!(self, Self::Qemu { .. }) { "asked" } else { "qmp" };
        let sockets =
            ["source", "destination"].map(|end| folder.join(end).with_extension(extension));
        let mut pair = Pair { source, destination, sockets };
        for side in [&mut pair.source, &mut pair.destination] {
            side.qmp.enable(&["events", "return-path"])?;
            if args.multifd > 0 {
                side.qmp.enable(&["multifd"])?;
                let channels = json!({ "multifd-channels": args.multifd });
                side.qmp.execute("migrate-set-parameters", &channels)?;
            }
        }
        match self {
            Self::Whimbrel { .. } => std::thread::sleep(SETTLE),
            Self::Qemu { guest, .. } => guest.settle(&mut pair.source.qmp).map(drop)?,
        }
        Ok(pair)
    }
}

fn monitor(socket: &Path) -> String {
    format!("unix:{},server=on,wait=off", socket.display())
}

/// With another monitor before the one whose socket is the last argument.
fn with_monitor(command: &mut Command, socket: &Path) {
    // A socket of an earlier run would be in the way.
    let _ = std::fs::remove_file(socket);
    command.arg(monitor(socket)).arg("-qmp");
}

struct Pair {
    source: Side,
    destination: Side,
    /// Where they are asked.
    sockets: [std::path::PathBuf; 2],
}

impl Pair {
    /// Has the destination wait.
    fn listens_at(&mut self) -> Result<SocketAddr> {
        let listen = json!({ "uri": "tcp:127.0.0.1:0" });
        self.destination.qmp.execute("migrate-incoming", &listen)?;
        let report = self.destination.qmp.execute("query-migrate", &json!({}))?;
        let port = report["socket-address"][0]["port"].as_str().context("no port to go to")?;
        Ok(SocketAddr::from(([127, 0, 0, 1], port.parse()?)))
    }

    /// Asks both ends from here on.
    fn ask(&self, args: &Args) -> Result<[Asker; 2]> {
        let [source, destination] = &self.sockets;
        let every = Duration::from_millis(args.every);
        Ok([Asker::start(source, every)?, Asker::start(destination, every)?])
    }
}

/// Waits for a state; gives when it began.
fn until(qmp: &mut Qmp, status: &str) -> Result<Duration> {
    loop {
        let Event { data, at, .. } = qmp.wait_event("MIGRATION", MIGRATION_MAX)?;
        match data["status"].as_str() {
            Some(now) if now == status => return Ok(at),
            Some("failed" | "cancelled") => {
                let report = qmp.execute("query-migrate", &json!({}))?;
                bail!("the migration failed: {}", report["error-desc"]);
            }
            Some(_) | None => {}
        }
    }
}

fn now() -> Result<Duration> {
    Ok(SystemTime::now().duration_since(UNIX_EPOCH)?)
}

/// The answers to what was asked in that time.
fn within(answers: &[Answer], from: Duration, to: Duration) -> Vec<f64> {
    let asked = |answer: &&Answer| answer.at >= from && answer.at < to;
    answers.iter().filter(asked).map(|answer| answer.ms).collect()
}
