//! One client: its thread reads requests, sends replies and events, and waits for nothing else.

use std::io::{self, ErrorKind, Read, Write};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, poll};

use super::in_order::InOrder;
use super::outbox::Outbox;
use super::session::{Answer, Session};
use super::{Shared, event};
use crate::framing::Framing;
use crate::stream::Stream;

/// The longest request. QMP's own stay below 4 KiB.
const MAX_REQUEST: usize = 64 << 10;
/// Read at a time.
const READ_SIZE: usize = 4 << 10;
/// With this much to send, no more requests are taken: a client that does not read its replies
/// waits for itself.
const PAUSE_BACKLOG: usize = 64 << 10;
/// How long the reply to `quit` may take to go out before the VMM ends without it.
const QUIT_FLUSH: Duration = Duration::from_millis(500);

/// A client's place in the server, given up on drop, even by a thread that panics.
pub(super) struct Entered {
    shared: Arc<Shared>,
    outbox: Arc<Outbox>,
}

impl Entered {
    pub(super) fn new(shared: Arc<Shared>, outbox: Arc<Outbox>) -> Entered {
        Entered { shared, outbox }
    }
}

impl Drop for Entered {
    fn drop(&mut self) {
        self.shared.clients().retain(|other| !Arc::ptr_eq(other, &self.outbox));
        self.shared.waker.wake();
    }
}

/// Serves a client until it goes, fails, falls behind, or the server ends.
pub(super) fn serve(stream: &Stream, entered: &Entered, number: usize) {
    let mut connection = Connection {
        stream,
        shared: &entered.shared,
        outbox: &entered.outbox,
        number,
        session: Session::new(),
        in_order: None,
        framing: Framing::new(MAX_REQUEST),
        unsent: Vec::new(),
        at_end: false,
    };
    if let Err(error) = connection.run() {
        let ordinary = matches!(
            error.kind(),
            ErrorKind::BrokenPipe | ErrorKind::ConnectionReset | ErrorKind::UnexpectedEof
        );
        if !ordinary {
            entered.shared.report(&format!("client {number} was disconnected: {error}"));
        }
    }
}

struct Connection<'c> {
    stream: &'c Stream,
    shared: &'c Arc<Shared>,
    outbox: &'c Arc<Outbox>,
    number: usize,
    session: Session,
    /// Executes what keeps its order, once the client may have commands overtake others.
    in_order: Option<InOrder>,
    framing: Framing,
    /// Taken from the outbox.
    unsent: Vec<u8>,
    /// The client sends no more.
    at_end: bool,
}

