//! One block whose pages are still arriving: what it is made of, and where to watch it.

use std::io;
use std::ops::Range;

use super::discard::{advise_huge_pages, discard};
use super::named;
use super::split::{Huge, Restoring, takes_small_pieces};
use crate::backing::Backing;
use crate::bitmap::AtomicBitmap;
use crate::uffd::{self, Span, Userfaultfd};
use crate::{BlockIndex, PageSize, RamBlock, Received, TARGET_PAGE};

/// How the pages of a block are taken out and put in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// Private anonymous memory.
    Anonymous,
    /// Shared memory in 4 KiB pages: what a file holds, mapped here page by page.
    Shared,
    /// hugetlb, shared or not.
    Huge,
}

/// A block that is watched.
#[derive(Debug)]
pub(super) struct Region {
    pub(super) kind: Kind,
    pub(super) unit: PageSize,
    pub(super) span: Span,
    /// One bit a unit: it is there, or somebody is just placing it.
    pub(super) taken: AtomicBitmap,
    /// Where its huge pages are filled in small pieces.
    pub(super) huge: Option<Huge>,
}

impl Region {
    pub(super) fn watch(
        uffd: &Userfaultfd,
        index: BlockIndex,
        block: &RamBlock,
        received: &Received,
        split: Option<&Restoring>,
    ) -> io::Result<Region> {
        let cannot = |error: io::Error| named(block, "watch", &error);
        let kind = kind(block).map_err(cannot)?;
        refuse_foreign_shared(uffd, block).map_err(cannot)?;
        advise_huge_pages(block, false);
        let missing = missing(index, block, received);
        let take_out = || discard(block, &missing);
        let huge = match split.filter(|_| takes_small_pieces(block)) {
            Some(restoring) => Some(
                take_out()
                    .and_then(|()| Huge::split(uffd, block, &missing, restoring))
                    .map_err(cannot)?,
            ),
            None => None,
        };
        let (kind, unit) = match huge {
            Some(_) => (Kind::Anonymous, TARGET_PAGE),
            None => (kind, block.host_page_size()),
        };
        let span = block.span();
        if huge.is_none() {
            uffd.register(span, modes(kind)).map_err(cannot)?;
            // Only now: what is touched from here on is told of.
            take_out().map_err(cannot)?;
        }
        let each = unit.target_pages();
        let taken = AtomicBitmap::new(block.target_pages() / each);
        taken.set(0..block.target_pages() / each);
        for run in missing {
            taken.clear(run.start / each..run.end / each);
        }
        Ok(Region { kind, unit, span, taken, huge })
    }

    /// The units of a range of bytes, if it is made of whole ones inside the block.
    pub(super) fn units(&self, offset: u64, len: u64) -> io::Result<Range<u64>> {
        let unit = self.unit.bytes() as u64;
        let inside = offset.checked_add(len).is_some_and(|end| end <= self.span.len);
        if inside && offset.is_multiple_of(unit) && len.is_multiple_of(unit) {
            return Ok(offset / unit..(offset + len) / unit);
        }
        let text = format!("{len} bytes at {offset:#x} are no whole pieces of {} there", self.unit);
        Err(io::Error::new(io::ErrorKind::InvalidInput, text))
    }

    /// The addresses of `len` bytes from `offset` on.
    pub(super) fn at(&self, offset: u64, len: u64) -> Span {
        Span { start: self.span.start + offset, len }
    }
}

fn modes(kind: Kind) -> u64 {
    match kind {
        // The page cache is not to be trusted: a huge folio holds neighbours of what arrived.
        Kind::Shared => uffd::MISSING | uffd::MINOR,
        Kind::Anonymous | Kind::Huge => uffd::MISSING,
    }
}

/// The target pages of all host pages that are missing, if only in part; forgets what was received
/// of those.
fn missing(index: BlockIndex, block: &RamBlock, received: &Received) -> Vec<Range<u64>> {
    let each = block.host_page_size().target_pages();
    let mut all = Vec::new();
    let mut from = 0;
    while let Some(run) = received.first_missing(index, from..block.target_pages()) {
        let run = run.start / each * each..run.end.div_ceil(each) * each;
        received.clear(index, run.clone());
        from = run.end;
        all.push(run);
    }
    all
}

fn kind(block: &RamBlock) -> io::Result<Kind> {
    if block.host_page_size() > TARGET_PAGE {
        return Ok(Kind::Huge);
    }
    match block.backing() {
        Backing::Anonymous | Backing::External(_) => Ok(Kind::Anonymous),
        Backing::Shared { .. } => Ok(Kind::Shared),
        Backing::PrivateFile { .. } => {
            let text = "it is a private mapping of a file (use anonymous or shared memory)";
            Err(io::Error::new(io::ErrorKind::Unsupported, text))
        }
    }
}

/// Memory the VMM has mapped itself must be anonymous: of shared memory its file would be needed.
fn refuse_foreign_shared(uffd: &Userfaultfd, block: &RamBlock) -> io::Result<()> {
    let small = block.host_page_size() == TARGET_PAGE;
    if !matches!(block.backing(), Backing::External(_)) || !small {
        return Ok(());
    }
    // Only of shared memory the kernel tells of pages that are in the page cache.
    if uffd.register(block.span(), uffd::MISSING | uffd::MINOR).is_err() {
        return Ok(());
    }
    uffd.unregister(block.span())?;
    let text = "it is shared memory without its file (make the block of the file)";
    Err(io::Error::new(io::ErrorKind::Unsupported, text))
}
