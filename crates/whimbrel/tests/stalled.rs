//! A VMM that takes long over what the engine asks of it, and a source that falls silent in a
//! postcopy: whoever asks the engine is answered at once.

#[path = "support/far_source.rs"]
mod far_source;
#[path = "support/vms.rs"]
mod vms;

use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use far_source::FarSource;
use vms::{Alone, Side, until};
use whimbrel::{Capability, DeviceState, MigrationStatus, Migrator, Start, Vm, VmError};
use whimbrel_ram::GuestRam;
use whimbrel_ram::dirty::DirtyLog;
use whimbrel_vm::{AccelChoice, Config, Fill, ReferenceVm};
use whimbrel_wire::{Command, ReturnMessage};

/// What an answer may take on a machine that is busy with other tests. Whatever waited for what does
/// not come would take for ever.
const ANSWER: Duration = Duration::from_secs(10);

fn config() -> Config {
    let workload = "uniform,rate=5000,working-set=2M".parse().expect("a workload");
    Config { accel: AccelChoice::Native, workload, fill: Fill::Random, ..Config::new(8 << 20) }
}

/// What the engine asks a VMM to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Asked {
    Pause,
    Save,
    Load,
    Resume,
}

/// A VMM that does not come back from one of these until it is let.
struct Slow {
    vm: Arc<ReferenceVm>,
    over: Asked,
    /// Whether it is at it, and whether it may come back.
    state: Mutex<(bool, bool)>,
    changed: Condvar,
}

impl Slow {
    fn of(vm: Arc<ReferenceVm>, over: Asked) -> Arc<Slow> {
        Arc::new(Slow { vm, over, state: Mutex::default(), changed: Condvar::new() })
    }

    fn is_at(&self, asked: Asked) {
        if asked != self.over {
            return;
        }
        let mut state = self.state.lock().expect("no panic");
        state.0 = true;
        while !state.1 {
            state = self.changed.wait(state).expect("no panic");
        }
    }

    fn is_at_it(&self) -> bool {
        self.state.lock().expect("no panic").0
    }

    fn let_it(&self) {
        self.state.lock().expect("no panic").1 = true;
        self.changed.notify_all();
    }
}

impl Vm for Slow {
    fn machine(&self) -> String {
        self.vm.machine()
    }
    fn ram(&self) -> &GuestRam {
        self.vm.ram()
    }
    fn dirty_log(&self) -> &dyn DirtyLog {
        self.vm.dirty_log()
    }
    fn pause(&self) -> Result<(), VmError> {
        self.is_at(Asked::Pause);
        self.vm.pause()
    }
    fn resume(&self) -> Result<(), VmError> {
        self.is_at(Asked::Resume);
        self.vm.resume()
    }
    fn save(&self) -> Result<Vec<DeviceState>, VmError> {
        self.is_at(Asked::Save);
        self.vm.save()
    }
    fn load(&self, devices: Vec<DeviceState>) -> Result<(), VmError> {
        self.is_at(Asked::Load);
        self.vm.load(devices)
    }
}

fn at_once<T>(what: &str, ask: impl FnOnce() -> T) -> T {
    let asked = Instant::now();
    let answer = ask();
    assert!(asked.elapsed() < ANSWER, "{what}: took {:?}", asked.elapsed());
    answer
}

/// Whatever can be asked and changed is, while the VMM or the source does not come back.
fn expect_answers(migrator: &Migrator, what: &str) {
    for _ in 0..20 {
        at_once(&format!("{what}: run state"), || migrator.run_state());
        at_once(&format!("{what}: report"), || migrator.info());
        at_once(&format!("{what}: capabilities"), || migrator.capabilities());
        at_once(&format!("{what}: parameters"), || migrator.parameters());
    }
    at_once(&format!("{what}: setting"), || {
        migrator.update_parameters(|p| p.max_bandwidth = 1 << 30)
    })
    .expect("allowed");
    at_once(&format!("{what}: switching"), || {
        migrator.set_capabilities(&[(Capability::Events, true)])
    })
    .expect_err("not while it runs");
    let address = "tcp:127.0.0.1:1".parse().expect("an address");
    at_once(&format!("{what}: another"), || migrator.migrate(address)).expect_err("one at a time");
}

fn slow(over: Asked, incoming: bool) -> (Side, Arc<Slow>) {
    let vm = ReferenceVm::new(Config { incoming, ..config() }).expect("a VM");
    // The guest runs before it is slow.
    let slow = Slow::of(vm.clone(), over);
    let start = if incoming { Start::Incoming { autostart: true } } else { Start::Paused };
    let migrator = Migrator::new(slow.clone(), start);
    (Side { vm, migrator }, slow)
}

