//! Capabilities and parameters, under QMP's names and with its ranges.

use std::fmt;
use std::sync::{Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};

use crate::address::Address;

/// What can be switched on (`MigrationCapability`). Only what this engine does is listed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Capability {
    /// Send small changes of a page as a delta.
    Xbzrle,
    /// Slow the guest down when it dirties faster than the link.
    AutoConverge,
    /// Emit `MIGRATION` and `MIGRATION_PASS` events.
    Events,
    /// Allow `migrate-start-postcopy`: the guest runs at the destination before its RAM is there.
    PostcopyRam,
    /// Let the destination answer.
    ReturnPath,
    /// Wait for `migrate-continue` before the switchover.
    PauseBeforeSwitchover,
    /// Send pages on several connections at once. Both sides must agree.
    Multifd,
    /// Keep account of how long vCPUs wait for pages, at a destination.
    PostcopyBlocktime,
    /// Send the VM's UUID and compare it.
    ValidateUuid,
    /// Let the kernel send pages from where they lie, on multifd channels without compression.
    ZeroCopySend,
    /// Give the pages that a guest waits for a channel of their own.
    PostcopyPreempt,
    /// Keep a second VM in step with the guest, checkpoint after checkpoint, instead of moving it.
    XColo,
}

impl Capability {
    /// All of them, in QMP's order.
    pub const ALL: [Capability; 12] = [
        Capability::Xbzrle,
        Capability::AutoConverge,
        Capability::Events,
        Capability::PostcopyRam,
        Capability::ReturnPath,
        Capability::PauseBeforeSwitchover,
        Capability::Multifd,
        Capability::PostcopyBlocktime,
        Capability::ValidateUuid,
        Capability::ZeroCopySend,
        Capability::PostcopyPreempt,
        Capability::XColo,
    ];

    /// QMP's name.
    pub fn name(self) -> &'static str {
        match self {
            Capability::Xbzrle => "xbzrle",
            Capability::AutoConverge => "auto-converge",
            Capability::Events => "events",
            Capability::PostcopyRam => "postcopy-ram",
            Capability::ReturnPath => "return-path",
            Capability::PauseBeforeSwitchover => "pause-before-switchover",
            Capability::Multifd => "multifd",
            Capability::PostcopyBlocktime => "postcopy-blocktime",
            Capability::ValidateUuid => "validate-uuid",
            Capability::ZeroCopySend => "zero-copy-send",
            Capability::PostcopyPreempt => "postcopy-preempt",
            Capability::XColo => "x-colo",
        }
    }
}

impl fmt::Display for Capability {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Which capabilities are on. All are off at first.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Capabilities {
    on: u32,
}

impl Capabilities {
    /// Whether `capability` is on.
    pub fn has(self, capability: Capability) -> bool {
        self.on & (1 << capability as u32) != 0
    }

    /// Switches `capability` on or off.
    pub fn set(&mut self, capability: Capability, on: bool) {
        let bit = 1 << capability as u32;
        if on { self.on |= bit } else { self.on &= !bit }
    }

    /// Whether everything that is on has what it needs, and nothing that it excludes.
    pub fn check(self) -> Result<(), SettingError> {
        for (capability, needed) in [
            (Capability::PostcopyPreempt, Capability::PostcopyRam),
            (Capability::ZeroCopySend, Capability::Multifd),
            (Capability::XColo, Capability::ReturnPath),
        ] {
            if self.has(capability) && !self.has(needed) {
                return Err(SettingError::Needs { capability, needed });
            }
        }
        let excludes = [
            (Capability::Multifd, Capability::Xbzrle),
            (Capability::XColo, Capability::PostcopyRam),
            (Capability::XColo, Capability::Xbzrle),
        ];
        match excludes.iter().find(|(one, other)| self.has(*one) && self.has(*other)) {
            Some(&(capability, other)) => Err(SettingError::Excludes { capability, other }),
            None => Ok(()),
        }
    }
}

/// Why a setting is refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SettingError {
    /// A parameter is out of range.
    #[error("parameter '{name}' expects {expected}, not {found}")]
    Range {
        /// The parameter.
        name: &'static str,
        /// What it takes.
        expected: &'static str,
        /// What was given.
        found: u64,
    },
    /// Not while a migration runs.
    #[error("There's a migration process in progress")]
    Running,
    /// A capability needs another.
    #[error("capability '{capability}' requires capability '{needed}'")]
    Needs {
        /// What was to be switched on.
        capability: Capability,
        /// What has to be on.
        needed: Capability,
    },
    /// Two capabilities exclude each other.
    #[error("capability '{capability}' is not compatible with capability '{other}'")]
    Excludes {
        /// One of them.
        capability: Capability,
        /// The other.
        other: Capability,
    },
    /// A parameter is no address that can be connected to once more.
    #[error("parameter '{name}': {reason}")]
    Address {
        /// The parameter.
        name: &'static str,
        /// What is wrong with it.
        reason: String,
    },
}

