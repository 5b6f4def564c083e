//! A source with several channels, and a destination that reads only some of them, closes one, or
//! answers too early: as long as the guest has not gone it stays, and nobody waits for a channel
//! that does not move.

#[path = "support/far_destination.rs"]
mod far_destination;
#[path = "support/vms.rs"]
mod vms;

use std::collections::BTreeMap;
use std::io::Read;
use std::net::{Shutdown, TcpStream};
use std::thread::{self, JoinHandle, sleep};
use std::time::{Duration, Instant};

use far_destination::{AGREED, FarDestination, MULTIFD_GOES_ON, Main, Place};
use vms::{Alone, Side, until};
use whimbrel::{Capability, MigrationStatus, RunState};
use whimbrel_vm::{AccelChoice, Config, Fill};
use whimbrel_wire::{Decoded, MultifdDecoded, MultifdDecoder, ReturnMessage, TargetPage};

const PAGE: usize = 4096;
const MEMORY: u64 = 24 << 20;
const CHANNELS: u8 = 3;

fn config() -> Config {
    let workload = "uniform,rate=5000,working-set=2M".parse().expect("a workload");
    Config { accel: AccelChoice::Native, workload, fill: Fill::Random, ..Config::new(MEMORY) }
}

/// A source whose guest runs, on its way to `there`.
fn source_to(there: &FarDestination, more: &[Capability]) -> Side {
    let source = Side::running(&config());
    source.switch_on(&[&[Capability::Multifd, Capability::ReturnPath], more].concat());
    source.migrator.update_parameters(|p| p.multifd_channels = CHANNELS).expect("allowed");
    source.migrator.migrate(there.address.clone()).expect("it starts");
    source
}

struct Far {
    source: Side,
    main: Main,
    /// By their numbers, behind their first messages.
    channels: Vec<TcpStream>,
}

impl Far {
    fn begun(agreed: Option<u32>, more: &[Capability]) -> Far {
        let there = FarDestination::listen();
        let source = source_to(&there, more);
        let main = there.main(agreed);
        let mut channels: Vec<(u8, TcpStream)> = (0..CHANNELS)
            .map(|_| {
                let mut stream = there.accept();
                let mut init = [0; 64];
                stream.read_exact(&mut init).expect("its first message");
                assert_eq!(init[..8], [0x11, 0x22, 0x33, 0x44, 0, 0, 0, 1]);
                (init[24], stream)
            })
            .collect();
        channels.sort_by_key(|(number, _)| *number);
        assert!(channels.iter().map(|(number, _)| *number).eq(0..CHANNELS));
        let channels = channels.into_iter().map(|(_, stream)| stream).collect();
        Far { source, main, channels }
    }

    /// Answers until the source has begun to send pages: more than what buffers hold is missing.
    fn until_it_sends(&mut self) {
        self.main.until("the end of the setup", |decoded| matches!(decoded, Decoded::Footer(_)));
        // The questions behind it; their answers let the pages go.
        let source = &self.source;
        let deadline = Instant::now() + Duration::from_secs(10);
        let timeout = Some(Duration::from_millis(20));
        self.main.stream.set_read_timeout(timeout).expect("a timeout");
        while source.migrator.info().ram.is_none_or(|ram| ram.multifd_bytes <= 100_000) {
            assert!(Instant::now() < deadline, "no page comes: {:?}", source.migrator.info());
            self.main.answer_what_is_there();
        }
        self.main.stream.set_read_timeout(Some(Duration::from_secs(30))).expect("a timeout");
    }

    fn expect_stays(&self, status: MigrationStatus, part: &str, what: &str) {
        let info = self.source.ended(what);
        assert_eq!(info.status, Some(status), "{what}: {:?}", info.error_desc);
        if status == MigrationStatus::Failed {
            self.source.expect_reason(&[part], what);
        }
        self.source.expect_healthy(what);
    }
}

fn check(what: &str, run: impl FnOnce(&str)) {
    let alone = Alone::begin();
    run(what);
    alone.expect_nothing_left(what);
}

/// Reads a channel to its end, or never.
fn drain(mut stream: TcpStream) -> JoinHandle<Vec<u8>> {
    let read = move || {
        let mut all = Vec::new();
        // A source that breaks the connection ends it as well.
        let _ = stream.read_to_end(&mut all);
        all
    };
    thread::Builder::new().name("far".into()).spawn(read).expect("a thread")
}

#[test]
fn a_channel_that_is_closed_ends_it_and_the_guest_stays() {
    for closed in 0..CHANNELS {
        for at_once in [true, false] {
            check(&format!("channel {closed}, at once: {at_once}"), |what| {
                let mut far = Far::begun(None, &[]);
                let number = usize::from(closed);
                if at_once {
                    far.channels[number].shutdown(Shutdown::Both).expect("open");
                }
                let rest: Vec<TcpStream> = far
                    .channels
                    .iter()
                    .enumerate()
                    .filter(|(index, _)| *index != number)
                    .map(|(_, stream)| stream.try_clone().expect("a descriptor"))
                    .collect();
                let draining: Vec<_> = rest.into_iter().map(drain).collect();
                if !at_once {
                    far.until_it_sends();
                    // Closed with pages unread: its source is told at once.
                    drop(far.channels.remove(number));
                }
                // It may have to be told that it can go on before it sees that.
                let main = &mut far.main;
                main.stream.set_read_timeout(Some(Duration::from_millis(20))).expect("a timeout");
                let source = &far.source;
                until(what, || {
                    main.answer_what_is_there();
                    !source.status().is_some_and(MigrationStatus::is_running)
                });
                far.expect_stays(MigrationStatus::Failed, &format!("multifd {closed}"), what);
                drop(far);
                draining.into_iter().for_each(|thread| drop(thread.join().expect("ends")));
            });
        }
    }
}

