//! Feeding decoders in pieces, and writing back what they said.

use std::sync::Arc;

use whimbrel_wire::return_path::{encode_bitmap_end, encode_bitmap_size};
use whimbrel_wire::{
    BlockList, ColoMessage, Command, Decoded, DeviceState, Error, HEADER_MAX, MainDecoder,
    MultifdDecoded, MultifdDecoder, Package, RamRecord, RecordDecoded, RecordDecoder,
    RecordEncoder, ReturnDecoded, ReturnDecoder, TargetPage, encode_end_of_section, encode_eof,
    encode_multifd_flush, encode_vm_description,
};

/// Sizes of the pieces in which a stream arrives.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Pieces {
    Of(usize),
    /// Sizes drawn from a generator with this seed: mostly small, some large.
    Random(u64),
}

impl Pieces {
    pub(crate) fn draw(&mut self) -> usize {
        match self {
            Self::Of(size) => *size,
            Self::Random(state) => {
                // xorshift: any sequence will do, if it can be repeated.
                *state ^= *state << 13;
                *state ^= *state >> 7;
                *state ^= *state << 17;
                let bound = [9, 9, 64, 5000, 100_000][usize::try_from(*state >> 32).unwrap() % 5];
                1 + usize::try_from(*state & 0xffff_ffff).unwrap() % bound
            }
        }
    }
}

/// One decoder, as the driver sees it.
pub(crate) trait Decode {
    type Message;
    /// Bytes consumed, and a message or how many bytes are needed.
    fn decode(&mut self, input: &[u8]) -> Result<(usize, Result<Self::Message, usize>), Error>;
    fn payload_left(&self) -> u64;
    fn payload_taken(&mut self, len: usize);
    fn offset(&self) -> u64;
    fn named(&self) -> bool {
        false
    }
}

impl Decode for MainDecoder {
    type Message = Decoded;
    fn decode(&mut self, input: &[u8]) -> Result<(usize, Result<Decoded, usize>), Error> {
        let (taken, decoded) = MainDecoder::decode(self, input)?;
        let Decoded::NeedMore(need) = decoded else { return Ok((taken, Ok(decoded))) };
        assert!(need.get() <= HEADER_MAX);
        Ok((taken, Err(need.get())))
    }
    fn payload_left(&self) -> u64 {
        MainDecoder::payload_left(self)
    }
    fn payload_taken(&mut self, len: usize) {
        MainDecoder::payload_taken(self, len as u64);
    }
    fn offset(&self) -> u64 {
        MainDecoder::offset(self)
    }
    fn named(&self) -> bool {
        self.last_was_named()
    }
}

impl Decode for RecordDecoder {
    type Message = RamRecord;
    fn decode(&mut self, input: &[u8]) -> Result<(usize, Result<RamRecord, usize>), Error> {
        Ok(match RecordDecoder::decode(self, input)? {
            (taken, RecordDecoded::Record(record)) => (taken, Ok(record)),
            (taken, RecordDecoded::NeedMore(need)) => (taken, Err(need.get())),
        })
    }
    fn payload_left(&self) -> u64 {
        RecordDecoder::payload_left(self) as u64
    }
    fn payload_taken(&mut self, len: usize) {
        RecordDecoder::payload_taken(self, len);
    }
    fn offset(&self) -> u64 {
        RecordDecoder::offset(self)
    }
    fn named(&self) -> bool {
        self.last_was_named()
    }
}

impl Decode for ReturnDecoder {
    type Message = ReturnDecoded;
    fn decode(&mut self, input: &[u8]) -> Result<(usize, Result<ReturnDecoded, usize>), Error> {
        let (taken, decoded) = ReturnDecoder::decode(self, input)?;
        let ReturnDecoded::NeedMore(need) = decoded else { return Ok((taken, Ok(decoded))) };
        Ok((taken, Err(need.get())))
    }
    fn payload_left(&self) -> u64 {
        ReturnDecoder::payload_left(self)
    }
    fn payload_taken(&mut self, len: usize) {
        ReturnDecoder::payload_taken(self, len as u64);
    }
    fn offset(&self) -> u64 {
        ReturnDecoder::offset(self)
    }
}

