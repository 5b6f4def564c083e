//! One migration of one pair over one link, and what it is measured by.

use std::cell::RefCell;
use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use serde_json::{Value, json};
use whimbrel_peers::qmp::{Event, Qmp};

use super::clock::Record;
use super::figures::{Faults, Figures};
use super::guest::{QemuGuest, Settled, whimbrel_command};
use super::helper::Helper;
use super::pair::{Engine, Mode, Pages, Pair, Scenario};
use super::writer::Writer;
use crate::bench::contender::{Memory, Side};
use crate::bench::network::{DESTINATION_ADDRESS, End, Network};

/// For a migration to get under way, and for one to end.
const BEGIN_MAX: Duration = Duration::from_secs(60);
const MIGRATION_MAX: Duration = Duration::from_secs(300);
/// A guest that is only kept in a file may stop for as long as that takes.
const KEEPING_DOWNTIME_MS: u32 = 600_000;

/// Everything that does not change from run to run.
pub(super) struct Stage<'a> {
    pub(super) qemu: Option<QemuGuest>,
    pub(super) whimbrel: Option<PathBuf>,
    pub(super) memory: Memory,
    pub(super) writer: Writer,
    pub(super) folder: &'a Path,
    /// The guests that `whimbrel restore` serves, each kept once.
    pub(super) kept: RefCell<HashMap<Pages, Kept>>,
}

/// A QEMU guest in a file.
#[derive(Debug, Clone)]
pub(super) struct Kept {
    file: PathBuf,
    /// What its guest had recorded when it stopped.
    record: Record,
    settled: Settled,
}

