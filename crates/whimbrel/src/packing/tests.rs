//! Both sides together.
#![expect(clippy::cast_possible_truncation, reason = "small numbers, and random ones")]

mod golden;

use std::io::Read as _;
use std::os::fd::AsFd as _;
use std::os::unix::net::UnixStream;

use proptest::prelude::*;
use whimbrel_ram::kernel_copy::Gather;
use whimbrel_ram::{RamBlock, TargetPage};
use whimbrel_wire::multifd::{Compression, PacketHeader};

use super::packer::Packed;
use super::{PACKET_PAGES, PAGE, Packing, Peer, UnpackError, Unpacker};
use crate::settings::{MultifdCompression, Parameters};

/// What a page holds.
#[derive(Clone, Copy, Debug)]
pub(super) enum Content {
    Zero,
    Text,
    Random,
}

/// A page's bytes; those of other seeds differ, but for zeros.
pub(super) fn page(content: Content, seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(2).wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 32
    };
    let words = ["page ", "block ", "channel ", "migration ", "guest ", "0x", "\n", "of the "];
    let mut bytes = Vec::with_capacity(PAGE + 16);
    while bytes.len() < PAGE {
        match content {
            Content::Zero => bytes.push(0),
            Content::Text => bytes.extend_from_slice(words[next() as usize % 8].as_bytes()),
            Content::Random => bytes.extend_from_slice(&(next() as u32).to_le_bytes()),
        }
    }
    bytes.truncate(PAGE);
    bytes
}

/// A block of memory with these pages.
pub(super) fn block(pages: &[Vec<u8>]) -> RamBlock {
    let block = RamBlock::anonymous("test", 0, (pages.len() * PAGE) as u64).unwrap();
    for (number, page) in pages.iter().enumerate() {
        block.write((number * PAGE) as u64, page).unwrap();
    }
    block
}

/// The bytes that go out.
pub(super) fn data(packed: &Packed<'_>) -> Vec<u8> {
    let mut gather = Gather::new();
    packed.gather(&mut gather).unwrap();
    assert_eq!(gather.bytes_left(), packed.len() as usize);
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    ours.set_nonblocking(true).unwrap();
    let (mut bytes, mut piece) = (Vec::new(), vec![0; 1 << 20]);
    while gather.bytes_left() > 0 {
        let sent = gather.send(ours.as_fd(), false).unwrap();
        theirs.read_exact(&mut piece[..sent]).unwrap();
        bytes.extend_from_slice(&piece[..sent]);
    }
    bytes
}

pub(super) fn method(flags: u32) -> Compression {
    PacketHeader::empty(flags, 0, whimbrel_wire::TargetPage::FOUR_KIB).compression()
}

pub(super) fn parameters(compression: MultifdCompression, level: u8) -> Parameters {
    Parameters {
        multifd_compression: compression,
        multifd_zlib_level: level.min(9),
        multifd_zstd_level: level,
        ..Parameters::default()
    }
}

fn methods() -> impl Strategy<Value = (MultifdCompression, u8, Peer)> {
    let method = prop_oneof![
        Just(MultifdCompression::None),
        Just(MultifdCompression::Zlib),
        Just(MultifdCompression::Zstd),
        Just(MultifdCompression::Auto),
    ];
    (method, 0..=9u8, prop_oneof![Just(Peer::Stock), Just(Peer::Whimbrel)])
}

fn contents() -> impl Strategy<Value = Vec<Vec<u8>>> {
    let content = prop_oneof![Just(Content::Zero), Just(Content::Text), Just(Content::Random)];
    let page = (content, any::<u64>()).prop_map(|(content, seed)| page(content, seed));
    proptest::collection::vec(page, 1..200)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn what_is_packed_is_unpacked(
        (compression, level, peer) in methods(),
        pages in contents(),
        packets in proptest::collection::vec(
            proptest::collection::vec(any::<prop::sample::Index>(), 0..=PACKET_PAGES), 1..4),
    ) {
        let block = block(&pages);
        let mut packer = Packing::new(&parameters(compression, level), peer).packer();
        let mut unpacker = Unpacker::new();
        for packet in packets {
            let wanted: Vec<TargetPage> =
                packet.iter().map(|index| TargetPage(index.index(pages.len()) as u64)).collect();
            let packed = packer.pack(&block, &wanted).unwrap();
            prop_assert!(packed.len() <= 1 << 20);
            let fixed = match compression {
                MultifdCompression::None => Some(Compression::None),
                MultifdCompression::Zlib => Some(Compression::Zlib),
                _ if peer == Peer::Stock => Some(Compression::Zstd),
                MultifdCompression::Zstd | MultifdCompression::Auto => None,
            };
            let method = method(packed.flags());
            prop_assert!(fixed.is_none_or(|fixed| fixed == method));
            let data = data(&packed);
            let found = unpacker.unpack(method, &data, wanted.len()).unwrap();
            let expected: Vec<u8> =
                wanted.iter().flat_map(|page| &pages[page.0 as usize]).copied().collect();
            prop_assert!(found == expected);
            packer.sent();
        }
    }

    #[test]
    fn garbage_is_an_error_or_pages(
        zlib in any::<bool>(), count in 0..=PACKET_PAGES, mut data in any::<Vec<u8>>(),
        honest_start in any::<bool>(),
    ) {
        let method = if zlib { Compression::Zlib } else { Compression::Zstd };
        if honest_start {
            let head: &[u8] = if zlib { &[0x78, 0x01] } else { &[0x28, 0xb5, 0x2f, 0xfd] };
            data.splice(0..0, head.iter().copied());
        }
        let mut unpacker = Unpacker::new();
        if let Ok(pages) = unpacker.unpack(method, &data, count) {
            prop_assert_eq!(pages.len(), count * PAGE);
        }
    }
}

