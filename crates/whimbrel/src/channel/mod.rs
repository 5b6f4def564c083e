//! The wire: one connection, file or command, with blocking reads and writes that a
//! [`Cancel`] ends.
//!
//! Descriptors are non-blocking and every wait is a `poll` on the descriptor and the
//! cancellation together, so that a stalled peer never holds a thread.

mod arrivals;
mod connect;
mod end;
mod exec;
mod fd;
mod file;
pub(crate) mod link;
mod listen;
pub(crate) mod name;
mod search;
pub(crate) mod tls;
pub mod unix_socket;
mod visitors;
mod waiting;
mod zero_copy;

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::RecvFlags;
use whimbrel_ram::kernel_copy::{Gather, Scatter};

use crate::error::Error;
use crate::worker::{Cancel, Links, Shut, Woken};

use end::End;

pub(crate) use arrivals::Arrivals;
pub(crate) use connect::Route;
pub(crate) use file::create_partial;
pub(crate) use listen::Listener;
pub(crate) use search::Search;
use tls::{Fault, Handshake, Progress, Sent, Session, TlsClient, TlsServer};
pub(crate) use visitors::Judged;
pub(crate) use zero_copy::ZeroCopy;

/// What a channel is made of, and what has to happen at its end.
#[derive(Debug)]
enum Kind {
    Socket,
    Pipe,
    File(file::Target),
    Command(exec::Command),
}

/// One channel of a migration. Dropped without [`finish`](Channel::finish), it leaves nothing
/// half written behind.
#[derive(Debug)]
pub(crate) struct Channel {
    name: &'static str,
    end: Arc<End>,
    kind: Kind,
    cancel: Cancel,
    bytes_in: u64,
    bytes_out: u64,
    /// Each write goes out apart from the next ([`link::hold`]).
    apart: bool,
    /// How long the peer may take nothing of what is sent, and how long it may say nothing; `None`
    /// is for ever.
    takes_within: Option<Duration>,
    speaks_within: Option<Duration>,
    security: Security,
}

/// Who can read a channel's bytes on their way.
#[derive(Debug)]
enum Security {
    /// Everybody.
    Plain,
    /// Nobody will: until then nothing of the migration's is sent or received.
    Handshake(Box<Handshake>),
    /// Nobody.
    Secret(Arc<Session>),
}

impl Channel {
    fn new(name: &'static str, fd: OwnedFd, kind: Kind, cancel: &Cancel) -> io::Result<Channel> {
        // Files are never waited for; O_NONBLOCK means nothing to them.
        rustix::io::ioctl_fionbio(&fd, !matches!(kind, Kind::File(_)))
            .or_else(|error| if matches!(kind, Kind::Pipe) { Ok(()) } else { Err(error) })?;
        let end = Arc::new(match kind {
            Kind::Socket => End::socket(fd),
            Kind::Pipe | Kind::File(_) | Kind::Command(_) => End::other(fd)?,
        });
        Ok(Channel {
            name,
            end,
            kind,
            cancel: cancel.clone(),
            bytes_in: 0,
            bytes_out: 0,
            apart: false,
            takes_within: None,
            speaks_within: None,
            security: Security::Plain,
        })
    }

    /// From here on a peer that takes nothing for so long has gone, be it that the link is dead or
    /// that nobody reads at its other end.
    pub(crate) fn wait_no_longer_than(&mut self, silence: Option<Duration>) {
        self.takes_within = silence;
        if let Some(silence) = silence {
            link::watch(self.end.as_fd(), silence);
        }
    }

    /// From here on a peer that says nothing for so long has gone: where it has promised to.
    pub(crate) fn expect_something_within(&mut self, silence: Option<Duration>) {
        self.speaks_within = silence;
    }

    /// Begins the handshake of the side that has connected.
    pub(crate) fn secure_as_client(&mut self, how: &TlsClient) -> Result<(), Error> {
        self.begin_handshake(Handshake::connect(how))
    }

    /// Begins the handshake of the side that was connected to.
    pub(crate) fn secure_as_server(&mut self, how: &TlsServer) -> Result<(), Error> {
        self.begin_handshake(Handshake::accept(how))
    }

