//! How soon a thread that wakes gets a processor that others keep busy.
#![expect(unsafe_code, reason = "rustix has no sched_setattr")]

use std::mem;

/// How long a thread runs until others have their turn. One that asks for so little gets it at
/// once (Linux 6.12 and later).
const SLICE_NS: u64 = 100_000;

/// The calling thread does little at a time, and somebody waits for it. Where the kernel does not
/// know this wish, or does not grant it, the thread is one like any other.
pub(super) fn run_soon_when_woken() {
    if let Some(now) = attributes() {
        set_attributes(&libc::sched_attr { sched_runtime: SLICE_NS, ..now });
    }
}

/// Those of the calling thread, if it is scheduled as most are.
fn attributes() -> Option<libc::sched_attr> {
    let mut attributes = libc::sched_attr {
        size: 0,
        sched_policy: 0,
        sched_flags: 0,
        sched_nice: 0,
        sched_priority: 0,
        sched_runtime: 0,
        sched_deadline: 0,
        sched_period: 0,
    };
    let size = mem::size_of::<libc::sched_attr>();
    // SAFETY: the kernel writes at most `size` bytes, and `attributes` has as many.
    let result = unsafe { libc::syscall(libc::SYS_sched_getattr, 0, &raw mut attributes, size, 0) };
    let ordinary = attributes.sched_policy == libc::SCHED_OTHER.unsigned_abs();
    (result == 0 && ordinary).then_some(attributes)
}

fn set_attributes(attributes: &libc::sched_attr) {
    // SAFETY: the kernel reads as many bytes as `size` in it says, which it wrote there itself.
    unsafe { libc::syscall(libc::SYS_sched_setattr, 0, &raw const *attributes, 0) };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_that_runs_soon_keeps_its_policy_and_niceness() {
        let before = attributes().unwrap();
        run_soon_when_woken();
        let after = attributes().unwrap();
        assert_eq!(after.sched_nice, before.sched_nice);
        // A kernel before 6.12 says 0 to both, and any other has taken it.
        assert!(after.sched_runtime == SLICE_NS || before.sched_runtime == 0, "{after:?}");
    }
}
