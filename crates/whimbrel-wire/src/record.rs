//! RAM records: which page comes next, on the main channel and on the urgent one.
//!
//! A record is a 64-bit word (offset in the block, flags in the low bits), the block's name
//! unless it is the block of the record before, and then the page. This is the hot path of a
//! migration: a record that continues a block is told apart by one word, without a name.

use alloc::sync::Arc;
use alloc::vec::Vec;
use core::num::NonZeroUsize;

use crate::cursor::{Cursor, Stop, bad};
use crate::{BlockIndex, BlockInfo, BlockList, BlockOffset, Error, ErrorKind, Name, TargetPage};

/// The low bits of a record word.
pub(crate) mod flag {
    pub(crate) const ZERO: u64 = 0x002;
    pub(crate) const MEM_SIZE: u64 = 0x004;
    pub(crate) const PAGE: u64 = 0x008;
    pub(crate) const EOS: u64 = 0x010;
    pub(crate) const CONTINUE: u64 = 0x020;
    pub(crate) const XBZRLE: u64 = 0x040;
    pub(crate) const MULTIFD_FLUSH: u64 = 0x200;
}

/// The byte that says which kind of delta follows.
const XBZRLE_MARK: u8 = 0x01;

/// What a RAM record says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RamRecord {
    /// The page is all zero.
    Zero {
        /// Its block.
        block: BlockIndex,
        /// Its place.
        offset: BlockOffset,
    },
    /// The page's bytes follow.
    PageFollows {
        /// Its block.
        block: BlockIndex,
        /// Its place.
        offset: BlockOffset,
        /// How many bytes follow: one target page.
        len: usize,
    },
    /// A delta to the page's old content follows; see [`crate::xbzrle`].
    XbzrleFollows {
        /// The page's block.
        block: BlockIndex,
        /// The page's place.
        offset: BlockOffset,
        /// How many bytes follow: at most one target page.
        len: usize,
    },
    /// The section ends; on the urgent channel, the channel does.
    EndOfSection,
    /// Wait until every multifd channel has delivered its SYNC.
    MultifdFlush,
}

impl RamRecord {
    /// Whether it is the content of a page, or of a part of one.
    #[must_use]
    pub const fn is_page(&self) -> bool {
        match self {
            Self::PageFollows { .. } | Self::Zero { .. } | Self::XbzrleFollows { .. } => true,
            Self::EndOfSection | Self::MultifdFlush => false,
        }
    }
}

/// Which records are legal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RecordFormat {
    /// While the guest runs on the source: all.
    Precopy,
    /// While it runs on the destination: whole pages, zero pages and the end of a section.
    Postcopy,
    /// In a mapped-ram file: only the end of a section.
    MappedRam,
}

/// The block of the record before: one per channel and direction.
#[derive(Debug, Clone, Copy)]
struct LastBlock {
    index: BlockIndex,
    used_length: u64,
}

/// The state of reading records, without a place in a stream.
#[derive(Debug)]
pub(crate) struct RecordParser {
    blocks: Arc<BlockList>,
    learn: bool,
    page: TargetPage,
    format: RecordFormat,
    last: Option<LastBlock>,
    named: bool,
}

impl RecordParser {
    pub(crate) const fn new(
        blocks: Arc<BlockList>,
        page: TargetPage,
        format: RecordFormat,
    ) -> Self {
        Self { blocks, learn: false, page, format, last: None, named: false }
    }

    pub(crate) const fn blocks(&self) -> &Arc<BlockList> {
        &self.blocks
    }

    pub(crate) const fn set_format(&mut self, format: RecordFormat) {
        self.format = format;
    }

    pub(crate) const fn learn_blocks(&mut self) {
        self.learn = true;
    }

    pub(crate) const fn last_was_named(&self) -> bool {
        self.named
    }

    /// Bytes of the caller's that follow a record.
    pub(crate) const fn payload_of(record: RamRecord) -> usize {
        match record {
            RamRecord::PageFollows { len, .. } | RamRecord::XbzrleFollows { len, .. } => len,
            RamRecord::Zero { .. } | RamRecord::EndOfSection | RamRecord::MultifdFlush => 0,
        }
    }

