//! Processors that have something else to do: as other guests' vCPUs have.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{Builder, JoinHandle};

use anyhow::Result;

/// Threads that spin. Dropped, they end.
#[derive(Debug)]
pub(super) struct Busy {
    over: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

impl Busy {
    /// So many.
    pub(super) fn start(threads: usize) -> Result<Self> {
        let mut busy = Self { over: Arc::default(), threads: Vec::new() };
        for number in 0..threads {
            let over = busy.over.clone();
            let spin = move || {
                while !over.load(Ordering::Relaxed) {
                    std::hint::spin_loop();
                }
            };
            busy.threads.push(Builder::new().name(format!("busy-{number}")).spawn(spin)?);
        }
        Ok(busy)
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            // It does nothing that could panic.
            let _ = thread.join();
        }
    }
}
