//! What QEMUs sent: one guest, recorded with and without compression. It fills some pages and
//! then counts in the first word of others, so that its recordings differ in those words alone.

use std::collections::BTreeMap;
use std::path::Path;

use whimbrel_wire::multifd::Compression;
use whimbrel_wire::{MultifdDecoded, MultifdDecoder, PacketHeader};

use super::super::{PAGE, Unpacker};

/// What the channels of a recording left behind, by block and offset.
type Pages = BTreeMap<(Vec<u8>, u64), Vec<u8>>;

fn recorded(name: &str) -> Vec<u8> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../whimbrel-wire/tests/golden");
    let packed = std::fs::read(folder.join(format!("{name}.zst"))).unwrap();
    zstd::decode_all(packed.as_slice()).unwrap()
}

/// Each packet of a recorded channel, with its data.
fn packets(bytes: &[u8]) -> Vec<(PacketHeader, Vec<u8>)> {
    let mut decoder = MultifdDecoder::new(whimbrel_wire::TargetPage::FOUR_KIB);
    let (mut at, mut packets) = (0, Vec::new());
    while at < bytes.len() {
        let (used, decoded) = decoder.decode(&bytes[at..]).unwrap();
        at += used;
        if let MultifdDecoded::Packet(header) = decoded {
            let len = header.data_len() as usize;
            decoder.payload_taken(header.data_len());
            packets.push((*header, bytes[at..at + len].to_vec()));
            at += len;
        }
    }
    packets
}

/// Unpacks both channels; gives how many packets had data, and what they left behind: rounds one
/// behind the other, as SYNC packets part them.
fn unpacked(set: &str, compression: Compression) -> (usize, Pages) {
    let mut rounds: BTreeMap<usize, Vec<(PacketHeader, Vec<u8>)>> = BTreeMap::new();
    let mut with_data = 0;
    for channel in ["connA", "connB"] {
        let mut unpacker = Unpacker::new();
        let mut round = 0;
        for (header, data) in packets(&recorded(&format!("{set}.{channel}"))) {
            let count = header.normal().len();
            let is_sync = header.is_sync();
            if count > 0 {
                assert_eq!(header.compression(), compression, "{set}");
                let pages = unpacker.unpack(compression, &data, count).unwrap().to_vec();
                assert_eq!(pages.len(), count * PAGE);
                rounds.entry(round).or_default().push((header, pages));
                with_data += 1;
            }
            round += usize::from(is_sync);
        }
    }
    let mut left = Pages::new();
    for (header, pages) in rounds.into_values().flatten() {
        let block = header.block().unwrap().as_bytes().to_vec();
        for (offset, page) in header.normal().zip(pages.chunks_exact(PAGE)) {
            left.insert((block.clone(), offset.0), page.to_vec());
        }
    }
    (with_data, left)
}

#[test]
fn compressed_recordings_hold_the_pages_of_plain_ones() {
    for (version, method, compression) in [
        ("10.0.2", "zlib", Compression::Zlib),
        ("10.0.2", "zstd", Compression::Zstd),
        ("11.1.3", "zstd", Compression::Zstd),
    ] {
        let (_, plain) = unpacked(&format!("multifd-none-{version}"), Compression::None);
        let (packets, found) = unpacked(&format!("multifd-{method}-{version}"), compression);
        assert!(packets > 4 && plain.len() > 72, "{packets} packets, {} pages", plain.len());
        assert!(found.keys().eq(plain.keys()), "{method} {version}");
        let mut with_content = 0;
        for (place, page) in &found {
            let is_counter = place.0 == *b"pc.ram" && (0x10_0000..0x60_0000).contains(&place.1);
            let from = if is_counter { 4 } else { 0 };
            assert!(page[from..] == plain[place][from..], "{method} {version}: {place:x?}");
            with_content += usize::from(page.iter().any(|byte| *byte != 0));
        }
        assert!(with_content > 72, "{with_content}");
    }
}