impl Connection<'_> {
    fn run(&mut self) -> io::Result<()> {
        self.outbox.push_reply(&Session::greeting());
        loop {
            let paused = self.answer_all()?;
            self.end_if_told();
            // Before a look at the backlog, to which a reply is added before nothing waits for one.
            let idle = self.in_order.as_ref().is_none_or(InOrder::is_idle);
            self.send()?;
            let condition = self.outbox.condition();
            if condition.ending {
                return self.send();
            }
            if self.at_end && !paused && idle && condition.backlog == 0 {
                return Ok(());
            }
            if condition.too_slow {
                let kept = self.shared.options.max_backlog;
                return Err(io::Error::other(format!(
                    "it does not read its events ({kept} bytes waited for it)"
                )));
            }
            if paused && !self.is_held_up() {
                continue;
            }
            let mut interest = PollFlags::empty();
            interest.set(PollFlags::IN, !paused && !self.at_end);
            interest.set(PollFlags::OUT, condition.backlog > 0);
            if self.wait(interest, None)?.intersects(PollFlags::IN) {
                self.receive()?;
            }
        }
    }

    /// Waits until the stream is ready, the waker woken or the time is over.
    fn wait(&self, interest: PollFlags, timeout: Option<Duration>) -> io::Result<PollFlags> {
        let timeout = timeout.map(TryInto::try_into).transpose().map_err(io::Error::other)?;
        let mut ready =
            [PollFd::new(self.outbox.waker(), PollFlags::IN), PollFd::new(self.stream, interest)];
        match poll(&mut ready, timeout.as_ref()) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        let [waker, stream] = ready.map(|fd| fd.revents());
        if !waker.is_empty() {
            self.outbox.waker().clear();
        }
        // Gone altogether: nothing that is unsent can be delivered any more. While the client may
        // have left requests behind, reading finds the end of them.
        let gone = stream.intersects(PollFlags::ERR | PollFlags::HUP);
        if gone && !stream.intersects(PollFlags::IN) && !interest.intersects(PollFlags::IN) {
            return Err(ErrorKind::BrokenPipe.into());
        }
        Ok(if gone { stream | PollFlags::IN } else { stream })
    }

    fn receive(&mut self) -> io::Result<()> {
        let mut buffer = [0; READ_SIZE];
        match (&mut &*self.stream).read(&mut buffer) {
            Ok(0) => self.at_end = true,
            Ok(count) => self.framing.feed(&buffer[..count]),
            Err(error) if is_temporary(&error) => {}
            Err(error) => return Err(error),
        }
        Ok(())
    }

    /// Whether replies have to go first, or commands to be executed, before more are taken.
    fn is_held_up(&self) -> bool {
        self.outbox.condition().backlog >= PAUSE_BACKLOG
            || self.in_order.as_ref().is_some_and(InOrder::is_full)
    }

    /// Answers what has been read, or has it answered in its turn; true if requests are left.
    fn answer_all(&mut self) -> io::Result<bool> {
        while !self.is_held_up() {
            let Some(message) = self.framing.next_value() else { return Ok(false) };
            let stranger = message.is_err() && !self.session.is_negotiated();
            let request = self.session.read(message);
            match &self.in_order {
                Some(in_order) if !request.overtakes() => in_order.push(request)?,
                _ => {
                    let answer = self.session.answer(request, &*self.shared.backend);
                    deliver(self.shared, self.outbox, &answer);
                    if self.session.is_negotiated() {
                        self.outbox.negotiated();
                    }
                    self.end_if_told();
                }
            }
            if stranger {
                // A browser's request is no JSON either, and the body that follows it may be.
                self.send()?;
                return Err(io::Error::other("it does not speak QMP"));
            }
            if self.session.is_out_of_band() && self.in_order.is_none() {
                let session = self.session.clone();
                self.in_order =
                    Some(InOrder::start(self.number, session, self.shared, self.outbox)?);
            }
        }
        Ok(true)
    }

    /// Ends the VMM, if a command said so, with its reply sent before.
    fn end_if_told(&mut self) {
        if self.outbox.take_quit() {
            self.flush_for(QUIT_FLUSH);
            self.shared.backend.quit();
        }
    }

    /// Sends what can be sent at once.
    fn send(&mut self) -> io::Result<()> {
        self.outbox.take(&mut self.unsent);
        while !self.unsent.is_empty() {
            match (&mut &*self.stream).write(&self.unsent) {
                Ok(0) => return Err(ErrorKind::WriteZero.into()),
                Ok(count) => {
                    self.unsent.drain(..count);
                    self.outbox.sent(count);
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if is_temporary(&error) => return Ok(()),
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Sends all there is, if the client takes it within `limit`.
    fn flush_for(&mut self, limit: Duration) {
        let deadline = Instant::now() + limit;
        while self.send().is_ok() && !self.unsent.is_empty() {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() || self.wait(PollFlags::OUT, Some(left)).is_err() {
                return;
            }
        }
    }
}

/// Leaves an answer for the client's thread to send.
pub(super) fn deliver(shared: &Shared, outbox: &Outbox, answer: &Answer) {
    if answer.quit {
        shared.send_event(&event::shutdown_line());
    }
    outbox.push_reply(&answer.line);
    if answer.quit {
        outbox.quit();
    }
}

fn is_temporary(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted)
}
