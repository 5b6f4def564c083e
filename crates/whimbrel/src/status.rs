//! States and the report of a migration, under QMP's names.

use std::fmt;

use serde::{Deserialize, Serialize};

/// The state of a migration (`MigrationStatus`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum MigrationStatus {
    /// None was ever started.
    #[default]
    None,
    /// Connecting and announcing.
    Setup,
    /// Being undone, on request.
    Cancelling,
    /// Undone, on request.
    Cancelled,
    /// RAM is moving while the guest runs at the source.
    Active,
    /// Waiting for `migrate-continue`, guest stopped.
    PreSwitchover,
    /// The guest is stopped: the rest of RAM and the devices are moving.
    Device,
    /// The devices have gone, in postcopy, and it is not known yet whether they were loaded.
    PostcopyDevice,
    /// The guest runs at the destination, and the rest of its RAM follows.
    PostcopyActive,
    /// As before, and the link is broken: the guest runs until it touches what is missing.
    PostcopyPaused,
    /// As before, and connecting anew.
    PostcopyRecoverSetup,
    /// Connected anew: the destination says what it has.
    PostcopyRecover,
    /// Two VMs are kept in step, checkpoint after checkpoint.
    Colo,
    /// The guest is at the destination, whole.
    Completed,
    /// Ended by an error.
    Failed,
}

impl MigrationStatus {
    /// QMP's name.
    pub fn name(self) -> &'static str {
        match self {
            MigrationStatus::None => "none",
            MigrationStatus::Setup => "setup",
            MigrationStatus::Cancelling => "cancelling",
            MigrationStatus::Cancelled => "cancelled",
            MigrationStatus::Active => "active",
            MigrationStatus::PreSwitchover => "pre-switchover",
            MigrationStatus::Device => "device",
            MigrationStatus::PostcopyDevice => "postcopy-device",
            MigrationStatus::PostcopyActive => "postcopy-active",
            MigrationStatus::PostcopyPaused => "postcopy-paused",
            MigrationStatus::PostcopyRecoverSetup => "postcopy-recover-setup",
            MigrationStatus::PostcopyRecover => "postcopy-recover",
            MigrationStatus::Colo => "colo",
            MigrationStatus::Completed => "completed",
            MigrationStatus::Failed => "failed",
        }
    }

    /// Whether part of the guest's RAM is here and part of it is there.
    pub fn is_postcopy(self) -> bool {
        matches!(
            self,
            MigrationStatus::PostcopyDevice
                | MigrationStatus::PostcopyActive
                | MigrationStatus::PostcopyPaused
                | MigrationStatus::PostcopyRecoverSetup
                | MigrationStatus::PostcopyRecover
        )
    }

    /// Whether `migrate-pause` has something to break.
    pub(crate) fn is_broken_by_pause(self) -> bool {
        matches!(self, MigrationStatus::PostcopyActive | MigrationStatus::PostcopyRecover)
    }

    /// Whether a source can be told where to find its destination again.
    pub(crate) fn may_resume(self) -> bool {
        matches!(self, MigrationStatus::PostcopyPaused | MigrationStatus::PostcopyRecoverSetup)
    }

    /// Whether a migration is under way.
    pub fn is_running(self) -> bool {
        match self {
            MigrationStatus::Setup
            | MigrationStatus::Cancelling
            | MigrationStatus::Active
            | MigrationStatus::PreSwitchover
            | MigrationStatus::Device
            | MigrationStatus::PostcopyDevice
            | MigrationStatus::PostcopyActive
            | MigrationStatus::PostcopyPaused
            | MigrationStatus::PostcopyRecoverSetup
            | MigrationStatus::PostcopyRecover
            | MigrationStatus::Colo => true,
            MigrationStatus::None
            | MigrationStatus::Cancelled
            | MigrationStatus::Completed
            | MigrationStatus::Failed => false,
        }
    }
}

impl fmt::Display for MigrationStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// The state of the guest (`RunState`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RunState {
    /// Made, never run.
    Prelaunch,
    /// Waiting for a migration to come in.
    Inmigrate,
    /// Running.
    Running,
    /// Stopped on request.
    Paused,
    /// Stopped for the switchover of a migration.
    FinishMigrate,
    /// Gone: it runs at the destination.
    Postmigrate,
    /// At a primary of COLO, stopped for a checkpoint. At a secondary, a copy of the primary's guest
    /// for as long as that runs.
    Colo,
    /// A resource failed it.
    InternalError,
}

