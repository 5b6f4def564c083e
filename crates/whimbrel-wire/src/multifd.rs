//! Multifd: channels that carry pages in packets.

use alloc::boxed::Box;
use alloc::vec::Vec;
use core::num::NonZeroUsize;

use crate::cursor::{Cursor, Stop, bad};
use crate::{BlockOffset, Error, ErrorKind, Name, TargetPage};

/// The first four bytes of every multifd channel and packet.
pub const MULTIFD_MAGIC: u32 = 0x1122_3344;

/// The one version of multifd in use.
pub const MULTIFD_VERSION: u32 = 1;

/// Bytes of page data that a packet is made for.
const PACKET_DATA: u64 = 512 << 10;

/// Most bytes of compressed data, or of a device's state, that follow a packet: as QEMU's
/// receivers limit it for pages.
pub const PACKET_DATA_MAX: u32 = 1 << 20;

/// Bytes of the field that holds a block or device name, padded with zeros.
const NAME_FIELD: usize = 256;

/// Pages that one packet can carry.
#[must_use]
pub const fn pages_per_packet(page: TargetPage) -> u32 {
    // At most 512: a page has 1 KiB or more. At least 1.
    let pages = PACKET_DATA >> page.bits();
    if pages == 0 { 1 } else { u32_of(pages) }
}

#[expect(clippy::cast_possible_truncation, reason = "pages of a packet are at most 512")]
const fn u32_of(pages: u64) -> u32 {
    pages as u32
}

/// The first message of a channel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MultifdInit {
    /// UUID of the VM, zero if it has none.
    pub uuid: [u8; 16],
    /// Which channel this is, from 0.
    pub channel: u8,
}

impl MultifdInit {
    /// Its length in bytes.
    pub const LEN: usize = 64;
    const PADDING: usize = 39;

    /// Appends the message.
    pub fn encode(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&MULTIFD_MAGIC.to_be_bytes());
        out.extend_from_slice(&MULTIFD_VERSION.to_be_bytes());
        out.extend_from_slice(&self.uuid);
        out.push(self.channel);
        out.extend_from_slice(&[0; Self::PADDING]);
    }

    fn parse(cursor: &mut Cursor<'_>) -> Result<Self, Stop> {
        parse_magic(cursor)?;
        let init = Self { uuid: *cursor.array()?, channel: cursor.u8()? };
        cursor.bytes(Self::PADDING)?;
        Ok(init)
    }
}

/// How page data is compressed, by the bits of a packet's flags.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Compression {
    /// Not at all.
    None,
    /// One zlib stream per channel.
    Zlib,
    /// One zstd frame per channel.
    Zstd,
    /// Another method, of hardware: qpl (8), uadk (16), qatzip (32).
    Other(u32),
}

/// Bits of [`PacketHeader::flags`].
pub mod packet_flag {
    /// The sender waits for the next round.
    pub const SYNC: u32 = 1;
    /// Where the compression method is.
    pub const METHOD: u32 = 0x3e;
    /// zlib.
    pub const ZLIB: u32 = 0x02;
    /// zstd.
    pub const ZSTD: u32 = 0x04;
    /// The packet carries a device's state instead of pages.
    pub const DEVICE_STATE: u32 = 0x40;
}

/// The header of a packet of pages, in the fields it has on the wire: senders before 9.0 leave
/// old values in those that do not count.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PacketHeader {
    /// See [`packet_flag`].
    pub flags: u32,
    /// Pages that the packet was made for; 0 in a SYNC packet of 9.0 and later.
    pub pages_alloc: u32,
    /// How many of the offsets are of pages whose data follows.
    pub normal_pages: u32,
    /// Length of the data in bytes, if `normal_pages` is not 0; else it says nothing.
    pub next_packet_size: u32,
    /// A counter over all channels, for statistics.
    pub packet_num: u64,
    /// How many of the offsets, behind the normal ones, are of zero pages.
    pub zero_pages: u32,
    /// The block's name, ended by a zero byte.
    pub name_field: [u8; NAME_FIELD],
    /// One offset per page that a packet can carry.
    pub offsets: Vec<u64>,
}

