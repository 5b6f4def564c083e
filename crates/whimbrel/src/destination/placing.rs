//! Where the pages of a stream belong, and which have come.

use std::sync::Arc;

use whimbrel_ram::{BlockIndex, RamBlock, TARGET_PAGE, TargetPage};
use whimbrel_wire::BlockOffset;

use super::multifd::Target;
use super::populate::Populate;
use crate::error::Error;

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

/// The RAM that a stream fills, as the main channel sees it.
#[derive(Debug)]
pub(super) struct Placing {
    target: Arc<Target>,
    /// The stream's blocks, by their place in its list.
    blocks: Vec<BlockIndex>,
    last: Option<Place>,
    in_a_row: u32,
    populate: Option<Populate>,
}

impl Placing {
    pub(super) fn new(target: Arc<Target>, blocks: Vec<BlockIndex>) -> Placing {
        Placing { target, blocks, last: None, in_a_row: 0, populate: None }
    }

    /// Has memory taken from the host ahead of the pages that come.
    pub(super) fn populating_ahead(mut self) -> Result<Placing, Error> {
        self.populate = Some(Populate::start(self.target.ram.clone())?);
        Ok(self)
    }

    pub(super) fn block(&self, place: Place) -> &RamBlock {
        self.target.ram.block(self.blocks[place.block])
    }

    fn has(&self, place: Place) -> bool {
        self.target.content.contains(self.blocks[place.block], TargetPage::containing(place.offset))
    }

    /// The content of a page has been placed.
    pub(super) fn placed(&mut self, place: Place) {
        let (block, page) = (self.blocks[place.block], TargetPage::containing(place.offset));
        self.target.has_content(block, page.0..page.0 + 1);
        let follows = self.last.is_some_and(|last| next(last) == place);
        self.in_a_row = if follows { self.in_a_row.saturating_add(1) } else { 0 };
        self.last = Some(place);
        if self.in_a_row >= ROW && self.in_a_row.is_multiple_of(FOLLOW) {
            self.follow(place);
        }
    }

    fn follow(&mut self, place: Place) {
        let index = self.blocks[place.block];
        let len = self.target.ram.block(index).len();
        if let Some(populate) = &mut self.populate {
            populate.follow(index, len, place.offset, u64::from(self.in_a_row) * PAGE as u64);
        }
    }

    /// A page is zero. Untouched memory stays untouched.
    pub(super) fn place_zero(&mut self, place: Place) -> Result<(), Error> {
        self.last = None;
        self.in_a_row = 0;
        self.target.place_zero(self.blocks[place.block], BlockOffset(place.offset))
    }

    /// The pages that are likely to come next, `most` at most, none where nothing is likely. None
    /// of them has been received: they are all zero, and can be made so again.
    pub(super) fn expected(&self, most: usize) -> impl Iterator<Item = Place> {
        let likely = self.target.fresh && self.in_a_row >= ROW;
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
    use whimbrel_ram::{GuestRam, Received};

    use super::*;

    fn placing(fresh: bool) -> Placing {
        let block = |name| RamBlock::anonymous(name, 0, 1 << 20).expect("1 MiB");
        let ram = GuestRam::new(vec![block("a"), block("b")]);
        let (content, arrived) = (Arc::new(Received::new(&ram)), None);
        let target = Target {
            ram,
            content,
            fresh,
            arrived,
            placed: Arc::default(),
            changes: None,
            cache: None,
        };
        Placing::new(Arc::new(target), vec![BlockIndex(1), BlockIndex(0)])
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
