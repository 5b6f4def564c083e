//! Giving up pages of memory that nobody watches.

use std::io;
use std::ops::Range;

use super::discard::discard;
use super::named;
use crate::uffd::{self, Faults, Span, Userfaultfd, feature};
use crate::{RamBlock, TARGET_PAGE};

impl RamBlock {
    /// Gives up target pages, whole host pages of them, for lost: whatever they hold is gone, and who
    /// touches them in this process is killed (SIGBUS; a vCPU sees a machine check where its VMM passes
    /// it on). Of shared memory the file keeps what it holds.
    ///
    /// # Errors
    /// When the pages are not inside the block, or no whole host pages; before Linux 6.6, which
    /// cannot; and while [`AbsentRam`](crate::AbsentRam) watches the block.
    pub fn lose(&self, pages: Range<u64>) -> io::Result<()> {
        let cannot = |error: io::Error| named(self, "give up", &error);
        let each = self.host_page_size().target_pages();
        let whole = pages.start.is_multiple_of(each) && pages.end.is_multiple_of(each);
        if pages.start > pages.end || pages.end > self.target_pages() || !whole {
            let text = format!("pages {pages:?} are no whole host pages of it");
            return Err(cannot(io::Error::new(io::ErrorKind::InvalidInput, text)));
        }
        if pages.is_empty() {
            return Ok(());
        }
        let required = feature::POISON | feature::MISSING_SHMEM | feature::MISSING_HUGETLBFS;
        let uffd = Userfaultfd::open(Faults::AtLeastUser, required).map_err(cannot)?;
        let page = TARGET_PAGE.bytes() as u64;
        let span = Span {
            start: self.span().start + pages.start * page,
            len: (pages.end - pages.start) * page,
        };
        uffd.register(span, uffd::MISSING).map_err(cannot)?;
        let lost = discard(self, std::slice::from_ref(&pages)).and_then(|()| {
            let mut at = 0;
            while at < span.len {
                let (done, result) =
                    uffd.poison(Span { start: span.start + at, len: span.len - at });
                result?;
                at += done;
            }
            Ok(())
        });
        // What was given up stays so.
        lost.and(uffd.unregister(span)).map_err(cannot)
    }
}