    fn begin_handshake(&mut self, handshake: Result<Handshake, String>) -> Result<(), Error> {
        if !self.is_two_way() {
            return Err(self.tls_error(
                "a handshake needs a way back, which this transport has not: use tcp: or unix:, or \
                 unset tls-creds"
                    .into(),
            ));
        }
        let handshake = handshake.map_err(|reason| self.tls_error(reason))?;
        self.security = Security::Handshake(Box::new(handshake));
        Ok(())
    }

    /// Goes on with the handshake, as far as that is possible without waiting; gives what the
    /// descriptor has to be ready for before it can go on, or `None` when there is nothing to do.
    pub(crate) fn handshake(&mut self) -> Result<Option<PollFlags>, Error> {
        let Security::Handshake(handshake) = &mut self.security else { return Ok(None) };
        match handshake.step(self.end.as_fd()) {
            Ok(Progress::Needs(what)) => Ok(Some(what)),
            Ok(Progress::Done(session)) => {
                self.security = Security::Secret(session);
                Ok(None)
            }
            Err(reason) => {
                // Not the other side's doing, where it was shut down here.
                self.check(0)?;
                Err(self.tls_error(reason))
            }
        }
    }

    /// When the handshake has to be over, if it is not.
    pub(crate) fn handshake_deadline(&self) -> Option<Instant> {
        match &self.security {
            Security::Handshake(handshake) => Some(handshake.deadline()),
            Security::Plain | Security::Secret(_) => None,
        }
    }

    /// Goes through with the handshake, if there is one.
    pub(crate) fn finish_handshake(&mut self) -> Result<(), Error> {
        while let Some(what) = self.handshake()? {
            let deadline = self.handshake_deadline().unwrap_or_else(Instant::now);
            let left = deadline.saturating_duration_since(Instant::now());
            match self.wait(what, Some(left)) {
                Ok(Woken::Cancelled) => return Err(Error::Cancelled),
                Ok(Woken::Ready | Woken::TimedOut) => {}
                Err(error) => return Err(self.error(error, 0)),
            }
        }
        Ok(())
    }

    fn session(&self) -> Option<Arc<Session>> {
        match &self.security {
            Security::Plain => None,
            Security::Secret(session) => Some(session.clone()),
            Security::Handshake(_) => {
                unreachable!("whoever uses a channel has made it a secret one")
            }
        }
    }

    /// The same connection as a channel of its own, for the other direction.
    pub(crate) fn other_direction(&self, name: &'static str) -> Channel {
        let (end, cancel) = (self.end.clone(), self.cancel.clone());
        let kind = Kind::Socket;
        let security = self.session().map_or(Security::Plain, Security::Secret);
        Channel {
            name,
            end,
            kind,
            cancel,
            bytes_in: 0,
            bytes_out: 0,
            apart: false,
            takes_within: self.takes_within,
            speaks_within: None,
            security,
        }
    }

    /// As one of a migration's connections, which [`Links::shut_down`] ends.
    pub(crate) fn joined(self, links: &Links) -> Channel {
        let end: Weak<End> = Arc::downgrade(&self.end);
        links.join(end);
        self
    }

    /// Waits until a write is likely to go through, for `timeout` at most.
    pub(crate) fn ready_to_send(&self, timeout: Option<Duration>) -> Result<Woken, Error> {
        match self.wait(PollFlags::OUT, timeout.or(self.takes_within)) {
            Ok(Woken::Cancelled) => Err(Error::Cancelled),
            Ok(Woken::TimedOut) if timeout.is_none() => Err(self.silent(self.takes_within)),
            Ok(woken) => Ok(woken),
            Err(error) => Err(self.error(error, self.bytes_out)),
        }
    }

    /// From here on each write goes out apart from the next.
    pub(crate) fn send_apart(&mut self) {
        self.apart = true;
    }

