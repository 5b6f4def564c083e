//! Memory whose pages are still arriving, touched by many threads meanwhile.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod huge;
#[cfg(feature = "kvm")]
mod kvm;
mod lost;
mod memory;
mod reserve;
mod source;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use memory::{HugePages, memfd};
use source::{BYTES, PAGE, Random, answer, background, content, word};
use whimbrel_ram::{
    AbsentRam, Backing, Fault, GuestRam, PageSize, RamBlock, Received, Sharing, Split,
};

pub(crate) fn verify(ram: &GuestRam) {
    let mut page = [0; BYTES];
    for (index, block) in ram.blocks() {
        for number in 0..block.target_pages() {
            block.read(number * PAGE, &mut page).unwrap();
            let expected = content(index, number * PAGE, PAGE);
            assert!(page[..] == expected[..], "page {number} of {}", block.name());
        }
    }
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
pub(crate) fn storm(ram: &GuestRam, split: Split) {
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
    let new: u64 = thread::scope(|scope| {
        let touchers: Vec<_> = (0..6).map(|seed| scope.spawn(move || touch(ram, seed))).collect();
        let answering = scope.spawn(|| answer(&absent, &stop));
        let (one, other) = (scope.spawn(|| background(&absent, 11)), || background(&absent, 12));
        let new = other() + one.join().unwrap();
        touchers.into_iter().for_each(|thread| thread.join().unwrap());
        stop.store(true, Ordering::Release);
        new + answering.join().unwrap()
    });
    assert_eq!(new, due, "every page is new once");
    assert_eq!(received.missing(), 0);
    absent.finish().unwrap();
    verify(ram);
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

/// Others that write to the same file fill the page cache: nothing in it counts as arrived.
#[test]
fn shared_memory_whose_page_cache_is_full() {
    let block = memfd("ram", 2048, PageSize::SIZE_4K, Sharing::Shared).unwrap();
    let Backing::Shared { file, .. } = block.backing() else { unreachable!() };
    let len = block.len();
    let file = file.try_clone().unwrap();
    // Huge folios, where the host has them for shared memory.
    let other = RamBlock::shared_file("other", 0, len, PageSize::SIZE_4K, file, 0).unwrap();
    let ram = GuestRam::new(vec![block]);
    let absent = AbsentRam::watch(&ram, Arc::new(Received::new(&ram)), Split::Whole).unwrap();
    other.populate(0, len).unwrap();
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        let touchers: Vec<_> = (0..4)
            .map(|seed| {
                scope.spawn({
                    let ram = &ram;
                    move || touch(ram, seed)
                })
            })
            .collect();
        let answering = scope.spawn(|| answer(&absent, &stop));
        let new = background(&absent, 3);
        touchers.into_iter().for_each(|thread| thread.join().unwrap());
        stop.store(true, Ordering::Release);
        assert_eq!(new + answering.join().unwrap(), len / PAGE);
    });
    absent.finish().unwrap();
    verify(&ram);
}

/// A fault says which page was touched, by whom, and whether to write.
#[test]
fn a_fault_names_the_page_and_the_thread() {
    let _pages = HugePages::reserve(2);
    let mut blocks = vec![RamBlock::anonymous("a", 0, 64 * PAGE).unwrap()];
    blocks.extend(memfd("h", 2, PageSize::SIZE_2M, Sharing::Shared));
    let ram = GuestRam::new(blocks);
    let absent = AbsentRam::watch(&ram, Arc::new(Received::new(&ram)), Split::Whole).unwrap();
    for (index, block) in ram.blocks() {
        let unit = absent.unit(index).bytes() as u64;
        for write in [false, true] {
            // The last page of a unit.
            let touched = unit * u64::from(write) + unit - PAGE;
            thread::scope(|scope| {
                let touching = scope.spawn(move || {
                    match write {
                        true => block.store_u64(touched + 8, 1).unwrap(),
                        false => assert_eq!(block.load_u64(touched + 8).unwrap(), 0),
                    }
                    thread_id()
                });
                let mut faults = Vec::new();
                while faults.is_empty() {
                    absent.read_faults(&mut faults).unwrap();
                }
                let [fault] = faults[..] else { panic!("one fault, not {faults:?}") };
                absent.place_zeros(index, fault.offset, unit).unwrap();
                let thread = touching.join().unwrap();
                let offset = touched / unit * unit;
                assert_eq!(fault, Fault { block: index, offset, touched, thread, write });
            });
        }
    }
}

fn thread_id() -> u32 {
    let link = std::fs::read_link("/proc/thread-self").unwrap();
    link.file_name().unwrap().to_str().unwrap().parse().unwrap()
}

/// Who waits when the watch ends early goes on with zeros, and nobody hangs.
#[test]
fn whoever_waits_goes_on_when_the_watch_ends() {
    let _pages = HugePages::reserve(2);
    for split in [Split::Whole, Split::Small] {
        let mut blocks = vec![RamBlock::anonymous("a", 0, 64 * PAGE).unwrap()];
        blocks.push(memfd("s", 64, PageSize::SIZE_4K, Sharing::Shared).unwrap());
        blocks.extend(memfd("h", 1, PageSize::SIZE_2M, Sharing::Shared));
        let ram = GuestRam::new(blocks);
        let absent = AbsentRam::watch(&ram, Arc::new(Received::new(&ram)), split).unwrap();
        thread::scope(|scope| {
            for (_, block) in ram.blocks() {
                scope.spawn(|| assert_eq!(block.load_u64(PAGE).unwrap(), 0));
            }
            let mut faults = Vec::new();
            while faults.len() < ram.block_count() {
                absent.read_faults(&mut faults).unwrap();
            }
            drop(absent);
        });
    }
}

#[test]
fn huge_pages_whole() {
    let _pages = HugePages::reserve(16);
    for sharing in [Sharing::Shared, Sharing::Private] {
        let Some(block) = memfd("ram", 8, PageSize::SIZE_2M, sharing) else { return };
        storm(&GuestRam::new(vec![block]), Split::Whole);
    }
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