impl Stage<'_> {
    /// One migration between two fresh processes.
    pub(super) fn run(&self, pair: Pair, scenario: Scenario, network: &Network) -> Result<Figures> {
        match pair {
            Pair::Qq => self.live(Engine::Qemu, scenario, network),
            Pair::Ww => self.live(Engine::Whimbrel, scenario, network),
            Pair::Wq => self.served(scenario, network),
            Pair::Qw => self.taken_in(scenario, network),
        }
    }

    /// Why this pair cannot run, if it cannot.
    pub(super) fn obstacle(&self, pair: Pair) -> Result<Option<String>> {
        let missing = match pair {
            Pair::Qq => return Ok(None),
            Pair::Ww => return self.live_obstacle(),
            Pair::Wq => ("restore", "--postcopy"),
            Pair::Qw => ("receive", "--touch"),
        };
        let (command, option) = missing;
        let help = Command::new(self.whimbrel()?).args([command, "--help"]).output()?;
        let knows = String::from_utf8_lossy(&help.stdout).contains(option);
        Ok((!knows).then(|| format!("'whimbrel {command}' has no {option}")))
    }

    fn live_obstacle(&self) -> Result<Option<String>> {
        let mut command = Command::new(self.whimbrel()?);
        command.args([
            "vm",
            "--accel",
            "native",
            "--memory",
            "32M",
            "--incoming",
            "defer",
            "--qmp",
        ]);
        let mut side = Side::start(command, &self.folder.join("probe"), |socket| {
            format!("unix:{}", socket.display())
        })?;
        Ok(side.qmp.enable(Mode::Preempt.capabilities()).err().map(|error| format!("{error:#}")))
    }

    /// Two VMMs of one kind, each controlled through its socket.
    fn live(&self, engine: Engine, scenario: Scenario, network: &Network) -> Result<Figures> {
        let mut destination = self.vmm(engine, End::Destination, scenario.pages, Some(network))?;
        let mut source = self.vmm(engine, End::Source, scenario.pages, Some(network))?;
        prepare(&mut source.qmp, scenario.mode)?;
        let uri = self.listen(engine, &mut destination.qmp, scenario.mode)?;
        let settled = match engine {
            Engine::Qemu => Some(self.qemu()?.settle(&mut source.qmp)?),
            Engine::Whimbrel => None,
        };

        let before = (source.cpu()?, destination.cpu()?);
        let sent = migrate(&mut source.qmp, &uri)?;
        let arrived = until_completed(&mut destination.qmp, "the destination")?;
        let (faults, own) = match settled {
            Some(settled) => {
                let later = self.qemu()?.whole_record(&mut destination.qmp)?;
                let earlier = self.qemu()?.whole_record(&mut source.qmp)?;
                let sent = source.qmp.execute("query-migrate", &json!({}))?;
                let says = destination.qmp.execute("query-migrate", &json!({}))?;
                of_guest(settled, [&earlier, &later], &sent, &says)?
            }
            None => {
                let report = destination.qmp.execute("query-migrate", &json!({}))?;
                let mut says = of_counters(&report);
                let sent = source.qmp.execute("query-migrate", &json!({}))?;
                says["x-answers"] = sent["x-answers"].clone();
                (Faults::of_report(&report["x-faults"])?, says)
            }
        };
        let resumed = resumed(&arrived)?;
        let stopped = first(&sent, "the source", |event| event.name == "STOP")?;
        Ok(Figures {
            faults,
            phase_s: seconds(resumed, completed(&arrived)?),
            downtime_ms: Some(seconds(stopped, resumed) * 1e3),
            source_cpu_s: source.cpu()? - before.0,
            destination_cpu_s: destination.cpu()? - before.1,
            own,
        })
    }

    /// `whimbrel restore` serves a kept guest to a QEMU.
    fn served(&self, scenario: Scenario, network: &Network) -> Result<Figures> {
        let Kept { file, record, settled } = self.kept(scenario.pages)?;
        let mut destination =
            self.vmm(Engine::Qemu, End::Destination, scenario.pages, Some(network))?;
        let uri = self.listen(Engine::Qemu, &mut destination.qmp, scenario.mode)?;
        let mut command = Command::new(self.whimbrel()?);
        command.arg("restore").arg(&file).args([&uri, "--postcopy", "--json"]);
        command.args(["--page-size", scenario.pages.name()]);
        if scenario.mode == Mode::Preempt {
            command.arg("--preempt");
        }
        let before = destination.cpu()?;
        let files = self.folder.join("restore");
        let mut source = Helper::start(network.at(End::Source, &command), &files)?;
        let arrived = until_completed(&mut destination.qmp, "the destination")?;
        let later = self.qemu()?.whole_record(&mut destination.qmp)?;
        let says = destination.qmp.execute("query-migrate", &json!({}))?;
        let ended = source.wait(MIGRATION_MAX)?;
        let (faults, own) = of_guest(settled, [&record, &later], &ended.said, &says)?;
        let resumed = resumed(&arrived)?;
        Ok(Figures {
            faults,
            phase_s: seconds(resumed, completed(&arrived)?),
            // The guest ran last when it was kept.
            downtime_ms: None,
            source_cpu_s: ended.cpu_s,
            destination_cpu_s: destination.cpu()? - before,
            own,
        })
    }

    /// `whimbrel receive` takes in a QEMU guest, touching its pages while they arrive.
    fn taken_in(&self, scenario: Scenario, network: &Network) -> Result<Figures> {
        let mut source = self.vmm(Engine::Qemu, End::Source, scenario.pages, Some(network))?;
        prepare(&mut source.qmp, scenario.mode)?;
        self.qemu()?.settle(&mut source.qmp)?;
        let store = self.folder.join("taken-in");
        let mut command = Command::new(self.whimbrel()?);
        command.args(["receive", &format!("tcp:{DESTINATION_ADDRESS}:0"), "--store"]);
        command.arg(&store).args(["--touch", "random", "--json"]);
        if scenario.mode == Mode::Preempt {
            command.arg("--preempt");
        }
        let files = self.folder.join("receive");
        let mut destination = Helper::start(network.at(End::Destination, &command), &files)?;
        let uri = destination.listens_at(BEGIN_MAX)?;

        let before = source.cpu()?;
        let sent = migrate(&mut source.qmp, &uri)?;
        let source_cpu_s = source.cpu()? - before;
        let ended = destination.wait(MIGRATION_MAX)?;
        fs::remove_file(&store)?;
        let running = first(&sent, "the source", |event| status(event) == Some("postcopy-active"))?;
        Ok(Figures {
            faults: Faults::of_report(&ended.said["faults"])?,
            phase_s: seconds(running, completed(&sent)?),
            // No guest runs on, and what a stock source says is at times the whole phase.
            downtime_ms: None,
            source_cpu_s,
            destination_cpu_s: ended.cpu_s,
            own: ended.said["faults"].clone(),
        })
    }

    /// A guest in a file: kept by precopy, on no link, when it is first asked for.
    fn kept(&self, pages: Pages) -> Result<Kept> {
        if let Some(kept) = self.kept.borrow().get(&pages) {
            return Ok(kept.clone());
        }
        let mut source = self.vmm(Engine::Qemu, End::Source, pages, None)?;
        let settled = self.qemu()?.settle(&mut source.qmp)?;
        let file = self.folder.join(format!("kept-{}", pages.name()));
        let mut command = Command::new(self.whimbrel()?);
        command.args(["receive", "tcp:127.0.0.1:0", "--json", "--store"]).arg(&file);
        let mut receiver = Helper::start(command, &self.folder.join("receive"))?;
        let uri = receiver.listens_at(BEGIN_MAX)?;
        // A guest that writes as fast as it can stops when all its memory has gone once.
        let limits = json!({ "max-bandwidth": 0, "downtime-limit": KEEPING_DOWNTIME_MS });
        source.qmp.execute("migrate-set-parameters", &limits)?;
        source.qmp.migrate(&uri)?;
        source.qmp.wait_migrated(MIGRATION_MAX)?;
        receiver.wait(MIGRATION_MAX)?;
        let record = self.qemu()?.whole_record(&mut source.qmp)?;
        let kept = Kept { file, record, settled };
        self.kept.borrow_mut().insert(pages, kept.clone());
        Ok(kept)
    }

    /// Starts a VMM: the source with its guest, the destination waiting; on no link at all for
    /// `None`.
    fn vmm(
        &self,
        engine: Engine,
        end: End,
        pages: Pages,
        network: Option<&Network>,
    ) -> Result<Side> {
        let incoming = end == End::Destination;
        let command = match engine {
            Engine::Qemu => self.qemu()?.command(pages, incoming)?,
            Engine::Whimbrel => {
                whimbrel_command(self.whimbrel()?, self.memory, self.writer, pages, incoming)
            }
        };
        let command = match network {
            Some(network) => network.at(end, &command),
            None => command,
        };
        let name = if incoming { "destination" } else { "source" };
        Side::start(command, &self.folder.join(name), |socket| match engine {
            Engine::Qemu => format!("unix:{},server=on,wait=off", socket.display()),
            Engine::Whimbrel => format!("unix:{}", socket.display()),
        })
    }

    /// Has a destination wait, and says where.
    fn listen(&self, engine: Engine, qmp: &mut Qmp, mode: Mode) -> Result<String> {
        qmp.enable(mode.capabilities())?;
        if engine == Engine::Qemu {
            qmp.enable(&["postcopy-blocktime"])?;
        }
        let uri = json!({ "uri": format!("tcp:{DESTINATION_ADDRESS}:0") });
        qmp.execute("migrate-incoming", &uri)?;
        let report = qmp.execute("query-migrate", &json!({}))?;
        let port = report["socket-address"][0]["port"].as_str().context("no port to go to")?;
        Ok(format!("tcp:{DESTINATION_ADDRESS}:{port}"))
    }

    fn qemu(&self) -> Result<&QemuGuest> {
        self.qemu.as_ref().context("this run has no QEMU")
    }

    fn whimbrel(&self) -> Result<&Path> {
        self.whimbrel.as_deref().context("this run has no whimbrel")
    }
}

