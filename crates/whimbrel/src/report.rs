//! What `query-migrate` answers while threads count: no lock a migration thread could hold.

use std::fmt;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use crate::colo::Replication;
use crate::latency::Latencies;
use crate::status::{
    AnswerStats, MigrationInfo, MigrationStats, MigrationStatus, SocketAddressInfo,
    XbzrleCacheStats,
};

/// Counters of one migration. Each is written by one thread and read by any.
#[derive(Debug, Default)]
pub(crate) struct Counters {
    pub(crate) transferred: AtomicU64,
    pub(crate) remaining: AtomicU64,
    pub(crate) total: AtomicU64,
    pub(crate) duplicate: AtomicU64,
    pub(crate) normal: AtomicU64,
    pub(crate) dirty_pages_rate: AtomicU64,
    pub(crate) dirty_sync_count: AtomicU64,
    pub(crate) precopy_bytes: AtomicU64,
    pub(crate) downtime_bytes: AtomicU64,
    pub(crate) bytes_per_second: AtomicU64,
    pub(crate) pages_per_second: AtomicU64,
    pub(crate) expected_downtime_ms: AtomicU64,
    pub(crate) postcopy_requests: AtomicU64,
    pub(crate) postcopy_bytes: AtomicU64,
    /// Bytes of the main channel after the guest had gone.
    pub(crate) background_bytes: AtomicU64,
    /// Bytes of multifd channels; not in `transferred` here.
    pub(crate) multifd_bytes: AtomicU64,
    /// Turns of multifd channels in which the kernel copied what was to be sent without a copy.
    pub(crate) missed_zero_copy: AtomicU64,
    pub(crate) throttle_percent: AtomicU8,
}

/// Sets a counter that only its owner writes.
pub(crate) fn set(counter: &AtomicU64, value: u64) {
    counter.store(value, Ordering::Relaxed);
}

/// Adds to a counter.
pub(crate) fn add(counter: &AtomicU64, value: u64) {
    counter.fetch_add(value, Ordering::Relaxed);
}

/// Reads a counter.
pub(crate) fn get(counter: &AtomicU64) -> u64 {
    counter.load(Ordering::Relaxed)
}

/// Which way a migration goes: a source reports more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Side {
    Source,
    Destination,
}

/// The report of one migration, being written.
#[derive(Debug)]
pub(crate) struct Report {
    side: Side,
    started: Instant,
    pub(crate) counters: Counters,
    slow: Mutex<Slow>,
    answers: Mutex<Answered>,
    faults: OnceLock<Arc<dyn FaultReport>>,
    migration: OnceLock<[u8; 16]>,
    colo: OnceLock<Arc<Replication>>,
}

/// What a source knows of the requests it answered. Locked for one at a time.
#[derive(Clone, Debug, Default)]
struct Answered {
    queued: Latencies,
    already_sent: u64,
}

/// What a destination knows of its guest's faults.
pub(crate) trait FaultReport: Send + Sync + fmt::Debug {
    /// Adds it to the report of a migration that stands at `info.status`.
    fn tell(&self, info: &mut MigrationInfo);
}

/// What changes a few times in a migration. The lock is held for a few loads and stores.
#[derive(Clone, Debug, Default)]
struct Slow {
    status: MigrationStatus,
    error: Option<String>,
    setup_ms: Option<u64>,
    stopped: Option<Instant>,
    downtime_ms: Option<u64>,
    total_ms: Option<u64>,
    xbzrle: Option<XbzrleCacheStats>,
    socket_address: Option<Vec<SocketAddressInfo>>,
}

/// Held by the thread that drives a migration: should it panic, nobody waits for it for ever.
#[derive(Debug)]
pub(crate) struct EndsFailed<'r>(pub(crate) &'r Report);

impl Drop for EndsFailed<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.set_error("a bug in whimbrel: the migration's thread panicked".into());
            self.0.set_status(MigrationStatus::Failed);
        }
    }
}

impl Report {
    pub(crate) fn new(side: Side) -> Report {
        let slow = Mutex::new(Slow { status: MigrationStatus::Setup, ..Slow::default() });
        Report {
            side,
            started: Instant::now(),
            counters: Counters::default(),
            slow,
            answers: Mutex::default(),
            faults: OnceLock::new(),
            migration: OnceLock::new(),
            colo: OnceLock::new(),
        }
    }

    /// A request was answered by a page of its own, so long after it had been read.
    pub(crate) fn answered(&self, after: Duration) {
        self.answers.lock().unwrap_or_else(PoisonError::into_inner).queued.record(after);
    }

    /// A request came for a page that had gone, or was going.
    pub(crate) fn already_sent(&self) {
        self.answers.lock().unwrap_or_else(PoisonError::into_inner).already_sent += 1;
    }

    /// From here on the report has what `faults` knows. Once.
    pub(crate) fn set_faults(&self, faults: Arc<dyn FaultReport>) {
        assert!(self.faults.set(faults).is_ok(), "one guest arrives once");
    }

    /// From here on the report has the checkpoints of COLO. Once.
    pub(crate) fn set_colo(&self, colo: Arc<Replication>) {
        assert!(self.colo.set(colo).is_ok(), "a migration has one other side");
    }

