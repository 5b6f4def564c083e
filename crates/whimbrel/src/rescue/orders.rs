//! What a paused destination can be told beside how to go on.
//!
//! Its RAM is `dest/main`'s. So a rescue is done by that thread, while it waits for the source: nothing
//! else happens to the migration meanwhile.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::mpsc;
use std::sync::{Mutex, MutexGuard, PoisonError};

use rustix::event::{EventfdFlags, PollFlags, eventfd};
use whimbrel_ram::AbsentRam;

use crate::error::Error;
use crate::worker::{Cancel, Woken};

type Order = Box<dyn FnOnce(&AbsentRam) + Send>;

/// Orders for the thread that has the RAM of a paused destination.
#[derive(Debug)]
pub(crate) struct Orders {
    inner: Mutex<Inner>,
    wake: OwnedFd,
}

#[derive(Default)]
struct Inner {
    /// Somebody obeys.
    attended: bool,
    queue: VecDeque<Order>,
}

impl std::fmt::Debug for Inner {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let waiting = self.queue.len();
        f.debug_struct("Inner")
            .field("attended", &self.attended)
            .field("waiting", &waiting)
            .finish()
    }
}

/// For as long as it is there, orders are obeyed by its owner.
#[derive(Debug)]
pub(crate) struct Attending<'o>(&'o Orders);

impl Drop for Attending<'_> {
    fn drop(&mut self) {
        let left = {
            let mut inner = self.0.lock();
            inner.attended = false;
            std::mem::take(&mut inner.queue)
        };
        drop(left); // Whoever waits for them is told, without the lock.
    }
}

impl Attending<'_> {
    /// Does what is ordered until the migration has `ended`, or all of RAM is there: then true.
    pub(crate) fn until_whole(&self, ended: &Cancel, absent: &AbsentRam) -> bool {
        loop {
            self.0.obey(absent);
            if absent.received().missing() == 0 {
                return true;
            }
            // Without descriptors to wait on there is nothing to be done but to end at once.
            let woken = ended.wait(self.0.wake.as_fd(), PollFlags::IN, None);
            if !matches!(woken, Ok(Woken::Ready)) {
                return false;
            }
        }
    }
}

impl Orders {
    pub(crate) fn new() -> io::Result<Orders> {
        let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Orders { inner: Mutex::default(), wake })
    }

    /// From here on the caller obeys: it waits until this is readable, and [obeys](Orders::obey).
    pub(crate) fn attend(&self) -> Attending<'_> {
        self.lock().attended = true;
        Attending(self)
    }

    /// Does what was ordered.
    pub(crate) fn obey(&self, absent: &AbsentRam) {
        // Before the queue is looked at: what comes after that rings anew.
        let _ = rustix::io::read(&self.wake, &mut [0; 8]);
        loop {
            let next = self.lock().queue.pop_front();
            match next {
                Some(order) => order(absent),
                None => return,
            }
        }
    }

    /// Has `work` done by whoever has the RAM, and waits for that.
    pub(crate) fn give<T: Send + 'static>(
        &self,
        work: impl FnOnce(&AbsentRam) -> Result<T, Error> + Send + 'static,
    ) -> Result<T, Error> {
        let (told, done) = mpsc::channel();
        {
            let mut inner = self.lock();
            if !inner.attended {
                return Err(not_paused());
            }
            inner.queue.push_back(Box::new(move |absent| {
                // Nobody who gave an order stops waiting for it.
                let _ = told.send(work(absent));
            }));
        }
        // A full counter is as readable as any.
        let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
        done.recv().unwrap_or_else(|_| Err(not_paused()))
    }

    /// How many orders wait.
    #[cfg(test)]
    pub(super) fn waiting(&self) -> usize {
        self.lock().queue.len()
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        // The queue is whole after every statement.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl AsFd for Orders {
    /// Readable when there are orders.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.wake.as_fd()
    }
}

/// Why there is nothing to be rescued.
pub(crate) fn not_paused() -> Error {
    Error::Refused(
        "there is nothing to be rescued: no migration here is paused in postcopy (postcopy-paused)"
            .into(),
    )
}
