//! The pages that the guest waits for: which, since when, and how long it took.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering, fence};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use whimbrel_ram::{AbsentRam, BlockIndex, Fault, PageSize, TargetPage};

use super::blocktime::Blocktime;
use crate::latency::Latencies;
use crate::report::FaultReport;
use crate::status::{FaultStats, MigrationInfo, MigrationStatus};

/// Buckets of QMP's `postcopy-latency-dist`.
const BUCKETS: usize = 24;

/// A request without an answer is sent again after this long, and then ever more seldom.
pub(super) const ASK_AGAIN: Duration = Duration::from_secs(1);
const ASK_AGAIN_MAX: Duration = Duration::from_secs(16);

/// What is asked for at once: a page of the source's backing, or 4 KiB between whimbrels.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Request {
    pub(super) block: BlockIndex,
    /// In bytes from the block's start.
    pub(super) start: u64,
}

/// Who waits for what.
#[derive(Debug)]
pub(super) struct Asked {
    /// What one request covers in each block.
    units: Box<[PageSize]>,
    /// One bit a target page: somebody waits for it. Looked at by whoever places pages, so that
    /// the table is locked only for those.
    waited_for: Box<[Box<[AtomicU64]>]>,
    came_twice: AtomicU64,
    table: Mutex<Table>,
}

#[derive(Debug)]
struct Table {
    waiting: HashMap<Request, Waiting>,
    all: Latencies,
    asked: Latencies,
    waited: Latencies,
    placed: Latencies,
    dist: [u64; BUCKETS],
    asked_again: u64,
    blocktime: Blocktime,
}

/// A request that has not been answered.
#[derive(Debug)]
struct Waiting {
    faults: Vec<Waiter>,
    /// When it was written last; `None` until it is.
    written: Option<Instant>,
    again_after: Duration,
}

#[derive(Debug)]
struct Waiter {
    page: TargetPage,
    thread: u32,
    since: Instant,
}

