//! KVM's dirty log: one bitmap a slot.
//!
//! With manual clear (`KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2`) taking the log leaves the pages
//! writable and their bits set; they are protected again, and their bits cleared, just before
//! they are read, a chunk at a time. So pages that the guest writes between being taken and being
//! read cost neither a fault nor a second sending. `KVM_DIRTY_LOG_INITIALLY_SET` spares the guest
//! the stall of protecting all of its memory at the start.
#![expect(unsafe_code, reason = "KVM's ioctls")]

use std::io;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use kvm_bindings::{
    KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, KVM_DIRTY_LOG_INITIALLY_SET,
    KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE, kvm_clear_dirty_log, kvm_clear_dirty_log__bindgen_ty_1,
    kvm_dirty_log, kvm_dirty_log__bindgen_ty_1,
};

use super::bits::Returned;
use super::kvm::{KvmSlot, KvmSlots, checked};
use super::{DirtyBits, DirtyLog};
use crate::{BlockIndex, GuestRam, TargetPage};

/// `_IOW(0xAE, 0x42, struct kvm_dirty_log)`.
const KVM_GET_DIRTY_LOG: libc::Ioctl = 0x4010_AE42;
/// `_IOWR(0xAE, 0xc0, struct kvm_clear_dirty_log)`.
const KVM_CLEAR_DIRTY_LOG: libc::Ioctl = 0xC018_AEC0;

/// The words of a bitmap whose pages are cleared together: 32 MiB of memory. Every clearing
/// flushes the TLBs of all vCPUs, so not too few; what it clears early may be written again
/// before it is read, so not too many.
const CHUNK_WORDS: usize = 128;

/// KVM's dirty log of some slots.
#[derive(Debug)]
pub struct KvmLog {
    slots: KvmSlots,
    manual: bool,
    /// One a slot.
    chunks: Box<[Chunks]>,
    state: Mutex<State>,
    returned: Returned,
}

/// Which chunks of a slot hold pages that were taken and not cleared. Read without the lock.
#[derive(Debug)]
struct Chunks(Box<[AtomicBool]>);

#[derive(Debug)]
struct State {
    running: bool,
    /// Per slot: what was taken and not cleared yet.
    taken: Box<[Box<[u64]>]>,
}

impl KvmLog {
    /// For the slots of a VM that has been given them already, without logging. Everything the
    /// log needs is set up here; whether manual clear is used depends on the kernel alone.
    ///
    /// # Panics
    /// When a slot is not inside its block, or not made of whole words of its bitmap.
    pub fn new(vm: &impl AsRawFd, slots: &[KvmSlot], ram: &GuestRam) -> io::Result<KvmLog> {
        let slots = KvmSlots::new(vm, slots, ram)?;
        let wanted = KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE | KVM_DIRTY_LOG_INITIALLY_SET;
        let offered = slots.extension(KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2) & wanted;
        let manual = offered & KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE != 0;
        if manual {
            slots.enable(KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, u64::from(offered))?;
        }
        let chunks = |slot: &KvmSlot| {
            let count = slot.words().div_ceil(CHUNK_WORDS);
            Chunks((0..count).map(|_| AtomicBool::new(false)).collect())
        };
        let chunks = slots.slots.iter().map(chunks).collect();
        let taken = slots.slots.iter().map(|slot| vec![0; slot.words()].into()).collect();
        let state = Mutex::new(State { running: false, taken });
        Ok(KvmLog { slots, manual, chunks, state, returned: Returned::default() })
    }

