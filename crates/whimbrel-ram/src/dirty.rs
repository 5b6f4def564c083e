//! Which pages the guest has written since they were last asked for.

use std::io;

use crate::{BlockIndex, GuestRam, TargetPage};

/// One bit per target page of every block: pages taken from a [`DirtyLog`].
///
/// Whoever takes the bits owes the pages: they are delivered, or the bits are put back
/// ([`DirtyLog::put_back`]).
#[derive(Clone, Debug, PartialEq, Eq)]
#[must_use = "dirty pages that are neither delivered nor put back are lost"]
pub struct DirtyBits {
    blocks: Vec<Vec<u64>>,
}

impl DirtyBits {
    /// No page of `ram` is dirty.
    pub fn none(ram: &GuestRam) -> DirtyBits {
        let words = |pages: u64| usize::try_from(pages.div_ceil(64)).expect("RAM fits in memory");
        DirtyBits { blocks: ram.blocks().map(|(_, b)| vec![0; words(b.target_pages())]).collect() }
    }

    /// The bits of one block, 64 pages a word, the lowest page in the lowest bit.
    pub fn words(&self, block: BlockIndex) -> &[u64] {
        &self.blocks[block.index()]
    }

    /// The bits of one block, to be written.
    pub fn words_mut(&mut self, block: BlockIndex) -> &mut [u64] {
        &mut self.blocks[block.index()]
    }

    /// Adds `count` pages from `first` on.
    pub fn insert(&mut self, block: BlockIndex, first: TargetPage, count: u64) {
        let words = &mut self.blocks[block.index()];
        for page in first.0..first.0 + count {
            let word = usize::try_from(page / 64).expect("RAM fits in memory");
            words[word] |= 1 << (page % 64);
        }
    }

    /// Adds all pages of `other`, which is of the same RAM.
    pub fn merge(&mut self, other: &DirtyBits) {
        for (mine, theirs) in self.blocks.iter_mut().zip(&other.blocks) {
            for (mine, theirs) in mine.iter_mut().zip(theirs) {
                *mine |= theirs;
            }
        }
    }

    /// How many pages are dirty.
    pub fn count(&self) -> u64 {
        self.blocks.iter().flatten().map(|word| u64::from(word.count_ones())).sum()
    }
}

/// A source of dirty pages. One of KVM's logs, a scan of our own page tables, the VMM's own
/// writes, or several of these together.
///
/// # Order
/// [`start`](DirtyLog::start), then any number of [`take`](DirtyLog::take), each followed by a
/// [`rearm`](DirtyLog::rearm) of a range *before the content of a page in it is read*; then
/// [`stop`](DirtyLog::stop). A write that happens after `rearm` shows in a later `take`, so that a
/// page read after its `rearm` is either current or dirty again.
pub trait DirtyLog: Send + Sync {
    /// Starts logging. Pages written before it may or may not show.
    fn start(&self) -> io::Result<()>;

    /// Takes the pages written since the last `take` (or since `start`).
    fn take(&self) -> io::Result<DirtyBits>;

    /// Gives back bits that were taken and whose pages were not delivered: they show again in
    /// the next `take`, also after `stop` and a new `start`.
    fn put_back(&self, bits: DirtyBits);

    /// Begins to watch `count` pages from `first` on again, where taking does not do so itself.
    /// Cheap when the range is already watched.
    fn rearm(&self, block: BlockIndex, first: TargetPage, count: u64) -> io::Result<()>;

    /// Stops logging; what was not taken is forgotten, except what was put back.
    fn stop(&self);
}
