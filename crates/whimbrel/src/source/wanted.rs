//! What is wanted first: told by `source/urgent`, heeded by `source/main`.

use std::collections::{HashSet, VecDeque};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use whimbrel_ram::{BlockIndex, HostPage, TargetPage};

/// The wishes of a guest that runs elsewhere.
#[derive(Debug)]
pub(super) struct Wanted {
    started: Instant,
    inner: Mutex<Inner>,
    changed: Condvar,
    /// Behind the last page that was asked for: the block in the upper 16 bits, and one more than
    /// the page in the others. 0 is none.
    hint: AtomicU64,
    /// A page is on its way on the urgent channel.
    urgent: AtomicBool,
    /// Bytes that went there.
    urgent_bytes: AtomicU64,
    /// When something was asked for last, in µs since the start and one more; 0 is never.
    last_request: AtomicU64,
}

#[derive(Debug, Default)]
struct Inner {
    /// Host pages that were asked for and have no channel of their own, in that order.
    queue: VecDeque<HostPage>,
    /// What is in the queue: asking twice is not heard twice.
    queued: HashSet<HostPage>,
}

const PAGE_BITS: u32 = 48;

/// For so long nobody has asked when it is quiet.
const QUIET: Duration = Duration::from_millis(20);

impl Wanted {
    pub(super) fn new() -> Wanted {
        Wanted {
            started: Instant::now(),
            inner: Mutex::default(),
            changed: Condvar::new(),
            hint: AtomicU64::new(0),
            urgent: AtomicBool::new(false),
            urgent_bytes: AtomicU64::new(0),
            last_request: AtomicU64::new(0),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Something was asked for.
    pub(super) fn asked(&self) {
        let micros = u64::try_from(self.started.elapsed().as_micros()).unwrap_or(u64::MAX - 1);
        self.last_request.store(micros + 1, Ordering::Relaxed);
    }

    /// For how long nothing was asked for; `None` when nothing ever was.
    pub(super) fn quiet_for(&self) -> Option<Duration> {
        let micros = self.last_request.load(Ordering::Relaxed).checked_sub(1)?;
        Some(self.started.elapsed().saturating_sub(Duration::from_micros(micros)))
    }

    /// Whether nothing has been asked for lately, nor is likely to be in this moment: a guest that
    /// has only just gone will ask soon.
    pub(super) fn is_quiet(&self) -> bool {
        self.quiet_for().unwrap_or_else(|| self.started.elapsed()) >= QUIET
    }

    /// `page` was asked for, and is to go on the main channel.
    pub(super) fn queue(&self, page: HostPage) {
        let mut inner = self.lock();
        if inner.queued.insert(page) {
            inner.queue.push_back(page);
            self.changed.notify_all();
        }
    }

    /// What has waited longest.
    pub(super) fn next(&self) -> Option<HostPage> {
        let mut inner = self.lock();
        let page = inner.queue.pop_front()?;
        inner.queued.remove(&page);
        Some(page)
    }

    /// What follows `page` in its block may be wanted next.
    pub(super) fn follow(&self, block: BlockIndex, page: TargetPage) {
        let hint = u64::from(block.0) << PAGE_BITS | (page.0 + 1);
        self.hint.store(hint, Ordering::Relaxed);
    }

    /// Where to go on, if that was said since the last time.
    pub(super) fn take_hint(&self) -> Option<(BlockIndex, TargetPage)> {
        let hint = match self.hint.load(Ordering::Relaxed) {
            0 => return None,
            _ => self.hint.swap(0, Ordering::Relaxed),
        };
        let page = (hint & ((1 << PAGE_BITS) - 1)).checked_sub(1)?;
        let block = u16::try_from(hint >> PAGE_BITS).expect("16 bits are left");
        Some((BlockIndex(block), TargetPage(page)))
    }

    /// A page begins to go on the urgent channel.
    pub(super) fn urgent_begins(&self) {
        self.urgent.store(true, Ordering::Release);
    }

    /// It has gone, `bytes` of it.
    pub(super) fn urgent_ends(&self, bytes: u64) {
        self.urgent_bytes.fetch_add(bytes, Ordering::Relaxed);
        self.urgent.store(false, Ordering::Release);
        let _inner = self.lock(); // So that nobody is between looking and waiting.
        self.changed.notify_all();
    }

    /// Whether a page is going on the urgent channel.
    pub(super) fn is_urgent(&self) -> bool {
        self.urgent.load(Ordering::Acquire)
    }

    /// Bytes that went on the urgent channel.
    pub(super) fn urgent_bytes(&self) -> u64 {
        self.urgent_bytes.load(Ordering::Relaxed)
    }

    /// Waits for `time`, or until a page is asked for or has gone on the urgent channel.
    pub(super) fn wait(&self, time: Duration) {
        let inner = self.lock();
        if inner.queue.is_empty() {
            drop(self.changed.wait_timeout(inner, time).unwrap_or_else(PoisonError::into_inner));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn page(number: u64) -> HostPage {
        HostPage { block: BlockIndex(3), number }
    }

    #[test]
    fn requests_are_served_in_their_order_and_once() {
        let wanted = Wanted::new();
        [7, 3, 7, 9].into_iter().for_each(|number| wanted.queue(page(number)));
        let served: Vec<_> = std::iter::from_fn(|| wanted.next()).map(|page| page.number).collect();
        assert_eq!(served, [7, 3, 9]);
        wanted.queue(page(7));
        assert_eq!(wanted.next(), Some(page(7)), "asked for again after it was served");
    }

    #[test]
    fn a_hint_is_taken_once_also_for_page_0() {
        let wanted = Wanted::new();
        assert_eq!(wanted.take_hint(), None);
        for hint in [(BlockIndex(0), TargetPage(0)), (BlockIndex(65_535), TargetPage(1 << 40))] {
            wanted.follow(hint.0, hint.1);
            assert_eq!(wanted.take_hint(), Some(hint));
            assert_eq!(wanted.take_hint(), None);
        }
    }
}
