//! Which dirty log a VM gets.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use whimbrel_ram::dirty::{DirtyBits, DirtyLog, PagemapScan};
use whimbrel_ram::{BlockIndex, GuestRam, RamBlock, TargetPage};

use crate::config::DirtyKind;
use crate::error::Error;

/// The log of a VM on native threads, its name, and where the threads note what they write.
pub(crate) fn for_native(
    kind: DirtyKind,
    ram: &GuestRam,
) -> Result<(Arc<dyn DirtyLog>, &'static str, Marks), Error> {
    type Chosen = (Arc<dyn DirtyLog>, &'static str, Marks);
    let scan = || -> Chosen {
        (Arc::new(PagemapScan::new(ram)), DirtyKind::PagemapScan.name(), Marks(None))
    };
    let own = || -> Chosen {
        let log = Arc::new(OwnWrites::new(ram));
        (Arc::clone(&log) as Arc<dyn DirtyLog>, DirtyKind::OwnWrites.name(), Marks(Some(log)))
    };
    match kind {
        DirtyKind::Auto => Ok(if can_scan().is_ok() { scan() } else { own() }),
        DirtyKind::PagemapScan => can_scan().map(|()| scan()),
        DirtyKind::OwnWrites => Ok(own()),
        DirtyKind::KvmLog | DirtyKind::KvmRing => {
            let problem = "is KVM's: take --accel kvm, or another log".to_owned();
            Err(Error::DirtyLog { log: kind.name(), problem })
        }
    }
}

/// The log of a VM on KVM, and its name.
pub(crate) fn for_kvm(
    kind: DirtyKind,
    ram: &GuestRam,
) -> Result<(Arc<dyn DirtyLog>, &'static str), Error> {
    let _ = kind;
    can_scan()?;
    Ok((Arc::new(PagemapScan::new(ram)), DirtyKind::PagemapScan.name()))
}

/// Whether this host can scan page tables, tried on one page.
fn can_scan() -> Result<(), Error> {
    let page = RamBlock::anonymous("probe", 0, 4096)?;
    let log = PagemapScan::new(&GuestRam::new(vec![page]));
    let error = |error: io::Error| Error::DirtyLog {
        log: DirtyKind::PagemapScan.name(),
        problem: error.to_string(),
    };
    log.start().map_err(error)?;
    let taken = log.take().map_err(error);
    log.stop();
    taken.map(drop)
}

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
