//! A channel's descriptor, and how it is ended from outside: QMP's `yank`.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::net::Shutdown;

use crate::worker::{Cancel, Shut};

/// This end of a connection, which both of its directions share.
#[derive(Debug)]
pub(super) struct End {
    fd: OwnedFd,
    shut: AtomicBool,
    /// For what is no socket, and so cannot be shut down: ends the waits instead.
    wake: Option<Cancel>,
}

impl End {
    /// The end of a socket.
    pub(super) fn socket(fd: OwnedFd) -> End {
        End { fd, shut: AtomicBool::new(false), wake: None }
    }

    /// The end of a pipe, or a file.
    pub(super) fn other(fd: OwnedFd) -> io::Result<End> {
        Ok(End { fd, shut: AtomicBool::new(false), wake: Some(Cancel::new()?) })
    }

    /// What ends the waits on it, where shutting it down does not.
    pub(super) fn wake(&self) -> Option<&Cancel> {
        self.wake.as_ref()
    }

    /// Fails once it has been shut down from this side.
    pub(super) fn check(&self) -> io::Result<()> {
        match self.shut.load(Ordering::SeqCst) {
            true => Err(shut_on_request()),
            false => Ok(()),
        }
    }

    /// Why a call failed: `error`, unless it only followed from what was done here.
    pub(super) fn cause(&self, error: io::Error) -> io::Error {
        self.check().err().unwrap_or(error)
    }
}

impl Shut for End {
    fn shut_down(&self) {
        self.shut.store(true, Ordering::SeqCst);
        match &self.wake {
            Some(wake) => wake.set(),
            None => shut_down(&self.fd),
        }
    }
}

impl AsFd for End {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// Ends every wait on a socket, connected or listening.
pub(super) fn shut_down(socket: &impl AsFd) {
    // It fails for one that was never connected, or is not any more: nobody waits there.
    let _ = rustix::net::shutdown(socket, Shutdown::Both);
}

/// The reason to be told then.
pub(super) fn shut_on_request() -> io::Error {
    io::Error::new(io::ErrorKind::NotConnected, "the connection was shut down on request (yank)")
}