impl PacketHeader {
    /// Its length in bytes for a page size.
    #[must_use]
    pub fn len(page: TargetPage) -> usize {
        320 + 8 * offsets_per_packet(page)
    }

    /// A packet without pages.
    #[must_use]
    pub fn empty(flags: u32, packet_num: u64, page: TargetPage) -> Self {
        Self {
            flags,
            pages_alloc: 0,
            normal_pages: 0,
            next_packet_size: 0,
            packet_num,
            zero_pages: 0,
            name_field: [0; NAME_FIELD],
            offsets: alloc::vec![0; offsets_per_packet(page)],
        }
    }

    /// The packet that ends a round.
    #[must_use]
    pub fn sync(packet_num: u64, page: TargetPage) -> Self {
        Self::empty(packet_flag::SYNC, packet_num, page)
    }

    /// A packet of pages of one block: those whose data follow, then those that are zero.
    ///
    /// # Panics
    /// When there are more pages than a packet can carry.
    #[must_use]
    pub fn pages(
        block: &Name,
        (normal, zero): (
            impl ExactSizeIterator<Item = BlockOffset>,
            impl ExactSizeIterator<Item = BlockOffset>,
        ),
        (flags, data_len, packet_num): (u32, u32, u64),
        page: TargetPage,
    ) -> Self {
        let count = |pages: usize| u32::try_from(pages).unwrap_or(u32::MAX);
        let mut header = Self::empty(flags, packet_num, page);
        assert!(normal.len() + zero.len() <= header.offsets.len(), "the pages of one packet");
        header.pages_alloc = pages_per_packet(page);
        header.normal_pages = count(normal.len());
        header.zero_pages = count(zero.len());
        header.next_packet_size = data_len;
        for (to, from) in header.name_field.iter_mut().zip(block.as_bytes()) {
            *to = *from;
        }
        for (to, from) in header.offsets.iter_mut().zip(normal.chain(zero)) {
            *to = from.0;
        }
        header
    }

    /// Whether the sender waits for the next round.
    #[must_use]
    pub const fn is_sync(&self) -> bool {
        self.flags & packet_flag::SYNC != 0
    }

    /// How the data is compressed.
    #[must_use]
    pub const fn compression(&self) -> Compression {
        match self.flags & packet_flag::METHOD {
            0 => Compression::None,
            packet_flag::ZLIB => Compression::Zlib,
            packet_flag::ZSTD => Compression::Zstd,
            other => Compression::Other(other),
        }
    }

    /// Bytes of page data that follow the header.
    #[must_use]
    pub const fn data_len(&self) -> u32 {
        if self.normal_pages == 0 { 0 } else { self.next_packet_size }
    }

    /// The block of the packet's pages; `None` when it has no pages.
    #[must_use]
    pub fn block(&self) -> Option<Name> {
        if self.normal_pages == 0 && self.zero_pages == 0 {
            return None;
        }
        Name::new(until_zero(&self.name_field)).ok()
    }

    /// The pages whose data follow, in the order of the data.
    pub fn normal(&self) -> impl ExactSizeIterator<Item = BlockOffset> {
        self.offsets.iter().take(len_of(self.normal_pages)).copied().map(BlockOffset)
    }

    /// The pages that are zero.
    pub fn zero(&self) -> impl ExactSizeIterator<Item = BlockOffset> {
        let (skip, take) = (len_of(self.normal_pages), len_of(self.zero_pages));
        self.offsets.iter().skip(skip).take(take).copied().map(BlockOffset)
    }

    /// Appends the header.
    pub fn encode(&self, out: &mut Vec<u8>) {
        for word in [
            MULTIFD_MAGIC,
            MULTIFD_VERSION,
            self.flags,
            self.pages_alloc,
            self.normal_pages,
            self.next_packet_size,
        ] {
            out.extend_from_slice(&word.to_be_bytes());
        }
        out.extend_from_slice(&self.packet_num.to_be_bytes());
        out.extend_from_slice(&self.zero_pages.to_be_bytes());
        out.extend_from_slice(&[0; 28]);
        out.extend_from_slice(&self.name_field);
        self.offsets.iter().for_each(|offset| out.extend_from_slice(&offset.to_be_bytes()));
    }

