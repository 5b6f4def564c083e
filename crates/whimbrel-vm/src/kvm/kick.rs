//! Getting a vCPU out of the guest from another thread.
#![expect(unsafe_code, reason = "writes a flag that the kernel reads, in memory a vCPU shares")]

use std::sync::atomic::{AtomicU8, Ordering};

use kvm_ioctls::VcpuFd;

/// The `immediate_exit` flag of one vCPU: while it is set, `KVM_RUN` comes back at once. It is
/// set before the signal is sent, so that the signal is never lost between two runs.
#[derive(Debug)]
pub(crate) struct Kick(*mut u8);

// SAFETY: the pointer is only ever used for atomic accesses.
unsafe impl Send for Kick {}
// SAFETY: as above.
unsafe impl Sync for Kick {}

impl Kick {
    /// The flag of `fd`, to be kept no longer than `fd` is: its owner holds both.
    pub(crate) fn of(fd: &mut VcpuFd) -> Kick {
        Kick(&raw mut fd.get_kvm_run().immediate_exit)
    }

    fn flag(&self) -> &AtomicU8 {
        // SAFETY: the byte lies in the vCPU's shared mapping, which lives as long as the vCPU's
        // owner, who holds this value too; everyone else accesses it atomically or in the kernel.
        unsafe { AtomicU8::from_ptr(self.0) }
    }

    pub(crate) fn set(&self) {
        self.flag().store(1, Ordering::SeqCst);
    }

    pub(crate) fn clear(&self) {
        self.flag().store(0, Ordering::SeqCst);
    }
}
