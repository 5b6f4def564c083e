//! The reference VM: memory, vCPU threads, serial port and state, behind the engine's [`Vm`].

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{Builder, JoinHandle};
use std::time::Duration;

use vmm_sys_util::signal::Killable;
use whimbrel::{DeviceState, Vm, VmError};
use whimbrel_ram::GuestRam;
use whimbrel_ram::dirty::DirtyLog;

use crate::build::build;
use crate::check::{self, SelfCheck};
use crate::config::{Accel, Config};
use crate::error::Error;
use crate::gate::Gate;
use crate::layout::Layout;
use crate::machine::Machine;
use crate::pace::Gap;
use crate::serial::{self, SerialPort};
use crate::software::{self, Software};
use crate::workload::Workload;
use crate::{accelerator, memory};

/// The machine type: source and destination must agree on it.
pub const MACHINE: &str = "whimbrel-vm-1";

/// How long [`pause`](Vm::pause) waits for a vCPU. It takes well under a millisecond on native
/// threads and a few on KVM; only a vCPU that waits for a page fault takes longer.
const PAUSE_LIMIT: Duration = Duration::from_secs(10);

/// Where a VM is in its life.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Phase {
    /// Waits for memory and state.
    Incoming,
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
    gate: Arc<Gate>,
    machine: Arc<dyn Machine>,
    serial: Arc<SerialPort>,
    dirty: Arc<dyn DirtyLog>,
    dirty_name: &'static str,
    gaps: Arc<[Gap]>,
    /// Held for as long as a change of phase takes, so that one comes after the other.
    phase: Mutex<Phase>,
    /// Counts what makes a check of a stopped guest void. Changed under `phase`.
    runs: AtomicU64,
    /// Replaced when a guest is loaded.
    layout: Mutex<Arc<Layout>>,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

impl ReferenceVm {
    /// Builds a VM: memory, guest and vCPU threads, which wait.
    pub fn new(config: Config) -> Result<Arc<ReferenceVm>, Error> {
        let layout = Arc::new(Layout::new(config.memory, config.vcpus, config.workload)?);
        let kvm = accelerator::open(config.accel)?;
        let ram = memory::map(&config)?;
        let serial = Arc::new(SerialPort::new(&config.serial)?);
        let gaps: Arc<[Gap]> = (0..config.vcpus).map(|_| Gap::default()).collect();
        let made = accelerator::make(&config, kvm.as_ref(), &ram, &layout, &serial, &gaps)?;
        if !config.incoming {
            build(&ram, &layout, config.fill)?;
            made.machine.install(&layout)?;
        }
        let vm = ReferenceVm {
            uuid: config.uuid,
            ram,
            gate: Arc::new(Gate::new(config.vcpus as usize)),
            machine: made.machine,
            serial,
            dirty: made.dirty,
            dirty_name: made.dirty_name,
            gaps,
            phase: Mutex::new(if config.incoming { Phase::Incoming } else { Phase::Stopped }),
            runs: AtomicU64::new(0),
            layout: Mutex::new(layout),
            threads: Mutex::new(Vec::new()),
        };
        for cpu in 0..config.vcpus {
            vm.start_thread(cpu)?;
        }
        // Once all have come to the gate, the VM is stopped for everyone to see.
        vm.pause_cpus().map_err(Error::Start)?;
        Ok(Arc::new(vm))
    }

    fn start_thread(&self, cpu: u32) -> Result<(), Error> {
        let name = format!("vcpu-{cpu}");
        let (gate, machine) = (Arc::clone(&self.gate), Arc::clone(&self.machine));
        let work = move || vcpu_thread(cpu, &gate, &*machine);
        let thread = Builder::new().name(name.clone()).spawn(work);
        lock(&self.threads).push(thread.map_err(|source| Error::Thread { name, source })?);
        Ok(())
    }

