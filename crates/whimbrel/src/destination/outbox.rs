//! What is to be said on the return path, and is written by `dest/fault` alone: so that no thread
//! holds anything while another one's write waits for the source to read.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Mutex, MutexGuard, PoisonError};

use rustix::event::{EventfdFlags, eventfd};
use whimbrel_wire::ReturnMessage;

use crate::error::Error;

/// A source that does not read its answers may not have more of them kept than this.
const BYTES_MAX: usize = 64 << 10;

/// Messages on their way.
#[derive(Debug)]
pub(super) struct Outbox {
    bytes: Mutex<Vec<u8>>,
    wake: OwnedFd,
}

impl Outbox {
    pub(super) fn new() -> io::Result<Outbox> {
        let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Outbox { bytes: Mutex::default(), wake })
    }

    fn lock(&self) -> MutexGuard<'_, Vec<u8>> {
        self.bytes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Has a message sent.
    pub(super) fn push(&self, message: &ReturnMessage) -> Result<(), Error> {
        let mut bytes = self.lock();
        if bytes.len() > BYTES_MAX {
            return Err(Error::Refused(
                "return path channel: the source asks without end and reads no answer".into(),
            ));
        }
        message.encode(&mut bytes);
        drop(bytes);
        // A full counter is readable, too.
        let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
        Ok(())
    }

    /// Moves what is to be sent to the end of `out`.
    pub(super) fn take(&self, out: &mut Vec<u8>) {
        // Read so that it can wake again; not there is as good.
        let _ = rustix::io::read(&self.wake, &mut [0; 8]);
        out.append(&mut self.lock());
    }
}

impl AsFd for Outbox {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.wake.as_fd()
    }
}
