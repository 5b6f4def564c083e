//! What a part has, and what is made of parts, page by page.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;

use tempfile::TempDir;
use whimbrel_ram::dirty::{DirtyLog, OwnWrites};
use whimbrel_ram::{
    AbsentRam, Backing, BlockIndex, GuestRam, PageSize, RamBlock, Received, Sharing, Split,
    TARGET_PAGE, TargetPage,
};

use super::fill::fill;
use super::keep::{Origin, keep};
use super::{How, Lost, Orders, Part, Side, describe, join, roll_back};
use crate::error::Error;
use crate::kept::KeptVm;
use crate::vm::{DeviceState, Vm, VmError};
use crate::worker::Cancel;

const PAGE: usize = TARGET_PAGE.bytes();
const ID: [u8; 16] = [9; 16];

/// Blocks: more than a chunk and a part of a word, and one that is small.
const PAGES: [u64; 2] = [1024 + 100, 5];

/// A VM that stands still.
struct Still {
    ram: GuestRam,
    log: OwnWrites,
}

impl Still {
    fn new(ram: GuestRam) -> Still {
        Still { log: OwnWrites::new(&ram), ram }
    }
}

impl Vm for Still {
    fn machine(&self) -> String {
        "whimbrel-test-1".into()
    }

    fn ram(&self) -> &GuestRam {
        &self.ram
    }

    fn dirty_log(&self) -> &dyn DirtyLog {
        &self.log
    }

    fn pause(&self) -> Result<(), VmError> {
        Ok(())
    }

    fn resume(&self) -> Result<(), VmError> {
        Ok(())
    }

    fn save(&self) -> Result<Vec<DeviceState>, VmError> {
        let bytes = b"registers".to_vec();
        Ok(vec![DeviceState { name: "cpu".into(), instance_id: 0, version_id: 1, bytes }])
    }

    fn load(&self, _: Vec<DeviceState>) -> Result<(), VmError> {
        Ok(())
    }
}

/// What memory is made of.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Kind {
    Private,
    Shared,
}

fn ram(kind: Kind) -> GuestRam {
    let block = |(at, pages): (usize, &u64)| {
        let (name, len) = (format!("block-{at}"), pages * PAGE as u64);
        match kind {
            Kind::Private => RamBlock::anonymous(&name, 0, len),
            Kind::Shared => RamBlock::memfd(&name, 0, len, PageSize::SIZE_4K, Sharing::Shared),
        }
        .unwrap()
    };
    GuestRam::new(PAGES.iter().enumerate().map(block).collect())
}

/// What a page holds at a side; every eighth is zero.
fn content(block: usize, page: u64, salt: u64) -> u64 {
    if page % 8 == 3 { 0 } else { 1 + salt * 1_000_000 + block as u64 * 100_000 + page }
}

fn write(ram: &GuestRam, block: usize, page: u64, salt: u64) {
    let index = BlockIndex(u16::try_from(block).unwrap());
    let offset = page * PAGE as u64 + 8 * (page % 512);
    ram.block(index).store_u64(offset, content(block, page, salt)).unwrap();
}

fn read(ram: &GuestRam, block: usize, page: u64) -> u64 {
    let index = BlockIndex(u16::try_from(block).unwrap());
    ram.block(index).load_u64(page * PAGE as u64 + 8 * (page % 512)).unwrap()
}

fn each(mut work: impl FnMut(usize, u64)) {
    for (block, pages) in PAGES.into_iter().enumerate() {
        (0..pages).for_each(|page| work(block, page));
    }
}

/// Whether a page has come to the destination.
fn came(block: usize, page: u64) -> bool {
    block == 0 && (page % 7 < 3 || (200..300).contains(&page))
}

/// A destination to which some pages have come, as the guest has since written them (salt 2); `None`
/// where memory cannot be watched.
fn destination(kind: Kind) -> Option<(Still, AbsentRam)> {
    let vm = Still::new(ram(kind));
    let received = Arc::new(Received::new(&vm.ram));
    each(|block, page| {
        if came(block, page) {
            write(&vm.ram, block, page, 2);
            let index = BlockIndex(u16::try_from(block).unwrap());
            received.set(index, TargetPage(page));
        }
    });
    match AbsentRam::watch(&vm.ram, received, Split::Whole) {
        Ok(absent) => Some((vm, absent)),
        Err(error) => {
            eprintln!("skipped: {error}");
            None
        }
    }
}