fn prepare(source: &mut Qmp, mode: Mode) -> Result<()> {
    source.enable(mode.capabilities())?;
    let unlimited = json!({ "max-bandwidth": 0, "max-postcopy-bandwidth": 0 });
    source.execute("migrate-set-parameters", &unlimited).map(drop)
}

/// Migrates, by postcopy as soon as there is something to migrate; everything that happened.
fn migrate(source: &mut Qmp, uri: &str) -> Result<Vec<Event>> {
    source.migrate(uri)?;
    let mut seen = Vec::new();
    loop {
        let event = source.next_event(BEGIN_MAX)?;
        let status = status(&event).map(str::to_owned);
        seen.push(event);
        match status.as_deref() {
            Some("active") => break,
            Some("failed") => bail!("the migration did not begin"),
            Some(_) | None => {}
        }
    }
    source.execute("migrate-start-postcopy", &json!({}))?;
    seen.extend(until_completed(source, "the source")?);
    Ok(seen)
}

/// Everything up to the end of the migration.
fn until_completed(qmp: &mut Qmp, who: &str) -> Result<Vec<Event>> {
    let mut seen = Vec::new();
    loop {
        let event = qmp.next_event(MIGRATION_MAX).with_context(|| who.to_owned())?;
        let status = status(&event).map(str::to_owned);
        seen.push(event);
        match status.as_deref() {
            Some("completed") => return Ok(seen),
            Some(ended @ ("failed" | "cancelled" | "postcopy-paused")) => {
                bail!("{who} is {ended}")
            }
            Some(_) | None => {}
        }
    }
}

