//! Huge pages for a test, as far as the host has them.

use std::fs;
use std::sync::{Mutex, PoisonError};

/// Reserved as long as this lives.
pub(crate) struct HugePages(u64);

const NR_HUGEPAGES: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages";

impl HugePages {
    pub(crate) fn reserve(count: u64) -> HugePages {
        let pages = HugePages(count);
        pages.change(|now| now + count);
        pages
    }

    /// Tests run side by side: each adds to what there is, and takes as much away.
    fn change(&self, new: impl Fn(u64) -> u64) {
        static LOCK: Mutex<()> = Mutex::new(());
        let _lock = LOCK.lock().unwrap_or_else(PoisonError::into_inner);
        let Ok(now) = fs::read_to_string(NR_HUGEPAGES) else { return };
        let now: u64 = now.trim().parse().expect("a number");
        // Not allowed to: the blocks say that there are none.
        let _ = fs::write(NR_HUGEPAGES, new(now).to_string());
    }
}

impl Drop for HugePages {
    fn drop(&mut self) {
        self.change(|now| now.saturating_sub(self.0));
    }
}
