//! A destination with several channels, and a source whose channels come twice, late or not at
//! all, and say what makes no sense: the destination fails with one line that names the channel,
//! runs nothing, and has written nothing where nothing belongs.

#[path = "support/far_packets.rs"]
mod far_packets;
#[path = "support/far_source.rs"]
mod far_source;
#[path = "support/vms.rs"]
mod vms;

use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream};
use std::thread::sleep;
use std::time::{Duration, Instant};

use far_packets::{Packing, all_packets, bytes, header, init, init_of, packet, sync};
use far_source::FarSource;
use vms::{Alone, Dice, LIMIT, Side, seed, until};
use whimbrel::{Address, Capability, MigrationStatus};
use whimbrel_ram::TargetPage;
use whimbrel_vm::{AccelChoice, Config, Fill};
use whimbrel_wire::multifd::{DevicePacketHeader, packet_flag};
use whimbrel_wire::{Command, Name, ReturnMessage};

const RAM: &str = "vm.ram";
const MEMORY: u64 = 2 << 20;
const PAGES: u64 = MEMORY / 4096;

/// Behind the first message and the SYNC of the setup.
const BEGUN: u64 = 64 + 1344;

/// A guest that touches nothing by itself.
fn config() -> Config {
    Config { accel: AccelChoice::Native, fill: Fill::Random, ..Config::new(MEMORY) }
}

fn waiting(channels: u8) -> (Side, Address) {
    waiting_as(&config(), channels)
}

fn waiting_as(config: &Config, channels: u8) -> (Side, Address) {
    let destination = Side::waiting(config, true);
    destination.switch_on(&[Capability::Multifd, Capability::ReturnPath]);
    let set = |p: &mut whimbrel::Parameters| p.multifd_channels = channels;
    destination.migrator.update_parameters(set).expect("allowed");
    let address = destination.listen("tcp:127.0.0.1:0");
    (destination, address)
}

/// A source with several channels.
struct Far {
    main: FarSource,
    channels: Vec<TcpStream>,
}

impl Far {
    /// The main channel, that says nothing yet.
    fn connect(address: &Address) -> Far {
        Far { main: FarSource::connect(address, &config()), channels: Vec::new() }
    }

    fn channel(&mut self, says: &[u8]) {
        let mut stream = self.main.connection();
        stream.write_all(says).expect("it listens");
        self.channels.push(stream);
    }

    /// A migration that has begun: two channels, and all has been said up to the first pages.
    fn begun() -> (Side, Far) {
        let (destination, address) = waiting(2);
        let mut far = Far::connect(&address);
        far.channel(&init(0));
        far.channel(&init(1));
        far.begin();
        assert!(far.main.hears(&ReturnMessage::Pong(2)), "it reads on behind the setup");
        (destination, far)
    }

    /// What every stream begins with, up to the first mark, and a question behind it.
    fn begin(&mut self) {
        self.sync();
        self.main.header().return_path().setup_flushed().command(&Command::Ping(2));
        self.main.send();
    }

    fn sync(&mut self) {
        (0..self.channels.len()).for_each(|channel| self.say(channel, &sync()));
    }

    /// The destination may have gone.
    fn say(&mut self, channel: usize, bytes: &[u8]) {
        let _ = self.channels[channel].write_all(bytes);
    }

    /// A section that has nothing but a mark.
    fn mark(&mut self) {
        self.main.part().flush().end_section();
        self.main.send();
    }

    /// Every page but these, one packet on each channel in turn.
    fn all_pages(&mut self, packing: Packing, but: &[u64]) {
        for (channel, packet) in all_packets(&self.main.model, self.channels.len(), packing, but) {
            self.say(channel, &packet);
        }
    }

    /// The end of RAM, the devices, the end of the stream.
    fn end(&mut self) {
        self.sync();
        self.main.devices().stream_end();
        self.main.send();
    }

    fn close(&mut self) {
        for stream in self.channels.iter().chain([&self.main.main]) {
            // The destination may have been first.
            let _ = stream.shutdown(Shutdown::Both);
        }
    }
}

