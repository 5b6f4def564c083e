//! What QEMU primaries have sent as COLO, sent again as it was: a standby has the newest checkpoint
//! that was complete, page by page, as a plain reading of the recorded bytes has it.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::thread;

use whimbrel::kept::{KeptVm, Receiver, StoodBy};
use whimbrel::{Address, SocketAddressInfo};
use whimbrel_wire::{
    ColoMessage, Decoded, MainDecoder, MainOptions, MultifdDecoded, MultifdDecoder, RamRecord,
    ReturnDecoded, ReturnDecoder, TargetPage, multifd::MultifdInit,
};

const PAGE: usize = 4096;

/// Each recorded COLO, and its multifd channels in the order of their numbers.
const RECORDED: [(&str, &[&str]); 2] =
    [("colo-11.1.3", &[]), ("colo-multifd-11.1.3", &["conn1", "conn2"])];

fn golden(name: &str) -> Vec<u8> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../whimbrel-wire/tests/golden")
        .join(format!("{name}.zst"));
    let packed = std::fs::File::open(&path).expect("a golden stream");
    zstd::decode_all(packed).expect("packed with zstd")
}

/// Pages by block and offset; zero where there is none.
type Pages = BTreeMap<(String, u64), Vec<u8>>;

/// What a plain reading finds.
#[derive(Debug, Default)]
struct Found {
    /// Of each round that ended in a mark: what was on the main channel.
    rounds: Vec<Pages>,
    /// After how many rounds a checkpoint was complete, and at which byte.
    complete: Vec<(usize, usize)>,
    /// After how many rounds, and at which byte, the migration before the first was.
    begun: (usize, usize),
}

impl Found {
    /// How many rounds have ended with what is complete now.
    fn ended(&mut self, multifd: bool) -> usize {
        if !multifd {
            self.rounds.push(Pages::new());
        }
        self.rounds.len() - 1
    }
}

/// A round ends in a mark of multifd's; without channels, in what is complete.
fn on_main(bytes: &[u8], multifd: bool) -> Found {
    let options = MainOptions { colo: true, ..MainOptions::default() };
    let mut decoder = MainDecoder::new(options);
    let mut found = Found { rounds: vec![Pages::new()], ..Found::default() };
    let mut at = 0;
    loop {
        let (used, decoded) = decoder.decode(&bytes[at..]).expect("legal");
        at += used;
        let place = |decoder: &MainDecoder, block, offset: u64| {
            (decoder.blocks().get(block).expect("announced").name.to_string(), offset)
        };
        match decoded {
            Decoded::Ram(RamRecord::PageFollows { block, offset, .. }) => {
                let place = place(&decoder, block, offset.0);
                if let Some(page) = bytes.get(at..at + PAGE) {
                    found.rounds.last_mut().expect("one").insert(place, page.to_vec());
                    at += PAGE;
                    decoder.payload_taken(PAGE as u64);
                } else {
                    return found;
                }
            }
            Decoded::Ram(RamRecord::Zero { block, offset }) => {
                let place = place(&decoder, block, offset.0);
                found.rounds.last_mut().expect("one").insert(place, vec![0; PAGE]);
            }
            Decoded::Ram(RamRecord::MultifdFlush) => found.rounds.push(Pages::new()),
            Decoded::DeviceState(_) => found.begun = (found.ended(multifd), at),
            Decoded::CheckpointFollows { len } => {
                let len = usize::try_from(len).expect("in memory");
                if bytes.len() - at < len {
                    return found;
                }
                at += len;
                decoder.payload_taken(len as u64);
                let rounds = found.ended(multifd);
                found.complete.push((rounds, at));
            }
            Decoded::NeedMore(_) if used == 0 || at == bytes.len() => return found,
            _ => {}
        }
    }
}

/// What a channel carries, without compression, round by round, and where each of them ends.
fn on_channel(bytes: &[u8]) -> (Vec<Pages>, Vec<usize>) {
    let mut decoder = MultifdDecoder::new(TargetPage::FOUR_KIB);
    let (mut rounds, mut ends, mut at) = (vec![Pages::new()], Vec::new(), 0);
    while at < bytes.len() {
        let (used, decoded) = decoder.decode(&bytes[at..]).expect("legal");
        at += used;
        let MultifdDecoded::Packet(header) = decoded else {
            if let (MultifdDecoded::NeedMore(_), 0) = (&decoded, used) {
                break;
            }
            continue;
        };
        let round = rounds.last_mut().expect("one");
        if let Some(block) = header.block() {
            for offset in header.normal() {
                round.insert((block.to_string(), offset.0), bytes[at..at + PAGE].to_vec());
                at += PAGE;
            }
            decoder.payload_taken(header.data_len());
            for offset in header.zero() {
                round.insert((block.to_string(), offset.0), vec![0; PAGE]);
            }
        }
        if header.is_sync() {
            rounds.push(Pages::new());
            ends.push(at);
        }
    }
    (rounds, ends)
}

/// A recorded primary, which says nothing before it may.
struct Primary {
    main: TcpStream,
    answers: ReturnDecoder,
    heard: Vec<u8>,
    channels: Vec<TcpStream>,
}

impl Primary {
    fn connect(place: &str, channels: usize) -> Primary {
        let connect = || TcpStream::connect(place).expect("it listens");
        let main = connect();
        let channels = (0..channels).map(|_| connect()).collect();
        let answers = ReturnDecoder::with_colo(TargetPage::FOUR_KIB);
        Primary { main, answers, heard: Vec::new(), channels }
    }

