//! A migration is yanked while it hangs: whatever waits is free at once. Before the guest has
//! changed hands the migration fails and the guest is where it was; in postcopy it pauses.

#[path = "support/far_source.rs"]
mod far_source;
#[path = "support/pki.rs"]
mod pki;
#[path = "support/vms.rs"]
mod vms;

use std::net::{TcpListener, TcpStream};
use std::os::unix::net::UnixListener;
use std::time::{Duration, Instant};

use far_source::FarSource;
use pki::{Authority, Who};
use rustix::net::{AddressFamily, SocketAddrAny, SocketType};
use vms::{Alone, Side, expect_movable, until};
use whimbrel::{
    Address, AutoRecover, Capability, MigrationStatus, RunState, TlsCredentials, TlsEndpoint,
};
use whimbrel_vm::{AccelChoice, Config, Fill};

/// What "at once" is, on a machine that is busy with other tests.
const AT_ONCE: Duration = Duration::from_secs(20);

fn config() -> Config {
    let workload = "uniform,rate=5000,working-set=2M".parse().expect("a workload");
    Config { accel: AccelChoice::Native, workload, fill: Fill::Random, ..Config::new(8 << 20) }
}

/// Yanks it; gives how it ended, which is soon.
fn yank(side: &Side, what: &str) -> (MigrationStatus, String) {
    let began = Instant::now();
    side.migrator.yank().expect("a migration is under way");
    assert!(began.elapsed() < AT_ONCE, "{what}: yanking took {:?}", began.elapsed());
    until(&format!("{what}: it ends"), || {
        side.status().is_none_or(|s| !s.is_running() || s == MigrationStatus::PostcopyPaused)
    });
    assert!(began.elapsed() < AT_ONCE, "{what}: took {:?}", began.elapsed());
    let info = side.migrator.info();
    let error = info.error_desc.unwrap_or_default();
    assert!(!error.contains('\n'), "{what}: {error}");
    (info.status.expect("it was under way"), error)
}

/// The source hangs on its way to `address`, is yanked, and goes on as if nothing had been.
fn expect_source_freed(
    address: &Address,
    capabilities: &[Capability],
    hangs: MigrationStatus,
    what: &str,
) {
    let source = Side::running(&config());
    source.switch_on(capabilities);
    source.migrator.yank().expect_err("there is nothing to be yanked");
    source.migrator.update_parameters(|p| p.max_bandwidth = 0).expect("allowed");
    source.migrator.migrate(address.clone()).expect("it starts");
    until(&format!("{what}: hangs"), || source.status() == Some(hangs));
    // What is sent fills the buffers first.
    std::thread::sleep(Duration::from_millis(50));
    assert_eq!(source.status(), Some(hangs), "{what}: nobody takes anything in");
    let (status, error) = yank(&source, what);
    assert_eq!(status, MigrationStatus::Failed, "{what}: {error}");
    assert!(error.contains("shut down on request (yank)"), "{what}: {error}");
    source.migrator.yank().expect_err("it is over");
    source.expect_healthy(what);
    let off: Vec<_> = capabilities.iter().map(|&one| (one, false)).collect();
    source.migrator.set_capabilities(&off).expect("no migration runs");
    expect_movable(&source, &config(), what);
}

#[test]
fn a_source_that_nobody_reads_from_is_free_at_once() {
    let alone = Alone::begin();
    {
        let there = TcpListener::bind("127.0.0.1:0").expect("a port");
        let port = there.local_addr().expect("its address").port();
        let address = Address::Tcp { host: "127.0.0.1".into(), port };
        expect_source_freed(&address, &[], MigrationStatus::Active, "tcp");
        let multifd = [Capability::Multifd];
        expect_source_freed(&address, &multifd, MigrationStatus::Active, "multifd");

        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("there");
        let _there = UnixListener::bind(&path).expect("a socket");
        expect_source_freed(&Address::Unix(path), &[], MigrationStatus::Active, "unix");

        // No socket at all: a pipe that nobody reads.
        let sleeper = "exec:sleep 3600".parse().expect("an address");
        expect_source_freed(&sleeper, &[], MigrationStatus::Active, "exec");
    }
    alone.expect_nothing_left("yanked sources");
}

#[test]
fn a_source_that_is_not_even_accepted_is_free_at_once() {
    let alone = Alone::begin();
    {
        let there = rustix::net::socket(AddressFamily::INET, SocketType::STREAM, None);
        let there = there.expect("a socket");
        let any: std::net::SocketAddr = "127.0.0.1:0".parse().expect("an address");
        rustix::net::bind(&there, &any).expect("a free port");
        rustix::net::listen(&there, 0).expect("listens");
        let address = rustix::net::getsockname(&there).expect("bound");
        let address: std::net::SocketAddr =
            SocketAddrAny::try_into(address).expect("an internet address");
        // Its queue is full with one; the next waits to be heard.
        let _queued = TcpStream::connect(address).expect("there is room for one");
        let port = address.port();
        let there = Address::Tcp { host: "127.0.0.1".into(), port };
        expect_source_freed(&there, &[], MigrationStatus::Setup, "connecting");
    }
    alone.expect_nothing_left("a yanked connect");
}

