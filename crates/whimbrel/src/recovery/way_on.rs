//! How a paused migration is told to go on.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::worker::Bell;

/// What somebody said last that has not been heeded yet: where to connect to, or where to wait.
#[derive(Debug)]
pub(crate) struct WayOn<T> {
    next: Mutex<Option<T>>,
    bell: Bell,
}

impl<T> WayOn<T> {
    pub(crate) fn new() -> io::Result<WayOn<T>> {
        Ok(WayOn { next: Mutex::new(None), bell: Bell::new()? })
    }

    fn lock(&self) -> MutexGuard<'_, Option<T>> {
        // A whole value is stored under it.
        self.next.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// This is how; what was said before and not heeded is not.
    pub(crate) fn tell(&self, way: T) {
        let before = self.lock().replace(way);
        self.bell.ring();
        drop(before); // It may be a socket: closed without the lock.
    }

    /// Takes what was said.
    pub(crate) fn take(&self) -> Option<T> {
        self.bell.heed();
        self.lock().take()
    }
}

impl<T> AsFd for WayOn<T> {
    /// Readable when something has been said.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.bell.as_fd()
    }
}
