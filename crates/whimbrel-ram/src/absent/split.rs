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

use std::collections::VecDeque;
use std::fs;
use std::io;
use std::ops::Range;
use std::sync::{Mutex, PoisonError};

use super::mapping::{SecondMapping, map_file, map_small};
use super::place::Content;
use super::region::Region;
use super::{AbsentRam, named};
use crate::backing::Backing;
use crate::bitmap::AtomicBitmap;
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

const PAGE: u64 = TARGET_PAGE.bytes() as u64;

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
        uffd.register(huge.file.span(), uffd::MISSING)?;
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
        self.file.fill(uffd, number * self.bytes(), span)
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
            huge.file.empty(offset, huge.page)?;
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
        let mut filled = Ok(());
        if let Content::Bytes(bytes) = content.part(offset, &all) {
            filled = huge.file.fill(&self.uffd, offset, Span::of(bytes));
        }
        let block = self.ram.block(index);
        if let Err(error) = filled.and_then(|()| map_file(block, offset, huge.bytes())) {
            huge.file.empty(offset, huge.page)?;
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

#[cfg(test)]
mod tests {
    use std::fs;
    use std::sync::Arc;

    use super::{MAPPINGS_EACH, Restoring};
    use crate::reserve::HugePages;
    use crate::sync::{AtomicU64, Ordering};
    use crate::{AbsentRam, BlockIndex, GuestRam, PageSize, RamBlock, Received, Sharing, Split};

    const RAM: BlockIndex = BlockIndex(0);
    const HUGE: u64 = 2 << 20;

    /// Four huge pages of which all is missing, if the host has them.
    fn watched() -> Option<AbsentRam> {
        match RamBlock::memfd("ram", 0, 4 * HUGE, PageSize::SIZE_2M, Sharing::Shared) {
            Ok(block) => {
                let ram = GuestRam::new(vec![block]);
                let received = Arc::new(Received::new(&ram));
                Some(AbsentRam::watch(&ram, received, Split::Small).unwrap())
            }
            Err(error) => {
                eprintln!("skipped: {error}");
                None
            }
        }
    }

    fn page(number: u64) -> Vec<u8> {
        vec![u8::try_from(number % 251).unwrap(); 4096]
    }

    #[test]
    fn without_mappings_to_spare_all_is_restored_at_the_end() {
        let _pages = HugePages::reserve(4);
        let Some(absent) = watched() else { return };
        for number in 0..512 {
            absent.place(RAM, number * 4096, &page(number)).unwrap();
        }
        assert!(absent.restore_next().unwrap());
        assert!(!absent.restore_next().unwrap(), "no other is complete");
        absent.restoring.mappings.store(MAPPINGS_EACH - 1, Ordering::Relaxed);
        let rest: Vec<u8> = (512..4 * 512).flat_map(page).collect();
        assert_eq!(absent.place(RAM, HUGE, &rest).unwrap(), 3 * 512);
        let small = |absent: &AbsentRam| {
            let huge = absent.regions[0].huge.as_ref().unwrap();
            (0..4).map(|number| huge.small.contains(number)).collect::<Vec<_>>()
        };
        assert_eq!(small(&absent), [false, true, true, true]);
        assert!(!absent.restore_next().unwrap());
        let ram = absent.ram().clone();
        absent.finish().unwrap();
        let mut bytes = vec![0; 4096];
        for number in 0..4 * 512 {
            ram.block(RAM).read(number * 4096, &mut bytes).unwrap();
            assert!(bytes == page(number), "page {number}");
        }
    }

    #[test]
    fn a_huge_page_that_comes_whole_is_never_small() {
        let _pages = HugePages::reserve(4);
        let Some(absent) = watched() else { return };
        let all: Vec<u8> = (0..4 * 512).flat_map(page).collect();
        absent.place(RAM, 512 * 4096 + 4096, &page(513)).unwrap();
        assert_eq!(absent.place(RAM, 0, &all[..3 << 20]).unwrap(), 512 + 255);
        assert_eq!(absent.place_zeros(RAM, 2 * HUGE, 2 * HUGE).unwrap(), 1024);
        let huge = absent.regions[0].huge.as_ref().unwrap();
        let small: Vec<_> = (0..4).map(|number| huge.small.contains(number)).collect();
        assert_eq!(small, [false, true, false, false]);
        assert_eq!(absent.place(RAM, 0, &all).unwrap(), 256, "the rest of the second one");
        let block = absent.ram().block(RAM);
        assert_eq!(block.load_u64(4096).unwrap(), 0x0101_0101_0101_0101);
        assert_eq!(block.load_u64(3 * HUGE).unwrap(), 0);
        let ram = absent.ram().clone();
        absent.finish().unwrap();
        assert!(!ram.block(RAM).is_zero(crate::TargetPage(1023)));
        assert!(ram.block(RAM).is_zero(crate::TargetPage(1024)));
    }

    #[test]
    fn the_kernels_limit_of_mappings_is_the_measure() {
        let text = fs::read_to_string("/proc/sys/vm/max_map_count").unwrap();
        let max: u64 = text.trim().parse().unwrap();
        let all = max / 2 / MAPPINGS_EACH;
        assert!(!Restoring::new().may_map(all + 1));
        let restoring = Restoring::new();
        assert!(restoring.may_map(all) && !restoring.may_map(1));
        restoring.give_back();
        assert!(restoring.may_map(1));
        assert!(!Restoring { mappings: AtomicU64::new(1), ..restoring }.may_map(u64::MAX));
    }
}
