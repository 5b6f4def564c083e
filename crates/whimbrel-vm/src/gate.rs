//! The gate every vCPU thread passes: it holds them while the guest is stopped, wakes them from
//! any wait, and tells how many are held.

use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// What the vCPUs are to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Wish {
    Run,
    Stay,
    Quit,
}

#[derive(Debug)]
struct State {
    wish: Wish,
    /// How many vCPU threads are held at the gate, or have ended.
    held: usize,
    /// There is something for the thread that dozes.
    roused: bool,
    /// The first reason why a vCPU cannot go on.
    failure: Option<String>,
}

/// Holds and wakes the vCPU threads of one VM.
#[derive(Debug)]
pub(crate) struct Gate {
    vcpus: usize,
    state: Mutex<State>,
    changed: Condvar,
    /// Whether running vCPUs are to come back to the gate: what they look at between updates.
    recalled: AtomicBool,
    throttle: AtomicU8,
}

impl Gate {
    /// A gate for so many vCPUs, closed.
    pub(crate) fn new(vcpus: usize) -> Gate {
        Gate {
            vcpus,
            state: Mutex::new(State { wish: Wish::Stay, held: 0, roused: false, failure: None }),
            changed: Condvar::new(),
            recalled: AtomicBool::new(true),
            throttle: AtomicU8::new(0),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // The state is whole after every statement that changes it.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Called by a vCPU thread: waits until the guest runs. `false` when the thread is to end.
    pub(crate) fn pass(&self) -> bool {
        let mut state = self.lock();
        state.held += 1;
        self.changed.notify_all();
        while state.wish == Wish::Stay {
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        if state.wish == Wish::Quit {
            return false;
        }
        state.held -= 1;
        true
    }

    /// Called by a vCPU thread that cannot go on.
    pub(crate) fn fail(&self, failure: String) {
        let mut state = self.lock();
        state.failure.get_or_insert(failure);
    }

    /// Why a vCPU cannot go on.
    pub(crate) fn failure(&self) -> Option<String> {
        self.lock().failure.clone()
    }

    /// Whether vCPUs are to come back to the gate.
    pub(crate) fn recalled(&self) -> bool {
        self.recalled.load(Ordering::SeqCst)
    }

    /// Called by a vCPU thread: waits until `until` (for ever without) or until it is recalled.
    pub(crate) fn sleep(&self, until: Option<Instant>) {
        self.wait(until, false);
    }

    /// Called by the one thread that waits for more than time: as [`sleep`](Gate::sleep), or until it
    /// is roused.
    pub(crate) fn doze(&self, until: Option<Instant>) {
        self.wait(until, true);
    }

    /// Wakes the thread that dozes, or dozes next.
    pub(crate) fn rouse(&self) {
        self.lock().roused = true;
        self.changed.notify_all();
    }

    fn wait(&self, until: Option<Instant>, dozes: bool) {
        let mut state = self.lock();
        while state.wish == Wish::Run {
            if dozes && std::mem::replace(&mut state.roused, false) {
                return;
            }
            let wait = match until {
                None => Duration::from_secs(3600),
                Some(until) => match until.checked_duration_since(Instant::now()) {
                    None | Some(Duration::ZERO) => return,
                    Some(wait) => wait,
                },
            };
            let woken = self.changed.wait_timeout(state, wait);
            state = woken.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Lets the vCPUs run.
    pub(crate) fn open(&self) {
        let mut state = self.lock();
        if state.wish == Wish::Stay {
            state.wish = Wish::Run;
            self.recalled.store(false, Ordering::SeqCst);
            self.changed.notify_all();
        }
    }

    /// Recalls the vCPUs and waits until all are held, at most for `limit` and not when they are told
    /// to end; `kick` gets out of
    /// the guest those that cannot look at the gate. Gives how many still run.
    pub(crate) fn close(&self, limit: Duration, kick: impl Fn()) -> usize {
        /// A kick that met a vCPU between two waits is repeated: harmless, and bounds the pause.
        const KICK_AGAIN: Duration = Duration::from_millis(2);
        let deadline = Instant::now() + limit;
        let mut state = self.lock();
        if state.wish == Wish::Run {
            state.wish = Wish::Stay;
        }
        self.recalled.store(true, Ordering::SeqCst);
        self.changed.notify_all();
        while state.held < self.vcpus {
            drop(state);
            kick();
            state = self.lock();
            if state.held == self.vcpus || state.wish == Wish::Quit {
                break;
            }
            let Some(left) = deadline.checked_duration_since(Instant::now()) else { break };
            let woken = self.changed.wait_timeout(state, left.min(KICK_AGAIN));
            state = woken.unwrap_or_else(PoisonError::into_inner).0;
        }
        self.vcpus - state.held
    }

    /// Whether all vCPUs are held.
    pub(crate) fn closed(&self) -> bool {
        let state = self.lock();
        state.wish != Wish::Run && state.held == self.vcpus
    }

    /// Ends the vCPU threads, which are still to be kicked.
    pub(crate) fn quit(&self) {
        let mut state = self.lock();
        state.wish = Wish::Quit;
        self.recalled.store(true, Ordering::SeqCst);
        self.changed.notify_all();
    }

    /// Slows every vCPU down to `100 - percent` of the time.
    pub(crate) fn set_throttle(&self, percent: u8) {
        self.throttle.store(percent.min(99), Ordering::Relaxed);
    }

    /// 0 to 99.
    pub(crate) fn throttle(&self) -> u8 {
        self.throttle.load(Ordering::Relaxed)
    }
}
