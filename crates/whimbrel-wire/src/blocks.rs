//! The list of RAM blocks: what the `ram` section is about, announced when it starts.

use alloc::collections::BTreeMap;
use alloc::vec::Vec;
use core::fmt;

use crate::cursor::{Cursor, Stop, bad};
use crate::record::flag;
use crate::{ErrorKind, MappedRamHeader, Name, TargetPage};

/// Most blocks that are taken from a peer. QEMU makes one per memory backend, ROM and device BAR.
pub const BLOCKS_MAX: usize = 4096;

/// Largest page size of a block's backing that is believed: 1 TiB, far above any hardware.
const PAGE_SIZE_MAX: u64 = 1 << 40;

/// A block's place in the announced list: small, and valid only for that list.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BlockIndex(u16);

impl BlockIndex {
    /// The place in the list, counted from 0.
    #[must_use]
    pub fn get(self) -> usize {
        self.0.into()
    }
}

impl fmt::Display for BlockIndex {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// One block as the setup announces it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BlockInfo {
    /// The name by which records and requests refer to it.
    pub name: Name,
    /// Bytes of it in use; a multiple of the target page.
    pub used_length: u64,
    /// Page size of its backing, sent only when a postcopy may follow and only if it is not the
    /// ordinary one.
    pub page_size: Option<u64>,
    /// Guest physical address, sent only under `x-ignore-shared`.
    pub guest_address: Option<u64>,
    /// Places in the file, only under `mapped-ram`.
    pub mapped_ram: Option<MappedRamHeader>,
}

impl BlockInfo {
    /// A block with none of the optional fields.
    #[must_use]
    pub const fn new(name: Name, used_length: u64) -> Self {
        Self { name, used_length, page_size: None, guest_address: None, mapped_ram: None }
    }

    /// Appends the block's entry in the setup.
    pub fn encode(&self, out: &mut Vec<u8>) {
        self.name.encode(out);
        out.extend_from_slice(&self.used_length.to_be_bytes());
        for field in [self.page_size, self.guest_address].into_iter().flatten() {
            out.extend_from_slice(&field.to_be_bytes());
        }
        if let Some(header) = &self.mapped_ram {
            header.encode(out);
        }
    }
}

/// All blocks, in the order announced.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct BlockList {
    blocks: Vec<BlockInfo>,
    by_name: BTreeMap<Name, BlockIndex>,
}

impl BlockList {
    /// Makes a list.
    ///
    /// # Errors
    /// When a name comes twice or there are more than [`BLOCKS_MAX`].
    pub fn new(blocks: impl IntoIterator<Item = BlockInfo>) -> Result<Self, ErrorKind> {
        let mut list = Self::default();
        for block in blocks {
            list.push(block)?;
        }
        Ok(list)
    }

    pub(crate) fn push(&mut self, block: BlockInfo) -> Result<BlockIndex, ErrorKind> {
        let index = match u16::try_from(self.blocks.len()) {
            Ok(index) if self.blocks.len() < BLOCKS_MAX => BlockIndex(index),
            Ok(_) | Err(_) => {
                let limit = BLOCKS_MAX as u64;
                return Err(ErrorKind::TooLarge { what: "RAM blocks", found: limit + 1, limit });
            }
        };
        if self.by_name.contains_key(&block.name) {
            return Err(ErrorKind::DuplicateBlock { name: block.name });
        }
        self.by_name.insert(block.name.clone(), index);
        self.blocks.push(block);
        Ok(index)
    }

    /// The block with an index; `None` for an index of another, longer list.
    #[must_use]
    pub fn get(&self, index: BlockIndex) -> Option<&BlockInfo> {
        self.blocks.get(index.get())
    }

    /// The block with a name.
    #[must_use]
    pub fn find(&self, name: &[u8]) -> Option<BlockIndex> {
        self.by_name.get(name).copied()
    }

    /// How many blocks there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.blocks.len()
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.blocks.is_empty()
    }

    /// The blocks in the order announced, with their indices.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = (BlockIndex, &BlockInfo)> {
        self.blocks.iter().enumerate().map(|(place, block)| {
            // `push` keeps the list within 16 bits.
            (BlockIndex(u16::try_from(place).unwrap_or(u16::MAX)), block)
        })
    }

    /// Sum of all used lengths in bytes.
    #[must_use]
    pub fn total(&self) -> u64 {
        self.blocks.iter().fold(0, |sum, block| sum.saturating_add(block.used_length))
    }

    /// Appends the word that opens the setup.
    pub fn encode_total(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&(self.total() | flag::MEM_SIZE).to_be_bytes());
    }

    /// Appends the whole list. With mapped RAM the entries are apart in the file: use
    /// [`encode_total`](Self::encode_total) and [`BlockInfo::encode`] there.
    pub fn encode(&self, out: &mut Vec<u8>) {
        self.encode_total(out);
        self.blocks.iter().for_each(|block| block.encode(out));
    }
}

