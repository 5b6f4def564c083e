//! A VMM whose devices load beside each other: they do, in precopy and in postcopy, and the first
//! that fails is named and leaves the guest at its source.

#[path = "support/vms.rs"]
mod vms;

use std::collections::BTreeSet;
use std::sync::{Arc, Barrier, Mutex};
use std::thread;

use vms::{Alone, Side, until};
use whimbrel::{
    Capability, DeviceState, LoadRule, Loaders, MigrationStatus, Migrator, Start, Vm, VmError,
};
use whimbrel_ram::GuestRam;
use whimbrel_ram::dirty::DirtyLog;
use whimbrel_vm::{AccelChoice, Config, Fill, ReferenceVm};

const RAM: &str = "vm.ram";
/// The page that devices look at.
const LOOKED_AT: u64 = 1000;

fn config() -> Config {
    let workload = "uniform,rate=5000,working-set=2M".parse().expect("a workload");
    let vcpus = 2;
    Config {
        accel: AccelChoice::Native,
        vcpus,
        workload,
        fill: Fill::Random,
        ..Config::new(8 << 20)
    }
}

/// A VMM of which two vCPUs are loaded at the same time, and then everything else in its order.
struct Meeting {
    vm: Arc<ReferenceVm>,
    /// Both have to be there before either goes on.
    both: Barrier,
    /// What was loaded, and by whom.
    loaded: Mutex<Vec<(String, String)>>,
    /// This one cannot be.
    broken: Option<&'static str>,
}

impl Vm for Meeting {
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
        self.vm.pause()
    }
    fn resume(&self) -> Result<(), VmError> {
        self.vm.resume()
    }
    fn save(&self) -> Result<Vec<DeviceState>, VmError> {
        self.vm.save()
    }
    fn load(&self, _: Vec<DeviceState>) -> Result<(), VmError> {
        Err(VmError::new("it has said how, and was asked otherwise"))
    }
    fn load_with(&self, loaders: Loaders, devices: Vec<DeviceState>) -> Result<(), VmError> {
        let rule = |device: &DeviceState| match device.name.as_str() {
            "vcpu" => LoadRule::beside_others(),
            _ => LoadRule::alone(),
        };
        loaders.load(devices.clone(), rule, |device| {
            if device.name == "vcpu" {
                // Where RAM is still to come it is waited for, by both.
                let (_, block) = self.vm.ram().find(RAM).expect("a block");
                block.load_u64(LOOKED_AT * 4096).expect("inside");
                self.both.wait();
            }
            let thread = thread::current().name().unwrap_or_default().to_owned();
            let name = format!("{}/{}", device.name, device.instance_id);
            if self.broken == Some(&name) {
                return Err(VmError::new("broken on purpose"));
            }
            self.loaded.lock().expect("no panic").push((name, thread));
            Ok(())
        })?;
        self.vm.load_with(loaders, devices)
    }
}

/// Moves a guest to such a VMM.
fn migrate(postcopy: bool, broken: Option<&'static str>) -> (Side, Side, Arc<Meeting>) {
    let source = Side::running(&config());
    let vm = ReferenceVm::new(Config { incoming: true, ..config() }).expect("a VM");
    let (both, loaded) = (Barrier::new(2), Mutex::default());
    let meeting = Arc::new(Meeting { vm: vm.clone(), both, loaded, broken });
    let migrator = Migrator::new(meeting.clone(), Start::Incoming { autostart: true });
    let destination = Side { vm, migrator };
    // With a channel for urgent pages the devices are loaded before the guest is given away.
    let way: &[Capability] = match postcopy {
        true => &[Capability::PostcopyRam, Capability::PostcopyPreempt],
        false => &[Capability::ReturnPath],
    };
    source.switch_on(way);
    destination.switch_on(way);
    source.migrator.update_parameters(|p| p.max_bandwidth = 0).expect("allowed");
    source.migrator.migrate(destination.listen("tcp:127.0.0.1:0")).expect("it starts");
    if postcopy {
        source.migrator.start_postcopy().expect("allowed");
    }
    (source, destination, meeting)
}

/// Where one processor has one thread, nothing can meet.
fn two_can_meet() -> bool {
    let meet = thread::available_parallelism().is_ok_and(|n| n.get() > 1);
    if !meet {
        eprintln!("skipped: a single processor");
    }
    meet
}

#[test]
fn devices_load_beside_each_other_with_ram_and_without() {
    for postcopy in [false, true] {
        if !two_can_meet() {
            return;
        }
        let alone = Alone::begin();
        {
            let what = format!("postcopy {postcopy}");
            let (source, destination, meeting) = migrate(postcopy, None);
            let info = destination.ended(&what);
            assert_eq!(info.status, Some(MigrationStatus::Completed), "{what}: {info:?}");
            let info = source.ended(&what);
            assert_eq!(info.status, Some(MigrationStatus::Completed), "{what}: {info:?}");
            let loaded = meeting.loaded.lock().expect("no panic").clone();
            let names: Vec<&str> = loaded.iter().map(|(name, _)| name.as_str()).collect();
            assert_eq!(names.len(), 4, "{what}: {names:?}");
            assert_eq!((names[0], names[3]), ("workload/0", "serial/0"), "{what}: {names:?}");
            let vcpus: BTreeSet<&str> = names[1..3].iter().copied().collect();
            assert_eq!(vcpus, BTreeSet::from(["vcpu/0", "vcpu/1"]), "{what}");
            let threads: BTreeSet<&str> = loaded[1..3].iter().map(|(_, by)| by.as_str()).collect();
            let caller = if postcopy { "dest/load" } else { "dest/main" };
            assert_eq!(threads, BTreeSet::from([caller, "dest/load-1"]), "{what}");
            destination.expect_healthy(&what);
        }
        alone.expect_nothing_left("devices loaded beside each other");
    }
}

#[test]
fn the_first_that_fails_is_named_and_the_guest_stays() {
    for (postcopy, broken) in [(false, "vcpu/1"), (true, "vcpu/1"), (false, "serial/0")] {
        if !two_can_meet() {
            return;
        }
        let alone = Alone::begin();
        {
            let what = format!("postcopy {postcopy}, {broken}");
            let (source, destination, _) = migrate(postcopy, Some(broken));
            until(&format!("{what}: it fails"), || {
                destination.status() == Some(MigrationStatus::Failed)
            });
            let error = destination.migrator.info().error_desc.expect("says why");
            assert_eq!(error, format!("loading the devices: device {broken}: broken on purpose"));
            let info = source.ended(&what);
            assert_eq!(info.status, Some(MigrationStatus::Failed), "{what}: {info:?}");
            assert!(!destination.runs(), "{what}");
            source.expect_healthy(&what);
        }
        alone.expect_nothing_left("devices that do not load");
    }
}