#[test]
fn a_packet_cut_anywhere_is_short_or_corrupt() {
    let pages: Vec<Vec<u8>> = (0..4).map(|seed| page(Content::Text, seed)).collect();
    let (block, wanted) = (block(&pages), [0, 1, 2, 3].map(TargetPage));
    for compression in [MultifdCompression::Zlib, MultifdCompression::Zstd] {
        let mut packer = Packing::new(&parameters(compression, 1), Peer::Stock).packer();
        let packed = packer.pack(&block, &wanted).unwrap();
        let (method, data) = (method(packed.flags()), data(&packed));
        // Without its last bytes a zlib packet lacks no page, only the end of its flush.
        let needed = if method == Compression::Zlib { data.len() - 8 } else { data.len() };
        for len in (0..needed).step_by(7).chain([needed - 1]) {
            let found = Unpacker::new().unpack(method, &data[..len], 4).map(<[u8]>::len);
            assert!(
                matches!(found, Err(UnpackError::Short { .. } | UnpackError::Corrupt { .. })),
                "{compression:?} cut to {len} of {}: {found:?}",
                data.len()
            );
        }
    }
}

#[test]
fn a_bomb_is_refused_at_its_first_byte_too_many() {
    let pages = vec![page(Content::Zero, 0); PACKET_PAGES];
    let (block, wanted) = (block(&pages), [TargetPage(0); PACKET_PAGES]);
    for compression in [MultifdCompression::Zlib, MultifdCompression::Zstd] {
        let mut packer = Packing::new(&parameters(compression, 1), Peer::Stock).packer();
        let packed = packer.pack(&block, &wanted).unwrap();
        let (method, data) = (method(packed.flags()), data(&packed));
        for count in [0, 1, PACKET_PAGES - 1] {
            let found = Unpacker::new().unpack(method, &data, count).map(<[u8]>::len);
            assert!(matches!(found, Err(UnpackError::Long { .. })), "{compression:?}: {found:?}");
        }
    }
    let mut found = Unpacker::new();
    let found = found.unpack(Compression::None, &[0; 2 * PAGE], 1).unwrap_err();
    assert_eq!(found.to_string(), "expected 4096 bytes of pages in none, found more");
}

#[test]
fn what_does_not_compress_goes_as_it_is() {
    let pages: Vec<Vec<u8>> = (0..128).map(|seed| page(Content::Random, seed)).collect();
    let (block, wanted) =
        (block(&pages), std::array::from_fn::<_, 128, _>(|at| TargetPage(at as u64)));
    let all = pages.concat();
    for compression in [MultifdCompression::Zstd, MultifdCompression::Auto] {
        let packing = Packing::new(&parameters(compression, 1), Peer::Stock);
        let mut packer = packing.packer();
        let packed = packer.pack(&block, &wanted).unwrap();
        // A frame's header, and one before each 128 KiB.
        assert_eq!(packed.len() as usize, all.len() + 9 + 4 * 3);
        let stored = data(&packed);
        assert_eq!(method(packed.flags()), Compression::Zstd);
        assert!(Unpacker::new().unpack(Compression::Zstd, &stored, 128).unwrap() == all);
        assert_eq!(zstd::decode_all(stored.as_slice()).unwrap(), all);
        packing.set_peer(Peer::Whimbrel);
        let packed = packer.pack(&block, &wanted).unwrap();
        assert_eq!(method(packed.flags()), Compression::None);
        assert_eq!(data(&packed), all);
    }
}

/// A packet of zero pages alone has to name the method, too.
#[test]
fn a_packet_without_pages_names_the_method() {
    let block = block(&[page(Content::Zero, 0)]);
    for (compression, stock, whimbrel) in [
        (MultifdCompression::None, Compression::None, Compression::None),
        (MultifdCompression::Zlib, Compression::Zlib, Compression::Zlib),
        (MultifdCompression::Zstd, Compression::Zstd, Compression::Zstd),
        (MultifdCompression::Auto, Compression::Zstd, Compression::None),
    ] {
        for (peer, wanted) in [(Peer::Stock, stock), (Peer::Whimbrel, whimbrel)] {
            let mut packer = Packing::new(&parameters(compression, 1), peer).packer();
            let packed = packer.pack(&block, &[]).unwrap();
            assert_eq!((packed.len(), method(packed.flags())), (0, wanted));
        }
    }
}
