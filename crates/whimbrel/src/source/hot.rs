//! What the guest wrote last goes before the rest: it is what it will want next.

use whimbrel_ram::dirty::DirtyBits;
use whimbrel_ram::{BlockIndex, GuestRam, HostPage, PageMap, TARGET_PAGE, TargetPage};

/// Words of 64 pages that are looked at in one go: 1 GiB of guest memory.
const WORDS_AT_ONCE: usize = 4096;

/// Pages that are to go first, each once.
#[derive(Debug)]
pub(super) struct Hot {
    bits: DirtyBits,
    left: u64,
    blocks: u16,
    /// Where the next one is looked for.
    block: u16,
    word: usize,
}

impl Hot {
    /// The pages in `bits`; `None` where they say nothing, being most of the `pending` ones.
    pub(super) fn new(ram: &GuestRam, bits: DirtyBits, pending: u64) -> Option<Hot> {
        let left = bits.count();
        let blocks = u16::try_from(ram.block_count()).ok()?;
        (left > 0 && left < pending / 4 * 3).then_some(Hot {
            bits,
            left,
            blocks,
            block: 0,
            word: 0,
        })
    }

    /// Whether all have been given.
    pub(super) fn is_over(&self) -> bool {
        self.left == 0
    }

    /// Looks on behind what was asked for.
    pub(super) fn go_on_from(&mut self, block: BlockIndex, page: TargetPage) {
        self.block = block.0;
        self.word = usize::try_from(page.0 / u64::from(u64::BITS)).unwrap_or(usize::MAX);
    }

    /// The host page on `map` of the next one; `None` if there is none near.
    pub(super) fn next(&mut self, map: &PageMap) -> Option<HostPage> {
        if self.is_over() {
            return None;
        }
        for _ in 0..WORDS_AT_ONCE {
            let block = BlockIndex(self.block);
            match self.bits.words_mut(block).get_mut(self.word) {
                None => (self.block, self.word) = ((self.block + 1) % self.blocks, 0),
                Some(0) => self.word += 1,
                Some(word) => {
                    let page =
                        self.word as u64 * u64::from(u64::BITS) + u64::from(word.trailing_zeros());
                    *word &= *word - 1;
                    self.left -= 1;
                    let offset = page * TARGET_PAGE.bytes() as u64;
                    return Some(HostPage {
                        block,
                        number: offset / map.unit(block).bytes() as u64,
                    });
                }
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use whimbrel_ram::RamBlock;

    use super::*;

    const RAM: BlockIndex = BlockIndex(0);
    const ROM: BlockIndex = BlockIndex(1);

    fn ram() -> GuestRam {
        let block = |name, len| RamBlock::anonymous(name, 0, len).unwrap();
        GuestRam::new(vec![block("ram", 4 << 20), block("rom", 1 << 20)])
    }

    fn hot(pages: &[(BlockIndex, u64)]) -> (Hot, PageMap) {
        let ram = ram();
        let mut bits = DirtyBits::none(&ram);
        for &(block, page) in pages {
            bits.insert(block, TargetPage(page), 1);
        }
        let map = PageMap::with_units(&ram, |_| TARGET_PAGE);
        (Hot::new(&ram, bits, 1280).unwrap(), map)
    }

    fn rest(hot: &mut Hot, map: &PageMap) -> Vec<(BlockIndex, u64)> {
        std::iter::from_fn(|| hot.next(map)).map(|page| (page.block, page.number)).collect()
    }

    #[test]
    fn every_page_is_given_once_in_all_blocks() {
        let pages = [(RAM, 0), (RAM, 63), (RAM, 64), (RAM, 1023), (ROM, 255)];
        let (mut hot, map) = hot(&pages);
        assert!(!hot.is_over());
        assert_eq!(rest(&mut hot, &map), pages);
        assert!(hot.is_over());
    }

    #[test]
    fn it_goes_on_behind_what_was_asked_for_and_comes_round() {
        let (mut hot, map) = hot(&[(RAM, 7), (RAM, 700), (ROM, 3)]);
        hot.go_on_from(RAM, TargetPage(640));
        assert_eq!(rest(&mut hot, &map), [(RAM, 700), (ROM, 3), (RAM, 7)]);
    }

    #[test]
    fn behind_the_last_page_of_a_block_comes_the_next_block() {
        let (mut hot, map) = hot(&[(RAM, 7), (ROM, 3)]);
        hot.go_on_from(RAM, TargetPage(u64::MAX));
        assert_eq!(rest(&mut hot, &map), [(ROM, 3), (RAM, 7)]);
    }

    #[test]
    fn nothing_is_hot_where_all_or_nothing_was_written() {
        let ram = ram();
        let mut bits = DirtyBits::none(&ram);
        assert!(Hot::new(&ram, bits.clone(), 1280).is_none());
        bits.insert(RAM, TargetPage(0), 1024);
        assert!(Hot::new(&ram, bits.clone(), 1280).is_none());
        assert!(Hot::new(&ram, bits, 2000).is_some());
    }
}