    fn pause_cpus(&self) -> Result<(), VmError> {
        match self.gate.close(PAUSE_LIMIT, || self.kick()) {
            0 => Ok(()),
            left => {
                let limit = PAUSE_LIMIT.as_secs();
                Err(VmError::new(format!("{left} vCPUs did not stop within {limit} s")))
            }
        }
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

    /// Whether the guest runs.
    pub fn running(&self) -> bool {
        *lock(&self.phase) == Phase::Running
    }

    /// Why a vCPU cannot go on, if so.
    pub fn failure(&self) -> Option<String> {
        self.gate.failure()
    }

    /// Forgets the longest gap between updates so far, to measure another.
    pub fn reset_gap(&self) {
        self.gaps.iter().for_each(Gap::reset);
    }

    /// What the guest has found of itself so far: cheap, at any time. Of a VM that still waits
    /// for its guest, nothing.
    pub fn guest_counters(&self) -> SelfCheck {
        if *lock(&self.phase) == Phase::Incoming {
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

    /// How often the guest was let run, or replaced.
    fn runs(&self) -> u64 {
        self.runs.load(Ordering::SeqCst)
    }

    fn layout(&self) -> Arc<Layout> {
        Arc::clone(&lock(&self.layout))
    }

    /// Gets the vCPU threads out of the guest.
    fn kick(&self) {
        if let Some(signal) = self.machine.kick() {
            for thread in lock(&self.threads).iter() {
                // A thread that has ended needs no kick.
                let _ended = thread.kill(signal);
            }
        }
    }

    /// Every device there is, in the order of its state.
    fn devices(&self) -> Vec<(&'static str, u32)> {
        let mut devices = vec![(software::DEVICE, 0)];
        devices.extend(self.machine.devices());
        devices.push((serial::DEVICE, 0));
        devices
    }
}

/// Runs a vCPU whenever the gate is open.
fn vcpu_thread(cpu: u32, gate: &Gate, machine: &dyn Machine) {
    /// A vCPU whose thread panics is held for good, so that nobody waits for it.
    struct Ended<'a>(u32, &'a Gate);
    impl Drop for Ended<'_> {
        fn drop(&mut self) {
            if std::thread::panicking() {
                self.1.fail(format!("vcpu-{}: its thread panicked", self.0));
                self.1.pass();
            }
        }
    }
    let _ended = Ended(cpu, gate);
    while gate.pass() {
        if let Err(error) = machine.run(cpu, gate) {
            gate.fail(format!("vcpu-{cpu}: {error}"));
            gate.sleep(None);
        }
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
        let mut phase = lock(&self.phase);
        self.pause_cpus()?;
        if *phase == Phase::Running {
            *phase = Phase::Stopped;
        }
        Ok(())
    }

    fn resume(&self) -> Result<(), VmError> {
        let mut phase = lock(&self.phase);
        if *phase == Phase::Incoming {
            return Err(VmError::new("there is no guest yet: its state has not been loaded"));
        }
        if let Some(failure) = self.gate.failure() {
            return Err(VmError::new(failure));
        }
        self.runs.fetch_add(1, Ordering::SeqCst);
        self.gate.open();
        *phase = Phase::Running;
        Ok(())
    }

    fn save(&self) -> Result<Vec<DeviceState>, VmError> {
        let phase = lock(&self.phase);
        if *phase != Phase::Stopped || !self.gate.closed() {
            return Err(VmError::new("the guest has to be stopped before its state is saved"));
        }
        if let Some(failure) = self.gate.failure() {
            return Err(VmError::new(failure));
        }
        let mut devices = vec![software::save(&self.layout(), self.accel())];
        devices.extend(self.machine.save()?);
        devices.push(self.serial.save());
        Ok(devices)
    }

    fn load(&self, devices: Vec<DeviceState>) -> Result<(), VmError> {
        let mut phase = lock(&self.phase);
        if *phase == Phase::Running {
            return Err(VmError::new("the guest has to be stopped before a state is loaded"));
        }
        // The workload first: what else does not fit follows from what it says.
        let software = find(&devices, (software::DEVICE, 0))?;
        let Software { layout } = software::parse(software, &self.layout(), self.accel())?;
        let known = self.devices();
        for device in &devices {
            let key = (&device.name[..], device.instance_id);
            if !known.contains(&key) {
                let (name, id) = key;
                return Err(VmError::new(format!("device {name}/{id}: this VM has none such")));
            }
        }
        let found = known.iter().map(|key| find(&devices, *key));
        let found = found.collect::<Result<Vec<_>, VmError>>()?;
        let serial = SerialPort::parse(found[found.len() - 1])?;
        let machine: Vec<DeviceState> =
            found[1..found.len() - 1].iter().map(|&device| device.clone()).collect();
        let layout = Arc::new(layout);
        self.machine.load(&layout, &machine)?;
        // Nothing below can fail.
        self.runs.fetch_add(1, Ordering::SeqCst);
        self.serial.set(&serial);
        *lock(&self.layout) = layout;
        *phase = Phase::Stopped;
        Ok(())
    }

    fn throttle(&self, percent: u8) {
        self.gate.set_throttle(percent);
    }
}

/// The one state of that device.
fn find<'a>(
    devices: &'a [DeviceState],
    (name, id): (&str, u32),
) -> Result<&'a DeviceState, VmError> {
    let mut all = devices.iter().filter(|device| device.name == name && device.instance_id == id);
    let one = all.next();
    let one =
        one.ok_or_else(|| VmError::new(format!("device {name}/{id}: its state is missing")))?;
    match all.next() {
        None => Ok(one),
        Some(_) => Err(VmError::new(format!("device {name}/{id}: its state is there twice"))),
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // What these guard is whole after every statement.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Drop for ReferenceVm {
    fn drop(&mut self) {
        /// A kick between two of a thread's system calls is repeated.
        const KICK_AGAIN: Duration = Duration::from_millis(1);
        self.gate.quit();
        while lock(&self.threads).iter().any(|thread| !thread.is_finished()) {
            self.kick();
            std::thread::sleep(KICK_AGAIN);
        }
        for thread in lock(&self.threads).drain(..) {
            // The gate knows of its panic, if it had one.
            let _panicked = thread.join();
        }
    }
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
