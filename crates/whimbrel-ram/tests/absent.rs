//! Memory whose pages are still arriving, touched by many threads meanwhile.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::fs;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use whimbrel_ram::{
    AbsentRam, BlockIndex, Fault, GuestRam, PageSize, RamBlock, Received, Sharing, Split,
    TARGET_PAGE, TargetPage,
};

const BYTES: usize = TARGET_PAGE.bytes();
const PAGE: u64 = BYTES as u64;

/// Numbers that look like chance, the same in every run.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }

    fn shuffled(&mut self, count: u64) -> Vec<u64> {
        let mut all: Vec<u64> = (0..count).collect();
        for at in (1..count).rev() {
            let other = self.below(at + 1);
            all.swap(usize::try_from(at).unwrap(), usize::try_from(other).unwrap());
        }
        all
    }
}

/// What the source's guest has at `offset`; some pages are zero.
fn word(block: BlockIndex, offset: u64) -> u64 {
    if is_zero(block, offset / PAGE) {
        return 0;
    }
    Random(offset ^ (u64::from(block.0) << 50)).next() | 1
}

fn is_zero(block: BlockIndex, page: u64) -> bool {
    (page + u64::from(block.0)).is_multiple_of(5)
}

fn content(block: BlockIndex, offset: u64, len: u64) -> Vec<u8> {
    (offset..offset + len).step_by(8).flat_map(|at| word(block, at).to_le_bytes()).collect()
}

fn verify(ram: &GuestRam) {
    let mut page = [0; BYTES];
    for (index, block) in ram.blocks() {
        for number in 0..block.target_pages() {
            block.read(number * PAGE, &mut page).unwrap();
            let expected = content(index, number * PAGE, PAGE);
            assert!(page[..] == expected[..], "page {number} of {}", block.name());
        }
    }
}

/// Places all units of a range, zeros as zeros.
fn place(absent: &AbsentRam, block: BlockIndex, offset: u64, len: u64) -> u64 {
    let zeros = (offset / PAGE..(offset + len) / PAGE).all(|page| is_zero(block, page));
    if zeros {
        return absent.place_zeros(block, offset, len).unwrap();
    }
    absent.place(block, offset, &content(block, offset, len)).unwrap()
}

/// Answers faults until told to stop.
fn answer(absent: &AbsentRam, stop: &AtomicBool) {
    let mut faults = Vec::new();
    while !stop.load(Ordering::Acquire) {
        absent.read_faults(&mut faults).unwrap();
        for fault in faults.drain(..) {
            let unit = absent.unit(fault.block).bytes() as u64;
            assert!(fault.offset.is_multiple_of(unit));
            assert!((fault.offset..fault.offset + unit).contains(&fault.touched));
            if absent.received().contains(fault.block, TargetPage::containing(fault.offset)) {
                absent.settle(&fault).unwrap();
            } else {
                place(absent, fault.block, fault.offset, unit);
            }
        }
        thread::sleep(Duration::from_micros(20));
    }
}

/// Places everything that is missing, in runs in random order; gives how many pages were new.
fn background(absent: &AbsentRam, seed: u64) -> u64 {
    let mut random = Random(seed);
    let mut new = 0;
    for (index, block) in absent.ram().blocks() {
        let unit = absent.unit(index).bytes() as u64;
        let units = block.len() / unit;
        for first in random.shuffled(units) {
            // Now and then whole huge pages.
            let most = if random.below(8) == 0 { 2000 } else { 100 };
            let count = (1 + random.below(most)).min(units - first);
            new += place(absent, index, first * unit, count * unit);
        }
    }
    new
}

/// Touches every page once, in random order, and finds what the source had.
fn touch(ram: &GuestRam, seed: u64) {
    let mut random = Random(seed);
    for (index, block) in ram.blocks() {
        for page in random.shuffled(block.target_pages()) {
            let at = page * PAGE + random.below(PAGE / 8) * 8;
            assert_eq!(block.load_u64(at).unwrap(), word(index, at), "{at:#x} of {}", block.name());
        }
    }
}

