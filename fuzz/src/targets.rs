//! One function per way in that bytes have.

use std::sync::Arc;

use whimbrel_wire::device::DeviceState;
use whimbrel_wire::package::decode_checkpoint;
use whimbrel_wire::{
    BlockInfo, BlockList, Decoded, Delimiting, DeviceTail, Error, MainDecoder, MainOptions,
    MultifdDecoded, MultifdDecoder, Name, Package, RecordDecoded, RecordDecoder, RecordEncoder,
    RecordFormat, ReturnDecoded, ReturnDecoder, ReturnMessage, TargetPage, VmDescription,
    mapped_ram, page_bitmap,
};

use crate::answering::{self, Answered};
use crate::choices::{Choices, read_all};
use crate::drive::{Decode, Step, drive_twice};
use crate::telling::{self, CHANNELS, URGENT};

const PAGE: TargetPage = TargetPage::FOUR_KIB;

impl Decode for MainDecoder {
    type Message = Decoded;
    fn decode(&mut self, input: &[u8]) -> Result<(usize, Step<Decoded>), Error> {
        let (taken, decoded) = MainDecoder::decode(self, input)?;
        let Decoded::NeedMore(need) = decoded else { return Ok((taken, Step::Message(decoded))) };
        Ok((taken, Step::NeedMore(need.get())))
    }
    fn payload_left(&self) -> u64 {
        MainDecoder::payload_left(self)
    }
    fn payload_taken(&mut self, len: u64) {
        MainDecoder::payload_taken(self, len);
    }
    fn offset(&self) -> u64 {
        MainDecoder::offset(self)
    }
}

impl Decode for RecordDecoder {
    type Message = whimbrel_wire::RamRecord;
    fn decode(&mut self, input: &[u8]) -> Result<(usize, Step<Self::Message>), Error> {
        Ok(match RecordDecoder::decode(self, input)? {
            (taken, RecordDecoded::Record(record)) => (taken, Step::Message(record)),
            (taken, RecordDecoded::NeedMore(need)) => (taken, Step::NeedMore(need.get())),
        })
    }
    fn payload_left(&self) -> u64 {
        RecordDecoder::payload_left(self) as u64
    }
    fn payload_taken(&mut self, len: u64) {
        RecordDecoder::payload_taken(self, usize::try_from(len).expect("a page"));
    }
    fn offset(&self) -> u64 {
        RecordDecoder::offset(self)
    }
}

impl Decode for ReturnDecoder {
    type Message = ReturnDecoded;
    fn decode(&mut self, input: &[u8]) -> Result<(usize, Step<ReturnDecoded>), Error> {
        let (taken, decoded) = ReturnDecoder::decode(self, input)?;
        let ReturnDecoded::NeedMore(need) = decoded else {
            return Ok((taken, Step::Message(decoded)));
        };
        Ok((taken, Step::NeedMore(need.get())))
    }
    fn payload_left(&self) -> u64 {
        ReturnDecoder::payload_left(self)
    }
    fn payload_taken(&mut self, len: u64) {
        ReturnDecoder::payload_taken(self, len);
    }
    fn offset(&self) -> u64 {
        ReturnDecoder::offset(self)
    }
}

impl Decode for MultifdDecoder {
    type Message = MultifdDecoded;
    fn decode(&mut self, input: &[u8]) -> Result<(usize, Step<MultifdDecoded>), Error> {
        let (taken, decoded) = MultifdDecoder::decode(self, input)?;
        let MultifdDecoded::NeedMore(need) = decoded else {
            return Ok((taken, Step::Message(decoded)));
        };
        Ok((taken, Step::NeedMore(need.get())))
    }
    fn payload_left(&self) -> u64 {
        MultifdDecoder::payload_left(self).into()
    }
    fn payload_taken(&mut self, len: u64) {
        MultifdDecoder::payload_taken(self, u32::try_from(len).expect("a packet"));
    }
    fn offset(&self) -> u64 {
        MultifdDecoder::offset(self)
    }
}

/// The main channel from its header, or, when the first byte says so, of a recovery; and the
/// packages and checkpoints in it.
pub fn main_stream(data: &[u8]) {
    let options = MainOptions { colo: true, device_state_max: 1 << 16, ..MainOptions::default() };
    let recovery = data.first() == Some(&8);
    let new = || {
        if recovery {
            MainDecoder::learning_recovery(options.clone())
        } else {
            MainDecoder::new(options.clone())
        }
    };
    let (decoder, outcome) = drive_twice(new, data);
    for (offset, message) in &outcome.messages {
        let start = usize::try_from(*offset).expect("inside the input");
        let inside = |len: u64| {
            let len = usize::try_from(len).ok()?;
            data.get(start..start.checked_add(len)?)
        };
        match message {
            Decoded::PackageFollows { len } => {
                package(inside((*len).into()).unwrap_or(&[]), decoder.delimiting());
            }
            Decoded::CheckpointFollows { len } => {
                checkpoint(inside(*len).unwrap_or(&[]), decoder.delimiting());
            }
            Decoded::DeviceState(state) => same_when_written(data, start, state),
            _ => {}
        }
    }
    if outcome.error.is_none() {
        let _ = decoder.close(&data[outcome.consumed..]);
    }
}