impl Decode for MultifdDecoder {
    type Message = MultifdDecoded;
    fn decode(&mut self, input: &[u8]) -> Result<(usize, Result<MultifdDecoded, usize>), Error> {
        let (taken, decoded) = MultifdDecoder::decode(self, input)?;
        let MultifdDecoded::NeedMore(need) = decoded else { return Ok((taken, Ok(decoded))) };
        assert!(need.get() <= MultifdDecoder::HEADER_MAX);
        Ok((taken, Err(need.get())))
    }
    fn payload_left(&self) -> u64 {
        MultifdDecoder::payload_left(self).into()
    }
    fn payload_taken(&mut self, len: usize) {
        MultifdDecoder::payload_taken(self, u32::try_from(len).unwrap());
    }
    fn offset(&self) -> u64 {
        MultifdDecoder::offset(self)
    }
}

/// A message and the bytes that followed it, which were the caller's.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Item<'a, M> {
    pub(crate) message: M,
    pub(crate) payload: &'a [u8],
    /// A record named its block.
    pub(crate) named: bool,
    /// Where it ended, and its payload began.
    pub(crate) offset: u64,
}

/// What a stream gave: its messages, and the bytes at its end that were not consumed.
pub(crate) struct Driven<'a, M> {
    pub(crate) items: Vec<Item<'a, M>>,
    pub(crate) rest: &'a [u8],
}

/// Feeds a whole stream in pieces.
pub(crate) fn drive<'a, D: Decode>(
    decoder: &mut D,
    stream: &'a [u8],
    mut pieces: Pieces,
) -> Result<Driven<'a, D::Message>, Error> {
    let mut items: Vec<Item<'a, D::Message>> = Vec::new();
    let (mut at, mut end, mut payload_at, base) = (0, 0, 0, decoder.offset());
    loop {
        let left = usize::try_from(decoder.payload_left()).unwrap_or(usize::MAX);
        let need = if left > 0 {
            let take = left.min(end - at);
            decoder.payload_taken(take);
            at += take;
            items.last_mut().unwrap().payload = &stream[payload_at..at];
            if take == left {
                continue;
            }
            1
        } else {
            let (taken, decoded) = decoder.decode(&stream[at..end])?;
            at += taken;
            let offset = base + at as u64;
            assert_eq!(decoder.offset(), offset, "offsets follow the stream");
            match decoded {
                Ok(message) => {
                    payload_at = at;
                    items.push(Item { message, payload: &[], named: decoder.named(), offset });
                    continue;
                }
                Err(need) => need,
            }
        };
        assert!(need > end - at || left > 0, "asked for what is there");
        if end == stream.len() {
            return Ok(Driven { items, rest: &stream[at..] });
        }
        end = stream.len().min(end + pieces.draw());
    }
}

/// Writes one record and what followed it.
pub(crate) fn encode_record(
    item: &Item<'_, RamRecord>,
    encoder: &mut RecordEncoder,
    out: &mut Vec<u8>,
) {
    if item.named {
        encoder.forget_last_block();
    }
    match item.message {
        RamRecord::Zero { block, offset } => encoder.zero_page(block, offset, out),
        RamRecord::PageFollows { block, offset, .. } => encoder.page_header(block, offset, out),
        RamRecord::XbzrleFollows { block, offset, len } => {
            encoder.xbzrle_header(block, offset, u16::try_from(len).unwrap(), out);
        }
        RamRecord::EndOfSection => encode_end_of_section(out),
        RamRecord::MultifdFlush => encode_multifd_flush(out),
    }
    out.extend_from_slice(item.payload);
}