    /// Waits for the secondary to say `word`.
    fn hears(&mut self, word: ColoMessage) {
        loop {
            let (used, decoded) = self.answers.decode(&self.heard).expect("legal");
            self.heard.drain(..used);
            match decoded {
                ReturnDecoded::Colo(found) if found == word => return,
                ReturnDecoded::NeedMore(_) if used == 0 => {
                    let mut more = [0; 256];
                    let bytes = self.main.read(&mut more).expect("open");
                    assert!(bytes > 0, "it says {word:?} before it closes");
                    self.heard.extend_from_slice(&more[..bytes]);
                }
                _ => {}
            }
        }
    }
}

/// Has a standby take in the first `len` bytes of the main channel, and what belongs to that of the
/// others, each given with where its rounds end.
fn replay(
    main: &[u8],
    len: usize,
    moments: &[(u64, (usize, usize))],
    channels: &[(Vec<u8>, Vec<usize>)],
    folder: &Path,
) -> (StoodBy, KeptVm) {
    let address: Address = "tcp:127.0.0.1:0".parse().expect("an address");
    let count = u8::try_from(channels.len()).expect("few");
    let receiver = Receiver::bind(&address).expect("a port").with_multifd(count);
    let Some(SocketAddressInfo::Inet { host, port }) = receiver.socket_address() else {
        panic!("tcp:");
    };
    let path = folder.join("kept");
    let standby = {
        let path = path.clone();
        let work = move || receiver.stand_by(&path, &mut |_| {});
        thread::Builder::new().name("standby".into()).spawn(work).expect("a thread")
    };
    let mut primary = Primary::connect(&format!("{host}:{port}"), channels.len());
    let (mut sent, mut rounds_sent) = (0, 0);
    let mut sent_beside = vec![MultifdInit::LEN; channels.len()];
    // First: nobody reads on before all of them have said what they are.
    for (stream, (bytes, _)) in primary.channels.iter_mut().zip(channels) {
        stream.write_all(&bytes[..MultifdInit::LEN]).expect("open");
    }
    for &(_, (rounds, end)) in moments {
        primary.main.write_all(&main[sent..end.min(len)]).expect("open");
        // Round by round: who has ended one reads on when all of them have.
        for round in rounds_sent..rounds {
            for ((stream, (bytes, ends)), sent) in
                primary.channels.iter_mut().zip(channels).zip(&mut sent_beside)
            {
                stream.write_all(&bytes[*sent..ends[round]]).expect("open");
                *sent = ends[round];
            }
        }
        rounds_sent = rounds;
        sent = end;
        if end > len {
            break;
        }
        primary.hears(match end == moments[0].1.1 {
            true => ColoMessage::CheckpointReady,
            false => ColoMessage::VmstateLoaded,
        });
    }
    drop(primary);
    let stood_by = standby.join().expect("it does not panic").expect("a checkpoint");
    (stood_by, KeptVm::open(&path).expect("a kept VM"))
}

fn expect_pages(vm: &KeptVm, expected: &Pages, what: &str) {
    let mut content = vec![0; PAGE];
    for (index, block) in vm.ram().blocks() {
        for page in 0..block.target_pages() {
            let place = (block.name().to_owned(), page * PAGE as u64);
            let zero = vec![0; PAGE];
            let expected = expected.get(&place).unwrap_or(&zero);
            match vm.is_present(index, whimbrel_ram::TargetPage(page)) {
                true => block.read(place.1, &mut content).expect("inside"),
                false => content.fill(0),
            }
            assert!(content == *expected, "{what}: {place:?} differs");
        }
    }
}

#[test]
fn the_newest_complete_checkpoint_is_kept_wherever_the_primary_is_lost() {
    let folder = tempfile::tempdir().expect("a folder");
    for (name, channels) in RECORDED {
        let main = golden(&format!("{name}.main"));
        let channels: Vec<Vec<u8>> =
            channels.iter().map(|channel| golden(&format!("{name}.{channel}"))).collect();
        let found = on_main(&main, !channels.is_empty());
        assert!(found.complete.len() >= 2, "{name}: {:?}", found.complete);
        let (beside, ends): (Vec<_>, Vec<_>) =
            channels.iter().map(|bytes| on_channel(bytes)).unzip();
        let channels: Vec<(Vec<u8>, Vec<usize>)> = channels.into_iter().zip(ends).collect();
        let begun = std::iter::once((0, found.begun));
        let complete = (1u64..).zip(found.complete.iter().copied());
        let moments: Vec<(u64, (usize, usize))> = begun.chain(complete).collect();
        for (at, (checkpoints, (rounds, end))) in moments.iter().enumerate() {
            let mut expected = Pages::new();
            for round in 0..*rounds {
                for pages in beside.iter().chain([&found.rounds]).filter_map(|all| all.get(round)) {
                    expected
                        .extend(pages.iter().map(|(place, page)| (place.clone(), page.clone())));
                }
            }
            // To the byte, and one byte before the next is complete.
            let next = moments.get(at + 1).map(|(_, (_, end))| end - 1);
            for len in [Some(*end), next].into_iter().flatten() {
                let what = format!("{name}, {len} bytes");
                let (stood_by, vm) = replay(&main, len, &moments, &channels, folder.path());
                assert_eq!(stood_by.checkpoints, *checkpoints, "{what}: {}", stood_by.lost);
                expect_pages(&vm, &expected, &what);
                assert!(stood_by.kept.devices > 10, "{what}: {}", stood_by.kept.devices);
            }
        }
    }
}
