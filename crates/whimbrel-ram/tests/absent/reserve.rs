//! Huge pages for a test, as far as the host has them.

use std::fs;
use std::sync::{Mutex, PoisonError};

/// Free ones that are enough for all tests that run side by side.
const ENOUGH: u64 = 64;

/// Reserved as long as this lives: so many more than there were, unless there were enough.
pub(crate) struct HugePages(u64);

static LOCK: Mutex<()> = Mutex::new(());

impl HugePages {
    pub(crate) fn reserve(count: u64) -> HugePages {
        let _lock = LOCK.lock().unwrap_or_else(PoisonError::into_inner);
        let added = if read("free_hugepages") < ENOUGH { count } else { 0 };
        add(added, true);
        HugePages(added)
    }
}

impl Drop for HugePages {
    fn drop(&mut self) {
        let _lock = LOCK.lock().unwrap_or_else(PoisonError::into_inner);
        add(self.0, false);
    }
}

/// Others may have changed the number meanwhile: what we added is taken away, no more.
fn add(count: u64, more: bool) {
    if count > 0 {
        let now = read("nr_hugepages");
        let new = if more { now + count } else { now.saturating_sub(count) };
        // Not allowed to: the blocks say that there are none.
        let _ = fs::write(path("nr_hugepages"), new.to_string());
    }
}

/// Zero where the host has no such pages.
fn read(name: &str) -> u64 {
    fs::read_to_string(path(name)).ok().and_then(|text| text.trim().parse().ok()).unwrap_or(0)
}

fn path(name: &str) -> String {
    format!("/sys/kernel/mm/hugepages/hugepages-2048kB/{name}")
}
