//! Which pages the guest has written since they were last asked for.

mod bits;
#[cfg(feature = "kvm")]
mod kvm;
#[cfg(feature = "kvm")]
mod kvm_log;
#[cfg(feature = "kvm")]
mod kvm_ring;
mod own_writes;
mod pagemap_scan;
mod union;

use std::io;

use crate::{BlockIndex, TargetPage};

pub use bits::DirtyBits;
#[cfg(feature = "kvm")]
pub use kvm::KvmSlot;
#[cfg(feature = "kvm")]
pub use kvm_log::KvmLog;
#[cfg(feature = "kvm")]
pub use kvm_ring::KvmRing;
pub use own_writes::OwnWrites;
pub use pagemap_scan::PagemapScan;
pub use union::Union;

/// A source of dirty pages. One of KVM's logs, a scan of our own page tables, the VMM's own
/// writes, or several of these together.
///
/// # Order
/// [`start`](DirtyLog::start), then any number of [`take`](DirtyLog::take), each followed by a
/// [`rearm`](DirtyLog::rearm) of a range *before the content of a page in it is read*; then
/// [`stop`](DirtyLog::stop). A write that happens after `rearm` shows in a later `take`, so that a
/// page read after its `rearm` is either current or dirty again.
pub trait DirtyLog: Send + Sync {
    /// Starts logging. Pages written before it may or may not show.
    fn start(&self) -> io::Result<()>;

    /// Takes the pages written since the last `take` (or since `start`).
    fn take(&self) -> io::Result<DirtyBits>;

    /// Gives back bits that were taken and whose pages were not delivered: they show again in
    /// the next `take`, also after `stop` and a new `start`.
    fn put_back(&self, bits: DirtyBits);

    /// Begins to watch `count` pages from `first` on again, where taking does not do so itself.
    /// Cheap when the range is already watched.
    fn rearm(&self, block: BlockIndex, first: TargetPage, count: u64) -> io::Result<()>;

    /// Stops logging; what was not taken is forgotten, except what was put back.
    fn stop(&self);
}
