//! What the writers put into a file is what the readers take out of it.

use std::fs::{self, File, OpenOptions};
use std::num::NonZeroU8;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use tempfile::TempDir;
use whimbrel_ram::{BlockIndex, GuestRam, RamBlock, TARGET_PAGE, TargetPage};
use whimbrel_wire::vmdesc::describe;
use whimbrel_wire::{Configuration, Name, encode_eof, encode_vm_description, header::capability};

use super::layout::Layout;
use super::supply::Supply;
use super::writing::Writing;
use super::{Access, DirectIo, KeptVm};
use crate::error::Error;
use crate::worker::Cancel;

const PAGE: usize = TARGET_PAGE.bytes();

/// Pages of the blocks: several chunks with a short one at the end, and less than a word of bits.
const PAGES: [u64; 2] = [3 * 1024 + 100, 5];

fn access(threads: u8, direct: DirectIo) -> Access {
    Access { threads: NonZeroU8::new(threads).expect("some"), direct }
}

/// The ways that this file system has.
fn accesses(folder: &Path) -> Vec<Access> {
    let mut ways = vec![access(1, DirectIo::Off), access(4, DirectIo::Auto)];
    let probe = folder.join("probe");
    File::create(&probe).expect("ours");
    use std::os::unix::fs::OpenOptionsExt;
    match OpenOptions::new().write(true).custom_flags(libc::O_DIRECT).open(&probe) {
        Ok(_) => ways.push(access(3, DirectIo::On)),
        Err(error) => println!("not with direct I/O: {error}"),
    }
    fs::remove_file(&probe).expect("ours");
    ways
}

fn cancel() -> Cancel {
    Cancel::new().expect("an eventfd")
}

fn ram_of(pages: &[u64]) -> GuestRam {
    let block = |(at, pages): (usize, &u64)| {
        RamBlock::anonymous(&format!("block-{at}"), 0, pages * PAGE as u64).expect("memory")
    };
    GuestRam::new(pages.iter().enumerate().map(block).collect())
}

fn configuration() -> Configuration {
    let name = |text| Name::new(text).expect("short");
    let mut configuration = Configuration::new(name("whimbrel-test-1"));
    configuration.capabilities.push(name(capability::MAPPED_RAM));
    configuration
}

fn devices() -> Vec<u8> {
    let mut tail = Vec::new();
    encode_eof(&mut tail);
    encode_vm_description(&describe(4096, &[]), &mut tail);
    tail
}

/// Numbers that are the same every time (xorshift).
struct Numbers(u64);

impl Numbers {
    fn next(&mut self, below: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % below
    }
}

/// Gives a page a content that follows from `number`; zero is none.
fn fill(block: &RamBlock, page: u64, number: u64) {
    let words = [number; PAGE / 8].map(u64::to_le_bytes).concat();
    block.write(page * PAGE as u64, &words).expect("inside");
}

/// A guest of which every third page has no content, and long runs have none either.
fn filled(pages: &[u64]) -> GuestRam {
    let ram = ram_of(pages);
    for (_, block) in ram.blocks() {
        for page in (0..block.target_pages()).filter(|page| page % 3 != 0 && page % 1000 < 600) {
            fill(block, page, page + 1);
        }
        // A run that is long enough for direct I/O.
        (700..block.target_pages().min(900)).for_each(|page| fill(block, page, page + 1));
    }
    ram
}

fn begin(path: &Path, ram: &GuestRam, access: Access) -> Writing {
    Writing::begin(path, &configuration(), ram, access, &cancel()).expect("a file")
}

fn write(folder: &Path, ram: &GuestRam, access: Access) -> PathBuf {
    let path = folder.join("kept");
    let mut writing = begin(&path, ram, access);
    writing.finish(&configuration(), &[], &devices(), false).expect("room");
    writing.keep().expect("a name");
    path
}

/// Takes everything out of the file, and compares it with `ram`.
fn compare(path: &Path, ram: &GuestRam, access: Access, looked_at: bool) {
    let vm = KeptVm::open(path).expect("a kept VM");
    let supply = Supply::start(&vm, access, looked_at, &cancel()).expect("threads");
    for (index, block) in ram.blocks() {
        let mut batches: Vec<u64> = (0..block.target_pages()).step_by(100).collect();
        // From the end to the start, too: nobody has to ask in the readers' order.
        if looked_at {
            batches.reverse();
        }
        for start in batches {
            let pages = start..block.target_pages().min(start + 100);
            supply.have(index, pages.clone()).expect("the file is whole");
            for page in pages.clone() {
                let (mut is, mut was) = ([0; PAGE], [0; PAGE]);
                block.read(page * PAGE as u64, &mut was).expect("inside");
                let present = vm.is_present(index, TargetPage(page));
                assert_eq!(present, was != [0; PAGE], "{access:?} {index:?} page {page}");
                if present {
                    let read = supply.ram().block(index);
                    read.read(page * PAGE as u64, &mut is).expect("inside");
                    assert!(is == was, "{access:?} {index:?} page {page}");
                }
            }
            supply.sent(index, pages);
        }
    }
    assert_eq!(supply.held(), 0, "all that was sent has been given back");
}