    fn parse(cursor: &mut Cursor<'_>, flags: u32, page: TargetPage) -> Result<Self, Stop> {
        let start = cursor.at();
        let mut header = Self {
            flags,
            pages_alloc: cursor.be32()?,
            normal_pages: cursor.be32()?,
            next_packet_size: cursor.be32()?,
            packet_num: cursor.be64()?,
            zero_pages: cursor.be32()?,
            name_field: {
                cursor.bytes(28)?;
                *cursor.array()?
            },
            offsets: Vec::new(),
        };
        let offsets = cursor.bytes(8 * offsets_per_packet(page))?;
        header.offsets = offsets
            .chunks_exact(8)
            .filter_map(|bytes| bytes.first_chunk().copied().map(u64::from_be_bytes))
            .collect();
        header.check(start, page).map(|()| header)
    }

    fn check(&self, start: usize, page: TargetPage) -> Result<(), Stop> {
        let limit = pages_per_packet(page);
        let too_large =
            |what, found: u64, limit: u32| ErrorKind::TooLarge { what, found, limit: limit.into() };
        if self.pages_alloc > limit {
            let kind = too_large("pages a packet is made for", self.pages_alloc.into(), limit);
            return bad(start, kind);
        }
        let pages = u64::from(self.normal_pages) + u64::from(self.zero_pages);
        if pages > self.pages_alloc.into() {
            return bad(start + 4, too_large("pages of a packet", pages, self.pages_alloc));
        }
        if self.compression() == Compression::None
            && u64::from(self.data_len()) != u64::from(self.normal_pages) * page.size()
        {
            let (expected, found) = ("the length of the packet's pages", self.data_len().into());
            return bad(start + 8, ErrorKind::Unexpected { expected, found });
        }
        if self.data_len() > PACKET_DATA_MAX {
            let found = self.data_len().into();
            return bad(start + 8, too_large("bytes of a packet", found, PACKET_DATA_MAX));
        }
        let wrong = self.normal().chain(self.zero()).find(|offset| !page.divides(offset.0));
        if let Some(BlockOffset(found)) = wrong {
            let expected = "offsets of whole pages";
            return bad(start + 308, ErrorKind::Unexpected { expected, found });
        }
        if pages != 0 && self.block().is_none() {
            let expected = "the name of the packet's block";
            return bad(start + 52, ErrorKind::Unexpected { expected, found: 0 });
        }
        Ok(())
    }
}

/// The header of a packet of a device's state.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DevicePacketHeader {
    /// Which device.
    pub name: Name,
    /// Which of several with that name.
    pub instance_id: u32,
    /// Bytes of state that follow.
    pub len: u32,
}

impl DevicePacketHeader {
    /// Appends the header.
    pub fn encode(&self, out: &mut Vec<u8>) {
        for word in [MULTIFD_MAGIC, MULTIFD_VERSION, packet_flag::DEVICE_STATE] {
            out.extend_from_slice(&word.to_be_bytes());
        }
        out.extend_from_slice(self.name.as_bytes());
        out.extend(core::iter::repeat_n(0, NAME_FIELD - self.name.as_bytes().len()));
        out.extend_from_slice(&self.instance_id.to_be_bytes());
        out.extend_from_slice(&self.len.to_be_bytes());
    }

    fn parse(cursor: &mut Cursor<'_>) -> Result<Self, Stop> {
        let at = cursor.at();
        let Ok(name) = Name::new(until_zero(cursor.array::<NAME_FIELD>()?)) else {
            let expected = "the name of a device";
            return bad(at, ErrorKind::Unexpected { expected, found: 0 });
        };
        let instance_id = cursor.be32()?;
        let at = cursor.at();
        let len = cursor.be32()?;
        match len {
            0 => bad(at, ErrorKind::Unexpected { expected: "a device's state", found: 0 }),
            1..=PACKET_DATA_MAX => Ok(Self { name, instance_id, len }),
            _ => {
                let (found, limit) = (len.into(), PACKET_DATA_MAX.into());
                let what = "bytes of a device's state in a packet";
                bad(at, ErrorKind::TooLarge { what, found, limit })
            }
        }
    }
}

