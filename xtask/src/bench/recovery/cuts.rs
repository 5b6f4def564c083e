//! Many link failures in one migration of a busy guest: what is sent again, against what was on its way.
//!
//! At a cut both processes are stopped (SIGSTOP), the link is pulled, and the kernel's queues are
//! read: so what is in flight is known exactly, by nobody's account but the kernel's.

use std::path::Path;
use std::process::Command;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::{Value, json};
use whimbrel_peers::qmp::Qmp;

use super::cable::{Cable, Fault};
use super::figures::{Cuts, Kind};
use super::queues::{self, Written};
use super::vm::{self, MIGRATION_MAX};
use crate::bench::contender::{Memory, Side};
use crate::bench::network::{End, Network};

/// How long pages move between two cuts, at least, and by how much it differs.
const MOVING_MS: u64 = 60;
const MORE_MS: u64 = 160;
/// How long a link is away whose connections were reset.
const AWAY: Duration = Duration::from_millis(30);
/// Before postcopy nothing much is to move: all of it would be sent again for another reason.
const PRECOPY_BANDWIDTH: u64 = 64 << 10;
/// Of the guest's memory it writes to so much, so many times a second.
const WORKING_SET_PART: u64 = 2;
const WRITES_PER_S: u32 = 3000;

/// One migration.
pub(super) struct Migration<'a> {
    pub(super) binary: &'a Path,
    pub(super) folder: &'a Path,
    pub(super) network: &'a Network,
    pub(super) memory: Memory,
    pub(super) cuts: u32,
    pub(super) silence_ms: u64,
}

impl Migration<'_> {
    pub(super) fn run(&self, kind: Kind) -> Result<Cuts> {
        let workload = format!(
            "uniform,rate={WRITES_PER_S},working-set={}",
            self.memory.bytes() / WORKING_SET_PART
        );
        let options = ["--workload", &workload, "--fill", "random"];
        let start =
            |end| vm::start(self.binary, self.folder, self.network, end, self.memory, &options);
        let (mut destination, mut source) = (start(End::Destination)?, start(End::Source)?);
        let uri = vm::prepare(&mut source.qmp, &mut destination.qmp, self.silence_ms)?;
        let slow = json!({ "max-bandwidth": PRECOPY_BANDWIDTH, "max-postcopy-bandwidth": 0 });
        source.qmp.execute("migrate-set-parameters", &slow)?;
        let mut cable = Cable::of(self.network, Fault::Cable)?;
        let begun = Instant::now();
        vm::begin_postcopy(&mut source.qmp, &mut destination.qmp, &uri)?;
        let mut random = 1;
        let (mut at_cut, mut given_up) = (Vec::new(), Vec::new());
        for cut in 1..=self.cuts {
            sleep(Duration::from_millis(MOVING_MS + next(&mut random) % MORE_MS));
            let what = || format!("cut {cut} of {}", self.cuts);
            let both = (&mut source, &mut destination);
            let (now, later) = self.cut(kind, both, &mut cable).with_context(what)?;
            at_cut.push(now);
            given_up.push(later);
        }
        vm::until(&mut source.qmp, "completed", MIGRATION_MAX)?;
        vm::until(&mut destination.qmp, "completed", MIGRATION_MAX)?;
        let seconds = begun.elapsed().as_secs_f64();
        destination.qmp.execute("stop", &json!({}))?;
        let check = destination.qmp.execute("x-self-check", &json!({}))?;
        ensure!(check["passed"] == true && check["failure"].is_null(), "the guest: {check}");
        let sent = source.qmp.execute("query-migrate", &json!({}))?;
        let arrived = destination.qmp.execute("query-migrate", &json!({}))?;
        figures(kind, &sent, &arrived, (at_cut, given_up), seconds)
    }

    /// Breaks the link, waits until the migration goes on by itself. Gives the pages in flight at the cut,
    /// and those that had been written and had not come when the connections were given up.
    fn cut(
        &self,
        kind: Kind,
        (source, destination): (&mut Side, &mut Side),
        cable: &mut Cable,
    ) -> Result<(u64, u64)> {
        let stopped = Stopped::these(&[source.id(), destination.id()])?;
        cable.pull()?;
        let mut written = Written::by(&queues::connections(self.network, End::Source)?);
        let read = queues::connections(self.network, End::Destination)?;
        let at_cut = written.pages_beyond(&read);
        if kind == Kind::Reset {
            queues::reset(self.network)?;
        }
        drop(stopped);
        match kind {
            Kind::Reset => sleep(AWAY),
            // What goes into a link of which nobody knows yet that it is dead.
            Kind::Silent => {
                while !has_paused(&mut source.qmp)? {
                    written.update(Written::by(&queues::connections(self.network, End::Source)?));
                }
            }
        }
        if kind == Kind::Silent {
            vm::until(&mut destination.qmp, "postcopy-paused", MIGRATION_MAX)?;
        }
        cable.plug_in()?;
        if kind == Kind::Reset {
            vm::until(&mut source.qmp, "postcopy-paused", MIGRATION_MAX)?;
            vm::until(&mut destination.qmp, "postcopy-paused", MIGRATION_MAX)?;
        }
        for qmp in [&mut source.qmp, &mut destination.qmp] {
            vm::until(qmp, "postcopy-active", MIGRATION_MAX)?;
        }
        Ok((at_cut, written.pages_beyond(&read)))
    }
}