#[test]
fn in_every_way_what_comes_out_is_what_went_in() {
    let folder = tempfile::tempdir().expect("a folder");
    let ram = filled(&PAGES);
    let mut first: Option<Vec<u8>> = None;
    for written in accesses(folder.path()) {
        let path = write(folder.path(), &ram, written);
        for read in accesses(folder.path()) {
            compare(&path, &ram, read, false);
            compare(&path, &ram, read, true);
        }
        let bytes = fs::read(&path).expect("ours");
        let first = first.get_or_insert_with(|| bytes.clone());
        assert!(*first == bytes, "{written:?}: the file is another one");
    }
}

#[test]
fn pages_without_content_are_holes() {
    let folder = tempfile::tempdir().expect("a folder");
    let ram = ram_of(&[20 * 1024]);
    (0..512).for_each(|page| fill(ram.block(BlockIndex(0)), page, 1));
    for access in accesses(folder.path()) {
        let metadata = fs::metadata(write(folder.path(), &ram, access)).expect("ours");
        assert!(metadata.len() > 80 << 20, "{metadata:?}");
        assert!(metadata.blocks() * 512 < 4 << 20, "{access:?}: {} blocks", metadata.blocks());
    }
}

/// Waits until some of the file is on the disk.
fn wait_for_blocks(folder: &TempDir) {
    let begun = Instant::now();
    let blocks = || {
        let entry = folder.path().read_dir().expect("ours").next().expect("a file");
        entry.expect("ours").metadata().expect("ours").blocks()
    };
    while blocks() * 512 < 4 << 20 {
        assert!(begun.elapsed() < Duration::from_secs(30), "nothing is written before the end");
        thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn pages_that_change_while_they_are_written_are_kept_as_they_are_in_the_end() {
    for seed in 1..=6 {
        let folder = tempfile::tempdir().expect("a folder");
        let direct = if seed % 2 == 0 { DirectIo::Auto } else { DirectIo::Off };
        let (ram, path) = (ram_of(&PAGES), folder.path().join("kept"));
        let mut writing = begin(&path, &ram, access(3, direct));
        let changes = writing.changes();
        // The first round, in order: with what it brings, chunks are written before the end.
        for (index, block) in ram.blocks() {
            for page in 0..block.target_pages() {
                if page % 50 < 10 {
                    changes.stays_zero(index, TargetPage(page));
                } else {
                    fill(block, page, page + 1);
                    changes.placed(index, page..page + 1);
                }
            }
        }
        wait_for_blocks(&folder);
        // Then each thread changes pages of its own, again and again, some of them to zero.
        thread::scope(|scope| {
            for lane in 0..3 {
                let (ram, changes) = (&ram, changes.clone());
                scope.spawn(move || {
                    let mut numbers = Numbers(seed * 1000 + lane + 1);
                    for _ in 0..4000 {
                        let index = BlockIndex(u16::from(numbers.next(20) == 0));
                        let block = ram.block(index);
                        let page = numbers.next(block.target_pages().div_ceil(3)) * 3 + lane;
                        if page < block.target_pages() {
                            fill(block, page, numbers.next(4));
                            changes.placed(index, page..page + 1);
                        }
                    }
                });
            }
        });
        let stored = writing.finish(&configuration(), &[], &devices(), false).expect("room");
        writing.keep().expect("a name");
        compare(&path, &ram, access(2, direct), false);
        let content = |(_, block): (_, &RamBlock)| {
            (0..block.target_pages()).filter(|&page| !block.is_zero(TargetPage(page))).count()
                as u64
        };
        assert_eq!(stored, ram.blocks().map(content).sum::<u64>());
    }
}

#[test]
fn what_nobody_told_of_is_written_when_the_rest_came_by_postcopy() {
    let folder = tempfile::tempdir().expect("a folder");
    let (ram, path) = (ram_of(&PAGES), folder.path().join("kept"));
    let mut writing = begin(&path, &ram, access(2, DirectIo::Auto));
    let changes = writing.changes();
    let block = ram.block(BlockIndex(0));
    for page in 0..1024 {
        fill(block, page, 7);
        changes.placed(BlockIndex(0), page..page + 1);
    }
    writing.pause().expect("other threads");
    (500..2000).for_each(|page| fill(block, page, 8));
    writing.finish(&configuration(), &[], &devices(), true).expect("room");
    writing.keep().expect("a name");
    compare(&path, &ram, access(2, DirectIo::Off), false);
}

#[test]
fn sections_before_ram_may_move_it() {
    let folder = tempfile::tempdir().expect("a folder");
    let (ram, path) = (filled(&PAGES), folder.path().join("kept"));
    let mut writing = begin(&path, &ram, access(2, DirectIo::Auto));
    let changes = writing.changes();
    for (index, block) in ram.blocks() {
        changes.placed(index, 0..block.target_pages());
    }
    let early = vec![b'x'; 3 << 20];
    writing.finish(&configuration(), &early, &devices(), false).expect("room");
    writing.keep().expect("a name");
    let layout = Layout::plan(&configuration(), &early, &ram).expect("short");
    let file = File::open(&path).expect("ours");
    for (index, block) in ram.blocks() {
        assert!(layout.header(index).pages_offset >= 4 << 20);
        for page in 0..block.target_pages() {
            let (mut is, mut was) = ([0; PAGE], [0; PAGE]);
            let offset = page * PAGE as u64;
            block.read(offset, &mut was).expect("inside");
            file.read_exact_at(&mut is, layout.header(index).pages_offset + offset)
                .expect("a whole file");
            assert!(is == was, "{index:?} page {page}");
        }
    }
}

#[test]
fn cancelled_or_dropped_nothing_is_left_but_the_last_copy_is_written() {
    let folder = tempfile::tempdir().expect("a folder");
    let (ram, path) = (filled(&PAGES), folder.path().join("kept"));
    let cancelled = cancel();
    let access = access(2, DirectIo::Auto);
    let begin = || Writing::begin(&path, &configuration(), &ram, access, &cancelled);
    let files = || folder.path().read_dir().expect("ours").count();
    drop(begin().expect("a file"));
    assert_eq!(files(), 0, "dropped");

    let mut writing = begin().expect("a file");
    assert_eq!(files(), 1, "begun");
    cancelled.set();
    let error = writing.finish(&configuration(), &[], &devices(), false);
    assert!(matches!(error, Err(Error::Cancelled)), "{error:?}");
    drop(writing);
    assert_eq!(files(), 0, "cancelled");

    let mut writing = begin().expect("a file");
    writing.finish(&configuration(), &[], &devices(), true).expect("what is nowhere else");
    writing.keep().expect("a name");
    compare(&path, &ram, access, false);
}

#[test]
fn no_more_is_read_ahead_than_a_window() {
    let folder = tempfile::tempdir().expect("a folder");
    // One page of content in each of 50 chunks: the file has 200 MiB and hardly a byte.
    let ram = ram_of(&[50 * 1024]);
    (0..50).for_each(|chunk| fill(ram.block(BlockIndex(0)), chunk * 1024 + chunk, chunk + 1));
    let path = write(folder.path(), &ram, access(2, DirectIo::Auto));
    let vm = KeptVm::open(&path).expect("a kept VM");
    for looked_at in [false, true] {
        let read = access(3, DirectIo::Off);
        let supply = Supply::start(&vm, read, looked_at, &cancel()).expect("threads");
        let begun = Instant::now();
        while supply.held() < Supply::WINDOW {
            assert!(begun.elapsed() < Duration::from_secs(30), "{} chunks", supply.held());
            thread::sleep(Duration::from_millis(1));
        }
        thread::sleep(Duration::from_millis(20));
        assert_eq!(supply.held(), Supply::WINDOW);
        // Several senders, each with chunks of its own.
        thread::scope(|scope| {
            for lane in 0..4 {
                let supply = &supply;
                scope.spawn(move || {
                    for chunk in (lane..50).step_by(4) {
                        let page = chunk * 1024 + chunk;
                        supply.have(BlockIndex(0), page..page + 1).expect("whole");
                        let block = supply.ram().block(BlockIndex(0));
                        assert_eq!(block.load_u64(page * PAGE as u64).expect("inside"), chunk + 1);
                        supply.sent(BlockIndex(0), page..page + 1);
                    }
                });
            }
        });
        assert_eq!(supply.held(), 0);
    }
}

#[test]
fn a_file_that_is_cut_off_while_it_is_read_is_an_error() {
    let folder = tempfile::tempdir().expect("a folder");
    let ram = filled(&PAGES);
    for direct in [DirectIo::Off, DirectIo::Auto] {
        for looked_at in [false, true] {
            let path = write(folder.path(), &ram, access(2, direct));
            let vm = KeptVm::open(&path).expect("a kept VM");
            let file = OpenOptions::new().write(true).open(&path).expect("ours");
            file.set_len(6 << 20).expect("ours");
            let supply = Supply::start(&vm, access(2, direct), looked_at, &cancel());
            let supply = supply.expect("threads");
            let error = supply.have(BlockIndex(0), 0..PAGES[0]).expect_err("cut off").to_string();
            assert!(error.contains("it has become shorter while it was read"), "{error}");
            assert!(error.contains(&path.display().to_string()), "{error}");
        }
    }
}
