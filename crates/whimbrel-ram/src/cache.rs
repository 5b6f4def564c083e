//! A second copy of a guest's RAM, for the pages of a checkpoint to arrive in.
//!
//! A guest that is kept in step with another one must never hold half a checkpoint. So what comes
//! goes here, and is [marked](RamCache::mark); when all of it is there it is
//! [flushed](RamCache::flush_part): what was marked, and what the guest has written itself since
//! the last time, is copied to the guest, which then is what the cache is.

use std::ops::Range;

use crate::bitmap::AtomicBitmap;
use crate::dirty::DirtyBits;
use crate::words::{mask, words};
use crate::{BlockError, BlockIndex, GuestRam, RamBlock, TARGET_PAGE};

/// Pages that one call of [`RamCache::flush_part`] looks at.
const PART: u64 = 4096;

/// A copy of all of a guest's RAM, and which of its pages are newer than the guest's.
#[derive(Debug)]
pub struct RamCache {
    ram: GuestRam,
    marked: Box<[AtomicBitmap]>,
    parts: Box<[Part]>,
}

/// A piece of a block, flushed by one thread.
#[derive(Clone, Debug)]
struct Part {
    block: BlockIndex,
    pages: Range<u64>,
}

impl RamCache {
    /// For the blocks of `guest`, all zero: memory is taken from the host as pages come.
    pub fn new(guest: &GuestRam) -> Result<RamCache, BlockError> {
        let copy = |block: &RamBlock| {
            RamBlock::anonymous(block.name(), block.guest_address(), block.len())
        };
        let blocks: Vec<RamBlock> =
            guest.blocks().map(|(_, block)| copy(block)).collect::<Result<_, _>>()?;
        let ram = GuestRam::new(blocks);
        let marked = ram.blocks().map(|(_, block)| AtomicBitmap::new(block.target_pages()));
        let parts = ram.blocks().flat_map(|(block, of)| {
            let pages = of.target_pages();
            (0..pages.div_ceil(PART)).map(move |part| {
                let start = part * PART;
                Part { block, pages: start..(start + PART).min(pages) }
            })
        });
        Ok(RamCache { marked: marked.collect(), parts: parts.collect(), ram })
    }

    /// The copy, to be written by whoever takes pages in.
    pub fn ram(&self) -> &GuestRam {
        &self.ram
    }

    /// These pages of the cache are newer than the guest's: they were written before.
    ///
    /// # Panics
    /// When they are outside the block, here and below.
    pub fn mark(&self, block: BlockIndex, pages: Range<u64>) {
        self.marked[block.index()].set(pages);
    }

    /// Copies pages that are in place in `guest` already, which has the same blocks.
    pub fn copy_from(
        &self,
        guest: &GuestRam,
        block: BlockIndex,
        pages: Range<u64>,
    ) -> Result<(), BlockError> {
        copy(guest.block(block), self.ram.block(block), pages)
    }

    /// In how many parts it is flushed.
    pub fn parts(&self) -> usize {
        self.parts.len()
    }

    /// Copies the pages of a part that are marked or in `written` to `guest`, which stands still,
    /// and clears their marks; gives how many that were. Different parts may be flushed by
    /// different threads at the same time.
    pub fn flush_part(
        &self,
        part: usize,
        guest: &GuestRam,
        written: &DirtyBits,
    ) -> Result<u64, BlockError> {
        let Part { block, pages } = &self.parts[part];
        let (marked, written) = (&self.marked[block.index()], written.words(*block));
        let (from, to) = (self.ram.block(*block), guest.block(*block));
        let (mut copied, mut run) = (0, pages.start..pages.start);
        for word in words(pages.clone()) {
            let mut bits = (marked.word(word) | written[word]) & mask(pages, word);
            let first = word as u64 * 64;
            while bits != 0 {
                let start = u64::from(bits.trailing_zeros());
                let len = u64::from((bits >> start).trailing_ones());
                let found = first + start..first + start + len;
                if found.start == run.end {
                    run.end = found.end;
                } else {
                    copied += run.end - run.start;
                    copy(from, to, run)?;
                    run = found;
                }
                bits &= !(u64::MAX >> (64 - len) << start);
            }
        }
        copied += run.end - run.start;
        copy(from, to, run)?;
        marked.clear(pages.clone());
        Ok(copied)
    }
}

