//! Real streams of QEMU: every file decodes to its last byte, gives the same messages in pieces
//! of any size, and is written back to the byte.
#![expect(clippy::unwrap_used, reason = "helpers of tests fail like tests")]

mod support;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use sha2::{Digest as _, Sha256};
use support::{
    Driven, Item, PAGE, Pieces, drive, encode_main, encode_multifd, encode_record, encode_return,
};
use whimbrel_wire::{
    BlockList, ChannelKind, Decoded, DeviceState, Error, ErrorKind, MainDecoder, MainOptions,
    MultifdDecoded, MultifdDecoder, RamRecord, RecordDecoder, RecordEncoder, RecordFormat,
    ReturnDecoded, ReturnDecoder, ReturnMessage, xbzrle,
};

/// Counts of records, by their names in the manifest.
#[derive(Debug, Default, PartialEq, Eq)]
struct Counts {
    zero: u64,
    page: u64,
    xbzrle: u64,
    eos: u64,
    multifd_flush: u64,
}

impl Counts {
    fn of(records: impl IntoIterator<Item = RamRecord>) -> Self {
        let mut counts = Self::default();
        for record in records {
            *match record {
                RamRecord::Zero { .. } => &mut counts.zero,
                RamRecord::PageFollows { .. } => &mut counts.page,
                RamRecord::XbzrleFollows { .. } => &mut counts.xbzrle,
                RamRecord::EndOfSection => &mut counts.eos,
                RamRecord::MultifdFlush => &mut counts.multifd_flush,
            } += 1;
        }
        counts
    }
}

const PIECES: [Pieces; 4] =
    [Pieces::Of(1), Pieces::Of(7), Pieces::Of(4096), Pieces::Random(0x5eed)];

struct Golden {
    name: String,
    bytes: Vec<u8>,
    manifest: serde_json::Value,
}

fn directory() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden")
}

fn manifest() -> BTreeMap<String, serde_json::Value> {
    let text = std::fs::read(directory().join("manifest.json")).unwrap();
    let entries: Vec<serde_json::Value> = serde_json::from_slice(&text).unwrap();
    entries.into_iter().map(|entry| (entry["file"].as_str().unwrap().to_owned(), entry)).collect()
}

fn load_file(file: &str, manifest: serde_json::Value) -> Golden {
    let packed = std::fs::read(directory().join(file)).unwrap();
    let bytes = zstd::decode_all(packed.as_slice()).unwrap();
    Golden { name: file.trim_end_matches(".zst").to_owned(), bytes, manifest }
}

fn load(name: &str) -> Golden {
    let file = format!("{name}.zst");
    let entry = manifest().remove(&file).unwrap_or_else(|| panic!("{file} is in the manifest"));
    load_file(&file, entry)
}

fn all(kind: impl Fn(&str) -> Kind, wanted: Kind) -> Vec<Golden> {
    let files = manifest().into_iter();
    let wanted: Vec<Golden> = files
        .filter(|(file, _)| kind(file) == wanted)
        .map(|(file, entry)| load_file(&file, entry))
        .collect();
    assert!(!wanted.is_empty());
    wanted
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Main,
    RecoveryMain,
    Preempt,
    Return,
    Multifd,
}

/// What a file holds, by its name.
fn kind(file: &str) -> Kind {
    let stem = file.trim_end_matches(".zst");
    if stem.ends_with("rp") || stem.ends_with(".reply") {
        Kind::Return
    } else if stem.ends_with(".preempt") || stem.ends_with("-preempt") {
        Kind::Preempt
    } else if stem.contains(".conn") {
        Kind::Multifd
    } else if stem.ends_with(".2-main") {
        Kind::RecoveryMain
    } else {
        Kind::Main
    }
}

fn options(name: &str) -> MainOptions {
    MainOptions { colo: name.starts_with("colo"), ..MainOptions::default() }
}

/// The files that were cut off in the middle of something. (COLO's ended with the primary too,
/// but between two checkpoints.)
fn is_cut(name: &str) -> bool {
    name.contains(".1-main") || name.contains(".1-preempt")
}

struct Main<'a> {
    items: Vec<Item<'a, Decoded>>,
    rest: &'a [u8],
    blocks: Arc<BlockList>,
    delimiting: whimbrel_wire::Delimiting,
    closed: Result<Option<DeviceState>, Error>,
}

fn read_main<'a>(mut decoder: MainDecoder, golden: &'a Golden, pieces: Pieces) -> Main<'a> {
    let Driven { items, rest } = drive(&mut decoder, &golden.bytes, pieces)
        .unwrap_or_else(|error| panic!("{}: {error}", golden.name));
    let (blocks, delimiting) = (Arc::clone(decoder.blocks()), decoder.delimiting());
    Main { items, rest, blocks, delimiting, closed: decoder.close(rest) }
}

