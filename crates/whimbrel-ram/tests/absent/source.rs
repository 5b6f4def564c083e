//! What the source's guest has in its memory, and bringing it here.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use whimbrel_ram::{AbsentRam, BlockIndex, TARGET_PAGE, TargetPage};

pub(crate) const BYTES: usize = TARGET_PAGE.bytes();
pub(crate) const PAGE: u64 = BYTES as u64;

/// Numbers that look like chance, the same in every run.
pub(crate) struct Random(pub(crate) u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub(crate) fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }

    pub(crate) fn shuffled(&mut self, count: u64) -> Vec<u64> {
        let mut all: Vec<u64> = (0..count).collect();
        for at in (1..count).rev() {
            let other = self.below(at + 1);
            all.swap(usize::try_from(at).unwrap(), usize::try_from(other).unwrap());
        }
        all
    }
}

/// What the source's guest has at `offset`; some pages are zero.
pub(crate) fn word(block: BlockIndex, offset: u64) -> u64 {
    if is_zero(block, offset / PAGE) {
        return 0;
    }
    Random(offset ^ (u64::from(block.0) << 50)).next() | 1
}

pub(crate) fn is_zero(block: BlockIndex, page: u64) -> bool {
    (page + u64::from(block.0)).is_multiple_of(5)
}

pub(crate) fn content(block: BlockIndex, offset: u64, len: u64) -> Vec<u8> {
    (offset..offset + len).step_by(8).flat_map(|at| word(block, at).to_le_bytes()).collect()
}

/// Places all units of a range, zeros as zeros.
pub(crate) fn place(absent: &AbsentRam, block: BlockIndex, offset: u64, len: u64) -> u64 {
    let zeros = (offset / PAGE..(offset + len) / PAGE).all(|page| is_zero(block, page));
    if zeros {
        return absent.place_zeros(block, offset, len).unwrap();
    }
    absent.place(block, offset, &content(block, offset, len)).unwrap()
}

/// Answers faults until told to stop; gives how many pages were new.
pub(crate) fn answer(absent: &AbsentRam, stop: &AtomicBool) -> u64 {
    let (mut faults, mut new) = (Vec::new(), 0);
    while !stop.load(Ordering::Acquire) {
        absent.read_faults(&mut faults).unwrap();
        for fault in faults.drain(..) {
            let unit = absent.unit(fault.block).bytes() as u64;
            assert!(fault.offset.is_multiple_of(unit));
            assert!((fault.offset..fault.offset + unit).contains(&fault.touched));
            if absent.received().contains(fault.block, TargetPage::containing(fault.offset)) {
                absent.settle(&fault).unwrap();
            } else {
                new += place(absent, fault.block, fault.offset, unit);
            }
        }
        thread::sleep(Duration::from_micros(20));
    }
    new
}

/// Places everything that is missing, in runs in random order; gives how many pages were new.
pub(crate) fn background(absent: &AbsentRam, seed: u64) -> u64 {
    let mut random = Random(seed);
    let mut new = 0;
    for (index, block) in absent.ram().blocks() {
        let unit = absent.unit(index).bytes() as u64;
        let units = block.len() / unit;
        for first in random.shuffled(units) {
            // Now and then whole huge pages.
            let most = if random.below(8) == 0 { 2000 } else { 100 };
            let count = (1 + random.below(most)).min(units - first);
            new += place(absent, index, first * unit, count * unit);
        }
    }
    new
}