/// How the pages of multifd packets are compressed (`MultiFDCompression`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum MultifdCompression {
    /// Not at all.
    #[default]
    None,
    /// By zlib, at `multifd-zlib-level`.
    Zlib,
    /// By zstd, at `multifd-zstd-level`.
    Zstd,
    /// Whimbrel's own: by zstd where and as far as it makes the migration faster. A stock QEMU
    /// takes it for `zstd`, and has to be set to that.
    Auto,
}

/// Who looks for pages of zeros (`ZeroPageDetection`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ZeroPageDetection {
    /// Nobody: every page is sent with its content.
    None,
    /// Pages of zeros are told on the main channel: what a QEMU before 9.0 understands.
    Legacy,
    /// On the channel that would have sent them.
    #[default]
    Multifd,
}

/// When a migration whose link broke in postcopy goes on without being told to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum AutoRecover {
    /// Between two whimbrels, each of which proves that it is of the same migration.
    #[default]
    Auto,
    /// Also with a QEMU at the other end, which proves nothing.
    On,
    /// Never: it waits for `migrate-recover` and `migrate` with `resume`.
    Off,
}

/// What a survivor of COLO does when its other side is lost (`x-colo-failover`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ColoFailover {
    /// Whoever has a fence ([`Migrator::set_fence`](crate::Migrator::set_fence)) goes on as soon as
    /// that says that the other side is certain to run no more. Without one a primary goes on alone
    /// at once, and a secondary waits for `x-colo-lost-heartbeat`.
    #[default]
    Auto,
    /// Both wait for `x-colo-lost-heartbeat`, as QEMU does.
    Manual,
}

/// When what a primary's guest says to the world may leave (`x-colo-output`), where its VMM has it
/// leave through [`Output`](crate::Output).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ColoOutput {
    /// At once: after a takeover the world may know of what the guest does not.
    None,
    /// When the next checkpoint is complete: a packet waits for up to `x-checkpoint-delay`.
    #[default]
    Buffer,
    /// As soon as the copy at the secondary has said the same, which the VMMs bring here
    /// ([`Outlet::copy_said`](crate::Outlet::copy_said)); where the two differ, or one waits longer than
    /// `x-colo-compare-timeout`, a checkpoint is taken.
    Compare,
}

/// The parameters as they are at the moment: most can be changed while a migration runs.
#[derive(Debug, Default)]
pub(crate) struct Current(Mutex<Parameters>);

impl Current {
    pub(crate) fn of(parameters: Parameters) -> Current {
        Current(Mutex::new(parameters))
    }

    fn lock(&self) -> MutexGuard<'_, Parameters> {
        // Whole values are stored under it.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// All of them.
    pub(crate) fn get(&self) -> Parameters {
        self.lock().clone()
    }

    /// What `look` makes of them, which must not block.
    pub(crate) fn with<T>(&self, look: impl FnOnce(&Parameters) -> T) -> T {
        look(&self.lock())
    }