/// Many threads touch what others place; some pages were there before.
fn storm(ram: &GuestRam, split: Split) {
    let received = Arc::new(Received::new(ram));
    let mut random = Random(7);
    for (index, block) in ram.blocks() {
        // Filled by what never arrived: all of it must go.
        block.populate(0, block.len()).unwrap();
        for page in 0..block.target_pages() {
            block.write(page * PAGE, &[0xbb; BYTES]).unwrap();
        }
        let each = block.host_page_size().target_pages();
        for first in (0..block.target_pages()).step_by(usize::try_from(each).unwrap()) {
            if random.below(4) == 0 {
                let bytes = content(index, first * PAGE, each * PAGE);
                block.write(first * PAGE, &bytes).unwrap();
                received.set_all(index, first..first + each);
            }
        }
    }
    let due = received.missing();
    let absent = AbsentRam::watch(ram, received.clone(), split).unwrap();
    assert_eq!(received.missing(), due, "whole host pages");
    let stop = AtomicBool::new(false);
    let new = thread::scope(|scope| {
        let touchers: Vec<_> = (0..6).map(|seed| scope.spawn(move || touch(ram, seed))).collect();
        let answering = scope.spawn(|| answer(&absent, &stop));
        let placing: Vec<_> = [11, 12]
            .map(|seed| {
                scope.spawn({
                    let absent = &absent;
                    move || background(absent, seed)
                })
            })
            .into();
        let new: u64 = placing.into_iter().map(|thread| thread.join().unwrap()).sum();
        touchers.into_iter().for_each(|thread| thread.join().unwrap());
        stop.store(true, Ordering::Release);
        answering.join().unwrap();
        new
    });
    assert!(new <= due, "no page is new twice");
    assert_eq!(received.missing(), 0);
    absent.finish().unwrap();
    verify(ram);
}

fn memfd(name: &str, pages: u64, page: PageSize, sharing: Sharing) -> Option<RamBlock> {
    let len = pages * page.bytes() as u64;
    match RamBlock::memfd(name, 1 << 32, len, page, sharing) {
        Ok(block) => Some(block),
        Err(error) => {
            eprintln!("skipped: {error}");
            None
        }
    }
}

/// Huge pages that are reserved for a test, as far as the host has them, and given back.
struct HugePages(u64);

const NR_HUGEPAGES: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages";

impl HugePages {
    fn reserve(count: u64) -> HugePages {
        let pages = HugePages(count);
        pages.change(|now| now + count);
        pages
    }

    /// Tests run side by side: each adds to what there is, and takes as much away.
    fn change(&self, new: impl Fn(u64) -> u64) {
        static LOCK: Mutex<()> = Mutex::new(());
        let _lock = LOCK.lock().unwrap_or_else(PoisonError::into_inner);
        let Ok(now) = fs::read_to_string(NR_HUGEPAGES) else { return };
        let now: u64 = now.trim().parse().unwrap();
        // Not allowed to: the blocks say that there are none.
        let _ = fs::write(NR_HUGEPAGES, new(now).to_string());
    }
}

impl Drop for HugePages {
    fn drop(&mut self) {
        self.change(|now| now.saturating_sub(self.0));
    }
}

#[test]
fn anonymous_memory() {
    let block = |name, len| RamBlock::anonymous(name, 0, len).unwrap();
    storm(&GuestRam::new(vec![block("a", 9 << 20), block("b", 5 * PAGE)]), Split::Whole);
}

#[test]
fn shared_memory() {
    let block = memfd("ram", 2048, PageSize::SIZE_4K, Sharing::Shared).unwrap();
    storm(&GuestRam::new(vec![block]), Split::Small);
}

#[test]
fn huge_pages_whole() {
    let _pages = HugePages::reserve(16);
    for sharing in [Sharing::Shared, Sharing::Private] {
        let Some(block) = memfd("ram", 8, PageSize::SIZE_2M, sharing) else { return };
        storm(&GuestRam::new(vec![block]), Split::Whole);
    }
}

