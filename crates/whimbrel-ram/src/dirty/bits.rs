//! Dirty pages as values.

use std::mem;
use std::sync::{Mutex, PoisonError};

use crate::{BlockIndex, GuestRam, TargetPage};

/// One bit per target page of every block: pages taken from a [`DirtyLog`](super::DirtyLog).
///
/// Whoever takes the bits owes the pages: they are delivered, or the bits are put back
/// ([`DirtyLog::put_back`](super::DirtyLog::put_back)).
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
        let end = first.0 + count;
        let mut page = first.0;
        while page < end {
            let bits = (end - page).min(64 - page % 64);
            let word = usize::try_from(page / 64).expect("RAM fits in memory");
            words[word] |= (u64::MAX >> (64 - bits)) << (page % 64);
            page += bits;
        }
    }

    /// Whether a page is dirty.
    pub fn contains(&self, block: BlockIndex, page: TargetPage) -> bool {
        let word = usize::try_from(page.0 / 64).expect("RAM fits in memory");
        self.blocks[block.index()][word] & (1 << (page.0 % 64)) != 0
    }

    /// The dirty pages in runs, as long as can be: block, first page, how many.
    pub fn runs(&self) -> impl Iterator<Item = (BlockIndex, u64, u64)> {
        (0u16..).map(BlockIndex).zip(&self.blocks).flat_map(|(block, words)| {
            let mut at = 0;
            std::iter::from_fn(move || {
                let start = next(words, at, |word| word)?;
                at = next(words, start, |word| !word).unwrap_or(words.len() as u64 * 64);
                Some((block, start, at - start))
            })
        })
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

/// The first bit at `from` or behind it that is set in what `look` makes of its word.
fn next(words: &[u64], from: u64, look: impl Fn(u64) -> u64) -> Option<u64> {
    let first = usize::try_from(from / 64).expect("RAM fits in memory");
    let mut mask = u64::MAX << (from % 64);
    words.iter().enumerate().skip(first).find_map(|(at, &word)| {
        let bits = look(word) & std::mem::replace(&mut mask, u64::MAX);
        (bits != 0).then(|| at as u64 * 64 + u64::from(bits.trailing_zeros()))
    })
}

/// Pages that were taken from a log and given back, until the next take.
#[derive(Debug, Default)]
pub(super) struct Returned(Mutex<Option<DirtyBits>>);

impl Returned {
    pub(super) fn give_back(&self, bits: DirtyBits) {
        let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        match kept.as_mut() {
            Some(kept) => kept.merge(&bits),
            None => *kept = Some(bits),
        }
    }

    /// Moves what was given back into `bits`.
    pub(super) fn take_into(&self, bits: &mut DirtyBits) {
        let kept = mem::take(&mut *self.0.lock().unwrap_or_else(PoisonError::into_inner));
        if let Some(kept) = kept {
            bits.merge(&kept);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::DirtyBits;
    use crate::{BlockIndex, GuestRam, RamBlock, TargetPage};

    #[test]
    fn runs_are_as_long_as_can_be() {
        let block = |name, pages: u64| RamBlock::anonymous(name, 0, pages * 4096).unwrap();
        let ram = GuestRam::new(vec![block("a", 200), block("b", 64)]);
        let mut bits = DirtyBits::none(&ram);
        let runs = [(0, 0, 1), (0, 2, 1), (0, 60, 80), (0, 199, 1), (1, 63, 1)];
        let runs = runs.map(|(block, first, count)| (BlockIndex(block), first, count));
        for (block, first, count) in runs {
            bits.insert(block, TargetPage(first), count);
        }
        assert!(bits.runs().eq(runs));
    }

    #[test]
    fn insert_sets_exactly_its_pages() {
        let block = RamBlock::anonymous("ram", 0, 200 * 4096).unwrap();
        let ram = GuestRam::new(vec![block]);
        for (first, count) in [(0, 1), (63, 2), (64, 64), (5, 190), (199, 1), (7, 0)] {
            let mut bits = DirtyBits::none(&ram);
            bits.insert(BlockIndex(0), TargetPage(first), count);
            let set = (0..200).filter(|&page| bits.contains(BlockIndex(0), TargetPage(page)));
            assert!(set.eq(first..first + count));
            assert_eq!(bits.count(), count);
            let run = (count > 0).then_some((BlockIndex(0), first, count));
            assert!(bits.runs().eq(run));
        }
    }
}