    /// Changes them, unless they were wrong then. `change` must not block.
    pub(crate) fn change(&self, change: impl FnOnce(&mut Parameters)) -> Result<(), SettingError> {
        let mut parameters = self.lock();
        let mut changed = parameters.clone();
        change(&mut changed);
        changed.check()?;
        *parameters = changed;
        Ok(())
    }
}

/// What can be tuned (`MigrationParameters`), in full.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", default)]
pub struct Parameters {
    /// The identifier of the TLS credentials, of endpoint `client` at a source and `server` at a
    /// destination; empty is without TLS.
    pub tls_creds: String,
    /// Whom the destination's certificate has to be for; empty for the host in its address.
    pub tls_hostname: String,
    /// The identifier of who may migrate into here; empty lets in every certificate of the CA.
    pub tls_authz: String,
    /// Dirtied bytes, as a percentage of those sent, from which auto-converge acts. 1 to 100.
    pub throttle_trigger_threshold: u8,
    /// The first slow-down, in percent. 1 to 99.
    pub cpu_throttle_initial: u8,
    /// How much is added each time, in percent. 1 to 99.
    pub cpu_throttle_increment: u8,
    /// Whether the last steps are only as large as needed.
    pub cpu_throttle_tailslow: bool,
    /// The most the guest is slowed down, in percent. `cpu-throttle-initial` to 99.
    pub max_cpu_throttle: u8,
    /// Bytes a second while the guest runs at the source; 0 is without limit.
    pub max_bandwidth: u64,
    /// Bytes a second that nobody asked for, in postcopy; 0 is without limit.
    pub max_postcopy_bandwidth: u64,
    /// Bytes a second to count on for the switchover; 0 is to use the measured rate.
    pub avail_switchover_bandwidth: u64,
    /// How long the guest may stand still, in ms. At most 2,000,000.
    pub downtime_limit: u64,
    /// Connections that carry pages, with capability `multifd`. 1 to 255, the same on both sides.
    pub multifd_channels: u8,
    /// The XBZRLE cache, in bytes: a power of two, a page at least.
    pub xbzrle_cache_size: u64,
    /// How multifd packets are compressed; what comes in is taken as it comes.
    pub multifd_compression: MultifdCompression,
    /// From 0 (none) over 1 (fastest) to 9 (smallest).
    pub multifd_zlib_level: u8,
    /// From 0 (zstd's own default) over 1 (fastest) to 20 (smallest).
    pub multifd_zstd_level: u8,
    /// Who looks for pages of zeros, with capability `multifd`.
    pub zero_page_detection: ZeroPageDetection,
    /// Whether a migration whose link broke in postcopy goes on by itself.
    pub auto_recover: AutoRecover,
    /// For how long that is tried, in seconds; 0 is without end.
    pub recover_time_limit: u64,
    /// Another address of the destination, tried in turn with the one that the migration went to;
    /// empty for none. Looked at anew for each try.
    pub recover_uri: String,
    /// A peer that is silent for so long, in ms, has gone: one that takes nothing of what is sent,
    /// or that says nothing where it had to. 0 is to wait for ever; 100 is the least otherwise.
    pub silence_limit: u64,
    /// How long after a checkpoint the next one is taken, in ms, with capability `x-colo`. 1 at least.
    pub x_checkpoint_delay: u64,
    /// What a survivor of COLO does by itself.
    pub x_colo_failover: ColoFailover,
    /// When what a primary's guest says may leave. Takes effect when COLO begins.
    pub x_colo_output: ColoOutput,
    /// How long the guest or its copy may wait for the other to say the same, in ms. 1 at least. Takes
    /// effect when COLO begins.
    pub x_colo_compare_timeout: u64,
}

