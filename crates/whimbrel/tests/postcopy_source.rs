//! A destination of a postcopy, and a source that says what makes no sense, or stops in the middle
//! of it: before RUN the destination fails and runs nothing; after it the guest runs on, and what
//! it has of its memory stays as it is.

#[path = "support/far_source.rs"]
mod far_source;
#[path = "support/vms.rs"]
mod vms;

use std::io::Write;
use std::net::{Shutdown, TcpStream};
use std::sync::mpsc;
use std::thread::{self, sleep};
use std::time::{Duration, Instant};

use far_source::{ASKS_RUN_APART, FarSource, name};
use vms::{Alone, LIMIT, Side, until};
use whimbrel::{Address, Capability, MigrationStatus, RunState, Vm};
use whimbrel_ram::TargetPage;
use whimbrel_vm::{AccelChoice, Config, Fill};
use whimbrel_wire::recovery::Identity;
use whimbrel_wire::{
    BlockInfo, BlockList, BlockOffset, Command, Package, RecordEncoder, ReturnMessage,
    encode_end_of_section, encode_multifd_flush,
};

const RAM: &str = "vm.ram";
const MEMORY: u64 = 2 << 20;

/// A guest that touches nothing by itself.
fn config() -> Config {
    Config { accel: AccelChoice::Native, fill: Fill::Random, ..Config::new(MEMORY) }
}

fn waiting(preempt: bool) -> (Side, Address) {
    let destination = Side::waiting(&config(), true);
    let wanted = preempt.then_some(Capability::PostcopyPreempt);
    let all: Vec<Capability> = [Capability::PostcopyRam].into_iter().chain(wanted).collect();
    destination.switch_on(&all);
    let address = destination.listen("tcp:127.0.0.1:0");
    (destination, address)
}

/// Ends a migration; it must not take long, whatever the source does.
fn end_soon(side: &Side, what: &str) {
    thread::scope(|scope| {
        let (done, ended) = mpsc::channel();
        thread::Builder::new()
            .name("end".into())
            .spawn_scoped(scope, move || {
                side.migrator.end();
                let _ = done.send(());
            })
            .expect("a thread");
        if ended.recv_timeout(LIMIT).is_err() {
            eprintln!("{what}: the end of the migration hangs");
            std::process::abort(); // Whoever waits for that thread would hang, too.
        }
    });
}

/// The destination failed, with one line that has all of `parts`, and runs nothing.
fn expect_failed(destination: &Side, parts: &[&str], what: &str) {
    destination.expect_not_arrived(parts, what);
    destination.migrator.cont().expect_err("there is no guest");
    end_soon(destination, what);
}

/// The guest runs on and the destination has paused, for a reason that has all of `parts`.
fn expect_paused(destination: &Side, source: &FarSource, parts: &[&str], what: &str) {
    until(&format!("{what}: it pauses"), || {
        let info = destination.migrator.info();
        let status = info.status.expect("one was started");
        assert!(status.is_running(), "{what}: {status}: {:?}", info.error_desc);
        status == MigrationStatus::PostcopyPaused
    });
    destination.expect_reason(parts, what);
    // Its devices may still be loading.
    until(&format!("{what}: the guest runs"), || destination.runs());
    expect_page(destination, source, 0, what);
    destination.migrator.cancel().expect_err("neither side has all of it");
    destination.migrator.stop().expect("stops");
    assert_eq!(destination.migrator.run_state(), RunState::Paused, "{what}");
    destination.migrator.cont().expect("runs on");
    assert!(destination.runs(), "{what}");
    end_soon(destination, what);
    assert_eq!(destination.status(), Some(MigrationStatus::PostcopyPaused), "{what}");
}

fn expect_page(destination: &Side, source: &FarSource, page: u64, what: &str) {
    let digest = |vm: &dyn Vm| {
        let (_, block) = vm.ram().find(RAM).expect("a block");
        block.page_digest(TargetPage(page))
    };
    assert_eq!(digest(destination.migrator.vm()), digest(&*source.model), "{what}: page {page}");
}

/// The guest is here with all of its memory.
fn expect_arrived(destination: &Side, source: &FarSource, what: &str) {
    let info = destination.ended(what);
    assert_eq!(info.status, Some(MigrationStatus::Completed), "{what}: {:?}", info.error_desc);
    assert!(destination.runs(), "{what}");
    destination.migrator.stop().expect("stops");
    for page in 0..MEMORY / 4096 {
        expect_page(destination, source, page, what);
    }
}