    /// The channel's name, for errors.
    pub(crate) fn name(&self) -> &'static str {
        self.name
    }

    /// What is there already, without taking it; `None` when nothing is, 0 at the end of the stream.
    pub(crate) fn peek(&mut self, buffer: &mut [u8]) -> Result<Option<usize>, Error> {
        if self.handshake()?.is_some() {
            return Ok(None);
        }
        let there = match self.session() {
            Some(session) => session.peek(self.end.as_fd(), buffer),
            None => {
                let flags = RecvFlags::PEEK | RecvFlags::DONTWAIT;
                match rustix::net::recv(&*self.end, buffer, flags) {
                    Ok((_, bytes)) => Ok(Some(bytes)),
                    Err(Errno::AGAIN | Errno::INTR) => Ok(None),
                    Err(error) => Err(Fault::System(error.into())),
                }
            }
        };
        there.map_err(|fault| self.fault(fault, self.bytes_in))
    }

    /// It is known now what the channel is for, and what ends its waits.
    fn known_as(mut self, name: &'static str, cancel: &Cancel) -> Channel {
        self.rename(name);
        self.heed(cancel.clone());
        self
    }

    /// Whether the peer has closed its direction, however much of what it sent has still to be read.
    pub(crate) fn is_closed_by_peer(&self) -> bool {
        let mut fds = [PollFd::from_borrowed_fd(self.end.as_fd(), PollFlags::RDHUP)];
        matches!(poll(&mut fds, Some(&Timespec::default())), Ok(1..))
    }

    /// It is known now what the channel is for.
    pub(crate) fn rename(&mut self, name: &'static str) {
        self.name = name;
    }

    /// From here on `cancel` is what ends its waits; gives what did before.
    pub(crate) fn heed(&mut self, cancel: Cancel) -> Cancel {
        std::mem::replace(&mut self.cancel, cancel)
    }

    /// How many bytes have been written.
    pub(crate) fn bytes_out(&self) -> u64 {
        self.bytes_out
    }

    /// Whether the other side can answer on the same channel.
    pub(crate) fn is_two_way(&self) -> bool {
        matches!(self.kind, Kind::Socket)
    }

    /// Whether what is written is kept rather than taken by somebody who runs it.
    pub(crate) fn is_kept(&self) -> bool {
        matches!(self.kind, Kind::File(_))
    }

    /// Writes all of `pieces`. What has not gone out as a whole when this fails, the peer can, on a
    /// secret channel, read nothing of.
    pub(crate) fn send(&mut self, pieces: &mut Gather<'_>) -> Result<(), Error> {
        if let Some(session) = self.session() {
            return self.send_secretly(&session, pieces);
        }
        while pieces.bytes_left() > 0 {
            self.check(self.bytes_out)?;
            let sent = match self.kind {
                Kind::Socket => pieces.send(self.end.as_fd(), self.apart),
                Kind::Pipe | Kind::File(_) | Kind::Command(_) => pieces.write(self.end.as_fd()),
            };
            match sent {
                Ok(bytes) => self.bytes_out += bytes as u64,
                Err(error) => self.wait_after(error, PollFlags::OUT, self.bytes_out)?,
            }
        }
        Ok(())
    }

    fn send_secretly(&mut self, session: &Session, pieces: &mut Gather<'_>) -> Result<(), Error> {
        loop {
            self.check(self.bytes_out)?;
            match session.send(self.end.as_fd(), pieces, self.apart) {
                Ok(Sent::All) => return Ok(()),
                Ok(Sent::Some(bytes)) => self.bytes_out += bytes as u64,
                Err(Fault::System(error)) if is_passing(&error) => {
                    self.wait_after(error, PollFlags::OUT, self.bytes_out)?;
                }
                Err(fault) => {
                    // The reason often lies unread on the other direction.
                    let said = session.last_word(self.end.as_fd());
                    return Err(self.fault(said.unwrap_or(fault), self.bytes_out));
                }
            }
        }
    }

    /// Writes all of `bytes`.
    pub(crate) fn send_bytes(&mut self, bytes: &[u8]) -> Result<(), Error> {
        let mut pieces = Gather::new();
        pieces.push_bytes(bytes);
        self.send(&mut pieces)
    }

    /// Fills some of `pieces`, waiting for the first byte; 0 at the end of the stream.
    pub(crate) fn receive(&mut self, pieces: &mut Scatter<'_>) -> Result<usize, Error> {
        loop {
            if let Some(bytes) = self.try_receive(pieces)? {
                return Ok(bytes);
            }
            self.wait_for(PollFlags::IN, self.bytes_in)?;
        }
    }

    /// Fills some of `pieces` with what is there; `None` when nothing is, and then the descriptor
    /// tells when something may be. Never waits.
    ///
    /// Only this, and not the descriptor alone, tells whether there is something to be received: a
    /// secret channel may hold what has been read from the descriptor, and what has been read may
    /// be nothing yet.
    pub(crate) fn try_receive(&mut self, pieces: &mut Scatter<'_>) -> Result<Option<usize>, Error> {
        self.check(self.bytes_in)?;
        let received = match self.session() {
            Some(session) => session.receive(self.end.as_fd(), pieces),
            None => self.try_read(pieces).map_err(Fault::System),
        };
        let received = received.map_err(|fault| self.fault(fault, self.bytes_in))?;
        if received == Some(0) {
            // Not the other side's doing, where it was shut down here.
            self.check(self.bytes_in)?;
        }
        self.bytes_in += received.unwrap_or(0) as u64;
        Ok(received)
    }

    fn try_read(&self, pieces: &mut Scatter<'_>) -> io::Result<Option<usize>> {
        loop {
            match pieces.read(self.end.as_fd()) {
                Ok(bytes) => return Ok(Some(bytes)),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }

    /// Reads what is there already, or comes before `deadline`; `None` when nothing is.
    pub(crate) fn receive_until(
        &mut self,
        buffer: &mut [u8],
        deadline: Instant,
    ) -> Result<Option<usize>, Error> {
        loop {
            let mut pieces = Scatter::new();
            pieces.push_buffer(buffer);
            if let Some(bytes) = self.try_receive(&mut pieces)? {
                return Ok(Some(bytes));
            }
            let left = deadline.saturating_duration_since(Instant::now());
            match self.wait(PollFlags::IN, Some(left)) {
                Ok(Woken::Cancelled) => return Err(Error::Cancelled),
                Ok(Woken::TimedOut) => return Ok(None),
                Ok(Woken::Ready) => {}
                Err(error) => return Err(self.error(error, self.bytes_in)),
            }
        }
    }

    /// Fills all of `buffer` before `deadline`.
    pub(crate) fn receive_all_until(
        &mut self,
        buffer: &mut [u8],
        deadline: Instant,
        what: &'static str,
    ) -> Result<(), Error> {
        let (begun, mut got) = (Instant::now(), 0);
        while got < buffer.len() {
            match self.receive_until(&mut buffer[got..], deadline)? {
                Some(0) => {
                    let (channel, offset) = (self.name, self.bytes_in);
                    return Err(Error::Ended { channel, offset, expected: what.into() });
                }
                Some(bytes) => got += bytes,
                None => {
                    let limit = deadline.saturating_duration_since(begun);
                    return Err(Error::Silent { channel: self.name, limit });
                }
            }
        }
        Ok(())
    }

    /// Waits for the descriptor, or the end of all waiting.
    fn wait(&self, ready: PollFlags, timeout: Option<Duration>) -> io::Result<Woken> {
        let fd = self.end.as_fd();
        match self.end.wake() {
            None => self.cancel.wait(fd, ready, timeout),
            Some(wake) => self.cancel.wait_or(wake, fd, ready, timeout),
        }
    }

    /// Whether it was ended from this side, and why.
    fn check(&self, offset: u64) -> Result<(), Error> {
        if self.cancel.is_set() {
            return Err(Error::Cancelled);
        }
        self.end.check().map_err(|source| Error::Channel { channel: self.name, offset, source })
    }

    fn wait_after(&self, error: io::Error, ready: PollFlags, offset: u64) -> Result<(), Error> {
        match error.kind() {
            io::ErrorKind::Interrupted => Ok(()),
            io::ErrorKind::WouldBlock => self.wait_for(ready, offset),
            _ => Err(self.error(error, offset)),
        }
    }

    fn wait_for(&self, ready: PollFlags, offset: u64) -> Result<(), Error> {
        let within = if ready == PollFlags::IN { self.speaks_within } else { self.takes_within };
        match self.wait(ready, within) {
            Ok(Woken::Cancelled) => Err(Error::Cancelled),
            Ok(Woken::TimedOut) => Err(self.silent(within)),
            Ok(Woken::Ready) => Ok(()),
            Err(error) => Err(self.error(error, offset)),
        }
    }

    fn silent(&self, within: Option<Duration>) -> Error {
        Error::Silent { channel: self.name, limit: within.unwrap_or_default() }
    }

    fn error(&self, source: io::Error, offset: u64) -> Error {
        Error::Channel { channel: self.name, offset, source: self.end.cause(source) }
    }

    fn fault(&self, fault: Fault, offset: u64) -> Error {
        match fault {
            Fault::System(source) => self.error(source, offset),
            Fault::Truncated => match self.check(offset) {
                Ok(()) => Error::Truncated { channel: self.name, offset },
                Err(reason) => reason,
            },
            other => self.tls_error(format!("byte {offset}: {}", tls::explain(&other))),
        }
    }

    fn tls_error(&self, reason: String) -> Error {
        Error::Tls { channel: self.name, reason }
    }

    /// Ends the connection, in both directions, for whoever is at its other end to know.
    pub(crate) fn hang_up(&self) {
        self.end.shut_down();
    }

    /// Sleeps, unless cancelled, or the connection is gone altogether.
    pub(crate) fn pause(&self, time: Duration) -> Result<(), Error> {
        // Nothing is asked of the descriptor: it is ready when there is nothing left to wait for.
        match self.wait(PollFlags::empty(), Some(time)) {
            Ok(Woken::Cancelled) => Err(Error::Cancelled),
            Ok(Woken::Ready | Woken::TimedOut) => self.check(self.bytes_out),
            Err(error) => Err(self.error(error, self.bytes_out)),
        }
    }

    /// Everything was written or read: closes, keeps the file, waits for the command.
    pub(crate) fn finish(mut self) -> Result<(), Error> {
        self.say_goodbye();
        let offset = self.bytes_out;
        match self.kind {
            Kind::Socket | Kind::Pipe => Ok(()),
            Kind::File(target) => target.keep(&*self.end).map_err(|source| Error::Channel {
                channel: self.name,
                offset,
                source,
            }),
            Kind::Command(command) => {
                let yanked = self.end.wake().cloned().unwrap_or_else(|| self.cancel.clone());
                drop(self.end); // The command sees the end of its input.
                command.finish(&self.cancel, &yanked)
            }
        }
    }
}

impl Channel {
    /// On a secret channel, says that this was all: a peer may insist on it. Whoever does not read
    /// it, or has gone, has what matters already.
    fn say_goodbye(&mut self) {
        let Security::Secret(session) = &self.security else { return };
        session.end();
        let deadline = Instant::now() + GOODBYE;
        loop {
            match session.send(self.end.as_fd(), &mut Gather::new(), false) {
                Ok(Sent::Some(_)) => {}
                Err(Fault::System(error)) if is_passing(&error) => {
                    let left = deadline.saturating_duration_since(Instant::now());
                    let woken = self.wait(PollFlags::OUT, Some(left));
                    if !matches!(woken, Ok(Woken::Ready)) {
                        return;
                    }
                }
                Ok(Sent::All) | Err(_) => return,
            }
        }
    }
}

/// How long a peer may take to read that this was all.
const GOODBYE: Duration = Duration::from_secs(1);

/// Whether it is not an error but a matter of time.
fn is_passing(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted)
}

impl AsFd for Channel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.end.as_fd()
    }
}

fn hint(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::ConnectionRefused => ": nobody listens there; start the destination first",
        io::ErrorKind::AddrInUse => ": the address is in use; choose another, or end who has it",
        io::ErrorKind::NotFound => ": no such file or socket; check the path",
        io::ErrorKind::PermissionDenied => ": check its owner and mode",
        _ => "",
    }
}
