//! A row of atomic bits, used by several threads at once.

use std::ops::Range;

use crate::sync::{AtomicU64, Ordering};
use crate::words::{count, mask, position, words};

/// `len` bits. Setting is a release and reading an acquire: who sees a bit sees what was done
/// before it was set.
#[derive(Debug)]
pub(crate) struct AtomicBitmap {
    len: u64,
    words: Box<[AtomicU64]>,
}

impl AtomicBitmap {
    /// No bit is set.
    pub(crate) fn new(len: u64) -> AtomicBitmap {
        AtomicBitmap { len, words: words(0..len).map(|_| AtomicU64::new(0)).collect() }
    }

    pub(crate) fn contains(&self, bit: u64) -> bool {
        assert!(bit < self.len, "bit {bit} of {}", self.len);
        let (word, bit) = position(bit);
        self.words[word].load(Ordering::Acquire) & bit != 0
    }

    /// Sets a range; gives how many of its bits were not set.
    pub(crate) fn set(&self, range: Range<u64>) -> u64 {
        self.each_word(range, |word, mask| count(mask & !word.fetch_or(mask, Ordering::AcqRel)))
    }

    /// Clears a range; gives how many of its bits were set.
    pub(crate) fn clear(&self, range: Range<u64>) -> u64 {
        self.each_word(range, |word, mask| count(mask & word.fetch_and(!mask, Ordering::AcqRel)))
    }

    /// The first run of bits in `range` that are not set.
    pub(crate) fn first_clear(&self, range: Range<u64>) -> Option<Range<u64>> {
        self.check(&range);
        let mut found: Option<Range<u64>> = None;
        for word in words(range.clone()) {
            let clear = !self.words[word].load(Ordering::Acquire) & mask(&range, word);
            let run = bits_of(word, lowest_run(clear));
            match &mut found {
                None if run.is_empty() => {}
                None => found = Some(run),
                Some(found) if run.start == found.end => found.end = run.end.max(found.end),
                Some(_) => break,
            }
        }
        found
    }

    /// Sets bits of `range` that are not set, the first of them and those that follow it up to the
    /// end of its word at most, and gives them: every bit is given to one caller alone.
    pub(crate) fn claim_first(&self, range: Range<u64>) -> Option<Range<u64>> {
        self.check(&range);
        words(range.clone()).find_map(|word| {
            let bits = claim_run(&self.words[word], mask(&range, word));
            (bits != 0).then(|| bits_of(word, bits))
        })
    }

    /// Sets a range, if none of its bits is set; true when it did.
    pub(crate) fn claim_all(&self, range: Range<u64>) -> bool {
        let mut from = range.start;
        while from < range.end {
            match self.claim_first(from..range.end) {
                Some(run) if run.start == from => from = run.end,
                other => {
                    self.clear(range.start..from);
                    other.map(|run| self.clear(run));
                    return false;
                }
            }
        }
        true
    }

    /// One word, its first bit the lowest.
    pub(crate) fn word(&self, word: usize) -> u64 {
        self.words[word].load(Ordering::Acquire)
    }

    /// All words, the first bit in the lowest bit of the first.
    pub(crate) fn words(&self) -> impl Iterator<Item = u64> {
        self.words.iter().map(|word| word.load(Ordering::Acquire))
    }

    fn each_word(&self, range: Range<u64>, change: impl Fn(&AtomicU64, u64) -> u64) -> u64 {
        self.check(&range);
        words(range.clone()).map(|word| change(&self.words[word], mask(&range, word))).sum()
    }

    fn check(&self, range: &Range<u64>) {
        assert!(range.start <= range.end && range.end <= self.len, "{range:?} of {}", self.len);
    }
}

/// Sets the lowest run of bits of `mask` that are not set; zero when all are.
fn claim_run(word: &AtomicU64, mask: u64) -> u64 {
    let mut seen = word.load(Ordering::Relaxed);
    loop {
        let run = lowest_run(!seen & mask);
        match word.compare_exchange_weak(seen, seen | run, Ordering::AcqRel, Ordering::Acquire) {
            Ok(_) => return run,
            Err(now) => seen = now,
        }
    }
}

/// The lowest bits of `bits` that follow each other.
fn lowest_run(bits: u64) -> u64 {
    bits & !bits.wrapping_add(bits & bits.wrapping_neg())
}

/// The numbers of the bits of a run in a word; empty without any.
fn bits_of(word: usize, run: u64) -> Range<u64> {
    let start = word as u64 * 64 + u64::from(run.trailing_zeros());
    start..start + count(run)
}

#[cfg(test)]
mod tests {
    use super::{AtomicBitmap, lowest_run};

    #[test]
    fn runs_of_clear_bits_are_found_and_claimed() {
        let bits = AtomicBitmap::new(200);
        assert_eq!(bits.first_clear(0..200), Some(0..200));
        assert_eq!(bits.set(3..5), 2);
        assert_eq!(bits.set(64..65), 1);
        assert_eq!(bits.set(0..6), 4, "two of them were set");
        assert_eq!(bits.first_clear(0..200), Some(6..64));
        assert_eq!(bits.first_clear(60..66), Some(60..64));
        assert_eq!(bits.first_clear(64..200), Some(65..200));
        assert_eq!(bits.first_clear(0..6), None);
        assert_eq!(bits.claim_first(0..10), Some(6..10));
        assert_eq!(bits.claim_first(0..10), None);
        assert_eq!(bits.claim_first(50..190), Some(50..64), "up to the end of its word");
        assert_eq!(bits.claim_first(64..190), Some(65..128));
        assert_eq!(bits.claim_first(192..200), Some(192..200));
        assert!(!bits.claim_all(120..140), "some are set");
        assert_eq!(bits.first_clear(120..140), Some(128..140), "none of the others is");
        assert!(bits.claim_all(128..192));
        assert_eq!(bits.clear(128..192), 64);
        assert_eq!(bits.clear(64..70), 6);
        assert!(!bits.contains(69) && bits.contains(70) && bits.contains(199));
        assert_eq!(bits.words().map(u64::count_ones).sum::<u32>(), 6 + 4 + 14 + 58 + 8);
    }

    #[test]
    fn the_lowest_run_of_a_word() {
        assert_eq!(lowest_run(0), 0);
        assert_eq!(lowest_run(0b0110_0110), 0b0110);
        assert_eq!(lowest_run(u64::MAX), u64::MAX);
        assert_eq!(lowest_run(1 << 63), 1 << 63);
    }
}
