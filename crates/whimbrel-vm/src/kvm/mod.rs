//! vCPUs on KVM.
#![expect(unsafe_code, reason = "tells KVM where guest memory lies")]

mod boot;
mod dirty;
mod guest;
mod kick;
mod msrs;
mod state;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kvm_bindings::{
    CpuId, KVM_API_VERSION, KVM_CAP_SPLIT_IRQCHIP, KVM_CLOCK_REALTIME, KVM_EXIT_DIRTY_RING_FULL,
    KVM_MAX_CPUID_ENTRIES, kvm_clock_data, kvm_enable_cap, kvm_userspace_memory_region,
};
use kvm_ioctls::{Cap, Error as Errno, Kvm, VcpuExit, VcpuFd, VmFd};
use whimbrel::{DeviceState, VmError};
use whimbrel_ram::dirty::DirtyLog;
use whimbrel_ram::{BlockIndex, GuestRam};
use zerocopy::{FromBytes, IntoBytes};

use crate::config::{Accel, DirtyKind};
use crate::error::Error;
use crate::gate::Gate;
use crate::guarded;
use crate::layout::Layout;
use crate::machine::{LoadMachine, Machine, VCPU, machine_check};
use crate::pace::{Gap, Pace};
use crate::serial::{self, SerialPort};
use crate::state::{Fields, Tag, Writer};

use dirty::{KvmDirty, RingWatch};
use guest::DOORBELL;
use kick::Kick;
use msrs::KvmMsrs;
use state::{Abilities, CpuState};

/// The device of KVM's clock.
pub(crate) const CLOCK: &str = "clock";
const CLOCK_DATA: Tag = Tag(1, "clock-data");

/// Three pages below 4 GiB that KVM on Intel needs for itself.
const TSS_ADDRESS: usize = 0xfffb_d000;
/// The interrupt routes of the (absent) I/O APIC in a split interrupt controller.
const ROUTES: u64 = 24;

struct Cpu {
    fd: VcpuFd,
    layout: Arc<Layout>,
}

/// vCPUs on KVM.
pub(crate) struct KvmMachine {
    serial: Arc<SerialPort>,
    gaps: Arc<[Gap]>,
    abilities: Abilities,
    /// Fields are dropped in this order: these before the vCPUs whose memory they point into.
    kicks: Vec<Kick>,
    cpus: Vec<Mutex<Cpu>>,
    dirty: KvmDirty,
    vm: VmFd,
    /// After the VM that is given its memory.
    ram: GuestRam,
}

/// What failed, as an error that says what to do.
fn unusable(problem: impl Into<String>) -> Error {
    let remedy = "take --accel native, or a host with KVM";
    Error::Kvm { problem: problem.into(), remedy }
}

fn failed(name: &'static str) -> impl Fn(Errno) -> Error {
    move |error| unusable(format!("{name}: {error}"))
}

/// Opens `/dev/kvm`, if we may and it is one that can run this VM.
pub(crate) fn open() -> Result<Kvm, Error> {
    let kvm = Kvm::new().map_err(|error| {
        let remedy = match error.errno() {
            libc::EACCES | libc::EPERM => "join its group (often kvm), or take --accel native",
            libc::ENOENT | libc::ENODEV => "load the kernel's KVM module, or take --accel native",
            _ => "take --accel native",
        };
        Error::Kvm { problem: error.to_string(), remedy }
    })?;
    if u32::try_from(kvm.get_api_version()) != Ok(KVM_API_VERSION) {
        return Err(unusable(format!("its API has version {}", kvm.get_api_version())));
    }
    // Everything without which state would be lost on the way.
    let needed = [
        (Cap::UserMemory, "user memory"),
        (Cap::ImmediateExit, "immediate exit"),
        (Cap::SplitIrqchip, "a split interrupt controller"),
        (Cap::MpState, "MP state"),
        (Cap::VcpuEvents, "vCPU events"),
        (Cap::Debugregs, "debug registers"),
        (Cap::Xsave, "XSAVE"),
        (Cap::Xcrs, "XCRs"),
        (Cap::GetTscKhz, "the TSC's frequency"),
        (Cap::AdjustClock, "the clock"),
    ];
    match needed.into_iter().find(|(cap, _)| !kvm.check_extension(*cap)) {
        None => Ok(kvm),
        Some((_, name)) => Err(unusable(format!("it lacks {name}"))),
    }
}

