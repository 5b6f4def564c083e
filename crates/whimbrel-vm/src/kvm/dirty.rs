//! What sees the guest's writes on KVM.

use std::io;
use std::sync::Arc;

use kvm_ioctls::{VcpuFd, VmFd};
use whimbrel::VmError;
use whimbrel_ram::dirty::{DirtyLog, KvmLog, KvmRing, KvmSlot, PagemapScan};
use whimbrel_ram::{BlockIndex, GuestRam};

use crate::config::DirtyKind;
use crate::dirty::can_scan;
use crate::error::Error;

/// Entries of a vCPU's ring: as many as KVM allows.
const RING_ENTRIES: u32 = 1 << 16;

/// A vCPU's ring is emptied after so many updates of its guest at the latest.
///
/// KVM leaves the guest when the ring is nearly full, and looks at that only on entering it. In
/// hardware an entry is a page, written for the first time since it was last protected. A KVM
/// that emulates the guest's instructions makes an entry of every store: the 512 stores of one
/// update can be more than the reserve, and KVM then writes past the end of the ring, over pages
/// that nobody has taken. So many updates do not fill it, not even that way.
const UPDATES_PER_REAP: u32 = 32;
/// A ring that is still full after being emptied so often has been overrun.
const FULL_IN_A_ROW: u32 = 16;

/// One of the logs there are on KVM.
#[derive(Debug)]
pub(crate) enum KvmDirty {
    Log(Arc<KvmLog>),
    Ring(Arc<KvmRing>),
    Scan(Arc<PagemapScan>),
}

impl KvmDirty {
    /// For a VM that has its memory and no vCPU yet.
    pub(crate) fn new(kind: DirtyKind, vm: &VmFd, ram: &GuestRam) -> Result<KvmDirty, Error> {
        let slot = |(index, _): (BlockIndex, _)| KvmSlot::whole(u32::from(index.0), index, ram);
        let slots: Vec<KvmSlot> = ram.blocks().map(slot).collect();
        match kind {
            DirtyKind::Auto | DirtyKind::KvmLog => KvmLog::new(vm, &slots, ram)
                .map(|log| KvmDirty::Log(Arc::new(log)))
                .map_err(|error| failed(DirtyKind::KvmLog, &error)),
            DirtyKind::KvmRing => KvmRing::new(vm, &slots, ram, RING_ENTRIES)
                .map(|ring| KvmDirty::Ring(Arc::new(ring)))
                .map_err(|error| failed(kind, &error)),
            DirtyKind::PagemapScan => {
                can_scan()?;
                Ok(KvmDirty::Scan(Arc::new(PagemapScan::new(ram))))
            }
            DirtyKind::OwnWrites => {
                let problem = "sees native vCPUs only: take --accel native, or another log";
                Err(Error::DirtyLog { log: kind.name(), problem: problem.to_owned() })
            }
        }
    }

    /// Takes a vCPU in, before it first runs.
    pub(crate) fn add_vcpu(&self, fd: &VcpuFd) -> Result<(), Error> {
        match self {
            KvmDirty::Ring(ring) => {
                ring.add_vcpu(fd).map_err(|error| failed(DirtyKind::KvmRing, &error))
            }
            KvmDirty::Log(_) | KvmDirty::Scan(_) => Ok(()),
        }
    }

    /// Empties the rings into the log, where there are rings.
    fn reap(&self) -> Result<(), VmError> {
        match self {
            KvmDirty::Ring(ring) => {
                ring.reap().map_err(|error| VmError::new(format!("dirty ring: {error}")))
            }
            KvmDirty::Log(_) | KvmDirty::Scan(_) => Ok(()),
        }
    }

    pub(crate) fn log(&self) -> (Arc<dyn DirtyLog>, &'static str) {
        match self {
            KvmDirty::Log(log) => (Arc::clone(log) as _, DirtyKind::KvmLog.name()),
            KvmDirty::Ring(ring) => (Arc::clone(ring) as _, DirtyKind::KvmRing.name()),
            KvmDirty::Scan(scan) => (Arc::clone(scan) as _, DirtyKind::PagemapScan.name()),
        }
    }
}

/// Watches over the ring of one vCPU while it runs.
#[derive(Debug, Default)]
pub(crate) struct RingWatch {
    updates: u32,
    full: u32,
}

impl RingWatch {
    /// The guest has updated a page.
    pub(crate) fn updated(&mut self, dirty: &KvmDirty) -> Result<(), VmError> {
        self.full = 0;
        self.updates += 1;
        if self.updates < UPDATES_PER_REAP {
            return Ok(());
        }
        self.updates = 0;
        dirty.reap()
    }

    /// KVM says that the ring is full: the vCPU cannot go on before it is emptied.
    pub(crate) fn full(&mut self, dirty: &KvmDirty) -> Result<(), VmError> {
        self.full += 1;
        if self.full > FULL_IN_A_ROW {
            return Err(VmError::new(
                "this KVM wrote past the end of a dirty ring, and what it overwrote is lost: take \
                 --dirty kvm-log",
            ));
        }
        dirty.reap()
    }
}

fn failed(kind: DirtyKind, error: &io::Error) -> Error {
    Error::DirtyLog { log: kind.name(), problem: error.to_string() }
}
