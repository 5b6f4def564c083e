//! Which dirty log a VM gets.

use std::io;
use std::sync::Arc;

use whimbrel_ram::dirty::{DirtyLog, OwnWrites, PagemapScan};
use whimbrel_ram::{BlockIndex, GuestRam, RamBlock};

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

/// Whether this host can scan page tables, tried on one page.
pub(crate) fn can_scan() -> Result<(), Error> {
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
    /// Called after a write of `len` bytes: a log that was taken in between shows it the next
    /// time.
    pub(crate) fn written(&self, block: BlockIndex, offset: u64, len: u64) {
        if let Some(log) = &self.0 {
            log.note(block, offset, len);
        }
    }
}
