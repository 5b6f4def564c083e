//! Touching the pages of a VM that is being kept, while they arrive by postcopy: in the place of
//! the guest, which does not run.

use std::sync::atomic::{AtomicU64, Ordering};

use whimbrel_ram::{GuestRam, TARGET_PAGE};

use crate::error::Error;
use crate::worker::{Cancel, Role, Worker};

const PAGE: u64 = TARGET_PAGE.bytes() as u64;

/// In which order pages are touched that have not come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Touch {
    /// None is: they come as the source sends them.
    Nothing,
    /// One after the other.
    Sequential,
    /// In a random order, each once.
    Random {
        /// Where the order comes from: the same seed gives the same one.
        seed: u64,
    },
}

/// Touches pages of `ram` until all were, or it is dropped.
///
/// Dropped while a page is missing, it waits for that page: whatever watches the RAM must be
/// dropped before.
pub(super) fn start(ram: GuestRam, order: Touch) -> Result<Option<Worker>, Error> {
    let pages = ram.total_bytes() / PAGE;
    let next: Box<dyn FnMut(u64) -> u64 + Send> = match order {
        Touch::Nothing => return Ok(None),
        Touch::Sequential => Box::new(|step| step),
        Touch::Random { seed } => Box::new(permutation(pages, seed)),
    };
    let cancel = Cancel::new().map_err(Error::system("making an eventfd"))?;
    let stop = cancel.clone();
    Worker::start(Role::DestinationTouch, cancel, move || touch(&ram, pages, next, &stop))
        .map(Some)
        .map_err(Error::system("starting a thread"))
}

fn touch(ram: &GuestRam, pages: u64, mut next: Box<dyn FnMut(u64) -> u64 + Send>, stop: &Cancel) {
    // What is read matters to nobody; that it is, must not be optimised away.
    let sum = AtomicU64::new(0);
    for step in 0..pages {
        if stop.is_set() {
            return;
        }
        let mut page = next(step);
        for (_, block) in ram.blocks() {
            if page < block.target_pages() {
                let word = block.load_u64(page * PAGE).expect("inside the block");
                sum.fetch_add(word, Ordering::Relaxed);
                break;
            }
            page -= block.target_pages();
        }
    }
}

/// The numbers below `count`, each once, in an order that follows from `seed`: steps of a size
/// that has no divisor in common with `count` would be too regular, so a full-period generator
/// over the next power of two, of which what is too large is left out.
fn permutation(count: u64, seed: u64) -> impl FnMut(u64) -> u64 + Send {
    let modulus = count.next_power_of_two().max(4);
    let mut state = seed % modulus;
    move |_| {
        loop {
            // Full period modulo a power of two: the factor is 1 modulo 4, the addend odd.
            state = state.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(0x1405_7b7e_f767_814f)
                & (modulus - 1);
            // The low bits of such a sequence are regular: reversed they are the high ones.
            let mixed = state.reverse_bits() >> (64 - modulus.trailing_zeros());
            if mixed < count {
                return mixed;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_page_is_touched_once_in_an_order_of_the_seed() {
        for count in [1, 2, 3, 100, 1024, 1025] {
            let order = |seed| {
                let mut next = permutation(count, seed);
                (0..count).map(&mut next).collect::<Vec<_>>()
            };
            let mut sorted = order(7);
            sorted.sort_unstable();
            assert_eq!(sorted, (0..count).collect::<Vec<_>>());
            assert_eq!(order(7), order(7));
        }
        let mut next = permutation(1 << 16, 1);
        let order: Vec<u64> = (0..1000).map(&mut next).collect();
        let near = order.windows(2).filter(|w| w[0].abs_diff(w[1]) < 64).count();
        assert!(near < 20, "{near} of 1000 are near the one before");
    }
}