/// The destination failed, with one line that has all of `parts`, and runs nothing; everybody who
/// is connected sees it.
fn expect_failed(destination: &Side, far: &mut Far, parts: &[&str], what: &str) {
    destination.expect_not_arrived(parts, what);
    for stream in far.channels.iter_mut().chain([&mut far.main.main]) {
        let mut rest = Vec::new();
        let ended = stream.read_to_end(&mut rest);
        // A connection that is reset has ended as well; one that is still open has not.
        let open = ended.is_err_and(|error| error.kind() == std::io::ErrorKind::WouldBlock);
        assert!(!open, "{what}: a connection is still open");
    }
}

/// No page has any content.
fn expect_untouched(destination: &Side, what: &str) {
    for (_, block) in destination.migrator.vm().ram().blocks() {
        let written = (0..block.target_pages()).find(|&page| !block.is_zero(TargetPage(page)));
        assert_eq!(written, None, "{what}: a page of {} was written", block.name());
    }
}

/// The guest is here, runs, and its memory is the source's, but for pages with this content.
fn expect_arrived(destination: &Side, far: &mut Far, others: &[(u64, u8)], what: &str) {
    let info = destination.ended(what);
    assert_eq!(info.status, Some(MigrationStatus::Completed), "{what}: {:?}", info.error_desc);
    assert!(far.main.hears(&ReturnMessage::Shut(0)), "{what}: the source is told");
    assert!(destination.runs(), "{what}");
    destination.migrator.stop().expect("stops");
    expect_memory(destination, far, others, what);
}

fn expect_memory(destination: &Side, far: &Far, others: &[(u64, u8)], what: &str) {
    for (index, there) in destination.migrator.vm().ram().blocks() {
        let here = whimbrel::Vm::ram(&*far.main.model).block(index);
        for page in 0..there.target_pages() {
            let mut expected = vec![0; 4096];
            here.read(page * 4096, &mut expected).expect("inside");
            if let Some((_, fill)) =
                others.iter().find(|(other, _)| *other == page && there.name() == RAM)
            {
                expected.fill(*fill);
            }
            let mut found = vec![0; 4096];
            there.read(page * 4096, &mut found).expect("inside");
            assert!(found == expected, "{what}: page {page} of {} is not right", there.name());
        }
    }
}

/// For as long as it lives it fails only with a reason, and nothing is left of it.
fn check(what: &str, run: impl FnOnce(&str)) {
    let alone = Alone::begin();
    run(what);
    alone.expect_nothing_left(what);
}

// How channels connect.

#[test]
fn pages_come_on_all_channels_packed_or_not() {
    for packing in [Packing::None, Packing::Zlib, Packing::Zstd] {
        check(&format!("{packing:?}"), |what| {
            let (destination, address) = waiting(8);
            let mut far = Far::connect(&address);
            // From the last to the first, and the main channel says its first word behind them.
            (0..8).rev().for_each(|channel| far.channel(&init(channel)));
            far.begin();
            far.all_pages(packing, &[]);
            far.end();
            expect_arrived(&destination, &mut far, &[], what);
        });
    }
}

/// As many as there can be, all of which are waiting before the first is looked at.
#[test]
fn all_channels_there_can_be_are_told_apart() {
    check("255 channels", |what| {
        let (destination, address) = waiting(255);
        let mut far = Far::connect(&address);
        (0..255).for_each(|channel| far.channel(&init(channel)));
        far.begin();
        far.all_pages(Packing::None, &[]);
        far.end();
        expect_arrived(&destination, &mut far, &[], what);
    });
}

#[test]
fn channels_that_come_late_or_in_pieces_are_waited_for() {
    check("late", |what| {
        let (destination, address) = waiting(2);
        let mut far = Far::connect(&address);
        far.main.header().return_path();
        far.main.send();
        let [first, second] = [init(0), init(1)];
        far.channel(&second[..3]);
        sleep(Duration::from_millis(50));
        far.say(0, &second[3..63]);
        sleep(Duration::from_millis(50));
        far.channel(&first);
        assert_eq!(destination.status(), Some(MigrationStatus::Setup), "one is missing");
        far.say(0, &second[63..]);
        assert!(far.main.hears(&ReturnMessage::Pong(1)), "{what}: now they are complete");
        far.sync();
        far.main.setup_flushed();
        far.main.send();
        far.all_pages(Packing::None, &[]);
        far.end();
        expect_arrived(&destination, &mut far, &[], what);
    });
}

