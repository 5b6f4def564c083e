//! KVM's dirty logs, written to by a real vCPU and held to the contract of all dirty logs.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]
#![expect(unsafe_code, reason = "gives guest memory to KVM")]

mod contract;

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use contract::{Page, Writer};
use kvm_bindings::{KVM_EXIT_DIRTY_RING_FULL, kvm_segment, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use whimbrel_ram::dirty::{DirtyLog, KvmLog, KvmRing, KvmSlot, OwnWrites, PagemapScan, Union};
use whimbrel_ram::{BlockIndex, GuestRam, RamBlock};

/// Where the guest's code lies: in a slot of its own, which is not logged.
const CODE: u64 = 0x1000;
/// Where the list of the pages to write begins.
const LIST: u64 = 0x2000;
const PRIVATE_LEN: u64 = 1 << 20;
const LOW: u64 = 1 << 24;
/// Several chunks of what the bitmap log clears together.
const LOW_LEN: u32 = 128 << 20;
const HIGH: u64 = 1 << 28;

/// As many writes as the guest likes before it leaves to us.
const MANY: usize = 20_000;
/// So few writes that a ring cannot overflow between two looks at it: some KVMs run a guest without
/// paging in their emulator and do not look after each instruction.
const FEW: usize = 32;

/// Writes to each page of a list that a zero ends.
const WRITE_LIST: &[u8] = &[
    0x8b, 0x06, // next: mov eax, [esi]
    0x83, 0xc6, 0x04, // add esi, 4
    0x85, 0xc0, // test eax, eax
    0x74, 0x04, // jz done
    0xff, 0x00, // inc dword [eax]
    0xeb, 0xf3, // jmp next
    0xf4, // done: hlt
];

/// Writes to `ecx` random places among `ebx + 1` bytes from `edi` on.
const WRITE_RANDOM: &[u8] = &[
    0x69, 0xd2, 0x6d, 0x4e, 0xc6, 0x41, // next: imul edx, edx, 1103515245
    0x81, 0xc2, 0x39, 0x30, 0x00, 0x00, // add edx, 12345
    0x89, 0xd0, // mov eax, edx
    0xc1, 0xe8, 0x07, // shr eax, 7
    0x21, 0xd8, // and eax, ebx
    0x89, 0x14, 0x07, // mov [edi + eax], edx
    0x49, // dec ecx
    0x75, 0xe7, // jnz next
    0xf4, // hlt
];

struct Machine {
    ram: GuestRam,
    private: RamBlock,
    vm: VmFd,
    slots: Vec<KvmSlot>,
}

impl Machine {
    /// Two blocks, one of them in two slots. `None` where there is no KVM.
    fn new() -> Option<Machine> {
        let vm = match Kvm::new().and_then(|kvm| kvm.create_vm()) {
            Ok(vm) => vm,
            Err(error) => {
                eprintln!("skipped: no KVM here: {error}");
                return None;
            }
        };
        let private = RamBlock::anonymous("code", 0, PRIVATE_LEN).unwrap();
        let low = RamBlock::anonymous("low", LOW, u64::from(LOW_LEN)).unwrap();
        // Its length is no multiple of 64 pages.
        let high = RamBlock::anonymous("high", HIGH, (1 << 20) + 5 * 4096).unwrap();
        let ram = GuestRam::new(vec![low, high]);
        let half = u64::from(LOW_LEN) / 2;
        let first = KvmSlot { len: half, ..KvmSlot::whole(1, BlockIndex(0), &ram) };
        let second = KvmSlot { slot: 2, offset: half, guest_address: LOW + half, ..first };
        let slots = vec![first, second, KvmSlot::whole(3, BlockIndex(1), &ram)];
        let machine = Machine { ram, private, vm, slots };
        let code = KvmSlot {
            slot: 0,
            block: BlockIndex(0),
            offset: 0,
            len: PRIVATE_LEN,
            guest_address: 0,
        };
        machine.set_slot(&code, &machine.private);
        for slot in &machine.slots {
            machine.set_slot(slot, machine.ram.block(slot.block));
        }
        Some(machine)
    }

    fn set_slot(&self, slot: &KvmSlot, block: &RamBlock) {
        let region = kvm_userspace_memory_region {
            slot: slot.slot,
            flags: 0,
            guest_phys_addr: slot.guest_address,
            memory_size: slot.len,
            userspace_addr: block.host_address().addr().get() as u64 + slot.offset,
        };
        // SAFETY: the memory is the block's, which outlives the VM.
        unsafe { self.vm.set_user_memory_region(region) }.unwrap();
    }

    /// A guest that leaves to us after `at_once` writes.
    fn guest(&self, at_once: usize, ring: Option<Arc<KvmRing>>) -> Guest<'_> {
        let vcpu = self.vm.create_vcpu(0).unwrap();
        if let Some(ring) = &ring {
            ring.add_vcpu(&vcpu).unwrap();
        }
        let mut sregs = vcpu.get_sregs().unwrap();
        let flat = kvm_segment {
            limit: u32::MAX,
            selector: 8,
            type_: 3,
            present: 1,
            db: 1,
            s: 1,
            g: 1,
            ..Default::default()
        };
        sregs.cs = kvm_segment { type_: 11, ..flat };
        (sregs.ds, sregs.es, sregs.ss) = (flat, flat, flat);
        sregs.cr0 |= 1;
        vcpu.set_sregs(&sregs).unwrap();
        Guest { machine: self, vcpu: Mutex::new(vcpu), at_once, ring }
    }
}