/// A source as it was at the hand-over (salt 1).
fn source() -> Still {
    let vm = Still::new(ram(Kind::Private));
    each(|block, page| write(&vm.ram, block, page, 1));
    vm
}

struct Parts {
    folder: TempDir,
    destination: Part,
    source: Part,
}

impl Parts {
    fn file(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }
}

fn origin<'a>(vm: &'a Still, absent: Option<&'a AbsentRam>, id: Option<[u8; 16]>) -> Origin<'a> {
    Origin { vm, runs: true, migration: id, absent }
}

fn parts(kind: Kind) -> Option<Parts> {
    let (vm, absent) = destination(kind)?;
    let folder = tempfile::tempdir().unwrap();
    let (to, from) = (folder.path().join("to"), folder.path().join("from"));
    let kept = keep(&origin(&vm, Some(&absent), Some(ID)), &to).unwrap();
    assert_eq!((kept.side, kept.missing_pages), (Side::Destination, absent.received().missing()));
    let kept = keep(&origin(&source(), None, Some(ID)), &from).unwrap();
    assert_eq!((kept.side, kept.missing_pages), (Side::Source, 0));
    let (destination, source) = (Part::open(&to).unwrap(), Part::open(&from).unwrap());
    Some(Parts { folder, destination, source })
}

/// What a kept VM holds is what `expected` says.
fn compare(path: &Path, expected: impl Fn(usize, u64) -> u64) {
    let vm = KeptVm::open(path).unwrap();
    let names: Vec<_> =
        vm.devices.sections.iter().map(|section| section.header.name.to_string()).collect();
    assert_eq!(names, ["globalstate", "cpu"]);
    each(|block, page| {
        let index = BlockIndex(u16::try_from(block).unwrap());
        let found = match vm.is_present(index, TargetPage(page)) {
            true => read(vm.ram(), block, page),
            false => 0,
        };
        assert_eq!(found, expected(block, page), "block {block}, page {page}");
    });
}

#[test]
fn two_parts_make_a_whole_of_the_newest_pages() {
    for kind in [Kind::Private, Kind::Shared] {
        let Some(parts) = parts(kind) else { return };
        let whole = parts.file("whole");
        let joined = join(&parts.destination, Some(&parts.source), How::default(), &whole).unwrap();
        assert_eq!(joined.pages_taken, parts.destination.missing_pages());
        assert_eq!(joined.lost_pages, 0);
        let salt = |block, page| if came(block, page) { 2 } else { 1 };
        compare(&whole, |block, page| content(block, page, salt(block, page)));
        let zero =
            PAGES.iter().map(|pages| (0..*pages).filter(|page| page % 8 == 3).count() as u64);
        let all: u64 = PAGES.iter().sum();
        assert_eq!(joined.stored_bytes, (all - zero.sum::<u64>()) * PAGE as u64);
        // And as it was handed over.
        let back = parts.file("back");
        roll_back(&parts.source, &back).unwrap();
        compare(&back, |block, page| content(block, page, 1));
    }
}

#[test]
fn what_neither_has_is_told_and_carried_along() {
    let Some(parts) = parts(Kind::Private) else { return };
    let whole = parts.file("whole");
    let missing = parts.destination.missing_pages();
    let error = join(&parts.destination, None, How::default(), &whole).unwrap_err().to_string();
    assert!(error.contains(&format!("{missing} pages of RAM are in neither part")), "{error}");
    assert!(!whole.exists());
    let how = How { lost: Lost::Poison, ..How::default() };
    let joined = join(&parts.destination, None, how, &whole).unwrap();
    assert_eq!((joined.lost_pages, joined.pages_taken), (missing, 0));
    let vm = KeptVm::open(&whole).unwrap();
    let last = vm.devices.sections.last().unwrap();
    assert_eq!(last.header.name, *super::LOST_PAGES);
    let runs = (0..2).map(|block| parts.destination.missing_runs(block).count());
    assert_eq!(
        last.own_data().unwrap()[..4],
        u32::try_from(runs.sum::<usize>()).unwrap().to_be_bytes()
    );
}

