//! The dirty logs that need no KVM, held to the contract of all dirty logs.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod contract;

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use contract::{Page, Writer};
use whimbrel_ram::dirty::{DirtyBits, DirtyLog, OwnWrites, PagemapScan, Union};
use whimbrel_ram::{BlockIndex, GuestRam, PageSize, RamBlock, Sharing, TargetPage};

/// Threads of this process write.
struct Native<'r> {
    ram: &'r GuestRam,
    count: AtomicU64,
    /// Where they say so, if the log does not see it by itself.
    own: Option<&'r OwnWrites>,
}

impl Native<'_> {
    fn store(&self, block: BlockIndex, at: u64, value: u64) {
        self.ram.block(block).store_u64(at, value).unwrap();
        if let Some(own) = self.own {
            own.note(block, at, 8);
        }
    }
}

impl Writer for Native<'_> {
    fn write(&self, pages: &[Page]) {
        for &(block, page) in pages {
            let value = self.count.fetch_add(1, Ordering::Relaxed);
            let at = page.offset() + value % 512 * 8;
            self.store(block, at, value);
        }
    }

    fn write_until(&self, stop: &AtomicBool) {
        let write = |seed: u64| {
            let mut random = seed;
            while !stop.load(Ordering::Relaxed) {
                for (index, block) in self.ram.blocks() {
                    random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(seed);
                    let at = (random >> 16) % (block.len() / 8) * 8;
                    self.store(index, at, random);
                }
            }
        };
        std::thread::scope(|scope| {
            scope.spawn(|| write(3));
            write(5);
        });
    }
}

/// Whether this kernel has what the log needs; says so if not.
fn available(log: &dyn DirtyLog) -> bool {
    match log.start() {
        Ok(()) => true,
        Err(error) => {
            eprintln!("skipped: {error}");
            false
        }
    }
}

fn pagemap_scan_keeps_the_contract(blocks: Vec<RamBlock>, populated: bool) {
    let ram = GuestRam::new(blocks);
    let log = PagemapScan::new(&ram);
    let writer = Native { ram: &ram, count: AtomicU64::new(1), own: None };
    if !available(&log) {
        return;
    }
    if populated {
        ram.blocks().for_each(|(_, block)| block.populate(0, block.len()).unwrap());
    }
    contract::shows_what_is_written(&log, &ram, &writer, true);
    contract::keeps_what_is_written_before_rearm(&log, &ram, &writer);
    contract::gives_again_what_was_put_back(&log, &ram, &writer);
    contract::starts_again(&log, &ram, &writer);
    contract::loses_no_write(&log, &ram, &writer, Duration::from_millis(500));
}

#[test]
fn pagemap_scan_of_anonymous_memory() {
    for populated in [false, true] {
        let small = RamBlock::anonymous("small", 0, 300 << 12).unwrap();
        let huge_folios = RamBlock::anonymous("large", 0, 8 << 20).unwrap();
        pagemap_scan_keeps_the_contract(vec![small, huge_folios], populated);
    }
}

#[test]
fn pagemap_scan_of_memfds() {
    for sharing in [Sharing::Shared, Sharing::Private] {
        let block = RamBlock::memfd("ram", 0, 4 << 20, PageSize::SIZE_4K, sharing).unwrap();
        pagemap_scan_keeps_the_contract(vec![block], false);
    }
}

#[test]
fn pagemap_scan_of_huge_pages() {
    for sharing in [Sharing::Shared, Sharing::Private] {
        match RamBlock::memfd("ram", 0, 8 << 20, PageSize::SIZE_2M, sharing) {
            Ok(block) => pagemap_scan_keeps_the_contract(vec![block], false),
            Err(error) => eprintln!("skipped: {error}"),
        }
    }
}

#[test]
fn reading_what_was_never_touched_is_no_write() -> io::Result<()> {
    let ram = GuestRam::new(vec![RamBlock::anonymous("ram", 0, 1 << 20).unwrap()]);
    let log = PagemapScan::new(&ram);
    if !available(&log) {
        return Ok(());
    }
    for page in 0..256 {
        assert!(ram.find("ram").unwrap().1.is_zero(TargetPage(page)));
    }
    assert_eq!(log.take()?.count(), 0);
    Ok(())
}

#[test]
fn own_writes_alone_and_in_a_union() {
    let blocks = [("a", 130u64 << 12), ("b", 4 << 20)];
    let blocks = blocks.map(|(name, len)| RamBlock::anonymous(name, 0, len).unwrap());
    let ram = GuestRam::new(blocks.into());
    let own = Arc::new(OwnWrites::new(&ram));
    let other = Arc::new(OwnWrites::new(&ram));
    let union = Union::new(&ram, vec![own.clone(), other]);
    for log in [&*own as &dyn DirtyLog, &union] {
        let writer = Native { ram: &ram, count: AtomicU64::new(1), own: Some(&own) };
        contract::shows_what_is_written(log, &ram, &writer, false);
        contract::keeps_what_is_written_before_rearm(log, &ram, &writer);
        contract::gives_again_what_was_put_back(log, &ram, &writer);
        contract::starts_again(log, &ram, &writer);
        contract::loses_no_write(log, &ram, &writer, Duration::from_millis(300));
    }
}

#[test]
fn a_note_covers_every_page_it_touches() {
    let ram = GuestRam::new(vec![RamBlock::anonymous("ram", 0, 200 << 12).unwrap()]);
    let own = OwnWrites::new(&ram);
    for (offset, len, first, pages) in [
        (0, 1, 0, 1),
        (4095, 2, 0, 2),
        (4096, 4096, 1, 1),
        (5, 0, 0, 0),
        (63 << 12, 137 << 12, 63, 137),
    ] {
        own.note(BlockIndex(0), offset, len);
        let mut expected = DirtyBits::none(&ram);
        expected.insert(BlockIndex(0), TargetPage(first), pages);
        assert_eq!(own.take().unwrap(), expected, "{len} bytes at {offset}");
    }
}

/// A log that knows nothing, and cannot say so the first time.
struct FailsOnce {
    ram: GuestRam,
    failed: AtomicBool,
}

impl DirtyLog for FailsOnce {
    fn start(&self) -> io::Result<()> {
        Ok(())
    }

    fn take(&self) -> io::Result<DirtyBits> {
        if self.failed.swap(true, Ordering::Relaxed) {
            Ok(DirtyBits::none(&self.ram))
        } else {
            Err(io::Error::other("the log is out of order"))
        }
    }

    fn put_back(&self, _bits: DirtyBits) {}

    fn rearm(&self, _block: BlockIndex, _first: TargetPage, _count: u64) -> io::Result<()> {
        Ok(())
    }

    fn stop(&self) {}
}

#[test]
fn a_union_loses_nothing_when_one_of_its_logs_fails() {
    let ram = GuestRam::new(vec![RamBlock::anonymous("ram", 0, 64 << 12).unwrap()]);
    let own = Arc::new(OwnWrites::new(&ram));
    let fails = Arc::new(FailsOnce { ram: ram.clone(), failed: AtomicBool::new(false) });
    let union = Union::new(&ram, vec![own.clone(), fails]);
    own.note(BlockIndex(0), 3 << 12, 1);
    assert_eq!(union.take().unwrap_err().to_string(), "the log is out of order");
    assert!(union.take().unwrap().contains(BlockIndex(0), TargetPage(3)));
}
