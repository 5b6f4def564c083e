//! Memory of a guest that runs while its pages are still arriving: postcopy's destination.
//!
//! What has not arrived is not in memory, and whoever touches it (a thread, a vCPU, a system call)
//! waits until it is placed. The kernel tells of every such touch through a file descriptor.
//!
//! Every placing has the same order: the content is in its place, then the page is
//! [received](Received), and who waits for it is woken by the same call of the kernel that puts
//! it there. So a fault may be read whose page is just being placed and not yet received: asking
//! for it once more is harmless, since what comes twice is left as it is. Of several threads that
//! place the same page one does, and the others find that it is done or being done.

mod discard;
mod fault;
mod lose;
mod mapping;
mod place;
mod region;
mod split;

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use crate::uffd::{Faults, Userfaultfd, feature};
use crate::{BlockIndex, GuestRam, PageSize, RamBlock, Received, TARGET_PAGE};

pub use fault::Fault;
use place::Zeros;
use region::Region;
use split::Restoring;

/// Whether pages may be placed in pieces smaller than the host page of their block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Split {
    /// Whole host pages only: the touch of one waits for all of it.
    Whole,
    /// 4 KiB at a time, where the backing allows it ([`AbsentRam::unit`] says).
    Small,
}

/// RAM of a guest that runs while its pages are still arriving.
///
/// Used by several threads at once; no lock is held while the kernel is called.
///
/// Dropped before it is [finished](AbsentRam::finish), it stops watching: who waits goes on and
/// finds zeros, or what was there before, in place of what has not arrived, and so does everybody
/// else from then on. Stop the guest first, and do not run it again.
#[derive(Debug)]
pub struct AbsentRam {
    ram: GuestRam,
    received: Arc<Received>,
    uffd: Userfaultfd,
    features: u64,
    regions: Box<[Region]>,
    /// Blocks in the order of their addresses.
    by_address: Box<[BlockIndex]>,
    zeros: Zeros,
    restoring: Restoring,
}

impl AbsentRam {
    /// Takes every page that is not `received` out of memory, and watches for it being touched.
    /// Nobody touches missing pages meanwhile; those received may be.
    ///
    /// In whole host pages: of a host page that is received in part all is missing, and no longer
    /// received.
    ///
    /// # Errors
    /// When the kernel cannot watch a block, or not for the touches of vCPUs. Private mappings of
    /// files in 4 KiB pages cannot be watched: what the file holds there would be taken for the
    /// guest's. Of memory the VMM mapped itself, private anonymous memory and hugetlb can. Splitting
    /// a block whose missing pages are scattered over more than 30 GiB needs a larger
    /// `vm.max_map_count` than the default.
    pub fn watch(ram: &GuestRam, received: Arc<Received>, split: Split) -> io::Result<AbsentRam> {
        let wished = feature::THREAD_ID
            | feature::EXACT_ADDRESS
            | feature::POISON
            | feature::MISSING_SHMEM
            | feature::MINOR_SHMEM
            | feature::MISSING_HUGETLBFS;
        let (restoring, small) = (Restoring::new(), split == Split::Small);
        let splits = small && ram.blocks().any(|(_, block)| split::takes_small_pieces(block));
        let required = if splits { feature::FLAG_WP } else { 0 };
        let (uffd, features) = Userfaultfd::open_with(Faults::All, required, wished)?;
        let small = small.then_some(&restoring);
        let watch = |(index, block)| Region::watch(&uffd, index, block, &received, small);
        let regions: Box<[Region]> = ram.blocks().map(watch).collect::<io::Result<_>>()?;
        let largest = regions.iter().map(|region| region.unit.bytes()).max().unwrap_or(0);
        let mut by_address: Box<[BlockIndex]> = ram.blocks().map(|(index, _)| index).collect();
        by_address.sort_by_key(|index| regions[index.index()].span.start);
        let zeros = Zeros::new(largest)?;
        let ram = ram.clone();
        Ok(AbsentRam { ram, received, uffd, features, regions, by_address, zeros, restoring })
    }

    /// The piece in which pages of a block are asked for and placed: its host page, or 4 KiB where
    /// the block is split.
    pub fn unit(&self, block: BlockIndex) -> PageSize {
        self.regions[block.index()].unit
    }

    /// Whether a block is placed in pieces of 4 KiB with [`Split::Small`]: its host pages are no
    /// larger, or it is hugetlb of a file that is mapped shared. What is private or the VMM's own is
    /// in no file that could be mapped again.
    pub fn takes_small_pieces(block: &RamBlock) -> bool {
        block.host_page_size() == TARGET_PAGE || split::takes_small_pieces(block)
    }

    /// Which pages have arrived.
    pub fn received(&self) -> &Arc<Received> {
        &self.received
    }

    /// The RAM.
    pub fn ram(&self) -> &GuestRam {
        &self.ram
    }

    /// Gives up what is missing, as being [dropped](AbsentRam) does, while others still hold it: who
    /// waits goes on and finds zeros. For a guest that does not run, and never will.
    pub fn abandon(&self) -> io::Result<()> {
        for (_, block) in self.ram.blocks() {
            let ended = self.uffd.unregister(block.span());
            ended.map_err(|error| named(block, "end the watch for", &error))?;
        }
        Ok(())
    }

    /// Every page is there: restores what is left of huge pages, stops watching, and lets the kernel
    /// use huge pages again where it did.
    ///
    /// # Panics
    /// When pages are missing.
    pub fn finish(self) -> io::Result<()> {
        assert_eq!(self.received.missing(), 0, "all pages are there when postcopy ends");
        // One by one, so that writers wait for one page only. An error comes again below.
        while matches!(self.restore_next(), Ok(true)) {}
        for (index, block) in self.ram.blocks() {
            self.restore_all(block, &self.regions[index.index()])
                .and_then(|()| self.uffd.unregister(block.span()))
                .map_err(|error| named(block, "end the watch for", &error))?;
            discard::advise_huge_pages(block, true);
        }
        Ok(())
    }
}

impl AsFd for AbsentRam {
    /// Readable when there are faults to be read.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.uffd.as_fd()
    }
}

/// What went wrong with which block.
fn named(block: &crate::RamBlock, what: &str, error: &io::Error) -> io::Error {
    let text = format!("cannot {what} missing pages of RAM block {}: {error}", block.name());
    io::Error::new(error.kind(), text)
}
