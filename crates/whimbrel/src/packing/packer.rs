//! The sending side: pages of guest memory to the data of a packet.

use whimbrel_ram::kernel_copy::Gather;
use whimbrel_ram::{BlockError, RamBlock, TargetPage};
use whimbrel_wire::multifd::packet_flag;

use super::auto::{Auto, Member};
use super::stored::{self, Stored};
use super::zlib::Deflate;
use super::zstd::Compressor;
use super::{PACKET_BYTES, PACKET_PAGES, PAGE};
use crate::settings::{MultifdCompression, Parameters};

/// Room for what a packer writes: the most that a packet's data may be.
const ROOM: usize = 1 << 20;

/// Who takes the packets in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Peer {
    /// A QEMU, as far as is known: every packet has to name the method that is configured.
    Stock,
    /// A whimbrel: every packet may be packed by another method.
    Whimbrel,
}

/// How one migration packs: what its packers have in common.
#[derive(Clone, Debug)]
pub(crate) struct Packing {
    method: MultifdCompression,
    zlib_level: u8,
    zstd_level: u8,
    auto: Auto,
}

impl Packing {
    /// As the parameters have it.
    pub(crate) fn new(parameters: &Parameters, peer: Peer) -> Packing {
        let auto = Auto::new();
        auto.set_peer(peer);
        Packing {
            method: parameters.multifd_compression,
            zlib_level: parameters.multifd_zlib_level,
            zstd_level: parameters.multifd_zstd_level,
            auto,
        }
    }

    /// Who takes the packets in, when that is known better; holds for all packers from now on.
    pub(crate) fn set_peer(&self, peer: Peer) {
        self.auto.set_peer(peer);
    }

    /// The packer of one channel, which is at its beginning.
    pub(crate) fn packer(&self) -> Packer {
        let way = match self.method {
            MultifdCompression::None => Way::None,
            MultifdCompression::Zlib => Way::Zlib(Deflate::new(self.zlib_level)),
            MultifdCompression::Zstd => Way::Zstd(Compressor::new(self.zstd_level)),
            MultifdCompression::Auto => Way::Auto(self.auto.join()),
        };
        Packer {
            way,
            auto: self.auto.clone(),
            pages: Vec::new(),
            packed: Vec::new(),
            stored: Stored::default(),
        }
    }
}

/// Packs the pages of one channel's packets, in the order in which they are sent.
#[derive(Debug)]
pub(crate) struct Packer {
    way: Way,
    /// Knows who takes the packets in.
    auto: Auto,
    /// A copy of the pages: the guest writes to them, and compressors read twice.
    pages: Vec<u8>,
    packed: Vec<u8>,
    stored: Stored,
}

#[derive(Debug)]
enum Way {
    None,
    Zlib(Deflate),
    Zstd(Compressor),
    Auto(Member),
}

/// What a packet's data are to be.
enum Plan<'p> {
    /// The pages as they are.
    Plain,
    /// The pages as they are, in a frame of zstd's.
    Stored,
    Zlib(&'p mut Deflate),
    Zstd(&'p mut Compressor),
}

impl Packer {
    /// Packs `pages` of `block`, up to [`PACKET_PAGES`] of them; with none of them, gives what the
    /// packet of zero pages alone has to say.
    ///
    /// What is packed has to be sent, or the channel given up: a stream goes on with it.
    ///
    /// # Panics
    /// When there are more pages than a packet can carry.
    pub(crate) fn pack<'p>(
        &'p mut self,
        block: &'p RamBlock,
        pages: &'p [TargetPage],
    ) -> Result<Packed<'p>, BlockError> {
        assert!(pages.len() <= PACKET_PAGES, "the pages of one packet");
        let guest = Guest { block, pages };
        if pages.is_empty() {
            let flags = match &self.way {
                Way::None => 0,
                Way::Zlib(_) => packet_flag::ZLIB,
                Way::Zstd(_) => packet_flag::ZSTD,
                Way::Auto(_) if self.auto.peer() == Peer::Whimbrel => 0,
                Way::Auto(_) => packet_flag::ZSTD,
            };
            return Ok(Packed { flags, len: 0, data: Data::Guest(guest) });
        }
        let Packer { way, auto, pages: copy, packed, stored } = self;
        let plan = match way {
            Way::None => Plan::Plain,
            Way::Zlib(deflate) => Plan::Zlib(deflate),
            Way::Zstd(compressor) => Plan::Zstd(compressor),
            Way::Auto(member) => member.begin().map_or(Plan::Stored, Plan::Zstd),
        };
        let (flags, len) = match plan {
            Plan::Plain => (0, None),
            Plan::Stored => (packet_flag::ZSTD, None),
            Plan::Zlib(deflate) => {
                let (copy, packed) = guest.copied(copy, packed)?;
                let len = deflate.pack(copy, packed);
                let len = len.expect("twice the room that the pages take is enough for zlib");
                (packet_flag::ZLIB, Some(len))
            }
            Plan::Zstd(compressor) => {
                let (copy, packed) = guest.copied(copy, packed)?;
                (packet_flag::ZSTD, compressor.pack(copy, packed))
            }
        };
        let packed = match len {
            Some(len) => Packed { flags, len, data: Data::Packed(&packed[..len]) },
            // A whimbrel has pages as they are read to where they belong.
            None if flags == 0 || auto.peer() == Peer::Whimbrel => {
                Packed { flags: 0, len: guest.len(), data: Data::Guest(guest) }
            }
            None => {
                let len = stored.set(guest.len());
                Packed { flags, len, data: Data::Stored(stored, guest) }
            }
        };
        if let Way::Auto(member) = way {
            member.packed(guest.len(), packed.len);
        }
        Ok(packed)
    }

    /// The packet that was packed last has been sent, and whatever had to be waited for before the
    /// next one: `auto` learns from when that is.
    pub(crate) fn sent(&mut self) {
        if let Way::Auto(member) = &mut self.way {
            member.sent();
        }
    }
}

