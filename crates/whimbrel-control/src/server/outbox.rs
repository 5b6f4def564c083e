//! What waits to be sent to a client, and what wakes its thread.

use std::io;
use std::mem;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Mutex, MutexGuard, PoisonError};

use rustix::event::{EventfdFlags, eventfd};

/// An eventfd: one thread polls it, any thread wakes it.
pub(super) struct Waker(OwnedFd);

impl Waker {
    pub(super) fn new() -> io::Result<Waker> {
        Ok(Waker(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?))
    }

    pub(super) fn wake(&self) {
        // It fails only if it has been woken 2^64 - 2 times and not polled: awake enough.
        let _ = rustix::io::write(&self.0, &1u64.to_ne_bytes());
    }

    pub(super) fn clear(&self) {
        // It fails only if nobody has woken it.
        let _ = rustix::io::read(&self.0, &mut [0; 8]);
    }
}

impl AsFd for Waker {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Lines for one client. Whoever adds one never waits for the client.
pub(super) struct Outbox {
    max_backlog: usize,
    waker: Waker,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    lines: Vec<u8>,
    /// Taken by the client's thread and not sent yet.
    being_sent: usize,
    negotiated: bool,
    too_slow: bool,
    ending: bool,
    quit: bool,
}

/// What a client's thread has to know each time it wakes up.
pub(super) struct Condition {
    /// The server ends.
    pub(super) ending: bool,
    /// Events had to be dropped: the client has missed something, so it must go.
    pub(super) too_slow: bool,
    /// Bytes not sent yet.
    pub(super) backlog: usize,
}

impl Outbox {
    pub(super) fn new(max_backlog: usize) -> io::Result<Outbox> {
        Ok(Outbox { max_backlog, waker: Waker::new()?, state: Mutex::default() })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn waker(&self) -> &Waker {
        &self.waker
    }

    /// Adds a reply. That is done while the backlog is low, and for the few commands that had been
    /// accepted by then, so this needs no bound of its own.
    pub(super) fn push_reply(&self, line: &[u8]) {
        self.state().lines.extend_from_slice(line);
    }

    /// Adds an event, if the client has negotiated. One that has not made room is given up.
    pub(super) fn push_event(&self, line: &[u8]) {
        let mut state = self.state();
        if !state.negotiated || state.too_slow {
            return;
        }
        if state.lines.len() + state.being_sent + line.len() > self.max_backlog {
            state.too_slow = true;
        } else {
            state.lines.extend_from_slice(line);
        }
        drop(state);
        self.waker.wake();
    }

    /// Whether the client gets events.
    pub(super) fn has_negotiated(&self) -> bool {
        self.state().negotiated
    }

    /// From now on the client gets events.
    pub(super) fn negotiated(&self) {
        self.state().negotiated = true;
    }

    /// Has the client's thread end the VMM, once the reply that says so is out.
    pub(super) fn quit(&self) {
        self.state().quit = true;
    }

    /// Whether [`Outbox::quit`] was called since this was asked last.
    pub(super) fn take_quit(&self) -> bool {
        mem::take(&mut self.state().quit)
    }

    /// Tells the client's thread to end.
    pub(super) fn end(&self) {
        self.state().ending = true;
        self.waker.wake();
    }

    pub(super) fn condition(&self) -> Condition {
        let state = self.state();
        Condition {
            ending: state.ending,
            too_slow: state.too_slow,
            backlog: state.lines.len() + state.being_sent,
        }
    }

    /// Moves what waits to the end of `bytes`, which the client's thread sends.
    pub(super) fn take(&self, bytes: &mut Vec<u8>) {
        let mut state = self.state();
        state.being_sent += state.lines.len();
        bytes.append(&mut state.lines);
    }

    /// `count` bytes of what was taken have been sent.
    pub(super) fn sent(&self, count: usize) {
        self.state().being_sent -= count;
    }
}
