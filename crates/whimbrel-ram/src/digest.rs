//! Comparing RAM in two processes: by a hash for each page, without moving it.

use std::sync::LazyLock;

use xxhash_rust::xxh3::{Xxh3, xxh3_64};

use crate::{GuestRam, RamBlock, TARGET_PAGE, TargetPage};

static ZERO_PAGE: LazyLock<u64> = LazyLock::new(|| xxh3_64(&[0; TARGET_PAGE.bytes()]));

/// The content of one block at one moment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BlockDigest {
    /// The block.
    pub name: String,
    /// How many target pages it has.
    pub pages: u64,
    /// A hash over the hashes of its pages, in order.
    pub digest: u64,
}

impl RamBlock {
    /// The hash of one page's content (XXH3, 64 bit). Only while the guest stands still does it
    /// mean anything.
    ///
    /// # Panics
    /// When the page is outside the block.
    pub fn page_digest(&self, page: TargetPage) -> u64 {
        if self.is_zero(page) {
            return *ZERO_PAGE;
        }
        let mut content = [0; TARGET_PAGE.bytes()];
        self.read(page.offset(), &mut content).expect("a page of this block");
        xxh3_64(&content)
    }

    /// The hash of each of its pages, in order.
    pub fn page_digests(&self) -> impl Iterator<Item = u64> {
        (0..self.target_pages()).map(|page| self.page_digest(TargetPage(page)))
    }

    /// The hash of all its pages' hashes.
    pub fn digest(&self) -> BlockDigest {
        let mut all = Xxh3::new();
        self.page_digests().for_each(|digest| all.update(&digest.to_le_bytes()));
        let name = self.name().to_owned();
        BlockDigest { name, pages: self.target_pages(), digest: all.digest() }
    }
}

impl GuestRam {
    /// The digests of all blocks, in order; equal on both sides exactly when (but for a chance of
    /// 1 in 2^64) every byte is. Only while the guest stands still.
    pub fn digest(&self) -> Vec<BlockDigest> {
        self.blocks().map(|(_, block)| block.digest()).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_byte_in_one_page_changes_it() {
        let block = || RamBlock::anonymous("ram", 0, 64 << 10).unwrap();
        let (one, other) = (GuestRam::new(vec![block()]), GuestRam::new(vec![block()]));
        assert_eq!(one.digest(), other.digest());
        let (index, block) = other.find("ram").unwrap();
        block.write(9 * 4096 + 17, &[1]).unwrap();
        assert_ne!(one.digest(), other.digest());
        let pages = one.block(index).page_digests().zip(other.block(index).page_digests());
        let differ = pages.enumerate().filter(|(_, (one, other))| one != other);
        assert_eq!(differ.map(|(page, _)| page).collect::<Vec<_>>(), [9]);
    }

    #[test]
    fn pages_that_change_places_show() {
        let block = |at| {
            let block = RamBlock::anonymous("ram", 0, 64 << 10).unwrap();
            block.write(at, &[7; 4096]).unwrap();
            block.digest()
        };
        assert_eq!(block(0), block(0));
        assert_ne!(block(0), block(4096));
    }
}
