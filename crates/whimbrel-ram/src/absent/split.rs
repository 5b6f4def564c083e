//! Huge pages that are filled 4 KiB at a time.
//!
//! The kernel places a page of hugetlb only as a whole. So where one is missing, ordinary memory
//! takes its place, which is filled in small pieces: the guest goes on with the first of them. When
//! all have arrived, the huge page is restored: the small pages are write-protected (who writes
//! meanwhile waits), copied to the huge page through a second mapping of the file, and the file is
//! mapped in their place again, in one step of the kernel's. The addresses never change.
//!
//! The price: ordinary memory for what has arrived and is not restored, and mappings. Each host page
//! that is restored among others that are not is a mapping of its own, two at most for each. We use
//! no more than half of what the kernel allows a process (`vm.max_map_count`): for 2 MiB pages the
//! default is enough for 32 GiB to be restored one by one. The rest stays small until the end, when
//! each block becomes one mapping again.
//!
//! The kernel's own copies into guest memory wait like any other writer. What writes past the page
//! tables does not: no page may be pinned for that meanwhile (VFIO, O_DIRECT reads in flight).
#![expect(unsafe_code, reason = "maps guest memory anew and copies between its mappings")]

use std::collections::VecDeque;
use std::fs;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::ptr::{self, NonNull};
use std::sync::{Mutex, PoisonError};

use super::place::Content;
use super::region::Region;
use super::{AbsentRam, named};
use crate::backing::Backing;
use crate::bitmap::AtomicBitmap;
use crate::copy;
use crate::sync::{AtomicU64, Ordering};
use crate::uffd::{self, Span, Userfaultfd};
use crate::{BlockIndex, HostPage, PageSize, RamBlock, TARGET_PAGE};

/// The huge pages of a block that is filled in small pieces.
#[derive(Debug)]
pub(super) struct Huge {
    page: PageSize,
    /// One bit a host page: ordinary memory is in its place.
    small: AtomicBitmap,
    /// How many target pages of each host page have arrived in small pieces.
    arrived: Box<[AtomicU64]>,
    file: SecondMapping,
}

/// Host pages that are complete and wait to be restored, and how many more mappings we may make.
#[derive(Debug)]
pub(super) struct Restoring {
    complete: Mutex<VecDeque<HostPage>>,
    mappings: AtomicU64,
}

/// Mappings that one more run of other pages in the middle of a mapping makes.
const MAPPINGS_EACH: u64 = 2;

impl Restoring {
    pub(super) fn new() -> Restoring {
        let max = fs::read_to_string("/proc/sys/vm/max_map_count");
        let max = max.ok().and_then(|text| text.trim().parse().ok()).unwrap_or(65_530_u64);
        Restoring { complete: Mutex::default(), mappings: AtomicU64::new(max / 2) }
    }

    /// Takes so many runs of pages off what may still be mapped, if there are as many.
    fn may_map(&self, runs: u64) -> bool {
        let take = |left: u64| left.checked_sub(runs.saturating_mul(MAPPINGS_EACH));
        self.mappings.fetch_update(Ordering::Relaxed, Ordering::Relaxed, take).is_ok()
    }

    /// One run of pages is not mapped after all.
    fn give_back(&self) {
        self.mappings.fetch_add(MAPPINGS_EACH, Ordering::Relaxed);
    }

    fn push(&self, page: HostPage) {
        self.complete.lock().unwrap_or_else(PoisonError::into_inner).push_back(page);
    }

    fn pop(&self) -> Option<HostPage> {
        self.complete.lock().unwrap_or_else(PoisonError::into_inner).pop_front()
    }
}

/// Whether the host pages of a block are filled in small pieces, if that is wanted.
pub(super) fn takes_small_pieces(block: &RamBlock) -> bool {
    block.host_page_size() > TARGET_PAGE && matches!(block.backing(), Backing::Shared { .. })
}

impl Huge {
    /// Puts ordinary memory in the place of `missing` target pages (whole host pages, taken out
    /// already) and watches it.
    pub(super) fn split(
        uffd: &Userfaultfd,
        block: &RamBlock,
        missing: &[Range<u64>],
        restoring: &Restoring,
    ) -> io::Result<Huge> {
        let page = block.host_page_size();
        if !restoring.may_map(missing.len() as u64) {
            let text = format!(
                "they are in {} places (raise sysctl vm.max_map_count above {})",
                missing.len(),
                missing.len() as u64 * MAPPINGS_EACH * 2,
            );
            return Err(io::Error::new(io::ErrorKind::OutOfMemory, text));
        }
        let count = block.len() / page.bytes() as u64;
        let huge = Huge {
            page,
            small: AtomicBitmap::new(count),
            arrived: (0..count).map(|_| AtomicU64::new(0)).collect(),
            file: SecondMapping::new(block)?,
        };
        let each = page.target_pages();
        for run in missing {
            let (offset, len) = (run.start * PAGE, (run.end - run.start) * PAGE);
            map_small(block, offset, len)?;
            let span = Span { start: block.span().start + offset, len };
            uffd.register(span, uffd::MISSING | uffd::WRITE_PROTECT)?;
            huge.small.set(run.start / each..run.end / each);
        }
        Ok(huge)
    }

