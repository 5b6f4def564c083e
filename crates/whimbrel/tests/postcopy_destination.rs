//! A source in postcopy, and a destination that asks for what is not there, floods it, or goes:
//! before the guest has gone it stays, and after that the source pauses, with a reason, and keeps
//! what it has.

#[path = "support/far_destination.rs"]
mod far_destination;
#[path = "support/vms.rs"]
mod vms;

use std::io::Write;
use std::net::{Shutdown, TcpStream};
use std::thread;

use far_destination::{AGREED, Came, FarDestination, Main, RUN_APART, drain_urgent};
use vms::{Alone, Dice, Side, seed, until};
use whimbrel::{Capability, MigrationStatus, RunState};
use whimbrel_vm::{AccelChoice, Config, Fill};
use whimbrel_wire::{Decoded, Name, ReturnMessage};

const RAM: &str = "vm.ram";
const MEMORY: u64 = 8 << 20;

fn config() -> Config {
    let workload = "uniform,rate=5000,working-set=2M".parse().expect("a workload");
    Config { accel: AccelChoice::Native, workload, fill: Fill::Random, ..Config::new(MEMORY) }
}

/// A source whose guest runs, on its way to `there`.
fn source_to(there: &FarDestination, preempt: bool) -> Side {
    let source = Side::running(&config());
    let wanted = preempt.then_some(Capability::PostcopyPreempt);
    let all: Vec<Capability> = [Capability::PostcopyRam].into_iter().chain(wanted).collect();
    source.switch_on(&all);
    // What is not asked for does not come, so that it can be asked for.
    source.migrator.update_parameters(|p| p.max_postcopy_bandwidth = 1).expect("allowed");
    source.migrator.migrate(there.address.clone()).expect("it starts");
    source.migrator.start_postcopy().expect("allowed");
    source
}

/// The guest has gone.
struct Gone {
    source: Side,
    main: Main,
    urgent: Option<TcpStream>,
    digests: Vec<u64>,
}

fn digests(source: &Side) -> Vec<u64> {
    let ram = source.migrator.vm().ram();
    ram.blocks().flat_map(|(_, block)| block.page_digests()).collect()
}

fn take_guest(preempt: bool, agreed: Option<u32>) -> Gone {
    let there = FarDestination::listen();
    let source = source_to(&there, preempt);
    let mut main = there.main(agreed);
    main.guest();
    let urgent = preempt.then(|| there.accept());
    until("the source knows that it has gone", || {
        source.status() == Some(MigrationStatus::PostcopyActive)
    });
    let digests = digests(&source);
    Gone { source, main, urgent, digests }
}

impl Gone {
    /// The source pauses and says why in one line; the guest stays where it went.
    fn expect_paused(&self, what: &str) -> String {
        let source = &self.source;
        until(&format!("{what}: it pauses"), || {
            source.status() == Some(MigrationStatus::PostcopyPaused)
        });
        let error = source.migrator.info().error_desc.expect("says why");
        assert!(!error.contains('\n'), "{what}: {error}");
        assert_eq!(source.migrator.run_state(), RunState::Postmigrate, "{what}");
        assert!(!source.runs(), "{what}");
        source.migrator.cont().expect_err("the guest runs elsewhere");
        source.migrator.cancel().expect_err("neither side has all of it");
        source.migrator.stop().expect("there is nothing to stop");
        assert_eq!(digests(source), self.digests, "{what}: what it keeps has changed");
        source.migrator.end();
        assert_eq!(source.status(), Some(MigrationStatus::PostcopyPaused), "{what}");
        error
    }
}

/// What a destination does wrong, and a part of what the source says of it.
type Wrong = (&'static str, fn(&mut Main), &'static str);

