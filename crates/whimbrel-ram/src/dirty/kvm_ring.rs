//! KVM's dirty ring: every vCPU writes down the pages it dirties in a ring of its own.
//!
//! Taking costs what was written, not what there is. A vCPU whose ring is full leaves `KVM_RUN`
//! with `KVM_EXIT_DIRTY_RING_FULL` until somebody has emptied it: [`KvmRing::reap`].
#![expect(unsafe_code, reason = "the mapped rings, and KVM's ioctls")]

use std::io;
use std::mem;
use std::os::fd::AsRawFd;
use std::ptr::{self, NonNull};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use kvm_bindings::{
    KVM_CAP_DIRTY_LOG_RING, KVM_CAP_DIRTY_LOG_RING_ACQ_REL, KVM_DIRTY_LOG_PAGE_OFFSET,
    kvm_dirty_gfn,
};

use super::bits::Returned;
use super::kvm::{KvmSlot, KvmSlots, checked};
use super::{DirtyBits, DirtyLog};
use crate::{BlockIndex, GuestRam, TargetPage};

/// `_IO(0xAE, 0xc7)`.
const KVM_RESET_DIRTY_RINGS: libc::Ioctl = 0xAEC7;
const KVM_DIRTY_GFN_F_DIRTY: u32 = 1 << 0;
const KVM_DIRTY_GFN_F_RESET: u32 = 1 << 1;

/// KVM's dirty rings of some slots. Taking protects again what it gives, so
/// [`rearm`](DirtyLog::rearm) has nothing to do.
///
/// A processor may keep some pages back until its vCPU next leaves the guest: they show in a
/// later take, at the latest when the guest is stopped.
///
/// KVM stops a vCPU before its ring is full. Should it not (one that runs the guest in its emulator
/// was seen to write thousands of pages in between), pages are lost: from then on every use of the
/// log is an error that says so.
#[derive(Debug)]
pub struct KvmRing {
    slots: KvmSlots,
    entries: u32,
    state: Mutex<State>,
    returned: Returned,
}

#[derive(Debug)]
struct State {
    running: bool,
    /// A ring was written over: what was in it is lost.
    overrun: bool,
    rings: Vec<Ring>,
    /// Found by [`KvmRing::reap`] since the last take.
    found: DirtyBits,
}

impl KvmRing {
    /// Turns on rings of `entries` pages for each vCPU of the VM: a power of two, 1024 to 65,536 on
    /// today's kernels. **Before** the first vCPU is created; KVM's bitmap log cannot be used then.
    ///
    /// # Panics
    /// When a slot is not inside its block, or not made of whole words of its bitmap.
    pub fn new(
        vm: &impl AsRawFd,
        slots: &[KvmSlot],
        ram: &GuestRam,
        entries: u32,
    ) -> io::Result<KvmRing> {
        let slots = KvmSlots::new(vm, slots, ram)?;
        let bytes = u64::from(entries) * size_of::<kvm_dirty_gfn>() as u64;
        let offered = [KVM_CAP_DIRTY_LOG_RING_ACQ_REL, KVM_CAP_DIRTY_LOG_RING]
            .map(|capability| (capability, u64::from(slots.extension(capability))));
        let Some((capability, max)) = offered.into_iter().find(|(_, max)| *max > 0) else {
            let text = "this KVM has no dirty rings (Linux 5.11 or later, x86)";
            return Err(io::Error::new(io::ErrorKind::Unsupported, text));
        };
        slots.enable(capability, bytes).map_err(|error| {
            let text = format!(
                "KVM refuses dirty rings of {entries} entries ({bytes} of at most {max} bytes; \
                 they are turned on before the first vCPU is created): {error}"
            );
            io::Error::new(error.kind(), text)
        })?;
        let found = DirtyBits::none(ram);
        let state = Mutex::new(State { running: false, overrun: false, rings: Vec::new(), found });
        Ok(KvmRing { slots, entries, state, returned: Returned::default() })
    }

    /// Adds the ring of a vCPU. All vCPUs are added before they first run.
    pub fn add_vcpu(&self, vcpu: &impl AsRawFd) -> io::Result<()> {
        let ring = Ring::map(vcpu.as_raw_fd(), self.entries)?;
        self.state().rings.push(ring);
        Ok(())
    }

    /// Empties all rings into the log. For the VMM to call when a vCPU leaves the guest with
    /// `KVM_EXIT_DIRTY_RING_FULL`, before it runs again; also while nothing is logged.
    pub fn reap(&self) -> io::Result<()> {
        self.reap_into(&mut self.state())
    }

