//! How a fresh vCPU starts: in 64-bit mode, at the guest's first instruction, on page tables that
//! lie in the guest's memory.

use kvm_bindings::{KVM_MP_STATE_RUNNABLE, kvm_mp_state, kvm_regs, kvm_segment, kvm_sregs};
use kvm_ioctls::{Error as Errno, VcpuFd};
use whimbrel_ram::{BlockError, GuestRam};

use crate::build::first_choice;
use crate::layout::{CONSTANTS, FIRMWARE, FIRMWARE_ADDRESS, Layout, PAGE_TABLES, RAM, RAM_ADDRESS};
use crate::pattern::PAGE_BYTES;

use super::guest::code;

const HUGE: u64 = 2 << 20;
/// A page directory maps so much.
const DIRECTORY: u64 = 1 << 30;

/// Entry bits: present, writable; and as the processor would leave them: accessed, dirty.
const TABLE: u64 = 0x23;
const LEAF: u64 = 0x63 | 1 << 7;

const CR0: u64 = 1 << 31 | 1 << 16 | 1 << 5 | 1 << 4 | 1 << 1 | 1; // PG WP NE ET MP PE
const CR4: u64 = 1 << 10 | 1 << 9 | 1 << 5; // OSXMMEXCPT OSFXSR PAE
const EFER: u64 = 1 << 10 | 1 << 8; // LMA LME

/// Writes code and page tables into a fresh guest's memory.
pub(crate) fn install(ram: &GuestRam, layout: &Layout) -> Result<(), BlockError> {
    assert!(code().len() as u64 <= CONSTANTS, "the code ends before the constants");
    ram.block(FIRMWARE).write(0, code())?;
    let block = ram.block(RAM);
    let table = |number: u64| PAGE_TABLES + number * PAGE_BYTES;
    let entry = |number: u64| (RAM_ADDRESS + table(number)) | TABLE;
    // Root, pointers, the firmware's directory, then one for each GiB of memory.
    block.store_u64(table(0), entry(1))?;
    block.store_u64(table(1), entry(2))?;
    let firmware = FIRMWARE_ADDRESS / HUGE;
    block.store_u64(table(2) + firmware * 8, (firmware * HUGE) | LEAF)?;
    for gib in 0..layout.memory.div_ceil(DIRECTORY) {
        let slot = RAM_ADDRESS / DIRECTORY + gib;
        block.store_u64(table(1) + slot * 8, entry(3 + gib))?;
    }
    for huge in 0..layout.memory.div_ceil(HUGE) {
        block.store_u64(table(3) + huge * 8, (RAM_ADDRESS + huge * HUGE) | LEAF)?;
    }
    Ok(())
}

/// Sets a fresh vCPU's registers.
pub(crate) fn reset(fd: &VcpuFd, layout: &Layout, cpu: u32) -> Result<(), Errno> {
    let mut sregs: kvm_sregs = fd.get_sregs()?;
    let code = kvm_segment {
        limit: 0xffff_ffff,
        selector: 0x08,
        type_: 0xb,
        present: 1,
        s: 1,
        l: 1,
        g: 1,
        ..Default::default()
    };
    let data = kvm_segment { selector: 0x10, type_: 0x3, db: 1, l: 0, ..code };
    let task = kvm_segment { limit: 0x67, type_: 0xb, present: 1, ..Default::default() };
    sregs.cs = code;
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    sregs.tr = task;
    (sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer) = (CR0, RAM_ADDRESS + PAGE_TABLES, CR4, EFER);
    fd.set_sregs(&sregs)?;
    let own = RAM_ADDRESS + layout.cpu_page(cpu);
    fd.set_regs(&kvm_regs {
        rip: FIRMWARE_ADDRESS,
        rflags: 2,
        rbx: own,
        rsp: own + PAGE_BYTES,
        r12: first_choice(layout, cpu),
        r15: FIRMWARE_ADDRESS + CONSTANTS,
        ..Default::default()
    })?;
    // With the interrupt controller in the kernel, all but the first wait to be started by it.
    fd.set_mp_state(kvm_mp_state { mp_state: KVM_MP_STATE_RUNNABLE })
}