/// The decoder at the point where the first connection of a recovery broke.
fn broken_decoder(golden: &Golden) -> MainDecoder {
    let mut decoder = MainDecoder::new(options(&golden.name));
    drive(&mut decoder, &golden.bytes, Pieces::Of(1 << 20)).unwrap();
    decoder
}

fn blocks_of(preempt: &str) -> Arc<BlockList> {
    let main = preempt.replace("2-preempt", "1-main").replace("1-preempt", "1-main");
    let main = main.replace(".preempt", ".main");
    let golden = load(&main);
    Arc::clone(broken_decoder(&golden).blocks())
}

#[test]
fn files_are_those_of_the_manifest() {
    let manifest = manifest();
    let mut files: Vec<String> = std::fs::read_dir(directory())
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| name.ends_with(".zst"))
        .collect();
    files.sort();
    assert_eq!(files, manifest.keys().cloned().collect::<Vec<_>>());
    for (file, entry) in manifest {
        let golden = load_file(&file, entry);
        assert_eq!(golden.manifest["raw_size"], golden.bytes.len() as u64, "{file}");
        let hash: String =
            Sha256::digest(&golden.bytes).iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(golden.manifest["raw_sha256"], hash, "{file}");
    }
}

#[test]
fn connections_are_told_apart_by_their_first_bytes() {
    for (file, entry) in manifest() {
        let golden = load_file(&file, entry);
        let expected = match kind(&file) {
            Kind::Main => ChannelKind::Main,
            Kind::RecoveryMain => ChannelKind::RecoveringMain,
            Kind::Preempt => ChannelKind::Preempt,
            Kind::Multifd => ChannelKind::Multifd,
            Kind::Return => continue,
        };
        let first = *golden.bytes.first_chunk().unwrap();
        assert_eq!(ChannelKind::of(first), Some(expected), "{file}");
    }
}

fn check_main(golden: &Golden, decoder: impl Fn() -> MainDecoder) {
    let name = &golden.name;
    let main = read_main(decoder(), golden, Pieces::Of(usize::MAX / 2));
    if is_cut(name) {
        let error = main.closed.as_ref().unwrap_err();
        assert!(matches!(error.kind, ErrorKind::Truncated { .. }), "{name}: {error}");
        assert_eq!(error.offset, golden.bytes.len() as u64);
    } else {
        assert_eq!(main.closed, Ok(None), "{name}");
        assert!(main.rest.is_empty());
    }
    let records = || {
        main.items.iter().filter_map(|item| match item.message {
            Decoded::Ram(record) => Some(record),
            _ => None,
        })
    };
    check_counts(golden, &Counts::of(records()));
    let written = encode_main(&main.items, &main.blocks, None, main.delimiting);
    let consumed = golden.bytes.len() - main.rest.len();
    assert!(written == golden.bytes[..consumed], "{name} is written back to the byte");
    for pieces in PIECES {
        let again = read_main(decoder(), golden, pieces);
        let differ = again.items.iter().zip(&main.items).find(|(again, whole)| again != whole);
        let places = differ.map(|(again, whole)| (again.offset, whole.offset));
        assert!(places.is_none(), "{name} in pieces ({pieces:?}): {places:?}");
        assert_eq!(again.items.len(), main.items.len(), "{name} in pieces: {pieces:?}");
        assert_eq!((again.rest, again.closed), (main.rest, main.closed.clone()), "{name}");
    }
}

fn check_counts(golden: &Golden, counts: &Counts) {
    let Some(expected) = golden.manifest["counts"].as_object() else { return };
    let expect = |key: &str, found| {
        if let Some(expected) = expected.get(key) {
            assert_eq!(expected.as_u64(), Some(found), "{}: {key}", golden.name);
        }
    };
    expect("zero", counts.zero);
    expect("page", counts.page);
    expect("xbzrle", counts.xbzrle);
    expect("eos", counts.eos);
    expect("multifd_flush", counts.multifd_flush);
    if let Some(ends) = expected.get("ends_with_eos") {
        assert_eq!(ends.as_bool(), Some(counts.eos == 1), "{}", golden.name);
    }
}

#[test]
fn main_streams() {
    for golden in all(kind, Kind::Main) {
        check_main(&golden, || MainDecoder::new(options(&golden.name)));
    }
}

#[test]
fn recovered_main_streams() {
    for golden in all(kind, Kind::RecoveryMain) {
        let before = load(&golden.name.replace(".2-main", ".1-main"));
        check_main(&golden, || broken_decoder(&before).reconnected().unwrap());
        // The same file on its own, as `inspect` sees it.
        check_main(&golden, || MainDecoder::learning_recovery(options(&golden.name)));
    }
}

