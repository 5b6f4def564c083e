//! Pages that are given up: whoever touches them does not find zeros.

use std::io;
use std::sync::Arc;

use whimbrel_ram::kernel_copy::Gather;
use whimbrel_ram::{
    AbsentRam, BlockIndex, GuestRam, PageSize, RamBlock, Received, Sharing, Split, TargetPage,
};

use crate::memory::{HugePages, memfd};
use crate::source::{BYTES, PAGE};

const RAM: BlockIndex = BlockIndex(0);

/// What the kernel finds in a page in our place, who would be killed; `None` is nothing.
fn look(block: &RamBlock, page: u64) -> Option<u64> {
    let into = RamBlock::memfd("into", 0, PAGE, PageSize::SIZE_4K, Sharing::Shared).unwrap();
    let mut pieces = Gather::new();
    pieces.push_guest(block, page * PAGE, BYTES).unwrap();
    match pieces.write_at(into.shared_fd().unwrap(), 0) {
        Ok(written) => {
            assert_eq!(written, BYTES);
            Some(into.load_u64(0).unwrap())
        }
        Err(error) => {
            assert_eq!(error.raw_os_error(), Some(libc::EFAULT), "{error}");
            None
        }
    }
}

/// Whether this kernel can do it at all.
fn can<T>(result: io::Result<T>) -> Option<T> {
    match result {
        Err(error) if error.kind() == io::ErrorKind::Unsupported => {
            eprintln!("skipped: {error}");
            None
        }
        other => Some(other.unwrap()),
    }
}

fn kinds() -> impl Iterator<Item = RamBlock> {
    let anonymous = RamBlock::anonymous("private", 1 << 24, 16 * PAGE).unwrap();
    let shared = memfd("shared", 16, PageSize::SIZE_4K, Sharing::Shared);
    let huge = memfd("huge", 4, PageSize::SIZE_2M, Sharing::Shared);
    [Some(anonymous), shared, huge].into_iter().flatten()
}

#[test]
fn what_is_given_up_stays_so_when_the_watch_has_ended() {
    let _pages = HugePages::reserve(4);
    for block in kinds() {
        let (name, each) = (block.name().to_owned(), block.host_page_size().target_pages());
        let ram = GuestRam::new(vec![block]);
        let received = Arc::new(Received::new(&ram));
        let absent = AbsentRam::watch(&ram, received.clone(), Split::Whole).unwrap();
        let unit = each * PAGE;
        let bytes = vec![7; usize::try_from(unit).unwrap()];
        let all = received.missing();
        absent.place(RAM, unit, &bytes).unwrap();
        let Some(lost) = can(absent.poison(RAM, 0, 3 * unit)) else { return };
        // What was there stays there, and nothing else is waited for.
        assert_eq!(lost, 2 * each, "{name}");
        assert_eq!(received.missing(), all - 3 * each, "{name}");
        assert_eq!(absent.poison(RAM, 0, 3 * unit).unwrap(), 0, "{name}: once");
        assert_eq!(absent.place(RAM, 0, &bytes).unwrap(), 0, "{name}: it comes too late");
        assert_eq!(
            absent.place_zeros(RAM, 3 * unit, ram.block(RAM).len() - 3 * unit).unwrap(),
            all - 3 * each
        );
        let expect = |when: &str| {
            let found = [0, each, 2 * each, 3 * each].map(|page| look(ram.block(RAM), page));
            let content = Some(0x0707_0707_0707_0707);
            assert_eq!(found, [None, content, None, Some(0)], "{name}, {when}");
        };
        expect("watched");
        absent.finish().unwrap();
        expect("no longer watched");
    }
}

#[test]
fn pieces_of_huge_pages_are_not_given_up() {
    let _pages = HugePages::reserve(2);
    let Some(block) = memfd("huge", 2, PageSize::SIZE_2M, Sharing::Shared) else { return };
    let ram = GuestRam::new(vec![block]);
    let received = Arc::new(Received::new(&ram));
    let absent = AbsentRam::watch(&ram, received.clone(), Split::Small).unwrap();
    let error = absent.poison(RAM, 0, PAGE).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::Unsupported, "{error}");
    assert_eq!(received.missing(), 1024);
}

#[test]
fn memory_that_nobody_watches_loses_pages() {
    let _pages = HugePages::reserve(4);
    for block in kinds() {
        let each = block.host_page_size().target_pages();
        for page in (0..block.target_pages()).step_by(usize::try_from(each).unwrap()) {
            block.store_u64(page * PAGE, page + 1).unwrap();
        }
        let pages = each..3 * each;
        if can(block.lose(pages)).is_none() {
            return;
        }
        let found = [0, 1, 2, 3].map(|host| look(&block, host * each));
        assert_eq!(found, [Some(1), None, None, Some(3 * each + 1)], "{}", block.name());
        block.lose(0..0).unwrap();
        let end = block.target_pages();
        for wrong in [0..end + each, end..end + each, 0..u64::MAX] {
            let error = block.lose(wrong.clone()).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::InvalidInput, "{wrong:?}: {error}");
        }
        if each > 1 {
            assert!(block.lose(0..1).is_err(), "a part of a huge page");
        }
        assert_eq!(look(&block, 0), Some(1));
    }
}

#[test]
fn memory_that_is_watched_is_not_taken_away() {
    let ram = GuestRam::new(vec![RamBlock::anonymous("ram", 0, 4 * PAGE).unwrap()]);
    let received = Arc::new(Received::new(&ram));
    received.set(RAM, TargetPage(1));
    ram.block(RAM).store_u64(PAGE, 5).unwrap();
    let absent = AbsentRam::watch(&ram, received, Split::Whole).unwrap();
    let error = ram.block(RAM).lose(1..2).unwrap_err();
    assert!(error.to_string().contains("cannot give up"), "{error}");
    assert_eq!(look(ram.block(RAM), 1), Some(5));
    drop(absent);
}
