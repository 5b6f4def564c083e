//! Who touched what is missing, and what to do when it is not.

use std::io;

use super::region::{Kind, Region};
use super::{AbsentRam, named};
use crate::uffd::{Event, Span};
use crate::{BlockIndex, TARGET_PAGE};

/// A touch of a page that was not in memory: somebody waits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fault {
    /// The block.
    pub block: BlockIndex,
    /// Where the piece to be asked for begins in it, in bytes: a multiple of its
    /// [unit](AbsentRam::unit).
    pub offset: u64,
    /// Where the 4 KiB page that was touched begins in the block, as far as the kernel tells.
    pub touched: u64,
    /// The id of the thread that waits, 0 where the kernel does not tell.
    pub thread: u32,
    /// It wants to write.
    pub write: bool,
}

impl AbsentRam {
    /// Takes all faults that wait to be read, many with one call, and appends them; waits for none.
    ///
    /// The same page comes once for every thread that touches it. It may have arrived meanwhile:
    /// [settle](AbsentRam::settle) the fault then.
    pub fn read_faults(&self, out: &mut Vec<Fault>) -> io::Result<()> {
        loop {
            let events = self.uffd.read()?;
            out.extend(events.iter().filter_map(|event| self.fault(&event)));
            if !events.is_full() {
                return Ok(());
            }
        }
    }

    fn fault(&self, event: &Event) -> Option<Fault> {
        if event.protected {
            return None;
        }
        let start = |index: &BlockIndex| self.regions[index.index()].span.start;
        let after = self.by_address.partition_point(|index| start(index) <= event.address);
        let block = *self.by_address[..after].last()?;
        let region = &self.regions[block.index()];
        let at = event.address - region.span.start;
        let down = |size: u64| at / size * size;
        (at < region.span.len).then(|| Fault {
            block,
            offset: down(region.unit.bytes() as u64),
            touched: down(TARGET_PAGE.bytes() as u64),
            thread: event.thread,
            write: event.write,
        })
    }

    /// Answers a fault on a page that has been [received](AbsentRam::received): it was zero and
    /// nobody had touched it before, it was in the page cache and not mapped, or the fault is older
    /// than the page's arrival. The page is made present, and who waits is woken.
    ///
    /// # Panics
    /// When the page has not been received: zeros would take its place.
    pub fn settle(&self, fault: &Fault) -> io::Result<()> {
        let region = &self.regions[fault.block.index()];
        let page = crate::TargetPage::containing(fault.offset);
        assert!(self.received.contains(fault.block, page), "{fault:?} is for a missing page");
        let span = region.at(fault.offset, region.unit.bytes() as u64);
        self.make_present(region, fault.offset)
            .and_then(|()| self.uffd.wake(span))
            .map_err(|error| named(self.ram.block(fault.block), "settle a fault on", &error))
    }

    /// Maps the page of a unit that has been received, or zeros where there never was one.
    fn make_present(&self, region: &Region, offset: u64) -> io::Result<()> {
        let span = region.at(offset, region.unit.bytes() as u64);
        loop {
            if region.kind == Kind::Shared {
                match self.uffd.map_cached(span).1 {
                    Err(error) if error.raw_os_error() == Some(libc::EFAULT) => {}
                    result => return or_there(result),
                }
            }
            let (done, result) = match region.kind {
                Kind::Huge => self.uffd.copy(span.start, Span::of(self.zeros.bytes(span.len))),
                Kind::Anonymous | Kind::Shared => self.uffd.zero(span),
            };
            match result {
                // In the page cache by now, but perhaps not mapped.
                Err(error) if exists(&error) && region.kind == Kind::Shared => {}
                Ok(()) if done == 0 => {}
                // A huge page that has been restored since: nobody watches it any more.
                Err(error) if restored(region, &error) => return Ok(()),
                result => return or_there(result),
            }
        }
    }
}

/// Whether the page is there already.
pub(super) fn exists(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::AlreadyExists
}

fn restored(region: &Region, error: &io::Error) -> bool {
    region.huge.is_some() && error.raw_os_error() == Some(libc::ENOENT)
}

fn or_there(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(error) if exists(&error) => Ok(()),
        result => result,
    }
}
