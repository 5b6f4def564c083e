//! What a test says on multifd channels.

#![allow(
    dead_code,
    clippy::allow_attributes,
    reason = "each test binary uses the part it needs of what they share"
)]

use whimbrel::Vm;
use whimbrel_vm::ReferenceVm;
use whimbrel_wire::multifd::packet_flag;
use whimbrel_wire::{BlockOffset, MultifdInit, Name, PacketHeader, TargetPage};

const PAGE: u64 = 4096;

/// The first message of channel `channel`.
pub(crate) fn init(channel: u8) -> Vec<u8> {
    init_of(channel, [0; 16])
}

/// The same, of a VM with this UUID.
pub(crate) fn init_of(channel: u8, uuid: [u8; 16]) -> Vec<u8> {
    let mut bytes = Vec::new();
    MultifdInit { uuid, channel }.encode(&mut bytes);
    bytes
}

/// The end of a round.
pub(crate) fn sync() -> Vec<u8> {
    bytes(&PacketHeader::sync(1, TargetPage::FOUR_KIB))
}

pub(crate) fn bytes(header: &PacketHeader) -> Vec<u8> {
    let mut bytes = Vec::new();
    header.encode(&mut bytes);
    bytes
}

/// How the pages of a packet are packed, as bits of its flags.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Packing {
    None,
    Zlib,
    Zstd,
}

impl Packing {
    pub(crate) fn flags(self) -> u32 {
        match self {
            Packing::None => 0,
            Packing::Zlib => packet_flag::ZLIB,
            Packing::Zstd => packet_flag::ZSTD,
        }
    }

    /// Packs, as the first packet of a channel.
    pub(crate) fn pack(self, pages: &[u8]) -> Vec<u8> {
        Packer::new(self).pack(pages)
    }
}

/// Packs what goes on one channel: by zlib, that is one stream.
pub(crate) struct Packer {
    packing: Packing,
    zlib: flate2::Compress,
}

impl Packer {
    pub(crate) fn new(packing: Packing) -> Packer {
        Packer { packing, zlib: flate2::Compress::new(flate2::Compression::fast(), true) }
    }

    pub(crate) fn pack(&mut self, pages: &[u8]) -> Vec<u8> {
        match self.packing {
            Packing::None => pages.to_vec(),
            Packing::Zlib => {
                let mut out = Vec::with_capacity(pages.len() + (64 << 10));
                self.zlib
                    .compress_vec(pages, &mut out, flate2::FlushCompress::Sync)
                    .expect("it can be packed");
                out
            }
            Packing::Zstd => zstd::bulk::compress(pages, 1).expect("it can be packed"),
        }
    }
}

/// A header for these pages of a block, and `len` bytes behind it.
pub(crate) fn header(
    block: &str,
    (normal, zero): (&[u64], &[u64]),
    (flags, len): (u32, usize),
) -> PacketHeader {
    let offset = |page: &u64| BlockOffset(page * PAGE);
    let len = u32::try_from(len).expect("short");
    let name = Name::new(block).expect("a name");
    let (normal, zero) = (normal.iter().map(offset), zero.iter().map(offset));
    PacketHeader::pages(&name, (normal, zero), (flags, len, 7), TargetPage::FOUR_KIB)
}

/// A packet of these pages, with `data` as what follows.
pub(crate) fn packet(block: &str, pages: (&[u64], &[u64]), flags: u32, data: &[u8]) -> Vec<u8> {
    let mut packet = bytes(&header(block, pages, (flags, data.len())));
    packet.extend_from_slice(data);
    packet
}

/// The content of pages.
pub(crate) fn content(vm: &ReferenceVm, block: &str, pages: &[u64]) -> Vec<u8> {
    let (_, block) = vm.ram().find(block).expect("a block");
    let mut all = vec![0; pages.len() * 4096];
    for (page, to) in pages.iter().zip(all.chunks_exact_mut(4096)) {
        block.read(page * PAGE, to).expect("inside");
    }
    all
}

/// Every page of every block but these of `vm.ram`, as packets, one on each channel in turn.
pub(crate) fn all_packets(
    vm: &ReferenceVm,
    channels: usize,
    packing: Packing,
    but: &[u64],
) -> Vec<(usize, Vec<u8>)> {
    let mut packers: Vec<Packer> = (0..channels).map(|_| Packer::new(packing)).collect();
    let mut packets = Vec::new();
    for (_, block) in vm.ram().blocks() {
        let left_out = |page: &u64| block.name() == "vm.ram" && but.contains(page);
        let pages: Vec<u64> = (0..block.target_pages()).filter(|page| !left_out(page)).collect();
        for pages in pages.chunks(128) {
            let channel = packets.len() % channels;
            let data = packers[channel].pack(&content(vm, block.name(), pages));
            let packet = packet(block.name(), (pages, &[]), packing.flags(), &data);
            packets.push((channel, packet));
        }
    }
    packets
}
