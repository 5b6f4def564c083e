//! The connections of a postcopy break at any byte, or it is cancelled at any moment: the guest is
//! on one side at most, both sides know how they stand, and nothing is left. `WHIMBREL_CUTS` and
//! `WHIMBREL_CANCELS` say how many runs (50 and 30), `WHIMBREL_SEED` replays them, and
//! `WHIMBREL_ONLY` picks one of them.

#[path = "support/links.rs"]
mod links;
#[path = "support/vms.rs"]
mod vms;

use std::thread::sleep;
use std::time::{Duration, Instant};

use links::{Cut, Failure, Place, Ways};
use vms::{Alone, Dice, Side, drawn, expect_movable, seed, until};
use whimbrel::{AutoRecover, Capability, MigrationStatus, RunState};
use whimbrel_vm::{AccelChoice, Config, Fill};

const MEMORY: u64 = 6 << 20;

/// Everything that is drawn for one run.
#[derive(Clone, Copy, Debug)]
struct Draw {
    cut: Cut,
    preempt: bool,
    /// Multifd channels; 0 is without.
    channels: u8,
    /// When the guest is told to go.
    after: Duration,
    bandwidth: u64,
    workload_seed: u64,
}

fn draw(dice: &mut Dice) -> Draw {
    let preempt = dice.below(4) != 0;
    let channels = dice.one_of(&[0, 0, 1, 2, 4]);
    let place = match dice.below(if channels > 0 { 12 } else { 8 }) {
        8.. => {
            let number = u8::try_from(dice.below(channels.into())).expect("one of them");
            let range = dice.one_of(&[100, 3000, MEMORY / u64::from(channels)]);
            Place::Multifd(number, dice.below(range))
        }
        0 => Place::Main(dice.below(300)),
        1 => Place::Main(dice.below(MEMORY)),
        2 | 3 => Place::Package(dice.below(1500)),
        4 if preempt => Place::Urgent(dice.below(400 << 10)),
        5 => Place::Answers(dice.below(400)),
        6 => Place::Rest(dice.below(64)),
        _ => Place::Rest(dice.below(MEMORY)),
    };
    let failure = dice.one_of(&[Failure::All, Failure::All, Failure::One, Failure::Freeze]);
    Draw {
        cut: Cut { place, failure },
        preempt,
        channels,
        after: Duration::from_micros(dice.below(2) * dice.below(60_000)),
        bandwidth: dice.one_of(&[0, 32 << 20]),
        workload_seed: 1 + dice.below(1000),
    }
}

fn config(workload_seed: u64) -> Config {
    let workload = format!("uniform,rate=8000,working-set=2M,seed={workload_seed}");
    let workload = workload.parse().expect("a workload");
    Config { accel: AccelChoice::Native, workload, fill: Fill::Random, ..Config::new(MEMORY) }
}

fn pair(preempt: bool, channels: u8, bandwidth: u64, workload_seed: u64) -> (Side, Side) {
    let config = config(workload_seed);
    let (source, destination) = (Side::running(&config), Side::waiting(&config, true));
    for side in [&source, &destination] {
        side.switch_on(&[Capability::PostcopyRam]);
        if preempt {
            side.switch_on(&[Capability::PostcopyPreempt]);
        }
        if channels > 0 {
            side.switch_on(&[Capability::Multifd]);
            let set = |p: &mut whimbrel::Parameters| p.multifd_channels = channels;
            side.migrator.update_parameters(set).expect("allowed");
        }
    }
    // What is cut stays so until somebody says how to go on.
    let by_hand = |p: &mut whimbrel::Parameters| p.auto_recover = AutoRecover::Off;
    destination.migrator.update_parameters(by_hand).expect("allowed");
    let change = |p: &mut whimbrel::Parameters| {
        by_hand(p);
        (p.max_postcopy_bandwidth, p.max_bandwidth, p.downtime_limit) = (bandwidth, 48 << 20, 0);
    };
    source.migrator.update_parameters(change).expect("allowed");
    (source, destination)
}

/// Where the guest is after it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    Stayed,
    Moved,
    /// At the destination with a part of its memory, and then with all of it.
    Recovered,
    /// Given away to a destination that was ended.
    Lost,
}

#[test]
fn a_cut_at_any_byte_leaves_one_guest_and_no_thread() {
    let alone = Alone::begin();
    let mut fates = [0; 4];
    for (run, draw) in drawn("postcopy cut", ("WHIMBREL_CUTS", 50), draw) {
        let what = format!("run {run}: {draw:?}");
        let began = Instant::now();
        let fate = cut_once(&draw, &what);
        eprintln!("{what}: {fate:?} in {:?}", began.elapsed());
        fates[fate as usize] += 1;
        alone.expect_nothing_left(&what);
    }
    let [stayed, moved, recovered, lost] = fates;
    eprintln!(
        "{stayed} guests stayed, {moved} moved, {recovered} recovered, {lost} ended on the way"
    );
}

