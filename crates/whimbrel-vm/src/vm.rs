//! The reference VM: memory, vCPU threads, serial port and state, behind the engine's [`Vm`].

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use whimbrel::{DeviceState, Loaders, Vm, VmError};
use whimbrel_ram::GuestRam;
use whimbrel_ram::dirty::DirtyLog;

use crate::build::build;
use crate::check::{self, SelfCheck};
use crate::config::{Accel, Config};
use crate::error::Error;
use crate::layout::{Layout, WritablePages};
use crate::machine::Machine;
use crate::net::{self, Nic};
use crate::pace::{Gap, Progress};
use crate::serial::{self, SerialPort};
use crate::software;
use crate::vcpus::Vcpus;
use crate::workload::Workload;
use crate::{accelerator, loading, memory};

/// The machine type: source and destination must agree on it.
pub const MACHINE: &str = "whimbrel-vm-1";

/// Where a VM is in its life.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Phase {
    /// Waits for memory and state.
    Incoming,
    /// Its state is being loaded.
    Loading,
    /// Has a guest, stopped.
    Stopped,
    /// Has a guest that runs.
    Running,
}

/// A virtual machine whose guest checks its own memory.
///
/// It starts stopped: [`resume`](Vm::resume) runs it. Dropping it ends its vCPUs.
pub struct ReferenceVm {
    uuid: Option<[u8; 16]>,
    ram: GuestRam,
    vcpus: Vcpus,
    pub(crate) machine: Arc<dyn Machine>,
    pub(crate) serial: Arc<SerialPort>,
    dirty: Arc<dyn DirtyLog>,
    dirty_name: &'static str,
    gaps: Arc<[Gap]>,
    nic: Option<Arc<Nic>>,
    /// Held for as long as a change of phase takes, so that one comes after the other. That may
    /// be long: a vCPU that waits for a page is waited for. Who only wants to know does not.
    changing: Mutex<()>,
    phase: Mutex<Phase>,
    /// Counts what makes a check of a stopped guest void. Changed under `phase`.
    runs: AtomicU64,
    /// Replaced when a guest is loaded.
    layout: Mutex<Arc<Layout>>,
}

impl ReferenceVm {
    /// Builds a VM: memory, guest and vCPU threads, which wait.
    pub fn new(config: Config) -> Result<Arc<ReferenceVm>, Error> {
        let network = config.network.is_some();
        let layout = Layout::new(config.memory, config.vcpus, config.workload)?;
        let layout = Arc::new(layout.with_network(network));
        let kvm = accelerator::open(config.accel, network)?;
        let ram = memory::map(&config)?;
        let serial = Arc::new(SerialPort::new(&config.serial)?);
        let gaps: Arc<[Gap]> = (0..config.vcpus).map(|_| Gap::default()).collect();
        let nic = config.network.map(|network| Arc::new(Nic::new(network)));
        let made =
            accelerator::make(&config, kvm.as_ref(), &ram, &layout, &serial, &gaps, nic.as_ref())?;
        if !config.incoming {
            build(&ram, &layout, &config.fill)?;
            made.machine.install(&layout)?;
        }
        let vcpus = Vcpus::start(config.vcpus, network, Arc::clone(&made.machine))?;
        nic.iter().for_each(|nic| nic.wakes(vcpus.gate()));
        let vm = ReferenceVm {
            uuid: config.uuid,
            ram,
            vcpus,
            machine: made.machine,
            serial,
            dirty: made.dirty,
            dirty_name: made.dirty_name,
            gaps,
            nic,
            changing: Mutex::default(),
            phase: Mutex::new(if config.incoming { Phase::Incoming } else { Phase::Stopped }),
            runs: AtomicU64::new(0),
            layout: Mutex::new(layout),
        };
        // One that waits has nothing there that could be missed.
        if let Some(path) = config.memory_path.as_ref().filter(|_| !config.incoming) {
            whimbrel::rescue::describe(path, &vm, None).map_err(Error::Describe)?;
        }
        Ok(Arc::new(vm))
    }