    #[inline]
    pub(crate) fn parse(&mut self, cursor: &mut Cursor<'_>) -> Result<RamRecord, Stop> {
        let word = cursor.be64()?;
        let flags = word & self.page.mask();
        let offset = word & !self.page.mask();
        // The two records of which there are millions come first.
        if flags == flag::PAGE | flag::CONTINUE && self.format != RecordFormat::MappedRam {
            let block = self.same_block(offset)?;
            let len = self.page_len();
            return Ok(RamRecord::PageFollows { block, offset: BlockOffset(offset), len });
        }
        self.parse_other(cursor, flags, offset)
    }

    fn parse_other(
        &mut self,
        cursor: &mut Cursor<'_>,
        flags: u64,
        offset: u64,
    ) -> Result<RamRecord, Stop> {
        let expected = match self.format {
            RecordFormat::Precopy => "one record type",
            RecordFormat::Postcopy => "a zero page, a page or the end of the section",
            RecordFormat::MappedRam => "the end of the section",
        };
        let wrong = Stop::Bad { at: 0, kind: ErrorKind::RecordFlags { expected, flags } };
        let pages = self.format != RecordFormat::MappedRam;
        let precopy = self.format == RecordFormat::Precopy;
        match flags {
            flag::EOS | flag::MULTIFD_FLUSH if offset != 0 => {
                let expected = "no offset in a word without a page";
                bad(0, ErrorKind::Unexpected { expected, found: offset })
            }
            flag::EOS => Ok(RamRecord::EndOfSection),
            flag::MULTIFD_FLUSH if precopy => Ok(RamRecord::MultifdFlush),
            _ => match flags & !flag::CONTINUE {
                flag::ZERO if pages => {
                    let last = self.block_of(cursor, flags, offset)?;
                    cursor.mark(0, "the zero byte of a zero page")?;
                    self.last = Some(last);
                    Ok(RamRecord::Zero { block: last.index, offset: BlockOffset(offset) })
                }
                flag::PAGE if pages => {
                    let last = self.block_of(cursor, flags, offset)?;
                    self.last = Some(last);
                    let (block, len) = (last.index, self.page_len());
                    Ok(RamRecord::PageFollows { block, offset: BlockOffset(offset), len })
                }
                flag::XBZRLE if precopy => self.parse_xbzrle(cursor, flags, offset),
                _ => Err(wrong),
            },
        }
    }

    fn parse_xbzrle(
        &mut self,
        cursor: &mut Cursor<'_>,
        flags: u64,
        offset: u64,
    ) -> Result<RamRecord, Stop> {
        let last = self.block_of(cursor, flags, offset)?;
        cursor.mark(XBZRLE_MARK, "the XBZRLE mark 0x1")?;
        let at = cursor.at();
        let len = cursor.be16()?;
        let limit = self.page.size();
        if u64::from(len) > limit {
            let what = "bytes of an XBZRLE delta";
            return bad(at, ErrorKind::TooLarge { what, found: len.into(), limit });
        }
        self.last = Some(last);
        let (block, len) = (last.index, len.into());
        Ok(RamRecord::XbzrleFollows { block, offset: BlockOffset(offset), len })
    }

    /// Reads the name if there is one and checks the offset. Changes nothing that a second
    /// attempt with more input would see, except that a block may have been learned.
    fn block_of(
        &mut self,
        cursor: &mut Cursor<'_>,
        flags: u64,
        offset: u64,
    ) -> Result<LastBlock, Stop> {
        if flags & flag::CONTINUE != 0 {
            let index = self.same_block(offset)?;
            let used_length = self.last.map_or(0, |last| last.used_length);
            return Ok(LastBlock { index, used_length });
        }
        let (at, name) = cursor.name_bytes()?;
        let index = match self.blocks.find(name) {
            Some(index) => index,
            None => self.unknown_block(name).map_err(|kind| Stop::Bad { at, kind })?,
        };
        let used_length = self.blocks.get(index).map_or(0, |block| block.used_length);
        self.check(index, used_length, offset)?;
        self.named = true;
        Ok(LastBlock { index, used_length })
    }

