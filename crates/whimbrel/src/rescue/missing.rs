//! Which pages a part of a guest's RAM does not have.

use std::ops::Range;

use whimbrel_ram::{GuestRam, Received};
use whimbrel_wire::{TargetPage as PageBytes, page_bitmap as bitmap};

use crate::kept::disk::runs;

/// A bitmap a block, as mapped RAM has them: the pages that are set are missing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Missing {
    pub(super) blocks: Vec<Vec<u8>>,
}

impl Missing {
    /// Nothing is missing of blocks of these lengths, in bytes.
    pub(super) fn nothing(lengths: impl IntoIterator<Item = u64>) -> Missing {
        let bits = |len| {
            let bytes = bitmap::bitmap_len(len, PageBytes::FOUR_KIB);
            vec![0; usize::try_from(bytes).expect("RAM fits in memory")]
        };
        Missing { blocks: lengths.into_iter().map(bits).collect() }
    }

    /// What has not been received.
    pub(crate) fn of(received: &Received, ram: &GuestRam) -> Missing {
        let mut missing = Missing::nothing(ram.blocks().map(|(_, block)| block.len()));
        for ((index, block), bits) in ram.blocks().zip(&mut missing.blocks) {
            let mut from = 0;
            while let Some(run) = received.first_missing(index, from..block.target_pages()) {
                from = run.end;
                run.for_each(|page| bitmap::set(bits, page, true));
            }
        }
        missing
    }

    /// Whether a page is.
    pub(super) fn has(&self, block: usize, page: u64) -> bool {
        bitmap::is_set(&self.blocks[block], page)
    }

    /// The runs of missing pages among `pages` of a block, `most` at a time.
    pub(super) fn runs(
        &self,
        block: usize,
        pages: Range<u64>,
        most: u64,
    ) -> impl Iterator<Item = Range<u64>> {
        runs(pages, most, move |page| self.has(block, page))
    }

    /// How many pages are missing of a block.
    pub(super) fn in_block(&self, block: usize) -> u64 {
        self.blocks[block].iter().map(|byte| u64::from(byte.count_ones())).sum()
    }

    /// How many pages are missing.
    pub(crate) fn count(&self) -> u64 {
        (0..self.blocks.len()).map(|block| self.in_block(block)).sum()
    }
}