/// One channel is never read, or none is, or nobody answers: a user need not wait for them.
#[test]
fn a_channel_that_does_not_move_holds_nobody() {
    for (name, answered, read) in [
        ("no answer", false, &[][..]),
        ("none is read", true, &[]),
        ("one is not read", true, &[0, 2]),
    ] {
        check(name, |what| {
            let mut far = Far::begun(None, &[]);
            let draining: Vec<_> = read
                .iter()
                .map(|&number: &usize| drain(far.channels[number].try_clone().expect("a file")))
                .collect();
            if answered {
                far.until_it_sends();
            }
            sleep(Duration::from_millis(100));
            let asked = Instant::now();
            assert!(far.source.runs(), "{what}");
            assert!(far.source.status().is_some_and(MigrationStatus::is_running), "{what}");
            far.source.migrator.cancel().expect("it is no postcopy");
            far.source.ended(what);
            assert!(asked.elapsed() < Duration::from_secs(10), "{what}: {:?}", asked.elapsed());
            far.expect_stays(MigrationStatus::Cancelled, "", what);
            drop(far);
            draining.into_iter().for_each(|thread| drop(thread.join().expect("ends")));
        });
    }
}

#[test]
fn an_answer_that_comes_too_early_ends_it_and_the_guest_stays() {
    for (answer, part) in [(0, "the destination"), (1, "reported a failure")] {
        check(&format!("SHUT {answer}"), |what| {
            let mut far = Far::begun(None, &[]);
            far.until_it_sends();
            far.main.say(&ReturnMessage::Shut(answer)).expect("it listens");
            far.expect_stays(MigrationStatus::Failed, part, what);
        });
    }
}

/// Nobody listens any more when the channels connect.
#[test]
fn channels_that_cannot_connect_are_named() {
    check("refused", |what| {
        let there = FarDestination::listen();
        let address = there.address.clone();
        drop(there);
        let source = Side::running(&config());
        source.switch_on(&[Capability::Multifd]);
        source.migrator.migrate(address.clone()).expect("it starts");
        let info = source.ended(what);
        assert_eq!(info.status, Some(MigrationStatus::Failed), "{what}");
        let error = info.error_desc.expect("says why");
        assert!(error.contains(&address.to_string()), "{what}: {error}");
        source.expect_healthy(what);
    });
}

type Pages = BTreeMap<Place, Vec<u8>>;

/// The pages of a channel, round by round.
fn rounds(bytes: &[u8], what: &str) -> Vec<Pages> {
    let mut decoder = MultifdDecoder::new(TargetPage::FOUR_KIB);
    // Its first message has been read.
    let mut init = Vec::new();
    whimbrel_wire::MultifdInit { uuid: [0; 16], channel: 0 }.encode(&mut init);
    decoder.decode(&init).expect("its first message");
    let (mut rounds, mut at) = (vec![Pages::new()], 0);
    while at < bytes.len() {
        let (used, decoded) = decoder.decode(&bytes[at..]).expect("our own source's");
        at += used;
        let MultifdDecoded::Packet(header) = decoded else { panic!("{what}: {decoded:?}") };
        let round = rounds.last_mut().expect("one");
        let block = header.block().map(|name| name.to_string()).unwrap_or_default();
        for offset in header.normal() {
            let content = bytes[at..at + PAGE].to_vec();
            at += PAGE;
            let before = round.insert((block.clone(), offset.0), content);
            assert!(before.is_none(), "{what}: {block} {offset:?} twice in a round");
        }
        decoder.payload_taken(header.data_len());
        for offset in header.zero() {
            let before = round.insert((block.clone(), offset.0), vec![0; PAGE]);
            assert!(before.is_none(), "{what}: {block} {offset:?} twice in a round");
        }
        if header.is_sync() {
            rounds.push(Pages::new());
        }
    }
    rounds
}

