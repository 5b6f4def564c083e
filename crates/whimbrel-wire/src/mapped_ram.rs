//! Mapped RAM: a stream in a file, where every page has a fixed place.
//!
//! Each block's record in the setup is followed by a bitmap of the pages that are not zero, a
//! hole up to a round offset, and the pages themselves. All offsets are absolute in the file.

use alloc::vec::Vec;

use crate::cursor::{Cursor, Stop, bad};
use crate::page_bitmap::bitmap_len;
use crate::{BlockOffset, ErrorKind, Name, TargetPage};

/// Where one block's bitmap and pages are in the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MappedRamHeader {
    /// Size of the pages that the bitmap counts, in bytes.
    pub page_size: u64,
    /// Offset of the bitmap in the file.
    pub bitmap_offset: u64,
    /// Offset of the block's page 0 in the file.
    pub pages_offset: u64,
}

impl MappedRamHeader {
    /// Bytes of the header.
    pub const LEN: u64 = 28;
    /// The one version there is.
    pub const VERSION: u32 = 1;
    /// Page areas begin at multiples of 1 MiB, which any direct I/O can address.
    pub const ALIGNMENT: u64 = 1 << 20;

    /// The layout QEMU gives a block whose header begins at `header_offset` of the file.
    /// `None` when the file would be longer than 2^64 bytes.
    #[must_use]
    pub fn place(header_offset: u64, used_length: u64, page: TargetPage) -> Option<Self> {
        let bitmap_offset = header_offset.checked_add(Self::LEN)?;
        let bitmap_end = bitmap_offset.checked_add(bitmap_len(used_length, page))?;
        let pages_offset = bitmap_end.checked_next_multiple_of(Self::ALIGNMENT)?;
        pages_offset.checked_add(used_length)?;
        Some(Self { page_size: page.size(), bitmap_offset, pages_offset })
    }

    /// Offset in the file of a page of the block, which must lie inside the block.
    #[must_use]
    pub const fn page_offset(&self, at: BlockOffset) -> u64 {
        self.pages_offset + at.0
    }

    /// Offset in the file of what follows this block's pages.
    #[must_use]
    pub const fn end(&self, used_length: u64) -> u64 {
        self.pages_offset + used_length
    }

    /// Appends the header.
    pub fn encode(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&Self::VERSION.to_be_bytes());
        out.extend_from_slice(&self.page_size.to_be_bytes());
        out.extend_from_slice(&self.bitmap_offset.to_be_bytes());
        out.extend_from_slice(&self.pages_offset.to_be_bytes());
    }

    /// Reads the header of a block; `base` is the file offset of the cursor's start.
    pub(crate) fn parse(
        cursor: &mut Cursor<'_>,
        base: u64,
        (name, used_length): (&Name, u64),
        page: TargetPage,
    ) -> Result<Self, Stop> {
        let at = cursor.at();
        let found = cursor.be32()?;
        if found != Self::VERSION {
            let what = "mapped-ram";
            return bad(at, ErrorKind::Version { what, expected: Self::VERSION, found });
        }
        let at = cursor.at();
        let header = Self {
            page_size: cursor.be64()?,
            bitmap_offset: cursor.be64()?,
            pages_offset: cursor.be64()?,
        };
        let here = base.saturating_add(cursor.at() as u64);
        let field = |expected, found| ErrorKind::BlockField { name: name.clone(), expected, found };
        if header.page_size != page.size() {
            return bad(at, field("the guest's page size", header.page_size));
        }
        if header.bitmap_offset < here {
            let expected = "a bitmap after the header";
            return bad(at + 8, field(expected, header.bitmap_offset));
        }
        let bitmap_end = header.bitmap_offset.checked_add(bitmap_len(used_length, page));
        let pages_fit = header.pages_offset.checked_add(used_length).is_some();
        if bitmap_end.is_none_or(|end| end > header.pages_offset) || !pages_fit {
            let expected = "pages after the bitmap, inside the file";
            return bad(at + 16, field(expected, header.pages_offset));
        }
        if !page.divides(header.pages_offset) {
            let expected = "pages at a multiple of the page size";
            return bad(at + 16, field(expected, header.pages_offset));
        }
        Ok(header)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_blocks_as_qemu_does() {
        let header = MappedRamHeader::place(0x6f, 8 << 20, TargetPage::FOUR_KIB).unwrap();
        assert_eq!(header.bitmap_offset, 0x8b);
        assert_eq!(header.pages_offset, 0x10_0000);
        assert_eq!(header.end(8 << 20), 0x90_0000);
        assert_eq!(header.page_offset(BlockOffset(0x2000)), 0x10_2000);
        assert_eq!(MappedRamHeader::place(u64::MAX, 4096, TargetPage::FOUR_KIB), None);
    }
}
