//! Which dirty log a VM gets.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use whimbrel_ram::dirty::{DirtyBits, DirtyLog};
use whimbrel_ram::{BlockIndex, GuestRam, TargetPage};

/// Where native vCPUs note what they write, when nothing else sees it.
#[derive(Clone, Debug, Default)]
pub(crate) struct Marks(pub(crate) Option<Arc<OwnWrites>>);

impl Marks {
    /// Called after the write to the page that holds `offset`: a log that was taken in between
    /// shows it the next time.
    pub(crate) fn written(&self, block: BlockIndex, offset: u64) {
        if let Some(log) = &self.0 {
            log.mark(block, TargetPage::containing(offset));
        }
    }
}

/// The VM's own account of what it writes.
#[derive(Debug)]
pub(crate) struct OwnWrites {
    ram: GuestRam,
    blocks: Vec<Box<[AtomicU64]>>,
}

impl OwnWrites {
    pub(crate) fn new(ram: &GuestRam) -> OwnWrites {
        let none = DirtyBits::none(ram);
        let words = |block| none.words(block).iter().map(|_| AtomicU64::new(0)).collect();
        OwnWrites {
            ram: ram.clone(),
            blocks: ram.blocks().map(|(index, _)| words(index)).collect(),
        }
    }

    fn mark(&self, block: BlockIndex, page: TargetPage) {
        let word = usize::try_from(page.0 / 64).expect("RAM fits in memory");
        self.blocks[block.index()][word].fetch_or(1 << (page.0 % 64), Ordering::SeqCst);
    }
}

impl DirtyLog for OwnWrites {
    fn start(&self) -> io::Result<()> {
        Ok(())
    }

    fn take(&self) -> io::Result<DirtyBits> {
        let mut bits = DirtyBits::none(&self.ram);
        for (index, _) in self.ram.blocks() {
            for (taken, word) in bits.words_mut(index).iter_mut().zip(&self.blocks[index.index()]) {
                *taken = word.swap(0, Ordering::SeqCst);
            }
        }
        Ok(bits)
    }

    fn put_back(&self, bits: DirtyBits) {
        for (index, _) in self.ram.blocks() {
            for (back, word) in bits.words(index).iter().zip(&self.blocks[index.index()]) {
                word.fetch_or(*back, Ordering::SeqCst);
            }
        }
    }

    fn rearm(&self, _: BlockIndex, _: TargetPage, _: u64) -> io::Result<()> {
        Ok(())
    }

    fn stop(&self) {}
}