/// Which optional fields the entries have; the configuration and the commands before tell.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct EntryFields {
    /// POSTCOPY_ADVISE was sent: an entry may have a page size.
    pub(crate) page_size: bool,
    /// `x-ignore-shared`: every entry has an address.
    pub(crate) guest_address: bool,
    /// `mapped-ram`: every entry has a header.
    pub(crate) mapped_ram: bool,
}

/// Reading of the setup, one entry at a time.
#[derive(Debug)]
pub(crate) struct Setup {
    pub(crate) list: BlockList,
    total: u64,
    sum: u64,
    fields: EntryFields,
    page: TargetPage,
}

impl Setup {
    /// Reads the word that opens the setup.
    pub(crate) fn parse(
        cursor: &mut Cursor<'_>,
        fields: EntryFields,
        page: TargetPage,
    ) -> Result<Self, Stop> {
        let at = cursor.at();
        let word = cursor.be64()?;
        let flags = word & page.mask();
        if flags != flag::MEM_SIZE {
            return bad(at, ErrorKind::RecordFlags { expected: "the RAM block list", flags });
        }
        let list = BlockList::default();
        Ok(Self { list, total: word & !page.mask(), sum: 0, fields, page })
    }

    pub(crate) const fn is_complete(&self) -> bool {
        self.sum == self.total
    }

    /// The entry just read, if it has places in a file, and how many bytes lie between `here`
    /// and the end of its pages.
    pub(crate) fn last_mapped(&self, here: u64) -> Option<(BlockIndex, u64)> {
        let (index, block) = self.list.iter().last()?;
        let end = block.mapped_ram?.end(block.used_length);
        Some((index, end.saturating_sub(here)))
    }

    /// Reads the next entry; `base` is the stream offset of the cursor's start.
    pub(crate) fn parse_entry(&mut self, cursor: &mut Cursor<'_>, base: u64) -> Result<(), Stop> {
        let at = cursor.at();
        let name = cursor.name()?;
        let length_at = cursor.at();
        let used_length = cursor.be64()?;
        if !self.page.divides(used_length) {
            let expected = "a length of whole pages";
            let field = ErrorKind::BlockField { name, expected, found: used_length };
            return bad(length_at, field);
        }
        let sum = self.sum.saturating_add(used_length);
        if sum > self.total {
            let total = ErrorKind::BlockTotal { expected: self.total, found: sum, name };
            return bad(length_at, total);
        }
        let mut block = BlockInfo::new(name, used_length);
        if self.fields.page_size && !self.fields.guest_address && !self.fields.mapped_ram {
            block.page_size = parse_page_size(cursor, &block.name)?;
        }
        if self.fields.guest_address {
            block.guest_address = Some(cursor.be64()?);
        }
        if self.fields.mapped_ram {
            let of = (&block.name, used_length);
            block.mapped_ram = Some(MappedRamHeader::parse(cursor, base, of, self.page)?);
        }
        if let Err(kind) = self.list.push(block) {
            return bad(at, kind);
        }
        self.sum = sum;
        Ok(())
    }
}

/// Reads the page size of a block if there is one. Nothing announces it: after the used length
/// stands either the length byte of the next name, which is not zero, or a 64-bit number whose
/// first byte is: a page size is then a power of two from 4096 on, and anything else is the
/// word of the first record after the list.
fn parse_page_size(cursor: &mut Cursor<'_>, name: &Name) -> Result<Option<u64>, Stop> {
    let at = cursor.at();
    if cursor.peek()? != 0 {
        return Ok(None);
    }
    let mut ahead = cursor.clone();
    let value = ahead.be64()?;
    if value < 4096 || !value.is_power_of_two() {
        return Ok(None);
    }
    if value > PAGE_SIZE_MAX {
        let expected = "a page size of at most 1 TiB";
        let field = ErrorKind::BlockField { name: name.clone(), expected, found: value };
        return bad(at, field);
    }
    *cursor = ahead;
    Ok(Some(value))
}
