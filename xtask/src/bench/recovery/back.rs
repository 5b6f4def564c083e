//! From the link's return to the first page that the guest waits for, and to the migration going on.
//!
//! The guest writes as fast as it can, so while the link is away its one vCPU comes to stand still. Its
//! own progress is what is looked at, over QMP, from the moment that the link is plugged in: the same
//! clock for every contender, and what the guest feels.

use std::path::Path;
use std::thread::sleep;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, Result, ensure};
use serde_json::json;
use whimbrel_peers::qmp::Qmp;
use whimbrel_peers::wait;

use super::cable::{Cable, Fault};
use super::figures::Return;
use super::vm::{self, MIGRATION_MAX};
use crate::bench::contender::{Memory, Side};
use crate::bench::network::{End, Network};
use crate::bench::postcopy::guest::QemuGuest;
use crate::bench::postcopy::pair::Pages;

/// How long pages move between two outages.
const MOVING: Duration = Duration::from_millis(300);
/// A guest that does nothing for so long waits.
const STANDS_STILL: Duration = Duration::from_millis(30);
/// Between two looks at the guest: what is left of the processors is the migration's.
const LOOK: Duration = Duration::from_micros(150);
/// Nothing of a guest is to arrive before it is asked for, or it would not wait long enough.
const BANDWIDTH: u64 = 1 << 20;
/// A peer that is not back by now never will be.
const BACK_MAX: Duration = Duration::from_secs(60);
/// How often it is looked whether a QEMU has given up its attempt.
const TOLD_AGAIN: Duration = Duration::from_millis(10);

/// Who moves the guest.
#[derive(Clone)]
pub(super) enum Contender<'a> {
    Whimbrel { binary: &'a Path, working_set: &'a str },
    Qemu { guest: &'a QemuGuest },
}

/// What does not change.
pub(super) struct Stage<'a> {
    pub(super) folder: &'a Path,
    pub(super) network: &'a Network,
    pub(super) memory: Memory,
    pub(super) silence_ms: u64,
}

impl Stage<'_> {
    /// One migration, its link away for each of `outages` in turn.
    pub(super) fn run(
        &self,
        contender: &Contender<'_>,
        fault: Fault,
        outages: &[Duration],
    ) -> Result<Vec<Return>> {
        let mut destination = self.start(contender, End::Destination)?;
        let mut source = self.start(contender, End::Source)?;
        let processes = [source.id(), destination.id()];
        let (from, to) = (&mut source.qmp, &mut destination.qmp);
        let uri = match contender {
            Contender::Whimbrel { .. } => {
                // Long enough that its vCPU has written to its memory.
                sleep(MOVING);
                vm::prepare(from, to, self.silence_ms)?
            }
            Contender::Qemu { guest } => {
                guest.settle(from)?;
                vm::listen(from, to)?
            }
        };
        let slow = json!({ "max-bandwidth": BANDWIDTH, "max-postcopy-bandwidth": BANDWIDTH });
        from.execute("migrate-set-parameters", &slow)?;
        let mut cable = Cable::of(self.network, fault)?;
        vm::begin_postcopy(from, to, &uri)?;
        let mut returns = Vec::new();
        for outage in outages {
            sleep(MOVING);
            let back = match contender {
                Contender::Whimbrel { .. } => by_itself(from, to, &processes, &mut cable, *outage),
                Contender::Qemu { .. } => by_hand(from, to, &processes, &mut cable, *outage),
            };
            returns.push(back.with_context(|| format!("{} s away", outage.as_secs_f64()))?);
        }
        // It has to be whole for the figures to mean anything.
        let unlimited = json!({ "max-bandwidth": 0, "max-postcopy-bandwidth": 0 });
        from.execute("migrate-set-parameters", &unlimited)?;
        vm::until(from, "completed", MIGRATION_MAX)?;
        vm::until(to, "completed", MIGRATION_MAX)?;
        if let Contender::Whimbrel { .. } = contender {
            to.execute("stop", &json!({}))?;
            let check = to.execute("x-self-check", &json!({}))?;
            ensure!(check["passed"] == true && check["failure"].is_null(), "the guest: {check}");
        }
        Ok(returns)
    }

    fn start(&self, contender: &Contender<'_>, end: End) -> Result<Side> {
        match contender {
            Contender::Whimbrel { binary, working_set } => {
                let workload = format!("uniform,rate=0,working-set={working_set}");
                let options = ["--workload", workload.as_str()];
                vm::start(binary, self.folder, self.network, end, self.memory, &options)
            }
            Contender::Qemu { guest } => {
                let command = guest.command(Pages::Small, end == End::Destination)?;
                let files = self.folder.join(vm::name(end));
                Side::start(self.network.at(end, &command), &files, |socket| {
                    format!("unix:{},server=on,wait=off", socket.display())
                })
            }
        }
    }
}

/// A whimbrel is only watched.
fn by_itself(
    source: &mut Qmp,
    destination: &mut Qmp,
    processes: &[u32],
    cable: &mut Cable,
    outage: Duration,
) -> Result<Return> {
    let pulled = Instant::now();
    cable.pull()?;
    vm::until(source, "postcopy-paused", MIGRATION_MAX)?;
    vm::until(destination, "postcopy-paused", MIGRATION_MAX)?;
    let mut progress = |destination: &mut Qmp| -> Result<u64> {
        let progress = destination.execute("x-guest-progress", &json!({}))?;
        progress["updates"].as_u64().context("no updates")
    };
    let before = until_it_stands_still(destination, &mut progress)?;
    sleep(outage.saturating_sub(pulled.elapsed()));
    let back = Back::plug_in(cable, processes)?;
    let first = back.first_page(destination, before, &mut progress, || Ok(()))?;
    back.whole(first, source, outage)
}

