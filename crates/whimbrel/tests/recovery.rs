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

fn expect_completed(source: &Side, destination: &Side, what: &str) {
    for side in [source, destination] {
        let info = side.ended(what);
        assert_eq!(info.status, Some(MigrationStatus::Completed), "{what}: {:?}", info.error_desc);
    }
    assert!(!source.runs(), "{what}");
    destination.expect_healthy(what);
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
        let fast = |p: &mut Parameters| p.max_postcopy_bandwidth = 0;
        source.migrator.update_parameters(fast).expect("allowed");
        expect_completed(&source, &destination, &what);
        drop((source, destination, relay));
        alone.expect_nothing_left(&what);
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
        let fast = |p: &mut Parameters| p.max_postcopy_bandwidth = 0;
        source.migrator.update_parameters(fast).expect("allowed");
        expect_completed(&source, &destination, &what);
        drop((source, destination, relay));
        alone.expect_nothing_left(&what);
    }
}
