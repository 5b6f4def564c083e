//! Names for places in guest RAM, so that no signature takes a bare number.

use std::fmt;
use std::ops::Range;

/// The target page: the unit of the migration protocol, 4 KiB on every guest whimbrel moves.
pub const TARGET_PAGE: PageSize = PageSize(4096);

/// The size of a page in bytes: a power of two, 4 KiB at least.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PageSize(usize);

impl PageSize {
    /// 4 KiB.
    pub const SIZE_4K: PageSize = PageSize(4 << 10);
    /// 2 MiB.
    pub const SIZE_2M: PageSize = PageSize(2 << 20);
    /// 1 GiB.
    pub const SIZE_1G: PageSize = PageSize(1 << 30);

    /// A page size of `bytes`; `None` unless that is a power of two of 4096 or more.
    pub const fn new(bytes: usize) -> Option<PageSize> {
        if bytes.is_power_of_two() && bytes >= 4096 { Some(PageSize(bytes)) } else { None }
    }

    /// In bytes.
    pub const fn bytes(self) -> usize {
        self.0
    }

    /// How many target pages one page of this size holds.
    pub const fn target_pages(self) -> u64 {
        (self.0 / TARGET_PAGE.0) as u64
    }
}

impl fmt::Display for PageSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            b if b >= 1 << 30 => write!(f, "{}G", b >> 30),
            b if b >= 1 << 20 => write!(f, "{}M", b >> 20),
            b => write!(f, "{}k", b >> 10),
        }
    }
}

impl fmt::Debug for PageSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Which block of a [`GuestRam`](crate::GuestRam), in the order in which they are announced.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BlockIndex(pub u16);

impl BlockIndex {
    /// As an index into a slice with one entry a block.
    pub const fn index(self) -> usize {
        self.0 as usize
    }
}

/// The number of a target page inside its block, counted from the block's first byte.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TargetPage(pub u64);

impl TargetPage {
    /// Where the page begins, in bytes from the start of the block.
    pub const fn offset(self) -> u64 {
        self.0 * TARGET_PAGE.0 as u64
    }

    /// The page that holds byte `offset` of the block.
    pub const fn containing(offset: u64) -> TargetPage {
        TargetPage(offset / TARGET_PAGE.0 as u64)
    }
}

/// A host page: the unit of a block's backing (4 KiB, 2 MiB or 1 GiB), counted in its own size
/// from the start of the block. The unit of ownership, and of placing in postcopy.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct HostPage {
    /// The block.
    pub block: BlockIndex,
    /// Counted in the block's host pages.
    pub number: u64,
}

impl HostPage {
    /// The target pages inside, when the block's host pages are of `size`.
    pub fn target_pages(self, size: PageSize) -> Range<u64> {
        let each = size.target_pages();
        self.number * each..(self.number + 1) * each
    }
}
