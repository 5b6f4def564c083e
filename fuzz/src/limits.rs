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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn more_than_the_limit_is_not_given() {
        let reserve = |bytes| Vec::<u8>::new().try_reserve_exact(bytes);
        limited(
            |data| {
                let reserve = |bytes| Vec::<u8>::new().try_reserve_exact(bytes);
                assert_eq!(data, [1; 3]);
                reserve(32 << 20).expect("half of it");
                // As much as all other tests of this process have room for, and more.
                reserve(16 * LIMIT).expect_err("too much");
            },
            &[1; 3],
        );
        reserve(16 * LIMIT).expect("there is no limit outside");
    }
}
