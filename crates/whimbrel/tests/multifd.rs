//! Pages on several channels between two VMs, in precopy and behind a guest that has gone first:
//! the guest runs on exactly one side, its memory arrives identical, and nothing is left behind.

#[path = "support/vms.rs"]
mod vms;

use std::path::Path;
use std::time::Instant;

use vms::{Alone, Side, accelerators, expect_same_ram, until};
use whimbrel::{
    Capability, MigrationInfo, MigrationStatus, MultifdCompression, RunState, ZeroPageDetection,
};
use whimbrel_ram::TargetPage;
use whimbrel_vm::{AccelChoice, Config, Fill};

const MEMORY: u64 = 12 << 20;

/// When the guest goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum When {
    /// Behind its RAM, and it is not run at once, so that all of it can be compared.
    Last,
    /// Before anything of its RAM has gone.
    AtOnce,
    /// When half of its RAM has been sent.
    Halfway,
    /// When all of its RAM has been sent once, and part of it again.
    AfterAPass,
}

#[derive(Clone, Copy, Debug)]
struct Case {
    channels: u8,
    compression: MultifdCompression,
    zeros: ZeroPageDetection,
    when: When,
    preempt: bool,
    return_path: bool,
    unix: bool,
    accel: AccelChoice,
    vcpus: u32,
    /// What the guest does not write is random; otherwise it is zero.
    random: bool,
}

const CASE: Case = Case {
    channels: 2,
    compression: MultifdCompression::None,
    zeros: ZeroPageDetection::Multifd,
    when: When::Last,
    preempt: false,
    return_path: true,
    unix: false,
    accel: AccelChoice::Native,
    vcpus: 1,
    random: true,
};

fn config(case: &Case) -> Config {
    let workload = "uniform,rate=8000,working-set=4M".parse().expect("a workload");
    let fill = if case.random { Fill::Random } else { Fill::Zero };
    let vcpus = case.vcpus;
    Config { accel: case.accel, vcpus, workload, fill, ..Config::new(MEMORY) }
}

fn set(case: &Case, side: &Side) {
    let postcopy = case.when != When::Last;
    let all = [
        (Capability::Multifd, true),
        (Capability::ReturnPath, case.return_path),
        (Capability::PostcopyRam, postcopy),
        (Capability::PostcopyPreempt, case.preempt),
    ];
    side.migrator.set_capabilities(&all).expect("no migration runs");
    let change = |p: &mut whimbrel::Parameters| {
        p.multifd_channels = case.channels;
        p.multifd_compression = case.compression;
        p.zero_page_detection = case.zeros;
        // In postcopy the guest writes faster than it is sent: precopy alone does not come to an end.
        (p.downtime_limit, p.max_bandwidth) = if postcopy { (0, 24 << 20) } else { (300, 0) };
        p.max_postcopy_bandwidth = if postcopy { 48 << 20 } else { 0 };
    };
    side.migrator.update_parameters(change).expect("allowed");
}

/// Moves the guest, up to both sides' end.
fn move_on(case: &Case, source: &Side, destination: &Side, folder: &Path, what: &str) {
    set(case, source);
    set(case, destination);
    let address = match case.unix {
        true => destination.listen(&format!("unix:{}", folder.join("to").display())),
        false => destination.listen("tcp:127.0.0.1:0"),
    };
    source.migrator.migrate(address).expect("it starts");
    let ram = || source.migrator.info().ram;
    match case.when {
        When::Last | When::AtOnce => {}
        When::Halfway => until(&format!("{what}: half of it"), || {
            ram().is_some_and(|ram| ram.remaining < MEMORY / 2)
        }),
        When::AfterAPass => {
            until(&format!("{what}: a pass"), || ram().is_some_and(|ram| ram.dirty_sync_count > 1))
        }
    }
    if case.when != When::Last {
        source.migrator.start_postcopy().expect("allowed");
    }
    until(&format!("{what}: the source's end"), || {
        // The destination first: the guest only ever goes from source to destination.
        let there = destination.vm.running();
        assert!(!(there && source.vm.running()), "{what}: two guests run");
        !source.status().is_some_and(MigrationStatus::is_running)
            || source.status() == Some(MigrationStatus::PostcopyPaused)
    });
    let (from, to) = (source.migrator.info(), destination.ended(what));
    let ends = format!("{what}: {:?}, {:?}", from.error_desc, to.error_desc);
    assert_eq!(from.status, Some(MigrationStatus::Completed), "{ends}");
    assert_eq!(to.status, Some(MigrationStatus::Completed), "{ends}");
    expect_figures(case, &from, what);
}

