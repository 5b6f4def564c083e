//! Capabilities and parameters, under QMP's names and with its ranges.

use std::fmt;

use serde::{Deserialize, Serialize};

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
    /// Keep account of how long vCPUs wait for pages, at a destination.
    PostcopyBlocktime,
    /// Send the VM's UUID and compare it.
    ValidateUuid,
    /// Give the pages that a guest waits for a channel of their own.
    PostcopyPreempt,
}

impl Capability {
    /// All of them, in QMP's order.
    pub const ALL: [Capability; 9] = [
        Capability::Xbzrle,
        Capability::AutoConverge,
        Capability::Events,
        Capability::PostcopyRam,
        Capability::ReturnPath,
        Capability::PauseBeforeSwitchover,
        Capability::PostcopyBlocktime,
        Capability::ValidateUuid,
        Capability::PostcopyPreempt,
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
            Capability::PostcopyBlocktime => "postcopy-blocktime",
            Capability::ValidateUuid => "validate-uuid",
            Capability::PostcopyPreempt => "postcopy-preempt",
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

    /// Whether everything that is on has what it needs.
    pub fn check(self) -> Result<(), SettingError> {
        let (capability, needed) = (Capability::PostcopyPreempt, Capability::PostcopyRam);
        match self.has(capability) && !self.has(needed) {
            true => Err(SettingError::Needs { capability, needed }),
            false => Ok(()),
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
}

/// What can be tuned (`MigrationParameters`), in full.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", default)]
pub struct Parameters {
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
    /// The XBZRLE cache, in bytes: a power of two, a page at least.
    pub xbzrle_cache_size: u64,
}

impl Default for Parameters {
    fn default() -> Parameters {
        Parameters {
            throttle_trigger_threshold: 50,
            cpu_throttle_initial: 20,
            cpu_throttle_increment: 10,
            cpu_throttle_tailslow: false,
            max_cpu_throttle: 99,
            max_bandwidth: 128 << 20,
            max_postcopy_bandwidth: 0,
            avail_switchover_bandwidth: 0,
            downtime_limit: 300,
            xbzrle_cache_size: 64 << 20,
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
