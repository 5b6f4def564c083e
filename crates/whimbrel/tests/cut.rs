//! The connection breaks at any byte: the guest survives, on exactly one side, and nothing else is
//! left. `WHIMBREL_CUTS` says how many runs (50), `WHIMBREL_SEED` replays them, and
//! `WHIMBREL_ONLY` picks one of them.

#[path = "support/proxy.rs"]
mod proxy;
#[path = "support/vms.rs"]
mod vms;

use std::path::Path;
use std::time::Instant;

use proxy::{Cut, Failure, Phase, Proxy, Seen};
use vms::{Dice, Held, Side, accelerators, drawn, expect_movable, until};
use whimbrel::{Capability, MigrationInfo, MigrationStatus, RunState};
use whimbrel_vm::{AccelChoice, Config, Fill};

/// Everything that is drawn for one run.
#[derive(Clone, Copy, Debug)]
struct Draw {
    accel: AccelChoice,
    cut: Cut,
    unix: bool,
    return_path: bool,
    xbzrle: bool,
    workload_seed: u64,
}

/// One draw in three is a deliberate phase, so that the short ones are hit.
fn draw(dice: &mut Dice, accelerators: &[AccelChoice]) -> Draw {
    let phase = if dice.below(3) == 0 { Phase::Setup } else { dice.one_of(&Phase::ALL) };
    let span = match phase {
        Phase::Setup if dice.below(2) == 0 => 12 << 20, // Any byte at all.
        Phase::Setup => 200,
        Phase::FirstPass => 6 << 20,
        Phase::LaterPass => 256 << 10,
        Phase::End => 8 << 10,
        Phase::Devices => 300,
        Phase::Description => 300,
        Phase::Ping | Phase::Answers | Phase::PongLoaded | Phase::Shut => 8,
        Phase::Eof => 2,
    };
    let failures = [Failure::Reset, Failure::Close, Failure::HalfClose, Failure::Freeze];
    Draw {
        // KVM takes 20 times as long where it is nested.
        accel: if dice.below(8) == 0 { dice.one_of(accelerators) } else { AccelChoice::Native },
        cut: Cut { phase, bytes: dice.below(span), failure: dice.one_of(&failures) },
        unix: dice.below(2) == 0,
        return_path: dice.below(8) != 0,
        xbzrle: dice.below(4) == 0,
        workload_seed: 1 + dice.below(1000),
    }
}

fn config(draw: &Draw) -> Config {
    let workload = format!("uniform,rate=20000,working-set=2M,seed={}", draw.workload_seed);
    let workload = workload.parse().expect("a workload");
    Config { accel: draw.accel, workload, fill: Fill::Random, ..Config::new(12 << 20) }
}

#[test]
fn a_cut_at_any_byte_leaves_one_guest_and_nothing_else() {
    let accelerators = accelerators();
    let folder = tempfile::tempdir().expect("a folder");
    let before = Held::now();
    let started = Instant::now();
    let (mut kept, mut moved, mut doubted) = (0, 0, 0);
    let draw = |dice: &mut Dice| draw(dice, &accelerators);
    for (run, draw) in drawn("cut", ("WHIMBREL_CUTS", 50), draw) {
        let what = format!("run {run}: {}: {draw:?}", draw.cut);
        let began = Instant::now();
        let fate = cut_once(&draw, folder.path(), &what);
        eprintln!("run {run}: {}: {fate:?} in {:?}", draw.cut, began.elapsed());
        match fate {
            Fate::Stayed => kept += 1,
            Fate::Moved => moved += 1,
            Fate::InDoubt => doubted += 1,
        }
        before.expect_again(&what);
        let left: Vec<_> = folder.path().read_dir().expect("the folder").collect();
        assert!(left.is_empty(), "{what}: files are left: {left:?}");
    }
    eprintln!(
        "{} cuts in {:?}: {kept} guests stayed, {moved} moved, {doubted} in doubt",
        kept + moved + doubted,
        started.elapsed()
    );
}

/// Where the guest is after a cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    Stayed,
    Moved,
    /// Stopped at the source, which cannot know more.
    InDoubt,
}

