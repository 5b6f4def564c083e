//! COLO: a second VM is kept in step with a guest, and whichever of them is lost, the other has it.

#[path = "support/relay.rs"]
mod relay;
#[path = "support/vms.rs"]
mod vms;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use relay::Relay;
use vms::{Alone, Side, drawn, expect_movable, expect_same_ram, until};
use whimbrel::{
    Capability, ColoExitReason, ColoFailover, ColoMode, Event, MigrationStatus, MultifdCompression,
    RunState, VmError,
};
use whimbrel_vm::{AccelChoice, Config, Fill};

const MEMORY: u64 = 8 << 20;

/// A guest that dirties so much that pages go ahead of its checkpoints.
fn busy() -> Config {
    let workload = "uniform,rate=40000,working-set=32M,seed=7".parse().expect("a workload");
    Config { workload, ..Config { accel: AccelChoice::Native, ..Config::new(8 * MEMORY) } }
}

fn config(accel: AccelChoice) -> Config {
    let workload = "uniform,rate=8000,working-set=4M,seed=7".parse().expect("a workload");
    Config { accel, workload, fill: Fill::Random, ..Config::new(MEMORY) }
}

/// How checkpoints travel.
#[derive(Clone, Copy, Debug)]
struct Set {
    accel: AccelChoice,
    /// Multifd channels; 0 is without.
    channels: u8,
    compression: MultifdCompression,
    /// The copy runs between checkpoints.
    runs: bool,
    failover: ColoFailover,
    /// Between two checkpoints, in ms.
    delay: u64,
    /// The guest is the [`busy`] one.
    busy: bool,
}

impl Set {
    fn config(&self) -> Config {
        if self.busy { busy() } else { config(self.accel) }
    }
}

impl Default for Set {
    fn default() -> Set {
        Set {
            accel: AccelChoice::Native,
            channels: 0,
            compression: MultifdCompression::None,
            runs: true,
            failover: ColoFailover::Auto,
            delay: 20,
            busy: false,
        }
    }
}

/// A primary and a secondary that have begun.
struct Pair {
    primary: Side,
    secondary: Side,
    relay: Relay,
}

impl Pair {
    fn begin(set: Set) -> Pair {
        let config = set.config();
        let (primary, secondary) = (Side::running(&config), Side::waiting(&config, set.runs));
        for side in [&primary, &secondary] {
            side.switch_on(&[Capability::ReturnPath, Capability::XColo]);
            if set.channels > 0 {
                side.switch_on(&[Capability::Multifd]);
            }
            let change = |p: &mut whimbrel::Parameters| {
                p.multifd_channels = set.channels.max(1);
                p.multifd_compression = set.compression;
                p.x_checkpoint_delay = set.delay;
                p.x_colo_failover = set.failover;
                (p.max_bandwidth, p.silence_limit) = (0, 5000);
            };
            side.migrator.update_parameters(change).expect("allowed");
        }
        let relay = Relay::to(&secondary.listen("tcp:127.0.0.1:0"));
        primary.migrator.migrate(relay.address.clone()).expect("it starts");
        let pair = Pair { primary, secondary, relay };
        pair.wait_for(MigrationStatus::Colo);
        pair
    }

    fn wait_for(&self, status: MigrationStatus) {
        for side in [&self.primary, &self.secondary] {
            wait_for(side, status);
        }
    }

    fn expect_checkpoints(&self, more: u64) {
        for side in [&self.primary, &self.secondary] {
            let before = checkpoints(side);
            until("checkpoints", || checkpoints(side) >= before + more);
        }
    }

    /// The guest stands still, and the copy is as it is.
    fn settle(&self) {
        self.primary.migrator.stop().expect("stops");
        // One may have been under way.
        for _ in 0..2 {
            let before = checkpoints(&self.primary);
            self.primary.migrator.colo_checkpoint().expect("in COLO");
            until("a checkpoint", || checkpoints(&self.primary) > before);
        }
    }
}