    /// Whether the kernel leaves clearing to us.
    pub fn is_manual(&self) -> bool {
        self.manual
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn forget(&self, state: &mut State) {
        state.taken.iter_mut().for_each(|words| words.fill(0));
        for flag in self.chunks.iter().flat_map(|chunks| &chunks.0) {
            flag.store(false, Ordering::Relaxed);
        }
    }

    fn get(&self, slot: &KvmSlot, words: &mut [u64]) -> io::Result<()> {
        let log = kvm_dirty_log {
            slot: slot.slot,
            padding1: 0,
            __bindgen_anon_1: kvm_dirty_log__bindgen_ty_1 {
                dirty_bitmap: words.as_mut_ptr().cast(),
            },
        };
        // SAFETY: KVM writes one bit a page of the slot, rounded up to words: `words` has as many.
        checked(unsafe { libc::ioctl(self.slots.vm_fd(), KVM_GET_DIRTY_LOG, &raw const log) })?;
        Ok(())
    }

    fn clear(&self, slot: &KvmSlot, first_word: usize, words: &mut [u64]) -> io::Result<()> {
        let first_page = first_word as u64 * 64;
        // A multiple of 64, or up to the slot's end.
        let pages = (slot.pages() - first_page).min(words.len() as u64 * 64);
        let log = kvm_clear_dirty_log {
            slot: slot.slot,
            num_pages: u32::try_from(pages).expect("a chunk"),
            first_page,
            __bindgen_anon_1: kvm_clear_dirty_log__bindgen_ty_1 {
                dirty_bitmap: words.as_mut_ptr().cast(),
            },
        };
        // SAFETY: KVM reads one bit for each of `num_pages`: `words` has as many.
        checked(unsafe { libc::ioctl(self.slots.vm_fd(), KVM_CLEAR_DIRTY_LOG, &raw const log) })?;
        Ok(())
    }

    fn take_slot(&self, at: usize, state: &mut State, bits: &mut DirtyBits) -> io::Result<()> {
        let slot = &self.slots.slots[at];
        let mut words = vec![0; slot.words()];
        self.get(slot, &mut words)?;
        let to = &mut bits.words_mut(slot.block)[slot.first_word()..][..words.len()];
        to.iter_mut().zip(&words).for_each(|(to, word)| *to |= word);
        if self.manual {
            for (flag, chunk) in self.chunks[at].0.iter().zip(words.chunks(CHUNK_WORDS)) {
                if chunk.iter().any(|&word| word != 0) {
                    flag.store(true, Ordering::Release);
                }
            }
            state.taken[at].copy_from_slice(&words);
        }
        Ok(())
    }

    fn rearm_chunk(&self, at: usize, chunk: usize) -> io::Result<()> {
        let flag = &self.chunks[at].0[chunk];
        if !flag.load(Ordering::Acquire) {
            return Ok(());
        }
        let mut state = self.state();
        // Another thread may have done it while we waited for the lock.
        if state.running && flag.load(Ordering::Relaxed) {
            let first = chunk * CHUNK_WORDS;
            let words = &mut state.taken[at];
            let end = words.len().min(first + CHUNK_WORDS);
            self.clear(&self.slots.slots[at], first, &mut words[first..end])?;
            words[first..end].fill(0);
            // Only now: who finds it unset reads pages that are protected already.
            flag.store(false, Ordering::Release);
        }
        Ok(())
    }
}

impl DirtyLog for KvmLog {
    fn start(&self) -> io::Result<()> {
        let mut state = self.state();
        if state.running {
            state.running = false;
            self.slots.set_logging(false)?;
        }
        self.forget(&mut state);
        self.slots.set_logging(true)?;
        state.running = true;
        Ok(())
    }

    fn take(&self) -> io::Result<DirtyBits> {
        let mut bits = DirtyBits::none(&self.slots.ram);
        let mut state = self.state();
        if state.running {
            for at in 0..self.slots.slots.len() {
                if let Err(error) = self.take_slot(at, &mut state, &mut bits) {
                    self.returned.give_back(bits);
                    return Err(error);
                }
            }
        }
        self.returned.take_into(&mut bits);
        Ok(bits)
    }

    fn put_back(&self, bits: DirtyBits) {
        self.returned.give_back(bits);
    }

    fn rearm(&self, block: BlockIndex, first: TargetPage, count: u64) -> io::Result<()> {
        if !self.manual || count == 0 {
            return Ok(());
        }
        for (at, slot) in self.slots.slots.iter().enumerate() {
            let start = slot.offset / 4096;
            let (from, to) = (first.0.max(start), (first.0 + count).min(start + slot.pages()));
            if slot.block != block || from >= to {
                continue;
            }
            let chunk = |page: u64| {
                let word = usize::try_from((page - start) / 64).expect("RAM fits in memory");
                word / CHUNK_WORDS
            };
            for chunk in chunk(from)..=chunk(to - 1) {
                self.rearm_chunk(at, chunk)?;
            }
        }
        Ok(())
    }

    fn stop(&self) {
        let mut state = self.state();
        if std::mem::replace(&mut state.running, false) {
            // It can fail only for a VM that is no more.
            let _ = self.slots.set_logging(false);
        }
        self.forget(&mut state);
    }
}