/// A vCPU in flat 32-bit protected mode.
struct Guest<'m> {
    machine: &'m Machine,
    vcpu: Mutex<VcpuFd>,
    at_once: usize,
    ring: Option<Arc<KvmRing>>,
}

impl Guest<'_> {
    /// Runs until the guest halts.
    fn run(&self, vcpu: &mut MutexGuard<'_, VcpuFd>) -> io::Result<()> {
        loop {
            match vcpu.run().unwrap() {
                VcpuExit::Hlt => return Ok(()),
                VcpuExit::Unsupported(KVM_EXIT_DIRTY_RING_FULL) => {
                    self.ring.as_ref().unwrap().reap()?;
                }
                exit => panic!("the guest left with {exit:?}"),
            }
        }
    }

    fn try_write(&self, pages: &[Page]) -> io::Result<()> {
        let mut vcpu = self.vcpu.lock().unwrap();
        self.machine.private.write(CODE, WRITE_LIST).unwrap();
        let address = |&(block, page): &Page| {
            let address = self.machine.ram.block(block).guest_address() + page.offset();
            u32::try_from(address).unwrap().to_le_bytes()
        };
        for pages in pages.chunks(self.at_once) {
            let list: Vec<u8> = pages.iter().map(address).chain([[0; 4]]).flatten().collect();
            self.machine.private.write(LIST, &list).unwrap();
            let mut regs = vcpu.get_regs().unwrap();
            (regs.rip, regs.rsi, regs.rflags) = (CODE, LIST, 2);
            vcpu.set_regs(&regs).unwrap();
            self.run(&mut vcpu)?;
        }
        Ok(())
    }
}

impl Writer for Guest<'_> {
    fn write(&self, pages: &[Page]) {
        self.try_write(pages).unwrap();
    }

    fn write_until(&self, stop: &AtomicBool) {
        let mut vcpu = self.vcpu.lock().unwrap();
        self.machine.private.write(CODE, WRITE_RANDOM).unwrap();
        while !stop.load(Ordering::Relaxed) {
            let mut regs = vcpu.get_regs().unwrap();
            (regs.rip, regs.rflags) = (CODE, 2);
            (regs.rcx, regs.rdi, regs.rbx) = (self.at_once as u64, LOW, u64::from(LOW_LEN - 4));
            vcpu.set_regs(&regs).unwrap();
            self.run(&mut vcpu).unwrap();
        }
    }
}

