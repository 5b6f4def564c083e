//! Where the pages of all channels go.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use whimbrel_ram::{BlockIndex, GuestRam, RamCache, Received, TARGET_PAGE, TargetPage};
use whimbrel_wire::BlockOffset;

use crate::error::Error;
use crate::kept::Changes;

const PAGE: u64 = TARGET_PAGE.bytes() as u64;

/// Memory is taken from the host in such pieces, where it is about to be filled as a whole.
const STRETCH: u64 = 2 << 20;

/// The RAM that a stream fills, for those who fill it at the same time.
#[derive(Debug)]
pub(in crate::destination) struct Target {
    pub(in crate::destination) ram: GuestRam,
    /// Pages whose content has been placed. What is not among them is zero, if `fresh`.
    pub(in crate::destination) content: Arc<Received>,
    /// What has not been placed is zero.
    pub(in crate::destination) fresh: bool,
    /// Where a postcopy may follow: which pages have come, also those that are zero.
    pub(in crate::destination) arrived: Option<Arc<Received>>,
    /// Bytes of RAM that have come.
    pub(in crate::destination) placed: Arc<AtomicU64>,
    /// Who writes the pages into a file.
    pub(in crate::destination) changes: Option<Changes>,
    /// At a secondary of COLO.
    pub(in crate::destination) cache: Option<Cached>,
}

/// Where pages go at a secondary of COLO.
#[derive(Debug)]
pub(in crate::destination) enum Cached {
    /// To the guest, and to its cache as well.
    Beside(Arc<RamCache>),
    /// To the cache, whose memory the target is.
    Instead(Arc<RamCache>),
}

impl Target {
    /// Pages with content are about to come: where they follow each other into memory that nobody
    /// has touched, the kernel gives it in one piece, which is many times cheaper than page by
    /// page.
    pub(super) fn expect(
        &self,
        index: BlockIndex,
        offsets: impl ExactSizeIterator<Item = BlockOffset>,
    ) {
        if !self.fresh {
            return;
        }
        let count = offsets.len() as u64;
        let mut offsets = offsets.map(|offset| offset.0);
        let (Some(first), Some(last)) = (offsets.next(), offsets.last()) else { return };
        let block = self.ram.block(index);
        let start = first - first % STRETCH;
        let is_row = last.checked_sub(first) == Some((count - 1) * PAGE);
        // The first packet of a stretch, of those that fill it.
        if is_row && count * PAGE >= STRETCH / 8 && first == start && start + STRETCH <= block.len()
        {
            // Where it cannot be had in advance it comes with the pages, or they say what is wrong.
            let _ = block.populate(start, STRETCH);
        }
    }

    /// The content of pages has been placed.
    pub(super) fn has_placed(&self, block: BlockIndex, offsets: impl Iterator<Item = BlockOffset>) {
        let mut run = 0..0;
        let mut count = 0;
        for BlockOffset(offset) in offsets {
            let page = offset / PAGE;
            if page != run.end {
                self.has_content(block, run);
                run = page..page;
            }
            run.end += 1;
            count += PAGE;
        }
        self.has_content(block, run);
        self.placed.fetch_add(count, Ordering::Relaxed);
    }

    /// The content of pages that follow each other has been placed.
    pub(in crate::destination) fn has_content(&self, block: BlockIndex, run: Range<u64>) {
        if run.is_empty() {
            return;
        }
        if let Some(changes) = &self.changes {
            changes.placed(block, run.clone());
        }
        if let Some(arrived) = &self.arrived {
            arrived.set_all(block, run.clone());
        }
        self.keep_in_step(block, run.clone());
        self.content.set_all(block, run);
    }

    /// Pages that have been changed in this target's memory.
    fn keep_in_step(&self, block: BlockIndex, run: Range<u64>) {
        match &self.cache {
            Some(Cached::Beside(cache)) => {
                let copied = cache.copy_from(&self.ram, block, run);
                copied.expect("where they were placed is inside the block");
            }
            Some(Cached::Instead(cache)) => cache.mark(block, run),
            None => {}
        }
    }

    /// A page is zero. Untouched memory stays untouched.
    pub(in crate::destination) fn place_zero(
        &self,
        index: BlockIndex,
        BlockOffset(offset): BlockOffset,
    ) -> Result<(), Error> {
        let page = TargetPage::containing(offset);
        if let Some(arrived) = &self.arrived {
            arrived.set(index, page);
        }
        let block = self.ram.block(index);
        let was_zero = self.fresh && !self.content.contains(index, page);
        let changes = !was_zero && !block.is_zero(page);
        if changes {
            block.write_zeros(offset, TARGET_PAGE.bytes())?;
            self.keep_in_step(index, page.0..page.0 + 1);
        }
        match &self.changes {
            Some(told) if changes => told.placed(index, page.0..page.0 + 1),
            Some(told) => told.stays_zero(index, page),
            None => {}
        }
        Ok(())
    }

    /// So many pages have come that have no content.
    pub(super) fn count(&self, pages: usize) {
        self.placed.fetch_add(pages as u64 * PAGE, Ordering::Relaxed);
    }
}