impl Default for Parameters {
    fn default() -> Parameters {
        Parameters {
            tls_creds: String::new(),
            tls_hostname: String::new(),
            tls_authz: String::new(),
            throttle_trigger_threshold: 50,
            cpu_throttle_initial: 20,
            cpu_throttle_increment: 10,
            cpu_throttle_tailslow: false,
            max_cpu_throttle: 99,
            max_bandwidth: 128 << 20,
            max_postcopy_bandwidth: 0,
            avail_switchover_bandwidth: 0,
            downtime_limit: 300,
            multifd_channels: 2,
            xbzrle_cache_size: 64 << 20,
            multifd_compression: MultifdCompression::None,
            multifd_zlib_level: 1,
            multifd_zstd_level: 1,
            zero_page_detection: ZeroPageDetection::Multifd,
            auto_recover: AutoRecover::Auto,
            recover_time_limit: 300,
            recover_uri: String::new(),
            silence_limit: 30_000,
            x_checkpoint_delay: 20_000,
            x_colo_failover: ColoFailover::Auto,
            x_colo_output: ColoOutput::Buffer,
            x_colo_compare_timeout: 3000,
        }
    }
}

impl Parameters {
    /// Whether every value is in QMP's range.
    pub fn check(&self) -> Result<(), SettingError> {
        let percent = |name, value: u8, top: u8| match value {
            v if (1..=top).contains(&v) => Ok(()),
            v => {
                let expected = if top == 99 { "1 to 99" } else { "1 to 100" };
                Err(SettingError::Range { name, expected, found: v.into() })
            }
        };
        percent("throttle-trigger-threshold", self.throttle_trigger_threshold, 100)?;
        percent("cpu-throttle-initial", self.cpu_throttle_initial, 99)?;
        percent("cpu-throttle-increment", self.cpu_throttle_increment, 99)?;
        if !(self.cpu_throttle_initial..=99).contains(&self.max_cpu_throttle) {
            return Err(SettingError::Range {
                name: "max-cpu-throttle",
                expected: "cpu-throttle-initial to 99",
                found: self.max_cpu_throttle.into(),
            });
        }
        if self.downtime_limit > 2_000_000 {
            return Err(SettingError::Range {
                name: "downtime-limit",
                expected: "0 to 2000000 ms",
                found: self.downtime_limit,
            });
        }
        let level = |name, value: u8, range: std::ops::RangeInclusive<u8>, expected| match range
            .contains(&value)
        {
            true => Ok(()),
            false => Err(SettingError::Range { name, expected, found: value.into() }),
        };
        level("multifd-channels", self.multifd_channels, 1..=255, "1 to 255")?;
        level("multifd-zlib-level", self.multifd_zlib_level, 0..=9, "0 to 9")?;
        level("multifd-zstd-level", self.multifd_zstd_level, 0..=20, "0 to 20")?;
        if (1..100).contains(&self.silence_limit) {
            return Err(SettingError::Range {
                name: "silence-limit",
                expected: "0, or 100 ms or more",
                found: self.silence_limit,
            });
        }
        if self.x_checkpoint_delay == 0 {
            return Err(SettingError::Range {
                name: "x-checkpoint-delay",
                expected: "1 ms or more",
                found: 0,
            });
        }
        if self.x_colo_compare_timeout == 0 {
            return Err(SettingError::Range {
                name: "x-colo-compare-timeout",
                expected: "1 ms or more",
                found: 0,
            });
        }
        check_recover_uri(&self.recover_uri)?;
        if !self.xbzrle_cache_size.is_power_of_two() || self.xbzrle_cache_size < 4096 {
            return Err(SettingError::Range {
                name: "xbzrle-cache-size",
                expected: "a power of two of 4096 or more",
                found: self.xbzrle_cache_size,
            });
        }
        Ok(())
    }
}

/// What is connected to again and again is a socket.
fn check_recover_uri(uri: &str) -> Result<(), SettingError> {
    if uri.is_empty() {
        return Ok(());
    }
    let reason = match uri.parse() {
        Ok(Address::Tcp { .. } | Address::Unix(_)) => return Ok(()),
        Ok(Address::Fd(_) | Address::Exec(_) | Address::File { .. }) => {
            format!("'{uri}' cannot be connected to again and again: expected tcp: or unix:")
        }
        Err(error) => error.to_string(),
    };
    Err(SettingError::Address { name: "recover-uri", reason })
}
