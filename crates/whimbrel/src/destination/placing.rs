//! Where the pages of a stream belong, and which have come.

use std::sync::Arc;

use whimbrel_ram::{BlockIndex, GuestRam, RamBlock, Received, TARGET_PAGE, TargetPage};

use super::populate::Populate;
use crate::error::Error;
use crate::kept::Arrivals;

const PAGE: usize = TARGET_PAGE.bytes();

/// Pages in a row after which the next ones are expected to follow, too.
const ROW: u32 = 32;

/// After so many pages in a row the thread that populates memory is told where the stream is.
const FOLLOW: u32 = 256;

/// A page: where the stream says it belongs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Place {
    /// The block, by its place in the stream's list.
    pub(super) block: usize,
    /// In bytes from the block's start.
    pub(super) offset: u64,
}

/// The RAM that a stream fills.
#[derive(Debug)]
pub(super) struct Placing {
    ram: GuestRam,
    /// The stream's blocks, by their place in its list.
    blocks: Vec<BlockIndex>,
    /// One bit a page of each of them: something has been placed there.
    received: Vec<Vec<u64>>,
    /// What has not been received is zero.
    fresh: bool,
    last: Option<Place>,
    in_a_row: u32,
    populate: Option<Populate>,
    /// Where a postcopy may follow: which pages have come, also those that are zero.
    arrived: Option<Arc<Received>>,
    /// Who writes the pages into a file.
    writers: Option<Arrivals>,
}

impl Placing {
    pub(super) fn new(ram: GuestRam, blocks: Vec<BlockIndex>, fresh: bool) -> Placing {
        let words = |index: &BlockIndex| {
            let pages = ram.block(*index).target_pages();
            vec![0; usize::try_from(pages.div_ceil(64)).expect("RAM fits in memory")]
        };
        let received = blocks.iter().map(words).collect();
        Placing {
            ram,
            blocks,
            received,
            fresh,
            last: None,
            in_a_row: 0,
            populate: None,
            arrived: None,
            writers: None,
        }
    }

    /// Has `arrived` told which pages have come.
    pub(super) fn telling(mut self, arrived: Option<Arc<Received>>) -> Placing {
        self.arrived = arrived;
        self
    }

    /// Has those who write RAM into a file told of every page that may have changed.
    pub(super) fn telling_writers(mut self, writers: Option<Arrivals>) -> Placing {
        self.writers = writers;
        self
    }

    /// A page has changed, and is as it is to be.
    fn has_changed(&mut self, place: Place) {
        if let Some(writers) = &mut self.writers {
            writers.placed(self.blocks[place.block], TargetPage::containing(place.offset));
        }
    }

    fn has_arrived(&self, place: Place) {
        if let Some(arrived) = &self.arrived {
            arrived.set(self.blocks[place.block], TargetPage::containing(place.offset));
        }
    }

    /// Has memory taken from the host ahead of the pages that come.
    pub(super) fn populating_ahead(mut self) -> Result<Placing, Error> {
        self.populate = Some(Populate::start(self.ram.clone())?);
        Ok(self)
    }

    pub(super) fn block(&self, place: Place) -> &RamBlock {
        self.ram.block(self.blocks[place.block])
    }

    fn word(place: Place) -> (usize, u64) {
        let page = TargetPage::containing(place.offset).0;
        (usize::try_from(page / 64).expect("RAM fits in memory"), 1 << (page % 64))
    }

    fn has(&self, place: Place) -> bool {
        let (word, bit) = Placing::word(place);
        self.received[place.block][word] & bit != 0
    }

    /// The content of a page has been placed.
    pub(super) fn placed(&mut self, place: Place) {
        self.has_arrived(place);
        self.has_changed(place);
        let (word, bit) = Placing::word(place);
        self.received[place.block][word] |= bit;
        let follows = self.last.is_some_and(|last| next(last) == place);
        self.in_a_row = if follows { self.in_a_row.saturating_add(1) } else { 0 };
        self.last = Some(place);
        if self.in_a_row >= ROW && self.in_a_row.is_multiple_of(FOLLOW) {
            self.follow(place);
        }
    }

    fn follow(&mut self, place: Place) {
        let index = self.blocks[place.block];
        let len = self.ram.block(index).len();
        if let Some(populate) = &mut self.populate {
            populate.follow(index, len, place.offset, u64::from(self.in_a_row) * PAGE as u64);
        }
    }

    /// A page is zero. Untouched memory stays untouched.
    pub(super) fn place_zero(&mut self, place: Place) -> Result<(), Error> {
        self.has_arrived(place);
        self.last = None;
        self.in_a_row = 0;
        let block = self.block(place);
        if !self.has(place) && self.fresh {
            return Ok(());
        }
        if !block.is_zero(TargetPage::containing(place.offset)) {
            block.write_zeros(place.offset, PAGE)?;
            self.has_changed(place);
        }
        Ok(())
    }

    /// The pages that are likely to come next, `most` at most, none where nothing is likely. None
    /// of them has been received: they are all zero, and can be made so again.
    pub(super) fn expected(&self, most: usize) -> impl Iterator<Item = Place> {
        let likely = self.fresh && self.in_a_row >= ROW;
        let first = self.last.filter(|_| likely).map(next);
        let len = first.map_or(0, |place| self.block(place).len());
        std::iter::successors(first, |place| Some(next(*place)))
            .take_while(move |place| place.offset < len && !self.has(*place))
            .take(most)
    }
}

fn next(place: Place) -> Place {
    Place { offset: place.offset + PAGE as u64, ..place }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn placing(fresh: bool) -> Placing {
        let block = |name| RamBlock::anonymous(name, 0, 1 << 20).expect("1 MiB");
        let ram = GuestRam::new(vec![block("a"), block("b")]);
        Placing::new(ram, vec![BlockIndex(1), BlockIndex(0)], fresh)
    }

    fn place(page: u64) -> Place {
        Place { block: 0, offset: page * PAGE as u64 }
    }

    #[test]
    fn pages_in_a_row_let_expect_the_next_ones_up_to_one_that_has_come() {
        let mut placing = placing(true);
        placing.placed(place(100));
        for page in 0..40 {
            placing.placed(place(page));
            let up_to = if page < 32 { None } else { Some(place(99)) };
            assert_eq!(placing.expected(500).last(), up_to, "{page}");
        }
        assert_eq!(placing.expected(7).last(), Some(place(46)));
        placing.place_zero(place(40)).unwrap();
        assert_eq!(placing.expected(500).count(), 0);
    }

    #[test]
    fn nothing_is_expected_beyond_the_block_or_in_ram_that_is_not_fresh() {
        for (fresh, left) in [(true, 6), (false, 0)] {
            let mut placing = placing(fresh);
            (200..250).for_each(|page| placing.placed(place(page)));
            assert_eq!(placing.expected(500).count(), left);
        }
    }

    #[test]
    fn a_zero_page_that_was_received_before_is_cleared() {
        for fresh in [true, false] {
            let mut placing = placing(fresh);
            placing.block(place(3)).write(place(3).offset, &[1; PAGE]).unwrap();
            placing.placed(place(3));
            placing.place_zero(place(3)).unwrap();
            assert!(placing.block(place(3)).is_zero(TargetPage(3)));
        }
    }
}