    #[inline]
    fn same_block(&mut self, offset: u64) -> Result<BlockIndex, Stop> {
        let Some(last) = self.last else { return bad(0, ErrorKind::NoBlock) };
        self.check(last.index, last.used_length, offset)?;
        self.named = false;
        Ok(last.index)
    }

    /// The offset is a multiple of the page by construction, and so is the length.
    #[inline]
    fn check(&self, index: BlockIndex, used_length: u64, offset: u64) -> Result<(), Stop> {
        if offset < used_length { Ok(()) } else { self.outside(index, offset) }
    }

    #[cold]
    fn outside(&self, index: BlockIndex, offset: u64) -> Result<(), Stop> {
        let Some(block) = self.blocks.get(index) else { return bad(0, ErrorKind::NoBlock) };
        let (name, length) = (block.name.clone(), block.used_length);
        bad(0, ErrorKind::PageOutside { name, offset, length })
    }

    #[cold]
    fn unknown_block(&mut self, name: &[u8]) -> Result<BlockIndex, ErrorKind> {
        let Ok(name) = Name::new(name) else {
            let expected = "a block name of 1 to 255 bytes";
            return Err(ErrorKind::Unexpected { expected, found: 0 });
        };
        if !self.learn {
            return Err(ErrorKind::UnknownBlock { name });
        }
        let length_unknown = !self.page.mask();
        Arc::make_mut(&mut self.blocks).push(BlockInfo::new(name, length_unknown))
    }

    fn page_len(&self) -> usize {
        1 << self.page.bits()
    }
}

/// What [`RecordDecoder::decode`] found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RecordDecoded {
    /// Come back when the input has at least so many bytes; never above
    /// [`HEADER_MAX`](crate::HEADER_MAX).
    NeedMore(NonZeroUsize),
    /// A record.
    Record(RamRecord),
}

/// Reads a channel of bare records: the urgent channel of a postcopy.
#[derive(Debug)]
pub struct RecordDecoder {
    parser: RecordParser,
    offset: u64,
    payload: usize,
}

impl RecordDecoder {
    /// Reads records of the blocks that the main channel announced.
    #[must_use]
    pub const fn new(blocks: Arc<BlockList>, page: TargetPage, format: RecordFormat) -> Self {
        Self { parser: RecordParser::new(blocks, page, format), offset: 0, payload: 0 }
    }

    /// Reads records without knowing the blocks: every name is taken, and every offset. For
    /// looking at a channel recorded alone; never for placing pages.
    #[must_use]
    pub fn learning(page: TargetPage, format: RecordFormat) -> Self {
        let mut decoder = Self::new(Arc::default(), page, format);
        decoder.parser.learn_blocks();
        decoder
    }

    /// Looks at the bytes not yet consumed and returns how many of them it consumed, and what
    /// they were.
    ///
    /// # Errors
    /// When they are not a legal record of a page inside an announced block.
    ///
    /// # Panics
    /// When the bytes that follow the last record were not [taken](Self::payload_taken).
    #[inline]
    pub fn decode(&mut self, input: &[u8]) -> Result<(usize, RecordDecoded), Error> {
        assert!(self.payload == 0, "the page after a record is the caller's to take");
        let mut cursor = Cursor::new(input);
        match self.parser.parse(&mut cursor) {
            Ok(record) => {
                self.offset += cursor.at() as u64;
                self.payload = RecordParser::payload_of(record);
                Ok((cursor.at(), RecordDecoded::Record(record)))
            }
            Err(Stop::NeedMore(need)) => {
                let need = NonZeroUsize::new(need).unwrap_or(NonZeroUsize::MIN);
                Ok((0, RecordDecoded::NeedMore(need)))
            }
            Err(Stop::Bad { at, kind }) => Err(Error::new(self.offset + at as u64, kind)),
        }
    }