/// What a source says, and parts of what the destination says of it.
type Says = (&'static str, fn(&mut FarSource), &'static [&'static str]);

/// Without the last bytes.
fn cut(bytes: &[u8], by: usize) -> &[u8] {
    &bytes[..bytes.len() - by]
}

const BEFORE: &[Says] = &[
    (
        "RUN alone",
        |s| {
            s.begin().command(&Command::PostcopyRun);
        },
        &["main channel", "RUN"],
    ),
    (
        "LISTEN alone",
        |s| {
            s.begin().command(&Command::PostcopyListen);
        },
        &["main channel", "LISTEN"],
    ),
    (
        "nothing announced",
        |s| {
            s.header().return_path().setup().all_pages(&[]);
            let package = s.package();
            s.packaged(&package);
        },
        &["main channel", "no postcopy was announced"],
    ),
    (
        "no return path",
        |s| {
            s.header().advise().setup().all_pages(&[]);
            let package = s.package();
            s.packaged(&package);
        },
        &["main channel", "no return path"],
    ),
    (
        "a package before RAM",
        |s| {
            s.header().return_path().advise();
            let package = s.package();
            s.packaged(&package);
        },
        &["main channel", "after the RAM setup"],
    ),
    (
        "no LISTEN",
        |s| {
            let package = s.package();
            let mut listen = Vec::new();
            Command::PostcopyListen.encode(&mut listen);
            s.begin().packaged(&package[listen.len()..]);
        },
        &["main channel", "LISTEN"],
    ),
    (
        "no RUN",
        |s| {
            let mut package = s.package();
            let len = package.len();
            package[len - 2..].fill(0x55);
            s.begin().packaged(&package);
        },
        &["main channel", "POSTCOPY_RUN"],
    ),
    (
        "RUN twice",
        |s| {
            let mut package = s.package();
            Command::PostcopyRun.encode(&mut package);
            s.begin().packaged(&package);
        },
        &["main channel"],
    ),
    (
        "an empty package",
        |s| {
            s.begin().packaged(&[]);
        },
        &["main channel"],
    ),
    (
        "a package of 4 bytes",
        |s| {
            s.begin().packaged(&[8, 0, 5, 0]);
        },
        &["main channel"],
    ),
    (
        "a package of 4 GiB",
        |s| {
            s.begin().command(&Command::Packaged { len: u32::MAX });
        },
        &["main channel"],
    ),
    (
        "half a package",
        |s| {
            let package = s.package();
            let len = u32::try_from(package.len()).expect("short");
            s.begin().command(&Command::Packaged { len });
            s.words.extend_from_slice(cut(&package, package.len() / 2));
            s.send();
            s.main.shutdown(Shutdown::Write).expect("open");
        },
        &["main channel", "the package"],
    ),
    (
        "all of it but RUN",
        |s| {
            let package = s.package();
            let len = u32::try_from(package.len()).expect("short");
            s.begin().command(&Command::Packaged { len });
            s.words.extend_from_slice(cut(&package, 5));
            s.send();
            s.main.shutdown(Shutdown::Write).expect("open");
        },
        &["main channel", "RUN"],
    ),
    (
        "a device that is not there",
        |s| {
            let mut sections = s.sections();
            sections.truncate(2);
            let mut package = Vec::new();
            Package { sections, pings: vec![3] }.encode(&mut package);
            s.begin().packaged(&package);
        },
        &["loading the devices"],
    ),
    (
        "a discard before RAM",
        |s| {
            s.header().return_path().advise().discard(RAM, 0, 4096);
        },
        &["main channel", "no postcopy of RAM was announced"],
    ),
    (
        "a discard that was not announced",
        |s| {
            s.header().return_path().setup().discard(RAM, 0, 4096);
        },
        &["main channel", "no postcopy of RAM was announced"],
    ),
    (
        "a discard behind the end",
        |s| {
            s.begin().discard(RAM, MEMORY, 4096);
        },
        &["main channel, before byte", "vm.ram"],
    ),
    (
        "a discard over the end",
        |s| {
            s.begin().discard(RAM, MEMORY - 4096, 8192);
        },
        &["main channel, before byte", "vm.ram"],
    ),
    (
        "a discard of everything",
        |s| {
            s.begin().discard(RAM, 0, u64::MAX);
        },
        &["main channel, before byte", "vm.ram"],
    ),
    (
        "a discard between pages",
        |s| {
            s.begin().discard(RAM, 8, 4096);
        },
        &["main channel, before byte", "no pages"],
    ),
    (
        "a discard of no such block",
        |s| {
            s.begin().discard("pc.ram", 0, 4096);
        },
        &["main channel, before byte", "pc.ram"],
    ),
    (
        "a page of no such block",
        |s| {
            let bytes = foreign_page();
            s.begin().part();
            s.words.extend_from_slice(&bytes);
        },
        &["main channel, byte", "pc.ram"],
    ),
    (
        "the end without the guest",
        |s| {
            s.begin().all_pages(&[]).eof();
        },
        &[],
    ),
];

/// A page of a block that nobody announced.
fn foreign_page() -> Vec<u8> {
    let list = BlockList::new([BlockInfo::new(name("pc.ram"), MEMORY)]).expect("a block");
    let mut records = RecordEncoder::new(list.into());
    let place = records.blocks().find(b"pc.ram").expect("announced");
    let mut bytes = Vec::new();
    records.page_header(place, BlockOffset(0), &mut bytes);
    bytes.resize(bytes.len() + 4096, 7);
    bytes
}

#[test]
fn before_the_guest_runs_it_fails_and_tells_the_source() {
    for preempt in [true, false] {
        for (name, says, parts) in BEFORE {
            let alone = Alone::begin();
            let what = format!("preempt {preempt}: {name}");
            {
                let (destination, address) = waiting(preempt);
                let mut source = FarSource::connect(&address, &config());
                says(&mut source);
                source.send();
                if *name == "the end without the guest" {
                    // Precopy of a VM without devices: not a thing of postcopy, and no guest.
                    until(&what, || !destination.status().is_some_and(MigrationStatus::is_running));
                    assert!(
                        !destination.runs()
                            || destination.status() == Some(MigrationStatus::Completed)
                    );
                } else {
                    expect_failed(&destination, parts, &what);
                    let told = source.hears(&ReturnMessage::Shut(1));
                    assert!(told || *name == "no return path", "{what}: the source is not told");
                }
            }
            alone.expect_nothing_left(&what);
        }
    }
}

const AFTER: &[Says] = &[
    ("garbage", |s| s.words.extend_from_slice(&[0xff; 64]), &["main channel, byte"]),
    ("nothing more", |s| drop(s.main.shutdown(Shutdown::Write)), &["main channel, byte", "RAM"]),
    ("no connection", |s| drop(s.main.shutdown(Shutdown::Both)), &["main channel"]),
    (
        "half a page",
        |s| {
            s.part().page(RAM, 1);
            let half = s.words.len() - 2000;
            s.words.truncate(half);
            s.send();
            s.main.shutdown(Shutdown::Write).expect("open");
        },
        &["main channel, byte", "a page"],
    ),
    (
        "RUN again",
        |s| {
            s.command(&Command::PostcopyRun);
        },
        &["main channel", "RUN"],
    ),
    (
        "LISTEN again",
        |s| {
            s.command(&Command::PostcopyListen);
        },
        &["main channel", "LISTEN"],
    ),
    (
        "a package again",
        |s| {
            let package = s.package();
            s.packaged(&package);
        },
        &["main channel", "PACKAGED"],
    ),
    (
        "a discard",
        |s| {
            s.discard(RAM, 0, 4096);
        },
        &["main channel", "DISCARD"],
    ),
    (
        "another setup",
        |s| {
            s.setup();
        },
        &["main channel", "second time"],
    ),
    (
        "ADVISE again",
        |s| {
            s.advise();
        },
        &["main channel", "ADVISE"],
    ),
    (
        "a page of no such block",
        |s| {
            let bytes = foreign_page();
            s.part();
            s.words.extend_from_slice(&bytes);
        },
        &["main channel, byte", "pc.ram"],
    ),
    (
        "a page behind the end",
        |s| {
            s.part().page(RAM, 0);
            let word = s.words.len() - 4096 - 8;
            // A page (8) of the block before (32).
            s.words[word..word + 8].copy_from_slice(&(MEMORY | 0x28).to_be_bytes());
        },
        &["main channel, byte", "vm.ram"],
    ),
    (
        "a flush of multifd",
        |s| {
            s.part();
            encode_multifd_flush(&mut s.words);
        },
        &["main channel"],
    ),
];

#[test]
fn after_the_guest_runs_it_pauses_and_the_guest_runs_on() {
    for preempt in [true, false] {
        for (name, says, parts) in AFTER {
            let mut alone = Alone::begin();
            let what = format!("preempt {preempt}: {name}");
            {
                let (destination, address) = waiting(preempt);
                let mut source = FarSource::connect(&address, &config());
                source.guest().send();
                until(&what, || destination.status() == Some(MigrationStatus::PostcopyActive));
                says(&mut source);
                source.send();
                expect_paused(&destination, &source, parts, &what);
            }
            alone.keeps_one();
            alone.expect_nothing_left(&what);
        }
    }
}

/// RUN has come, and the connection breaks with it: the guest is here, and nowhere else.
#[test]
fn a_connection_that_breaks_right_behind_run_leaves_the_guest_running() {
    for preempt in [true, false] {
        for how in [Shutdown::Write, Shutdown::Both] {
            let mut alone = Alone::begin();
            let what = format!("preempt {preempt}, {how:?}");
            for _ in 0..20 {
                let (destination, address) = waiting(preempt);
                let mut source = FarSource::connect(&address, &config());
                source.guest().send();
                source.main.shutdown(how).expect("open");
                expect_paused(&destination, &source, &["channel"], &what);
                alone.keeps_one();
            }
            alone.expect_nothing_left(&what);
        }
    }
}

/// The source has sent its last word and not every page, and there is no other way for them.
#[test]
fn pages_that_never_come_are_counted() {
    let mut alone = Alone::begin();
    {
        let (destination, address) = waiting(false);
        let mut source = FarSource::connect(&address, &config());
        source.guest().part().pages(RAM, &[0, 7, 9]).pages("vm.firmware", &[]).end_section();
        source.eof().send();
        expect_paused(
            &destination,
            &source,
            &["main channel", "2 pages never came"],
            "two missing",
        );
        alone.keeps_one();
    }
    alone.expect_nothing_left("two missing");
}

#[test]
fn of_a_page_that_comes_twice_the_first_stays() {
    let alone = Alone::begin();
    {
        let (destination, address) = waiting(false);
        let mut source = FarSource::connect(&address, &config());
        source.guest().all_pages(&[0]);
        source.part().other_page(RAM, 5, 0x55).other_page(RAM, 0, 0xaa).end_section();
        source.eof().send();
        expect_arrived(&destination, &source, "twice");
        let faults = destination.migrator.info().faults.expect("told");
        assert_eq!(faults.came_twice, 2);
    }
    alone.expect_nothing_left("twice");
}

/// What goes wrong on the urgent channel, and whether the guest arrives all the same.
type OnUrgent = (&'static str, fn(&mut FarSource, &mut TcpStream), &'static [&'static str]);

const URGENT: &[OnUrgent] = &[
    ("garbage", |_, u| u.write_all(&[0xff; 64]).expect("open"), &["urgent channel, byte"]),
    (
        "closed",
        |_, u| u.shutdown(Shutdown::Both).expect("open"),
        &["urgent channel, byte 0", "the rest of the pages"],
    ),
    (
        "half a page",
        |s, u| {
            let page = s.named_page(RAM, 3);
            u.write_all(cut(&page, 100)).expect("open");
            u.shutdown(Shutdown::Write).expect("open");
        },
        &["urgent channel, byte", "the rest of a page"],
    ),
    (
        "half a word",
        |_, u| {
            u.write_all(&[0, 0, 0]).expect("open");
            u.shutdown(Shutdown::Write).expect("open");
        },
        &["urgent channel, byte", "the rest of a record"],
    ),
    (
        "a page of no such block",
        |_, u| u.write_all(&foreign_page()).expect("open"),
        &["urgent channel, byte", "pc.ram"],
    ),
    (
        "a flush of multifd",
        |_, u| {
            let mut bytes = Vec::new();
            encode_multifd_flush(&mut bytes);
            u.write_all(&bytes).expect("open");
        },
        &["urgent channel"],
    ),
    (
        "a delta",
        |s, u| {
            let mut bytes = Vec::new();
            let mut records = RecordEncoder::new(s.blocks.clone());
            records.xbzrle_header(s.block(RAM), BlockOffset(0), 4, &mut bytes);
            u.write_all(&bytes).expect("open");
        },
        &["urgent channel"],
    ),
];

#[test]
fn what_makes_no_sense_on_the_urgent_channel_pauses_it() {
    for (name, says, parts) in URGENT {
        let mut alone = Alone::begin();
        let what = format!("urgent: {name}");
        {
            let (destination, address) = waiting(true);
            let mut source = FarSource::connect(&address, &config());
            source.guest().send();
            until(&what, || destination.status() == Some(MigrationStatus::PostcopyActive));
            let mut urgent = source.urgent();
            says(&mut source, &mut urgent);
            expect_paused(&destination, &source, parts, &what);
        }
        alone.keeps_one();
        alone.expect_nothing_left(&what);
    }
}

/// The urgent channel need not come, and need not last, where every page comes on the main one.
#[test]
fn without_urgent_pages_the_urgent_channel_is_not_missed() {
    for kind in ["never", "mark", "all of it there"] {
        let alone = Alone::begin();
        {
            let (destination, address) = waiting(true);
            let mut source = FarSource::connect(&address, &config());
            source.guest().send();
            let mut urgent = None;
            if kind != "never" {
                let stream = urgent.insert(source.urgent());
                let mut bytes = Vec::new();
                if kind == "all of it there" {
                    (1..MEMORY / 4096).for_each(|page| bytes.extend(source.named_page(RAM, page)));
                }
                encode_end_of_section(&mut bytes);
                stream.write_all(&bytes).expect("open");
            }
            match kind {
                "all of it there" => source.part().pages("vm.firmware", &[]).end_section(),
                _ => source.all_pages(&[0]),
            };
            source.eof().send();
            expect_arrived(&destination, &source, kind);
        }
        alone.expect_nothing_left(kind);
    }
}

/// What a guest touches is asked for once, by name first, and comes on either channel.
#[test]
fn what_is_touched_is_asked_for_and_placed() {
    for preempt in [true, false] {
        let alone = Alone::begin();
        let what = format!("preempt {preempt}");
        {
            let (destination, address) = waiting(preempt);
            let mut source = FarSource::connect(&address, &config());
            source.guest().send();
            let mut urgent = preempt.then(|| source.urgent());
            until(&what, || destination.status() == Some(MigrationStatus::PostcopyActive));
            let touch = |page: u64| {
                let (_, block) = destination.migrator.vm().ram().find(RAM).expect("a block");
                block.load_u64(page * 4096).expect("inside")
            };
            thread::scope(|scope| {
                let touched = scope.spawn(|| (touch(9), touch(11)));
                let start = BlockOffset(9 * 4096);
                let first = ReturnMessage::RequestPagesOf { block: name(RAM), start, len: 4096 };
                assert!(source.hears(&first), "{what}");
                answer(&mut source, urgent.as_mut(), 9);
                let start = BlockOffset(11 * 4096);
                assert!(source.hears(&ReturnMessage::RequestPages { start, len: 4096 }), "{what}");
                answer(&mut source, urgent.as_mut(), 11);
                touched.join().expect("both came");
            });
            source.all_pages(&[0, 9, 11]).eof().send();
            expect_arrived(&destination, &source, &what);
            let faults = destination.migrator.info().faults.expect("told");
            assert_eq!((faults.count, faults.came_twice), (2, 0), "{what}");
        }
        alone.expect_nothing_left(&what);
    }
}

fn answer(source: &mut FarSource, urgent: Option<&mut TcpStream>, page: u64) {
    match urgent {
        Some(urgent) => {
            urgent.write_all(&source.named_page(RAM, page)).expect("open");
        }
        None => {
            source.part().page(RAM, page).end_section();
            source.send();
        }
    }
}

/// Before the guest is there, a source that reads no answer holds nobody: the migration can be
/// cancelled.
#[test]
fn a_source_that_reads_no_answer_can_be_cancelled() {
    let alone = Alone::begin();
    {
        let (destination, address) = waiting(true);
        let mut source = FarSource::connect(&address, &config());
        source.begin().send();
        fill(&mut source);
        destination.migrator.cancel().expect("no guest is here");
        let info = destination.ended("cancelled");
        assert_eq!(info.status, Some(MigrationStatus::Cancelled));
    }
    alone.expect_nothing_left("PINGs before the package");
}

/// Afterwards it is an error of the source's, and does not hold the end of the migration.
#[test]
fn a_source_that_asks_without_end_and_reads_no_answer_pauses_it() {
    let mut alone = Alone::begin();
    {
        let (destination, address) = waiting(true);
        let mut source = FarSource::connect(&address, &config());
        source.guest().send();
        until("active", || destination.status() == Some(MigrationStatus::PostcopyActive));
        fill(&mut source);
        let parts = ["return path channel", "reads no answer"];
        expect_paused(&destination, &source, &parts, "PINGs");
        alone.keeps_one();
    }
    alone.expect_nothing_left("PINGs after RUN");
}

/// As many answers as nobody reads, and then all of RAM: the end of the migration does not wait
/// for the source to read.
#[test]
fn a_source_that_sends_everything_and_reads_nothing_holds_nobody() {
    let alone = Alone::begin();
    {
        let (destination, address) = waiting(true);
        let mut source = FarSource::connect(&address, &config());
        source.guest().send();
        until("active", || destination.status() == Some(MigrationStatus::PostcopyActive));
        fill_until_an_answer_waits(&mut source);
        source.all_pages(&[0]).eof().send();
        // Who touches them goes on when they have come.
        for page in 1..MEMORY / 4096 {
            expect_page(&destination, &source, page, "all is sent");
        }
        end_soon(&destination, "all is sent, nothing read");
        assert_eq!(destination.status(), Some(MigrationStatus::Completed));
        assert!(destination.runs(), "the guest has all of its memory");
    }
    alone.expect_nothing_left("all is sent, nothing read");
}

/// Sends PINGs and reads no answer, until no more of them are taken.
fn fill(source: &mut FarSource) {
    let mut pings = Vec::new();
    (0..5000).for_each(|_| Command::Ping(7).encode(&mut pings));
    source.main.set_write_timeout(Some(Duration::from_millis(300))).expect("a timeout");
    let start = Instant::now();
    while source.main.write_all(&pings).is_ok() {
        assert!(start.elapsed() < LIMIT, "the destination takes PINGs for ever");
    }
    source.main.set_write_timeout(None).expect("a timeout");
}

/// Sends PINGs and reads no answer, until the destination's thread that writes them has to wait.
fn fill_until_an_answer_waits(source: &mut FarSource) {
    let mut pings = Vec::new();
    (0..200).for_each(|_| Command::Ping(7).encode(&mut pings));
    let start = Instant::now();
    loop {
        source.main.write_all(&pings).expect("the destination reads on");
        // Until they are taken, and either all are answered or an answer waits for room.
        let mut stays = 0;
        loop {
            sleep(Duration::from_millis(1));
            match (waits("dest/main"), waits("dest/fault")) {
                (Some(2), Some(2)) => stays += 1,
                (Some(2), Some(_)) => break,
                _ => stays = 0,
            }
            if stays == 50 {
                return;
            }
            assert!(start.elapsed() < LIMIT, "the destination's answers never wait");
        }
    }
}

/// For how many things a thread waits: a channel is two, with what ends the wait.
fn waits(name: &str) -> Option<u64> {
    let threads = std::fs::read_dir("/proc/self/task").expect("/proc").filter_map(Result::ok);
    let read = |path: std::path::PathBuf| std::fs::read_to_string(path).unwrap_or_default();
    let mut threads = threads.map(|thread| thread.path());
    let thread = threads.find(|thread| read(thread.join("comm")).trim() == name)?;
    // The number of a `poll` or `ppoll`, the list, and how long it is; or "running".
    let call = read(thread.join("syscall"));
    u64::from_str_radix(call.split(' ').nth(2)?.strip_prefix("0x")?, 16).ok()
}

/// A package may be loaded before RUN has come: then a failure is still in time.
#[test]
fn a_package_is_loaded_before_run() {
    let alone = Alone::begin();
    {
        let (destination, address) = waiting(true);
        let mut source = FarSource::connect(&address, &config());
        source.header().return_path().command(&Command::Ping(ASKS_RUN_APART)).advise().setup();
        let package = source.package();
        let len = u32::try_from(package.len()).expect("short");
        source.command(&Command::Packaged { len });
        source.words.extend_from_slice(cut(&package, 5));
        source.send();
        assert!(source.hears(&ReturnMessage::Pong(0x42)), "it is loaded");
        assert!(!destination.runs(), "and does not run");
        assert_eq!(destination.status(), Some(MigrationStatus::PostcopyDevice));
        source.words.extend_from_slice(&package[package.len() - 5..]);
        source.all_pages(&[]).eof().send();
        expect_arrived(&destination, &source, "RUN came");
    }
    alone.expect_nothing_left("RUN apart");
}

/// RUN may have been lost with the link. Whichever channel ends first, and however it does: a
/// destination that has said that it has the package waits for its source.
#[test]
fn a_destination_that_has_the_package_waits_whichever_channel_ends_first() {
    const ASKS_WHO_IS_THERE: u32 = ASKS_RUN_APART | 16;
    for how in [Shutdown::Write, Shutdown::Both] {
        for main_first in [false, true] {
            let alone = Alone::begin();
            let what = format!("{how:?}, the main channel first: {main_first}");
            {
                let (destination, address) = waiting(true);
                let mut source = FarSource::connect(&address, &config());
                source.header().return_path().command(&Command::Ping(ASKS_WHO_IS_THERE));
                let identity = Identity { id: [1; 16], secret: [2; 32], beat_ms: 1000 };
                source.advise().setup().command(&Command::Identity(identity));
                let package = source.package();
                let len = u32::try_from(package.len()).expect("short");
                source.command(&Command::Packaged { len });
                source.words.extend_from_slice(cut(&package, 5));
                source.send();
                let urgent = source.urgent();
                assert!(source.hears(&ReturnMessage::Pong(0x42)), "{what}: it is loaded");
                match main_first {
                    true => source.main.shutdown(how).expect("open"),
                    false => urgent.shutdown(how).expect("open"),
                }
                until(&what, || destination.status() == Some(MigrationStatus::PostcopyPaused));
                destination.expect_reason(&["channel, byte"], &what);
                assert!(!destination.runs(), "{what}: nobody has given it the guest");
                end_soon(&destination, &what);
                assert!(!destination.runs(), "{what}");
            }
            alone.expect_nothing_left(&what);
        }
    }
}

/// The end of the migration, at any time, without the source's help.
#[test]
fn a_silent_source_does_not_hold_the_end() {
    for preempt in [true, false] {
        let mut alone = Alone::begin();
        type Moment = (&'static str, fn(&mut FarSource));
        let moments: [Moment; 4] = [
            ("in a package", |s| {
                s.begin().command(&Command::Packaged { len: 1 << 30 });
            }),
            ("before RUN", |s| {
                let package = s.package();
                let len = u32::try_from(package.len()).expect("short");
                s.begin().command(&Command::Packaged { len });
                s.words.extend_from_slice(cut(&package, 5));
            }),
            ("in a page", |s| {
                s.guest().part().page(RAM, 1);
                let half = s.words.len() - 2000;
                s.words.truncate(half);
            }),
            ("after RUN", |s| {
                s.guest();
            }),
        ];
        for (name, says) in moments {
            let what = format!("preempt {preempt}: silent {name}");
            {
                let (destination, address) = waiting(preempt);
                let mut source = FarSource::connect(&address, &config());
                says(&mut source);
                source.send();
                let runs = matches!(name, "in a page" | "after RUN");
                let reached = if runs {
                    MigrationStatus::PostcopyActive
                } else {
                    MigrationStatus::PostcopyDevice
                };
                until(&what, || destination.status() == Some(reached));
                end_soon(&destination, &what);
                let left =
                    if runs { MigrationStatus::PostcopyPaused } else { MigrationStatus::Cancelled };
                assert_eq!(destination.status(), Some(left), "{what}");
                assert_eq!(destination.runs(), runs, "{what}");
                if runs {
                    alone.keeps_one();
                }
            }
            alone.expect_nothing_left(&what);
        }
    }
}

/// A VMM whose devices look into guest memory when they are loaded, as virtio's do.
#[derive(Debug)]
struct Looking(std::sync::Arc<whimbrel_vm::ReferenceVm>);

impl Vm for Looking {
    fn machine(&self) -> String {
        self.0.machine()
    }
    fn ram(&self) -> &whimbrel_ram::GuestRam {
        self.0.ram()
    }
    fn dirty_log(&self) -> &dyn whimbrel_ram::dirty::DirtyLog {
        self.0.dirty_log()
    }
    fn pause(&self) -> Result<(), whimbrel::VmError> {
        self.0.pause()
    }
    fn resume(&self) -> Result<(), whimbrel::VmError> {
        self.0.resume()
    }
    fn save(&self) -> Result<Vec<whimbrel::DeviceState>, whimbrel::VmError> {
        self.0.save()
    }
    fn load(&self, devices: Vec<whimbrel::DeviceState>) -> Result<(), whimbrel::VmError> {
        let (_, block) = self.0.ram().find(RAM).expect("a block");
        let _ring = block.load_u64(LOOKED_AT * 4096).expect("inside");
        self.0.load(devices)
    }
}

/// The page that [`Looking`] looks at.
const LOOKED_AT: u64 = 100;

/// The devices look at a page that does not come, because the source ends or does nothing.
#[test]
fn devices_that_wait_for_a_page_do_not_hold_the_end() {
    for (run, closes) in [(false, true), (false, false), (true, true), (true, false)] {
        for preempt in [true, false] {
            let alone = Alone::begin();
            let what = format!("RUN sent {run}, the source closes {closes}, preempt {preempt}");
            {
                let vm = whimbrel_vm::ReferenceVm::new(Config { incoming: true, ..config() });
                let vm = vm.expect("a VM");
                let looking = std::sync::Arc::new(Looking(vm.clone()));
                let start = whimbrel::Start::Incoming { autostart: true };
                let migrator = whimbrel::Migrator::new(looking, start);
                let destination = Side { vm, migrator };
                destination.switch_on(&[Capability::PostcopyRam]);
                if preempt {
                    destination.switch_on(&[Capability::PostcopyPreempt]);
                }
                let address = destination.listen("tcp:127.0.0.1:0");
                let mut source = FarSource::connect(&address, &config());
                let package = source.package();
                let len = u32::try_from(package.len()).expect("short");
                source.begin().command(&Command::Packaged { len });
                source.words.extend_from_slice(cut(&package, if run { 0 } else { 5 }));
                source.send();
                let start = BlockOffset(LOOKED_AT * 4096);
                let asked = ReturnMessage::RequestPagesOf { block: name(RAM), start, len: 4096 };
                assert!(source.hears(&asked), "{what}: it is asked for");
                if closes {
                    source.main.shutdown(Shutdown::Both).expect("open");
                    if !run {
                        expect_failed(&destination, &["main channel"], &what);
                    }
                }
                end_soon(&destination, &what);
                assert!(!destination.runs(), "{what}: it runs with zeros for memory");
                assert!(!destination.status().is_some_and(MigrationStatus::is_running), "{what}");
            }
            alone.expect_nothing_left(&what);
        }
    }
}

/// And where it comes they go on.
#[test]
fn devices_that_wait_for_a_page_get_it() {
    for preempt in [true, false] {
        let alone = Alone::begin();
        let what = format!("preempt {preempt}");
        {
            let source =
                Side::running(&Config { workload: "sequential".parse().expect("one"), ..config() });
            let vm = whimbrel_vm::ReferenceVm::new(Config { incoming: true, ..config() });
            let vm = vm.expect("a VM");
            let looking = std::sync::Arc::new(Looking(vm.clone()));
            let start = whimbrel::Start::Incoming { autostart: true };
            let migrator = whimbrel::Migrator::new(looking, start);
            let destination = Side { vm, migrator };
            for side in [&source, &destination] {
                side.switch_on(&[Capability::PostcopyRam]);
                if preempt {
                    side.switch_on(&[Capability::PostcopyPreempt]);
                }
            }
            let slow = |p: &mut whimbrel::Parameters| p.max_postcopy_bandwidth = 4 << 20;
            source.migrator.update_parameters(slow).expect("allowed");
            let address = destination.listen("tcp:127.0.0.1:0");
            source.migrator.migrate(address).expect("it starts");
            source.migrator.start_postcopy().expect("allowed");
            let info = source.ended(&what);
            assert_eq!(info.status, Some(MigrationStatus::Completed), "{:?}", info.error_desc);
            assert_eq!(destination.ended(&what).status, Some(MigrationStatus::Completed));
            destination.expect_healthy(&what);
        }
        alone.expect_nothing_left(&what);
    }
}