fn is_over(side: &Side, source: &Side) -> bool {
    let status = side.status();
    if status == Some(MigrationStatus::Setup)
        && matches!(source.status(), Some(MigrationStatus::Failed | MigrationStatus::Cancelled))
    {
        // A source that has gone without a word was anybody: the destination waits on.
        side.migrator.cancel().expect("it has not begun");
    }
    status == Some(MigrationStatus::PostcopyPaused)
        || !status.is_some_and(MigrationStatus::is_running)
}

fn never_two(source: &Side, destination: &Side, what: &str) {
    // The destination first: the guest only ever goes from source to destination.
    let there = destination.vm.running();
    assert!(!(there && source.vm.running()), "{what}: two guests run");
}

/// What nobody is told of, a user ends.
fn end_by_hand(side: &Side) {
    match side.status() {
        Some(MigrationStatus::PostcopyActive) => drop(side.migrator.pause()),
        // Neither `migrate-pause` nor `migrate_cancel` has a meaning there.
        Some(MigrationStatus::PostcopyDevice) => side.migrator.end(),
        _ => drop(side.migrator.cancel()),
    }
}

fn cut_once(draw: &Draw, what: &str) -> Fate {
    let (source, destination) =
        pair(draw.preempt, draw.channels, draw.bandwidth, draw.workload_seed);
    let address = destination.listen("tcp:127.0.0.1:0");
    let ways = Ways::start(&address, draw.channels, draw.cut);
    source.migrator.migrate(ways.address.clone()).expect("it starts");
    sleep(draw.after);
    source.migrator.start_postcopy().expect("allowed");
    let mut since_cut = None;
    for side in [&source, &destination] {
        until(&format!("{what}: an end"), || {
            never_two(&source, &destination, what);
            if draw.cut.failure == Failure::Freeze && ways.seen().cut {
                let since = *since_cut.get_or_insert_with(Instant::now);
                if since.elapsed().as_millis() > 30 {
                    end_by_hand(side);
                }
            }
            is_over(side, &source)
        });
    }
    let seen = ways.seen();
    drop(ways);
    let (from, to) = (source.migrator.info(), destination.migrator.info());
    let what = format!(
        "{what}: {seen:?}, source {:?} {:?}, destination {:?} {:?}",
        from.status, from.error_desc, to.status, to.error_desc
    );
    let arrived = match to.status {
        Some(MigrationStatus::Completed) => true,
        // It may have come, or be waiting for RUN.
        Some(MigrationStatus::PostcopyPaused) => destination.runs(),
        Some(MigrationStatus::Failed | MigrationStatus::Cancelled) => false,
        status => panic!("{what}: destination {status:?}"),
    };
    assert_eq!(destination.runs(), arrived, "{what}");
    assert!(!arrived || seen.run, "{what}: it runs without RUN");
    let one_line = |text: &Option<String>| text.as_ref().is_none_or(|text| !text.contains('\n'));
    assert!(one_line(&from.error_desc) && one_line(&to.error_desc), "{what}");
    match from.status {
        Some(MigrationStatus::Failed | MigrationStatus::Cancelled) => {
            assert!(!seen.run, "{what}: RUN went out");
            assert_eq!(source.migrator.run_state(), RunState::Running, "{what}");
            source.expect_healthy(&format!("{what}: the guest stayed"));
            let off = [Capability::PostcopyPreempt, Capability::PostcopyRam, Capability::Multifd]
                .map(|one| (one, false));
            source.migrator.set_capabilities(&off).expect("no migration runs");
            let fast =
                |p: &mut whimbrel::Parameters| (p.max_bandwidth, p.downtime_limit) = (0, 300);
            source.migrator.update_parameters(fast).expect("allowed");
            expect_movable(&source, &config(draw.workload_seed), &format!("{what}: trying again"));
            return Fate::Stayed;
        }
        Some(MigrationStatus::Completed) => {
            assert_eq!(to.status, Some(MigrationStatus::Completed), "{what}: it says it has moved");
        }
        Some(MigrationStatus::PostcopyPaused) => {
            assert!(from.error_desc.is_some(), "{what}: says why");
        }
        status => panic!("{what}: source {status:?}"),
    }
    assert!(!source.runs(), "{what}");
    assert_eq!(source.migrator.run_state(), RunState::Postmigrate, "{what}");
    source.migrator.cont().expect_err("the guest is not here");
    let fate = match to.status {
        Some(MigrationStatus::Completed) => Fate::Moved,
        Some(MigrationStatus::PostcopyPaused) => {
            recover(&source, &destination, &what);
            Fate::Recovered
        }
        // A user who ends the destination does so whatever is on its way.
        _ => {
            assert_eq!(to.status, Some(MigrationStatus::Cancelled), "{what}: nobody has the guest");
            Fate::Lost
        }
    };
    source.migrator.end();
    if fate != Fate::Lost {
        destination.expect_healthy(&what);
    }
    fate
}

