//! Native vCPUs: threads of this process that do to guest memory what the KVM guest's code does.

use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use whimbrel::{DeviceState, VmError};
use whimbrel_ram::{BlockIndex, GuestRam};

use crate::build::first_choice;
use crate::check::ram_word;
use crate::config::Accel;
use crate::dirty::Marks;
use crate::error::Error;
use crate::gate::Gate;
use crate::guarded::{self, Ended};
use crate::layout::{CONSTANTS, FIRMWARE, Layout, PICKS, RAM, cpu_page};
use crate::machine::{LoadMachine, Machine, VCPU, machine_check};
use crate::net::{self, Driver, Nic};
use crate::pace::{Gap, Pace};
use crate::pattern::{Constants, Mismatch, MismatchKind, PAGE_BYTES, Page};
use crate::serial::SerialPort;
use crate::state::{Fields, Tag, Writer};
use crate::workload::WorkloadKind;

const CHOICE: Tag = Tag(1, "choice");
const CURSOR: Tag = Tag(2, "cursor");
const UPDATES: Tag = Tag(3, "updates");
const GAP: Tag = Tag(4, "gap");
const LAST: Tag = Tag(5, "last-update");
const STARTED: Tag = Tag(6, "started");

/// What a native vCPU knows beside memory: its registers, so to speak.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Registers {
    /// The last value of the sequence that chooses pages.
    choice: u64,
    /// The index of the next page of a sequential workload.
    cursor: u64,
    /// Updates so far, as in its page.
    updates: u64,
    /// Whether it has said so on the serial port.
    started: bool,
}

/// A read of memory that did not get what is there.
#[derive(Clone, Copy, Debug)]
struct Met {
    ended: Ended,
    block: BlockIndex,
    offset: u64,
}

#[derive(Debug)]
struct Cpu {
    id: u32,
    layout: Arc<Layout>,
    registers: Registers,
}

/// Native vCPUs.
pub(crate) struct NativeMachine {
    ram: GuestRam,
    marks: Marks,
    serial: Arc<SerialPort>,
    gaps: Arc<[Gap]>,
    cpus: Vec<Mutex<Cpu>>,
    nic: Option<Arc<Nic>>,
}

impl NativeMachine {
    pub(crate) fn new(
        ram: &GuestRam,
        layout: &Arc<Layout>,
        marks: Marks,
        serial: &Arc<SerialPort>,
        gaps: &Arc<[Gap]>,
        nic: Option<Arc<Nic>>,
    ) -> NativeMachine {
        let cpu = |id| {
            let choice = first_choice(layout, id);
            let registers = Registers { choice, cursor: 0, updates: 0, started: false };
            Mutex::new(Cpu { id, layout: Arc::clone(layout), registers })
        };
        NativeMachine {
            ram: ram.clone(),
            marks,
            serial: Arc::clone(serial),
            gaps: Arc::clone(gaps),
            cpus: (0..layout.vcpus).map(cpu).collect(),
            nic,
        }
    }

    fn cpu(&self, id: u32) -> MutexGuard<'_, Cpu> {
        self.cpus[id as usize].lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A store of the guest's: seen by the dirty log whichever it is.
    fn store(&self, offset: u64, value: u64) {
        self.ram.block(RAM).store_u64(offset, value).expect("inside the memory, as laid out");
        self.marks.written(RAM, offset, 8);
    }

    /// A load of the guest's from memory that it has touched in the same update.
    fn load(&self, offset: u64) -> u64 {
        ram_word(self.ram.block(RAM), offset)
    }

    /// The guest's first load from a page in an update: it may have to wait.
    fn fetch(&self, offset: u64) -> Result<u64, Met> {
        guarded::load(self.ram.block(RAM), offset).map_err(|ended| Met {
            ended,
            block: RAM,
            offset,
        })
    }

    /// The constants in the firmware.
    fn constants(&self) -> Result<Constants, Met> {
        let fetch = |offset| {
            guarded::load(self.ram.block(FIRMWARE), offset).map_err(|ended| Met {
                ended,
                block: FIRMWARE,
                offset,
            })
        };
        Ok(Constants { multiplier: fetch(CONSTANTS)?, increment: fetch(CONSTANTS + 8)? })
    }

