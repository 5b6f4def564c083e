//! What KVM's two kinds of dirty log have in common: memory slots, and the ioctls.
#![expect(unsafe_code, reason = "KVM's ioctls")]

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use kvm_bindings::{KVM_MEM_LOG_DIRTY_PAGES, kvm_enable_cap, kvm_userspace_memory_region};

use crate::{BlockIndex, GuestRam};

/// `_IO(0xAE, 0x03)`.
const KVM_CHECK_EXTENSION: libc::Ioctl = 0xAE03;
/// `_IOW(0xAE, 0x46, struct kvm_userspace_memory_region)`.
const KVM_SET_USER_MEMORY_REGION: libc::Ioctl = 0x4020_AE46;
/// `_IOW(0xAE, 0xa3, struct kvm_enable_cap)`.
const KVM_ENABLE_CAP: libc::Ioctl = 0x4068_AEA3;

/// A memory slot of KVM's: a piece of a RAM block that the guest sees at one place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KvmSlot {
    /// KVM's number for it, in address space 0.
    pub slot: u32,
    /// The block it is a piece of.
    pub block: BlockIndex,
    /// Where in the block it begins, in bytes; a multiple of 256 KiB (64 pages).
    pub offset: u64,
    /// In bytes.
    pub len: u64,
    /// Where the guest sees it.
    pub guest_address: u64,
}

impl KvmSlot {
    /// A slot that is all of a block, at the block's own guest address.
    pub fn whole(slot: u32, block: BlockIndex, ram: &GuestRam) -> KvmSlot {
        let of = ram.block(block);
        KvmSlot { slot, block, offset: 0, len: of.len(), guest_address: of.guest_address() }
    }

    /// The slot's first word in the bitmap of its block.
    pub(super) fn first_word(&self) -> usize {
        usize::try_from(self.offset / (64 * 4096)).expect("RAM fits in memory")
    }

    /// How many pages it has.
    pub(super) fn pages(&self) -> u64 {
        self.len / 4096
    }

    /// How many words of a bitmap it has.
    pub(super) fn words(&self) -> usize {
        usize::try_from(self.pages().div_ceil(64)).expect("RAM fits in memory")
    }
}

/// A VM's slots, and the VM.
#[derive(Debug)]
pub(super) struct KvmSlots {
    pub(super) ram: GuestRam,
    pub(super) slots: Box<[KvmSlot]>,
    vm: OwnedFd,
}

impl KvmSlots {
    /// Keeps the VM open by a file descriptor of its own.
    pub(super) fn new(
        vm: &impl AsRawFd,
        slots: &[KvmSlot],
        ram: &GuestRam,
    ) -> io::Result<KvmSlots> {
        for slot in slots {
            let block = ram.block(slot.block);
            let inside = slot.offset.checked_add(slot.len).is_some_and(|end| end <= block.len());
            assert!(inside && slot.len > 0, "{slot:?} is not inside {block:?}");
            assert!(slot.offset.is_multiple_of(64 * 4096), "{slot:?} begins between two words");
            assert!(slot.len.is_multiple_of(4096), "{slot:?} is not whole pages");
        }
        // SAFETY: duplicates a file descriptor that is open as long as `vm` is borrowed.
        let fd = unsafe { libc::fcntl(vm.as_raw_fd(), libc::F_DUPFD_CLOEXEC, 0) };
        let fd = checked(fd)?;
        // SAFETY: the kernel has just given it to us alone.
        let vm = unsafe { OwnedFd::from_raw_fd(fd) };
        Ok(KvmSlots { ram: ram.clone(), slots: slots.into(), vm })
    }

    pub(super) fn vm_fd(&self) -> libc::c_int {
        self.vm.as_raw_fd()
    }

    /// What KVM says about a capability; 0 when it does not have it.
    pub(super) fn extension(&self, capability: u32) -> u32 {
        let capability = libc::c_ulong::from(capability);
        // SAFETY: this ioctl takes a number.
        let value = unsafe { libc::ioctl(self.vm_fd(), KVM_CHECK_EXTENSION, capability) };
        u32::try_from(value).unwrap_or(0)
    }

    pub(super) fn enable(&self, capability: u32, argument: u64) -> io::Result<()> {
        let cap =
            kvm_enable_cap { cap: capability, args: [argument, 0, 0, 0], ..Default::default() };
        // SAFETY: `cap` is what this ioctl reads.
        checked(unsafe { libc::ioctl(self.vm_fd(), KVM_ENABLE_CAP, &raw const cap) })?;
        Ok(())
    }

    /// Begins or ends the logging of all slots; of none, if it fails for one.
    pub(super) fn set_logging(&self, on: bool) -> io::Result<()> {
        for (at, slot) in self.slots.iter().enumerate() {
            if let Err(error) = self.set_slot(slot, on) {
                for slot in &self.slots[..at] {
                    // The first error is the one that says what is wrong.
                    let _ = self.set_slot(slot, !on);
                }
                let name = self.ram.block(slot.block).name();
                let text = format!("KVM cannot log writes to RAM block {name}: {error}");
                return Err(io::Error::new(error.kind(), text));
            }
        }
        Ok(())
    }

    fn set_slot(&self, slot: &KvmSlot, log: bool) -> io::Result<()> {
        let block = self.ram.block(slot.block);
        let base = block.host_address().as_ptr().expose_provenance() as u64;
        let region = kvm_userspace_memory_region {
            slot: slot.slot,
            flags: if log { KVM_MEM_LOG_DIRTY_PAGES } else { 0 },
            guest_phys_addr: slot.guest_address,
            memory_size: slot.len,
            userspace_addr: base + slot.offset,
        };
        // SAFETY: the slot is memory of the block, mapped as long as `ram` lives. All but the
        // flags is as the VMM set it, else KVM refuses.
        checked(unsafe {
            libc::ioctl(self.vm_fd(), KVM_SET_USER_MEMORY_REGION, &raw const region)
        })?;
        Ok(())
    }
}

/// A result that is not negative, or the error.
pub(super) fn checked(result: libc::c_int) -> io::Result<libc::c_int> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}