fn keeps_the_contract(log: &dyn DirtyLog, machine: &Machine, guest: &Guest<'_>) {
    contract::shows_what_is_written(log, &machine.ram, guest, false);
    contract::keeps_what_is_written_before_rearm(log, &machine.ram, guest);
    contract::gives_again_what_was_put_back(log, &machine.ram, guest);
    contract::starts_again(log, &machine.ram, guest);
    contract::loses_no_write(log, &machine.ram, guest, Duration::from_millis(700));
}

#[test]
fn the_bitmap_log() {
    let Some(machine) = Machine::new() else { return };
    let log = KvmLog::new(&machine.vm, &machine.slots, &machine.ram).unwrap();
    keeps_the_contract(&log, &machine, &machine.guest(MANY, None));
}

/// The guest's writes go through page tables of KVM's own, which a scan has to reach.
#[test]
fn pagemap_scan_sees_what_a_guest_writes() {
    let Some(machine) = Machine::new() else { return };
    let log = PagemapScan::new(&machine.ram);
    if let Err(error) = log.start() {
        eprintln!("skipped: {error}");
        return;
    }
    keeps_the_contract(&log, &machine, &machine.guest(MANY, None));
}

#[test]
fn the_rings() {
    let Some(machine) = Machine::new() else { return };
    match KvmRing::new(&machine.vm, &machine.slots, &machine.ram, 1024) {
        Ok(ring) => {
            let ring = Arc::new(ring);
            keeps_the_contract(&*ring, &machine, &machine.guest(FEW, Some(ring.clone())));
        }
        Err(error) => eprintln!("skipped: {error}"),
    }
}

#[test]
fn rings_after_the_first_vcpu_are_an_error_that_says_so() {
    let Some(machine) = Machine::new() else { return };
    let _guest = machine.guest(MANY, None);
    let error = KvmRing::new(&machine.vm, &machine.slots, &machine.ram, 1024).unwrap_err();
    assert!(error.to_string().contains("ring"), "{error}");
}

#[test]
fn an_overrun_ring_is_an_error_and_no_loss() {
    let Some(machine) = Machine::new() else { return };
    let Ok(ring) = KvmRing::new(&machine.vm, &machine.slots, &machine.ram, 1024) else { return };
    let ring = Arc::new(ring);
    let guest = machine.guest(MANY, Some(ring.clone()));
    ring.start().unwrap();
    let pages: Vec<Page> =
        (0..2048).map(|page| (BlockIndex(0), whimbrel_ram::TargetPage(page))).collect();
    for _ in 0..4 {
        match guest.try_write(&pages).and_then(|()| ring.take()) {
            Ok(taken) => assert_eq!(taken.count(), 2048),
            Err(error) => {
                assert!(error.to_string().contains("bitmap log"), "{error}");
                assert!(ring.take().is_err(), "the log stays unusable");
                return;
            }
        }
    }
    ring.stop();
}

#[test]
fn the_guest_and_the_vmm_together() {
    let Some(machine) = Machine::new() else { return };
    let own = Arc::new(OwnWrites::new(&machine.ram));
    let kvm = Arc::new(KvmLog::new(&machine.vm, &machine.slots, &machine.ram).unwrap());
    let log = Union::new(&machine.ram, vec![kvm, own.clone()]);
    let guest = machine.guest(MANY, None);
    keeps_the_contract(&log, &machine, &guest);

    log.start().unwrap();
    let _all = log.take().unwrap();
    for (index, block) in machine.ram.blocks() {
        log.rearm(index, whimbrel_ram::TargetPage(0), block.target_pages()).unwrap();
    }
    machine.ram.block(BlockIndex(1)).write(8191, &[1, 2]).unwrap();
    own.note(BlockIndex(1), 8191, 2);
    guest.write(&[(BlockIndex(0), whimbrel_ram::TargetPage(9))]);
    let taken = log.take().unwrap();
    assert_eq!(taken.count(), 3);
    for (block, page) in [(0, 9), (1, 1), (1, 2)] {
        assert!(taken.contains(BlockIndex(block), whimbrel_ram::TargetPage(page)));
    }
    log.stop();
}
