//! A vCPU that writes to memory while its pages arrive and become huge again.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]
#![expect(unsafe_code, reason = "gives guest memory to KVM")]

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use kvm_bindings::{kvm_segment, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use whimbrel_ram::{AbsentRam, GuestRam, PageSize, RamBlock, Received, Sharing, Split};

use crate::memory::{HugePages, memfd};
use crate::source::{PAGE, Random, answer, background, word};

const CODE: u64 = 0x1000;
const LIST: u64 = 0x2000;
const RAM: u64 = 1 << 24;
/// Writes of one run.
const WRITES: usize = 2000;

/// Adds one to each word of a list that a zero ends.
const ADD_TO_LIST: &[u8] = &[
    0x8b, 0x06, // next: mov eax, [esi]
    0x83, 0xc6, 0x04, // add esi, 4
    0x85, 0xc0, // test eax, eax
    0x74, 0x04, // jz done
    0xff, 0x00, // inc dword [eax]
    0xeb, 0xf3, // jmp next
    0xf4, // done: hlt
];

/// A vCPU in flat 32-bit protected mode.
struct Guest {
    vcpu: VcpuFd,
    _vm: VmFd,
    private: RamBlock,
}

impl Guest {
    /// `None` where there is no KVM.
    fn new(ram: &RamBlock) -> Option<Guest> {
        let vm = match Kvm::new().and_then(|kvm| kvm.create_vm()) {
            Ok(vm) => vm,
            Err(error) => {
                eprintln!("skipped: no KVM here: {error}");
                return None;
            }
        };
        let private = RamBlock::anonymous("code", 0, 1 << 20).unwrap();
        private.write(CODE, ADD_TO_LIST).unwrap();
        for (slot, block) in (0..).zip([&private, ram]) {
            let region = kvm_userspace_memory_region {
                slot,
                flags: 0,
                guest_phys_addr: block.guest_address(),
                memory_size: block.len(),
                userspace_addr: block.host_address().addr().get() as u64,
            };
            // SAFETY: the memory is the block's, which outlives the VM.
            unsafe { vm.set_user_memory_region(region) }.unwrap();
        }
        let vcpu = vm.create_vcpu(0).unwrap();
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
        Some(Guest { vcpu, _vm: vm, private })
    }

    /// Adds one to the first word of each of the pages.
    fn add(&mut self, pages: &[u64]) {
        let address = |page: &u64| u32::try_from(RAM + page * PAGE).unwrap().to_le_bytes();
        let list: Vec<u8> = pages.iter().map(address).chain([[0; 4]]).flatten().collect();
        self.private.write(LIST, &list).unwrap();
        let mut regs = self.vcpu.get_regs().unwrap();
        (regs.rip, regs.rsi, regs.rflags) = (CODE, LIST, 2);
        self.vcpu.set_regs(&regs).unwrap();
        let exit = self.vcpu.run().unwrap();
        assert!(matches!(exit, VcpuExit::Hlt), "the guest left with {exit:?}");
    }
}

/// The guest writes until all has arrived and is restored; each of its writes is there at the end.
fn guest_loses_no_write(block: RamBlock, split: Split) {
    let ram = GuestRam::new(vec![block]);
    let (index, block) = ram.blocks().next().unwrap();
    let Some(mut guest) = Guest::new(block) else { return };
    let absent = AbsentRam::watch(&ram, Arc::new(Received::new(&ram)), split).unwrap();
    let stop = AtomicBool::new(false);
    let guest_runs = AtomicBool::new(true);
    let mut counts = vec![0_u32; usize::try_from(block.target_pages()).unwrap()];
    thread::scope(|scope| {
        scope.spawn(|| {
            let mut random = Random(1);
            while guest_runs.load(Ordering::Acquire) {
                let pages: Vec<u64> =
                    (0..WRITES).map(|_| random.below(block.target_pages())).collect();
                guest.add(&pages);
                pages.iter().for_each(|&page| counts[usize::try_from(page).unwrap()] += 1);
            }
            stop.store(true, Ordering::Release);
        });
        scope.spawn(|| answer(&absent, &stop));
        background(&absent, 9);
        while absent.restore_next().unwrap() {}
        guest_runs.store(false, Ordering::Release);
    });
    absent.finish().unwrap();
    for (page, count) in (0..).zip(counts) {
        let mut bytes = [0; 4];
        block.read(page * PAGE, &mut bytes).unwrap();
        let [a, b, c, d, ..] = word(index, page * PAGE).to_le_bytes();
        let expected = u32::from_le_bytes([a, b, c, d]).wrapping_add(count);
        assert_eq!(u32::from_le_bytes(bytes), expected, "page {page}");
    }
}

#[test]
fn a_vcpu_waits_for_anonymous_memory() {
    guest_loses_no_write(RamBlock::anonymous("ram", RAM, 8 << 20).unwrap(), Split::Whole);
}

#[test]
fn a_vcpu_waits_for_shared_memory() {
    let len = 8 << 20;
    let block = RamBlock::memfd("ram", RAM, len, PageSize::SIZE_4K, Sharing::Shared);
    guest_loses_no_write(block.unwrap(), Split::Whole);
}

#[test]
fn a_vcpu_waits_for_huge_pages() {
    let _pages = HugePages::reserve(8);
    for split in [Split::Whole, Split::Small] {
        let Some(block) = memfd("ram", 8, PageSize::SIZE_2M, Sharing::Shared) else { return };
        guest_loses_no_write(block, split);
    }
}