impl KvmMachine {
    /// Makes the VM and its vCPUs, ready to start.
    pub(crate) fn new(
        kvm: &Kvm,
        ram: &GuestRam,
        layout: &Arc<Layout>,
        serial: &Arc<SerialPort>,
        gaps: &Arc<[Gap]>,
        dirty: DirtyKind,
    ) -> Result<KvmMachine, Error> {
        let vm = kvm.create_vm().map_err(failed("KVM_CREATE_VM"))?;
        if kvm.check_extension(Cap::SetTssAddr) {
            vm.set_tss_address(TSS_ADDRESS).map_err(failed("KVM_SET_TSS_ADDR"))?;
        }
        // A local APIC in the kernel, and nothing that interrupts through it.
        let mut split = kvm_enable_cap { cap: KVM_CAP_SPLIT_IRQCHIP, ..Default::default() };
        split.args[0] = ROUTES;
        vm.enable_cap(&split).map_err(failed("KVM_CAP_SPLIT_IRQCHIP"))?;
        give_memory(&vm, ram)?;
        // Before the vCPUs: their rings are made with them.
        let dirty = KvmDirty::new(dirty, &vm, ram)?;
        let cpuid = kvm
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .map_err(failed("KVM_GET_SUPPORTED_CPUID"))?;
        let mut kicks = Vec::new();
        let mut cpus = Vec::new();
        let mut abilities = None;
        for id in 0..layout.vcpus {
            let mut fd = vm.create_vcpu(u64::from(id)).map_err(failed("KVM_CREATE_VCPU"))?;
            fd.set_cpuid2(&own_cpuid(&cpuid, id)).map_err(failed("KVM_SET_CPUID2"))?;
            if abilities.is_none() {
                let msrs = KvmMsrs::of(kvm, &fd).map_err(|error| unusable(error.to_string()))?;
                abilities = Some(Abilities::of(&vm, msrs));
            }
            boot::reset(&fd, layout, id).map_err(failed("setting up a vCPU"))?;
            dirty.add_vcpu(&fd)?;
            kicks.push(Kick::of(&mut fd));
            cpus.push(Mutex::new(Cpu { fd, layout: Arc::clone(layout) }));
        }
        Ok(KvmMachine {
            ram: ram.clone(),
            serial: Arc::clone(serial),
            gaps: Arc::clone(gaps),
            abilities: abilities.expect("there is at least one vCPU"),
            kicks,
            cpus,
            dirty,
            vm,
        })
    }

    /// What sees the guest's writes, and its name. The VMM itself writes nothing to the memory of
    /// a guest that runs: what it emulates does not reach memory.
    pub(crate) fn dirty_log(&self) -> (Arc<dyn DirtyLog>, &'static str) {
        self.dirty.log()
    }

    fn cpu(&self, id: u32) -> MutexGuard<'_, Cpu> {
        self.cpus[id as usize].lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn port_out(&self, port: u16, data: &[u8]) {
        if let Some(register) = serial_register(port)
            && let [value] = data
        {
            self.serial.write(register, *value);
        }
    }

    fn port_in(&self, port: u16, data: &mut [u8]) {
        // Where nothing answers, the bus reads as ones.
        data.fill(0xff);
        if let Some(register) = serial_register(port)
            && let [value] = data
        {
            *value = self.serial.read(register);
        }
    }

    /// The memory at an address of the guest's.
    fn lies_at(&self, address: u64) -> Option<(BlockIndex, u64)> {
        self.ram.blocks().find_map(|(index, block)| {
            let offset = address.checked_sub(block.guest_address())?;
            (offset < block.len()).then_some((index, offset))
        })
    }

    /// The memory at an address of this process.
    fn mapped_at(&self, address: usize) -> Option<(BlockIndex, u64)> {
        self.ram.blocks().find_map(|(index, block)| {
            let offset = address.checked_sub(block.host_address().as_ptr().addr())? as u64;
            (offset < block.len()).then_some((index, offset))
        })
    }