/// Writes a main stream from its messages; `at_close` is the device state of a stream that
/// ended without a description.
pub(crate) fn encode_main(
    items: &[Item<'_, Decoded>],
    blocks: &Arc<BlockList>,
    at_close: Option<&DeviceState>,
    delimiting: whimbrel_wire::Delimiting,
) -> Vec<u8> {
    let mut out = Vec::new();
    let mut encoder = RecordEncoder::new(Arc::clone(blocks));
    let mapped = blocks.iter().any(|(_, block)| block.mapped_ram.is_some());
    for item in items {
        match &item.message {
            Decoded::NeedMore(_) | Decoded::DeviceStateBegins => {}
            Decoded::Header(header) => header.encode(&mut out),
            Decoded::Configuration(configuration) => configuration.encode(&mut out),
            Decoded::Command(command) => command.encode(&mut out),
            Decoded::SectionStart(header) => {
                header.encode_start(&mut out);
                if mapped {
                    blocks.encode_total(&mut out);
                }
            }
            Decoded::MappedBlock { block, skip } => {
                assert_eq!(*skip, item.payload.len() as u64);
                blocks.get(*block).unwrap().encode(&mut out);
                out.extend_from_slice(item.payload);
            }
            Decoded::RamSetup(list) => {
                assert_eq!(list, blocks);
                if !mapped {
                    list.encode(&mut out);
                }
            }
            Decoded::SectionPart(id) => id.encode_part(&mut out),
            Decoded::SectionEnd(id) => id.encode_end(&mut out),
            Decoded::Footer(id) => id.encode_footer(&mut out),
            Decoded::Ram(record) => {
                let Item { payload, named, offset, .. } = *item;
                let record = Item { message: *record, payload, named, offset };
                encode_record(&record, &mut encoder, &mut out);
            }
            Decoded::PackageFollows { len } => {
                Command::Packaged { len: *len }.encode(&mut out);
                Package::decode(item.payload, item.offset, delimiting).unwrap().encode(&mut out);
            }
            Decoded::DeviceSection(section) => section.encode(&mut out),
            Decoded::DeviceState(state) => state.encode(&mut out),
            Decoded::Eof => encode_eof(&mut out),
            Decoded::VmDescription(json) => encode_vm_description(json, &mut out),
            Decoded::Colo(message) => message.encode(&mut out),
            Decoded::CheckpointFollows { len } => {
                ColoMessage::VmstateSize(*len).encode(&mut out);
                whimbrel_wire::package::decode_checkpoint(item.payload, item.offset, delimiting)
                    .unwrap()
                    .encode(&mut out);
            }
        }
    }
    if let Some(state) = at_close {
        state.encode(&mut out);
    }
    out
}

/// Writes a return path from its messages.
pub(crate) fn encode_return(items: &[Item<'_, ReturnDecoded>]) -> Vec<u8> {
    let mut out = Vec::new();
    for item in items {
        match &item.message {
            ReturnDecoded::NeedMore(_) => {}
            ReturnDecoded::Message(message) => message.encode(&mut out),
            ReturnDecoded::BitmapFollows { len } => encode_bitmap_size(*len, &mut out),
            ReturnDecoded::BitmapEnd => encode_bitmap_end(&mut out),
            ReturnDecoded::Colo(message) => message.encode(&mut out),
        }
        out.extend_from_slice(item.payload);
    }
    out
}

/// Writes a multifd channel from its messages.
pub(crate) fn encode_multifd(items: &[Item<'_, MultifdDecoded>]) -> Vec<u8> {
    let mut out = Vec::new();
    for item in items {
        match &item.message {
            MultifdDecoded::NeedMore(_) => {}
            MultifdDecoded::Init(init) => init.encode(&mut out),
            MultifdDecoded::Packet(packet) => packet.encode(&mut out),
            MultifdDecoded::Device(packet) => packet.encode(&mut out),
        }
        out.extend_from_slice(item.payload);
    }
    out
}

/// The page size of every golden stream.
pub(crate) const PAGE: TargetPage = TargetPage::FOUR_KIB;