#[test]
fn huge_pages_in_small_pieces() {
    let _pages = HugePages::reserve(16);
    let Some(block) = memfd("ram", 16, PageSize::SIZE_2M, Sharing::Shared) else { return };
    storm(&GuestRam::new(vec![block]), Split::Small);
}

/// Writers wait while the page they write to becomes a huge page, and no write is lost.
#[test]
fn restoring_huge_pages_loses_no_write() {
    const WRITERS: u64 = 3;
    let _pages = HugePages::reserve(16);
    let Some(block) = memfd("ram", 8, PageSize::SIZE_2M, Sharing::Shared) else { return };
    let ram = GuestRam::new(vec![block]);
    let (index, block) = ram.blocks().next().unwrap();
    let absent = AbsentRam::watch(&ram, Arc::new(Received::new(&ram)), Split::Small).unwrap();
    assert_eq!(absent.unit(index), PageSize::SIZE_4K);
    let (stop, placed) = (AtomicBool::new(false), AtomicBool::new(false));
    // Each writer has a word of its own in each page.
    let write = |writer: u64| {
        let mut counts = vec![0; usize::try_from(block.target_pages()).unwrap()];
        let mut random = Random(writer);
        while !stop.load(Ordering::Acquire) {
            let page = random.below(block.target_pages());
            let at = page * PAGE + writer * 8;
            block.store_u64(at, block.load_u64(at).unwrap().wrapping_add(1)).unwrap();
            counts[usize::try_from(page).unwrap()] += 1;
        }
        counts
    };
    let counts: Vec<Vec<u64>> = thread::scope(|scope| {
        let (absent, stop, placed, write) = (&absent, &stop, &placed, &write);
        let writers = (0..WRITERS).map(|writer| scope.spawn(move || write(writer)));
        let writers: Vec<_> = writers.collect();
        scope.spawn(|| answer(absent, stop));
        let restoring = scope.spawn(|| {
            let mut restored = 0;
            loop {
                let last = placed.load(Ordering::Acquire);
                match absent.restore_next().unwrap() {
                    true => restored += 1,
                    false if last => return restored,
                    false => thread::yield_now(),
                }
            }
        });
        let mut random = Random(5);
        for page in random.shuffled(block.target_pages()) {
            place(absent, index, page * PAGE, PAGE);
        }
        placed.store(true, Ordering::Release);
        assert_eq!(restoring.join().unwrap(), 8);
        stop.store(true, Ordering::Release);
        writers.into_iter().map(|writer| writer.join().unwrap()).collect()
    });
    absent.finish().unwrap();
    for page in 0..block.target_pages() {
        for (writer, counts) in (0..WRITERS).zip(&counts) {
            let at = page * PAGE + writer * 8;
            let expected = word(index, at).wrapping_add(counts[usize::try_from(page).unwrap()]);
            assert_eq!(block.load_u64(at).unwrap(), expected, "page {page}, writer {writer}");
        }
    }
    assert_eq!(mappings_of(block), 1);
}

/// How many mappings a block is made of.
fn mappings_of(block: &RamBlock) -> usize {
    let start = block.host_address().addr().get() as u64;
    let maps = fs::read_to_string("/proc/self/maps").unwrap();
    let range = |line: &str| {
        let (from, to) = line.split(' ').next()?.split_once('-')?;
        Some((u64::from_str_radix(from, 16).ok()?, u64::from_str_radix(to, 16).ok()?))
    };
    let inside = |&(from, to): &(u64, u64)| from < start + block.len() && to > start;
    maps.lines().filter_map(range).filter(inside).count()
}

