//! What a run is drawn from: a stream of numbers for each run, the same whenever it is asked for.

use std::time::Duration;

use fastrand::Rng;

/// The stream of one run.
#[derive(Clone, Debug)]
pub(crate) struct Dice(Rng);

impl Dice {
    /// Run `index` of `seed`. Neighbours have nothing in common.
    pub(crate) fn of_run(seed: u64, index: u64) -> Dice {
        Dice(Rng::with_seed(mix(mix(seed) ^ index)))
    }

    /// From 0 to `end`, which is not among them.
    pub(crate) fn below(&mut self, end: u64) -> u64 {
        self.0.u64(..end)
    }

    pub(crate) fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }

    pub(crate) fn one_of<T: Copy>(&mut self, all: &[T]) -> T {
        all[self.0.usize(..all.len())]
    }

    /// One of `all`, as likely as its weight says.
    pub(crate) fn weighted<T: Copy>(&mut self, all: &[(u64, T)]) -> T {
        let mut left = self.below(all.iter().map(|(weight, _)| weight).sum());
        for &(weight, value) in all {
            match left.checked_sub(weight) {
                None => return value,
                Some(rest) => left = rest,
            }
        }
        unreachable!("below the sum of all weights")
    }

    /// From 0 to `end`, each order of magnitude as likely: most of what matters is at a beginning.
    pub(crate) fn by_magnitude(&mut self, end: u64) -> u64 {
        let bits = u64::BITS - end.leading_zeros();
        let top = 1u64 << self.below(u64::from(bits) + 1).min(63);
        self.below(top.min(end).max(1))
    }

    /// Milliseconds, both ends included.
    pub(crate) fn millis(&mut self, from: u64, to: u64) -> Duration {
        Duration::from_millis(from + self.below(to - from + 1))
    }
}

/// The finaliser of SplitMix64: every bit of the argument counts in every bit of the value.
fn mix(mut z: u64) -> u64 {
    z = z.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_draws_the_same_again_and_its_neighbour_something_else() {
        let draw = |seed, index| {
            let mut dice = Dice::of_run(seed, index);
            std::array::from_fn::<u64, 8, _>(|_| dice.below(u64::MAX))
        };
        assert_eq!(draw(1, 7), draw(1, 7));
        assert_ne!(draw(1, 7), draw(1, 8));
        assert_ne!(draw(1, 7), draw(2, 7));
        assert_ne!(draw(1, 2), draw(2, 1));
    }

    #[test]
    fn weights_and_magnitudes_keep_their_bounds() {
        let mut dice = Dice::of_run(1, 0);
        let mut seen = [0; 3];
        for _ in 0..1000 {
            seen[dice.weighted(&[(1, 0), (0, 1), (9, 2)])] += 1;
            assert!(dice.by_magnitude(100) < 100);
            assert_eq!(dice.by_magnitude(1), 0);
            assert_eq!(dice.by_magnitude(0), 0);
            assert!((3..=5).contains(&dice.millis(3, 5).as_millis()));
        }
        assert!(seen[0] > 50 && seen[1] == 0 && seen[2] > 800, "{seen:?}");
    }
}