    /// Says that the caller took `len` of the bytes that follow the last record off the channel.
    ///
    /// # Panics
    /// When fewer bytes than that follow.
    pub fn payload_taken(&mut self, len: usize) {
        self.payload = self.payload.checked_sub(len).expect("no more than the page follows");
        self.offset += len as u64;
    }

    /// Position in the channel of the next byte.
    #[must_use]
    pub const fn offset(&self) -> u64 {
        self.offset
    }

    /// Bytes of a page that the caller has still to take.
    #[must_use]
    pub const fn payload_left(&self) -> usize {
        self.payload
    }

    /// The blocks: those given, or those learned.
    #[must_use]
    pub const fn blocks(&self) -> &Arc<BlockList> {
        self.parser.blocks()
    }

    /// Whether the last record of a page named its block although that is optional: old
    /// sources do, and a copy to the byte must.
    #[must_use]
    pub const fn last_was_named(&self) -> bool {
        self.parser.last_was_named()
    }
}

/// Writes the records of one channel: names a block once, then continues it.
#[derive(Debug, Clone)]
pub struct RecordEncoder {
    blocks: Arc<BlockList>,
    last: Option<BlockIndex>,
}

impl RecordEncoder {
    /// For a channel that has carried no record yet.
    #[must_use]
    pub const fn new(blocks: Arc<BlockList>) -> Self {
        Self { blocks, last: None }
    }

    /// The announced blocks.
    #[must_use]
    pub const fn blocks(&self) -> &Arc<BlockList> {
        &self.blocks
    }

    /// Makes the next record name its block: after a reconnect, and when postcopy starts.
    pub const fn forget_last_block(&mut self) {
        self.last = None;
    }

    /// Appends the header of a page; one target page of bytes must follow it.
    ///
    /// # Panics
    /// When the block is not of this channel's list.
    #[inline]
    pub fn page_header(&mut self, block: BlockIndex, offset: BlockOffset, out: &mut Vec<u8>) {
        self.word(block, offset, flag::PAGE, out);
    }

    /// Appends a whole zero page.
    ///
    /// # Panics
    /// When the block is not of this channel's list.
    #[inline]
    pub fn zero_page(&mut self, block: BlockIndex, offset: BlockOffset, out: &mut Vec<u8>) {
        self.word(block, offset, flag::ZERO, out);
        out.push(0);
    }

    /// Appends the header of a delta of `len` bytes, which must follow it.
    ///
    /// # Panics
    /// When the block is not of this channel's list.
    #[inline]
    pub fn xbzrle_header(
        &mut self,
        block: BlockIndex,
        offset: BlockOffset,
        len: u16,
        out: &mut Vec<u8>,
    ) {
        self.word(block, offset, flag::XBZRLE, out);
        out.push(XBZRLE_MARK);
        out.extend_from_slice(&len.to_be_bytes());
    }

    #[inline]
    fn word(&mut self, block: BlockIndex, offset: BlockOffset, flag: u64, out: &mut Vec<u8>) {
        if self.last == Some(block) {
            out.extend_from_slice(&(offset.0 | flag | flag::CONTINUE).to_be_bytes());
        } else {
            out.extend_from_slice(&(offset.0 | flag).to_be_bytes());
            let name = &self.blocks.get(block).expect("a block of this channel's list").name;
            name.encode(out);
            self.last = Some(block);
        }
    }
}

/// The word before a page of the block that the record before was of. A receiver that expects
/// one page after the other compares with it where it has let the bytes fall, and decodes them
/// then as always.
#[must_use]
pub const fn continued_page_word(offset: BlockOffset) -> [u8; 8] {
    (offset.0 | flag::PAGE | flag::CONTINUE).to_be_bytes()
}

/// Appends the word that ends the payload of a `ram` section, or an urgent channel.
pub fn encode_end_of_section(out: &mut Vec<u8>) {
    out.extend_from_slice(&flag::EOS.to_be_bytes());
}

/// Appends the word that makes the receiver wait for a SYNC of every multifd channel.
pub fn encode_multifd_flush(out: &mut Vec<u8>) {
    out.extend_from_slice(&flag::MULTIFD_FLUSH.to_be_bytes());
}