/// What the source says of it.
fn expect_figures(case: &Case, from: &MigrationInfo, what: &str) {
    let ram = from.ram.as_ref().expect("a source tells of RAM");
    let figures = format!("{what}: {ram:?}");
    assert_eq!(ram.remaining, 0, "{figures}");
    assert!(ram.transferred >= ram.multifd_bytes, "{figures}");
    if case.when == When::Last {
        assert_eq!(ram.postcopy_bytes, 0, "{figures}");
        // Firmware and devices are little beside it, and zeros are told of anywhere.
        let pages = ram.normal * 4096;
        assert_eq!(ram.normal_bytes, pages, "{figures}");
        assert!((ram.normal + ram.duplicate) * 4096 >= MEMORY, "{figures}");
        if case.compression == MultifdCompression::None {
            let headers = (ram.normal / 128 + 1000) * 1344 * u64::from(case.channels);
            let range = pages..pages + headers + (1 << 20);
            assert!(range.contains(&ram.multifd_bytes), "{figures}");
        } else {
            assert!(ram.multifd_bytes > 0, "{figures}");
        }
        let on_main = ram.transferred - ram.multifd_bytes;
        assert!(on_main < 1 << 20, "{figures}: {on_main} bytes on the main channel");
    } else {
        assert!(ram.postcopy_bytes > 0 && from.downtime.is_some(), "{figures}");
        assert!(ram.multifd_bytes > 0, "{figures}: the channels carried nothing");
    }
}

/// The guest is at the destination alone, with all of its memory.
fn expect_moved(case: &Case, source: &Side, destination: &Side, what: &str) {
    assert_eq!(source.migrator.run_state(), RunState::Postmigrate, "{what}");
    assert!(!source.runs(), "{what}");
    if case.when == When::Last {
        assert!(!destination.runs(), "{what}");
        expect_same_ram(source, destination, what);
    } else {
        assert!(destination.runs(), "{what}");
        destination.migrator.stop().expect("stops");
        expect_same_but_written(source, destination, what);
    }
    destination.migrator.cont().expect("runs");
    destination.expect_healthy(what);
}

/// Every page that the guest has not written at the destination is as it was left.
fn expect_same_but_written(source: &Side, destination: &Side, what: &str) {
    let written = destination.vm.writable_pages();
    for (index, block) in source.migrator.vm().ram().blocks() {
        let there = destination.migrator.vm().ram().block(index);
        let same = |&page: &u64| {
            written.iter().any(|w| w.block == block.name() && w.pages.contains(&page))
                || block.page_digest(TargetPage(page)) == there.page_digest(TargetPage(page))
        };
        let differ: Vec<u64> = (0..block.target_pages()).filter(|page| !same(page)).collect();
        assert!(differ.is_empty(), "{what}: pages of {} differ: {differ:?}", block.name());
    }
}

fn check(case: &Case) {
    let alone = Alone::begin();
    let began = Instant::now();
    let what = format!("{case:?}");
    let folder = tempfile::tempdir().expect("a folder");
    {
        let config = config(case);
        let source = Side::running(&config);
        let destination = Side::waiting(&config, case.when != When::Last);
        move_on(case, &source, &destination, folder.path(), &what);
        expect_moved(case, &source, &destination, &what);
    }
    eprintln!("{what}: {:?}", began.elapsed());
    alone.expect_nothing_left(&what);
    let left: Vec<_> = folder.path().read_dir().expect("the folder").collect();
    assert!(left.is_empty(), "{what}: files are left: {left:?}");
}

const COMPRESSIONS: [MultifdCompression; 4] = [
    MultifdCompression::None,
    MultifdCompression::Zlib,
    MultifdCompression::Zstd,
    MultifdCompression::Auto,
];

const ZEROS: [ZeroPageDetection; 3] =
    [ZeroPageDetection::None, ZeroPageDetection::Legacy, ZeroPageDetection::Multifd];

#[test]
fn on_any_number_of_channels() {
    for channels in [1, 2, 3, 4, 8, 64, 255] {
        for (unix, return_path) in [(false, true), (true, false)] {
            check(&Case { channels, unix, return_path, ..CASE });
        }
    }
}

#[test]
fn packed_in_any_way_with_zeros_told_in_any_way() {
    for compression in COMPRESSIONS {
        for zeros in ZEROS {
            for random in [true, false] {
                check(&Case { compression, zeros, random, channels: 3, ..CASE });
            }
        }
    }
}

#[test]
fn a_guest_goes_before_its_ram() {
    for when in [When::AtOnce, When::Halfway, When::AfterAPass] {
        for (preempt, channels) in [(true, 1), (true, 4), (false, 2)] {
            check(&Case { when, preempt, channels, vcpus: 2, ..CASE });
        }
    }
}