#[test]
fn a_source_whose_vmm_takes_long_in_the_switchover_answers_at_once() {
    for over in [Asked::Pause, Asked::Save] {
        let what = format!("{over:?}");
        let alone = Alone::begin();
        {
            let (source, slow) = slow(over, false);
            source.migrator.cont().expect("runs");
            let destination = Side::waiting(&config(), true);
            source.migrator.migrate(destination.listen("tcp:127.0.0.1:0")).expect("it starts");
            until(&format!("{what}: begun"), || slow.is_at_it());
            expect_answers(&source.migrator, &what);
            // It is to stand still, and does already, or will: nobody waits for that.
            at_once(&format!("{what}: stop"), || source.migrator.stop()).expect("noted");
            at_once(&format!("{what}: cont"), || source.migrator.cont()).expect_err("it goes away");
            at_once(&format!("{what}: cancel"), || source.migrator.cancel()).expect("begun");
            slow.let_it();
            let info = source.ended(&what);
            assert_eq!(info.status, Some(MigrationStatus::Cancelled), "{what}: {info:?}");
            assert!(!source.runs(), "{what}: it was told to stop");
            source.migrator.cont().expect("runs on");
            source.expect_healthy(&what);
        }
        alone.expect_nothing_left(&what);
    }
}

#[test]
fn a_destination_whose_vmm_takes_long_answers_at_once() {
    for over in [Asked::Load, Asked::Resume] {
        let what = format!("{over:?}");
        let alone = Alone::begin();
        {
            let (destination, slow) = slow(over, true);
            let source = Side::running(&config());
            source.switch_on(&[Capability::ReturnPath]);
            source.migrator.update_parameters(|p| p.max_bandwidth = 0).expect("allowed");
            source.migrator.migrate(destination.listen("tcp:127.0.0.1:0")).expect("it starts");
            until(&format!("{what}: begun"), || slow.is_at_it());
            expect_answers(&destination.migrator, &what);
            expect_answers(&source.migrator, &format!("{what}, at the source"));
            slow.let_it();
            let info = destination.ended(&what);
            assert_eq!(info.status, Some(MigrationStatus::Completed), "{what}: {info:?}");
            source.ended(&what);
            destination.expect_healthy(&what);
        }
        alone.expect_nothing_left(&what);
    }
}

/// What a source says of a postcopy before it falls silent.
type Silence = (&'static str, fn(&mut FarSource));

#[test]
fn a_source_that_falls_silent_around_its_package_holds_up_nothing() {
    let silences: [Silence; 5] = [
        ("before the package", |source| {
            source.begin().part().page("vm.ram", 0).end_section();
        }),
        ("in the package's header", |source| {
            source.begin().part().page("vm.ram", 0).end_section();
            Command::Packaged { len: 5000 }.encode(&mut source.words);
            let cut = source.words.len() - 2;
            source.words.truncate(cut);
        }),
        ("in the package's first section", |source| {
            source.begin().part().page("vm.ram", 0).end_section();
            let package = source.package();
            source.packaged(&package);
            let cut = source.words.len() - package.len() + 60;
            source.words.truncate(cut);
        }),
        ("in the package's last section", |source| {
            source.guest();
            let cut = source.words.len() - 40;
            source.words.truncate(cut);
        }),
        ("before RUN", |source| {
            source.guest();
            let cut = source.words.len() - 5;
            source.words.truncate(cut);
        }),
    ];
    for (name, silence) in silences {
        for preempt in [false, true] {
            let what = format!("{name}, preempt {preempt}");
            let alone = Alone::begin();
            {
                let destination = waiting_for_postcopy(preempt);
                let mut source =
                    FarSource::connect(&destination.listen("tcp:127.0.0.1:0"), &config());
                silence(&mut source);
                source.send();
                std::thread::sleep(Duration::from_millis(30));
                expect_answers(&destination.migrator, &what);
                at_once(&format!("{what}: yank"), || destination.migrator.yank()).expect("begun");
                let info = destination.ended(&what);
                assert_eq!(info.status, Some(MigrationStatus::Failed), "{what}: {info:?}");
                assert!(!destination.runs(), "{what}");
            }
            alone.expect_nothing_left(&what);
        }
    }
}

fn waiting_for_postcopy(preempt: bool) -> Side {
    let destination = Side::waiting(&config(), true);
    destination.switch_on(&[Capability::PostcopyRam]);
    if preempt {
        destination.switch_on(&[Capability::PostcopyPreempt]);
    }
    destination
}

#[test]
fn a_source_that_falls_silent_in_a_page_behind_its_guest_holds_up_nothing() {
    for preempt in [false, true] {
        let what = format!("preempt {preempt}");
        let mut alone = Alone::begin();
        let destination = waiting_for_postcopy(preempt);
        let mut source = FarSource::connect(&destination.listen("tcp:127.0.0.1:0"), &config());
        source.guest().part().page("vm.ram", 1);
        let cut = source.words.len() - 1000;
        source.words.truncate(cut);
        source.send();
        assert!(source.hears(&ReturnMessage::Pong(0x42)), "{what}: it has loaded the guest");
        until(&format!("{what}: its guest runs"), || {
            destination.status() == Some(MigrationStatus::PostcopyActive)
        });
        expect_answers(&destination.migrator, &what);
        at_once(&format!("{what}: cancel"), || destination.migrator.cancel())
            .expect_err("too late");
        at_once(&format!("{what}: pause"), || destination.migrator.pause()).expect("begun");
        until(&format!("{what}: it pauses"), || {
            destination.status() == Some(MigrationStatus::PostcopyPaused)
        });
        destination.migrator.end();
        drop(source);
        alone.keeps_a_guest(destination);
        alone.expect_nothing_left(&what);
    }
}