#[test]
fn urgent_channels() {
    for golden in all(kind, Kind::Preempt) {
        let name = &golden.name;
        let blocks = blocks_of(name);
        let format = RecordFormat::Postcopy;
        let decoder = || RecordDecoder::new(Arc::clone(&blocks), PAGE, format);
        let whole = Pieces::Of(usize::MAX / 2);
        let Driven { items, rest } = drive(&mut decoder(), &golden.bytes, whole).unwrap();
        let cut = !rest.is_empty()
            || items.last().is_some_and(|item| match item.message {
                RamRecord::PageFollows { len, .. } => item.payload.len() < len,
                _ => false,
            });
        assert!(!cut || is_cut(name), "{name} is complete");
        check_counts(&golden, &Counts::of(items.iter().map(|item| item.message)));
        let mut encoder = RecordEncoder::new(Arc::clone(&blocks));
        let mut written = Vec::new();
        items.iter().for_each(|item| encode_record(item, &mut encoder, &mut written));
        assert!(written == golden.bytes[..golden.bytes.len() - rest.len()], "{name}");
        for pieces in PIECES {
            let again = drive(&mut decoder(), &golden.bytes, pieces).unwrap();
            assert!(again.items == items && again.rest == rest, "{name}: {pieces:?}");
        }
        let mut alone = RecordDecoder::learning(PAGE, format);
        let alone = drive(&mut alone, &golden.bytes, whole).unwrap();
        assert_eq!(alone.items.len(), items.len(), "{name} without its main channel");
    }
}

#[test]
fn return_paths() {
    for golden in all(kind, Kind::Return) {
        let name = &golden.name;
        let colo = name.starts_with("colo");
        let new = || if colo { ReturnDecoder::with_colo(PAGE) } else { ReturnDecoder::new(PAGE) };
        let whole = Pieces::Of(usize::MAX / 2);
        let mut decoder = new();
        let Driven { items, rest } = drive(&mut decoder, &golden.bytes, whole)
            .unwrap_or_else(|error| panic!("{name}: {error}"));
        assert!(rest.is_empty() && decoder.at_boundary(), "{name}");
        assert!(encode_return(&items) == golden.bytes, "{name}");
        let shut = ReturnDecoded::Message(ReturnMessage::Shut(0));
        let ends = items.last().unwrap().message == shut;
        assert_eq!(ends, !colo && !name.contains(".1-main"), "{name} ends with SHUT");
        for pieces in PIECES {
            let again = drive(&mut new(), &golden.bytes, pieces).unwrap();
            assert!(again.items == items, "{name}: {pieces:?}");
        }
    }
}

#[test]
fn bitmaps_of_a_recovery_have_the_length_of_their_block() {
    for version in ["10.0.2", "11.1.3"] {
        let blocks = blocks_of(&format!("recovery-preempt-{version}.1-preempt"));
        let golden = load(&format!("recovery-preempt-{version}.2-main-rp"));
        let mut decoder = ReturnDecoder::new(PAGE);
        let driven = drive(&mut decoder, &golden.bytes, Pieces::Of(1 << 20)).unwrap();
        let mut bitmaps = 0;
        for pair in driven.items.windows(2) {
            let [named, follows] = pair else { unreachable!() };
            let ReturnDecoded::Message(ReturnMessage::RecvBitmap(name)) = &named.message else {
                continue;
            };
            let block = blocks.get(blocks.find(name.as_bytes()).unwrap()).unwrap();
            let len = whimbrel_wire::page_bitmap::bitmap_len(block.used_length, PAGE);
            assert_eq!(follows.message, ReturnDecoded::BitmapFollows { len });
            bitmaps += 1;
        }
        assert_eq!(bitmaps, blocks.len());
    }
}

#[test]
fn multifd_channels() {
    for golden in all(kind, Kind::Multifd) {
        let name = &golden.name;
        let decoder = || MultifdDecoder::new(PAGE);
        let whole = Pieces::Of(usize::MAX / 2);
        let Driven { items, rest } = drive(&mut decoder(), &golden.bytes, whole)
            .unwrap_or_else(|error| panic!("{name}: {error}"));
        let complete = items.last().is_some_and(|item| match &item.message {
            MultifdDecoded::Packet(packet) => {
                item.payload.len() as u64 == u64::from(packet.data_len())
            }
            _ => true,
        });
        assert!(rest.is_empty() && complete, "{name}");
        assert!(encode_multifd(&items) == golden.bytes, "{name}");
        for pieces in PIECES {
            let again = drive(&mut decoder(), &golden.bytes, pieces).unwrap();
            assert!(again.items == items, "{name}: {pieces:?}");
        }
    }
}