fn cut_once(draw: &Draw, folder: &Path, what: &str) -> Fate {
    let config = config(draw);
    let source = Side::running(&config);
    let destination = Side::waiting(&config, true);
    for side in [&source, &destination] {
        if draw.return_path {
            side.switch_on(&[Capability::ReturnPath]);
        }
        if draw.xbzrle {
            side.switch_on(&[Capability::Xbzrle]);
        }
    }
    let tight = |p: &mut whimbrel::Parameters| (p.downtime_limit, p.max_bandwidth) = (2, 256 << 20);
    source.migrator.update_parameters(tight).expect("allowed");
    let upstream = match draw.unix {
        true => destination.listen(&format!("unix:{}", folder.join("to").display())),
        false => destination.listen("tcp:127.0.0.1:0"),
    };
    let socket = draw.unix.then(|| folder.join("proxy"));
    let proxy = Proxy::start(upstream, socket, Some(draw.cut));
    source.migrator.migrate(proxy.address.clone()).expect("it starts");

    let (from, to) = outcome(draw, &source, &destination, &proxy, what);
    let seen = proxy.end();
    let what = format!("{what}: {seen:?}, source {:?}, destination {:?}", brief(&from), brief(&to));
    let fate = judge(draw, &source, &destination, (&from, &to), seen, &what);
    match fate {
        Fate::Moved => {
            destination.expect_healthy(&format!("{what}: the guest moved"));
            expect_movable(&destination, &config, &format!("{what}: moving on"));
        }
        Fate::Stayed => {
            source.expect_healthy(&format!("{what}: the guest stayed"));
            expect_movable(&source, &config, &format!("{what}: trying again"));
        }
        Fate::InDoubt if destination.runs() => {
            destination.expect_healthy(&format!("{what}: the guest moved, unknown to the source"));
        }
        Fate::InDoubt => {
            // A human who sees that it does not run there says so here.
            source.migrator.cont().expect("'cont' resolves the doubt");
            source.expect_healthy(&format!("{what}: after 'cont'"));
            expect_movable(&source, &config, &format!("{what}: trying again after 'cont'"));
        }
    }
    fate
}

fn brief(info: &MigrationInfo) -> (Option<MigrationStatus>, Option<&str>) {
    (info.status, info.error_desc.as_deref())
}

/// Waits for both sides' ends, watching that never both guests run. What nobody is told of, a
/// user ends.
fn outcome(
    draw: &Draw,
    source: &Side,
    destination: &Side,
    proxy: &Proxy,
    what: &str,
) -> (MigrationInfo, MigrationInfo) {
    let over = |side: &Side| side.status().is_some_and(|status| !status.is_running());
    let never_two = || {
        // The destination first: the guest only ever goes from source to destination.
        let there = destination.vm.running();
        assert!(!(there && source.vm.running()), "{what}: two guests run");
    };
    let may_hang = matches!(draw.cut.failure, Failure::Freeze | Failure::HalfClose);
    let (begun, mut since_cut) = (Instant::now(), None);
    until(&format!("{what}: the source's end"), || {
        never_two();
        source.relent(begun);
        if may_hang && proxy.seen().cut {
            let since = *since_cut.get_or_insert_with(Instant::now);
            if since.elapsed().as_millis() > 30 {
                source.migrator.cancel().expect("it is no postcopy");
            }
        }
        over(source)
    });
    // The source has closed its end. A proxy that is frozen never says so: a user does.
    let since = Instant::now();
    until(&format!("{what}: the destination's end"), || {
        never_two();
        if may_hang && since.elapsed().as_millis() > 30 {
            destination.migrator.cancel().expect("it is no postcopy");
        }
        over(destination)
    });
    (source.migrator.info(), destination.migrator.info())
}

/// Holds the outcome against what the link let through.
fn judge(
    draw: &Draw,
    source: &Side,
    destination: &Side,
    (from, to): (&MigrationInfo, &MigrationInfo),
    seen: Seen,
    what: &str,
) -> Fate {
    let arrived = to.status == Some(MigrationStatus::Completed);
    assert_eq!(
        destination.runs(),
        arrived,
        "{what}: the destination runs exactly if it has it all"
    );
    if !arrived {
        let failed =
            matches!(to.status, Some(MigrationStatus::Failed | MigrationStatus::Cancelled));
        assert!(failed, "{what}: the destination failed");
        assert_eq!(destination.migrator.run_state(), RunState::Inmigrate, "{what}");
    }
    assert!(!arrived || seen.eof, "{what}: it runs without the end mark");
    let lossless = draw.cut.failure != Failure::Reset || draw.unix;
    let source_broke_off = !draw.return_path; // It may reset what it does not read.
    if seen.eof && lossless && !source_broke_off && draw.cut.failure != Failure::Freeze {
        assert!(arrived, "{what}: the end mark arrived, so it runs");
    }
    match source.migrator.run_state() {
        RunState::Running => {
            let failed =
                matches!(from.status, Some(MigrationStatus::Failed | MigrationStatus::Cancelled));
            assert!(failed, "{what}: the source failed");
            assert!(!arrived, "{what}: the guest is on both sides");
            Fate::Stayed
        }
        RunState::Postmigrate => {
            let given_up = if draw.return_path { seen.pong_loaded } else { true };
            assert!(given_up, "{what}: given up before the destination had loaded it");
            match from.status {
                Some(MigrationStatus::Completed) if draw.return_path => {
                    assert!(arrived, "{what}: the source says it has moved");
                    Fate::Moved
                }
                Some(MigrationStatus::Completed) if arrived => Fate::Moved,
                // Without a return path the source cannot see more than that all was sent.
                Some(MigrationStatus::Completed) => Fate::InDoubt,
                Some(MigrationStatus::Failed) => {
                    let text = from.error_desc.as_deref().unwrap_or_default();
                    assert!(text.contains("it stays stopped here"), "{what}: says why");
                    Fate::InDoubt
                }
                status => panic!("{what}: source {status:?}"),
            }
        }
        other => panic!("{what}: the source's guest is {other:?}"),
    }
}
