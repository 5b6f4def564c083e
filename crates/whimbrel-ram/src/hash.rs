//! Hashes of guest memory, for comparing two guests that are both stopped.
//!
//! Equal digests of two blocks say that their content is equal; if they differ, the digests of
//! their pages say where.

use std::sync::LazyLock;

use xxhash_rust::xxh3::{Xxh3, xxh3_64};

use crate::{GuestRam, RamBlock, TARGET_PAGE, TargetPage};

const PAGE: usize = TARGET_PAGE.bytes();

static ZERO_PAGE: LazyLock<u64> = LazyLock::new(|| xxh3_64(&[0; PAGE]));

/// The hash of all of a block.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BlockDigest {
    /// The block's name.
    pub name: String,
    /// How many target pages it has.
    pub pages: u64,
    /// XXH3 (128 bits) of its pages' digests, each in little-endian bytes.
    pub digest: u128,
}

impl RamBlock {
    /// XXH3 (64 bits) of each target page. Of use only while nobody writes to the block.
    pub fn page_digests(&self) -> Vec<u64> {
        self.digests().collect()
    }

    /// The hash of the whole block. Of use only while nobody writes to it.
    pub fn digest(&self) -> BlockDigest {
        let mut all = Xxh3::new();
        self.digests().for_each(|digest| all.update(&digest.to_le_bytes()));
        let (name, pages) = (self.name().to_owned(), self.target_pages());
        BlockDigest { name, pages, digest: all.digest128() }
    }

    fn digests(&self) -> impl Iterator<Item = u64> {
        let mut page = [0; PAGE];
        (0..self.target_pages()).map(TargetPage).map(move |at| {
            if self.is_zero(at) {
                return *ZERO_PAGE;
            }
            self.read(at.offset(), &mut page).expect("a page of the block");
            xxh3_64(&page)
        })
    }
}

impl GuestRam {
    /// The hash of every block, in order. Of use only while the guest is stopped.
    pub fn digest(&self) -> Vec<BlockDigest> {
        self.blocks().map(|(_, block)| block.digest()).collect()
    }
}

#[cfg(test)]
mod tests {
    use crate::{GuestRam, RamBlock};

    fn ram() -> GuestRam {
        let block = |name| RamBlock::anonymous(name, 0, 64 << 12).unwrap();
        GuestRam::new(vec![block("a"), block("b")])
    }

    #[test]
    fn a_single_bit_shows_and_its_page_is_named() {
        let (one, other) = (ram(), ram());
        for ram in [&one, &other] {
            ram.find("b").unwrap().1.write(5 * 4096 + 9, b"the same on both sides").unwrap();
        }
        assert_eq!(one.digest(), other.digest());
        other.find("b").unwrap().1.write(63 * 4096 + 4095, &[1]).unwrap();
        let (left, right) = (one.digest(), other.digest());
        assert_eq!(left[0], right[0]);
        assert_ne!(left[1], right[1]);
        assert_eq!((left[1].name.as_str(), left[1].pages), ("b", 64));
        let pages = |ram: &GuestRam| ram.find("b").unwrap().1.page_digests();
        let differing = pages(&one).iter().zip(&pages(&other)).position(|(a, b)| a != b);
        assert_eq!(differing, Some(63));
    }

    #[test]
    fn pages_that_change_places_show() {
        let (one, other) = (ram(), ram());
        one.find("a").unwrap().1.write(0, &[7; 4096]).unwrap();
        other.find("a").unwrap().1.write(4096, &[7; 4096]).unwrap();
        assert_ne!(one.digest()[0], other.digest()[0]);
    }
}
