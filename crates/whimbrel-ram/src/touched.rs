//! Which pages have ever been touched: the others are zero, and need not be read to know it.

use std::io;

use crate::backing::Backing;
use crate::dirty::DirtyBits;
use crate::pagemap::{Pagemap, Query, category};
use crate::{GuestRam, TargetPage};

impl GuestRam {
    /// The pages that may hold something else than zeros. A page that is not among them was zero
    /// when this was called; of a running guest's, a dirty log that was started before tells
    /// whether it still is.
    ///
    /// Reading a page that was never touched makes the kernel map its page of zeros there, one
    /// fault for each, which costs many times what sending a zero page does. Only private
    /// anonymous memory is known so well; of other backings all pages are given, and of memory that
    /// a [`PagemapScan`](crate::dirty::PagemapScan) watches, all that it has put its markers into.
    ///
    /// # Errors
    /// What the kernel says that cannot tell (before Linux 6.7).
    pub fn touched(&self) -> io::Result<DirtyBits> {
        let mut touched = DirtyBits::none(self);
        let pagemap = Pagemap::open()?;
        for (index, block) in self.blocks() {
            if !matches!(block.backing(), Backing::Anonymous) {
                touched.insert(index, TargetPage(0), block.target_pages());
                continue;
            }
            let query = Query {
                any_of: category::PRESENT | category::SWAPPED,
                tell: category::PRESENT | category::SWAPPED | category::PFNZERO,
                ..Query::default()
            };
            pagemap.scan(block, query, |first, count, categories| {
                let has = |category| categories & category != 0;
                // "Swapped" is also what a page looks like that the kernel is just moving elsewhere:
                // never to be taken for a marker of userfaultfd's in the place of no page.
                if has(category::SWAPPED) || !has(category::PFNZERO) {
                    touched.insert(index, first, count);
                }
            })?;
        }
        Ok(touched)
    }
}

#[cfg(test)]
mod tests {
    use crate::dirty::{DirtyLog, PagemapScan};
    use crate::{BlockIndex, GuestRam, PageSize, RamBlock, Sharing, TargetPage};

    #[test]
    fn what_was_written_is_touched_and_what_was_read_is_not() {
        for watched in [false, true] {
            let anonymous = RamBlock::anonymous("a", 0, 8 << 20).unwrap();
            let size = PageSize::SIZE_4K;
            let memfd = RamBlock::memfd("m", 0, 1 << 20, size, Sharing::Shared).unwrap();
            let ram = GuestRam::new(vec![anonymous, memfd]);
            let block = ram.block(BlockIndex(0));
            block.write(5 << 20, &[1]).unwrap();
            block.read(1 << 20, &mut [0]).unwrap();
            let log = PagemapScan::new(&ram);
            if watched && let Err(error) = log.start() {
                println!("skipped with write protection: {error}");
                continue;
            }
            let touched = match ram.touched() {
                Ok(touched) => touched,
                Err(error) => return println!("skipped: {error}"),
            };
            let has = |offset| touched.contains(BlockIndex(0), TargetPage::containing(offset));
            assert!(has(5 << 20), "written");
            if !watched {
                assert!(!has(1 << 20), "read only");
                assert!(!has(7 << 20), "never touched");
            }
            assert!(touched.contains(BlockIndex(1), TargetPage(0)), "shared memory is not known");
            block.write(7 << 20, &[1]).unwrap();
            let page = TargetPage::containing(7 << 20);
            assert!(ram.touched().unwrap().contains(BlockIndex(0), page));
        }
    }
}
