//! A RAM block of a kept VM: which of its pages are in the file, by its bitmap.

use std::io::Write;

use whimbrel_wire::{BlockInfo, BlockOffset, MappedRamHeader, TargetPage, page_bitmap};

use super::feed::Fault;
use super::pages::PageList;

/// Counts the pages of a bitmap that comes in pieces.
#[derive(Debug)]
pub(super) struct Bitmap<'b> {
    info: &'b BlockInfo,
    places: MappedRamHeader,
    page: TargetPage,
    /// The number of the next page.
    next: u64,
    /// Pages that are in the file.
    pub(super) present: u64,
    /// The first page that the block does not have.
    beyond: Option<u64>,
}

impl<'b> Bitmap<'b> {
    /// The bitmap of a block with its places in the file.
    pub(super) const fn new(
        info: &'b BlockInfo,
        places: MappedRamHeader,
        page: TargetPage,
    ) -> Bitmap<'b> {
        Bitmap { info, places, page, next: 0, present: 0, beyond: None }
    }

    /// Its length in bytes.
    pub(super) const fn len(&self) -> u64 {
        page_bitmap::bitmap_len(self.info.used_length, self.page)
    }

    /// Takes the next bytes of it.
    pub(super) fn piece<W: Write>(&mut self, bytes: &[u8], pages: &mut PageList<W>) {
        let bits = 8 * bytes.len() as u64;
        let inside = (self.info.used_length / self.page.size()).saturating_sub(self.next);
        self.present += bytes.iter().map(|byte| u64::from(byte.count_ones())).sum::<u64>();
        let padding = inside.min(bits)..bits;
        for bit in padding.filter(|bit| page_bitmap::is_set(bytes, *bit)) {
            self.present -= 1;
            self.beyond.get_or_insert(self.next + bit);
        }
        if !pages.is_quiet() {
            let set = (0..inside.min(bits)).filter(|bit| page_bitmap::is_set(bytes, *bit));
            for offset in set.map(|bit| BlockOffset((self.next + bit) * self.page.size())) {
                let place = self.places.page_offset(offset);
                pages.add("normal", (&self.info.name, offset, self.page.size()), place);
            }
        }
        self.next += bits;
    }

    /// Whether all of its pages are the block's.
    pub(super) fn check(&self) -> Result<(), Fault> {
        let Some(found) = self.beyond else { return Ok(()) };
        let (name, count) = (&self.info.name, self.info.used_length / self.page.size());
        Err(Fault {
            offset: self.places.bitmap_offset + found / 8,
            message: format!(
                "RAM block \"{name}\": expected a bitmap of its {count} pages, found page {found}"
            ),
        })
    }
}
