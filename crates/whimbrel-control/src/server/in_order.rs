//! Commands that keep their order, for a client that has others overtake them.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{self, Receiver, SyncSender};
use std::thread::{self, JoinHandle};

use super::Shared;
use super::connection::deliver;
use super::outbox::Outbox;
use super::session::{Request, Session};

/// How many commands may wait for their turn, the one that is being executed included. A client with
/// more of them is not listened to, whatever it wants to overtake them. As many as in QEMU.
const MAX_WAITING: usize = 8;

/// A thread beside a client's own, which executes one command after the other while the client's
/// own listens on.
pub(super) struct InOrder {
    /// `None` when no more come.
    requests: Option<SyncSender<Request>>,
    /// Accepted and not answered.
    waiting: Arc<AtomicUsize>,
    thread: Option<JoinHandle<()>>,
}

impl InOrder {
    /// For the client `number`, which has negotiated.
    pub(super) fn start(
        number: usize,
        session: Session,
        shared: &Arc<Shared>,
        outbox: &Arc<Outbox>,
    ) -> io::Result<InOrder> {
        let (requests, received) = mpsc::sync_channel(MAX_WAITING);
        let waiting = Arc::new(AtomicUsize::new(0));
        let turns = Turns {
            shared: Arc::clone(shared),
            outbox: Arc::clone(outbox),
            waiting: Arc::clone(&waiting),
        };
        let thread = thread::Builder::new()
            .name(format!("qmp/order-{}", number % 1000))
            .spawn(move || turns.run(session, &received))?;
        Ok(InOrder { requests: Some(requests), waiting, thread: Some(thread) })
    }

    /// Whether no more may be added.
    pub(super) fn is_full(&self) -> bool {
        self.waiting.load(Ordering::Acquire) >= MAX_WAITING
    }

    /// Whether every reply is in the outbox.
    pub(super) fn is_idle(&self) -> bool {
        self.waiting.load(Ordering::Acquire) == 0
    }

    /// Has `request` executed behind all others; there is room for it.
    pub(super) fn push(&self, request: Request) -> io::Result<()> {
        self.waiting.fetch_add(1, Ordering::AcqRel);
        let sent =
            self.requests.as_ref().is_some_and(|requests| requests.try_send(request).is_ok());
        match sent {
            true => Ok(()),
            false => Err(io::Error::other("nobody executes its commands any more")),
        }
    }
}

impl Drop for InOrder {
    fn drop(&mut self) {
        // The client has gone: what it wanted in its turn is dropped, as in QEMU.
        self.requests = None;
        self.waiting.store(0, Ordering::Release);
        if let Some(thread) = self.thread.take() {
            // Should it have panicked, its message is out already.
            let _ = thread.join();
        }
    }
}

struct Turns {
    shared: Arc<Shared>,
    outbox: Arc<Outbox>,
    waiting: Arc<AtomicUsize>,
}

impl Turns {
    fn run(self, mut session: Session, requests: &Receiver<Request>) {
        while let Ok(request) = requests.recv() {
            if self.waiting.load(Ordering::Acquire) == 0 {
                return;
            }
            let answer = session.answer(request, &*self.shared.backend);
            deliver(&self.shared, &self.outbox, &answer);
            // Behind the reply: who finds nothing waiting finds all replies. It is 0 already if
            // the client has gone in the meantime.
            let less = |waiting: usize| waiting.checked_sub(1);
            let _ = self.waiting.fetch_update(Ordering::AcqRel, Ordering::Acquire, less);
            self.outbox.waker().wake();
        }
    }
}

impl Drop for Turns {
    fn drop(&mut self) {
        // Of importance after a panic alone: nobody waits for replies that do not come.
        self.waiting.store(0, Ordering::Release);
        self.outbox.waker().wake();
    }
}