/// A QEMU is told everything by somebody who knows at once that the link is back; what can be told
/// before that, is.
fn by_hand(
    source: &mut Qmp,
    destination: &mut Qmp,
    processes: &[u32],
    cable: &mut Cable,
    outage: Duration,
) -> Result<Return> {
    let pulled = Instant::now();
    cable.pull()?;
    for qmp in [&mut *source, &mut *destination] {
        qmp.execute("migrate-pause", &json!({}))?;
        vm::until(qmp, "postcopy-paused", MIGRATION_MAX)?;
    }
    let uri = vm::wait_at(destination, "migrate-recover")?;
    let mut progress = QemuGuest::last_touch;
    let before = until_it_stands_still(destination, &mut progress)?;
    sleep(outage.saturating_sub(pulled.elapsed()));
    let again = json!({ "uri": uri, "resume": true });
    let back = Back::plug_in(cable, processes)?;
    source.execute("migrate", &again)?;
    let mut looked = Instant::now();
    let first = back.first_page(destination, before, &mut progress, || {
        if looked.elapsed() >= TOLD_AGAIN {
            let report = source.execute("query-migrate", &json!({}))?;
            if report["status"] == "postcopy-paused" {
                source.execute("migrate", &again)?;
            }
            looked = Instant::now();
        }
        Ok(())
    })?;
    back.whole(first, source, outage)
}

fn until_it_stands_still(
    destination: &mut Qmp,
    progress: &mut dyn FnMut(&mut Qmp) -> Result<u64>,
) -> Result<u64> {
    let mut before = progress(destination)?;
    wait::until("the guest to wait for a page", MIGRATION_MAX, || {
        sleep(STANDS_STILL);
        let now = progress(destination)?;
        Ok((std::mem::replace(&mut before, now) == now).then_some(now))
    })
}

/// The moment in which the link came back, on both clocks.
struct Back<'a> {
    at: Instant,
    wall: Duration,
    processes: &'a [u32],
    /// What they had waited for a processor until then, in ms.
    waited_ms: f64,
}

impl<'a> Back<'a> {
    fn plug_in(cable: &mut Cable, processes: &'a [u32]) -> Result<Self> {
        let waited_ms = waited_ms(processes)?;
        let at = Instant::now();
        let wall = SystemTime::now().duration_since(UNIX_EPOCH)?;
        cable.plug_in()?;
        Ok(Self { at, wall, processes, waited_ms })
    }

    /// How long until the guest had made progress, how long before that it had not, and what both
    /// processes waited for a processor meanwhile, all in ms.
    fn first_page(
        &self,
        destination: &mut Qmp,
        before: u64,
        progress: &mut dyn FnMut(&mut Qmp) -> Result<u64>,
        mut meanwhile: impl FnMut() -> Result<()>,
    ) -> Result<[f64; 3]> {
        let ms = || self.at.elapsed().as_secs_f64() * 1e3;
        let mut still = ms();
        loop {
            let asked = ms();
            if progress(destination)? != before {
                let first = ms();
                return Ok([first, still, waited_ms(self.processes)? - self.waited_ms]);
            }
            still = asked;
            ensure!(self.at.elapsed() < BACK_MAX, "no page came in {} s", BACK_MAX.as_secs());
            meanwhile()?;
            sleep(LOOK);
        }
    }

    fn whole(
        &self,
        [first_page_ms, still_ms, waited_ms]: [f64; 3],
        source: &mut Qmp,
        outage: Duration,
    ) -> Result<Return> {
        let active = vm::until(source, "postcopy-active", MIGRATION_MAX)?;
        Ok(Return {
            outage_s: outage.as_secs_f64(),
            first_page_ms,
            still_ms,
            waited_ms,
            active_ms: active.saturating_sub(self.wall).as_secs_f64() * 1e3,
        })
    }
}

/// How long the threads of these processes have waited for a processor, all together.
fn waited_ms(processes: &[u32]) -> Result<f64> {
    let mut ms = 0.0;
    for process in processes {
        for thread in std::fs::read_dir(format!("/proc/{process}/task"))? {
            // One that has just ended waits for nothing.
            let told = std::fs::read_to_string(thread?.path().join("schedstat"));
            ms += told.map_or(Ok(0.0), |told| waited_of(&told))?;
        }
    }
    Ok(ms)
}

/// From a line of /proc/PID/task/TID/schedstat: time on a processor, waiting for one, both in ns.
fn waited_of(schedstat: &str) -> Result<f64> {
    let ns = schedstat.split_whitespace().nth(1).with_context(|| schedstat.to_owned())?;
    Ok(ns.parse::<f64>().with_context(|| schedstat.to_owned())? / 1e6)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waiting_for_a_processor_is_the_second_figure() {
        assert_eq!(waited_of("3302511 1500000 7\n").unwrap(), 1.5);
        assert!(waited_of("").is_err());
        assert!(waited_ms(&[std::process::id()]).unwrap() >= 0.0);
    }
}
