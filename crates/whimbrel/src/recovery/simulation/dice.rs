//! Chance, from a seed: the same seed draws the same.

use std::time::Duration;

/// SplitMix64.
#[derive(Debug)]
pub(super) struct Dice(u64);

impl Dice {
    pub(super) fn new(seed: u64) -> Dice {
        Dice(seed)
    }

    pub(super) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// 0 to `count - 1`.
    pub(super) fn below(&mut self, count: u64) -> u64 {
        self.next() % count
    }

    pub(super) fn index(&mut self, count: usize) -> usize {
        usize::try_from(self.below(count as u64)).expect("an index")
    }

    /// True so many times of a hundred.
    pub(super) fn percent(&mut self, chance: u64) -> bool {
        self.below(100) < chance
    }

    /// Up to `most`.
    pub(super) fn within(&mut self, most: Duration) -> Duration {
        let nanos = u64::try_from(most.as_nanos()).expect("a short time");
        Duration::from_nanos(self.below(nanos.max(1)))
    }

    pub(super) fn fill<const N: usize>(&mut self) -> [u8; N] {
        std::array::from_fn(|_| self.next().to_le_bytes()[0])
    }
}
