//! The data of multifd packets, which are compressed.
//!
//! An input is packets of one channel: a byte for the method, one for the pages less one, two for
//! the length of the data, the data.

use whimbrel::fuzzing::Unpacker;
use whimbrel_wire::multifd::Compression;
use whimbrel_wire::{MultifdDecoded, MultifdDecoder, TargetPage};

const PAGE: usize = 4096;

/// A frame of zstd that fills all pages of a packet with one byte: blocks of 128 KiB of it.
fn full(byte: u8) -> Vec<u8> {
    let mut frame = vec![0x28, 0xb5, 0x2f, 0xfd, 0xa0];
    frame.extend((512u32 << 10).to_le_bytes());
    for is_last in [0, 0, 0, 1] {
        let repeated = 1 << 1;
        let header: u32 = (128 << 10) << 3 | repeated | is_last;
        frame.extend(&header.to_le_bytes()[..3]);
        frame.push(byte);
    }
    frame
}

/// Seeds: the packets of a recorded channel that have compressed pages.
pub(crate) fn seed(stream: &[u8], add: &mut dyn FnMut(&'static str, Vec<u8>)) {
    let mut decoder = MultifdDecoder::new(TargetPage::FOUR_KIB);
    let (mut at, mut seed) = (0, Vec::new());
    while let Ok((taken, decoded)) = decoder.decode(&stream[at..]) {
        at += taken;
        match decoded {
            MultifdDecoded::NeedMore(_) => break,
            MultifdDecoded::Packet(header) => {
                let len = header.data_len();
                let method = match header.compression() {
                    Compression::Zlib => 1,
                    Compression::Zstd => 2,
                    Compression::None | Compression::Other(_) => 0,
                };
                let data = &stream[at..at + len as usize];
                decoder.payload_taken(len);
                at += data.len();
                if let (1.., Ok(len), Some(last)) =
                    (method, u16::try_from(len), header.normal_pages.checked_sub(1))
                {
                    seed.extend([method, u8::try_from(last).unwrap_or(u8::MAX)]);
                    seed.extend(len.to_le_bytes());
                    seed.extend(data);
                }
            }
            MultifdDecoded::Init(_) | MultifdDecoded::Device(_) => {}
        }
    }
    if !seed.is_empty() {
        add("unpack", seed);
    }
}

/// Pages are what their packets say, whatever was in the buffers before.
pub fn unpack(data: &[u8]) {
    let (mut unpacker, mut other) = (Unpacker::default(), Unpacker::default());
    // What is left in its buffer must not be taken for anything.
    let filled = other.unpack(Compression::Zstd, &full(0xee), Unpacker::PAGES);
    assert!(filled.is_ok_and(|pages| pages.iter().all(|byte| *byte == 0xee)));
    let mut rest = data;
    while let [method, pages, low, high, behind @ ..] = rest {
        let len = usize::from(u16::from_le_bytes([*low, *high])).min(behind.len());
        let (data, behind) = behind.split_at(len);
        let method = match method % 4 {
            0 => Compression::None,
            1 => Compression::Zlib,
            2 => Compression::Zstd,
            _ => Compression::Other(8),
        };
        let count = usize::from(*pages) % Unpacker::PAGES + 1;
        let found = unpacker.unpack(method, data, count);
        assert_eq!(found, other.unpack(method, data, count));
        match found {
            Ok(pages) => assert_eq!(pages.len(), count * PAGE),
            // The channel ends here.
            Err(error) => return assert!(error.to_string().starts_with("expected ")),
        }
        rest = behind;
    }
}
