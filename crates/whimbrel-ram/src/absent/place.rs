//! Putting pages into their places.
#![expect(unsafe_code, reason = "maps the zeros that huge pages are filled with")]

use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::ptr::{self, NonNull};
use std::slice;

use super::fault::exists;
use super::region::{Kind, Region};
use super::{AbsentRam, named};
use crate::backing::Backing;
use crate::uffd::Span;
use crate::{BlockIndex, RamBlock, TARGET_PAGE};

/// What to put there.
#[derive(Clone, Copy)]
pub(super) enum Content<'a> {
    Bytes(&'a [u8]),
    Zeros,
}

impl AbsentRam {
    /// Places whole [units](AbsentRam::unit) that follow each other from `offset` on, and wakes who
    /// waits for them. Gives how many target pages are new; what is there already, or being placed
    /// by another thread, is left as it is.
    ///
    /// # Errors
    /// When the range is not made of whole units inside the block, or the kernel has no memory: what
    /// has been placed by then is received, the rest can be placed again.
    pub fn place(&self, block: BlockIndex, offset: u64, bytes: &[u8]) -> io::Result<u64> {
        self.put(block, offset, bytes.len() as u64, Content::Bytes(bytes))
    }

    /// As [`place`](AbsentRam::place), `len` bytes of zeros.
    pub fn place_zeros(&self, block: BlockIndex, offset: u64, len: u64) -> io::Result<u64> {
        self.put(block, offset, len, Content::Zeros)
    }

    /// Gives up whole units for lost: who touches them is killed (SIGBUS; a vCPU sees a machine
    /// check where its VMM passes it on), and stays so when the watch has ended. Those that are there
    /// stay. They count as received: nothing comes for them any more. Gives how many target pages
    /// were given up.
    ///
    /// # Errors
    /// As for `place`; before Linux 6.6, which cannot; and in a block that is
    /// [split](crate::Split::Small), whose huge pages could not be made whole again.
    pub fn poison(&self, block: BlockIndex, offset: u64, len: u64) -> io::Result<u64> {
        let named = |error| named(self.ram.block(block), "give up", &error);
        let region = &self.regions[block.index()];
        let unsupported = |text| named(io::Error::new(io::ErrorKind::Unsupported, text));
        if self.features & crate::uffd::feature::POISON == 0 {
            let text = "this kernel cannot poison them (Linux 6.6 or later can)";
            return Err(unsupported(text));
        }
        if region.huge.is_some() {
            return Err(unsupported("they are pieces of huge pages"));
        }
        let units = region.units(offset, len).map_err(named)?;
        let (unit, each) = (region.unit.bytes() as u64, region.unit.target_pages());
        let (mut from, mut lost) = (units.start, 0);
        while let Some(run) = region.taken.claim_first(from..units.end) {
            from = run.end;
            let mut at = run.start * unit;
            while at < run.end * unit {
                let (done, result) = self.uffd.poison(region.at(at, run.end * unit - at));
                lost += self.received.set_all(block, at / unit * each..(at + done) / unit * each);
                at += done;
                if let Err(error) = result {
                    region.taken.clear(at / unit..run.end);
                    return Err(named(error));
                }
            }
        }
        Ok(lost)
    }

    fn put(&self, index: BlockIndex, at: u64, len: u64, content: Content<'_>) -> io::Result<u64> {
        let region = &self.regions[index.index()];
        let block = self.ram.block(index);
        let units = region.units(at, len).map_err(|error| named(block, "place", &error))?;
        let unit = region.unit.bytes() as u64;
        let each = region.unit.target_pages();
        let (mut from, mut new) = (units.start, 0);
        while from < units.end {
            let rest = from * unit..units.end * unit;
            let whole = self.put_huge(index, region, &rest, content.part(at, &rest));
            let whole = whole.map_err(|error| named(block, "place", &error))?;
            if whole > 0 {
                new += whole;
                from += whole;
                continue;
            }
            // Up to where the next huge page begins, which may be placed as a whole.
            let end = region.huge.as_ref().map_or(units.end, |huge| huge.end_of(from));
            let end = end.min(units.end);
            let Some(run) = region.taken.claim_first(from..end) else {
                from = end;
                continue;
            };
            from = run.end;
            let bytes = run.start * unit..run.end * unit;
            let (done, result) = self.put_run(region, block, &bytes, content.part(at, &bytes));
            // The pages are there: whoever sees these bits sees them.
            let placed = run.start..run.start + done / unit;
            let pages = placed.start * each..placed.end * each;
            new += self.received.set_all(index, pages.clone());
            self.count_pieces(index, region, pages);
            if let Err(error) = result {
                region.taken.clear(placed.end..run.end);
                return Err(named(block, "place", &error));
            }
        }
        Ok(new)
    }

