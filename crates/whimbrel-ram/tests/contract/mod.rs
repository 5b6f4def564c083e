//! What every dirty log promises, whatever it is made of.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use whimbrel_ram::dirty::{DirtyBits, DirtyLog};
use whimbrel_ram::{BlockIndex, GuestRam, TargetPage};

pub(crate) type Page = (BlockIndex, TargetPage);

/// Who writes to the memory that a log watches.
pub(crate) trait Writer: Sync {
    /// Writes to each of the pages.
    fn write(&self, pages: &[Page]);

    /// Writes to many pages, again and again, until told to stop.
    fn write_until(&self, stop: &AtomicBool);
}

/// Every `step`th page.
fn some_pages(ram: &GuestRam, step: usize) -> Vec<Page> {
    let pages = |(index, block): (BlockIndex, &whimbrel_ram::RamBlock)| {
        (0..block.target_pages()).step_by(step).map(move |page| (index, TargetPage(page)))
    };
    ram.blocks().flat_map(pages).collect()
}

/// The pages that show for a write to `pages`: whole host pages, where the log knows no smaller.
fn shown(ram: &GuestRam, pages: &[Page], whole_host_pages: bool) -> DirtyBits {
    let mut bits = DirtyBits::none(ram);
    for &(block, page) in pages {
        let each = ram.block(block).host_page_size().target_pages();
        if whole_host_pages {
            bits.insert(block, TargetPage(page.0 / each * each), each);
        } else {
            bits.insert(block, page, 1);
        }
    }
    bits
}

fn rearm_all(log: &dyn DirtyLog, ram: &GuestRam) {
    for (index, block) in ram.blocks() {
        log.rearm(index, TargetPage(0), block.target_pages()).unwrap();
    }
}

/// Takes until nothing shows any more.
fn drain(log: &dyn DirtyLog, ram: &GuestRam) {
    for _ in 0..3 {
        let _delivered = log.take().unwrap();
        rearm_all(log, ram);
    }
}

/// A write shows in the next take, once, and nothing else does.
pub(crate) fn shows_what_is_written(
    log: &dyn DirtyLog,
    ram: &GuestRam,
    writer: &dyn Writer,
    whole_host_pages: bool,
) {
    log.start().unwrap();
    drain(log, ram);
    for step in [1, 7, 64] {
        assert_eq!(log.take().unwrap().count(), 0, "nobody has written");
        let pages = some_pages(ram, step);
        writer.write(&pages);
        let taken = log.take().unwrap();
        assert_eq!(taken, shown(ram, &pages, whole_host_pages), "step {step}");
        rearm_all(log, ram);
    }
    log.stop();
}

/// Watching again what was taken forgets nothing that was written since to other pages.
pub(crate) fn keeps_what_is_written_before_rearm(
    log: &dyn DirtyLog,
    ram: &GuestRam,
    writer: &dyn Writer,
) {
    log.start().unwrap();
    drain(log, ram);
    let (even, odd): (Vec<_>, Vec<_>) =
        some_pages(ram, 1).into_iter().partition(|(_, page)| page.0 % 2 == 0);
    writer.write(&even);
    let taken = log.take().unwrap();
    writer.write(&odd);
    rearm_all(log, ram);
    let later = log.take().unwrap();
    for (block, page) in odd {
        assert!(taken.contains(block, page) || later.contains(block, page), "{block:?} {page:?}");
    }
    log.stop();
}

/// What was taken and not delivered comes again, also in the next migration.
pub(crate) fn gives_again_what_was_put_back(
    log: &dyn DirtyLog,
    ram: &GuestRam,
    writer: &dyn Writer,
) {
    log.start().unwrap();
    drain(log, ram);
    let pages = some_pages(ram, 5);
    writer.write(&pages);
    let taken = log.take().unwrap();
    assert!(pages.iter().all(|&(block, page)| taken.contains(block, page)));
    log.put_back(taken.clone());
    rearm_all(log, ram);
    assert_eq!(log.take().unwrap(), taken, "put back, taken again");
    assert_eq!(log.take().unwrap().count(), 0, "once");
    log.put_back(taken.clone());
    log.stop();
    log.start().unwrap();
    let again = log.take().unwrap();
    assert!(pages.iter().all(|&(block, page)| again.contains(block, page)));
    log.stop();
}

/// A log that was stopped starts again, and shows what is written then.
pub(crate) fn starts_again(log: &dyn DirtyLog, ram: &GuestRam, writer: &dyn Writer) {
    for _ in 0..2 {
        log.start().unwrap();
        drain(log, ram);
        let pages = some_pages(ram, 3);
        writer.write(&pages);
        let taken = log.take().unwrap();
        assert!(pages.iter().all(|&(block, page)| taken.contains(block, page)));
        log.stop();
    }
    assert_eq!(log.take().unwrap().count(), 0, "a stopped log knows nothing");
}

/// Precopy in the small, several times: while the writer writes, dirty pages are copied; when it
/// has stopped, what is still dirty is copied, and the copy is the memory. A lost write shows only
/// if nobody writes to the same page later, so the end of each time counts most.
pub(crate) fn loses_no_write(
    log: &dyn DirtyLog,
    ram: &GuestRam,
    writer: &dyn Writer,
    how_long: Duration,
) {
    for _ in 0..3 {
        log.start().unwrap();
        let mut copy: Vec<Vec<u8>> =
            ram.blocks().map(|(_, b)| vec![0; usize::try_from(b.len()).unwrap()]).collect();
        let mut everything = DirtyBits::none(ram);
        for (index, block) in ram.blocks() {
            everything.insert(index, TargetPage(0), block.target_pages());
        }
        copy_pages(log, ram, &everything, &mut copy);
        copy_while_written(log, ram, writer, how_long / 3, &mut copy);
        let last = log.take().unwrap();
        copy_pages(log, ram, &last, &mut copy);
        assert_is_copied(ram, &copy);
        log.stop();
    }
}

fn copy_while_written(
    log: &dyn DirtyLog,
    ram: &GuestRam,
    writer: &dyn Writer,
    how_long: Duration,
    copy: &mut [Vec<u8>],
) {
    let stop = AtomicBool::new(false);
    let end = Instant::now() + how_long;
    let mut pages = 0;
    std::thread::scope(|scope| {
        scope.spawn(|| writer.write_until(&stop));
        while Instant::now() < end || pages == 0 {
            let taken = log.take().unwrap();
            pages += taken.count();
            copy_pages(log, ram, &taken, copy);
        }
        stop.store(true, Ordering::Relaxed);
    });
}

fn assert_is_copied(ram: &GuestRam, copy: &[Vec<u8>]) {
    for (index, block) in ram.blocks() {
        let mut now = [0; 4096];
        for page in 0..block.target_pages() {
            block.read(TargetPage(page).offset(), &mut now).unwrap();
            let at = usize::try_from(page).unwrap() * 4096;
            assert!(copy[index.index()][at..at + 4096] == now, "page {page} of {}", block.name());
        }
    }
}

fn copy_pages(log: &dyn DirtyLog, ram: &GuestRam, bits: &DirtyBits, copy: &mut [Vec<u8>]) {
    for (index, block) in ram.blocks() {
        for page in 0..block.target_pages() {
            if bits.contains(index, TargetPage(page)) {
                log.rearm(index, TargetPage(page), 1).unwrap();
                let at = usize::try_from(page).unwrap() * 4096;
                let to = &mut copy[index.index()][at..at + 4096];
                block.read(TargetPage(page).offset(), to).unwrap();
            }
        }
    }
}