    fn bytes(&self) -> u64 {
        self.page.bytes() as u64
    }

    /// The target page at which the next host page begins.
    pub(super) fn end_of(&self, page: u64) -> u64 {
        (page / self.page.target_pages() + 1) * self.page.target_pages()
    }

    /// Counts target pages of one host page that have arrived in small pieces; true when it is
    /// complete with them.
    fn complete_with(&self, number: u64, pages: u64) -> bool {
        let host = usize::try_from(number).expect("RAM fits in memory");
        // Acquires what the others that placed pieces of it have done.
        let before = self.arrived[host].fetch_add(pages, Ordering::AcqRel);
        before + pages == self.page.target_pages()
    }

    /// Copies the small pages in the place of a huge page into it. Nobody writes to them meanwhile.
    fn gather(&self, uffd: &Userfaultfd, region: &Region, number: u64) -> io::Result<()> {
        let span = region.at(number * self.bytes(), self.bytes());
        uffd.write_protect(span, true)?;
        let from = ptr::with_exposed_provenance(usize::try_from(span.start).expect("an address"));
        // SAFETY: a host page of the block, all of it present, which nobody writes to now.
        unsafe { self.file.fill(number * self.bytes(), from, self.page.bytes()) };
        Ok(())
    }
}

impl AbsentRam {
    /// Restores one huge page whose small pieces have all arrived; false when none is waiting.
    ///
    /// Whoever writes to the page waits meanwhile (the time of one copy of it), readers do not. May
    /// be called by any thread, best by one that has nothing urgent to do.
    /// [`finish`](AbsentRam::finish) restores what is left.
    pub fn restore_next(&self) -> io::Result<bool> {
        if !self.restoring.may_map(1) {
            return Ok(false);
        }
        let Some(page) = self.restoring.pop() else {
            self.restoring.give_back();
            return Ok(false);
        };
        let block = self.ram.block(page.block);
        let region = &self.regions[page.block.index()];
        let huge = region.huge.as_ref().expect("a block that is split");
        self.restore(block, region, huge, page.number)
            .map_err(|error| named(block, "restore huge pages after", &error))?;
        Ok(true)
    }

    fn restore(
        &self,
        block: &RamBlock,
        region: &Region,
        huge: &Huge,
        number: u64,
    ) -> io::Result<()> {
        let (offset, len) = (number * huge.bytes(), huge.bytes());
        let span = region.at(offset, len);
        let result =
            huge.gather(&self.uffd, region, number).and_then(|()| map_file(block, offset, len));
        if let Err(error) = result {
            // The small pages stay, and who writes to them goes on.
            self.uffd.write_protect(span, false)?;
            return Err(error);
        }
        huge.small.clear(number..number + 1);
        self.uffd.wake(span)
    }

    /// Counts pages that have arrived, where they are pieces of one huge page.
    pub(super) fn count_pieces(&self, block: BlockIndex, region: &Region, pages: Range<u64>) {
        let Some(huge) = &region.huge else { return };
        let number = pages.start / huge.page.target_pages();
        if !pages.is_empty() && huge.complete_with(number, pages.end - pages.start) {
            self.restoring.push(HostPage { block, number });
        }
    }

    /// Places the huge page that `bytes` of the block begin with, straight into it, if they hold all
    /// of it and no piece of it was there. Gives how many target pages it has placed.
    pub(super) fn put_huge(
        &self,
        index: BlockIndex,
        region: &Region,
        bytes: &Range<u64>,
        content: Content<'_>,
    ) -> io::Result<u64> {
        let Some(huge) = &region.huge else { return Ok(0) };
        let (offset, each) = (bytes.start, huge.page.target_pages());
        let all = offset..offset + huge.bytes();
        if !offset.is_multiple_of(huge.bytes()) || all.end > bytes.end {
            return Ok(0);
        }
        let number = offset / huge.bytes();
        let pages = number * each..(number + 1) * each;
        if !self.restoring.may_map(1) {
            return Ok(0);
        }
        if !region.taken.claim_all(pages.clone()) {
            self.restoring.give_back();
            return Ok(0);
        }
        if let Content::Bytes(bytes) = content.part(offset, &all) {
            // SAFETY: `bytes` are as long as the huge page, which nobody else fills.
            unsafe { huge.file.fill(offset, bytes.as_ptr(), bytes.len()) };
        }
        if let Err(error) = map_file(self.ram.block(index), offset, huge.bytes()) {
            region.taken.clear(pages);
            return Err(error);
        }
        huge.small.clear(number..number + 1);
        let new = self.received.set_all(index, pages);
        self.uffd.wake(region.at(offset, huge.bytes()))?;
        Ok(new)
    }

