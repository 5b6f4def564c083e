//! The sending side: pages of guest memory to the data of a packet.

use whimbrel_ram::kernel_copy::Gather;
use whimbrel_ram::{BlockError, RamBlock, TargetPage};
use whimbrel_wire::multifd::packet_flag;

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
    /// A QEMU: every packet has to name the method that is configured.
    Stock,
    /// A whimbrel: every packet may be packed by another method.
    Whimbrel,
}

/// How one migration packs; cloned for each of its channels.
#[derive(Clone, Debug)]
pub(crate) struct Packing {
    method: MultifdCompression,
    zlib_level: u8,
    zstd_level: u8,
    peer: Peer,
}

impl Packing {
    /// As the parameters have it.
    pub(crate) fn new(parameters: &Parameters, peer: Peer) -> Packing {
        Packing {
            method: parameters.multifd_compression,
            zlib_level: parameters.multifd_zlib_level,
            zstd_level: parameters.multifd_zstd_level,
            peer,
        }
    }

    /// The packer of one channel, which is at its beginning.
    pub(crate) fn packer(&self) -> Packer {
        let zstd_level = i32::from(self.zstd_level);
        let way = match (self.method, self.peer) {
            (MultifdCompression::None, _) => Way::None,
            (MultifdCompression::Zlib, _) => Way::Zlib(Deflate::new(self.zlib_level)),
            (MultifdCompression::Zstd | MultifdCompression::Auto, _) => {
                Way::Zstd(Compressor::new(zstd_level))
            }
        };
        Packer { way, pages: Vec::new(), packed: Vec::new(), stored: Stored::default() }
    }
}

/// Packs the pages of one channel's packets, in the order in which they are sent.
#[derive(Debug)]
pub(crate) struct Packer {
    way: Way,
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
}

impl Packer {
    /// Packs `pages` of `block`, up to [`PACKET_PAGES`] of them; with none of them, gives the
    /// packet of zero pages alone.
    ///
    /// What is packed has to be sent, or the channel given up: a zlib stream goes on with it.
    ///
    /// # Panics
    /// When there are more pages than a packet can carry.
    pub(crate) fn pack<'p>(
        &'p mut self,
        block: &'p RamBlock,
        pages: &'p [TargetPage],
    ) -> Result<Packed<'p>, BlockError> {
        assert!(pages.len() <= PACKET_PAGES, "the pages of one packet");
        let flags = match self.way {
            Way::None => 0,
            Way::Zlib(_) => packet_flag::ZLIB,
            Way::Zstd(_) => packet_flag::ZSTD,
        };
        let guest = Guest { block, pages };
        if pages.is_empty() {
            return Ok(Packed { flags, len: 0, data: Data::Guest(guest) });
        }
        if let Way::None = self.way {
            return Ok(Packed { flags, len: guest.len(), data: Data::Guest(guest) });
        }
        self.pages.resize(PACKET_BYTES, 0);
        self.packed.resize(ROOM, 0);
        let copy = &mut self.pages[..guest.len()];
        guest.copy(copy)?;
        let len = match &mut self.way {
            Way::None => None,
            Way::Zlib(deflate) => {
                let len = deflate.pack(copy, &mut self.packed);
                Some(len.expect("twice the room that the pages take is enough for zlib"))
            }
            // Longer than the pages as they are is of no use to anybody.
            Way::Zstd(compressor) => compressor.pack(copy, &mut self.packed[..guest.len()]),
        };
        Ok(match len {
            Some(len) => Packed { flags, len, data: Data::Packed(&self.packed[..len]) },
            None => {
                let len = self.stored.set(guest.len());
                Packed { flags, len, data: Data::Stored(&self.stored, guest) }
            }
        })
    }
}

impl Packer {
    /// The packet that was packed last has been sent. What `auto` learns from is the time from
    /// there to here.
    pub(crate) fn sent(&mut self) {}
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