/// The data of a packet.
#[derive(Debug)]
pub(crate) struct Packed<'p> {
    flags: u32,
    len: usize,
    data: Data<'p>,
}

#[derive(Debug)]
enum Data<'p> {
    Guest(Guest<'p>),
    Packed(&'p [u8]),
    Stored(&'p Stored, Guest<'p>),
}

impl<'p> Packed<'p> {
    /// The bits that name the method in the packet's flags.
    pub(crate) fn flags(&self) -> u32 {
        self.flags
    }

    /// The length of the data: 1 MiB at most.
    pub(crate) fn len(&self) -> u32 {
        u32::try_from(self.len).expect("at most ROOM")
    }

    /// Appends the data, some of which may be guest memory as it is when it is sent.
    pub(crate) fn gather(&self, into: &mut Gather<'p>) -> Result<(), BlockError> {
        match &self.data {
            Data::Guest(guest) => guest.gather(into),
            Data::Packed(bytes) => {
                into.push_bytes(bytes);
                Ok(())
            }
            Data::Stored(stored, guest) => {
                into.push_bytes(stored.frame_header());
                let blocks = guest.pages.chunks(stored::BLOCK_MAX / PAGE);
                for (pages, header) in blocks.zip(stored.block_headers()) {
                    into.push_bytes(header);
                    Guest { pages, ..*guest }.gather(into)?;
                }
                Ok(())
            }
        }
    }
}

/// Pages where the guest has them.
#[derive(Debug, Clone, Copy)]
struct Guest<'p> {
    block: &'p RamBlock,
    pages: &'p [TargetPage],
}

impl<'p> Guest<'p> {
    fn len(&self) -> usize {
        self.pages.len() * PAGE
    }

    fn gather(&self, into: &mut Gather<'p>) -> Result<(), BlockError> {
        // Pages that follow each other become one piece.
        self.pages.iter().try_for_each(|page| into.push_guest(self.block, page.offset(), PAGE))
    }

    /// The pages in a buffer that is `copy`'s, and all the room there is for what they become.
    fn copied<'b>(
        &self,
        copy: &'b mut Vec<u8>,
        packed: &'b mut Vec<u8>,
    ) -> Result<(&'b [u8], &'b mut [u8]), BlockError> {
        copy.resize(PACKET_BYTES, 0);
        packed.resize(ROOM, 0);
        let copy = &mut copy[..self.len()];
        self.copy(copy)?;
        Ok((copy, packed))
    }

    /// Copies the pages to `out`, which is as long.
    fn copy(&self, out: &mut [u8]) -> Result<(), BlockError> {
        let mut rest = out;
        for run in self.pages.chunk_by(|a, b| a.0 + 1 == b.0) {
            let (here, behind) = rest.split_at_mut(run.len() * PAGE);
            self.block.read(run[0].offset(), here)?;
            rest = behind;
        }
        Ok(())
    }
}
