//! Which pages have arrived.

use std::ops::Range;

use crate::bitmap::AtomicBitmap;
use crate::sync::{AtomicU64, Ordering};
use crate::{BlockIndex, GuestRam, TargetPage};

/// Which target pages of a guest's RAM have arrived: one atomic bit each.
///
/// A bit is set after its page is in its place (a release), so whoever sees it ([`contains`], an
/// acquire) sees the page.
///
/// [`contains`]: Received::contains
#[derive(Debug)]
pub struct Received {
    blocks: Box<[AtomicBitmap]>,
    missing: AtomicU64,
}

impl Received {
    /// No page of `ram` has arrived.
    pub fn new(ram: &GuestRam) -> Received {
        let blocks = ram.blocks().map(|(_, block)| AtomicBitmap::new(block.target_pages()));
        let missing = ram.blocks().map(|(_, block)| block.target_pages()).sum();
        Received { blocks: blocks.collect(), missing: AtomicU64::new(missing) }
    }

    /// A page has arrived; true when it had not before.
    ///
    /// # Panics
    /// When the page is outside its block, here and below.
    pub fn set(&self, block: BlockIndex, page: TargetPage) -> bool {
        self.set_all(block, page.0..page.0 + 1) == 1
    }

    /// Pages have arrived; gives how many of them had not before.
    pub fn set_all(&self, block: BlockIndex, pages: Range<u64>) -> u64 {
        let new = self.blocks[block.index()].set(pages);
        self.missing.fetch_sub(new, Ordering::AcqRel);
        new
    }

    /// Pages are missing (again): what was received of them is to be forgotten.
    pub fn clear(&self, block: BlockIndex, pages: Range<u64>) {
        let cleared = self.blocks[block.index()].clear(pages);
        self.missing.fetch_add(cleared, Ordering::AcqRel);
    }

    /// Whether a page has arrived.
    pub fn contains(&self, block: BlockIndex, page: TargetPage) -> bool {
        self.blocks[block.index()].contains(page.0)
    }

    /// How many target pages have not arrived. A counter, read at no cost; zero is exact: then
    /// all pages are in their places.
    pub fn missing(&self) -> u64 {
        self.missing.load(Ordering::Acquire)
    }

    /// The bits of a block, 64 pages a word, the lowest page in the lowest bit.
    pub fn words(&self, block: BlockIndex) -> impl Iterator<Item = u64> {
        self.blocks[block.index()].words()
    }

    /// The first run of pages in a range that have not arrived.
    pub fn first_missing(&self, block: BlockIndex, pages: Range<u64>) -> Option<Range<u64>> {
        self.blocks[block.index()].first_clear(pages)
    }
}

#[cfg(test)]
mod tests {
    use super::Received;
    use crate::{BlockIndex, GuestRam, RamBlock, TargetPage};

    #[test]
    fn what_is_missing_is_counted_once() {
        let block = |name, pages: u64| RamBlock::anonymous(name, 0, pages * 4096).unwrap();
        let ram = GuestRam::new(vec![block("a", 70), block("b", 3)]);
        let received = Received::new(&ram);
        let (a, b) = (BlockIndex(0), BlockIndex(1));
        assert_eq!(received.missing(), 73);
        assert!(received.set(b, TargetPage(2)));
        assert!(!received.set(b, TargetPage(2)));
        assert_eq!(received.set_all(a, 60..70), 10);
        assert_eq!(received.set_all(a, 0..70), 60);
        assert_eq!(received.missing(), 2);
        assert_eq!(received.first_missing(b, 0..3), Some(0..2));
        assert_eq!(received.first_missing(a, 0..70), None);
        received.clear(a, 62..66);
        received.clear(a, 62..66);
        assert_eq!(received.missing(), 6);
        assert!(received.contains(a, TargetPage(61)) && !received.contains(a, TargetPage(65)));
        assert_eq!(received.words(a).collect::<Vec<_>>(), [u64::MAX >> 2, 0b11_1100]);
    }
}