    fn states(&self) -> Result<Vec<CpuState>, VmError> {
        let get = |(id, gap): (u32, &Gap)| {
            let mut state = CpuState::get(&self.cpu(id).fd, &self.abilities)
                .map_err(|error| VmError::new(format!("vcpu-{id}: {error}")))?;
            state.gap = gap.get();
            Ok(state)
        };
        (0..).zip(self.gaps.iter()).map(get).collect()
    }

    fn set_state(&self, id: u32, state: &CpuState) -> Result<(), VmError> {
        state.set(&self.cpu(id).fd, &self.abilities)?;
        self.gaps[id as usize].set(state.gap);
        Ok(())
    }

    fn clock(&self) -> Result<kvm_clock_data, VmError> {
        self.vm.get_clock().map_err(|error| VmError::new(format!("KVM_GET_CLOCK: {error}")))
    }

    fn set_clock(&self, clock: kvm_clock_data) -> Result<(), VmError> {
        // With the real time of the moment it was read at, KVM adds what has passed since. The
        // other flags are only ever told, not taken.
        let takes = self.vm.check_extension_int(Cap::AdjustClock).cast_unsigned();
        let flags = clock.flags & KVM_CLOCK_REALTIME & takes;
        let clock = kvm_clock_data { flags, ..clock };
        self.vm.set_clock(&clock).map_err(|error| VmError::new(format!("KVM_SET_CLOCK: {error}")))
    }
}

impl Machine for KvmMachine {
    fn accel(&self) -> Accel {
        Accel::Kvm
    }

    fn install(&self, layout: &Layout) -> Result<(), Error> {
        boot::install(&self.ram, layout).map_err(Error::Block)
    }

    fn run(&self, id: u32, gate: &Gate) -> Result<(), VmError> {
        let mut cpu = self.cpu(id);
        let kick = &self.kicks[id as usize];
        let rate = cpu.layout.workload.rate;
        let mut pace = Pace::start();
        let mut rings = RingWatch::default();
        guarded::runs_guest();
        kick.clear();
        // Whether the guest's last I/O instruction is only finished by going back in.
        let mut unfinished = false;
        loop {
            if gate.recalled() {
                if !unfinished {
                    return Ok(());
                }
                kick.set();
            }
            let exit = cpu.fd.run();
            unfinished = false;
            match exit {
                Ok(VcpuExit::IoOut(DOORBELL, _)) => {
                    unfinished = true;
                    rings.updated(&self.dirty)?;
                    pace.updated(&self.gaps[id as usize], rate, gate);
                }
                Ok(VcpuExit::IoOut(port, data)) => {
                    unfinished = true;
                    self.port_out(port, data);
                }
                Ok(VcpuExit::IoIn(port, data)) => {
                    unfinished = true;
                    self.port_in(port, data);
                }
                Ok(VcpuExit::Intr) => {}
                Ok(VcpuExit::Unsupported(KVM_EXIT_DIRTY_RING_FULL)) => rings.full(&self.dirty)?,
                Ok(VcpuExit::Hlt) => gate.sleep(None),
                // A KVM that does the guest's instruction itself finds no memory there.
                Ok(VcpuExit::MmioRead(address, _) | VcpuExit::MmioWrite(address, _))
                    if self.lies_at(address).is_some() =>
                {
                    let (block, offset) = self.lies_at(address).expect("as just seen");
                    return Err(machine_check(&self.ram, block, offset));
                }
                Err(error) if [libc::EINTR, libc::EAGAIN].contains(&error.errno()) => {
                    if let Some((block, offset)) = guarded::met().and_then(|at| self.mapped_at(at))
                    {
                        return Err(machine_check(&self.ram, block, offset));
                    }
                    if !gate.recalled() {
                        // A pause that comes right here sets its flag again after the recall,
                        // which is what the loop looks at next.
                        kick.clear();
                    }
                }
                Ok(exit) => {
                    let exit = format!("{exit:?}");
                    let at = cpu.fd.get_regs().map(|regs| regs.rip).unwrap_or_default();
                    return Err(VmError::new(format!("the guest stopped at {at:#x}: {exit}")));
                }
                Err(error) => return Err(VmError::new(format!("KVM_RUN: {error}"))),
            }
        }
    }

