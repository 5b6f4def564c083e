//! Huge pages for the time of a test.

use std::fs;

/// 2 MiB pages of the host's, given back at the end.
pub(crate) struct HugePages(u64);

const KNOB: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages";

impl HugePages {
    fn count() -> Option<u64> {
        fs::read_to_string(KNOB).ok()?.trim().parse().ok()
    }

    pub(crate) fn reserve(pages: u64) -> Option<HugePages> {
        let before = HugePages::count()?;
        fs::write(KNOB, (before + pages).to_string()).ok()?;
        let reserved = HugePages(HugePages::count()?.checked_sub(before)?);
        (reserved.0 == pages).then_some(reserved)
    }
}

impl Drop for HugePages {
    fn drop(&mut self) {
        if let Some(now) = HugePages::count() {
            // Left reserved, they cost memory and nothing else.
            let _ = fs::write(KNOB, now.saturating_sub(self.0).to_string());
        }
    }
}