impl Asked {
    pub(super) fn new(absent: &AbsentRam, units: Box<[PageSize]>, blocktime: Blocktime) -> Asked {
        let words = |pages: u64| {
            let words = usize::try_from(pages.div_ceil(64)).expect("RAM fits in memory");
            (0..words).map(|_| AtomicU64::new(0)).collect()
        };
        let waited_for = absent.ram().blocks().map(|(_, block)| words(block.target_pages()));
        let table = Table {
            waiting: HashMap::new(),
            all: Latencies::default(),
            asked: Latencies::default(),
            waited: Latencies::default(),
            placed: Latencies::default(),
            dist: [0; BUCKETS],
            asked_again: 0,
            blocktime,
        };
        Asked {
            units,
            waited_for: waited_for.collect(),
            came_twice: AtomicU64::new(0),
            table: Mutex::new(table),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The threads that are vCPUs, before they run.
    pub(super) fn set_vcpus(&self, vcpus: Vec<u32>) {
        self.lock().blocktime.set_vcpus(vcpus);
    }

    /// How long a request in this block is, in bytes.
    pub(super) fn unit(&self, block: BlockIndex) -> PageSize {
        self.units[block.index()]
    }

    /// A fault was read, at `now`; gives the request to be sent for it, unless one is under way.
    /// Afterwards the caller looks whether the page has come meanwhile, and then [forgets] it.
    ///
    /// [forgets]: Asked::forget
    pub(super) fn note(&self, fault: &Fault, now: Instant) -> Option<Request> {
        let unit = self.unit(fault.block).bytes() as u64;
        let request = Request { block: fault.block, start: fault.offset - fault.offset % unit };
        let page = TargetPage::containing(fault.offset);
        let mut table = self.lock();
        table.blocktime.blocked(fault.thread, (fault.block, page), now);
        let new = !table.waiting.contains_key(&request);
        let waiting = table.waiting.entry(request).or_insert_with(|| Waiting {
            faults: Vec::new(),
            written: None,
            again_after: ASK_AGAIN,
        });
        waiting.faults.push(Waiter { page, thread: fault.thread, since: now });
        let (word, bit) = self.bit(fault.block, page);
        word.fetch_or(bit, Ordering::SeqCst);
        drop(table);
        // With the one in `placed`: either we see the page, or who places it sees the bit.
        fence(Ordering::SeqCst);
        new.then_some(request)
    }

    /// These requests were written.
    pub(super) fn written(&self, requests: &[Request]) {
        let now = Instant::now();
        let mut table = self.lock();
        for request in requests {
            if let Some(waiting) = table.waiting.get_mut(request) {
                waiting.written = Some(now);
            }
        }
    }

    /// All requests that have no answer yet, the oldest first: for a source that knows of none.
    pub(super) fn unanswered(&self) -> Vec<Request> {
        let mut table = self.lock();
        let since = |waiting: &Waiting| waiting.faults.first().map(|waiter| waiter.since);
        let mut all: Vec<_> =
            table.waiting.iter().map(|(request, waiting)| (since(waiting), *request)).collect();
        all.sort_by_key(|(since, _)| *since);
        table.waiting.values_mut().for_each(|waiting| waiting.again_after = ASK_AGAIN);
        all.into_iter().map(|(_, request)| request).collect()
    }

    /// Requests to be sent again, and how long to wait until the next look, if there is reason for
    /// one.
    pub(super) fn overdue(&self, now: Instant) -> (Vec<Request>, Option<Duration>) {
        let mut table = self.lock();
        let mut again = Vec::new();
        let mut next = (!table.waiting.is_empty()).then_some(ASK_AGAIN);
        for (request, waiting) in &mut table.waiting {
            let Some(written) = waiting.written else { continue };
            let left = waiting.again_after.saturating_sub(now.saturating_duration_since(written));
            if left > Duration::ZERO {
                next = next.map(|next| next.min(left));
                continue;
            }
            waiting.again_after = (waiting.again_after * 2).min(ASK_AGAIN_MAX);
            again.push(*request);
        }
        table.asked_again += again.len() as u64;
        (again, next)
    }

    /// Pages have been placed, of which the first byte was read at `read`; `new` of them were
    /// missing before.
    pub(super) fn placed(
        &self,
        block: BlockIndex,
        pages: std::ops::Range<u64>,
        new: u64,
        read: Instant,
    ) {
        let twice = pages.end - pages.start - new;
        if twice > 0 {
            self.came_twice.fetch_add(twice, Ordering::Relaxed);
        }
        fence(Ordering::SeqCst);
        for page in pages.map(TargetPage) {
            let (word, bit) = self.bit(block, page);
            if word.load(Ordering::SeqCst) & bit != 0 {
                self.settled(block, page, Some(read));
            }
        }
    }

    /// A fault that was noted was for a page that had come.
    pub(super) fn forget(&self, fault: &Fault) {
        self.settled(fault.block, TargetPage::containing(fault.offset), None);
    }

    /// Nobody waits for a page any more. `read` is when its first byte was; `None` where it was
    /// there and nobody had to wait for it.
    fn settled(&self, block: BlockIndex, page: TargetPage, read: Option<Instant>) {
        let now = Instant::now();
        let unit = self.unit(block).bytes() as u64;
        let request = Request { block, start: page.offset() - page.offset() % unit };
        let mut table = self.lock();
        let (word, bit) = self.bit(block, page);
        word.fetch_and(!bit, Ordering::SeqCst);
        let Table { waiting, all, asked, waited, placed, dist, blocktime, .. } = &mut *table;
        let Some(entry) = waiting.get_mut(&request) else { return };
        let written = entry.written;
        entry.faults.retain(|waiter| {
            if waiter.page != page {
                return true;
            }
            blocktime.woken(waiter.thread, (block, page), now);
            if let Some(read) = read {
                let latency = now.saturating_duration_since(waiter.since);
                all.record(latency);
                let us = u64::try_from(latency.as_micros()).unwrap_or(u64::MAX);
                let bucket = us.checked_ilog2().unwrap_or(0) as usize;
                dist[bucket.min(BUCKETS - 1)] += 1;
                // It may have come before it was asked for: then all of it was waiting.
                let written = written.unwrap_or(waiter.since).clamp(waiter.since, now);
                let read = read.clamp(written, now);
                asked.record(written - waiter.since);
                waited.record(read - written);
                placed.record(now - read);
            }
            false
        });
        if entry.faults.is_empty() {
            waiting.remove(&request);
        }
    }

    fn bit(&self, block: BlockIndex, page: TargetPage) -> (&AtomicU64, u64) {
        let word = usize::try_from(page.0 / 64).expect("RAM fits in memory");
        (&self.waited_for[block.index()][word], 1 << (page.0 % 64))
    }
}

impl FaultReport for Asked {
    fn tell(&self, info: &mut MigrationInfo) {
        // Copied, and only then looked through: whoever places a page that is waited for needs the
        // table.
        let (all, asked, waited, placed, asked_again) = {
            let table = self.lock();
            if info.status == Some(MigrationStatus::Completed) && table.blocktime.is_kept() {
                info.postcopy_latency = Some(table.all.mean_ns());
                info.postcopy_latency_dist = Some(table.dist.to_vec());
                table.blocktime.tell(info);
            }
            let Table { all, asked, waited, placed, asked_again, .. } = &*table;
            (all.clone(), asked.clone(), waited.clone(), placed.clone(), *asked_again)
        };
        info.faults = Some(FaultStats {
            count: all.count(),
            latency_us: all.summary(),
            asked_us: asked.summary(),
            waited_us: waited.summary(),
            placed_us: placed.summary(),
            asked_again,
            came_twice: self.came_twice.load(Ordering::Relaxed),
        });
    }
}