/// One owner: in a round a page goes out on one channel; and all channels end a round before the
/// main channel says so. What came last, put together, is the guest's memory.
#[test]
fn each_page_goes_on_one_channel_in_a_round() {
    check("rounds", |what| {
        let Far { source, mut main, channels } = Far::begun(None, &[]);
        let slow =
            |p: &mut whimbrel::Parameters| (p.downtime_limit, p.max_bandwidth) = (100, 96 << 20);
        source.migrator.update_parameters(slow).expect("a running migration follows");
        let draining: Vec<_> = channels.into_iter().map(drain).collect();
        main.until("its end", |decoded| matches!(decoded, Decoded::Eof));
        let marks = main.marks;
        main.say(&ReturnMessage::Shut(0)).expect("it waits for that");
        let info = source.ended(what);
        assert_eq!(info.status, Some(MigrationStatus::Completed), "{:?}", info.error_desc);
        let channels: Vec<Vec<u8>> =
            draining.into_iter().map(|thread| thread.join().expect("ends")).collect();
        let bytes: u64 = channels.iter().map(|bytes| bytes.len() as u64).sum();
        let ram = info.ram.expect("told");
        assert!(bytes.abs_diff(ram.multifd_bytes) <= 64 * 3, "{what}: {bytes} bytes, {ram:?}");
        assert!(main.came.0.is_empty(), "{what}: pages on the main channel");
        let channels: Vec<Vec<Pages>> = channels.iter().map(|bytes| rounds(bytes, what)).collect();
        for channel in &channels {
            assert_eq!(channel.len(), marks + 1, "{what}: as many SYNC packets as marks");
            assert!(channel[marks].is_empty(), "{what}: pages behind the last mark");
        }
        for round in 0..marks {
            let all: Vec<&Place> =
                channels.iter().flat_map(|rounds| rounds[round].keys()).collect();
            let once: std::collections::BTreeSet<&Place> = all.iter().copied().collect();
            assert_eq!(all.len(), once.len(), "{what}: a page on two channels in round {round}");
        }
        assert_eq!(source.migrator.run_state(), RunState::Postmigrate);
        expect_memory(&source, &latest(&channels), what);
    });
}

/// What came last of each page.
fn latest(channels: &[Vec<Pages>]) -> Pages {
    let mut memory = Pages::new();
    for round in 0..channels.iter().map(Vec::len).max().unwrap_or_default() {
        let pages = channels.iter().filter_map(|rounds| rounds.get(round));
        pages.for_each(|pages| memory.extend(pages.clone()));
    }
    memory
}

/// What came, put together, is the guest's memory, which stands still at its source.
fn expect_memory(source: &Side, memory: &Pages, what: &str) {
    for (_, block) in source.migrator.vm().ram().blocks() {
        for page in 0..block.target_pages() {
            let mut here = vec![0; PAGE];
            block.read(page * 4096, &mut here).expect("inside");
            let place = (block.name().to_owned(), page * 4096);
            let came = memory.get(&place).unwrap_or_else(|| panic!("{what}: no {place:?}"));
            assert!(here == *came, "{what}: {place:?} is not what came last");
        }
    }
}

/// A QEMU wants its multifd channels silent behind the guest, and gets the rest of RAM, which is no
/// zeros, on the main channel. With another whimbrel the same channels go on.
#[test]
fn the_channels_are_silent_behind_a_guest_that_a_qemu_takes() {
    for (name, agreed) in [("QEMU", None), ("whimbrel", Some(AGREED | MULTIFD_GOES_ON))] {
        check(name, |what| {
            let mut far = Far::begun(agreed, &[Capability::PostcopyRam]);
            // Most of it is left when the guest goes, and then goes as fast as it can.
            let slow = |p: &mut whimbrel::Parameters| p.max_bandwidth = 8 << 20;
            far.source.migrator.update_parameters(slow).expect("a running migration follows");
            far.until_it_sends();
            let Far { source, mut main, channels } = far;
            let draining: Vec<_> = channels.into_iter().map(drain).collect();
            source.migrator.start_postcopy().expect("allowed");
            main.guest();
            let marks = main.marks;
            assert!(main.came.0.is_empty(), "{what}: pages on the main channel before the guest");
            main.until("its end", |decoded| matches!(decoded, Decoded::Eof));
            main.say(&ReturnMessage::Shut(0)).expect("it waits for that");
            let info = source.ended(what);
            assert_eq!(info.status, Some(MigrationStatus::Completed), "{:?}", info.error_desc);
            let channels: Vec<Vec<Pages>> = draining
                .into_iter()
                .map(|thread| rounds(&thread.join().expect("ends"), what))
                .collect();
            let mut memory = latest(&channels);
            assert!(!memory.is_empty(), "{what}: no page before the guest");
            // Behind a round's SYNC packet comes what is of the next: here nothing, or two more SYNC
            // packets, with and without pages before them.
            let ended: Vec<usize> = channels.iter().map(|rounds| rounds.len() - 1).collect();
            match agreed {
                Some(_) => assert!(ended.iter().all(|&ended| ended == marks + 2), "{ended:?}"),
                None => {
                    assert!(ended.iter().all(|&ended| ended == marks), "{marks} marks: {ended:?}");
                    let behind: usize = channels.iter().map(|rounds| rounds[marks].len()).sum();
                    assert_eq!(behind, 0, "{what}: pages behind the last mark");
                    let full = main.came.0.values().filter(|(_, page)| *page != [0; PAGE]).count();
                    assert!(full > 1000, "{what}: {full} pages were left");
                }
            }
            memory.extend(main.came.0.into_iter().map(|(place, (_, content))| (place, content)));
            expect_memory(&source, &memory, what);
        });
    }
}
