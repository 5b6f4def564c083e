//! What `source/urgent` has read of the return path, for `source/main` to wait for.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::error::Error;
use crate::worker::Cancel;

/// How often a wait looks whether the migration was cancelled.
const LOOK: Duration = Duration::from_millis(20);

/// What has been said so far.
#[derive(Debug, Default)]
pub(super) struct Said {
    inner: Mutex<Inner>,
    changed: Condvar,
    over: AtomicBool,
    asked: AtomicBool,
}

#[derive(Debug, Default)]
struct Inner {
    pongs: Vec<u32>,
    /// In a recovery, the destination has told what it has.
    told: bool,
    shut: Option<u32>,
    error: Option<Error>,
}

/// More different PONGs than any source asks for are not remembered.
const PONGS_MAX: usize = 16;

impl Said {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        // Only plain values are stored under the lock.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn pong(&self, value: u32) {
        let mut inner = self.lock();
        if inner.pongs.len() < PONGS_MAX {
            inner.pongs.push(value);
        }
        self.changed.notify_all();
    }

    /// The destination has told what it has.
    pub(super) fn told(&self) {
        self.lock().told = true;
        self.changed.notify_all();
    }

    /// Waits until it has.
    pub(super) fn wait_until_told(
        &self,
        limit: Option<Duration>,
        cancel: &Cancel,
    ) -> Result<(), Error> {
        self.wait(cancel, limit, |inner| inner.told.then_some(()))
    }

    /// The destination's last word.
    pub(super) fn shut(&self, value: u32) {
        self.lock().shut = Some(value);
        self.over.store(true, Ordering::Release);
        self.changed.notify_all();
    }

    /// Nothing more will be said, because of `error`.
    pub(super) fn failed(&self, error: Error) {
        self.lock().error.get_or_insert(error);
        self.over.store(true, Ordering::Release);
        self.changed.notify_all();
    }

    /// The destination is asked again and again whether it is there.
    pub(super) fn is_asked_from_now_on(&self) {
        self.asked.store(true, Ordering::Release);
    }

    /// Whether it is.
    pub(super) fn is_asked(&self) -> bool {
        self.asked.load(Ordering::Acquire)
    }

    /// Whether the last word has come, or the return path has failed: cheap, for a loop.
    pub(super) fn is_over(&self) -> bool {
        self.over.load(Ordering::Acquire)
    }

    /// Why there is no going on, as far as the return path knows: that it was told to end is no
    /// reason.
    pub(super) fn take_reason(&self) -> Option<Error> {
        let mut inner = self.lock();
        match (inner.error.take(), inner.shut) {
            (None | Some(Error::Cancelled), Some(0)) => Some(Error::PeerGone),
            (None | Some(Error::Cancelled), Some(_)) => Some(Error::PeerFailed),
            (None | Some(Error::Cancelled), None) => None,
            (reason, _) => reason,
        }
    }

    /// Waits for the answer to the PING of `value`, for `limit` at most.
    pub(super) fn wait_for_pong(
        &self,
        value: u32,
        limit: Option<Duration>,
        cancel: &Cancel,
    ) -> Result<(), Error> {
        self.wait(cancel, limit, |inner| inner.pongs.contains(&value).then_some(()))
    }

    /// Waits for the destination's last word.
    pub(super) fn wait_for_shut(&self, cancel: &Cancel) -> Result<u32, Error> {
        self.wait(cancel, None, |inner| inner.shut)
    }

    fn wait<T>(
        &self,
        cancel: &Cancel,
        limit: Option<Duration>,
        mut find: impl FnMut(&Inner) -> Option<T>,
    ) -> Result<T, Error> {
        let begun = Instant::now();
        let mut inner = self.lock();
        loop {
            if let Some(found) = find(&inner) {
                return Ok(found);
            }
            if let Some(error) = inner.error.take() {
                return Err(error);
            }
            if inner.shut.is_some() {
                return Err(Error::PeerFailed);
            }
            if cancel.is_set() {
                return Err(Error::Cancelled);
            }
            if let Some(limit) = limit.filter(|limit| begun.elapsed() >= *limit) {
                return Err(Error::Silent { channel: "return path", limit });
            }
            let woken = self.changed.wait_timeout(inner, LOOK);
            inner = woken.unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}