/// Those who say nothing, leave without a word, or come when all are there.
#[test]
fn strangers_hold_nobody_up() {
    check("strangers", |what| {
        let (destination, address) = waiting(2);
        let mut far = Far::connect(&address);
        // One that has said what it is stays, however many do not.
        far.main.header().return_path();
        far.main.send();
        let silent: Vec<TcpStream> = (0..100).map(|_| far.main.connection()).collect();
        (0..20).for_each(|_| drop(far.main.connection()));
        far.channel(&init(0));
        let more: Vec<TcpStream> = (0..10).map(|_| far.main.connection()).collect();
        far.channel(&init(1));
        assert!(far.main.hears(&ReturnMessage::Pong(1)), "{what}: nobody is waited for");
        far.sync();
        far.main.setup_flushed();
        far.main.send();
        let mut late = far.main.connection();
        // It may have been closed by then.
        let _ = late.write_all(&[0xff; 4096]);
        far.all_pages(Packing::None, &[]);
        far.end();
        expect_arrived(&destination, &mut far, &[], what);
        drop((silent, more));
    });
}

/// How channels connect, and parts of what the destination says of it.
type Connects = (&'static str, fn(&mut Far), &'static [&'static str]);

#[test]
fn channels_that_are_not_those_expected_are_refused() {
    let wrong: [Connects; 10] = [
        (
            "the same twice",
            |far| {
                far.channel(&init(0));
                far.channel(&init(0));
            },
            &["multifd 0 channel", "connected twice"],
        ),
        ("one too many", |far| far.channel(&init(2)), &["multifd 2 channel", "multifd-channels"]),
        ("the last there is", |far| far.channel(&init(255)), &["multifd 255 channel"]),
        (
            "garbage",
            |far| far.channel(&[0xff; 100]),
            &["multifd channel, byte 0", "0xffffffff", "0x11223344"],
        ),
        (
            "another protocol",
            |far| far.channel(b"GET / HTTP/1.1\r\n\r\n"),
            &["multifd channel, byte 0", "0x47455420"],
        ),
        (
            "another version",
            |far| {
                let mut first = init(0);
                first[7] = 2;
                far.channel(&first);
            },
            &["multifd channel, byte 4", "version"],
        ),
        (
            "two VMs",
            |far| {
                far.channel(&init_of(0, [1; 16]));
                far.channel(&init_of(1, [2; 16]));
            },
            &["multifd 1 channel, byte 8", "UUID"],
        ),
        (
            "two main channels",
            |far| {
                far.main.header();
                far.main.send();
                far.channel(b"QEVM\0\0\0\x03");
            },
            &["main channel", "second"],
        ),
        (
            "a message of the return path",
            |far| far.channel(&[0, 1, 0, 4, 0, 0, 0, 0]),
            &["multifd channel, byte 0"],
        ),
        ("a recovery", |far| far.channel(&[8, 0, 0x0a, 0, 4, 0, 0, 0, 0]), &["channel, byte 0"]),
    ];
    for (name, connect, parts) in wrong {
        check(name, |what| {
            let (destination, address) = waiting(2);
            let mut far = Far::connect(&address);
            connect(&mut far);
            expect_failed(&destination, &mut far, parts, what);
            expect_untouched(&destination, what);
        });
    }
}

#[test]
fn channels_of_another_vm_are_refused() {
    for (there, accepted) in [([7; 16], true), ([0; 16], true), ([8; 16], false)] {
        check(&format!("{there:?}"), |what| {
            let config = Config { uuid: Some([7; 16]), ..config() };
            let (destination, address) = waiting_as(&config, 2);
            let mut far = Far::connect(&address);
            far.channel(&init_of(0, there));
            far.channel(&init_of(1, there));
            far.begin();
            if accepted {
                far.all_pages(Packing::None, &[]);
                far.end();
                expect_arrived(&destination, &mut far, &[], what);
            } else {
                expect_failed(&destination, &mut far, &["UUID", "0808", "0707"], what);
                expect_untouched(&destination, what);
            }
        });
    }
}

/// A channel that never comes is named when its time is over; a user need not wait for that.
#[test]
fn a_channel_that_never_comes_is_not_waited_for_for_ever() {
    for cancelled in [true, false] {
        check(&format!("cancelled {cancelled}"), |what| {
            let (destination, address) = waiting(3);
            let mut far = Far::connect(&address);
            far.main.header().return_path();
            far.main.send();
            far.channel(&init(2));
            far.channel(&init(0));
            sleep(Duration::from_millis(100));
            if cancelled {
                let begun = Instant::now();
                destination.migrator.cancel().expect("it is no postcopy");
                let info = destination.ended(what);
                assert!(begun.elapsed() < Duration::from_secs(20), "{what}: {:?}", begun.elapsed());
                assert_eq!(info.status, Some(MigrationStatus::Cancelled), "{what}");
            } else {
                // Longer than anything else here may take.
                sleep(LIMIT);
                let parts = ["multifd 1 channel", "not connected", "multifd-channels"];
                expect_failed(&destination, &mut far, &parts, what);
            }
            expect_untouched(&destination, what);
        });
    }
}

// What channels say.

/// What a source says on its channels, and parts of what the destination says of it.
type Says = (&'static str, fn(&mut Far), &'static [&'static str]);

const FILL: [u8; 4096] = [0xaa; 4096];

/// A packet of one page whose header is changed.
fn changed(change: fn(&mut whimbrel_wire::PacketHeader)) -> Vec<u8> {
    let mut header = header(RAM, (&[1], &[]), (0, 4096));
    change(&mut header);
    [bytes(&header), FILL.to_vec()].concat()
}

/// A packet of one page, some bytes of which are others.
fn damaged(at: usize, with: &[u8]) -> Vec<u8> {
    let mut packet = packet(RAM, (&[1], &[]), 0, &FILL);
    packet[at..at + with.len()].copy_from_slice(with);
    packet
}

/// Where the second channel's packet begins: "byte N" for what is N bytes behind that.
const PLACES: [&str; 5] = ["byte 1408", "byte 1412", "byte 1416", "byte 1420", "byte 1424"];

const WRONG_HEADERS: [Says; 21] = [
    ("no magic", |far| far.say(1, &damaged(0, b"QEVM")), &[PLACES[0], "0x11223344"]),
    ("another version", |far| far.say(1, &damaged(7, &[2])), &[PLACES[1], "version"]),
    ("unknown flags", |far| far.say(1, &damaged(8, &[0x80])), &[PLACES[2], "flags"]),
    ("two methods", |far| far.say(1, &damaged(11, &[6])), &[PLACES[2], "flags"]),
    ("hardware's method", |far| far.say(1, &damaged(11, &[8])), &["method 0x8"]),
    (
        "more than fit a packet",
        |far| far.say(1, &changed(|header| header.pages_alloc = 129)),
        &[PLACES[3], "129"],
    ),
    (
        "more pages than it was made for",
        |far| far.say(1, &changed(|header| header.normal_pages = 129)),
        &["pages of a packet"],
    ),
    (
        "all pages there are",
        |far| far.say(1, &changed(|header| header.normal_pages = u32::MAX)),
        &["pages of a packet"],
    ),
    (
        "together too many",
        |far| {
            let header = changed(|header| (header.normal_pages, header.zero_pages) = (65, 64));
            far.say(1, &header);
        },
        &["pages of a packet"],
    ),
    (
        "an overflow",
        |far| far.say(1, &changed(|header| header.zero_pages = u32::MAX)),
        &["pages of a packet"],
    ),
    (
        "too little data",
        |far| far.say(1, &changed(|header| header.next_packet_size = 4095)),
        &["length of the packet's pages", "0xfff"],
    ),
    (
        "too much data",
        |far| far.say(1, &changed(|header| header.next_packet_size = u32::MAX)),
        &["length of the packet's pages"],
    ),
    (
        "more than is held at once",
        |far| {
            let change = |header: &mut whimbrel_wire::PacketHeader| {
                (header.flags, header.next_packet_size) = (packet_flag::ZSTD, (1 << 20) + 1);
            };
            far.say(1, &changed(change));
        },
        &["bytes of a packet", "1048577"],
    ),
    ("behind the end", |far| far.say(1, &changed(|h| h.offsets[0] = MEMORY)), &["0x200000"]),
    (
        "far behind it",
        |far| far.say(1, &changed(|header| header.offsets[0] = !4095)),
        &["0xfffffffffffff000", "vm.ram"],
    ),
    (
        "between pages",
        |far| far.say(1, &changed(|header| header.offsets[0] = 4097)),
        &["whole pages", "0x1001"],
    ),
    (
        "a zero page behind the end",
        |far| far.say(1, &packet(RAM, (&[], &[PAGES]), 0, &[])),
        &["0x200000"],
    ),
    (
        "no such block",
        |far| far.say(1, &packet("pc.ram", (&[1], &[]), 0, &FILL)),
        &["block pc.ram, which does not exist"],
    ),
    ("no block", |far| far.say(1, &damaged(64, &[0])), &["name of the packet's block"]),
    ("a name without an end", |far| far.say(1, &damaged(64, &[b'x'; 256])), &["block"]),
    ("garbage", |far| far.say(1, &[0x5a; 64 << 10]), &[PLACES[0], "0x5a5a5a5a"]),
];

#[test]
fn a_packet_that_makes_no_sense_is_refused_and_nothing_written() {
    for (name, say, parts) in WRONG_HEADERS {
        check(name, |what| {
            let (destination, mut far) = Far::begun();
            say(&mut far);
            let parts = [&["multifd 1 channel", "byte "], parts].concat();
            expect_failed(&destination, &mut far, &parts, what);
            expect_untouched(&destination, what);
        });
    }
}

/// A packet of `count` pages, packed, that holds `data`.
fn packed(packing: Packing, count: u64, data: &[u8]) -> Vec<u8> {
    let pages: Vec<u64> = (0..count).collect();
    packet(RAM, (&pages, &[]), packing.flags(), data)
}

/// Zeros, packed as well as can be: far more than a packet may have.
fn bomb(packing: Packing) -> Vec<u8> {
    const BYTES: u64 = 256 << 20;
    let mut zeros = std::io::repeat(0).take(BYTES);
    let bytes = match packing {
        Packing::Zlib => {
            let level = flate2::Compression::fast();
            let mut packer = flate2::write::ZlibEncoder::new(Vec::new(), level);
            let len = std::io::copy(&mut zeros, &mut packer).expect("packed");
            assert_eq!(len, BYTES);
            packer.finish().expect("packed")
        }
        _ => zstd::stream::encode_all(zeros, 1).expect("packed"),
    };
    assert!(bytes.len() > 4096, "it is one");
    bytes
}

/// Pages that pack well, but not to nothing.
fn text() -> Vec<u8> {
    (0..64 * 4096 / 8).flat_map(|number: u64| format!("{:08}", number / 3).into_bytes()).collect()
}

#[test]
fn packed_pages_that_are_not_what_they_should_be_are_refused() {
    for packing in [Packing::Zlib, Packing::Zstd] {
        let three = packing.pack(&[0x5a; 3 * 4096]);
        let mut bent = packing.pack(&text());
        let middle = bent.len() / 2;
        bent[middle..middle + 64].fill(0xff);
        let cases = [
            ("garbage", packed(packing, 3, &[0xff; 1000]), "cannot be decoded"),
            ("nothing", packed(packing, 3, &[]), "expected 12288"),
            ("too few", packed(packing, 4, &three), "expected 16384"),
            ("one too many", packed(packing, 2, &three), "more"),
            ("cut", packed(packing, 3, &three[..three.len() - 6]), "expected 12288"),
            ("bent", packed(packing, 64, &bent), "expected 262144"),
        ];
        for (name, bytes, part) in cases {
            check(&format!("{packing:?}, {name}"), |what| {
                let (destination, mut far) = Far::begun();
                far.say(1, &bytes);
                let parts = ["multifd 1 channel", "byte ", part];
                expect_failed(&destination, &mut far, &parts, what);
                expect_untouched(&destination, what);
            });
        }
    }
}

/// The most memory this process has had, in KiB.
fn most_memory() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").expect("/proc");
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).expect("told");
    line.trim().trim_end_matches(" kB").parse().expect("a number")
}

#[test]
fn a_bomb_takes_no_more_than_a_packet() {
    for packing in [Packing::Zlib, Packing::Zstd] {
        let bomb = bomb(packing);
        // What the header may announce: a longer one would be refused before it is read.
        let bomb = &bomb[..bomb.len().min(1 << 20)];
        check(&format!("{packing:?}"), |what| {
            let (destination, mut far) = Far::begun();
            let before = most_memory();
            let began = Instant::now();
            far.say(1, &packed(packing, 128, bomb));
            let parts = ["multifd 1 channel", "expected 524288", "more"];
            expect_failed(&destination, &mut far, &parts, what);
            assert!(began.elapsed() < Duration::from_secs(20), "{what}: {:?}", began.elapsed());
            let grown = most_memory() - before;
            assert!(grown < 64 << 10, "{what}: it took {grown} KiB");
            expect_untouched(&destination, what);
        });
    }
}

/// A frame that asks for a window larger than any packet, which a decoder would have to hold.
#[test]
fn a_window_of_any_size_is_not_held() {
    check("window", |what| {
        let (destination, mut far) = Far::begun();
        let before = most_memory();
        // A frame's magic, no flags, a window of 2 GiB, and a block of one byte, 128 KiB long.
        let frame = [0x28, 0xb5, 0x2f, 0xfd, 0, 21 << 3, 3, 0, 0x10, 0x5a];
        far.say(1, &packed(Packing::Zstd, 3, &frame));
        let parts = ["multifd 1 channel", "zstd"];
        expect_failed(&destination, &mut far, &parts, what);
        let grown = most_memory() - before;
        assert!(grown < 64 << 10, "{what}: it took {grown} KiB");
        expect_untouched(&destination, what);
    });
}

#[test]
fn the_state_of_devices_on_a_channel_is_refused_by_name() {
    check("device state", |what| {
        let (destination, mut far) = Far::begun();
        let name = Name::new("0000:00:02.0/vfio").expect("a name");
        let mut packet = Vec::new();
        DevicePacketHeader { name, instance_id: 0, len: 100 }.encode(&mut packet);
        packet.extend([0; 100]);
        far.say(0, &packet);
        let parts = ["multifd 0 channel", "byte ", "0000:00:02.0/vfio", "not supported"];
        expect_failed(&destination, &mut far, &parts, what);
        expect_untouched(&destination, what);
    });
}

// How channels end.

#[test]
fn a_channel_that_ends_too_early_is_named() {
    let whole = packet(RAM, (&[1, 2, 3], &[]), 0, &[0x5a; 3 * 4096]);
    let packed = packed(Packing::Zstd, 3, &Packing::Zstd.pack(&[0x5a; 3 * 4096]));
    for (name, packet, part) in [
        ("in a header", &whole[..100], "header"),
        ("behind a header", &whole[..1344], "pages"),
        ("in a page", &whole[..1344 + 5000], "pages"),
        ("in packed pages", &packed[..packed.len() - 1], "pages"),
        // Nobody can know that before the round is over.
        ("behind a packet", &whole[..], "SYNC"),
        ("behind nothing", &[][..], "SYNC"),
    ] {
        for with_mark in [true, false] {
            if !with_mark && part == "SYNC" {
                continue;
            }
            check(&format!("{name}, with a mark: {with_mark}"), |what| {
                let (destination, mut far) = Far::begun();
                far.say(0, &sync());
                far.say(1, packet);
                far.channels[1].shutdown(Shutdown::Both).expect("open");
                if with_mark {
                    far.mark();
                }
                let at = format!("byte {}", BEGUN + packet.len() as u64);
                let parts = ["multifd 1 channel", "ends here", part];
                // Where a header or pages were expected, they are what is not there.
                let parts = match part {
                    "SYNC" => [&parts[..], &[&at]].concat(),
                    _ => parts.to_vec(),
                };
                expect_failed(&destination, &mut far, &parts, what);
            });
        }
    }
}

#[test]
fn all_connections_end_together_at_any_byte() {
    let mut dice = Dice(seed("multifd ends"));
    for run in 0..30 {
        check(&format!("run {run}"), |what| {
            let (destination, mut far) = Far::begun();
            let mut said = Vec::new();
            let packets = all_packets(&far.main.model, 1, Packing::None, &[]);
            packets.iter().for_each(|(_, packet)| said.extend_from_slice(packet));
            let whole = said.len() as u64;
            said.truncate(usize::try_from(dice.below(whole)).expect("short"));
            far.say(0, &said);
            if dice.below(2) == 0 {
                far.mark();
            }
            far.close();
            destination.expect_not_arrived(&["channel"], what);
        });
    }
}

// Rounds.

/// A page goes out twice, on two channels, and the second one's is there first: it is not read
/// before the first one's round has ended.
#[test]
fn a_round_is_over_before_the_next_one_begins() {
    for synced_with_pages in [false, true] {
        check(&format!("SYNC and pages in one packet: {synced_with_pages}"), |what| {
            let (destination, mut far) = Far::begun();
            far.all_pages(Packing::None, &[5]);
            let old = packet(RAM, (&[5], &[]), 0, &[1; 4096]);
            let new = packet(RAM, (&[5], &[]), 0, &[2; 4096]);
            far.say(1, &sync());
            far.say(1, &new);
            sleep(Duration::from_millis(50));
            if synced_with_pages {
                // As a QEMU before 9.0 does.
                far.say(0, &packet(RAM, (&[5], &[]), packet_flag::SYNC, &[1; 4096]));
            } else {
                far.say(0, &old);
                far.say(0, &sync());
            }
            far.mark();
            far.end();
            expect_arrived(&destination, &mut far, &[(5, 2)], what);
        });
    }
}

/// What a page holds is what came last: on whichever channel, packed or not, as content or as
/// nothing.
#[test]
fn what_came_last_stays() {
    check("last", |what| {
        let (destination, mut far) = Far::begun();
        far.all_pages(Packing::None, &[]);
        far.sync();
        far.mark();
        let three = Packing::Zstd.pack(&[3; 3 * 4096]);
        far.say(0, &packet(RAM, (&[7, 8, 9], &[10, 11]), packet_flag::ZSTD, &three));
        far.sync();
        far.mark();
        // On the main channel, and zero again.
        far.main.part().other_page(RAM, 8, 4).end_section();
        far.main.send();
        far.say(1, &packet(RAM, (&[], &[9]), 0, &[]));
        far.say(0, &packet(RAM, (&[10], &[]), 0, &[5; 4096]));
        far.end();
        let others = [(7, 3), (8, 4), (9, 0), (10, 5), (11, 0)];
        expect_arrived(&destination, &mut far, &others, what);
    });
}

/// Marks with nothing between them, SYNC packets that come early, and packets without pages.
#[test]
fn empty_rounds_are_rounds() {
    check("empty", |what| {
        let (destination, mut far) = Far::begun();
        for _ in 0..20 {
            far.sync();
        }
        let nothing = whimbrel_wire::PacketHeader::empty(0, 3, whimbrel_wire::TargetPage::FOUR_KIB);
        (0..20).for_each(|_| far.mark());
        far.all_pages(Packing::None, &[]);
        far.say(0, &bytes(&nothing));
        far.end();
        expect_arrived(&destination, &mut far, &[], what);
    });
}

/// A source that never ends a round, or stops in the middle of a packet: nobody waits for it who
/// has something else to do.
#[test]
fn a_source_that_stalls_is_cancelled_at_once() {
    let whole = packet(RAM, (&[1, 2, 3], &[]), 0, &[0x5a; 3 * 4096]);
    for (name, packet) in [
        ("no SYNC", &[][..]),
        ("in a header", &whole[..100]),
        ("behind a header", &whole[..1344]),
        ("in a page", &whole[..1344 + 5000]),
    ] {
        check(name, |what| {
            let (destination, mut far) = Far::begun();
            far.say(0, &sync());
            far.say(1, packet);
            far.mark();
            sleep(Duration::from_millis(30));
            assert_eq!(destination.status(), Some(MigrationStatus::Active), "{what}");
            let began = Instant::now();
            destination.migrator.cancel().expect("it is no postcopy");
            let info = destination.ended(what);
            assert!(began.elapsed() < Duration::from_secs(20), "{what}: {:?}", began.elapsed());
            assert_eq!(info.status, Some(MigrationStatus::Cancelled), "{what}");
            assert!(!destination.runs(), "{what}");
        });
    }
}

/// Once the guest runs nothing is placed any more, whatever a channel still says: the memory is
/// the guest's.
#[test]
fn nothing_is_written_behind_the_end() {
    let late = packet(RAM, (&[1, 2, 3], &[]), 0, &[0x5a; 3 * 4096]);
    for before in [0, 1344, 1344 + 5000] {
        check(&format!("{before} bytes before the end"), |what| {
            let (destination, mut far) = Far::begun();
            far.all_pages(Packing::None, &[]);
            far.sync();
            far.main.devices();
            far.main.send();
            sleep(Duration::from_millis(20));
            far.say(1, &late[..before]);
            sleep(Duration::from_millis(20));
            far.main.stream_end();
            far.main.send();
            let info = destination.ended(what);
            match info.status {
                // It may well mind.
                Some(MigrationStatus::Failed) => {
                    let error = info.error_desc.expect("says why");
                    assert!(error.contains("multifd 1 channel"), "{what}: {error}");
                    assert!(!destination.runs(), "{what}");
                }
                status => {
                    assert_eq!(status, Some(MigrationStatus::Completed), "{what}");
                    assert_eq!(before, 0, "{what}: it has only half of a packet");
                    far.say(1, &late[before..]);
                    sleep(Duration::from_millis(100));
                    assert!(destination.runs(), "{what}");
                    destination.migrator.stop().expect("stops");
                    expect_memory(&destination, &far, &[], what);
                }
            }
        });
    }
}

// Anything else.

/// Bytes changed anywhere on the channels: it arrives, or it is refused; it never hangs when the
/// source has gone, and never panics.
#[test]
fn bytes_changed_anywhere_do_no_harm() {
    let mut dice = Dice(seed("multifd changed"));
    let (mut arrived, mut refused) = (0, 0);
    for run in 0..60 {
        let packing = dice.one_of(&[Packing::None, Packing::Zlib, Packing::Zstd]);
        check(&format!("run {run}: {packing:?}"), |what| {
            let (destination, mut far) = Far::begun();
            for (channel, mut packet) in all_packets(&far.main.model, 2, packing, &[]) {
                // Mostly in the header, where each bit has a meaning.
                for _ in 0..dice.below(3) {
                    let end = if dice.below(2) == 0 { 340 } else { packet.len() as u64 };
                    let at = usize::try_from(dice.below(end)).expect("in a packet");
                    packet[at] ^= u8::try_from(1 << dice.below(8)).expect("a bit");
                }
                far.say(channel, &packet);
            }
            far.end();
            // What waits for more than there is must not wait for ever.
            sleep(Duration::from_millis(30));
            far.close();
            let info = destination.ended(what);
            match info.status {
                Some(MigrationStatus::Completed) => arrived += 1,
                _ => {
                    destination.expect_not_arrived(&["channel"], what);
                    refused += 1;
                }
            }
        });
    }
    eprintln!("{arrived} arrived, {refused} were refused");
    assert!(refused > 10, "next to nothing was noticed");
}

#[test]
fn a_wait_for_the_first_channel_is_cancelled_at_once() {
    check("first", |what| {
        let (destination, _) = waiting(4);
        until("it waits", || destination.status() == Some(MigrationStatus::Setup));
        let began = Instant::now();
        destination.migrator.cancel().expect("it is no postcopy");
        assert_eq!(destination.ended(what).status, Some(MigrationStatus::Cancelled));
        assert!(began.elapsed() < Duration::from_secs(20), "{what}: {:?}", began.elapsed());
    });
}
