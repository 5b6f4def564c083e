//! A multifd channel on its way in: headers are decoded from a buffer, the data of a packet goes
//! where its pages belong, and one read takes in both the data and the header behind them.

use whimbrel_ram::kernel_copy::Scatter;
use whimbrel_ram::{BlockIndex, GuestRam, RamBlock, TARGET_PAGE};
use whimbrel_wire::{BlockOffset, MultifdDecoded, MultifdDecoder, PacketHeader, TargetPage};

use crate::channel::Channel;
use crate::error::Error;
use crate::packing::Unpacker;
use crate::worker::Cancel;

const PAGE: usize = TARGET_PAGE.bytes();

/// A channel being decoded.
#[derive(Debug)]
pub(in crate::destination) struct PacketInput {
    channel: Channel,
    decoder: MultifdDecoder,
    buffer: [u8; MultifdDecoder::HEADER_MAX],
    held: usize,
    unpacker: Unpacker,
    /// The data of a packet that cannot go where they belong at once.
    data: Vec<u8>,
}

impl PacketInput {
    pub(in crate::destination) fn new(channel: Channel) -> PacketInput {
        let decoder = MultifdDecoder::new(TargetPage::FOUR_KIB);
        PacketInput {
            channel,
            decoder,
            buffer: [0; MultifdDecoder::HEADER_MAX],
            held: 0,
            unpacker: Unpacker::new(),
            data: Vec::new(),
        }
    }

    /// From here on `cancel` is what ends its waits.
    pub(in crate::destination) fn heed(&mut self, cancel: Cancel) {
        self.channel.heed(cancel);
    }

