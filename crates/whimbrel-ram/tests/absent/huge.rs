//! Huge pages that are filled in small pieces, and restored.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::fs;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use whimbrel_ram::{AbsentRam, GuestRam, PageSize, RamBlock, Received, Sharing, Split};

use crate::memory::{HugePages, memfd};
use crate::source::{PAGE, Random, answer, place, word};
use crate::storm;

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
    assert!(AbsentRam::takes_small_pieces(block));
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

/// Private huge pages are not split: their content is in no file that could be mapped again.
#[test]
fn private_huge_pages_stay_whole() {
    let _pages = HugePages::reserve(2);
    let Some(block) = memfd("ram", 2, PageSize::SIZE_2M, Sharing::Private) else { return };
    let ram = GuestRam::new(vec![block]);
    let (index, _) = ram.blocks().next().unwrap();
    let absent = AbsentRam::watch(&ram, Arc::new(Received::new(&ram)), Split::Small).unwrap();
    assert_eq!(absent.unit(index), PageSize::SIZE_2M);
    assert!(!AbsentRam::takes_small_pieces(ram.block(index)));
}
