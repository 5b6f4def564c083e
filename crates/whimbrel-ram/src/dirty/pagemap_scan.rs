//! Dirty pages from our own page tables: PAGEMAP_SCAN with asynchronous write-protect.
//!
//! The kernel lifts the protection of a page when somebody writes to it and remembers that it
//! did; a scan gives the pages without protection and protects them again in one step. Works for
//! all writers in this process (threads, KVM's vCPUs, the kernel's own copies), not for those
//! that map the same memory elsewhere. Linux 6.7 or later.
#![expect(unsafe_code, reason = "the PAGEMAP_SCAN ioctl")]

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::bits::Returned;
use super::{DirtyBits, DirtyLog};
use crate::uffd::{self, Userfaultfd};
use crate::{BlockIndex, GuestRam, RamBlock, TARGET_PAGE, TargetPage};

/// `_IOWR('f', 16, struct pm_scan_arg)`.
const PAGEMAP_SCAN: libc::Ioctl = 0xC060_6610;
const PM_SCAN_WP_MATCHING: u64 = 1 << 0;
const PM_SCAN_CHECK_WPASYNC: u64 = 1 << 1;
const PAGE_IS_WRITTEN: u64 = 1 << 1;

/// How many runs of written pages one call of the kernel gives.
const REGIONS: usize = 4096;

#[repr(C)]
#[derive(Clone, Copy, Default)]
struct PageRegion {
    start: u64,
    end: u64,
    categories: u64,
}

#[repr(C)]
#[derive(Default)]
struct PmScanArg {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    vec: u64,
    vec_len: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}

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
    pagemap: File,
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
        let features = uffd::WP_ASYNC | uffd::WP_UNPOPULATED | uffd::WP_HUGETLBFS_SHMEM;
        let uffd = Userfaultfd::open(features)?;
        for (_, block) in self.ram.blocks() {
            uffd.register_write_protect(block).map_err(|error| named(block, &error))?;
            uffd.write_protect(block).map_err(|error| named(block, &error))?;
        }
        *running = Some(Running { uffd, pagemap: File::open("/proc/self/pagemap")? });
        Ok(())
    }

    fn take(&self) -> io::Result<DirtyBits> {
        let mut bits = DirtyBits::none(&self.ram);
        let running = self.running();
        if let Some(running) = &*running {
            let mut regions = vec![PageRegion::default(); REGIONS];
            for (index, block) in self.ram.blocks() {
                if let Err(error) = running.scan(index, block, &mut regions, &mut bits) {
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
                let _ = running.uffd.unregister(block);
            }
        }
    }
}

impl Running {
    fn scan(
        &self,
        index: BlockIndex,
        block: &RamBlock,
        regions: &mut [PageRegion],
        bits: &mut DirtyBits,
    ) -> io::Result<()> {
        let base = block.host_address().as_ptr().expose_provenance() as u64;
        let end = base + block.len();
        let mut start = base;
        while start < end {
            let mut scan = PmScanArg {
                size: size_of::<PmScanArg>() as u64,
                flags: PM_SCAN_WP_MATCHING | PM_SCAN_CHECK_WPASYNC,
                start,
                end,
                vec: regions.as_mut_ptr().expose_provenance() as u64,
                vec_len: regions.len() as u64,
                category_mask: PAGE_IS_WRITTEN,
                return_mask: PAGE_IS_WRITTEN,
                ..PmScanArg::default()
            };
            // SAFETY: `scan` is what this ioctl reads and writes; `vec` and `vec_len` are
            // `regions`, borrowed mutably.
            let found =
                unsafe { libc::ioctl(self.pagemap.as_raw_fd(), PAGEMAP_SCAN, &raw mut scan) };
            let found = usize::try_from(found).map_err(|_| io::Error::last_os_error())?;
            let page = TARGET_PAGE.bytes() as u64;
            for region in &regions[..found] {
                let first = TargetPage((region.start - base) / page);
                bits.insert(index, first, (region.end - region.start) / page);
            }
            assert!(scan.walk_end > start, "the kernel's walk goes on");
            start = scan.walk_end;
        }
        Ok(())
    }
}

fn named(block: &RamBlock, error: &io::Error) -> io::Error {
    let text = format!("cannot watch RAM block {} for writes: {error}", block.name());
    io::Error::new(error.kind(), text)
}
