//! Dirty pages from our own page tables: PAGEMAP_SCAN with asynchronous write-protect.
//!
//! The kernel lifts the protection of a page when somebody writes to it and remembers that it
//! did; a scan gives the pages without protection and protects them again in one step. Works for
//! all writers in this process (threads, KVM's vCPUs, the kernel's own copies), not for those
//! that map the same memory elsewhere. Linux 6.7 or later.

use std::io;
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::bits::Returned;
use super::{DirtyBits, DirtyLog};
use crate::pagemap::{Pagemap, Query, category, flag};
use crate::uffd::{self, Faults, Userfaultfd, feature};
use crate::{BlockIndex, GuestRam, RamBlock, TargetPage};

/// Scans the page tables of this process. Taking protects again what it gives, so
/// [`rearm`](DirtyLog::rearm) has nothing to do.
///
/// On hugetlb the page tables know huge pages only: a write makes all of its huge page dirty.
#[derive(Debug)]
pub struct PagemapScan {
    ram: GuestRam,
    running: Mutex<Option<Running>>,
    returned: Returned,
}

#[derive(Debug)]
struct Running {
    uffd: Userfaultfd,
    pagemap: Pagemap,
}

impl PagemapScan {
    /// For all blocks of `ram`. Nothing is watched before it is started.
    pub fn new(ram: &GuestRam) -> PagemapScan {
        let ram = ram.clone();
        PagemapScan { ram, running: Mutex::new(None), returned: Returned::default() }
    }

    fn running(&self) -> MutexGuard<'_, Option<Running>> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl DirtyLog for PagemapScan {
    fn start(&self) -> io::Result<()> {
        let mut running = self.running();
        // What was watched before is forgotten: a second userfaultfd is refused otherwise.
        *running = None;
        let features = feature::WP_ASYNC | feature::WP_UNPOPULATED | feature::WP_HUGETLBFS_SHMEM;
        let uffd = Userfaultfd::open(Faults::AtLeastUser, features)?;
        for (_, block) in self.ram.blocks() {
            let register = uffd.register(block.span(), uffd::WRITE_PROTECT);
            register.map_err(|error| named(block, &error))?;
            uffd.write_protect(block.span(), true).map_err(|error| named(block, &error))?;
        }
        *running = Some(Running { uffd, pagemap: Pagemap::open()? });
        Ok(())
    }

    fn take(&self) -> io::Result<DirtyBits> {
        let mut bits = DirtyBits::none(&self.ram);
        let running = self.running();
        if let Some(running) = &*running {
            let query = Query {
                flags: flag::WP_MATCHING | flag::CHECK_WPASYNC,
                all_of: category::WRITTEN,
                tell: category::WRITTEN,
                ..Query::default()
            };
            for (index, block) in self.ram.blocks() {
                let insert = |first, count, _| bits.insert(index, first, count);
                if let Err(error) = running.pagemap.scan(block, query, insert) {
                    self.returned.give_back(bits);
                    return Err(named(block, &error));
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
        if let Some(running) = self.running().take() {
            for (_, block) in self.ram.blocks() {
                // Closing the userfaultfd does the same should this fail.
                let _ = running.uffd.unregister(block.span());
            }
        }
    }
}

fn named(block: &RamBlock, error: &io::Error) -> io::Error {
    let text = format!("cannot watch RAM block {} for writes: {error}", block.name());
    io::Error::new(error.kind(), text)
}