    /// One update of one page, checked before: what the loop in the KVM guest's code does.
    ///
    /// It reads from every page that it touches before it writes to any: one that does not get a page
    /// has changed nothing but registers, which the caller takes back.
    fn update(&self, cpu: &mut Cpu, constants: Constants, page: &mut Page) -> Result<(), Met> {
        let layout = Arc::clone(&cpu.layout);
        let own = layout.cpu_page(cpu.id);
        let index = self.choose(cpu, constants)?;
        let number = layout.page(cpu.id, index);
        let offset = layout.page_offset(number);
        let counted_at = layout.count_offset(cpu.id, index);
        let seed = layout.workload.seed;

        let (expected, found) = (cpu.registers.updates, self.fetch(own + cpu_page::UPDATES)?);
        let count = self.fetch(counted_at)?;
        let block = self.ram.block(RAM);
        guarded::read(block, offset, &mut page.0).map_err(|ended| Met {
            ended,
            block: RAM,
            offset,
        })?;
        if expected != found {
            let kind = MismatchKind::Updates;
            self.report(cpu, number, Mismatch { kind, expected, found });
        }
        if let Err(mismatch) = page.check(seed, number, count) {
            self.report(cpu, number, mismatch);
        }
        self.store(own + cpu_page::CHECKED, self.load(own + cpu_page::CHECKED).wrapping_add(1));

        let count = count.wrapping_add(1);
        page.write(constants, seed, number, count);
        block.write(offset, &page.0).expect("inside the memory, as laid out");
        self.marks.written(RAM, offset, PAGE_BYTES);
        self.store(counted_at, count);
        cpu.registers.updates = expected.wrapping_add(1);
        self.store(own + cpu_page::UPDATES, cpu.registers.updates);
        Ok(())
    }

    /// The index of the next page among the vCPU's own.
    fn choose(&self, cpu: &mut Cpu, constants: Constants) -> Result<u64, Met> {
        let (id, layout, registers) = (cpu.id, &cpu.layout, &mut cpu.registers);
        let owned = layout.owned(id);
        if layout.workload.kind == WorkloadKind::Sequential {
            let index = registers.cursor;
            registers.cursor = if index + 1 < owned { index + 1 } else { 0 };
            return Ok(index);
        }
        registers.choice = constants.next(registers.choice);
        let high = registers.choice >> 32;
        // `high` is evenly spread over 32 bits: its share of `of` is evenly spread below `of`.
        let share = |of: u64| (high * of) >> 32;
        Ok(match layout.workload.kind {
            WorkloadKind::Zipf => {
                let entry = layout.picks + (high & (PICKS - 1)) * 4;
                let word = self.fetch(entry & !7)?;
                let pick = if entry & 4 == 0 { word & 0xffff_ffff } else { word >> 32 };
                // Only a table that was corrupted names a page that is not there.
                pick.min(owned - 1)
            }
            WorkloadKind::HotCold => {
                let hot = layout.hot(id);
                let nine_of_ten = (registers.choice >> 24) & 0xff < 230;
                if nine_of_ten || hot == owned { share(hot) } else { hot + share(owned - hot) }
            }
            WorkloadKind::Uniform | WorkloadKind::Sequential | WorkloadKind::Idle => share(owned),
        })
    }

    /// What becomes of a vCPU whose read did not get what is there.
    fn ended(&self, met: Met) -> Result<(), VmError> {
        match met.ended {
            Ended::Kicked => Ok(()), // It was recalled.
            Ended::Lost => Err(machine_check(&self.ram, met.block, met.offset)),
        }
    }

    /// Counts an error, and keeps and prints the first.
    fn report(&self, cpu: &Cpu, page: u64, mismatch: Mismatch) {
        let own = cpu.layout.cpu_page(cpu.id);
        let errors = self.load(own + cpu_page::ERRORS);
        if errors == 0 {
            self.store(own + cpu_page::ERROR_KIND, mismatch.kind.code());
            self.store(own + cpu_page::ERROR_PAGE, page);
            self.store(own + cpu_page::ERROR_EXPECTED, mismatch.expected);
            self.store(own + cpu_page::ERROR_FOUND, mismatch.found);
            let kind = mismatch.kind.code();
            self.serial.print(&format!(
                "whimbrel guest: self-check failed on vcpu {}, page {page:016x}, kind {kind:x}",
                cpu.id
            ));
        }
        self.store(own + cpu_page::ERRORS, errors.wrapping_add(1));
    }
}

impl Machine for NativeMachine {
    fn accel(&self) -> Accel {
        Accel::Native
    }

