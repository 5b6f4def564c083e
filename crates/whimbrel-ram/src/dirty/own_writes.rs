//! The VMM's own writes to guest memory, which no log of KVM's sees.

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};

use super::bits::Returned;
use super::{DirtyBits, DirtyLog};
use crate::{BlockIndex, GuestRam, TargetPage};

/// Pages that the VMM says it wrote: device emulation, loading state, anything that stores to
/// guest memory from user space. Part of a [`Union`](super::Union) beside KVM's log.
#[derive(Debug)]
pub struct OwnWrites {
    ram: GuestRam,
    blocks: Box<[Box<[AtomicU64]>]>,
    returned: Returned,
}

impl OwnWrites {
    /// For all blocks of `ram`; nothing is dirty.
    pub fn new(ram: &GuestRam) -> OwnWrites {
        let none = DirtyBits::none(ram);
        let zeros = |(index, _)| none.words(index).iter().map(|_| AtomicU64::new(0)).collect();
        let blocks = ram.blocks().map(zeros).collect();
        OwnWrites { ram: ram.clone(), blocks, returned: Returned::default() }
    }

    /// `len` bytes of a block were written at `offset`. To be called after the write, also while
    /// nothing is logged: a migration may start at any moment.
    ///
    /// # Panics
    /// When that is not inside the block: such a write cannot have happened.
    pub fn note(&self, block: BlockIndex, offset: u64, len: u64) {
        let end = offset.checked_add(len).filter(|&end| end <= self.ram.block(block).len());
        let end = end.expect("only what lies inside the block can have been written");
        if len == 0 {
            return;
        }
        let words = &self.blocks[block.index()];
        let (mut page, last) =
            (TargetPage::containing(offset).0, TargetPage::containing(end - 1).0);
        while page <= last {
            let pages = (last - page + 1).min(64 - page % 64);
            let word = usize::try_from(page / 64).expect("RAM fits in memory");
            // Release, with the acquire of a take: who takes the bit sees what was written.
            words[word].fetch_or((u64::MAX >> (64 - pages)) << (page % 64), Ordering::Release);
            page += pages;
        }
    }

    fn forget(&self) {
        self.blocks.iter().flatten().for_each(|word| word.store(0, Ordering::Relaxed));
    }
}

impl DirtyLog for OwnWrites {
    fn start(&self) -> io::Result<()> {
        self.forget();
        Ok(())
    }

    fn take(&self) -> io::Result<DirtyBits> {
        let mut bits = DirtyBits::none(&self.ram);
        for (index, _) in self.ram.blocks() {
            for (to, from) in bits.words_mut(index).iter_mut().zip(&self.blocks[index.index()]) {
                if from.load(Ordering::Relaxed) != 0 {
                    *to = from.swap(0, Ordering::Acquire);
                }
            }
        }
        self.returned.take_into(&mut bits);
        Ok(bits)
    }

    fn put_back(&self, bits: DirtyBits) {
        self.returned.give_back(bits);
    }

    fn rearm(&self, _block: BlockIndex, _first: TargetPage, _count: u64) -> io::Result<()> {
        Ok(())
    }

    fn stop(&self) {
        self.forget();
    }
}
