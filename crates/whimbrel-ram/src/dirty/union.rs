//! Several dirty logs as one.

use std::fmt;
use std::io;
use std::sync::Arc;

use super::bits::Returned;
use super::{DirtyBits, DirtyLog};
use crate::{BlockIndex, GuestRam, TargetPage};

/// A page is dirty when any of several logs says so: KVM's for the guest's writes, and
/// [`OwnWrites`](super::OwnWrites) for the VMM's.
pub struct Union {
    ram: GuestRam,
    logs: Vec<Arc<dyn DirtyLog>>,
    returned: Returned,
}

impl Union {
    /// Of `logs`, which all watch `ram`.
    pub fn new(ram: &GuestRam, logs: Vec<Arc<dyn DirtyLog>>) -> Union {
        Union { ram: ram.clone(), logs, returned: Returned::default() }
    }
}

impl fmt::Debug for Union {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Union").field("logs", &self.logs.len()).finish_non_exhaustive()
    }
}

impl DirtyLog for Union {
    fn start(&self) -> io::Result<()> {
        for (at, log) in self.logs.iter().enumerate() {
            if let Err(error) = log.start() {
                self.logs[..at].iter().for_each(|log| log.stop());
                return Err(error);
            }
        }
        Ok(())
    }

    fn take(&self) -> io::Result<DirtyBits> {
        let mut bits = DirtyBits::none(&self.ram);
        for log in &self.logs {
            match log.take() {
                Ok(taken) => bits.merge(&taken),
                Err(error) => {
                    self.returned.give_back(bits);
                    return Err(error);
                }
            }
        }
        self.returned.take_into(&mut bits);
        Ok(bits)
    }

    fn put_back(&self, bits: DirtyBits) {
        self.returned.give_back(bits);
    }

    fn rearm(&self, block: BlockIndex, first: TargetPage, count: u64) -> io::Result<()> {
        self.logs.iter().try_for_each(|log| log.rearm(block, first, count))
    }

    fn stop(&self) {
        self.logs.iter().for_each(|log| log.stop());
    }
}
