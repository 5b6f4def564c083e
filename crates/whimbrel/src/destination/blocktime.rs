//! Capability `postcopy-blocktime`: for how long vCPUs stood still because pages were missing.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use whimbrel_ram::{BlockIndex, TargetPage};

use crate::status::MigrationInfo;

/// What a thread waits for.
pub(super) type Page = (BlockIndex, TargetPage);

/// What is kept of one thread.
#[derive(Clone, Copy, Debug, Default)]
struct Thread {
    /// What it waits for, and since when.
    blocked: Option<(Page, Instant)>,
    time: Duration,
    faults: u64,
}

/// The account.
#[derive(Debug, Default)]
pub(super) struct Blocktime {
    kept: bool,
    vcpus: Vec<u32>,
    threads: HashMap<u32, Thread>,
    /// How many vCPUs are blocked.
    blocked: usize,
    all_since: Option<Instant>,
    all: Duration,
}

impl Blocktime {
    /// Keeps account, or does not.
    pub(super) fn new(kept: bool) -> Blocktime {
        Blocktime { kept, ..Blocktime::default() }
    }

    pub(super) fn is_kept(&self) -> bool {
        self.kept
    }

    /// The threads that are vCPUs.
    pub(super) fn set_vcpus(&mut self, vcpus: Vec<u32>) {
        self.vcpus = vcpus;
    }

    /// A thread waits for a page.
    pub(super) fn blocked(&mut self, thread: u32, page: Page, now: Instant) {
        if !self.kept {
            return;
        }
        match self.threads.entry(thread).or_default().blocked {
            // The kernel may tell of the same wait twice.
            Some((same, _)) if same == page => return,
            // It was woken by the page before, of which we have not been told yet.
            Some((before, _)) => self.woken(thread, before, now),
            None => {}
        }
        self.threads.entry(thread).or_default().blocked = Some((page, now));
        if self.vcpus.contains(&thread) {
            self.blocked += 1;
            if self.blocked == self.vcpus.len() {
                self.all_since = Some(now);
            }
        }
    }

    /// The page that a thread waited for is there.
    pub(super) fn woken(&mut self, thread: u32, page: Page, now: Instant) {
        let Some(entry) = self.threads.get_mut(&thread) else { return };
        let Some((_, since)) = entry.blocked.take_if(|(blocked, _)| *blocked == page) else {
            return;
        };
        entry.time += now.saturating_duration_since(since);
        entry.faults += 1;
        if self.vcpus.contains(&thread) {
            self.blocked -= 1;
            if let Some(since) = self.all_since.take() {
                self.all += now.saturating_duration_since(since);
            }
        }
    }

    /// Adds it to the report.
    pub(super) fn tell(&self, info: &mut MigrationInfo) {
        let ms = |time: Duration| u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
        let mean_ns = |time: Duration, faults: u64| {
            u64::try_from(time.as_nanos() / u128::from(faults.max(1))).unwrap_or(u64::MAX)
        };
        let thread = |id: &u32| self.threads.get(id).copied().unwrap_or_default();
        let vcpus: Vec<Thread> = self.vcpus.iter().map(thread).collect();
        let others = self.threads.iter().filter(|(id, _)| !self.vcpus.contains(id));
        let (time, faults) = others.fold((Duration::ZERO, 0), |(time, faults), (_, thread)| {
            (time + thread.time, faults + thread.faults)
        });
        info.postcopy_blocktime = Some(ms(self.all));
        info.postcopy_vcpu_blocktime = Some(vcpus.iter().map(|t| ms(t.time)).collect());
        info.postcopy_vcpu_latency =
            Some(vcpus.iter().map(|thread| mean_ns(thread.time, thread.faults)).collect());
        info.postcopy_non_vcpu_latency = Some(mean_ns(time, faults));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_vcpus_blocked_at_once_is_what_counts() {
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        let mut blocktime = Blocktime::new(true);
        blocktime.set_vcpus(vec![10, 11]);
        let page = |number| (BlockIndex(0), TargetPage(number));
        blocktime.blocked(10, page(1), at(0));
        blocktime.blocked(10, page(1), at(1)); // Told twice.
        blocktime.blocked(99, page(7), at(2)); // No vCPU.
        blocktime.blocked(11, page(2), at(5));
        blocktime.woken(10, page(1), at(9));
        blocktime.woken(11, page(2), at(20));
        blocktime.woken(99, page(7), at(42));
        let mut info = MigrationInfo::default();
        blocktime.tell(&mut info);
        assert_eq!(info.postcopy_blocktime, Some(4));
        assert_eq!(info.postcopy_vcpu_blocktime, Some(vec![9, 15]));
        assert_eq!(info.postcopy_vcpu_latency, Some(vec![9_000_000, 15_000_000]));
        assert_eq!(info.postcopy_non_vcpu_latency, Some(40_000_000));
    }

    #[test]
    fn a_thread_that_waits_anew_before_we_know_that_it_was_woken_loses_nothing() {
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        let page = |number| (BlockIndex(0), TargetPage(number));
        let mut blocktime = Blocktime::new(true);
        blocktime.set_vcpus(vec![10]);
        blocktime.blocked(10, page(1), at(0));
        blocktime.blocked(10, page(2), at(3));
        blocktime.woken(10, page(1), at(4));
        blocktime.woken(10, page(2), at(8));
        let mut info = MigrationInfo::default();
        blocktime.tell(&mut info);
        assert_eq!(info.postcopy_blocktime, Some(8));
        assert_eq!(info.postcopy_vcpu_latency, Some(vec![4_000_000]));
    }
}