/// Both are told how to go on, over new connections.
fn recover(source: &Side, destination: &Side, what: &str) {
    assert!(destination.migrator.info().error_desc.is_some(), "{what}: says why");
    let anywhere = "tcp:127.0.0.1:0".parse().expect("an address");
    destination.migrator.recover(&anywhere).expect("it is paused");
    let there = destination.address();
    source.migrator.resume(there).expect("it is paused");
    for side in [source, destination] {
        let info = side.ended(&format!("{what}: recovered"));
        assert_eq!(info.status, Some(MigrationStatus::Completed), "{what}: {:?}", info.error_desc);
    }
}

#[test]
fn cancelled_at_any_moment_it_is_cancelled_or_too_late() {
    let runs = std::env::var("WHIMBREL_CANCELS").map_or(30, |n| n.parse().expect("a number"));
    let mut dice = Dice(seed("postcopy cancel"));
    let alone = Alone::begin();
    let [mut stayed, mut moved, mut refused] = [0; 3];
    for run in 0..runs {
        let preempt = dice.below(2) == 0;
        let channels = dice.one_of(&[0, 3]);
        let at = |dice: &mut Dice, end| Duration::from_micros(dice.below(end));
        let (go, cancel) = (at(&mut dice, 60_000), at(&mut dice, 120_000));
        // A destination that does not say that it has loaded the devices before RUN goes out can end
        // with RUN on its way: what nobody can prevent without an answer.
        let at_source = dice.below(4) != 0 || !preempt;
        let what = format!(
            "run {run}: preempt {preempt}, {channels} channels, postcopy after {go:?}, cancelled after {cancel:?} at source {at_source}"
        );
        {
            let (source, destination) = pair(preempt, channels, 64 << 20, 1 + dice.below(1000));
            let address = destination.listen("tcp:127.0.0.1:0");
            source.migrator.migrate(address).expect("it starts");
            let start = Instant::now();
            let wait = |time: Duration| sleep(time.saturating_sub(start.elapsed()));
            wait(go.min(cancel));
            if go < cancel {
                source.migrator.start_postcopy().expect("allowed");
                wait(cancel);
            }
            let side = if at_source { &source } else { &destination };
            let answer = side.migrator.cancel();
            if let Err(error) = &answer {
                assert!(error.to_string().contains("cannot cancel"), "{what}: {error}");
                refused += 1;
            }
            // Cancelled or not, it ends: also where it was too early for that.
            source.migrator.start_postcopy().expect("no error, whenever");
            for side in [&source, &destination] {
                until(&what, || {
                    never_two(&source, &destination, &what);
                    is_over(side, &source)
                });
            }
            let (from, to) = (source.migrator.info(), destination.migrator.info());
            let what = format!(
                "{what}: source {:?} {:?}, destination {:?} {:?}",
                from.status, from.error_desc, to.status, to.error_desc
            );
            match (from.status, to.status) {
                (Some(MigrationStatus::Completed), Some(MigrationStatus::Completed)) => {
                    assert!(!source.runs());
                    destination.expect_healthy(&what);
                    moved += 1;
                }
                (
                    Some(MigrationStatus::Cancelled | MigrationStatus::Failed),
                    Some(MigrationStatus::Cancelled | MigrationStatus::Failed),
                ) => {
                    assert!(answer.is_ok(), "{what}: it was refused");
                    assert!(!destination.runs(), "{what}");
                    source.expect_healthy(&what);
                    stayed += 1;
                }
                // The connection was gone before the source could say that it keeps its guest: for all
                // the destination knows RUN may have been lost.
                (Some(MigrationStatus::Cancelled), Some(MigrationStatus::PostcopyPaused)) => {
                    assert!(answer.is_ok() && !destination.runs(), "{what}");
                    source.expect_healthy(&what);
                    stayed += 1;
                }
                _ => panic!("{what}"),
            }
        }
        alone.expect_nothing_left(&what);
    }
    eprintln!("{runs} cancelled: {stayed} guests stayed, {moved} had gone, {refused} refused");
    assert!(stayed > 0, "not one was cancelled in time: the delays are too long");
}