    /// Restores what is left of a block, and makes it one mapping again.
    pub(super) fn restore_all(&self, block: &RamBlock, region: &Region) -> io::Result<()> {
        let Some(huge) = &region.huge else { return Ok(()) };
        let count = block.len() / huge.bytes();
        for number in (0..count).filter(|&number| huge.small.contains(number)) {
            huge.gather(&self.uffd, region, number)?;
        }
        map_file(block, 0, block.len())?;
        huge.small.clear(0..count);
        self.uffd.wake(region.span)
    }
}

const PAGE: u64 = TARGET_PAGE.bytes() as u64;

/// Puts ordinary memory in the place of a part of a block.
fn map_small(block: &RamBlock, offset: u64, len: u64) -> io::Result<()> {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    // SAFETY: the caller has taken the pages out of the block; there is nothing to be lost.
    let (address, len) = unsafe { map_over(block, offset, len, flags, -1, 0) }?;
    // SAFETY: advice on the mapping just made. Huge folios would be placed in pieces all the same.
    unsafe { libc::madvise(address, len, libc::MADV_NOHUGEPAGE) };
    Ok(())
}

/// Puts the block's file back in its place.
fn map_file(block: &RamBlock, offset: u64, len: u64) -> io::Result<()> {
    let Backing::Shared { file, offset: start } = block.backing() else {
        unreachable!("only such blocks are split")
    };
    let at = libc::off_t::try_from(start + offset).map_err(io::Error::other)?;
    // SAFETY: the file holds what the small pages do: they were copied, and not written since.
    unsafe { map_over(block, offset, len, libc::MAP_SHARED, file.as_raw_fd(), at) }?;
    Ok(())
}

/// # Safety
/// What the guest needs of the memory that is there now is in what takes its place.
unsafe fn map_over(
    block: &RamBlock,
    offset: u64,
    len: u64,
    flags: libc::c_int,
    fd: libc::c_int,
    at: libc::off_t,
) -> io::Result<(*mut libc::c_void, usize)> {
    let len = usize::try_from(len).expect("RAM fits in memory");
    let address = block.range(offset, len).map_err(io::Error::other)?.as_ptr().cast();
    let protection = libc::PROT_READ | libc::PROT_WRITE;
    let flags = flags | libc::MAP_FIXED;
    // SAFETY: inside the block's mapping, as `range` checked, which it owns and where no Rust
    // reference points; its content is the caller's promise.
    let mapped = unsafe { libc::mmap(address, len, protection, flags, fd, at) };
    if mapped == libc::MAP_FAILED { Err(io::Error::last_os_error()) } else { Ok((mapped, len)) }
}

/// The file of a block, mapped where the guest does not see it.
#[derive(Debug)]
struct SecondMapping {
    address: NonNull<u8>,
    len: usize,
}

// SAFETY: plain memory that lives as long as the value, written only through copies of raw memory.
unsafe impl Send for SecondMapping {}
// SAFETY: as above.
unsafe impl Sync for SecondMapping {}

impl SecondMapping {
    fn new(block: &RamBlock) -> io::Result<SecondMapping> {
        let Backing::Shared { file, offset } = block.backing() else {
            unreachable!("only such blocks are split")
        };
        let len = usize::try_from(block.len()).expect("RAM fits in memory");
        let offset = libc::off_t::try_from(*offset).map_err(io::Error::other)?;
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        let (flags, fd) = (libc::MAP_SHARED, file.as_raw_fd());
        // SAFETY: a fresh mapping at an address of the kernel's choice.
        let address = unsafe { libc::mmap(ptr::null_mut(), len, protection, flags, fd, offset) };
        if address == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let address = NonNull::new(address.cast()).expect("mmap never gives address zero");
        Ok(SecondMapping { address, len })
    }

    /// Copies `len` bytes to `offset`.
    ///
    /// # Safety
    /// `from..from+len` is readable, and not of this mapping.
    unsafe fn fill(&self, offset: u64, from: *const u8, len: usize) {
        let at = usize::try_from(offset).expect("RAM fits in memory");
        assert!(at.checked_add(len).is_some_and(|end| end <= self.len), "inside the block");
        // SAFETY: inside the mapping, as just checked.
        let to = unsafe { self.address.add(at) };
        // SAFETY: readable by the caller's promise; writable, and no reference points there.
        unsafe { copy::copy(from, to.as_ptr(), len) };
    }
}

impl Drop for SecondMapping {
    fn drop(&mut self) {
        // SAFETY: made in `new`, and nobody holds a pointer into it past our life.
        unsafe { libc::munmap(self.address.as_ptr().cast(), self.len) };
    }
}
