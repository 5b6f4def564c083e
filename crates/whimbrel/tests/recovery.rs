//! A postcopy whose link breaks goes on: by itself between whimbrels, or told to.

#[path = "support/relay.rs"]
mod relay;
#[path = "support/vms.rs"]
mod vms;

use std::thread::sleep;
use std::time::Duration;

use relay::Relay;
use vms::{Alone, Side};
use whimbrel::{Address, AutoRecover, Capability, MigrationStatus, Parameters};
use whimbrel_vm::{AccelChoice, Config, Fill};

const MEMORY: u64 = 16 << 20;

/// How the two sides are set.
#[derive(Clone, Copy, Debug)]
struct Set {
    preempt: bool,
    /// Multifd channels; 0 is without.
    channels: u8,
    auto_recover: AutoRecover,
}

fn pair(set: Set) -> (Side, Side) {
    let workload = "uniform,rate=8000,working-set=4M,seed=7".parse().expect("a workload");
    let config =
        Config { accel: AccelChoice::Native, workload, fill: Fill::Random, ..Config::new(MEMORY) };
    let (source, destination) = (Side::running(&config), Side::waiting(&config, true));
    let change = |p: &mut Parameters| {
        p.auto_recover = set.auto_recover;
        p.silence_limit = 2000;
        (p.max_postcopy_bandwidth, p.max_bandwidth, p.downtime_limit) = (8 << 20, 48 << 20, 0);
        p.multifd_channels = set.channels.max(1);
    };
    for side in [&source, &destination] {
        side.switch_on(&[Capability::PostcopyRam]);
        if set.preempt {
            side.switch_on(&[Capability::PostcopyPreempt]);
        }
        if set.channels > 0 {
            side.switch_on(&[Capability::Multifd]);
        }
        side.migrator.update_parameters(change).expect("allowed");
    }
    (source, destination)
}

/// The guest has gone, and a part of its memory is still here.
fn begin(source: &Side, destination: &Side) -> Relay {
    let relay = Relay::to(&destination.listen("tcp:127.0.0.1:0"));
    source.migrator.migrate(relay.address.clone()).expect("it starts");
    source.migrator.start_postcopy().expect("allowed");
    wait_for(source, MigrationStatus::PostcopyActive);
    wait_for(destination, MigrationStatus::PostcopyActive);
    relay
}

fn wait_for(side: &Side, status: MigrationStatus) {
    let start = std::time::Instant::now();
    while side.status() != Some(status) {
        let info = side.migrator.info();
        let (now, why) = (info.status, info.error_desc);
        assert!(start.elapsed() < vms::LIMIT, "{status}: it is {now:?}, {why:?}");
        sleep(Duration::from_millis(1));
    }
}

/// The guest goes on, and what it touches comes.
fn expect_active(source: &Side, destination: &Side) {
    wait_for(source, MigrationStatus::PostcopyActive);
    wait_for(destination, MigrationStatus::PostcopyActive);
    let before = destination.vm.self_check().updates;
    let start = std::time::Instant::now();
    while destination.vm.self_check().updates <= before + 200 {
        let infos = || (source.migrator.info(), destination.migrator.info());
        assert!(start.elapsed() < vms::LIMIT, "the guest stands still: {:#?}", infos());
        sleep(Duration::from_millis(1));
    }
}

fn listen_anew(destination: &Side) -> Address {
    let anywhere = "tcp:127.0.0.1:0".parse().expect("an address");
    destination.migrator.recover(&anywhere).expect("it is paused");
    destination.address()
}

/// Nothing holds it back any more, and it comes to its end.
fn expect_completed(source: &Side, destination: &Side, what: &str) {
    let fast = |p: &mut Parameters| p.max_postcopy_bandwidth = 0;
    source.migrator.update_parameters(fast).expect("allowed");
    for side in [source, destination] {
        let info = side.ended(what);
        assert_eq!(info.status, Some(MigrationStatus::Completed), "{what}: {:?}", info.error_desc);
    }
    assert!(!source.runs(), "{what}");
    destination.expect_healthy(what);
}

/// Completed, and nothing is left behind.
fn expect_a_good_end((source, destination): (Side, Side), relay: Relay, alone: &Alone, what: &str) {
    expect_completed(&source, &destination, what);
    drop((source, destination, relay));
    alone.expect_nothing_left(what);
}

fn all() -> impl Iterator<Item = Set> {
    let auto_recover = AutoRecover::Auto;
    [(false, 0), (true, 0), (true, 3), (false, 2)].into_iter().map(move |(preempt, channels)| Set {
        preempt,
        channels,
        auto_recover,
    })
}

#[test]
fn paused_on_request_it_goes_on_when_told_to_elsewhere() {
    let alone = Alone::begin();
    for set in all() {
        let what = format!("{set:?}");
        let (source, destination) = pair(set);
        let relay = begin(&source, &destination);
        for paused in [&source, &destination] {
            paused.migrator.pause().expect("it is in postcopy");
            wait_for(&source, MigrationStatus::PostcopyPaused);
            wait_for(&destination, MigrationStatus::PostcopyPaused);
            sleep(Duration::from_millis(50));
            let address = listen_anew(&destination);
            source.migrator.resume(address).expect("it is paused");
            expect_active(&source, &destination);
        }
        expect_a_good_end((source, destination), relay, &alone, &what);
    }
}