    fn reap_into(&self, state: &mut State) -> io::Result<()> {
        let State { rings, found, overrun, .. } = state;
        let mut reaped = 0;
        for ring in rings {
            let harvested = ring.harvest(|slot, page| {
                // Slots that are no RAM of ours (a ROM, another address space) are not logged.
                if let Some(slot) = self.slots.slots.iter().find(|s| s.slot == slot) {
                    found.insert(slot.block, TargetPage(slot.offset / 4096 + page), 1);
                }
            });
            *overrun |= harvested >= self.entries;
            reaped += harvested;
        }
        if *overrun {
            let text = "KVM has written over the dirty ring of a vCPU: pages are lost. \
                        Use its bitmap log instead";
            return Err(io::Error::other(text));
        }
        if reaped > 0 { self.reset() } else { Ok(()) }
    }

    /// Has KVM protect again what was harvested.
    fn reset(&self) -> io::Result<()> {
        loop {
            // SAFETY: this ioctl takes no argument.
            let reset = unsafe { libc::ioctl(self.slots.vm_fd(), KVM_RESET_DIRTY_RINGS, 0) };
            match checked(reset) {
                Ok(_) => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Forgets what is in the rings.
    fn forget(&self, state: &mut State) -> io::Result<()> {
        let reaped = self.reap_into(state);
        state.found = DirtyBits::none(&self.slots.ram);
        reaped
    }
}

impl DirtyLog for KvmRing {
    fn start(&self) -> io::Result<()> {
        let mut state = self.state();
        self.forget(&mut state)?;
        self.slots.set_logging(true)?;
        state.running = true;
        Ok(())
    }

    fn take(&self) -> io::Result<DirtyBits> {
        let mut state = self.state();
        // What an error leaves behind is in `found` and in the rings: the next take has it.
        if state.running {
            self.reap_into(&mut state)?;
        }
        let mut bits = mem::replace(&mut state.found, DirtyBits::none(&self.slots.ram));
        self.returned.take_into(&mut bits);
        Ok(bits)
    }

    fn put_back(&self, bits: DirtyBits) {
        self.returned.give_back(bits);
    }

    fn rearm(&self, _block: BlockIndex, _first: TargetPage, _count: u64) -> io::Result<()> {
        Ok(())
    }

    fn stop(&self) {
        let mut state = self.state();
        if mem::replace(&mut state.running, false) {
            // Both can fail only for a VM that is no more.
            let _ = self.slots.set_logging(false);
            let _ = self.forget(&mut state);
        }
    }
}

/// The mapped ring of a vCPU.
#[derive(Debug)]
struct Ring {
    entries: NonNull<kvm_dirty_gfn>,
    count: u32,
    /// How many entries were harvested, ever (it wraps).
    next: u32,
}

// SAFETY: the mapping is not tied to a thread; `harvest` takes the ring by `&mut`.
unsafe impl Send for Ring {}

impl Ring {
    fn map(vcpu: libc::c_int, count: u32) -> io::Result<Ring> {
        let len = count as usize * size_of::<kvm_dirty_gfn>();
        let offset = libc::off_t::from(KVM_DIRTY_LOG_PAGE_OFFSET) * 4096;
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a fresh mapping at an address of the kernel's choice; no memory of ours is touched.
        let address =
            unsafe { libc::mmap(ptr::null_mut(), len, protection, libc::MAP_SHARED, vcpu, offset) };
        if address == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let entries = NonNull::new(address.cast()).expect("mmap never gives address zero");
        Ok(Ring { entries, count, next: 0 })
    }

    /// Gives slot and page of every entry that KVM has filled, and marks it as harvested. Gives
    /// how many these were; all there are, only if KVM has filled more than there are.
    fn harvest(&mut self, mut found: impl FnMut(u32, u64)) -> u32 {
        for harvested in 0..self.count {
            let index = (self.next % self.count) as usize;
            // SAFETY: `index` is below the number of entries mapped.
            let entry = unsafe { self.entries.add(index) }.as_ptr();
            // SAFETY: the entry's first field, mapped and aligned; KVM accesses it atomically, too.
            let flags = unsafe { AtomicU32::from_ptr(entry.cast::<u32>()) };
            if flags.load(Ordering::Acquire) & KVM_DIRTY_GFN_F_DIRTY == 0 {
                return harvested;
            }
            // SAFETY: KVM does not touch an entry between filling it and its reset.
            let entry = unsafe { ptr::read_volatile(entry) };
            found(entry.slot, entry.offset);
            flags.store(KVM_DIRTY_GFN_F_RESET, Ordering::Release);
            self.next = self.next.wrapping_add(1);
        }
        self.count
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        let len = self.count as usize * size_of::<kvm_dirty_gfn>();
        // SAFETY: the mapping is ours, made in `map`, and ends with us.
        unsafe { libc::munmap(self.entries.as_ptr().cast(), len) };
    }
}
