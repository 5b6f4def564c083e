//! What is to be said on the return path, and is written by `dest/fault` alone: so that no thread
//! holds anything while another one's write waits for the source to read.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Mutex, MutexGuard, PoisonError};

use whimbrel_wire::ReturnMessage;

use crate::channel::Channel;
use crate::error::Error;
use crate::recovery::exchange::Say;
use crate::worker::Bell;

/// A source that does not read its answers may not have more of them kept than this.
const BYTES_MAX: usize = 64 << 10;

/// Messages on their way, and the connection they go on, while there is one.
#[derive(Debug)]
pub(super) struct Outbox {
    inner: Mutex<Inner>,
    bell: Bell,
}

#[derive(Debug, Default)]
struct Inner {
    /// `Some` when the connection is another one since the last look; `Some(None)` when it is gone.
    line: Option<Option<Channel>>,
    is_connected: bool,
    say: Vec<Say>,
    bytes: usize,
}

/// What is new since the last look.
#[derive(Debug)]
pub(super) struct News {
    /// The connection to write to from now on, if it is another one; `Some(None)` is none.
    pub(super) line: Option<Option<Channel>>,
    /// What to write to it.
    pub(super) say: Vec<Say>,
}

impl Outbox {
    pub(super) fn new() -> io::Result<Outbox> {
        Ok(Outbox { inner: Mutex::default(), bell: Bell::new()? })
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// This is the return path from now on; `first` is what to say before anything else.
    pub(super) fn connect(&self, line: Channel, first: Vec<Say>) {
        let inner = Inner { line: Some(Some(line)), is_connected: true, say: first, bytes: 0 };
        let before = std::mem::replace(&mut *self.lock(), inner);
        self.bell.ring();
        drop(before); // Perhaps the last to hold a connection: closed without the lock.
    }

    /// There is no return path for the time being: what was to be said on it is not.
    pub(super) fn disconnect(&self) {
        let inner = Inner { line: Some(None), ..Inner::default() };
        let before = std::mem::replace(&mut *self.lock(), inner);
        self.bell.ring();
        drop(before);
    }

    /// Has a message sent, if there is somebody to hear it.
    pub(super) fn push(&self, message: &ReturnMessage) -> Result<(), Error> {
        let mut bytes = Vec::new();
        message.encode(&mut bytes);
        self.say(vec![Say::Words(bytes)])
    }

    /// Has it said, if there is somebody to hear it.
    pub(super) fn say(&self, say: Vec<Say>) -> Result<(), Error> {
        let mut inner = self.lock();
        if !inner.is_connected {
            return Ok(());
        }
        if inner.bytes > BYTES_MAX {
            return Err(Error::Refused(
                "return path channel: the source asks without end and reads no answer".into(),
            ));
        }
        inner.bytes += say.iter().map(cost).sum::<usize>();
        inner.say.extend(say);
        drop(inner);
        self.bell.ring();
        Ok(())
    }

    /// Takes what is new.
    pub(super) fn take(&self) -> News {
        self.bell.heed();
        let mut inner = self.lock();
        inner.bytes = 0;
        News { line: inner.line.take(), say: std::mem::take(&mut inner.say) }
    }
}

/// What something that is still to be said counts.
fn cost(say: &Say) -> usize {
    const LEAST: usize = 64;
    match say {
        Say::Words(bytes) => bytes.len(),
        Say::Bitmap(_) | Say::Requests => LEAST,
    }
}

impl AsFd for Outbox {
    /// Readable when there is something new.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.bell.as_fd()
    }
}