impl RunState {
    /// QMP's name.
    pub fn name(self) -> &'static str {
        match self {
            RunState::Prelaunch => "prelaunch",
            RunState::Inmigrate => "inmigrate",
            RunState::Running => "running",
            RunState::Paused => "paused",
            RunState::FinishMigrate => "finish-migrate",
            RunState::Postmigrate => "postmigrate",
            RunState::Colo => "colo",
            RunState::InternalError => "internal-error",
        }
    }

    /// Whether a migration has stopped the guest, and lets it run again soon or gives it away.
    pub(crate) fn is_held_by_migration(self) -> bool {
        matches!(self, RunState::FinishMigrate | RunState::Colo)
    }
}

/// What `query-migrate` answers (`MigrationInfo`). Fields without a value at the moment are
/// left out, as QEMU does.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", default)]
pub struct MigrationInfo {
    /// The state; absent before the first migration.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub status: Option<MigrationStatus>,
    /// Why it failed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error_desc: Option<String>,
    /// From start to end, or so far, in ms.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub total_time: Option<u64>,
    /// From start to the first page, in ms.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub setup_time: Option<u64>,
    /// If the guest were stopped now, in ms.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub expected_downtime: Option<u64>,
    /// How long the guest stood still, in ms; once completed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub downtime: Option<u64>,
    /// By how much auto-converge slows the guest down, while it does.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cpu_throttle_percentage: Option<u8>,
    /// What became of RAM.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ram: Option<MigrationStats>,
    /// The XBZRLE cache, with capability `xbzrle`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub xbzrle_cache: Option<XbzrleCacheStats>,
    /// With capability `postcopy-blocktime`, at a destination that is done: for how long every
    /// vCPU waited for a page at the same time, in ms.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub postcopy_blocktime: Option<u64>,
    /// The same of each vCPU alone, in ms.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub postcopy_vcpu_blocktime: Option<Vec<u64>>,
    /// How long a fault waited for its page, on average of all, in ns.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub postcopy_latency: Option<u64>,
    /// The same of each vCPU's faults, in ns.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub postcopy_vcpu_latency: Option<Vec<u64>>,
    /// The same of the faults of other threads, in ns.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub postcopy_non_vcpu_latency: Option<u64>,
    /// How many faults took 2^n to 2^(n+1) µs, for n from 0 to 23; the first counts also what was
    /// shorter, the last what was longer.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub postcopy_latency_dist: Option<Vec<u64>>,
    /// Whimbrel's own: the faults of a destination, in more detail.
    #[serde(rename = "x-faults", skip_serializing_if = "Option::is_none")]
    pub faults: Option<FaultStats>,
    /// Whimbrel's own: how a source answered requests for pages.
    #[serde(rename = "x-answers", skip_serializing_if = "Option::is_none")]
    pub answers: Option<AnswerStats>,
    /// Whimbrel's own: the checkpoints of COLO so far.
    #[serde(rename = "x-colo", skip_serializing_if = "Option::is_none")]
    pub colo: Option<ColoStats>,
    /// Where a destination listens.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub socket_address: Option<Vec<SocketAddressInfo>>,
}

/// How long something took, of many times, in µs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", default)]
pub struct Latency {
    /// On average.
    pub mean: f64,
    /// The median.
    pub p50: f64,
    /// Nine of ten were no longer.
    pub p90: f64,
    /// Ninety-nine of a hundred were no longer.
    pub p99: f64,
    /// The longest.
    pub max: f64,
}

/// The faults of a destination in postcopy: accesses to pages that had not arrived.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", default)]
pub struct FaultStats {
    /// How many there were whose page had to be waited for.
    pub count: u64,
    /// From reading the fault to the page being in place.
    pub latency_us: Latency,
    /// The part of it until the request was written: `asked`.
    pub asked_us: Latency,
    /// The part from there until the page's first byte was read: queued at the source, and on the
    /// wire both ways.
    pub waited_us: Latency,
    /// The rest: `placed`.
    pub placed_us: Latency,
    /// Requests sent again because no answer came.
    pub asked_again: u64,
    /// Pages that came although they were there.
    pub came_twice: u64,
}

/// How a source answered requests.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", default)]
pub struct AnswerStats {
    /// Requests that were answered by a page of their own.
    pub count: u64,
    /// From reading such a request to its page being with the kernel: `queued`.
    pub queued_us: Latency,
    /// Requests for pages that had gone already, or were going.
    pub already_sent: u64,
}

/// The checkpoints of COLO.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", default)]
pub struct ColoStats {
    /// How many are complete.
    pub checkpoints: u64,
    /// At a primary, pages sent in them; at a secondary, pages copied to its guest.
    pub pages: u64,
    /// At a primary, pages sent ahead of them while its guest ran, to another whimbrel.
    pub ahead: u64,
    /// How long the guest stood still for each.
    pub stop_us: Latency,
    /// The part of it in which memory was sent, at a primary, or copied to the guest.
    pub memory_us: Latency,
}