/// Each mark on the main channel has a SYNC on each multifd channel.
#[test]
fn multifd_marks_meet_their_syncs() {
    let sets = [
        ("multifd-none-10.0.2", ["connA", "connB"]),
        ("multifd-none-11.1.3", ["connA", "connB"]),
        ("multifd-zstd-10.0.2", ["connA", "connB"]),
        ("multifd-zlib-10.0.2", ["connA", "connB"]),
        ("multifd-flush-per-section-10.0.2", ["connA", "connB"]),
        ("multifd-none-7.2.22", ["connA", "connB"]),
        ("colo-multifd-11.1.3", ["conn1", "conn2"]),
    ];
    for (set, connections) in sets {
        let golden = load(&format!("{set}.main"));
        let main = read_main(MainDecoder::new(options(set)), &golden, Pieces::Of(usize::MAX / 2));
        let counts = Counts::of(main.items.iter().filter_map(|item| match item.message {
            Decoded::Ram(record) => Some(record),
            _ => None,
        }));
        let per_section = set.contains("per-section") || set.contains("7.2");
        let marks = if per_section { counts.eos } else { counts.multifd_flush };
        for connection in connections {
            let golden = load(&format!("{set}.{connection}"));
            let mut decoder = MultifdDecoder::new(PAGE);
            let driven = drive(&mut decoder, &golden.bytes, Pieces::Of(usize::MAX / 2)).unwrap();
            let syncs = driven.items.iter().filter(|item| match &item.message {
                MultifdDecoded::Packet(packet) => packet.is_sync(),
                _ => false,
            });
            assert_eq!(syncs.count() as u64, marks, "{set}.{connection}");
        }
    }
}

/// Deltas apply to what was sent before, and our encoder makes the same of old and new.
#[test]
fn xbzrle_deltas() {
    let golden = load("xbzrle-10.0.2.stream");
    let decoder = MainDecoder::new(MainOptions::default());
    let main = read_main(decoder, &golden, Pieces::Of(usize::MAX / 2));
    let mut pages: BTreeMap<_, Vec<u8>> = BTreeMap::new();
    let mut deltas = 0;
    for item in &main.items {
        match item.message {
            Decoded::Ram(RamRecord::Zero { block, offset }) => {
                pages.insert((block, offset), vec![0; 4096]);
            }
            Decoded::Ram(RamRecord::PageFollows { block, offset, .. }) => {
                pages.insert((block, offset), item.payload.to_vec());
            }
            Decoded::Ram(RamRecord::XbzrleFollows { block, offset, .. }) => {
                let page = pages.get_mut(&(block, offset)).unwrap();
                let old = page.clone();
                xbzrle::decode(item.payload, page).unwrap();
                let mut again = Vec::new();
                let delta = xbzrle::encode(&old, page, &mut again);
                assert_eq!(delta, xbzrle::Delta::Encoded(item.payload.len()));
                assert_eq!(again, item.payload);
                deltas += 1;
            }
            _ => {}
        }
    }
    assert_eq!(deltas, 496);
}

/// The device sections of every precopy stream are delimited by their description, and of every
/// package by their footers: the machines are alike, so both find as many.
#[test]
fn device_sections_are_named() {
    let names = |sections: &[whimbrel_wire::DeviceSection]| {
        let mut names: Vec<String> = sections
            .iter()
            .map(|section| format!("{}/{}", section.header.name, section.header.instance_id))
            .collect();
        names.sort();
        names
    };
    for version in ["7.2.22", "10.0.2", "11.1.3"] {
        let precopy = load(&format!("precopy-{version}.stream"));
        let whole = Pieces::Of(usize::MAX / 2);
        let main = read_main(MainDecoder::new(MainOptions::default()), &precopy, whole);
        let state = main.items.iter().find_map(|item| match &item.message {
            Decoded::DeviceState(state) => Some(state),
            _ => None,
        });
        let described = names(&state.unwrap().sections);
        let postcopy = load(&format!("postcopy-preempt-{version}.main"));
        let main = read_main(MainDecoder::new(MainOptions::default()), &postcopy, whole);
        let package = main.items.iter().find_map(|item| match item.message {
            Decoded::PackageFollows { .. } => Some(item.payload),
            _ => None,
        });
        let package = whimbrel_wire::Package::decode(package.unwrap(), 0, main.delimiting).unwrap();
        assert_eq!(names(&package.sections), described, "{version}");
        assert!(described.len() >= 25, "{version}: {} sections", described.len());
        let pings: &[u32] = if version == "11.1.3" { &[3, 0x42] } else { &[3] };
        assert_eq!(package.pings, pings);
    }
}