/// What [`MultifdDecoder::decode`] found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum MultifdDecoded {
    /// Come back when the input has at least so many bytes; never above
    /// [`MultifdDecoder::HEADER_MAX`].
    NeedMore(NonZeroUsize),
    /// The first message of the channel.
    Init(MultifdInit),
    /// A packet, whose data are the caller's.
    Packet(Box<PacketHeader>),
    /// A packet of a device's state, which is the caller's.
    Device(DevicePacketHeader),
}

/// Reads one multifd channel. Whether blocks exist and pages lie inside them, and whether the
/// compression is the one agreed, is for the caller to check: the block list is on another channel.
#[derive(Debug)]
pub struct MultifdDecoder {
    page: TargetPage,
    started: bool,
    offset: u64,
    payload: u32,
}

impl MultifdDecoder {
    /// The longest header there is: that for pages of 1 KiB.
    pub const HEADER_MAX: usize = 320 + 8 * 512;

    /// For a new connection.
    #[must_use]
    pub const fn new(page: TargetPage) -> Self {
        Self { page, started: false, offset: 0, payload: 0 }
    }

    /// Looks at the bytes not yet consumed and returns how many of them it consumed, and what
    /// they were.
    ///
    /// # Errors
    /// When they are no legal packet.
    ///
    /// # Panics
    /// When the data of the last packet were not [taken](Self::payload_taken).
    pub fn decode(&mut self, input: &[u8]) -> Result<(usize, MultifdDecoded), Error> {
        assert!(self.payload == 0, "the data of a packet are the caller's to take");
        let mut cursor = Cursor::new(input);
        match self.step(&mut cursor) {
            Ok(decoded) => {
                self.offset += cursor.at() as u64;
                Ok((cursor.at(), decoded))
            }
            Err(Stop::NeedMore(need)) => {
                let need = NonZeroUsize::new(need).unwrap_or(NonZeroUsize::MIN);
                Ok((0, MultifdDecoded::NeedMore(need)))
            }
            Err(Stop::Bad { at, kind }) => Err(Error::new(self.offset + at as u64, kind)),
        }
    }

    fn step(&mut self, cursor: &mut Cursor<'_>) -> Result<MultifdDecoded, Stop> {
        if !self.started {
            let init = MultifdInit::parse(cursor)?;
            self.started = true;
            return Ok(MultifdDecoded::Init(init));
        }
        parse_magic(cursor)?;
        let at = cursor.at();
        let flags = cursor.be32()?;
        let known = packet_flag::SYNC | packet_flag::METHOD | packet_flag::DEVICE_STATE;
        let device = flags & packet_flag::DEVICE_STATE != 0;
        let methods = (flags & packet_flag::METHOD).count_ones();
        if flags & !known != 0 || methods > 1 || (device && flags != packet_flag::DEVICE_STATE) {
            let expected = "flags of a packet";
            return bad(at, ErrorKind::Unexpected { expected, found: flags.into() });
        }
        if device {
            let header = DevicePacketHeader::parse(cursor)?;
            self.payload = header.len;
            return Ok(MultifdDecoded::Device(header));
        }
        let header = PacketHeader::parse(cursor, flags, self.page)?;
        self.payload = header.data_len();
        Ok(MultifdDecoded::Packet(Box::new(header)))
    }

    /// Says that the caller took `len` bytes of a packet's data off the channel.
    ///
    /// # Panics
    /// When fewer bytes than that follow.
    pub fn payload_taken(&mut self, len: u32) {
        self.payload = self.payload.checked_sub(len).expect("no more than the packet's data");
        self.offset += u64::from(len);
    }

    /// Bytes of data that the caller has still to take.
    #[must_use]
    pub const fn payload_left(&self) -> u32 {
        self.payload
    }

    /// Position in the channel of the next byte. Between packets (no payload left) the channel
    /// may end.
    #[must_use]
    pub const fn offset(&self) -> u64 {
        self.offset
    }
}

fn parse_magic(cursor: &mut Cursor<'_>) -> Result<(), Stop> {
    let at = cursor.at();
    let found = cursor.be32()?;
    if found != MULTIFD_MAGIC {
        let expected = "the multifd magic 0x11223344";
        return bad(at, ErrorKind::Unexpected { expected, found: found.into() });
    }
    let at = cursor.at();
    let found = cursor.be32()?;
    if found != MULTIFD_VERSION {
        let (what, expected) = ("multifd", MULTIFD_VERSION);
        return bad(at, ErrorKind::Version { what, expected, found });
    }
    Ok(())
}