/// Whether it has paused by now; waits a moment for it.
fn has_paused(qmp: &mut Qmp) -> Result<bool> {
    let report = qmp.execute("query-migrate", &json!({}))?;
    match report["status"].as_str() {
        Some("postcopy-active") => Ok(false),
        Some("postcopy-paused") => {
            vm::until(qmp, "postcopy-paused", MIGRATION_MAX)?;
            Ok(true)
        }
        other => bail!("it is {other:?}: {}", report["error-desc"]),
    }
}

fn figures(
    kind: Kind,
    sent: &Value,
    arrived: &Value,
    (at_cut, given_up): (Vec<u64>, Vec<u64>),
    seconds: f64,
) -> Result<Cuts> {
    let of = |report: &Value, path: &[&str]| {
        let found = path.iter().fold(report, |value, name| &value[*name]);
        found.as_u64().with_context(|| format!("no {} in {report}", path.join(".")))
    };
    let page = of(sent, &["ram", "page-size"])?;
    Ok(Cuts {
        kind,
        sent: of(sent, &["ram", "normal"])? + of(sent, &["ram", "duplicate"])?,
        of_guest: of(sent, &["ram", "total"])? / page,
        before: of(sent, &["ram", "precopy-bytes"])? / page,
        came_twice: of(arrived, &["x-faults", "came-twice"])?,
        at_cut,
        given_up,
        seconds,
    })
}

/// Processes that stand still until this is dropped.
struct Stopped(Vec<String>);

impl Stopped {
    fn these(processes: &[u32]) -> Result<Self> {
        let stopped = Self(processes.iter().map(u32::to_string).collect());
        stopped.signal("-STOP")?;
        for process in &stopped.0 {
            whimbrel_peers::wait::until("a process to stop", MIGRATION_MAX, || {
                let stat = std::fs::read_to_string(format!("/proc/{process}/stat"))?;
                Ok(is_stopped(&stat).then_some(()))
            })?;
        }
        Ok(stopped)
    }

    fn signal(&self, name: &str) -> Result<()> {
        let status = Command::new("kill").arg(name).args(&self.0).status()?;
        ensure!(status.success(), "kill {name}: {status}");
        Ok(())
    }
}

impl Drop for Stopped {
    fn drop(&mut self) {
        // Who is gone need not go on.
        let _ = self.signal("-CONT");
    }
}

/// Whether a line of /proc/PID/stat is that of a stopped process.
fn is_stopped(stat: &str) -> bool {
    stat.rsplit_once(')').is_some_and(|(_, fields)| fields.trim_start().starts_with('T'))
}

/// The same times in every run (xorshift64).
fn next(state: &mut u64) -> u64 {
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    *state
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stopped_process_is_told_from_others() {
        assert!(is_stopped("12 (a) T b) T 1 1"));
        assert!(!is_stopped("12 (a) T b) S 1 1"));
    }

    #[test]
    fn figures_come_from_both_reports() {
        let ram = json!({
            "page-size": 4096, "normal": 1100, "duplicate": 3, "total": 4_096_000,
            "precopy-bytes": 10_000,
        });
        let (sent, arrived) = (json!({ "ram": ram }), json!({ "x-faults": { "came-twice": 1 } }));
        let cuts = figures(Kind::Reset, &sent, &arrived, (vec![90], vec![90]), 1.0).unwrap();
        assert_eq!((cuts.sent, cuts.of_guest, cuts.before, cuts.came_twice), (1103, 1000, 2, 1));
        let error = figures(Kind::Reset, &arrived, &arrived, (vec![], vec![]), 1.0).unwrap_err();
        assert!(error.to_string().contains("no ram.page-size"), "{error}");
    }
}