/// Which part a VM has in COLO (`COLOMode`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ColoMode {
    /// None.
    #[default]
    None,
    /// Its guest is the one that counts.
    Primary,
    /// It is kept in step.
    Secondary,
}

impl ColoMode {
    /// QMP's name.
    pub fn name(self) -> &'static str {
        match self {
            ColoMode::None => "none",
            ColoMode::Primary => "primary",
            ColoMode::Secondary => "secondary",
        }
    }
}

/// Why COLO ended (`COLOExitReason`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ColoExitReason {
    /// It did not.
    #[default]
    None,
    /// On request (`x-colo-lost-heartbeat`).
    Request,
    /// The other side was lost.
    Error,
    /// It is just ending.
    Processing,
}

impl ColoExitReason {
    /// QMP's name.
    pub fn name(self) -> &'static str {
        match self {
            ColoExitReason::None => "none",
            ColoExitReason::Request => "request",
            ColoExitReason::Error => "error",
            ColoExitReason::Processing => "processing",
        }
    }
}

/// What `query-colo-status` answers (`COLOStatus`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", default)]
pub struct ColoStatus {
    /// Which part this VM has now.
    pub mode: ColoMode,
    /// Which it had last.
    pub last_mode: ColoMode,
    /// Why that ended.
    pub reason: ColoExitReason,
}

/// RAM's part of the report (`MigrationStats`).
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", default)]
pub struct MigrationStats {
    /// Bytes sent on all channels.
    pub transferred: u64,
    /// Bytes of RAM still to be sent.
    pub remaining: u64,
    /// Bytes of RAM in all.
    pub total: u64,
    /// Zero *pages* sent (QMP's name for them).
    pub duplicate: u64,
    /// Pages sent with their content.
    pub normal: u64,
    /// Bytes of those.
    pub normal_bytes: u64,
    /// Pages the guest dirties in a second.
    pub dirty_pages_rate: u64,
    /// Megabits sent in a second.
    pub mbps: f64,
    /// How often the dirty log was taken.
    pub dirty_sync_count: u64,
    /// Pages the destination asked for in postcopy.
    pub postcopy_requests: u64,
    /// The target page, in bytes.
    pub page_size: u64,
    /// Bytes on multifd channels.
    pub multifd_bytes: u64,
    /// Pages sent in a second.
    pub pages_per_second: u64,
    /// Bytes sent while the guest ran at the source.
    pub precopy_bytes: u64,
    /// Bytes sent while it stood still.
    pub downtime_bytes: u64,
    /// Bytes sent after it ran at the destination.
    pub postcopy_bytes: u64,
    /// Zero-copy sends that copied after all.
    pub dirty_sync_missed_zero_copy: u64,
}

/// The XBZRLE cache's part of the report (`XBZRLECacheStats`).
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", default)]
pub struct XbzrleCacheStats {
    /// The cache's size in bytes.
    pub cache_size: u64,
    /// Bytes sent as deltas.
    pub bytes: u64,
    /// Pages sent as deltas.
    pub pages: u64,
    /// Pages not found in the cache.
    pub cache_miss: u64,
    /// Of all pages looked for, the share not found, since the last take of the dirty log.
    pub cache_miss_rate: f64,
    /// Bytes of pages for each byte of delta.
    pub encoding_rate: f64,
    /// Pages whose delta was no smaller than the page.
    pub overflow: u64,
}

/// Where a destination listens (`SocketAddress`).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "kebab-case")]
pub enum SocketAddressInfo {
    /// TCP.
    Inet {
        /// Address.
        host: String,
        /// Port, as text.
        port: String,
    },
    /// A Unix socket.
    Unix {
        /// Its path.
        path: String,
    },
    /// An inherited descriptor.
    Fd {
        /// Its number, as text.
        str: String,
    },
}

/// What happens to the guest and its migration, as QMP's events.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// `MIGRATION`: the state changed.
    Migration(MigrationStatus),
    /// `MIGRATION_PASS`: the dirty log was taken for the n-th time.
    MigrationPass(u64),
    /// `STOP`: the guest stands still.
    Stop,
    /// `RESUME`: it runs.
    Resume,
    /// `COLO_EXIT`: this VM, which had that part in COLO, goes on alone, or is about to.
    ColoExit {
        /// Which part it had.
        mode: ColoMode,
        /// Why it ended.
        reason: ColoExitReason,
    },
}