const WRONG: [Wrong; 14] = [
    ("behind the end", |m| m.ask(Some(RAM), MEMORY, 4096), "of block vm.ram, which has 8388608"),
    ("over the end", |m| m.ask(Some(RAM), MEMORY - 4096, 8192), "which has 8388608"),
    ("far behind it", |m| m.ask(Some(RAM), !4095, 4096), "0xfffffffffffff000"),
    ("all and more", |m| m.ask(Some(RAM), 0, !4095), "which has 8388608"),
    ("no such block", |m| m.ask(Some("pc.ram"), 0, 4096), "block pc.ram, which does not exist"),
    ("no name", |m| m.ask(None, 0, 4096), "expected a block name"),
    ("no length", |m| m.ask(Some(RAM), 0, 0), "whole pages"),
    ("no pages", |m| m.ask(Some(RAM), 0, 100), "whole pages"),
    ("the largest length", |m| m.ask(Some(RAM), 0, u32::MAX), "whole pages"),
    ("between pages", |m| m.ask(Some(RAM), 8, 4096), "the start of a page"),
    (
        "a bitmap",
        |m| say(m, &ReturnMessage::RecvBitmap(Name::new(RAM).expect("a name"))),
        "return path channel",
    ),
    ("an answer", |m| say(m, &ReturnMessage::ResumeAck(1)), "has no meaning at this time"),
    ("another", |m| say(m, &ReturnMessage::SwitchoverAck), "has no meaning at this time"),
    ("garbage", |m| m.stream.write_all(&[0xff; 100]).expect("it listens"), "return path channel"),
];

fn say(main: &mut Main, message: &ReturnMessage) {
    main.say(message).expect("the source listens");
}

#[test]
fn what_makes_no_sense_pauses_it_with_a_reason() {
    for preempt in [true, false] {
        for (name, wrong, reason) in WRONG {
            let alone = Alone::begin();
            let what = format!("preempt {preempt}: {name}");
            {
                let mut gone = take_guest(preempt, None);
                wrong(&mut gone.main);
                let error = gone.expect_paused(&what);
                assert!(error.contains(reason), "{what}: {error}");
                assert!(error.contains("return path channel"), "{what}: {error}");
                assert!(error.contains("byte "), "{what}: {error}");
            }
            alone.expect_nothing_left(&what);
        }
    }
}

#[test]
fn a_destination_that_ends_too_early_pauses_it() {
    let ends: [Wrong; 5] = [
        ("SHUT 0", |m| say(m, &ReturnMessage::Shut(0)), "before it had everything"),
        ("SHUT 1", |m| say(m, &ReturnMessage::Shut(1)), "reported a failure"),
        ("half closed", |m| m.stream.shutdown(Shutdown::Write).expect("open"), "closed the conn"),
        ("closed", |m| m.stream.shutdown(Shutdown::Both).expect("open"), ""),
        ("half a message", |m| half_a_message(m), "closed the connection"),
    ];
    for preempt in [true, false] {
        for (name, end, reason) in ends {
            let alone = Alone::begin();
            let what = format!("preempt {preempt}: {name}");
            {
                let mut gone = take_guest(preempt, None);
                end(&mut gone.main);
                let error = gone.expect_paused(&what);
                assert!(error.contains(reason), "{what}: {error}");
            }
            alone.expect_nothing_left(&what);
        }
    }
}

fn half_a_message(main: &mut Main) {
    let mut bytes = Vec::new();
    ReturnMessage::Pong(7).encode(&mut bytes);
    main.stream.write_all(&bytes[..5]).expect("it listens");
    main.stream.shutdown(Shutdown::Write).expect("open");
}

/// `migrate-pause`, and the end, while nothing can be sent.
#[test]
fn a_destination_that_does_not_read_holds_nobody() {
    for preempt in [true, false] {
        for pause in [true, false] {
            let alone = Alone::begin();
            let what = format!("preempt {preempt}, migrate-pause {pause}");
            {
                let there = FarDestination::listen();
                let source = source_to(&there, preempt);
                source.migrator.update_parameters(|p| p.max_postcopy_bandwidth = 0).expect("ok");
                let mut main = there.main(None);
                main.guest();
                until("it has gone", || source.status() == Some(MigrationStatus::PostcopyActive));
                let digests = digests(&source);
                // All of it, many times over: far more than all buffers hold.
                let flood = flood(&mut main, 100_000);
                if pause {
                    source.migrator.pause().expect("in postcopy");
                } else {
                    source.migrator.end();
                }
                let gone = Gone { source, main, urgent: None, digests };
                let error = gone.expect_paused(&what);
                assert!(error.contains("broken on request"), "{what}: {error}");
                drop(gone);
                flood.join().expect("ends when the source does");
            }
            alone.expect_nothing_left(&what);
        }
    }
}