fn status(event: &Event) -> Option<&str> {
    (event.name == "MIGRATION").then(|| event.data["status"].as_str())?
}

/// When the first such event happened.
fn first(events: &[Event], who: &str, is_it: impl Fn(&Event) -> bool) -> Result<Duration> {
    let found = events.iter().find(|event| is_it(event));
    found.map(|event| event.at).with_context(|| {
        let names: Vec<_> =
            events.iter().map(|event| status(event).unwrap_or(event.name.as_str())).collect();
        format!("{who} said only: {}", names.join(", "))
    })
}

fn completed(events: &[Event]) -> Result<Duration> {
    first(events, "it", |event| status(event) == Some("completed"))
}

fn resumed(events: &[Event]) -> Result<Duration> {
    first(events, "the destination", |event| event.name == "RESUME")
}

/// Zero if it is the other way round: two processes' events are stamped apart.
fn seconds(from: Duration, to: Duration) -> f64 {
    to.saturating_sub(from).as_secs_f64()
}

/// Faults by the guest's own clock, from what it had recorded when it left its source and when all
/// of it had arrived; and what the two sides' reports say of them.
fn of_guest(
    settled: Settled,
    [left, arrived]: [&Record; 2],
    source: &Value,
    destination: &Value,
) -> Result<(Faults, Value)> {
    let asked = source["ram"]["postcopy-requests"].as_u64();
    let faults = arrived.faults(left, asked.map(usize::try_from).transpose()?, settled.rate)?;
    let mut says = of_counters(destination);
    says["postcopy-requests"] = json!(asked);
    says["stray-touches-per-s"] = json!(settled.stray_per_s);
    Ok((faults, says))
}

/// The counters of a destination's own, as far as it has some.
fn of_counters(report: &Value) -> Value {
    let counters = ["postcopy-blocktime", "postcopy-latency", "postcopy-latency-dist", "x-faults"];
    let known = counters.iter().filter_map(|name| Some((*name, report.get(name)?.clone())));
    Value::Object(known.map(|(name, value)| (name.to_owned(), value)).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(name: &str, data: Value, millis: u64) -> Event {
        Event { name: name.into(), data, at: Duration::from_millis(millis) }
    }

    #[test]
    fn moments_are_found_by_their_events() {
        let events = [
            event("STOP", Value::Null, 1),
            event("MIGRATION", json!({ "status": "active" }), 2),
            event("RESUME", Value::Null, 5),
            event("MIGRATION", json!({ "status": "completed" }), 1005),
        ];
        assert_eq!(seconds(resumed(&events).unwrap(), completed(&events).unwrap()), 1.0);
        let error = resumed(&events[..2]).unwrap_err().to_string();
        assert_eq!(error, "the destination said only: STOP, active");
        assert_eq!(seconds(Duration::from_secs(2), Duration::from_secs(1)), 0.0);
    }

    #[test]
    fn only_what_is_there_is_quoted() {
        let report = json!({ "status": "completed", "postcopy-blocktime": 7 });
        assert_eq!(of_counters(&report), json!({ "postcopy-blocktime": 7 }));
    }
}
