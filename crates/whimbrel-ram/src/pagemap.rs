//! PAGEMAP_SCAN: asking the kernel about the pages of a block, thousands at a time.
#![expect(unsafe_code, reason = "the PAGEMAP_SCAN ioctl")]

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

use crate::uffd::Span;
use crate::{RamBlock, TARGET_PAGE, TargetPage};

/// `_IOWR('f', 16, struct pm_scan_arg)`.
const PAGEMAP_SCAN: libc::Ioctl = 0xC060_6610;

/// How many runs of pages one call of the kernel gives.
const REGIONS: usize = 4096;

/// What the kernel knows of a page.
pub(crate) mod category {
    /// Written since it was write-protected.
    pub(crate) const WRITTEN: u64 = 1 << 1;
    /// In memory.
    pub(crate) const PRESENT: u64 = 1 << 3;
    /// In swap, or holds a marker of userfaultfd's.
    pub(crate) const SWAPPED: u64 = 1 << 4;
    /// The kernel's page of zeros.
    pub(crate) const PFNZERO: u64 = 1 << 5;
}

/// What a scan does besides telling.
pub(crate) mod flag {
    /// Write-protects what it tells of.
    pub(crate) const WP_MATCHING: u64 = 1 << 0;
    /// Fails where asynchronous write protection is not on.
    pub(crate) const CHECK_WPASYNC: u64 = 1 << 1;
}

/// What to ask for.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Query {
    pub(crate) flags: u64,
    /// Only pages with all of these.
    pub(crate) all_of: u64,
    /// Only pages with one of these, unless zero.
    pub(crate) any_of: u64,
    /// What to tell of each.
    pub(crate) tell: u64,
}

/// `struct page_region`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct PageRegion {
    start: u64,
    end: u64,
    categories: u64,
}

/// `struct pm_scan_arg`.
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

/// The page tables of this process.
#[derive(Debug)]
pub(crate) struct Pagemap(File);

impl Pagemap {
    pub(crate) fn open() -> io::Result<Pagemap> {
        File::open("/proc/self/pagemap").map(Pagemap)
    }

    /// Calls `tell` with every run of pages of `block` that `query` asks for: the first page, how
    /// many, and what they are. What was told before an error has happened (was protected).
    pub(crate) fn scan(
        &self,
        block: &RamBlock,
        query: Query,
        mut tell: impl FnMut(TargetPage, u64, u64),
    ) -> io::Result<()> {
        let mut regions = vec![PageRegion::default(); REGIONS];
        let Span { start: base, len } = block.span();
        let end = base + len;
        let mut start = base;
        while start < end {
            let mut scan = PmScanArg {
                size: size_of::<PmScanArg>() as u64,
                flags: query.flags,
                start,
                end,
                vec: regions.as_mut_ptr().expose_provenance() as u64,
                vec_len: regions.len() as u64,
                category_mask: query.all_of,
                category_anyof_mask: query.any_of,
                return_mask: query.tell,
                ..PmScanArg::default()
            };
            // SAFETY: `scan` is what this ioctl reads and writes; `vec` and `vec_len` are
            // `regions`, borrowed mutably.
            let found = unsafe { libc::ioctl(self.0.as_raw_fd(), PAGEMAP_SCAN, &raw mut scan) };
            let found = usize::try_from(found).map_err(|_| io::Error::last_os_error())?;
            let page = TARGET_PAGE.bytes() as u64;
            for region in &regions[..found] {
                let first = TargetPage((region.start - base) / page);
                tell(first, (region.end - region.start) / page, region.categories);
            }
            assert!(scan.walk_end > start, "the kernel's walk goes on");
            start = scan.walk_end;
        }
        Ok(())
    }
}