    /// When the migration began.
    pub(crate) fn started(&self) -> Instant {
        self.started
    }

    fn elapsed_ms(&self) -> u64 {
        u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    fn with<T>(&self, change: impl FnOnce(&mut Slow) -> T) -> T {
        change(&mut self.slow.lock().unwrap_or_else(PoisonError::into_inner))
    }

    pub(crate) fn status(&self) -> MigrationStatus {
        self.with(|slow| slow.status)
    }

    /// Changes the state; says whether it was another one.
    pub(crate) fn set_status(&self, status: MigrationStatus) -> bool {
        let total = self.elapsed_ms();
        self.with(|slow| {
            if !status.is_running() {
                slow.total_ms.get_or_insert(total);
            }
            std::mem::replace(&mut slow.status, status) != status
        })
    }

    pub(crate) fn set_error(&self, error: String) {
        self.with(|slow| slow.error = Some(error));
    }

    /// Whatever was wrong before, it is not any more.
    pub(crate) fn forget_error(&self) {
        self.with(|slow| slow.error = None);
    }

    pub(crate) fn setup_is_done(&self) {
        let elapsed = self.elapsed_ms();
        self.with(|slow| slow.setup_ms = Some(elapsed));
    }

    /// The guest is being stopped for its switchover: downtime begins.
    pub(crate) fn guest_stops(&self) {
        self.with(|slow| slow.stopped = Some(Instant::now()));
    }

    /// The guest is the destination's: downtime is over, as far as it is seen from here.
    pub(crate) fn guest_has_gone(&self) {
        self.with(|slow| {
            let downtime = slow.stopped.map(|since| since.elapsed().as_millis());
            slow.downtime_ms = downtime.map(|ms| u64::try_from(ms).unwrap_or(u64::MAX));
        });
    }

    pub(crate) fn set_xbzrle(&self, stats: XbzrleCacheStats) {
        self.with(|slow| slow.xbzrle = Some(stats));
    }

    /// The migration has this identifier.
    pub(crate) fn is_of(&self, migration: [u8; 16]) {
        // It has one all its life.
        let _ = self.migration.set(migration);
    }

    /// The migration's identifier, once it has one.
    pub(crate) fn migration(&self) -> Option<[u8; 16]> {
        self.migration.get().copied()
    }

    pub(crate) fn set_socket_address(&self, address: Option<SocketAddressInfo>) {
        self.with(|slow| slow.socket_address = address.map(|one| vec![one]));
    }

    /// The report as of now.
    pub(crate) fn info(&self) -> MigrationInfo {
        let slow = self.with(|slow| slow.clone());
        let status = slow.status;
        let mut info = MigrationInfo {
            status: Some(status),
            error_desc: slow.error,
            socket_address: slow.socket_address,
            colo: self.colo.get().and_then(|colo| colo.stats()),
            ..MigrationInfo::default()
        };
        if self.side == Side::Destination {
            if let Some(faults) = self.faults.get() {
                faults.tell(&mut info);
            }
            return info;
        }
        let answers = self.answers.lock().unwrap_or_else(PoisonError::into_inner).clone();
        info.answers = (get(&self.counters.postcopy_requests) > 0).then(|| AnswerStats {
            count: answers.queued.count(),
            queued_us: answers.queued.summary(),
            already_sent: answers.already_sent,
        });
        info.total_time = Some(slow.total_ms.unwrap_or_else(|| self.elapsed_ms()));
        info.setup_time = slow.setup_ms;
        info.downtime = slow.downtime_ms;
        info.xbzrle_cache = slow.xbzrle;
        let expected = get(&self.counters.expected_downtime_ms);
        info.expected_downtime = (status.is_running() && expected > 0).then_some(expected);
        let throttle = self.counters.throttle_percent.load(Ordering::Relaxed);
        info.cpu_throttle_percentage = (status.is_running() && throttle > 0).then_some(throttle);
        info.ram = match status {
            MigrationStatus::None | MigrationStatus::Setup => None,
            _ => Some(self.stats(status)),
        };
        info
    }

    fn stats(&self, status: MigrationStatus) -> MigrationStats {
        let c = &self.counters;
        let normal = get(&c.normal);
        let done = status == MigrationStatus::Completed;
        MigrationStats {
            transferred: get(&c.transferred) + get(&c.multifd_bytes),
            remaining: if done { 0 } else { get(&c.remaining) },
            total: get(&c.total),
            duplicate: get(&c.duplicate),
            normal,
            normal_bytes: normal * 4096,
            dirty_pages_rate: get(&c.dirty_pages_rate),
            mbps: get(&c.bytes_per_second) as f64 * 8.0 / 1e6,
            dirty_sync_count: get(&c.dirty_sync_count),
            page_size: 4096,
            pages_per_second: get(&c.pages_per_second),
            postcopy_requests: get(&c.postcopy_requests),
            postcopy_bytes: get(&c.postcopy_bytes),
            multifd_bytes: get(&c.multifd_bytes),
            dirty_sync_missed_zero_copy: get(&c.missed_zero_copy),
            precopy_bytes: get(&c.precopy_bytes),
            downtime_bytes: get(&c.downtime_bytes),
        }
    }
}