fn same_when_written(data: &[u8], end: usize, state: &DeviceState) {
    let mut written = Vec::new();
    state.encode(&mut written);
    assert!(data[..end].ends_with(&written), "device state is written back to the byte");
}

fn package(data: &[u8], delimiting: Delimiting) {
    if let Ok(package) = Package::decode(data, 0, delimiting) {
        let mut written = Vec::new();
        package.encode(&mut written);
        assert_eq!(written, data);
    }
}

fn checkpoint(data: &[u8], delimiting: Delimiting) {
    if let Ok(state) = decode_checkpoint(data, 0, delimiting) {
        let mut written = Vec::new();
        state.encode(&mut written);
        assert_eq!(written, data);
    }
}

/// QEMU's device state at the end of a precopy stream, and the same bytes as a package and as a
/// checkpoint.
pub fn device_tail(data: &[u8]) {
    const LIMIT: usize = 1 << 16;
    let feed = |piece: usize| {
        let mut tail = DeviceTail::new(0, LIMIT);
        let mut at = 0;
        for piece in data.chunks(piece) {
            let (taken, state) = tail.feed(piece)?;
            at += taken;
            if state.is_some() {
                return Ok((at, state));
            }
            assert_eq!(taken, piece.len());
        }
        tail.finish_at_close().map(|state| (at, Some(state)))
    };
    let whole: Result<_, Error> = feed(data.len().max(1));
    assert_eq!(whole, feed(1 + data.len() % 97), "in pieces");
    if let Ok((at, Some(state))) = &whole {
        same_when_written(data, *at, state);
    }
    for delimiting in [Delimiting::Footers, Delimiting::OwnLength] {
        package(data, delimiting);
        checkpoint(data, delimiting);
    }
}

fn blocks() -> Arc<BlockList> {
    let block =
        |name: &str, pages: u64| BlockInfo::new(Name::new(name).expect("a name"), pages << 12);
    let blocks = [block("pc.ram", 0x800), block("pc.bios", 16), block("m", 1)];
    Arc::new(BlockList::new(blocks).expect("three blocks"))
}

/// Bare records, as on the urgent channel; the first byte chooses the format.
pub fn ram_records(data: &[u8]) {
    let Some((choice, data)) = data.split_first() else { return };
    let format = [RecordFormat::Precopy, RecordFormat::Postcopy, RecordFormat::MappedRam]
        [usize::from(choice % 3)];
    let (_, outcome) = drive_twice(|| RecordDecoder::new(blocks(), PAGE, format), data);
    // Written by our encoder, which continues a block whenever it can, the records are the same.
    let mut encoder = RecordEncoder::new(blocks());
    let mut written = Vec::new();
    for (_, record) in &outcome.messages {
        use whimbrel_wire::RamRecord as Record;
        let payload = match *record {
            Record::Zero { block, offset } => {
                encoder.zero_page(block, offset, &mut written);
                0
            }
            Record::PageFollows { block, offset, len } => {
                encoder.page_header(block, offset, &mut written);
                len
            }
            Record::XbzrleFollows { block, offset, len } => {
                let short = u16::try_from(len).expect("at most a page");
                encoder.xbzrle_header(block, offset, short, &mut written);
                len
            }
            Record::EndOfSection => {
                whimbrel_wire::encode_end_of_section(&mut written);
                0
            }
            Record::MultifdFlush => {
                whimbrel_wire::encode_multifd_flush(&mut written);
                0
            }
        };
        written.resize(written.len() + payload, 0);
    }
    let (_, again) = drive_twice(|| RecordDecoder::new(blocks(), PAGE, format), &written);
    assert_eq!(again.error, None);
    let records = |outcome: &crate::drive::Outcome<_>| {
        outcome.messages.iter().map(|(_, record)| *record).collect::<Vec<_>>()
    };
    assert_eq!(records(&again), records(&outcome));
    drive_twice(|| RecordDecoder::learning(PAGE, format), data);
}