    /// Places a run of units that are ours to place; gives how many bytes are in their places.
    fn put_run(
        &self,
        region: &Region,
        block: &RamBlock,
        bytes: &Range<u64>,
        content: Content<'_>,
    ) -> (u64, io::Result<()>) {
        let mut at = bytes.start;
        while at < bytes.end {
            let rest = at..bytes.end;
            let span = region.at(at, bytes.end - at);
            let (done, result) = match (content.part(bytes.start, &rest), region.kind) {
                (Content::Bytes(bytes), _) => self.uffd.copy(span.start, Span::of(bytes)),
                (Content::Zeros, Kind::Huge) => {
                    let unit = self.zeros.bytes(region.unit.bytes() as u64);
                    self.uffd.copy(span.start, Span::of(unit))
                }
                (Content::Zeros, Kind::Anonymous | Kind::Shared) => self.uffd.zero(span),
            };
            at += done;
            let Err(error) = result else { continue };
            if region.kind != Kind::Shared || !exists(&error) {
                return (at - bytes.start, Err(error));
            }
            // In the page cache, by an older version or as a part of a huge folio, and mapped
            // nowhere: the others go the same way.
            let rest = at..bytes.end;
            let content = content.part(bytes.start, &rest);
            if let Err(error) = write_file(block, &rest, content, &self.zeros) {
                return (at - bytes.start, Err(error));
            }
            while at < bytes.end {
                let (done, result) = self.uffd.map_cached(region.at(at, bytes.end - at));
                at += done;
                if let Err(error) = result {
                    return (at - bytes.start, Err(error));
                }
            }
        }
        (at - bytes.start, Ok(()))
    }
}

/// Writes a part of a block of shared memory through its file.
fn write_file(
    block: &RamBlock,
    bytes: &Range<u64>,
    content: Content<'_>,
    zeros: &Zeros,
) -> io::Result<()> {
    let Backing::Shared { file, offset } = block.backing() else {
        unreachable!("only of such blocks pages are placed so")
    };
    match content {
        Content::Bytes(all) => file.write_all_at(all, offset + bytes.start),
        Content::Zeros => {
            let mut at = bytes.start;
            while at < bytes.end {
                let piece = zeros.bytes((bytes.end - at).min(zeros.len as u64));
                file.write_all_at(piece, offset + at)?;
                at += piece.len() as u64;
            }
            Ok(())
        }
    }
}

impl<'a> Content<'a> {
    /// The part of what begins at byte `start` of a block that is for `bytes` of the block.
    pub(super) fn part(self, start: u64, bytes: &Range<u64>) -> Content<'a> {
        let at = |offset: u64| usize::try_from(offset - start).expect("inside a slice");
        match self {
            Content::Bytes(all) => Content::Bytes(&all[at(bytes.start)..at(bytes.end)]),
            Content::Zeros => Content::Zeros,
        }
    }
}

/// Zeros, at least as many as the largest unit has bytes; they take no memory.
#[derive(Debug)]
pub(super) struct Zeros {
    address: NonNull<u8>,
    len: usize,
}

// SAFETY: read-only memory that nobody writes.
unsafe impl Send for Zeros {}
// SAFETY: as above.
unsafe impl Sync for Zeros {}

impl Zeros {
    pub(super) fn new(len: usize) -> io::Result<Zeros> {
        let len = len.max(64 * TARGET_PAGE.bytes());
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        // SAFETY: a fresh mapping at an address of the kernel's choice.
        let address = unsafe { libc::mmap(ptr::null_mut(), len, libc::PROT_READ, flags, -1, 0) };
        if address == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        // The kernel's huge page of zeros saves a fault for every 4 KiB of it.
        // SAFETY: advice on the mapping just made; it changes no content.
        unsafe { libc::madvise(address, len, libc::MADV_HUGEPAGE) };
        let address = NonNull::new(address.cast()).expect("mmap never gives address zero");
        Ok(Zeros { address, len })
    }

    /// `len` of them: a unit, or fewer than there are.
    pub(super) fn bytes(&self, len: u64) -> &[u8] {
        // SAFETY: mapped readable as long as `self` lives, and never written.
        let all = unsafe { slice::from_raw_parts(self.address.as_ptr(), self.len) };
        &all[..usize::try_from(len).expect("fits in memory")]
    }
}

impl Drop for Zeros {
    fn drop(&mut self) {
        // SAFETY: made in `new`, and nobody holds a pointer into it past our life.
        unsafe { libc::munmap(self.address.as_ptr().cast(), self.len) };
    }
}