    fn install(&self, _: &Layout) -> Result<(), Error> {
        if let Some(nic) = &self.nic {
            net::install(self.ram.block(RAM), nic.config())?;
        }
        Ok(())
    }

    fn run(&self, id: u32, gate: &Gate) -> Result<(), VmError> {
        if let Some(nic) = self.nic.as_ref().filter(|_| id as usize == self.cpus.len()) {
            return Driver { ram: &self.ram, marks: &self.marks, nic }.run(gate);
        }
        let mut cpu = self.cpu(id);
        if id == 0 && !cpu.registers.started {
            self.serial.print("whimbrel guest: running");
        }
        cpu.registers.started = true;
        let Layout { workload, .. } = *cpu.layout;
        if workload.kind == WorkloadKind::Idle {
            gate.sleep(None);
            return Ok(());
        }
        let constants = match self.constants() {
            Ok(constants) => constants,
            Err(met) => return self.ended(met),
        };
        let mut pace = Pace::start();
        let mut page = Page::zeroed();
        while !gate.recalled() {
            let before = cpu.registers.clone();
            if let Err(met) = self.update(&mut cpu, constants, &mut page) {
                // It is done when the vCPU runs again.
                cpu.registers = before;
                return self.ended(met);
            }
            pace.updated(&self.gaps[id as usize], workload.rate, gate);
        }
        Ok(())
    }

    fn kick(&self) -> libc::c_int {
        guarded::signal()
    }

    fn devices(&self) -> Vec<(&'static str, u32)> {
        (0..).zip(&self.cpus).map(|(id, _)| (VCPU, id)).collect()
    }

    fn save(&self) -> Result<Vec<DeviceState>, VmError> {
        let save = |(id, gap): (u32, &Gap)| {
            let Registers { choice, cursor, updates, started } = self.cpu(id).registers.clone();
            let (longest, last) = gap.get();
            let mut writer = Writer::new();
            writer.u64(CHOICE, choice);
            writer.u64(CURSOR, cursor);
            writer.u64(UPDATES, updates);
            writer.u64(GAP, longest);
            writer.u64(LAST, last);
            writer.u64(STARTED, u64::from(started));
            writer.device(VCPU, id)
        };
        Ok((0..).zip(self.gaps.iter()).map(save).collect())
    }

    fn begin_load(&self) -> Result<Box<dyn LoadMachine + '_>, VmError> {
        let states = self.cpus.iter().map(|_| OnceLock::new()).collect();
        Ok(Box::new(Loading { machine: self, states }))
    }
}

/// vCPUs whose state is coming.
struct Loading<'m> {
    machine: &'m NativeMachine,
    states: Box<[OnceLock<CpuState>]>,
}

/// What has come of a vCPU.
#[derive(Debug)]
struct CpuState {
    registers: Registers,
    /// Longest gap between updates and time of the last.
    gap: (u64, u64),
}

impl LoadMachine for Loading<'_> {
    fn load(&self, layout: &Layout, device: &DeviceState) -> Result<(), VmError> {
        let id = device.instance_id;
        let fields = Fields::read(device, &[CHOICE, CURSOR, UPDATES, GAP, LAST, STARTED])?;
        let cursor = fields.u64(CURSOR)?;
        if cursor >= layout.owned(id) {
            let owned = layout.owned(id);
            return Err(VmError::new(format!("cursor {cursor} is not below {owned}")));
        }
        let registers = Registers {
            choice: fields.u64(CHOICE)?,
            cursor,
            updates: fields.u64(UPDATES)?,
            started: fields.u64(STARTED)? != 0,
        };
        let state = CpuState { registers, gap: (fields.u64(GAP)?, fields.u64(LAST)?) };
        assert!(self.states[id as usize].set(state).is_ok(), "each device comes once");
        Ok(())
    }

    fn finish(self: Box<Self>, layout: &Arc<Layout>) {
        let Loading { machine, states } = *self;
        for (id, state) in (0..).zip(states) {
            let CpuState { registers, gap } = state.into_inner().expect("each has been loaded");
            let mut cpu = machine.cpu(id);
            cpu.registers = registers;
            cpu.layout = Arc::clone(layout);
            machine.gaps[id as usize].set(gap);
        }
    }

    fn undo(self: Box<Self>) -> Result<(), VmError> {
        Ok(()) // Nothing was taken yet.
    }
}
