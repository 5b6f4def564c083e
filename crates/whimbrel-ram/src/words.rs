//! Pages as bits of 64-bit words, the lowest page in the lowest bit.

use std::ops::Range;

/// How many bits are set.
pub(crate) fn count(bits: u64) -> u64 {
    u64::from(bits.count_ones())
}

/// The word and the bit of a page.
pub(crate) fn position(page: u64) -> (usize, u64) {
    (usize::try_from(page / 64).expect("RAM fits in memory"), 1 << (page % 64))
}

/// The words that hold `pages`.
pub(crate) fn words(pages: Range<u64>) -> Range<usize> {
    let index = |word: u64| usize::try_from(word).expect("RAM fits in memory");
    index(pages.start / 64)..index(pages.end.div_ceil(64))
}

/// The bits of `word` that stand for pages of `pages`.
pub(crate) fn mask(pages: &Range<u64>, word: usize) -> u64 {
    let first = word as u64 * 64;
    let start = pages.start.clamp(first, first + 64) - first;
    let end = pages.end.clamp(first, first + 64) - first;
    if start == end { 0 } else { (u64::MAX >> (64 - (end - start))) << start }
}

#[cfg(test)]
mod tests {
    use super::{mask, words};

    #[test]
    fn masks_cover_their_pages_and_no_more() {
        assert_eq!(mask(&(0..64), 0), u64::MAX);
        assert_eq!(mask(&(0..70), 1), 0x3f);
        assert_eq!(mask(&(0..70), 2), 0);
        assert_eq!(mask(&(62..66), 0), 3 << 62);
        assert_eq!(mask(&(62..66), 1), 3);
        assert_eq!(mask(&(16..32), 0), 0xffff_0000);
        assert_eq!(words(512..1024), 8..16);
        assert_eq!(words(16..32), 0..1);
    }
}
