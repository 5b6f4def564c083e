//! What QEMUs have sent on several channels, sent again as it was: a destination makes the same
//! memory of it as a plain reading of the recorded packets, round by round.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::thread;

use whimbrel::kept::{KeptSummary, KeptVm, Receiver};
use whimbrel::{Address, SocketAddressInfo};
use whimbrel_wire::{
    Decoded, MainDecoder, MainOptions, MultifdDecoded, MultifdDecoder, PacketHeader, RamRecord,
    TargetPage, multifd::Compression,
};
use zstd::stream::raw::{InBuffer, Operation, OutBuffer};

const PAGE: usize = 4096;

/// Each recorded migration, and whether every end of a section is a mark.
const RECORDED: [(&str, bool); 7] = [
    ("multifd-none-7.2.22", true),
    ("multifd-none-10.0.2", false),
    ("multifd-none-11.1.3", false),
    ("multifd-zlib-10.0.2", false),
    ("multifd-zstd-10.0.2", false),
    ("multifd-zstd-11.1.3", false),
    ("multifd-flush-per-section-10.0.2", true),
];

fn golden(name: &str) -> Vec<u8> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../whimbrel-wire/tests/golden")
        .join(format!("{name}.zst"));
    let packed = std::fs::File::open(&path).expect("a golden stream");
    zstd::decode_all(packed).expect("packed with zstd")
}

/// Pages by block and offset.
type Pages = BTreeMap<(String, u64), Vec<u8>>;

/// What the main channel says of pages, round by round.
fn on_main(bytes: &[u8], mark_each_section: bool) -> Vec<Pages> {
    let mut decoder = MainDecoder::new(MainOptions::default());
    let (mut rounds, mut at) = (vec![Pages::new()], 0);
    loop {
        let (used, decoded) = decoder.decode(&bytes[at..]).expect("legal");
        at += used;
        let place = |decoder: &MainDecoder, block, offset: u64| {
            (decoder.blocks().get(block).expect("announced").name.to_string(), offset)
        };
        let round = rounds.last_mut().expect("one");
        match decoded {
            Decoded::Ram(RamRecord::PageFollows { block, offset, .. }) => {
                let place = place(&decoder, block, offset.0);
                round.insert(place, bytes[at..at + PAGE].to_vec());
                at += PAGE;
                decoder.payload_taken(PAGE as u64);
            }
            Decoded::Ram(RamRecord::Zero { block, offset }) => {
                round.insert(place(&decoder, block, offset.0), vec![0; PAGE]);
            }
            Decoded::Ram(RamRecord::MultifdFlush) => rounds.push(Pages::new()),
            Decoded::Ram(RamRecord::EndOfSection) if mark_each_section => {
                rounds.push(Pages::new());
            }
            Decoded::DeviceStateBegins | Decoded::Eof => return rounds,
            Decoded::NeedMore(_) if used == 0 => panic!("it ends before the devices"),
            _ => {}
        }
    }
}

/// What a channel carries, round by round.
fn on_channel(bytes: &[u8]) -> Vec<Pages> {
    let mut decoder = MultifdDecoder::new(TargetPage::FOUR_KIB);
    let mut zlib = flate2::Decompress::new(true);
    let mut zstd = zstd::stream::raw::Decoder::new().expect("a decoder");
    let (mut rounds, mut at) = (vec![Pages::new()], 0);
    while at < bytes.len() {
        let (used, decoded) = decoder.decode(&bytes[at..]).expect("legal");
        at += used;
        let MultifdDecoded::Packet(header) = decoded else {
            assert!(matches!(decoded, MultifdDecoded::Init(_)), "{decoded:?}");
            continue;
        };
        let data = &bytes[at..at + header.data_len() as usize];
        at += data.len();
        decoder.payload_taken(header.data_len());
        let len = header.normal().len() * PAGE;
        let content = match header.compression() {
            _ if len == 0 => Vec::new(),
            Compression::None => data.to_vec(),
            Compression::Zlib => {
                let mut pages = Vec::with_capacity(len);
                zlib.decompress_vec(data, &mut pages, flate2::FlushDecompress::Sync)
                    .expect("packed by zlib");
                pages
            }
            Compression::Zstd => {
                let mut pages = vec![0; len];
                let (mut from, mut to) =
                    (InBuffer::around(data), OutBuffer::around(&mut pages[..]));
                while to.pos() < len {
                    zstd.run(&mut from, &mut to).expect("packed by zstd");
                }
                pages
            }
            other => panic!("{other:?}"),
        };
        assert_eq!(content.len(), len);
        put(rounds.last_mut().expect("one"), &header, &content);
        if header.is_sync() {
            rounds.push(Pages::new());
        }
    }
    rounds
}