    /// What runs the vCPUs.
    pub fn accel(&self) -> Accel {
        self.machine.accel()
    }

    /// Which dirty log this VM has, by its name on the command line.
    pub fn dirty_log_name(&self) -> &'static str {
        self.dirty_name
    }

    /// What the guest does.
    pub fn workload(&self) -> Workload {
        self.layout().workload
    }

    /// What the guest has written to its serial port lately.
    pub fn serial_output(&self) -> String {
        self.serial.text()
    }

    /// Its network device, if it has one.
    pub fn nic(&self) -> Option<&Arc<Nic>> {
        self.nic.as_ref()
    }

    /// Whether the guest runs.
    pub fn running(&self) -> bool {
        *lock(&self.phase) == Phase::Running
    }

    /// Why a vCPU cannot go on, if so.
    pub fn failure(&self) -> Option<String> {
        self.vcpus.gate().failure()
    }

    /// The pages that the guest writes, whatever it does next; it leaves all others as they are.
    pub fn writable_pages(&self) -> Vec<WritablePages> {
        self.layout().writable()
    }

    /// What the guest has done on this host: cheap, at any time, without a look at its memory, so
    /// also while pages of it are missing.
    pub fn progress(&self) -> Progress {
        Progress::of(&self.gaps)
    }

    /// Tells the vCPUs to end for good, waits for that as long as `limit`, and gives how many have
    /// not: they wait for pages that are missing. Dropping the VM would wait for them, too.
    pub fn halt(&self, limit: Duration) -> usize {
        self.vcpus.end(limit)
    }

    /// Forgets the longest gap between updates so far, to measure another.
    pub fn reset_gap(&self) {
        self.gaps.iter().for_each(Gap::reset);
    }

    /// What the guest has found of itself so far: cheap, also while it runs. Of a VM that still
    /// waits for its guest, nothing. It is in the guest's memory: who asks while pages of that are
    /// missing waits for them, and may ask for the [`progress`](ReferenceVm::progress) instead.
    pub fn guest_counters(&self) -> SelfCheck {
        if [Phase::Incoming, Phase::Loading].contains(&*lock(&self.phase)) {
            return SelfCheck::default();
        }
        self.with_gap(check::guest_counters(&self.ram, &self.layout()))
    }

    /// As [`guest_counters`](ReferenceVm::guest_counters), and while the guest is stopped after a
    /// check of every page of its working set, 4 GB of it a second. Nobody waits for that check:
    /// should the guest run before it is done, its result is thrown away for the guest's own.
    pub fn self_check(&self) -> SelfCheck {
        let stopped = || (*lock(&self.phase) == Phase::Stopped).then(|| self.runs());
        let before = stopped();
        if before.is_some() {
            let found = check::full(&self.ram, &self.layout());
            if stopped() == before {
                return self.with_gap(found);
            }
        }
        self.guest_counters()
    }

    fn with_gap(&self, found: SelfCheck) -> SelfCheck {
        let gap_max = self.gaps.iter().map(Gap::max).max().unwrap_or_default();
        SelfCheck { gap_max, ..found }
    }

    /// From here on nobody runs it or saves it, until its devices are loaded. Gives where it was.
    fn begin_load(&self) -> Result<Phase, VmError> {
        let _changing = lock(&self.changing);
        let mut phase = lock(&self.phase);
        match *phase {
            Phase::Incoming | Phase::Stopped => Ok(std::mem::replace(&mut *phase, Phase::Loading)),
            Phase::Loading => Err(VmError::new("another state is being loaded")),
            Phase::Running => {
                Err(VmError::new("the guest has to be stopped before a state is loaded"))
            }
        }
    }

    /// Loads the devices of a machine that is `Loading`. No lock is held meanwhile: they may wait
    /// for pages of RAM that are still to come.
    fn load_devices(&self, loaders: Loaders, devices: Vec<DeviceState>) -> Result<(), VmError> {
        let loaded = loading::load(self, loaders, devices)?;
        let _changing = lock(&self.changing);
        let mut phase = lock(&self.phase);
        // Nothing below can fail.
        self.runs.fetch_add(1, Ordering::SeqCst);
        *lock(&self.layout) = loaded.install();
        *phase = Phase::Stopped;
        Ok(())
    }

    /// How often the guest was let run, or replaced.
    fn runs(&self) -> u64 {
        self.runs.load(Ordering::SeqCst)
    }

    pub(crate) fn layout(&self) -> Arc<Layout> {
        Arc::clone(&lock(&self.layout))
    }

    /// Every device there is, in the order of its state.
    pub(crate) fn devices(&self) -> Vec<(&'static str, u32)> {
        let mut devices = vec![(software::DEVICE, 0)];
        devices.extend(self.machine.devices());
        devices.push((serial::DEVICE, 0));
        if self.nic.is_some() {
            devices.push((net::DEVICE, 0));
        }
        devices
    }
}

