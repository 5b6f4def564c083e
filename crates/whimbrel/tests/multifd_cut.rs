//! Any connection of a migration on several channels breaks at any byte: the guest survives, on
//! exactly one side, and nothing else is left. `WHIMBREL_CUTS` says how many runs (50),
//! `WHIMBREL_SEED` replays them, and `WHIMBREL_ONLY` picks one of them.

#[path = "support/links.rs"]
mod links;
#[path = "support/vms.rs"]
mod vms;

use std::time::Instant;

use links::{Cut, Failure, Place, Ways};
use vms::{Alone, Dice, Side, drawn, expect_movable, until};
use whimbrel::{Capability, MigrationStatus, MultifdCompression, RunState};
use whimbrel_vm::{AccelChoice, Config, Fill};

const MEMORY: u64 = 12 << 20;

/// Everything that is drawn for one run.
#[derive(Clone, Copy, Debug)]
struct Draw {
    cut: Cut,
    channels: u8,
    compression: MultifdCompression,
    return_path: bool,
    workload_seed: u64,
}

fn draw(dice: &mut Dice) -> Draw {
    let channels = dice.one_of(&[1, 2, 4, 8]);
    let place = match dice.below(8) {
        0 => Place::Main(dice.below(300)),
        1 => Place::Main(dice.below(4000)),
        2 => Place::Answers(dice.below(40)),
        _ => {
            let number = u8::try_from(dice.below(channels.into())).expect("one of them");
            // The first message, the first packets, any byte.
            let range = dice.one_of(&[100, 3000, MEMORY / u64::from(channels)]);
            Place::Multifd(number, dice.below(range))
        }
    };
    let failure = dice.one_of(&[Failure::All, Failure::One, Failure::One, Failure::Freeze]);
    let compressions = [
        MultifdCompression::None,
        MultifdCompression::None,
        MultifdCompression::Zlib,
        MultifdCompression::Zstd,
        MultifdCompression::Auto,
    ];
    Draw {
        cut: Cut { place, failure },
        channels,
        compression: dice.one_of(&compressions),
        return_path: dice.below(8) != 0,
        workload_seed: 1 + dice.below(1000),
    }
}

fn config(draw: &Draw) -> Config {
    let workload = format!("uniform,rate=20000,working-set=2M,seed={}", draw.workload_seed);
    let workload = workload.parse().expect("a workload");
    Config { accel: AccelChoice::Native, workload, fill: Fill::Random, ..Config::new(MEMORY) }
}

/// Where the guest is after a cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    Stayed,
    Moved,
    /// Stopped at the source, which cannot know more.
    InDoubt,
}

#[test]
fn a_cut_of_any_connection_leaves_one_guest_and_nothing_else() {
    let alone = Alone::begin();
    let mut fates = [0; 3];
    for (run, draw) in drawn("multifd cut", ("WHIMBREL_CUTS", 50), draw) {
        let what = format!("run {run}: {draw:?}");
        let began = Instant::now();
        let fate = cut_once(&draw, &what);
        eprintln!("{what}: {fate:?} in {:?}", began.elapsed());
        fates[fate as usize] += 1;
        alone.expect_nothing_left(&what);
    }
    let [stayed, moved, doubted] = fates;
    eprintln!("{stayed} guests stayed, {moved} moved, {doubted} in doubt");
}

fn cut_once(draw: &Draw, what: &str) -> Fate {
    let config = config(draw);
    let (source, destination) = (Side::running(&config), Side::waiting(&config, true));
    for side in [&source, &destination] {
        side.switch_on(&[Capability::Multifd]);
        if draw.return_path {
            side.switch_on(&[Capability::ReturnPath]);
        }
        let set = |p: &mut whimbrel::Parameters| {
            (p.multifd_channels, p.multifd_compression) = (draw.channels, draw.compression);
            (p.downtime_limit, p.max_bandwidth) = (2, 256 << 20);
        };
        side.migrator.update_parameters(set).expect("allowed");
    }
    let address = destination.listen("tcp:127.0.0.1:0");
    let ways = Ways::start(&address, draw.channels, draw.cut);
    source.migrator.migrate(ways.address.clone()).expect("it starts");
    wait_for_both(draw, &source, &destination, &ways, what);
    drop(ways);
    judge(draw, &source, &destination, what)
}

/// Waits for both sides' ends, watching that never both guests run. What nobody is told of, a
/// user ends: a frozen link, a channel that never came, or, without a way back, a source that has
/// gone.
fn wait_for_both(draw: &Draw, source: &Side, destination: &Side, ways: &Ways, what: &str) {
    let (begun, mut since_cut) = (Instant::now(), None);
    for side in [source, destination] {
        until(&format!("{what}: an end"), || {
            // The destination first: the guest only ever goes from source to destination.
            let there = destination.vm.running();
            assert!(!(there && source.vm.running()), "{what}: two guests run");
            if ways.seen().cut {
                let since = *since_cut.get_or_insert_with(Instant::now);
                let patience = if draw.cut.failure == Failure::Freeze { 30 } else { 1000 };
                if since.elapsed().as_millis() > patience {
                    // It may be over by then.
                    let _ = side.migrator.cancel();
                }
            }
            source.relent(begun);
            !side.status().is_some_and(MigrationStatus::is_running)
        });
    }
}

fn judge(draw: &Draw, source: &Side, destination: &Side, what: &str) -> Fate {
    let (from, to) = (source.migrator.info(), destination.migrator.info());
    let what = format!(
        "{what}: source {:?} {:?}, destination {:?} {:?}",
        from.status, from.error_desc, to.status, to.error_desc
    );
    let one_line = |text: &Option<String>| text.as_ref().is_none_or(|text| !text.contains('\n'));
    assert!(one_line(&from.error_desc) && one_line(&to.error_desc), "{what}");
    let arrived = to.status == Some(MigrationStatus::Completed);
    assert_eq!(destination.runs(), arrived, "{what}: it runs exactly if it has it all");
    match (source.migrator.run_state(), from.status) {
        (RunState::Running, Some(MigrationStatus::Failed | MigrationStatus::Cancelled)) => {
            assert!(!arrived, "{what}: the guest is on both sides");
            source.expect_healthy(&format!("{what}: the guest stayed"));
            source.migrator.set_capabilities(&[(Capability::Multifd, false)]).expect("allowed");
            expect_movable(source, &config(draw), &format!("{what}: trying again"));
            Fate::Stayed
        }
        (RunState::Postmigrate, Some(MigrationStatus::Completed)) => {
            // Without a return path the source cannot see more than that all was sent.
            assert!(arrived || !draw.return_path, "{what}: the source says it has moved");
            match arrived {
                true => {
                    destination.expect_healthy(&format!("{what}: the guest moved"));
                    Fate::Moved
                }
                false => Fate::InDoubt,
            }
        }
        (RunState::Postmigrate, Some(MigrationStatus::Failed)) => {
            let text = from.error_desc.as_deref().unwrap_or_default();
            assert!(text.contains("it stays stopped here"), "{what}: says why");
            if arrived {
                destination.expect_healthy(&format!("{what}: moved, unknown to the source"));
            }
            Fate::InDoubt
        }
        other => panic!("{what}: {other:?}"),
    }
}