#[test]
fn a_destination_that_hears_no_more_is_free_at_once() {
    /// What is sent before the source falls silent, and how the destination stands then.
    type Silence = (&'static str, fn(&mut FarSource), MigrationStatus);
    let silences: [Silence; 3] = [
        ("half a header", |s| s.words.extend(b"QEV"), MigrationStatus::Active),
        ("half a page", |s| half_a_page(s), MigrationStatus::Active),
        ("half a device", |s| half_a_device(s), MigrationStatus::Active),
    ];
    for (name, silence, stands) in silences {
        let alone = Alone::begin();
        {
            let destination = Side::waiting(&config(), true);
            let mut source = FarSource::connect(&destination.listen("tcp:127.0.0.1:0"), &config());
            silence(&mut source);
            source.send();
            until(&format!("{name}: it hears"), || destination.status() == Some(stands));
            std::thread::sleep(Duration::from_millis(20));
            let (status, error) = yank(&destination, name);
            assert_eq!(status, MigrationStatus::Failed, "{name}: {error}");
            assert!(error.contains("main channel, byte"), "{name}: {error}");
            assert!(error.contains("shut down on request (yank)"), "{name}: {error}");
            assert_eq!(destination.migrator.run_state(), RunState::Inmigrate, "{name}");
        }
        alone.expect_nothing_left(name);
    }
}

fn half_a_page(source: &mut FarSource) {
    source.begin().part().page("vm.ram", 0).page("vm.ram", 1);
    let cut = source.words.len() - 1000;
    source.words.truncate(cut);
}

fn half_a_device(source: &mut FarSource) {
    source.begin().all_pages(&[]).end_of_ram();
    let devices = source.sections();
    devices.iter().for_each(|device| device.encode(&mut source.words));
    let cut = source.words.len() - 7;
    source.words.truncate(cut);
}

#[test]
fn a_destination_that_nobody_comes_to_is_free_at_once() {
    let alone = Alone::begin();
    {
        let folder = tempfile::tempdir().expect("a folder");
        let path = format!("unix:{}", folder.path().join("here").display());
        for address in ["tcp:127.0.0.1:0", &path] {
            let destination = Side::waiting(&config(), true);
            destination.listen(address);
            let (status, error) = yank(&destination, address);
            assert_eq!(status, MigrationStatus::Failed, "{address}: {error}");
            assert!(error.contains("shut down on request (yank)"), "{address}: {error}");
        }
        // Or somebody does, and says nothing.
        let destination = Side::waiting(&config(), true);
        let _silent = FarSource::connect(&destination.listen("tcp:127.0.0.1:0"), &config());
        std::thread::sleep(Duration::from_millis(20));
        let (status, error) = yank(&destination, "silent");
        assert_eq!(status, MigrationStatus::Failed, "silent: {error}");
        assert!(error.contains("shut down on request (yank)"), "silent: {error}");
    }
    alone.expect_nothing_left("yanked listeners");
}

#[test]
fn a_destination_whose_other_channels_do_not_come_is_free_at_once() {
    let alone = Alone::begin();
    {
        let destination = Side::waiting(&config(), true);
        destination.switch_on(&[Capability::Multifd]);
        let mut source = FarSource::connect(&destination.listen("tcp:127.0.0.1:0"), &config());
        source.begin().send();
        std::thread::sleep(Duration::from_millis(20));
        let (status, error) = yank(&destination, "multifd");
        assert_eq!(status, MigrationStatus::Failed, "{error}");
        assert!(error.contains("shut down on request (yank)"), "{error}");
    }
    alone.expect_nothing_left("a yanked destination that waits for channels");
}

/// Has its channels be secret.
fn secure(side: &Side, credentials: &pki::Folder, endpoint: TlsEndpoint) {
    let credentials = TlsCredentials::load(credentials.path(), endpoint).expect("they are good");
    side.migrator.add_object("tls0", credentials).expect("the first");
    side.migrator.update_parameters(|p| p.tls_creds = "tls0".into()).expect("allowed");
}

#[test]
fn secret_channels_are_free_at_once_in_their_handshake_and_behind_it() {
    let credentials = Authority::new("a CA").folder(&Who::localhost());
    let alone = Alone::begin();
    {
        // A source that says nothing, and a destination that does not either.
        let destination = Side::waiting(&config(), true);
        secure(&destination, &credentials, TlsEndpoint::Server);
        let _silent = FarSource::connect(&destination.listen("tcp:127.0.0.1:0"), &config());
        std::thread::sleep(Duration::from_millis(20));
        let (status, error) = yank(&destination, "a handshake, destination");
        assert_eq!(status, MigrationStatus::Failed, "{error}");
        assert!(error.contains("shut down on request (yank)"), "{error}");
        let source = Side::running(&config());
        secure(&source, &credentials, TlsEndpoint::Client);
        let silent = TcpListener::bind("127.0.0.1:0").expect("a port");
        let port = silent.local_addr().expect("its address").port();
        let address = Address::Tcp { host: "127.0.0.1".into(), port };
        source.migrator.migrate(address).expect("it starts");
        std::thread::sleep(Duration::from_millis(20));
        let (status, error) = yank(&source, "a handshake, source");
        assert_eq!(status, MigrationStatus::Failed, "{error}");
        assert!(error.contains("shut down on request (yank)"), "{error}");
        source.expect_healthy("a handshake");

        // Both, in the middle of it.
        let destination = Side::waiting(&config(), true);
        secure(&destination, &credentials, TlsEndpoint::Server);
        source.migrator.update_parameters(|p| p.max_bandwidth = 1).expect("allowed");
        source.migrator.migrate(destination.listen("tcp:127.0.0.1:0")).expect("it starts");
        until("both are at it", || {
            [&source, &destination].map(Side::status) == [Some(MigrationStatus::Active); 2]
        });
        let (status, error) = yank(&source, "behind the handshake");
        assert_eq!(status, MigrationStatus::Failed, "{error}");
        assert!(error.contains("shut down on request (yank)"), "{error}");
        let info = destination.ended("its source is gone");
        assert_eq!(info.status, Some(MigrationStatus::Failed), "{info:?}");
        source.expect_healthy("behind the handshake");
    }
    alone.expect_nothing_left("yanked secrets");
}

#[test]
fn a_source_that_keeps_a_pace_is_free_at_once() {
    for capabilities in [&[][..], &[Capability::Multifd]] {
        let alone = Alone::begin();
        {
            let what = format!("paced, {capabilities:?}");
            let (source, destination) = (Side::running(&config()), Side::waiting(&config(), true));
            source.switch_on(capabilities);
            destination.switch_on(capabilities);
            // Hours for what is sent first.
            source.migrator.update_parameters(|p| p.max_bandwidth = 1).expect("allowed");
            source.migrator.migrate(destination.listen("tcp:127.0.0.1:0")).expect("it starts");
            until("both are at it", || {
                [&source, &destination].map(Side::status) == [Some(MigrationStatus::Active); 2]
            });
            std::thread::sleep(Duration::from_millis(50));
            let (status, error) = yank(&source, &what);
            assert_eq!(status, MigrationStatus::Failed, "{what}: {error}");
            assert!(error.contains("shut down on request (yank)"), "{what}: {error}");
            let info = destination.ended(&what);
            assert_eq!(info.status, Some(MigrationStatus::Failed), "{what}: {info:?}");
            source.expect_healthy(&what);
        }
        alone.expect_nothing_left("a yanked pace");
    }
}

#[test]
fn in_postcopy_it_pauses_on_both_sides_as_if_the_link_had_broken() {
    for (preempt, at_source) in [(true, true), (true, false), (false, true), (false, false)] {
        let what = format!("preempt {preempt}, at the source {at_source}");
        let mut alone = Alone::begin();
        let (source, destination) = (Side::running(&config()), Side::waiting(&config(), true));
        let mut wanted = vec![Capability::PostcopyRam];
        wanted.extend(preempt.then_some(Capability::PostcopyPreempt));
        source.switch_on(&wanted);
        destination.switch_on(&wanted);
        for side in [&source, &destination] {
            let change = |p: &mut whimbrel::Parameters| {
                (p.max_postcopy_bandwidth, p.auto_recover) = (1, AutoRecover::Off);
            };
            side.migrator.update_parameters(change).expect("allowed");
        }
        source.migrator.migrate(destination.listen("tcp:127.0.0.1:0")).expect("it starts");
        source.migrator.start_postcopy().expect("allowed");
        let both_active = || {
            [&source, &destination].map(Side::status) == [Some(MigrationStatus::PostcopyActive); 2]
        };
        until(&format!("{what}: the guest goes"), both_active);
        let side = if at_source { &source } else { &destination };
        let (status, error) = yank(side, &what);
        assert_eq!(status, MigrationStatus::PostcopyPaused, "{what}: {error}");
        assert!(error.contains("shut down on request (yank)"), "{what}: {error}");
        let other = if at_source { &destination } else { &source };
        until(&format!("{what}: the other side hears of it"), || {
            other.status() == Some(MigrationStatus::PostcopyPaused)
        });
        assert_eq!(source.migrator.run_state(), RunState::Postmigrate, "{what}");
        assert!(destination.runs(), "{what}: it goes on until it touches what is missing");
        source.migrator.end();
        destination.migrator.end();
        drop(source);
        alone.keeps_a_guest(destination);
        alone.expect_nothing_left(&what);
    }
}