impl Vm for ReferenceVm {
    fn machine(&self) -> String {
        MACHINE.to_owned()
    }

    fn uuid(&self) -> Option<[u8; 16]> {
        self.uuid
    }

    fn ram_is_fresh(&self) -> bool {
        // A VM that waits writes nothing to its memory.
        *lock(&self.phase) == Phase::Incoming
    }

    fn ram(&self) -> &GuestRam {
        &self.ram
    }

    fn dirty_log(&self) -> &dyn DirtyLog {
        &*self.dirty
    }

    fn pause(&self) -> Result<(), VmError> {
        let _changing = lock(&self.changing);
        let running = self.running();
        if let Err(error) = self.vcpus.pause() {
            // Those that did stop go on: it is a guest that runs, or else one that stands still.
            if running {
                self.vcpus.gate().open();
            }
            return Err(error);
        }
        if running {
            *lock(&self.phase) = Phase::Stopped;
        }
        Ok(())
    }

    fn resume(&self) -> Result<(), VmError> {
        let _changing = lock(&self.changing);
        let mut phase = lock(&self.phase);
        if [Phase::Incoming, Phase::Loading].contains(&*phase) {
            return Err(VmError::new("there is no guest yet: its state has not been loaded"));
        }
        if let Some(failure) = self.vcpus.gate().failure() {
            return Err(VmError::new(failure));
        }
        self.runs.fetch_add(1, Ordering::SeqCst);
        self.vcpus.gate().open();
        *phase = Phase::Running;
        Ok(())
    }

    fn save(&self) -> Result<Vec<DeviceState>, VmError> {
        let _changing = lock(&self.changing);
        if *lock(&self.phase) != Phase::Stopped || !self.vcpus.gate().closed() {
            return Err(VmError::new("the guest has to be stopped before its state is saved"));
        }
        if let Some(failure) = self.vcpus.gate().failure() {
            return Err(VmError::new(failure));
        }
        let mut devices = vec![software::save(&self.layout(), self.accel())];
        devices.extend(self.machine.save()?);
        devices.push(self.serial.save());
        devices.extend(self.nic.iter().map(|nic| nic.save()));
        Ok(devices)
    }

    fn load(&self, devices: Vec<DeviceState>) -> Result<(), VmError> {
        self.load_with(Loaders::one(), devices)
    }

    fn load_with(&self, loaders: Loaders, devices: Vec<DeviceState>) -> Result<(), VmError> {
        let before = self.begin_load()?;
        match self.load_devices(loaders, devices) {
            Ok(()) => Ok(()),
            Err(error) => {
                *lock(&self.phase) = before;
                Err(error)
            }
        }
    }

    fn vcpu_threads(&self) -> Vec<u32> {
        self.vcpus.ids()
    }

    fn throttle(&self, percent: u8) {
        self.vcpus.gate().set_throttle(percent);
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // What these guard is whole after every statement.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl fmt::Debug for ReferenceVm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ReferenceVm")
            .field("accel", &self.accel())
            .field("ram", &self.ram)
            .field("phase", &*lock(&self.phase))
            .finish_non_exhaustive()
    }
}