fn offsets_per_packet(page: TargetPage) -> usize {
    len_of(pages_per_packet(page))
}

fn len_of(count: u32) -> usize {
    usize::try_from(count).unwrap_or(usize::MAX)
}

fn until_zero(field: &[u8]) -> &[u8] {
    field.split(|byte| *byte == 0).next().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::string::{String, ToString as _};

    const PAGE: TargetPage = TargetPage::FOUR_KIB;

    fn packet(change: impl FnOnce(&mut PacketHeader)) -> String {
        let block = Name::new("pc.ram").unwrap();
        let pages = ([BlockOffset(0x1000)].into_iter(), [BlockOffset(0x2000)].into_iter());
        let mut header = PacketHeader::pages(&block, pages, (0, 4096, 5), PAGE);
        change(&mut header);
        let mut bytes = Vec::new();
        MultifdInit { uuid: [0; 16], channel: 0 }.encode(&mut bytes);
        header.encode(&mut bytes);
        let mut decoder = MultifdDecoder::new(PAGE);
        decoder.decode(&bytes).unwrap();
        match decoder.decode(bytes.get(MultifdInit::LEN..).unwrap_or_default()) {
            Ok((taken, MultifdDecoded::Packet(found))) => {
                assert_eq!((taken, *found), (PacketHeader::len(PAGE), header));
                assert_eq!(decoder.payload_left(), 4096);
                String::new()
            }
            Ok(other) => panic!("{other:?}"),
            Err(error) => error.to_string(),
        }
    }

    #[test]
    fn headers_have_the_sizes_of_the_protocol() {
        assert_eq!(PacketHeader::len(PAGE), 1344);
        assert_eq!(pages_per_packet(PAGE), 128);
        let init = MultifdInit { uuid: [1; 16], channel: 2 };
        let mut bytes = Vec::new();
        init.encode(&mut bytes);
        assert_eq!(bytes.len(), MultifdInit::LEN);
        let name = Name::new("vfio").unwrap();
        let mut bytes = Vec::new();
        DevicePacketHeader { name, instance_id: 0, len: 1 }.encode(&mut bytes);
        assert_eq!(bytes.len(), 276);
    }

    #[test]
    fn bad_packets_are_refused_at_their_field() {
        assert_eq!(packet(|_| {}), "");
        let alloc = packet(|header| header.pages_alloc = 129);
        assert_eq!(alloc, "byte 76: pages a packet is made for: 129 is more than the 128 allowed");
        let pages = packet(|header| header.zero_pages = 128);
        assert_eq!(pages, "byte 80: pages of a packet: 129 is more than the 128 allowed");
        let data = packet(|header| header.next_packet_size = 4095);
        assert_eq!(data, "byte 84: expected the length of the packet's pages, found 0xfff");
        let data = packet(|header| {
            header.flags = packet_flag::ZSTD;
            header.next_packet_size = u32::MAX;
        });
        assert_eq!(data, "byte 84: bytes of a packet: 4294967295 is more than the 1048576 allowed");
        let flags = packet(|header| header.flags = packet_flag::ZSTD | packet_flag::ZLIB);
        assert_eq!(flags, "byte 72: expected flags of a packet, found 0x6");
        let sync = packet(|header| header.flags = packet_flag::SYNC | packet_flag::DEVICE_STATE);
        assert_eq!(sync, "byte 72: expected flags of a packet, found 0x41");
        let offset = packet(|header| header.offsets.iter_mut().for_each(|offset| *offset = 1));
        assert_eq!(offset, "byte 384: expected offsets of whole pages, found 0x1");
        let name = packet(|header| header.name_field = [0; NAME_FIELD]);
        assert_eq!(name, "byte 128: expected the name of the packet's block, found 0x0");
        // Old sources leave a length in packets without pages.
        let empty = PacketHeader { next_packet_size: 9, ..PacketHeader::sync(1, PAGE) };
        assert_eq!(empty.data_len(), 0);
    }
}
