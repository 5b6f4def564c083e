//! A migration over a good link is cancelled at any moment: the guest stays, or has moved
//! already; never is it in doubt, and nothing is left. `WHIMBREL_CANCELS` says how many runs (30),
//! `WHIMBREL_SEED` replays them.

#[path = "support/vms.rs"]
mod vms;

use std::thread::sleep;
use std::time::{Duration, Instant};

use vms::{Dice, Held, Side, expect_movable, seed};
use whimbrel::{Capability, MigrationStatus, RunState};
use whimbrel_vm::{AccelChoice, Config};

/// Everything that is drawn for one run.
#[derive(Clone, Copy, Debug)]
struct Draw {
    /// Of the source, or of the destination.
    at_source: bool,
    after: Duration,
    pause_before_switchover: bool,
    max_bandwidth: u64,
}

fn draw(dice: &mut Dice) -> Draw {
    let (max_bandwidth, micros) = match dice.below(3) {
        0 => (0, 15_000),        // All of it takes some 10 ms.
        1 => (64 << 20, 60_000), // 40 ms of passes.
        _ => (1 << 20, 100_000), // Far from its end.
    };
    Draw {
        at_source: dice.below(4) != 0,
        after: Duration::from_micros(dice.below(micros)),
        pause_before_switchover: dice.below(5) == 0,
        max_bandwidth,
    }
}

#[test]
fn cancelled_at_any_moment_the_guest_is_never_in_doubt() {
    let runs = std::env::var("WHIMBREL_CANCELS").map_or(30, |n| n.parse().expect("a number"));
    let mut dice = Dice(seed("cancel"));
    let before = Held::now();
    let (mut stayed, mut moved) = (0, 0);
    for run in 0..runs {
        let draw = draw(&mut dice);
        let what = format!("run {run}: {draw:?}");
        match cancel_once(&draw, &what) {
            true => moved += 1,
            false => stayed += 1,
        }
        before.expect_again(&what);
    }
    eprintln!("{runs} cancelled: {stayed} guests stayed, {moved} had moved");
    assert!(stayed > 0, "not one was cancelled in time: the delays are too long");
}

/// Says whether the guest had moved already.
fn cancel_once(draw: &Draw, what: &str) -> bool {
    let workload = "uniform,rate=20000,working-set=1M".parse().expect("a workload");
    let config = Config { accel: AccelChoice::Native, workload, ..Config::new(8 << 20) };
    let source = Side::running(&config);
    let destination = Side::waiting(&config, true);
    source.switch_on(&[Capability::ReturnPath]);
    if draw.pause_before_switchover {
        source.switch_on(&[Capability::PauseBeforeSwitchover]);
    }
    let bandwidth = draw.max_bandwidth;
    source.migrator.update_parameters(|p| p.max_bandwidth = bandwidth).expect("allowed");
    let address = destination.listen("tcp:127.0.0.1:0");
    source.migrator.migrate(address).expect("it starts");
    sleep(draw.after);
    let since = Instant::now();
    if draw.at_source {
        source.migrator.cancel().expect("it is no postcopy");
    } else {
        destination.migrator.cancel().expect("it is no postcopy");
    }
    let from = source.migrator.info();
    // A destination may have been complete before it was cancelled, and its source wait for a
    // 'migrate-continue' that never comes.
    if !draw.at_source && from.status == Some(MigrationStatus::PreSwitchover) {
        source.migrator.cancel().expect("it is no postcopy");
    }
    let from = if draw.at_source || !draw.pause_before_switchover {
        source.ended(what)
    } else {
        sleep(Duration::from_millis(100));
        source.migrator.cancel().expect("it is no postcopy");
        source.ended(what)
    };
    assert!(since.elapsed() < Duration::from_secs(20), "{what}: took {:?}", since.elapsed());
    let to = destination.ended(what);
    let what = format!("{what}: source {from:?}, destination {to:?}");
    let moved = source.migrator.run_state() == RunState::Postmigrate;
    if moved {
        assert_eq!(from.status, Some(MigrationStatus::Completed), "{what}");
        assert_eq!(to.status, Some(MigrationStatus::Completed), "{what}");
        assert!(!source.runs());
        destination.expect_healthy(&what);
    } else {
        let expected = match draw.at_source || draw.pause_before_switchover {
            true => [MigrationStatus::Cancelled, MigrationStatus::Failed],
            false => [MigrationStatus::Failed; 2],
        };
        assert!(from.status.is_some_and(|status| expected.contains(&status)), "{what}");
        assert_ne!(to.status, Some(MigrationStatus::Completed), "{what}");
        assert!(!destination.runs(), "{what}");
        source.migrator.update_parameters(|p| p.max_bandwidth = 0).expect("allowed");
        let off = [(Capability::PauseBeforeSwitchover, false)];
        source.migrator.set_capabilities(&off).expect("allowed");
        source.expect_healthy(&what);
        expect_movable(&source, &config, &what);
    }
    moved
}