#[test]
fn broken_again_and_again_it_goes_on_by_itself() {
    let alone = Alone::begin();
    for set in all() {
        let what = format!("{set:?}");
        let (source, destination) = pair(set);
        let relay = begin(&source, &destination);
        for turn in 0..10u32 {
            relay.close(turn % 3 == 0);
            relay.cut();
            sleep(Duration::from_millis(5) * turn);
            if turn % 3 == 0 {
                // Nobody gets through for a while, in the middle of the attempts.
                wait_for(&source, MigrationStatus::PostcopyPaused);
                wait_for(&destination, MigrationStatus::PostcopyPaused);
                relay.close(false);
            }
            expect_active(&source, &destination);
        }
        expect_a_good_end((source, destination), relay, &alone, &what);
    }
}

/// Everything is at the destination, and the source does not know.
#[test]
fn a_last_word_that_was_lost_is_said_again() {
    let alone = Alone::begin();
    for set in all() {
        let what = format!("{set:?}");
        let (source, destination) = pair(set);
        let relay = begin(&source, &destination);
        relay.lose_last_word();
        expect_completed(&source, &destination, &what);
        assert!(!relay.has_to_lose(), "{what}: it was lost");
        drop((source, destination, relay));
        alone.expect_nothing_left(&what);
    }
}

/// Somebody else comes in the place of the source, or as it, and gets nothing.
#[test]
fn strangers_get_nothing_and_leave_the_paused_migration_as_it_is() {
    use std::io::{Read, Write};
    let alone = Alone::begin();
    let set = Set { preempt: true, channels: 0, auto_recover: AutoRecover::Auto };
    let (source, destination) = pair(set);
    let relay = begin(&source, &destination);
    relay.close(true);
    relay.cut();
    wait_for(&destination, MigrationStatus::PostcopyPaused);
    let Address::Tcp { host, port } = destination.address() else { panic!("tcp:") };
    let recv_bitmap = [8, 0, 10, 0, 3, 2, b'v', b'm'];
    let mut forged = Vec::new();
    let hello = whimbrel_wire::recovery::Hello {
        kind: whimbrel_wire::recovery::HelloKind::Main,
        id: [7; 16],
        attempt: 1,
        nonce: [1; 16],
        proof: [2; 32],
    };
    hello.encode(&mut forged);
    for words in [&recv_bitmap[..], b"QEVM", b"GET / HTTP/1.1\r\n\r\n", &forged, &[0; 64]] {
        let mut stranger = std::net::TcpStream::connect((&*host, port)).expect("it listens");
        stranger.write_all(words).expect("it takes it");
        stranger.set_read_timeout(Some(vms::LIMIT)).expect("an option");
        let mut answer = [0; 1];
        let said = stranger.read(&mut answer);
        assert!(!matches!(said, Ok(1..)), "{words:02x?} is answered");
        assert_eq!(destination.status(), Some(MigrationStatus::PostcopyPaused));
        destination.expect_reason(&["only its own source may come back"], "a stranger");
    }
    relay.close(false);
    expect_a_good_end((source, destination), relay, &alone, "after strangers");
}

/// What has no meaning is refused in one line, and changes nothing.
#[test]
fn what_is_not_paused_cannot_be_told_to_go_on() {
    let alone = Alone::begin();
    let set = Set { preempt: true, channels: 0, auto_recover: AutoRecover::Off };
    let (source, destination) = pair(set);
    let nowhere: Address = "tcp:127.0.0.1:1".parse().expect("an address");
    let refused = |side: &Side| {
        let resume = side.migrator.resume(nowhere.clone()).expect_err("nothing is paused");
        assert!(resume.to_string().contains("no paused migration"), "{resume}");
        let recover = side.migrator.recover(&nowhere).expect_err("nothing is paused");
        assert!(recover.to_string().contains("when postcopy is paused"), "{recover}");
        assert!(!format!("{resume}{recover}").contains('\n'));
    };
    refused(&source);
    refused(&destination);
    let relay = begin(&source, &destination);
    refused(&source);
    refused(&destination);
    relay.cut();
    wait_for(&source, MigrationStatus::PostcopyPaused);
    wait_for(&destination, MigrationStatus::PostcopyPaused);
    source.migrator.recover(&nowhere).expect_err("it is the source");
    destination.migrator.resume(nowhere.clone()).expect_err("it is the destination");
    // Nobody is there: it says so, and can be told again.
    source.migrator.resume(nowhere.clone()).expect("it is paused");
    let start = std::time::Instant::now();
    while !source.migrator.info().error_desc.is_some_and(|why| why.contains("nobody listens")) {
        assert!(start.elapsed() < vms::LIMIT, "{:?}", source.migrator.info().error_desc);
        sleep(Duration::from_millis(1));
    }
    wait_for(&source, MigrationStatus::PostcopyPaused);
    destination
        .migrator
        .recover(&"tcp:192.0.2.1:1".parse().expect("an address"))
        .expect_err("not ours");
    let address = listen_anew(&destination);
    source.migrator.resume(address).expect("it is paused");
    expect_a_good_end((source, destination), relay, &alone, "told again");
}
