//! What is measured: a guest, what it dirties, and how its checkpoints travel.

use std::fmt;

use crate::bench::contender::Memory;
use crate::bench::network::Between;

const MIB: u64 = 1 << 20;

/// What all contenders do in turn.
#[derive(Debug, Clone, Copy)]
pub(super) struct Scenario {
    pub(super) between: Between,
    pub(super) memory: Memory,
    /// How much the guest dirties, in MiB/s: an update of 4 KiB each; 0 is a guest that does nothing.
    pub(super) dirty_mib_per_s: u32,
    /// 0: without multifd.
    pub(super) channels: u8,
}

impl Scenario {
    /// Page updates a second.
    pub(super) fn pages_per_second(self) -> u32 {
        self.dirty_mib_per_s.saturating_mul(256)
    }

    /// The memory that the updates fall on, each page as likely. Small enough for what a QEMU's machine
    /// has above 256 MiB and below its firmware's own.
    pub(super) fn working_set_mib(self) -> u32 {
        u32::try_from(self.memory.bytes() / MIB * 3 / 8).map_or(1024, |mib| mib.clamp(1, 1024))
    }
}

impl fmt::Display for Scenario {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { between, memory, dirty_mib_per_s, channels } = self;
        write!(formatter, "{between}, {}, ", memory.argument())?;
        match dirty_mib_per_s {
            0 => formatter.write_str("idle, ")?,
            rate => write!(formatter, "{rate} MiB/s, ")?,
        }
        match channels {
            0 => formatter.write_str("no multifd"),
            more => write!(formatter, "multifd {more}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_scenario_says_all_of_itself() {
        let scenario = Scenario {
            between: Between::parse("loopback").unwrap(),
            memory: Memory::parse("512M").unwrap(),
            dirty_mib_per_s: 20,
            channels: 0,
        };
        assert_eq!(scenario.to_string(), "loopback, 512M, 20 MiB/s, no multifd");
        assert_eq!((scenario.pages_per_second(), scenario.working_set_mib()), (5120, 192));
        let scenario = Scenario {
            between: Between::parse("10").unwrap(),
            memory: Memory::parse("4G").unwrap(),
            dirty_mib_per_s: 0,
            channels: 2,
        };
        assert_eq!(scenario.to_string(), "10 Gbit/s, 4096M, idle, multifd 2");
        assert_eq!(scenario.working_set_mib(), 1024);
    }
}
