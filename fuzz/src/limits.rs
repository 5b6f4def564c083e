//! Memory: no input has the code take more than it should.

use std::alloc::System;
use std::panic;
use std::sync::Once;
use std::sync::atomic::{AtomicUsize, Ordering};

use cap::Cap;

/// Most bytes that any input may have taken at a time, for a guest of 8 MiB.
const LIMIT: usize = 64 << 20;

/// Everything that Rust code takes is counted, and what goes beyond the limit is not given.
#[global_allocator]
static MEMORY: Cap<System> = Cap::new(System, usize::MAX);

static RUNS: AtomicUsize = AtomicUsize::new(0);

/// Runs a target's body, with no more memory than [`LIMIT`] beside what is taken already. Where it
/// asks for more, the process is ended, as out of memory.
pub fn limited(body: fn(&[u8]), data: &[u8]) {
    static HOOK: Once = Once::new();
    HOOK.call_once(|| {
        let told = panic::take_hook();
        panic::set_hook(Box::new(move |info| {
            // Telling where it was takes more.
            let _ = MEMORY.set_limit(usize::MAX);
            told(info);
        }));
    });
    // Of bodies that run at the same time, as tests do, each has room for itself.
    RUNS.fetch_add(1, Ordering::SeqCst);
    let _end = End;
    limit();
    body(data);
}

/// Also where a body panics, as a finding does.
struct End;

impl Drop for End {
    fn drop(&mut self) {
        if RUNS.fetch_sub(1, Ordering::SeqCst) == 1 {
            // Never less than there is.
            let _ = MEMORY.set_limit(usize::MAX);
        }
    }
}

fn limit() {
    let room = LIMIT * RUNS.load(Ordering::SeqCst);
    let _ = MEMORY.set_limit(MEMORY.allocated() + room);
}

/// Bytes that are taken now.
#[must_use]
pub fn taken() -> usize {
    MEMORY.allocated()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_taken_is_counted() {
        let before = taken();
        let bytes = vec![1u8; 1 << 20];
        assert!(taken() >= before + bytes.len());
        limited(|data| assert_eq!(vec![0u8; 32 << 20].len() + data.len(), (32 << 20) + 3), &[1; 3]);
    }
}
