//! What sees the guest's writes on KVM.

use std::io;
use std::sync::Arc;

use kvm_ioctls::{VcpuFd, VmFd};
use whimbrel_ram::{BlockIndex, GuestRam};
use whimbrel_ram::dirty::{DirtyLog, KvmLog, KvmRing, KvmSlot, PagemapScan};

use crate::config::DirtyKind;
use crate::dirty::can_scan;
use crate::error::Error;

/// Pages that a vCPU's ring holds before the vCPU has to wait for it to be emptied.
const RING_ENTRIES: u32 = 16 << 10;

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

    /// A vCPU cannot go on before its ring is emptied.
    pub(crate) fn ring_full(&self) -> io::Result<()> {
        match self {
            KvmDirty::Ring(ring) => ring.reap(),
            KvmDirty::Log(_) | KvmDirty::Scan(_) => {
                Err(io::Error::other("full, but this VM has none"))
            }
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

fn failed(kind: DirtyKind, error: &io::Error) -> Error {
    Error::DirtyLog { log: kind.name(), problem: error.to_string() }
}