/// Asks for pages anywhere, so many times, on a thread of its own.
fn flood(main: &mut Main, requests: u32) -> thread::JoinHandle<()> {
    let mut dice = Dice(seed("flood"));
    let mut stream = main.stream.try_clone().expect("a descriptor");
    let write = move || {
        let mut bytes = Vec::new();
        let block = Name::new(RAM).expect("a name");
        let start = whimbrel_wire::BlockOffset(0);
        ReturnMessage::RequestPagesOf { block, start, len: 4096 }.encode(&mut bytes);
        for _ in 0..requests {
            let start = whimbrel_wire::BlockOffset(dice.below(MEMORY / 4096) * 4096);
            ReturnMessage::RequestPages { start, len: 4096 }.encode(&mut bytes);
        }
        // The source may have had enough of it.
        let _ = stream.write_all(&bytes);
    };
    spawn(write)
}

fn spawn<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> thread::JoinHandle<T> {
    thread::Builder::new().name("far".into()).spawn(work).expect("a thread")
}

/// Asked for 100,000 times, every page comes once, on one channel, and as it is.
#[test]
fn a_flood_of_requests_is_answered_once_for_each_page() {
    for preempt in [true, false] {
        let alone = Alone::begin();
        let what = format!("preempt {preempt}");
        {
            let Gone { source, mut main, urgent, .. } = take_guest(preempt, None);
            let flood = flood(&mut main, 100_000);
            let blocks = main.blocks();
            let urgent = urgent.map(|stream| spawn(move || drain_urgent(stream, blocks)));
            let fast = |p: &mut whimbrel::Parameters| p.max_postcopy_bandwidth = 0;
            source.migrator.update_parameters(fast).expect("a running migration follows");
            main.until("its end", |decoded| matches!(decoded, Decoded::Eof));
            flood.join().expect("all is asked");
            say(&mut main, &ReturnMessage::Shut(0));
            let info = source.ended(&what);
            assert_eq!(info.status, Some(MigrationStatus::Completed), "{:?}", info.error_desc);
            let ram = info.ram.expect("told");
            assert_eq!(ram.postcopy_requests, 100_001, "{what}");
            let urgent =
                urgent.map(|thread| thread.join().expect("well formed")).unwrap_or_default();
            assert_eq!(!urgent.0.is_empty(), preempt, "{what}");
            expect_all_once(&source, main.came, urgent, &what);
        }
        alone.expect_nothing_left(&what);
    }
}

/// Every page came once, and as it is at the source.
fn expect_all_once(source: &Side, main: Came, urgent: Came, what: &str) {
    let both: Vec<_> = main.0.keys().filter(|place| urgent.0.contains_key(*place)).collect();
    assert!(both.is_empty(), "{what}: on two channels: {both:?}");
    let came: std::collections::BTreeMap<_, _> = main.0.into_iter().chain(urgent.0).collect();
    let mut pages = 0;
    for (_, block) in source.migrator.vm().ram().blocks() {
        for page in 0..block.target_pages() {
            let place = (block.name().to_owned(), page * 4096);
            let (times, content) =
                came.get(&place).unwrap_or_else(|| panic!("{what}: {place:?} never came"));
            assert_eq!(*times, 1, "{what}: {place:?}");
            let mut here = vec![0; 4096];
            block.read(page * 4096, &mut here).expect("inside");
            assert!(here == *content, "{what}: {place:?} is something else");
            pages += 1;
        }
    }
    assert_eq!(came.len(), pages, "{what}: pages that do not exist");
}

#[test]
fn pongs_nobody_asked_for_do_no_harm() {
    let alone = Alone::begin();
    {
        let Gone { source, mut main, urgent, .. } = take_guest(true, None);
        let mut bytes = Vec::new();
        (0..100_000).for_each(|value| ReturnMessage::Pong(value).encode(&mut bytes));
        main.stream.write_all(&bytes).expect("the source reads");
        let fast = |p: &mut whimbrel::Parameters| p.max_postcopy_bandwidth = 0;
        source.migrator.update_parameters(fast).expect("a running migration follows");
        main.until("its end", |decoded| matches!(decoded, Decoded::Eof));
        say(&mut main, &ReturnMessage::Shut(0));
        assert_eq!(source.ended("its end").status, Some(MigrationStatus::Completed));
        let urgent = drain_urgent(urgent.expect("there is one"), main.blocks());
        expect_all_once(&source, main.came, urgent, "after the PONGs");
    }
    alone.expect_nothing_left("PONGs");
}

