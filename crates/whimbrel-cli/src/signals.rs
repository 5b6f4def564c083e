//! SIGINT and SIGTERM, as a way to end in order.

use std::io;
use std::thread::{self, JoinHandle};

use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::{Handle, Signals};

/// Calls something when the process is told to end.
#[derive(Debug)]
pub(crate) struct OnSignal {
    handle: Handle,
    thread: Option<JoinHandle<()>>,
}

impl OnSignal {
    /// Calls `act` on every SIGINT or SIGTERM from now on, until dropped.
    pub(crate) fn call(act: impl Fn() + Send + 'static) -> io::Result<OnSignal> {
        let mut signals = Signals::new([SIGINT, SIGTERM])?;
        let handle = signals.handle();
        let thread = thread::Builder::new().name("signals".into()).spawn(move || {
            for _ in signals.forever() {
                act();
            }
        })?;
        Ok(OnSignal { handle, thread: Some(thread) })
    }
}

impl Drop for OnSignal {
    fn drop(&mut self) {
        self.handle.close();
        if let Some(thread) = self.thread.take() {
            // It does nothing that could panic but what it was given, which has told by then.
            let _ = thread.join();
        }
    }
}