fn copy(from: &RamBlock, to: &RamBlock, pages: Range<u64>) -> Result<(), BlockError> {
    if pages.is_empty() {
        return Ok(());
    }
    let page = TARGET_PAGE.bytes() as u64;
    let len = usize::try_from((pages.end - pages.start) * page).expect("RAM fits in memory");
    to.copy_from(from, pages.start * page, len)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::TargetPage;

    fn ram(pages: &[u64]) -> GuestRam {
        let block = |(at, pages): (usize, &u64)| {
            RamBlock::anonymous(&format!("block-{at}"), 0, pages * 4096).unwrap()
        };
        GuestRam::new(pages.iter().enumerate().map(block).collect())
    }

    fn fill(ram: &GuestRam, with: u8) {
        for (_, block) in ram.blocks() {
            (0..block.target_pages()).for_each(|page| write(block, page, with));
        }
    }

    fn write(block: &RamBlock, page: u64, with: u8) {
        block.write(page * 4096, &[with; 4096]).unwrap();
    }

    fn byte(ram: &GuestRam, block: u16, page: u64) -> u8 {
        let (mut first, mut last) = ([0], [0]);
        ram.block(BlockIndex(block)).read(page * 4096, &mut first).unwrap();
        ram.block(BlockIndex(block)).read(page * 4096 + 4095, &mut last).unwrap();
        assert_eq!(first, last);
        first[0]
    }

    #[test]
    fn exactly_what_was_marked_or_written_is_flushed_once() {
        let guest = ram(&[PART + 70, 3]);
        let cache = RamCache::new(&guest).unwrap();
        fill(&guest, 1);
        fill(cache.ram(), 2);
        let (a, b) = (BlockIndex(0), BlockIndex(1));
        let marked = [(a, 0..1), (a, 62..130), (a, PART - 2..PART + 2), (b, 2..3)];
        marked.iter().for_each(|(block, pages)| cache.mark(*block, pages.clone()));
        let mut written = DirtyBits::none(&guest);
        written.insert(a, TargetPage(128), 10);
        written.insert(a, TargetPage(PART + 69), 1);
        written.insert(b, TargetPage(0), 1);
        let flush = |written: &DirtyBits| -> u64 {
            (0..cache.parts()).map(|part| cache.flush_part(part, &guest, written).unwrap()).sum()
        };
        assert_eq!(flush(&written), 1 + 68 + 4 + 1 + 8 + 1 + 1);
        for page in 0..PART + 70 {
            let flushed = page == 0
                || (62..138).contains(&page)
                || (PART - 2..PART + 2).contains(&page)
                || page == PART + 69;
            assert_eq!(byte(&guest, 0, page), if flushed { 2 } else { 1 }, "page {page}");
        }
        assert_eq!([0, 1, 2].map(|page| byte(&guest, 1, page)), [2, 1, 2]);
        assert_eq!(flush(&DirtyBits::none(&guest)), 0, "the marks are gone");
    }

    #[test]
    fn what_the_guest_has_is_copied() {
        let guest = ram(&[5]);
        let cache = RamCache::new(&guest).unwrap();
        fill(&guest, 7);
        cache.copy_from(&guest, BlockIndex(0), 1..3).unwrap();
        assert_eq!([0, 1, 2, 3].map(|page| byte(cache.ram(), 0, page)), [0, 7, 7, 0]);
        cache.copy_from(&guest, BlockIndex(0), 4..6).unwrap_err();
    }
}
