//! The link between the two sides, in this process: every connection goes through it, and it fails
//! as it was planned to.
//!
//! One thread forwards all connections of a run ([`relay`]); what it does to one of them is in
//! [`link`], and what it knows of the bytes in [`reading`].

mod link;
mod reading;
mod relay;
mod socket;
#[cfg(test)]
mod tests;

use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{Builder, JoinHandle};
use std::time::Instant;

use anyhow::Result;
use rustix::event::{EventfdFlags, eventfd};
use rustix::process::Pid;

use crate::phase::Phase;
use crate::plan::{Plan, Side};
use relay::Relay;
pub(crate) use socket::Place;

/// What the run tells the link.
#[derive(Clone, Debug)]
enum Order {
    /// A fault that is not the link's own to time.
    Fire(usize),
    /// From now on the link is a good one.
    Heal,
    /// New connections go there.
    Upstream(Place),
    End,
}

/// A fault that has happened.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Fired {
    /// Which of the plan's.
    pub(crate) fault: usize,
    pub(crate) phase: Phase,
    pub(crate) at: Instant,
}

#[derive(Debug)]
struct Shared {
    wake: OwnedFd,
    orders: Mutex<Vec<Order>>,
    fired: Mutex<Vec<Fired>>,
    /// Bytes forwarded.
    moved: AtomicU64,
    /// Something is timed: the link is going to change by itself.
    busy: AtomicBool,
    /// What the run knows of the phase.
    phase: AtomicU8,
    stopped: [AtomicBool; 2],
    killed: [AtomicBool; 2],
}

impl Shared {
    fn fired(&self) -> MutexGuard<'_, Vec<Fired>> {
        // The list is whole after every statement.
        self.fired.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn orders(&self) -> MutexGuard<'_, Vec<Order>> {
        self.orders.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A link that forwards, until it fails. Dropped, it closes all its connections.
#[derive(Debug)]
pub(crate) struct Proxy {
    place: Place,
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl Proxy {
    /// Listens at `at`, and forwards to `upstream`. `processes` are the source's and the
    /// destination's: faults are theirs, too.
    pub(crate) fn start(
        plan: &Plan,
        at: &Place,
        upstream: Place,
        processes: [Pid; 2],
    ) -> Result<Proxy> {
        let shared = Arc::new(Shared {
            wake: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
            orders: Mutex::default(),
            fired: Mutex::default(),
            moved: AtomicU64::new(0),
            busy: AtomicBool::new(true),
            phase: AtomicU8::new(0),
            stopped: Default::default(),
            killed: Default::default(),
        });
        let relay = Relay::new(plan, at, upstream, processes, shared.clone())?;
        let place = relay.place()?;
        let thread = Builder::new().name("proxy".into()).spawn(move || relay.run())?;
        Ok(Proxy { place, shared, thread: Some(thread) })
    }

    /// Where the source is to connect.
    pub(crate) fn place(&self) -> &Place {
        &self.place
    }

    /// Has a fault happen now.
    pub(crate) fn fire(&self, fault: usize) {
        self.tell(Order::Fire(fault));
    }

    /// From now on the link is a good one.
    pub(crate) fn heal(&self) {
        self.tell(Order::Heal);
    }

    /// New connections go to `place`.
    pub(crate) fn lead_to(&self, place: Place) {
        self.tell(Order::Upstream(place));
    }

    fn tell(&self, order: Order) {
        self.shared.orders().push(order);
        wake(&self.shared.wake).expect("an eventfd takes 1");
    }

    /// The faults that have happened since this was last asked.
    pub(crate) fn fired(&self) -> Vec<Fired> {
        std::mem::take(&mut *self.shared.fired())
    }

    /// Bytes forwarded so far.
    pub(crate) fn moved(&self) -> u64 {
        self.shared.moved.load(Ordering::Relaxed)
    }

    /// Whether something is timed, so that the link is going to change by itself.
    pub(crate) fn is_busy(&self) -> bool {
        self.shared.busy.load(Ordering::SeqCst)
    }

    /// What is known of the phase from elsewhere than the bytes.
    pub(crate) fn set_phase(&self, phase: Phase) {
        self.shared.phase.store(phase as u8, Ordering::Relaxed);
    }

    /// Whether the side is held by SIGSTOP.
    pub(crate) fn has_stopped(&self, side: Side) -> bool {
        self.shared.stopped[side as usize].load(Ordering::SeqCst)
    }

    /// Whether the side was killed, as planned.
    pub(crate) fn has_killed(&self, side: Side) -> bool {
        self.shared.killed[side as usize].load(Ordering::SeqCst)
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.tell(Order::End);
        let ended = self.thread.take().map(JoinHandle::join);
        assert!(
            ended.is_none_or(|ended| ended.is_ok()) || std::thread::panicking(),
            "the proxy panicked"
        );
    }
}

fn wake(fd: &OwnedFd) -> io::Result<()> {
    match rustix::io::write(fd, &1u64.to_ne_bytes()) {
        // Full is as good.
        Ok(_) | Err(rustix::io::Errno::AGAIN) => Ok(()),
        Err(error) => Err(error.into()),
    }
}