#[test]
fn a_guest_goes_before_its_ram_packed_in_any_way() {
    for compression in COMPRESSIONS {
        for (preempt, unix, zeros) in
            [(true, false, ZeroPageDetection::None), (false, true, ZeroPageDetection::Legacy)]
        {
            let when = if preempt { When::AtOnce } else { When::AfterAPass };
            check(&Case { when, preempt, unix, compression, zeros, channels: 3, ..CASE });
        }
    }
}

#[test]
fn with_every_accelerator() {
    let all = {
        let _alone = Alone::begin();
        accelerators()
    };
    for accel in all {
        for when in [When::Last, When::AtOnce] {
            check(&Case { accel, when, preempt: when == When::AtOnce, channels: 4, ..CASE });
        }
    }
}

#[test]
fn a_guest_moves_on_and_on() {
    let alone = Alone::begin();
    let folder = tempfile::tempdir().expect("a folder");
    {
        let mut here = Side::running(&config(&CASE));
        let ways = [
            Case { channels: 4, compression: MultifdCompression::Zstd, ..CASE },
            Case { when: When::AtOnce, preempt: true, channels: 3, ..CASE },
            Case { channels: 1, zeros: ZeroPageDetection::Legacy, unix: true, ..CASE },
            Case { when: When::AfterAPass, compression: MultifdCompression::Zlib, ..CASE },
            Case { channels: 8, compression: MultifdCompression::Auto, ..CASE },
        ];
        for (turn, case) in ways.iter().enumerate() {
            let what = format!("move {turn}: {case:?}");
            let there = Side::waiting(&config(case), case.when != When::Last);
            move_on(case, &here, &there, folder.path(), &what);
            expect_moved(case, &here, &there, &what);
            here = there;
        }
    }
    alone.expect_nothing_left("moving on");
}

/// Both sides must agree; where they do not, the guest stays, and both say something.
#[test]
fn sides_that_do_not_agree_leave_the_guest_where_it_is() {
    for (here, there) in [(Some(2), None), (None, Some(2)), (Some(4), Some(2))] {
        let alone = Alone::begin();
        let began = Instant::now();
        let what = format!("{here:?} channels to {there:?}");
        {
            let config = config(&CASE);
            let source = Side::running(&config);
            let destination = Side::waiting(&config, true);
            for (side, channels) in [(&source, here), (&destination, there)] {
                side.switch_on(&[Capability::ReturnPath]);
                if let Some(channels) = channels {
                    set(&Case { channels, ..CASE }, side);
                }
            }
            let address = destination.listen("tcp:127.0.0.1:0");
            source.migrator.migrate(address).expect("it starts");
            if here.is_none() {
                // One that is only waited for is not told: a user ends it.
                std::thread::sleep(std::time::Duration::from_millis(200));
                assert!(!destination.runs(), "{what}");
                destination.migrator.cancel().expect("it is no postcopy");
            }
            let info = source.ended(&what);
            assert_eq!(info.status, Some(MigrationStatus::Failed), "{what}");
            source.expect_reason(&[], &what);
            let info = destination.ended(&what);
            assert_ne!(info.status, Some(MigrationStatus::Completed), "{what}");
            if here.is_some() {
                destination.expect_reason(&["multifd"], &what);
            }
            assert!(!destination.runs(), "{what}");
            source.expect_healthy(&what);
            eprintln!("{what}: {:?}", began.elapsed());
        }
        alone.expect_nothing_left(&what);
    }
}

/// The pace holds for all channels together.
#[test]
fn all_channels_together_keep_the_pace() {
    for channels in [1, 4] {
        let alone = Alone::begin();
        let what = format!("{channels} channels");
        {
            let case = Case { channels, ..CASE };
            // Nothing is written, so nothing is sent twice.
            let config = Config { workload: Config::new(MEMORY).workload, ..config(&case) };
            let source = Side::waiting(&config, false);
            drop(source);
            let vm = whimbrel_vm::ReferenceVm::new(config.clone()).expect("a VM");
            let migrator = whimbrel::Migrator::new(vm.clone(), whimbrel::Start::Paused);
            let source = Side { vm, migrator };
            let destination = Side::waiting(&config, false);
            set(&case, &source);
            set(&case, &destination);
            let rate = 24 << 20;
            let slow =
                |p: &mut whimbrel::Parameters| (p.max_bandwidth, p.downtime_limit) = (rate, 1);
            source.migrator.update_parameters(slow).expect("allowed");
            let address = destination.listen("tcp:127.0.0.1:0");
            source.migrator.migrate(address).expect("it starts");
            let info = source.ended(&what);
            assert_eq!(info.status, Some(MigrationStatus::Completed), "{:?}", info.error_desc);
            let expected = MEMORY * 1000 / rate;
            let took = info.total_time.expect("told");

            assert!(took * 4 >= expected * 3, "{what}: {took} ms, expected {expected}");
        }
        alone.expect_nothing_left(&what);
    }
}