/// What a page holds that was received as zeros and never touched: its first touch still faults.
#[test]
fn a_received_page_that_nobody_has_touched_is_zero() {
    let _pages = HugePages::reserve(4);
    let anonymous = RamBlock::anonymous("a", 0, 64 * PAGE).unwrap();
    let shared = memfd("s", 64, PageSize::SIZE_4K, Sharing::Shared).unwrap();
    let huge = memfd("h", 2, PageSize::SIZE_2M, Sharing::Shared);
    let private = memfd("p", 2, PageSize::SIZE_2M, Sharing::Private);
    let blocks = [Some(anonymous), Some(shared), huge, private].into_iter().flatten().collect();
    let ram = GuestRam::new(blocks);
    let received = Arc::new(Received::new(&ram));
    for (index, block) in ram.blocks() {
        received.set_all(index, 0..block.target_pages());
    }
    let absent = AbsentRam::watch(&ram, received, Split::Whole).unwrap();
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| answer(&absent, &stop));
        for (_, block) in ram.blocks() {
            for page in 0..block.target_pages() {
                assert_eq!(block.load_u64(page * PAGE).unwrap(), 0);
                block.store_u64(page * PAGE, page).unwrap();
                assert_eq!(block.load_u64(page * PAGE).unwrap(), page);
            }
        }
        stop.store(true, Ordering::Release);
    });
    // A fault that is older than the arrival of its page: nothing changes.
    for (block, _) in ram.blocks() {
        let fault = Fault { block, offset: 0, touched: PAGE, thread: 0, write: true };
        absent.settle(&fault).unwrap();
        assert_eq!(ram.block(block).load_u64(PAGE).unwrap(), 1);
    }
    absent.finish().unwrap();
}

#[test]
fn a_page_that_comes_twice_is_left_as_it_is() {
    let _pages = HugePages::reserve(4);
    let anonymous = RamBlock::anonymous("a", 0, 200 * PAGE).unwrap();
    let shared = memfd("s", 200, PageSize::SIZE_4K, Sharing::Shared).unwrap();
    let mut blocks = vec![anonymous, shared];
    blocks.extend(memfd("h", 2, PageSize::SIZE_2M, Sharing::Shared));
    blocks.extend(memfd("p", 2, PageSize::SIZE_2M, Sharing::Private));
    let ram = GuestRam::new(blocks);
    let absent = AbsentRam::watch(&ram, Arc::new(Received::new(&ram)), Split::Whole).unwrap();
    for (index, block) in ram.blocks() {
        let unit = absent.unit(index).bytes() as u64;
        let each = unit / PAGE;
        let len = usize::try_from(unit).unwrap();
        assert_eq!(absent.place(index, unit, &vec![1; len]).unwrap(), each);
        block.store_u64(unit + 8, 77).unwrap();
        assert_eq!(absent.place(index, unit, &vec![2; len]).unwrap(), 0);
        assert_eq!(absent.place_zeros(index, unit, unit).unwrap(), 0);
        assert_eq!(absent.place(index, 0, &vec![3; 2 * len]).unwrap(), each, "the other one");
        assert_eq!(block.load_u64(unit + 8).unwrap(), 77);
        assert_eq!(block.load_u64(unit).unwrap(), 0x0101_0101_0101_0101);
        assert_eq!(block.load_u64(0).unwrap(), 0x0303_0303_0303_0303);
        absent.place_zeros(index, 0, block.len()).unwrap();
        assert_eq!(block.load_u64(unit + 8).unwrap(), 77);
        for (offset, bytes) in [(1, len), (unit, len - 1), (block.len(), len), (u64::MAX, len)] {
            let error = absent.place(index, offset, &vec![0; bytes]).unwrap_err().to_string();
            assert!(error.contains(block.name()), "{error}");
        }
    }
    absent.finish().unwrap();
}

#[test]
fn memory_that_cannot_be_watched_is_refused() {
    let private = memfd("file", 4, PageSize::SIZE_4K, Sharing::Private).unwrap();
    let ram = GuestRam::new(vec![private]);
    let error = AbsentRam::watch(&ram, Arc::new(Received::new(&ram)), Split::Whole).unwrap_err();
    assert!(error.to_string().contains("RAM block file"), "{error}");
}