    /// The channel's name.
    pub(super) fn name(&self) -> &'static str {
        self.channel.name()
    }

    /// How many bytes have been understood.
    pub(in crate::destination) fn offset(&self) -> u64 {
        self.decoder.offset()
    }

    /// An error in what has been understood last.
    pub(in crate::destination) fn wrong(&self, problem: &str) -> Error {
        Error::Refused(format!("{} channel, before byte {}: {problem}", self.name(), self.offset()))
    }

    /// The block of a packet that has pages, all of which lie inside it.
    pub(in crate::destination) fn block_of<'r>(
        &self,
        header: &PacketHeader,
        ram: &'r GuestRam,
    ) -> Result<Option<(BlockIndex, &'r RamBlock)>, Error> {
        let Some(name) = header.block() else { return Ok(None) };
        let Some((index, block)) = ram.find(name.as_str().unwrap_or_default()) else {
            return Err(self.wrong(&format!("a packet for block {name}, which does not exist")));
        };
        let outside = |offset: &BlockOffset| {
            offset.0.checked_add(PAGE as u64).is_none_or(|end| end > block.len())
        };
        match header.normal().chain(header.zero()).find(outside) {
            Some(BlockOffset(offset)) => Err(self.wrong(&format!(
                "a page at {offset:#x} of block {name}, which has {:#x} bytes",
                block.len()
            ))),
            None => Ok(Some((index, block))),
        }
    }

    /// Whether a packet has come in part.
    pub(super) fn is_within_a_packet(&self) -> bool {
        self.held > 0 || self.decoder.payload_left() > 0
    }

    /// The next packet; `None` where the channel ends.
    pub(in crate::destination) fn next(&mut self) -> Result<Option<Box<PacketHeader>>, Error> {
        loop {
            let (used, decoded) = self
                .decoder
                .decode(&self.buffer[..self.held])
                .map_err(|source| Error::Protocol { channel: self.channel.name(), source })?;
            self.buffer.copy_within(used..self.held, 0);
            self.held -= used;
            match decoded {
                MultifdDecoded::Packet(header) => return Ok(Some(header)),
                // Compared when the channel was told from the others.
                MultifdDecoded::Init(_) => {}
                MultifdDecoded::Device(device) => {
                    return Err(self.wrong(&format!(
                        "a packet with the state of device {} ({} bytes), which is not supported \
                         here: switch multifd for devices off at the source",
                        device.name, device.len
                    )));
                }
                MultifdDecoded::NeedMore(_) => {
                    let mut pieces = Scatter::new();
                    pieces.push_buffer(&mut self.buffer[self.held..]);
                    let received = match self.channel.receive(&mut pieces) {
                        // A QEMU before 10 ends its TLS so. Nothing can be missing unseen: what
                        // belongs to a round ends in a SYNC, for which the main channel waits.
                        Err(Error::Truncated { .. }) if self.held == 0 => 0,
                        received => received?,
                    };
                    match received {
                        0 if self.held == 0 => return Ok(None),
                        0 => return Err(self.ended("the rest of a packet's header")),
                        bytes => self.held += bytes,
                    }
                }
            }
        }
    }

    /// Takes the data of a packet into pages of `block`, which it names by their offsets and which
    /// lie inside the block.
    pub(super) fn take_pages(
        &mut self,
        block: &RamBlock,
        offsets: impl ExactSizeIterator<Item = BlockOffset>,
    ) -> Result<(), Error> {
        let len = offsets.len() * PAGE;
        let here = self.held.min(len);
        let mut from = 0;
        let mut rest = Scatter::new();
        for BlockOffset(offset) in offsets {
            let held = (here - from).min(PAGE);
            block.write(offset, &self.buffer[from..from + held])?;
            from += held;
            rest.push_guest(block, offset + held as u64, PAGE - held)?;
        }
        self.forget(here);
        let PacketInput { channel, buffer, held, decoder, .. } = self;
        receive(channel, decoder, (buffer, held), rest, len - here)?;
        decoder.payload_taken(u32::try_from(len).expect("a packet's pages"));
        Ok(())
    }

    /// Takes the data of a packet, and gives its pages, unpacked, one behind the other.
    pub(in crate::destination) fn unpack(&mut self, header: &PacketHeader) -> Result<&[u8], Error> {
        // At most what the decoder lets through, 1 MiB.
        let len = header.data_len() as usize;
        self.data.resize(len, 0);
        let here = self.held.min(len);
        self.data[..here].copy_from_slice(&self.buffer[..here]);
        self.forget(here);
        let at = self.offset();
        let PacketInput { channel, buffer, held, decoder, data, unpacker } = self;
        let mut rest = Scatter::new();
        rest.push_buffer(&mut data[here..]);
        receive(channel, decoder, (buffer, held), rest, len - here)?;
        decoder.payload_taken(header.data_len());
        let count = header.normal().len();
        unpacker.unpack(header.compression(), data, count).map_err(|source| Error::Packet {
            channel: channel.name(),
            offset: at,
            source,
        })
    }

    fn forget(&mut self, bytes: usize) {
        self.buffer.copy_within(bytes..self.held, 0);
        self.held -= bytes;
    }

    fn ended(&self, expected: &str) -> Error {
        let offset = self.decoder.offset() + self.held as u64;
        Error::Ended { channel: self.name(), offset, expected: expected.into() }
    }
}

/// Fills `rest`, which has `missing` bytes, and in the same calls begins with what comes behind
/// them.
fn receive<'p>(
    channel: &mut Channel,
    decoder: &MultifdDecoder,
    (buffer, held): (&'p mut [u8], &mut usize),
    mut rest: Scatter<'p>,
    missing: usize,
) -> Result<(), Error> {
    if missing == 0 {
        return Ok(());
    }
    rest.push_buffer(&mut buffer[..PacketHeader::len(TargetPage::FOUR_KIB)]);
    let mut got = 0;
    while got < missing {
        match channel.receive(&mut rest)? {
            0 => {
                let expected = format!("{} bytes more of a packet's pages", missing - got);
                let offset = decoder.offset() + got as u64;
                return Err(Error::Ended { channel: channel.name(), offset, expected });
            }
            bytes => got += bytes,
        }
    }
    *held = got - missing;
    Ok(())
}