    fn kick(&self) -> libc::c_int {
        self.kicks.iter().for_each(Kick::set);
        guarded::signal()
    }

    fn devices(&self) -> Vec<(&'static str, u32)> {
        let cpus = (0..).zip(&self.cpus).map(|(id, _)| (VCPU, id));
        cpus.chain([(CLOCK, 0)]).collect()
    }

    fn save(&self) -> Result<Vec<DeviceState>, VmError> {
        let mut devices: Vec<DeviceState> =
            (0..).zip(self.states()?).map(|(id, state)| state.save(id)).collect();
        let mut writer = Writer::new();
        writer.bytes(CLOCK_DATA, self.clock()?.as_bytes());
        devices.push(writer.device(CLOCK, 0));
        Ok(devices)
    }

    fn begin_load(&self) -> Result<Box<dyn LoadMachine + '_>, VmError> {
        Ok(Box::new(Loading { machine: self, before: self.states()?, clock: self.clock()? }))
    }
}

/// vCPUs whose state is coming, and what they were before.
struct Loading<'m> {
    machine: &'m KvmMachine,
    before: Vec<CpuState>,
    clock: kvm_clock_data,
}

impl LoadMachine for Loading<'_> {
    fn load(&self, _: &Layout, device: &DeviceState) -> Result<(), VmError> {
        let (machine, id) = (self.machine, device.instance_id);
        if device.name == CLOCK {
            let fields = Fields::read(device, &[CLOCK_DATA])?;
            let clock = kvm_clock_data::read_from_bytes(fields.bytes(CLOCK_DATA)?)
                .map_err(|_| VmError::new("field clock-data has the wrong length"))?;
            return machine.set_clock(clock);
        }
        let here = machine.cpu(id).fd.get_tsc_khz();
        let here = here.map_err(|error| VmError::new(format!("KVM_GET_TSC_KHZ: {error}")))?;
        machine.set_state(id, &CpuState::parse(device, &machine.abilities, here)?)
    }

    fn finish(self: Box<Self>, layout: &Arc<Layout>) {
        for id in 0..layout.vcpus {
            self.machine.cpu(id).layout = Arc::clone(layout);
        }
    }

    fn undo(self: Box<Self>) -> Result<(), VmError> {
        // What the kernel refuses, it refuses of what came: what was there it takes again.
        for (id, state) in (0..).zip(&self.before) {
            self.machine.set_state(id, state)?;
        }
        self.machine.set_clock(self.clock)
    }
}

/// Tells KVM where the guest's memory lies: each block a slot of the block's number.
fn give_memory(vm: &VmFd, ram: &GuestRam) -> Result<(), Error> {
    for (index, block) in ram.blocks() {
        let region = kvm_userspace_memory_region {
            slot: u32::from(index.0),
            flags: 0,
            guest_phys_addr: block.guest_address(),
            memory_size: block.len(),
            userspace_addr: block.host_address().as_ptr().addr() as u64,
        };
        // SAFETY: the block stays mapped as long as `ram`, which the machine keeps as long
        // as the VM; the blocks do not overlap, neither here nor in the guest.
        unsafe { vm.set_user_memory_region(region) }
            .map_err(failed("KVM_SET_USER_MEMORY_REGION"))?;
    }
    Ok(())
}

/// Which of the serial port's registers that is.
fn serial_register(port: u16) -> Option<u8> {
    port.checked_sub(serial::PORT).and_then(|at| u8::try_from(at).ok()).filter(|&at| at < 8)
}

/// What `CPUID` tells the vCPU of that number: the host's answers with its own APIC id.
fn own_cpuid(supported: &CpuId, id: u32) -> CpuId {
    let mut own = supported.clone();
    for leaf in own.as_mut_slice() {
        match leaf.function {
            1 => leaf.ebx = (leaf.ebx & 0x00ff_ffff) | id << 24,
            0xb | 0x1f => leaf.edx = id,
            _ => {}
        }
    }
    own
}