/// Before RUN has gone out, nothing that a destination does costs the guest.
#[test]
fn before_the_guest_has_gone_it_stays() {
    let early: [Wrong; 6] = [
        ("a request", |m| m.ask(Some(RAM), 0, 4096), ""),
        (
            "garbage",
            |m| m.stream.write_all(&[0xff; 100]).expect("it listens"),
            "return path channel",
        ),
        ("SHUT 1", |m| say(m, &ReturnMessage::Shut(1)), "reported a failure"),
        ("SHUT 0", |m| say(m, &ReturnMessage::Shut(0)), "the destination"),
        ("closed", |m| m.stream.shutdown(Shutdown::Both).expect("open"), ""),
        ("half closed", |m| m.stream.shutdown(Shutdown::Write).expect("open"), "closed the conn"),
    ];
    for (name, act, reason) in early {
        // In the setup, or instead of saying that the package is loaded.
        for late in [false, true] {
            let alone = Alone::begin();
            let what = format!("{name}, late {late}");
            {
                let there = FarDestination::listen();
                let source = source_to(&there, true);
                let mut main = there.main(Some(AGREED | RUN_APART));
                if late {
                    main.package_without_run();
                }
                act(&mut main);
                if late && name == "a request" {
                    // Loading the devices touches pages: those are served, and nothing is lost.
                    for ping in [3, 0x42] {
                        say(&mut main, &ReturnMessage::Pong(ping));
                    }
                    main.run();
                    let gone = Gone { digests: digests(&source), urgent: None, source, main };
                    gone.source.migrator.end();
                    gone.expect_paused(&what);
                } else {
                    let info = source.ended(&what);
                    assert_eq!(info.status, Some(MigrationStatus::Failed), "{what}");
                    source.expect_reason(&[reason], &what);
                    source.expect_healthy(&what);
                }
            }
            alone.expect_nothing_left(&what);
        }
    }
}

/// What a destination said while the guest was stopped is heard before the guest is given away,
/// also where nothing is waited for.
#[test]
fn a_failure_told_in_time_keeps_the_guest() {
    let alone = Alone::begin();
    {
        let there = FarDestination::listen();
        let source = Side::running(&config());
        source.switch_on(&[Capability::PostcopyRam, Capability::PauseBeforeSwitchover]);
        source.migrator.migrate(there.address.clone()).expect("it starts");
        source.migrator.start_postcopy().expect("allowed");
        let mut main = there.main(None);
        let reading = spawn(move || {
            main.until("the first pages or discards", |decoded| {
                matches!(decoded, Decoded::Footer(_))
            });
            main
        });
        let waits = || source.status() == Some(MigrationStatus::PreSwitchover);
        until("pre-switchover", waits);
        let mut main = reading.join().expect("well formed");
        say(&mut main, &ReturnMessage::Shut(1));
        // On this machine's own connection it has arrived when it is written.
        source.migrator.proceed(MigrationStatus::PreSwitchover).expect("it waits");
        let info = source.ended("the failure is heard");
        assert_eq!(info.status, Some(MigrationStatus::Failed));
        assert!(info.error_desc.expect("says why").contains("reported a failure"));
        source.expect_healthy("the guest that stayed");
    }
    alone.expect_nothing_left("a failure told in time");
}

/// Between its last byte and the destination's last word the source does not know who has the
/// guest. As long as it waits to be told, nobody runs it here.
#[test]
fn cont_is_refused_while_the_guest_is_handed_over() {
    let alone = Alone::begin();
    {
        let there = FarDestination::listen();
        let source = Side::running(&config());
        source.switch_on(&[Capability::ReturnPath]);
        source.migrator.migrate(there.address.clone()).expect("it starts");
        let mut main = there.main(None);
        main.until("its end", |decoded| matches!(decoded, Decoded::Eof));
        assert!(source.status().is_some_and(MigrationStatus::is_running));
        let refused = source.migrator.cont().expect_err("it may run there by now").to_string();
        assert!(refused.contains("handed over"), "{refused}");
        assert!(!source.runs());
        // Nobody will ever know: now a human decides.
        drop(main);
        assert_eq!(source.ended("its end").status, Some(MigrationStatus::Failed));
        source.migrator.cont().expect("'cont' resolves the doubt");
        source.expect_healthy("after 'cont'");
    }
    alone.expect_nothing_left("handing over");
}