fn wait_for(side: &Side, status: MigrationStatus) {
    let start = Instant::now();
    while side.status() != Some(status) {
        let info = side.migrator.info();
        let (now, why) = (info.status, info.error_desc);
        assert!(start.elapsed() < vms::LIMIT, "{status}: it is {now:?}, {why:?}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn checkpoints(side: &Side) -> u64 {
    side.migrator.info().colo.map_or(0, |colo| colo.checkpoints)
}

fn sets() -> impl Iterator<Item = Set> {
    let all = [
        (0, MultifdCompression::None),
        (3, MultifdCompression::None),
        (2, MultifdCompression::Zstd),
        (1, MultifdCompression::Zlib),
    ];
    vms::accelerators().into_iter().flat_map(move |accel| {
        // A KVM that is software itself takes long to stop a guest, and to let it go on.
        let (different, delay) = match accel {
            AccelChoice::Kvm => (2, 200),
            AccelChoice::Native | AccelChoice::Auto => (all.len(), 20),
        };
        all.into_iter().take(different).map(move |(channels, compression)| Set {
            accel,
            channels,
            compression,
            delay,
            ..Set::default()
        })
    })
}

#[test]
fn a_checkpoint_makes_the_copy_what_the_guest_is() {
    let alone = Alone::begin();
    for set in sets() {
        for runs in [true, false] {
            let set = Set { runs, ..set };
            let what = format!("{set:?}");
            let Pair { primary, secondary, relay } = {
                let pair = Pair::begin(set);
                assert_eq!(pair.secondary.migrator.run_state(), RunState::Colo, "{what}");
                pair.expect_checkpoints(5);
                pair.primary.expect_progress(&what);
                pair.settle();
                pair
            };
            // Nothing of the guest's has changed since, and the copy stands still with it.
            expect_same_ram(&primary, &secondary, &what);
            let before = checkpoints(&secondary);
            primary.migrator.cont().expect("runs on");
            primary.expect_progress(&what);
            // By one of them the copy knows that the guest runs again.
            until("checkpoints", || checkpoints(&secondary) > before + 1);
            secondary.migrator.colo_lost_heartbeat().expect("in COLO");
            wait_for(&secondary, MigrationStatus::Completed);
            wait_for(&primary, MigrationStatus::Completed);
            // It was told that the primary is gone, which in this test it is not.
            primary.migrator.stop().expect("stops");
            assert_eq!(secondary.runs(), runs, "{what}");
            if !runs {
                secondary.migrator.cont().expect("it is here");
            }
            secondary.expect_healthy(&what);
            primary.migrator.cont().expect("it is here, too");
            primary.expect_healthy(&what);
            drop((primary, secondary, relay));
            alone.expect_nothing_left(&what);
        }
    }
}

/// Events of COLO, as they come.
fn exits(side: &Side) -> (whimbrel::Subscription, mpsc::Receiver<(ColoMode, ColoExitReason)>) {
    let (tell, told) = mpsc::channel();
    let tell = std::sync::Mutex::new(tell);
    let subscription = side.migrator.subscribe(move |event| {
        if let Event::ColoExit { mode, reason } = event {
            let _ = tell.lock().expect("whole").send((*mode, *reason));
        }
    });
    (subscription, told)
}

/// By a link that breaks at any byte, of whatever is just under way.
#[test]
fn whoever_is_lost_at_whatever_byte_the_other_one_has_the_guest() {
    let alone = Alone::begin();
    let all: Vec<Set> = sets().filter(|set| set.accel == AccelChoice::Native).collect();
    let draw = |dice: &mut vms::Dice| {
        let set = Set { runs: dice.below(2) == 0, delay: 1 + dice.below(20), ..dice.one_of(&all) };
        (set, dice.below(3 << 20))
    };
    for (run, (set, bytes)) in drawn("colo", ("WHIMBREL_FAILOVERS", 50), draw) {
        let what = format!("run {run}: {set:?}, cut after {bytes} bytes");
        lose_the_link(Pair::begin(set), (set, bytes), &what);
        alone.expect_nothing_left(&what);
    }
}

/// The link breaks after so many bytes: both sides have a guest that is whole.
fn lose_the_link(pair: Pair, (set, bytes): (Set, u64), what: &str) {
    let (_events, primary_exits) = exits(&pair.primary);
    let (_events_too, secondary_exits) = exits(&pair.secondary);
    pair.relay.cut_after(bytes);
    // The primary goes on by itself; the secondary does not know whether it is dead.
    wait_for(&pair.primary, MigrationStatus::Completed);
    let exit = primary_exits.recv_timeout(vms::LIMIT).expect("it is told");
    assert_eq!(exit, (ColoMode::Primary, ColoExitReason::Error), "{what}");
    pair.primary.expect_reason(&["the secondary is lost"], what);
    pair.primary.expect_healthy(what);
    let exit = secondary_exits.recv_timeout(vms::LIMIT).expect("it is told");
    assert_eq!(exit, (ColoMode::Secondary, ColoExitReason::Error), "{what}");
    until(what, || pair.secondary.migrator.info().error_desc.is_some());
    pair.secondary.expect_reason(&["the primary is lost", "x-colo-lost-heartbeat"], what);
    assert_eq!(pair.secondary.status(), Some(MigrationStatus::Colo), "{what}");
    pair.secondary.migrator.cont().expect_err("it is not its guest yet");
    let Pair { primary, secondary, relay } = pair;
    primary.migrator.stop().expect("stops");
    secondary.migrator.colo_lost_heartbeat().expect("it waits for that");
    wait_for(&secondary, MigrationStatus::Completed);
    if !set.runs {
        secondary.migrator.cont().expect("it is here");
    }
    secondary.expect_healthy(what);
    // And it can be moved, or be kept in step, again.
    let capabilities = [(Capability::XColo, false), (Capability::Multifd, false)];
    secondary.migrator.set_capabilities(&capabilities).expect("nothing is under way");
    expect_movable(&secondary, &set.config(), what);
    drop((primary, secondary, relay, _events, _events_too));
}

fn ahead(side: &Side) -> u64 {
    side.migrator.info().colo.map_or(0, |colo| colo.ahead)
}

/// What a busy guest dirties goes ahead of its checkpoints, and the copy is still what the guest is.
#[test]
fn pages_go_ahead_of_a_checkpoint_and_the_copy_is_what_the_guest_is() {
    let alone = Alone::begin();
    for channels in [0, 2] {
        let set = Set { channels, delay: 150, busy: true, ..Set::default() };
        let what = format!("{set:?}");
        let Pair { primary, secondary, relay } = {
            let pair = Pair::begin(set);
            until("pages that went ahead", || ahead(&pair.primary) > 0);
            let before = ahead(&pair.primary);
            pair.expect_checkpoints(5);
            assert!(ahead(&pair.primary) > before, "{what}: again and again");
            pair.settle();
            pair
        };
        expect_same_ram(&primary, &secondary, &what);
        primary.migrator.cont().expect("runs on");
        primary.expect_healthy(&what);
        drop((primary, secondary, relay));
        alone.expect_nothing_left(&what);
    }
}

/// Most bytes are those of pages that go ahead: so a link that breaks at any byte mostly breaks in them.
#[test]
fn a_link_that_breaks_in_pages_that_go_ahead_leaves_both_sides_whole() {
    let alone = Alone::begin();
    let draw = |dice: &mut vms::Dice| {
        let channels = [0, 2][usize::from(dice.below(2) == 0)];
        let set =
            Set { channels, delay: 150, busy: true, runs: dice.below(2) == 0, ..Set::default() };
        (set, dice.below(40 << 20))
    };
    for (run, (set, bytes)) in drawn("colo-ahead", ("WHIMBREL_FAILOVERS", 8), draw) {
        let what = format!("run {run}: {set:?}, cut after {bytes} bytes");
        let pair = Pair::begin(set);
        until("pages that went ahead", || ahead(&pair.primary) > 0);
        lose_the_link(pair, (set, bytes), &what);
        alone.expect_nothing_left(&what);
    }
}

/// The survivor takes a new secondary without stopping.
#[test]
fn a_survivor_is_kept_in_step_with_again() {
    let alone = Alone::begin();
    {
        let Pair { primary, secondary, relay } = Pair::begin(Set::default());
        relay.cut();
        wait_for(&primary, MigrationStatus::Completed);
        assert!(primary.runs(), "it goes on alone");
        let status = primary.migrator.colo_status();
        assert_eq!((status.mode, status.last_mode), (ColoMode::None, ColoMode::Primary));
        drop((secondary, relay));
        let next = Side::waiting(&config(AccelChoice::Native), true);
        next.switch_on(&[Capability::ReturnPath, Capability::XColo]);
        primary.migrator.migrate(next.listen("tcp:127.0.0.1:0")).expect("it starts");
        wait_for(&next, MigrationStatus::Colo);
        wait_for(&primary, MigrationStatus::Colo);
        primary.migrator.colo_checkpoint().expect("in COLO");
        until("a checkpoint", || checkpoints(&next) > 0);
        next.migrator.colo_lost_heartbeat().expect("in COLO");
        wait_for(&next, MigrationStatus::Completed);
        primary.migrator.stop().expect("stops");
        next.expect_healthy("the second secondary");
    }
    alone.expect_nothing_left("a second secondary");
}

/// The fence says whether the primary runs no more.
#[test]
fn a_fence_lets_the_secondary_take_over_by_itself_or_not() {
    let alone = Alone::begin();
    for dead in [true, false] {
        let what = format!("the fence says {dead}");
        let config = config(AccelChoice::Native);
        let (primary, secondary) = (Side::running(&config), Side::waiting(&config, true));
        let asked = Arc::new(AtomicBool::new(false));
        let fence = asked.clone();
        secondary.migrator.set_fence(move || {
            fence.store(true, Ordering::SeqCst);
            if dead { Ok(()) } else { Err(VmError::new("the switch does not answer")) }
        });
        for side in [&primary, &secondary] {
            side.switch_on(&[Capability::ReturnPath, Capability::XColo]);
        }
        let relay = Relay::to(&secondary.listen("tcp:127.0.0.1:0"));
        primary.migrator.migrate(relay.address.clone()).expect("it starts");
        wait_for(&secondary, MigrationStatus::Colo);
        wait_for(&primary, MigrationStatus::Colo);
        primary.migrator.stop().expect("as if it had been fenced off");
        relay.cut();
        match dead {
            true => wait_for(&secondary, MigrationStatus::Completed),
            false => {
                until(&what, || secondary.migrator.info().error_desc.is_some());
                let parts = ["the primary is lost", "the switch does not answer"];
                secondary.expect_reason(&parts, &what);
                assert_eq!(secondary.status(), Some(MigrationStatus::Colo), "{what}");
                secondary.migrator.colo_lost_heartbeat().expect("a human knows better");
                wait_for(&secondary, MigrationStatus::Completed);
            }
        }
        assert!(asked.load(Ordering::SeqCst), "{what}");
        secondary.expect_healthy(&what);
        drop((primary, secondary, relay));
        alone.expect_nothing_left(&what);
    }
}

/// A standby has no guest, and gives the newest checkpoint to whoever runs it.
#[test]
fn a_standby_has_the_newest_checkpoint_when_the_primary_is_lost() {
    use whimbrel::kept::{KeptVm, Receiver};
    let alone = Alone::begin();
    for channels in [0, 2] {
        let what = format!("{channels} channels");
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("kept");
        let config = config(AccelChoice::Native);
        let primary = Side::running(&config);
        primary.switch_on(&[Capability::ReturnPath, Capability::XColo]);
        if channels > 0 {
            primary.switch_on(&[Capability::Multifd]);
        }
        let change = |p: &mut whimbrel::Parameters| {
            (p.x_checkpoint_delay, p.multifd_channels) = (20, channels.max(1));
        };
        primary.migrator.update_parameters(change).expect("allowed");
        let receiver = Receiver::bind(&"tcp:127.0.0.1:0".parse().expect("an address"));
        let receiver = receiver.expect("a port").with_multifd(channels);
        let Some(whimbrel::SocketAddressInfo::Inet { host, port }) = receiver.socket_address()
        else {
            panic!("tcp:");
        };
        let address = whimbrel::Address::Tcp { host, port: port.parse().expect("a port") };
        let relay = Relay::to(&address);
        let stood_by = std::thread::scope(|scope| {
            let standby = scope.spawn(|| receiver.stand_by(&path, &mut |_| {}));
            primary.migrator.migrate(relay.address.clone()).expect("it starts");
            wait_for(&primary, MigrationStatus::Colo);
            until("checkpoints", || checkpoints(&primary) > 5);
            relay.cut();
            standby.join().expect("it does not panic").expect("a checkpoint")
        });
        assert!(stood_by.checkpoints > 5, "{what}: {stood_by:?}");
        wait_for(&primary, MigrationStatus::Completed);
        primary.expect_healthy(&what);
        let next = Side::waiting(&config, true);
        let to = next.listen("tcp:127.0.0.1:0");
        let vm = KeptVm::open(&path).expect("a kept VM");
        vm.restoring().expect("an eventfd").send(&vm, &to).expect("it is taken in");
        let info = next.ended(&what);
        assert_eq!(info.status, Some(MigrationStatus::Completed), "{what}: {:?}", info.error_desc);
        next.expect_healthy(&what);
        drop((primary, next, relay));
        alone.expect_nothing_left(&what);
    }
}

/// As QEMU's: nothing goes on before it is told to.
#[test]
fn by_hand_both_wait_to_be_told() {
    let alone = Alone::begin();
    {
        let set = Set { failover: ColoFailover::Manual, delay: 20_000, ..Set::default() };
        let Pair { primary, secondary, relay } = Pair::begin(set);
        let (_events, told) = exits(&primary);
        relay.cut();
        let exit = told.recv_timeout(vms::LIMIT).expect("it is told");
        assert_eq!(exit, (ColoMode::Primary, ColoExitReason::Error));
        assert_eq!(primary.status(), Some(MigrationStatus::Colo));
        primary.migrator.colo_lost_heartbeat().expect("it waits for that");
        wait_for(&primary, MigrationStatus::Completed);
        primary.migrator.colo_lost_heartbeat().expect_err("it is over");
        primary.expect_healthy("by hand");
        secondary.migrator.end(); // Nobody takes it over.
        assert!(!secondary.vm.running(), "a copy that is nobody's stands still");
        secondary.migrator.colo_lost_heartbeat().expect_err("it is over");
        assert_eq!(secondary.migrator.run_state(), RunState::Inmigrate);
        drop((primary, secondary, relay, _events));
    }
    alone.expect_nothing_left("by hand");
}

/// `stop` and `cont` hold also when they come while a checkpoint is being taken.
#[test]
fn what_the_guest_is_told_in_a_checkpoint_is_done_behind_it() {
    let alone = Alone::begin();
    {
        let pair = Pair::begin(Set { delay: 1, ..Set::default() });
        for turn in 0..200 {
            let what = format!("turn {turn}");
            pair.primary.migrator.stop().expect("stops, or will");
            until(&what, || pair.primary.migrator.run_state() == RunState::Paused);
            pair.primary.migrator.cont().expect("runs on, or will");
            until(&what, || pair.primary.migrator.run_state() == RunState::Running);
        }
        pair.primary.expect_progress("told again and again");
        drop(pair);
    }
    alone.expect_nothing_left("told again and again");
}

/// What is not the same on both sides is refused before anything is lost.
#[test]
fn capability_x_colo_is_on_at_both_sides_or_at_none() {
    let alone = Alone::begin();
    for at_source in [true, false] {
        let config = config(AccelChoice::Native);
        let (source, destination) = (Side::running(&config), Side::waiting(&config, true));
        for (side, on) in [(&source, at_source), (&destination, !at_source)] {
            side.switch_on(&[Capability::ReturnPath]);
            if on {
                side.switch_on(&[Capability::XColo]);
            }
        }
        source.migrator.migrate(destination.listen("tcp:127.0.0.1:0")).expect("it starts");
        let what = format!("x-colo at the source: {at_source}");
        destination.expect_not_arrived(&["x-colo", "set the same on both sides"], &what);
        assert_eq!(source.ended(&what).status, Some(MigrationStatus::Failed), "{what}");
        source.expect_healthy(&what);
        source.migrator.colo_checkpoint().expect_err("it is not in COLO");
    }
    alone.expect_nothing_left("x-colo at one side");
}
