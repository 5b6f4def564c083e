//! The dirty logs that need no KVM, held to the contract of all dirty logs.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod contract;

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use contract::{Page, Writer};
use whimbrel_ram::dirty::{DirtyLog, PagemapScan};
use whimbrel_ram::{GuestRam, PageSize, RamBlock, Sharing};

/// Threads of this process write.
struct Native<'r> {
    ram: &'r GuestRam,
    count: AtomicU64,
}

impl Writer for Native<'_> {
    fn write(&self, pages: &[Page]) {
        for &(block, page) in pages {
            let value = self.count.fetch_add(1, Ordering::Relaxed);
            let at = page.offset() + value % 512 * 8;
            self.ram.block(block).store_u64(at, value).unwrap();
        }
    }

    fn write_until(&self, stop: &AtomicBool) {
        let write = |seed: u64| {
            let mut random = seed;
            while !stop.load(Ordering::Relaxed) {
                for (_, block) in self.ram.blocks() {
                    random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(seed);
                    let at = (random >> 16) % (block.len() / 8) * 8;
                    block.store_u64(at, random).unwrap();
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
    let writer = Native { ram: &ram, count: AtomicU64::new(1) };
    if !available(&log) {
        return;
    }
    if populated {
        ram.blocks().for_each(|(_, block)| block.populate(0, block.len()).unwrap());
    }
    contract::shows_what_is_written(&log, &ram, &writer, true);
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
        assert!(ram.find("ram").unwrap().1.is_zero(whimbrel_ram::TargetPage(page)));
    }
    assert_eq!(log.take()?.count(), 0);
    Ok(())
}