/// The return path, with and without COLO.
pub fn return_path(data: &[u8]) {
    drive_twice(|| ReturnDecoder::with_colo(PAGE), data);
    let (_, outcome) = drive_twice(|| ReturnDecoder::new(PAGE), data);
    let mut written = Vec::new();
    for (_, message) in &outcome.messages {
        match message {
            ReturnDecoded::Message(ReturnMessage::RecvBitmap(_)) => return,
            ReturnDecoded::Message(message) => message.encode(&mut written),
            _ => {}
        }
    }
    assert!(data.starts_with(&written), "messages are written back to the byte");
}

/// A delta onto a page, and a delta made from two pages.
pub fn xbzrle(data: &[u8]) {
    let mut page = [0x5a; 4096];
    let _ = whimbrel_wire::xbzrle::decode(data, &mut page);
    let old: Vec<u8> = data.iter().step_by(2).copied().take(4096).collect();
    let mut new: Vec<u8> = data.iter().skip(1).step_by(2).copied().take(4096).collect();
    new.resize(old.len(), 0);
    let mut delta = Vec::new();
    let outcome = whimbrel_wire::xbzrle::encode(&old, &new, &mut delta);
    use whimbrel_wire::xbzrle::Delta;
    let mut applied = old.clone();
    match outcome {
        Delta::Unchanged => assert_eq!(old, new),
        Delta::TooLong => assert!(delta.is_empty()),
        Delta::Encoded(len) => {
            assert!(len == delta.len() && len < new.len());
            whimbrel_wire::xbzrle::decode(&delta, &mut applied).expect("our own delta");
            assert_eq!(applied, new);
        }
    }
}

/// A mapped-ram file: the places of blocks, and a bitmap of arbitrary bytes.
pub fn mapped_ram(data: &[u8]) {
    let (decoder, outcome) = drive_twice(|| MainDecoder::new(MainOptions::default()), data);
    for (_, block) in decoder.blocks().iter().chain(decoder.blocks_so_far().iter()) {
        let Some(header) = block.mapped_ram else { continue };
        let bitmap_len = page_bitmap::bitmap_len(block.used_length, PAGE);
        assert!(header.bitmap_offset + bitmap_len <= header.pages_offset);
        assert!(header.pages_offset <= header.end(block.used_length));
        let ours = mapped_ram::MappedRamHeader::place(0, block.used_length, PAGE);
        assert!(ours.is_none_or(|ours| ours.bitmap_offset + bitmap_len <= ours.pages_offset));
    }
    for (page, _) in data.iter().enumerate() {
        let page = page as u64;
        let mut bitmap = data.to_vec();
        if page >= 64 {
            break;
        }
        let set = page_bitmap::is_set(&bitmap, page);
        page_bitmap::set(&mut bitmap, page, !set);
        assert_eq!(page_bitmap::is_set(&bitmap, page), !set);
    }
    drop(outcome);
}

/// A multifd channel.
pub fn multifd(data: &[u8]) {
    let (_, outcome) = drive_twice(|| MultifdDecoder::new(PAGE), data);
    for (_, message) in &outcome.messages {
        if let MultifdDecoded::Packet(packet) = message {
            let pages = packet.normal().len() + packet.zero().len();
            assert!(pages <= 128 && (pages == 0) == packet.block().is_none());
        }
    }
}

/// The description of the device state, of any text.
pub fn vmdesc(data: &[u8]) {
    if let Ok(description) = VmDescription::parse(data) {
        let _ = description.len();
    }
}

/// What a source says on all of its channels, as operations: each channel for itself.
pub fn channels(data: &[u8]) {
    // Each is decoded several times, in small pieces.
    const LEN_MAX: usize = 256 << 10;
    let mut said: [Vec<u8>; CHANNELS] = Default::default();
    // The first byte of bare records chooses their format.
    said[URGENT].push(1);
    for step in telling::steps(&mut Choices::new(data)) {
        if let telling::Step::Send(channel, bytes) = step {
            let room = LEN_MAX.saturating_sub(said[channel].len());
            said[channel].extend(bytes.iter().take(room));
        }
    }
    let [main, first, second, urgent] = said;
    main_stream(&main);
    multifd(&first);
    multifd(&second);
    ram_records(&urgent);
}

/// What a destination answers, as operations.
pub fn answers(data: &[u8]) {
    let (mut said, mut damage, mut cut) = (Vec::new(), None, 0);
    for op in read_all(&mut Choices::new(data)) {
        match op {
            Answered::Damage { at, value } => damage = Some((usize::from(at), value)),
            Answered::Cut { count } => cut = usize::from(count),
            message => {
                let mut bytes = Vec::new();
                answering::encode(&message, &mut bytes);
                if let Some((at, value)) = damage.take()
                    && let Some(byte) = bytes.get_mut(at)
                {
                    *byte = value;
                }
                bytes.truncate(bytes.len().saturating_sub(std::mem::take(&mut cut)));
                said.extend(bytes);
            }
        }
    }
    return_path(&said);
}
