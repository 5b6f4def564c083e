//! How fast a vCPU goes: the workload's rate, the throttle, and the longest it ever stood still.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use crate::gate::Gate;

/// A throttled vCPU runs so long at a time, then sleeps.
const SLICE: Duration = Duration::from_millis(10);
/// A paced vCPU that is so little ahead goes on instead of sleeping.
const AHEAD: Duration = Duration::from_micros(200);
/// A paced vCPU that is behind makes up for no more than this.
const BEHIND: Duration = Duration::from_millis(10);

/// The longest time between two page updates of a vCPU, readable while it runs.
#[derive(Debug, Default)]
pub(crate) struct Gap {
    max_ns: AtomicU64,
    /// Host's real time of the last update: it goes on across a migration.
    last_ns: AtomicU64,
    /// The longest time between two updates that were both done on this host.
    here_ns: AtomicU64,
    /// How many were.
    updates: AtomicU64,
}

/// What a guest has done on this host.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Progress {
    /// Page updates of all vCPUs.
    pub updates: u64,
    /// The longest time between two of a vCPU: what it sleeps to keep to its rate, and what it
    /// waits for missing pages, of which an update can meet several.
    pub gap_max: Duration,
}

impl Progress {
    pub(crate) fn of(vcpus: &[Gap]) -> Progress {
        let longest = vcpus.iter().map(|gap| gap.here_ns.load(Ordering::Relaxed)).max();
        Progress {
            updates: vcpus.iter().map(|gap| gap.updates.load(Ordering::Relaxed)).sum(),
            gap_max: Duration::from_nanos(longest.unwrap_or(0)),
        }
    }
}

impl Gap {
    pub(crate) fn max(&self) -> Duration {
        Duration::from_nanos(self.max_ns.load(Ordering::Relaxed))
    }

    pub(crate) fn reset(&self) {
        self.max_ns.store(0, Ordering::Relaxed);
        self.here_ns.store(0, Ordering::Relaxed);
    }

    /// Longest gap and time of the last update, as saved. What was done on one host stays there.
    pub(crate) fn get(&self) -> (u64, u64) {
        (self.max_ns.load(Ordering::Relaxed), self.last_ns.load(Ordering::Relaxed))
    }

    pub(crate) fn set(&self, (max_ns, last_ns): (u64, u64)) {
        self.max_ns.store(max_ns, Ordering::Relaxed);
        self.last_ns.store(last_ns, Ordering::Relaxed);
        self.here_ns.store(0, Ordering::Relaxed);
        self.updates.store(0, Ordering::Relaxed);
    }

    fn update(&self) {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let now = u64::try_from(now.as_nanos()).unwrap_or(u64::MAX);
        // Only the vCPU's own thread gets here.
        let last = self.last_ns.swap(now, Ordering::Relaxed);
        let gap = now.saturating_sub(last);
        if last != 0 {
            self.max_ns.fetch_max(gap, Ordering::Relaxed);
        }
        if self.updates.fetch_add(1, Ordering::Relaxed) > 0 {
            self.here_ns.fetch_max(gap, Ordering::Relaxed);
        }
    }
}

/// Paces one vCPU.
#[derive(Debug)]
pub(crate) struct Pace {
    due: Instant,
    slice: Instant,
}

impl Pace {
    /// From now on.
    pub(crate) fn start() -> Pace {
        let now = Instant::now();
        Pace { due: now, slice: now }
    }

    /// Accounts for one page update, and sleeps when the vCPU is ahead of `rate` updates a
    /// second (0: no such limit) or has used up its slice. A recall ends the sleep.
    pub(crate) fn updated(&mut self, gap: &Gap, rate: u64, gate: &Gate) {
        gap.update();
        if let Some(period) = 1_000_000_000u64.checked_div(rate) {
            let now = Instant::now();
            let oldest = now.checked_sub(BEHIND).unwrap_or(now);
            self.due = self.due.max(oldest) + Duration::from_nanos(period);
            if self.due > now + AHEAD {
                gate.sleep(Some(self.due));
            }
        }
        if self.throttle(gate) {
            // What was slept for the throttle is not made up for.
            self.due = self.due.max(Instant::now());
        }
    }

    /// Sleeps when the vCPU has used up its slice; tells whether it had.
    fn throttle(&mut self, gate: &Gate) -> bool {
        let percent = u32::from(gate.throttle());
        let ran = self.slice.elapsed();
        if ran < SLICE {
            return false;
        }
        if percent == 0 {
            self.slice = Instant::now();
            return false;
        }
        // What the vCPU overran counts as well: a KVM guest is looked at only now and then. But
        // a slice does not grow with what it slept meanwhile.
        let sleep = ran.min(SLICE * 2) * percent / (100 - percent);
        gate.sleep(Some(Instant::now() + sleep));
        self.slice = Instant::now();
        true
    }
}