fn put(round: &mut Pages, header: &PacketHeader, content: &[u8]) {
    let Some(block) = header.block() else { return };
    let zeros = header.zero().map(|offset| (offset, vec![0; PAGE]));
    let normal = header.normal().zip(content.chunks_exact(PAGE).map(<[u8]>::to_vec));
    for (offset, content) in normal.chain(zeros) {
        round.insert((block.to_string(), offset.0), content);
    }
}

/// Has a destination take in what was recorded.
fn receive(streams: Vec<Vec<u8>>, path: &Path) -> KeptSummary {
    let channels = u8::try_from(streams.len() - 1).expect("few");
    let address: Address = "tcp:127.0.0.1:0".parse().expect("an address");
    let receiver = Receiver::bind(&address).expect("a port").with_multifd(channels);
    let Some(SocketAddressInfo::Inet { host, port }) = receiver.socket_address() else {
        panic!("it listens on TCP");
    };
    let address = format!("{host}:{port}");
    let sending: Vec<_> = streams
        .into_iter()
        .map(|bytes| {
            let mut stream = TcpStream::connect(&address).expect("it listens");
            let send = move || {
                stream.write_all(&bytes).expect("it takes everything");
                stream.shutdown(std::net::Shutdown::Write).expect("open");
                // Its answers, if it was asked; a reset is as good an end.
                let _ = stream.read_to_end(&mut Vec::new());
            };
            thread::Builder::new().name("recorded".into()).spawn(send).expect("a thread")
        })
        .collect();
    let summary = receiver.receive(path).expect("it was recorded whole");
    sending.into_iter().for_each(|thread| thread.join().expect("it takes everything"));
    summary
}

#[test]
fn what_was_recorded_arrives_as_it_was() {
    let folder = tempfile::tempdir().expect("a folder");
    for (name, mark_each_section) in RECORDED {
        let streams: Vec<Vec<u8>> =
            ["main", "connA", "connB"].map(|part| golden(&format!("{name}.{part}"))).to_vec();
        let mut rounds = vec![on_main(&streams[0], mark_each_section)];
        rounds.extend(streams[1..].iter().map(|bytes| on_channel(bytes)));
        let marks: Vec<usize> = rounds.iter().map(Vec::len).collect();
        assert!(marks.windows(2).all(|two| two[0] == two[1]), "{name}: marks: {marks:?}");
        let mut expected = Pages::new();
        for round in 0..marks[0] {
            rounds.iter().for_each(|channel| expected.extend(channel[round].clone()));
        }
        assert!(expected.len() > 2000, "{name}: {} pages", expected.len());

        // In any order of connecting: the main channel last, too.
        for order in [[0, 1, 2], [2, 1, 0]] {
            let path = folder.path().join("kept");
            let streams = order.map(|index: usize| streams[index].clone()).to_vec();
            let summary = receive(streams, &path);
            assert!(summary.devices > 5, "{name}: {summary:?}");
            let vm = KeptVm::open(&path).expect("it was kept");
            let mut pages = 0;
            for (_, block) in vm.ram().blocks() {
                for page in 0..block.target_pages() {
                    let mut found = vec![0; PAGE];
                    block.read(page * 4096, &mut found).expect("inside");
                    let place = (block.name().to_owned(), page * 4096);
                    let there = expected.get(&place).unwrap_or_else(|| panic!("{place:?}"));
                    assert!(*there == found, "{name}: {place:?} differs");
                    pages += 1;
                }
            }
            assert_eq!(pages, expected.len(), "{name}: pages of no block");
        }
    }
}

/// Of the same machine, what was kept from several channels and from one is made of the same.
#[test]
fn it_is_the_machine_that_a_plain_stream_brings() {
    let folder = tempfile::tempdir().expect("a folder");
    for (multifd, plain) in [
        ("multifd-none-10.0.2", "precopy-10.0.2"),
        ("multifd-none-7.2.22", "precopy-7.2.22"),
        ("multifd-none-11.1.3", "precopy-11.1.3"),
    ] {
        let streams = ["main", "connA", "connB"].map(|part| golden(&format!("{multifd}.{part}")));
        let both = [
            (folder.path().join("multifd"), streams.to_vec()),
            (folder.path().join("plain"), vec![golden(&format!("{plain}.stream"))]),
        ];
        let seen = both.map(|(path, streams)| {
            let summary = receive(streams, &path);
            let vm = KeptVm::open(&path).expect("it was kept");
            let blocks: Vec<(String, u64)> = vm
                .ram()
                .blocks()
                .map(|(_, block)| (block.name().to_owned(), block.len()))
                .collect();
            (vm.machine(), blocks, summary.devices)
        });
        assert_eq!(seen[0], seen[1], "{multifd}");
    }
}