#[test]
fn memory_of_a_process_need_not_have_every_block_nor_their_order() {
    let Some(parts) = parts(Kind::Private) else { return };
    let memory = parts.file("memory");
    // The second block before the first one, with something between.
    let source = source();
    let mut bytes = vec![0; PAGE * (5 + 2)];
    source.ram.block(BlockIndex(1)).read(0, &mut bytes[..5 * PAGE]).unwrap();
    let at = bytes.len();
    bytes.resize(at + PAGE * 1124, 0);
    source.ram.block(BlockIndex(0)).read(0, &mut bytes[at..]).unwrap();
    fs::write(&memory, bytes).unwrap();
    let describe = |blocks: &str| {
        let text = format!(r#"{{"version":1,"machine":"whimbrel-test-1","blocks":[{blocks}]}}"#);
        fs::write(parts.file("memory.json"), text).unwrap();
    };
    let first = format!(r#"{{"name":"block-0","length":{},"offset":{at}}}"#, 1124 * PAGE);
    let second = format!(r#"{{"name":"block-1","length":{},"offset":0}}"#, 5 * PAGE);

    describe(&format!("{second},{first}"));
    let whole = parts.file("whole");
    let opened = Part::open(&memory).unwrap();
    assert_eq!((opened.side(), opened.has_devices()), (Side::Source, false));
    // Its guest has written most of what both have.
    let error = join(&parts.destination, Some(&opened), How::default(), &whole).unwrap_err();
    assert!(error.to_string().contains("it seems to be of another VM"), "{error}");
    let how = How { unlike_too: true, ..How::default() };
    join(&parts.destination, Some(&opened), how, &whole).unwrap();
    let salt = |block, page| if came(block, page) { 2 } else { 1 };
    compare(&whole, |block, page| content(block, page, salt(block, page)));

    describe(&first);
    let opened = Part::open(&memory).unwrap();
    let error = join(&parts.destination, Some(&opened), how, &whole).unwrap_err().to_string();
    assert!(error.contains("5 pages of RAM are in neither part"), "{error}");
    describe(&format!("{first},{}", second.replace("block-1", "block-2")));
    let error = join(&parts.destination, Some(&Part::open(&memory).unwrap()), how, &whole);
    let error = error.unwrap_err().to_string();
    assert!(error.contains("RAM blocks: 2 here, 1 of these there"), "{error}");
}

#[test]
fn memory_is_described_only_where_it_is_in_the_file() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("memory");
    let file = fs::File::options().read(true).write(true).create_new(true).open(&path).unwrap();
    file.set_len(16 * PAGE as u64).unwrap();
    let again = file.try_clone().unwrap();
    let block =
        RamBlock::shared_file("a", 0, 8 * PAGE as u64, TARGET_PAGE, again, 4096 * 8).unwrap();
    let vm = Still::new(GuestRam::new(vec![block]));
    describe(&path, &vm, Some(ID)).unwrap();
    // The process that has it lives, as far as anybody can know.
    file.try_lock().unwrap();
    let error = Part::open(&path).unwrap_err().to_string();
    assert!(error.contains("still has it"), "{error}");
    file.unlock().unwrap();
    let part = Part::open(&path).unwrap();
    assert_eq!((part.migration(), part.ram_bytes()), (Some(ID), 8 * PAGE as u64));
    let Backing::Shared { offset, .. } = vm.ram.block(BlockIndex(0)).backing() else { panic!() };
    assert_eq!(*offset, 4096 * 8);

    let elsewhere = Still::new(ram(Kind::Shared));
    let error = describe(&path, &elsewhere, None).unwrap_err().to_string();
    assert!(error.contains("RAM block block-0 is not a shared mapping of it"), "{error}");
}

#[test]
fn a_destination_is_filled_and_who_waits_goes_on() {
    for kind in [Kind::Private, Kind::Shared] {
        let Some(parts) = parts(kind) else { return };
        let Some((vm, absent)) = destination(kind) else { return };
        let missing = absent.received().missing();
        let (waiting, machine) = (vm.ram.clone(), vm.machine());
        thread::scope(|scope| {
            // From the end, so that it waits for what comes last.
            let guest = scope.spawn(move || {
                let pages = (0..PAGES[0]).rev();
                pages.map(|page| read(&waiting, 0, page)).collect::<Vec<_>>()
            });
            let filled = fill(&absent, &machine, Some(&parts.source), Lost::Refuse).unwrap();
            assert_eq!((filled.pages, filled.lost_pages), (missing, 0));
            absent.finish().unwrap();
            let found = guest.join().unwrap();
            for (page, found) in (0..PAGES[0]).rev().zip(found) {
                let salt = if came(0, page) { 2 } else { 1 };
                assert_eq!(found, content(0, page, salt), "page {page}");
            }
        });
        each(|block, page| {
            let salt = if came(block, page) { 2 } else { 1 };
            assert_eq!(read(&vm.ram, block, page), content(block, page, salt));
        });
    }
}

#[test]
fn nothing_is_filled_that_does_not_fit_or_leaves_pages_out() {
    let (Some(parts), Some((vm, absent))) = (parts(Kind::Private), destination(Kind::Private))
    else {
        return;
    };
    let missing = absent.received().missing();
    let refused = |machine: &str, part: Option<&Part>, text: &str| {
        let error = fill(&absent, machine, part, Lost::Refuse).unwrap_err().to_string();
        assert!(error.contains(text), "{error}");
        assert_eq!(absent.received().missing(), missing, "{text}");
    };
    refused("other-1", Some(&parts.source), "machine type: whimbrel-test-1 here, other-1 there");
    let neither = format!("{missing} pages of RAM are in neither part");
    refused(&vm.machine(), None, &neither);
    // The same pages are missing in it.
    refused(&vm.machine(), Some(&parts.destination), &neither);
    match fill(&absent, &vm.machine(), Some(&parts.destination), Lost::Poison) {
        Ok(filled) => {
            assert_eq!((filled.pages, filled.lost_pages), (0, missing));
            absent.finish().unwrap();
        }
        Err(error) => eprintln!("skipped: {error}"),
    }
}

/// Whatever is damaged: it is one line, or a part that can be read.
#[test]
fn no_damage_does_any_harm() {
    let Some(parts) = parts(Kind::Private) else { return };
    let good = fs::read(parts.destination.path()).unwrap();
    // Where there is more than pages: the beginning, and behind the pages of the last block.
    let end = good.len() - 4000;
    let damaged = parts.file("damaged");
    let mut state = 5_u64;
    let mut random = |below: usize| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        usize::try_from(state % below as u64).unwrap()
    };
    let (mut refused, mut read) = (0, 0);
    let mut pages = vec![0; PAGE * 1124];
    for turn in 0..100 {
        let mut bytes = good.clone();
        for _ in 0..1 + random(3) {
            let at = if turn % 2 == 0 { random(700) } else { end + random(4000) };
            bytes[at] = u8::try_from(random(256)).unwrap();
        }
        if turn % 10 == 9 {
            bytes.truncate(random(good.len()));
        }
        fs::write(&damaged, &bytes).unwrap();
        let outcome = Part::open(&damaged).and_then(|part| {
            (0..part.blocks().count())
                .try_for_each(|block| part.read(block, 0..part.pages(block), &mut pages))
        });
        match outcome {
            Ok(()) => read += 1,
            Err(error) => {
                refused += 1;
                assert!(!error.to_string().contains('\n'), "{error}");
            }
        }
    }
    assert!(refused > 20 && read > 20, "{refused} refused, {read} read");
}

#[test]
fn orders_are_for_who_attends() {
    let Some((_vm, absent)) = destination(Kind::Private) else { return };
    let orders = Orders::new().unwrap();
    let missing = absent.received().missing();
    let count = |absent: &AbsentRam| Ok(absent.received().missing());
    let refused = |result: Result<u64, Error>| {
        let error = result.unwrap_err().to_string();
        assert!(error.contains("nothing to be rescued"), "{error}");
    };
    refused(orders.give(count));
    let ended = Cancel::new().unwrap();
    let attending = orders.attend();
    thread::scope(|scope| {
        let gives = scope.spawn(|| {
            let found = orders.give(count);
            ended.set();
            found
        });
        assert!(!attending.until_whole(&ended, &absent), "pages are missing");
        assert_eq!(gives.join().unwrap().unwrap(), missing);
    });
    // An order that nobody comes to any more is told so.
    thread::scope(|scope| {
        let gives = scope.spawn(|| orders.give(count));
        while orders.waiting() == 0 {
            thread::yield_now();
        }
        drop(attending);
        refused(gives.join().unwrap());
    });
}
