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
mod zero_copy;

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use rustix::event::PollFlags;
use rustix::net::RecvFlags;
use whimbrel_ram::kernel_copy::{Gather, Scatter};

use crate::error::Error;
use crate::worker::{Cancel, Links, Woken};

use end::End;

pub(crate) use arrivals::Arrivals;
pub(crate) use connect::connect;
pub(crate) use file::create_partial;
pub(crate) use listen::Listener;
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
        })
    }

    /// The same connection as a channel of its own, for the other direction.
    pub(crate) fn other_direction(&self, name: &'static str) -> Channel {
        let (end, cancel) = (self.end.clone(), self.cancel.clone());
        let kind = Kind::Socket;
        Channel { name, end, kind, cancel, bytes_in: 0, bytes_out: 0, apart: false }
    }

    /// As one of a migration's connections, which [`Links::shut_down`] ends.
    pub(crate) fn joined(self, links: &Links) -> Channel {
        let end: Weak<End> = Arc::downgrade(&self.end);
        links.join(end);
        self
    }

    /// Waits until a write is likely to go through, for `timeout` at most.
    pub(crate) fn ready_to_send(&self, timeout: Option<Duration>) -> Result<Woken, Error> {
        match self.wait(PollFlags::OUT, timeout) {
            Ok(Woken::Cancelled) => Err(Error::Cancelled),
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
    pub(crate) fn peek(&self, buffer: &mut [u8]) -> Result<Option<usize>, Error> {
        match rustix::net::recv(&*self.end, buffer, RecvFlags::PEEK | RecvFlags::DONTWAIT) {
            Ok((_, bytes)) => Ok(Some(bytes)),
            Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => Ok(None),
            Err(error) => Err(self.error(error.into(), self.bytes_in)),
        }
    }

    /// It is known now what the channel is for.
    pub(crate) fn rename(&mut self, name: &'static str) {
        self.name = name;
    }

    /// From here on `cancel` is what ends its waits.
    pub(crate) fn heed(&mut self, cancel: Cancel) {
        self.cancel = cancel;
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

    /// Writes all of `pieces`.
    pub(crate) fn send(&mut self, pieces: &mut Gather<'_>) -> Result<(), Error> {
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

    /// Writes all of `bytes`.
    pub(crate) fn send_bytes(&mut self, bytes: &[u8]) -> Result<(), Error> {
        let mut pieces = Gather::new();
        pieces.push_bytes(bytes);
        self.send(&mut pieces)
    }

    /// Fills some of `pieces`, waiting for the first byte; 0 at the end of the stream.
    pub(crate) fn receive(&mut self, pieces: &mut Scatter<'_>) -> Result<usize, Error> {
        loop {
            self.check(self.bytes_in)?;
            match pieces.read(self.end.as_fd()) {
                Ok(bytes) => {
                    if bytes == 0 {
                        // Not the other side's doing, where it was shut down here.
                        self.check(self.bytes_in)?;
                    }
                    self.bytes_in += bytes as u64;
                    return Ok(bytes);
                }
                Err(error) => self.wait_after(error, PollFlags::IN, self.bytes_in)?,
            }
        }
    }

    /// Reads what is there already, or comes before `deadline`; `None` when nothing is.
    pub(crate) fn receive_until(
        &mut self,
        buffer: &mut [u8],
        deadline: Instant,
    ) -> Result<Option<usize>, Error> {
        let timeout = deadline.saturating_duration_since(Instant::now());
        let woken = self
            .wait(PollFlags::IN, Some(timeout))
            .map_err(|source| self.error(source, self.bytes_in))?;
        match woken {
            Woken::Cancelled => Err(Error::Cancelled),
            Woken::TimedOut => Ok(None),
            Woken::Ready => {
                let mut pieces = Scatter::new();
                pieces.push_buffer(buffer);
                self.receive(&mut pieces).map(Some)
            }
        }
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
            io::ErrorKind::WouldBlock => match self.wait(ready, None) {
                Ok(Woken::Cancelled) => Err(Error::Cancelled),
                Ok(Woken::Ready | Woken::TimedOut) => Ok(()),
                Err(error) => Err(self.error(error, offset)),
            },
            _ => Err(self.error(error, offset)),
        }
    }

    fn error(&self, source: io::Error, offset: u64) -> Error {
        Error::Channel { channel: self.name, offset, source: self.end.cause(source) }
    }

    /// Sleeps, unless cancelled.
    pub(crate) fn pause(&self, time: Duration) -> Result<(), Error> {
        match self.cancel.sleep(time) {
            Ok(Woken::Cancelled) => Err(Error::Cancelled),
            Ok(Woken::Ready | Woken::TimedOut) => Ok(()),
            Err(error) => Err(self.error(error, self.bytes_out)),
        }
    }

    /// Everything was written or read: closes, keeps the file, waits for the command.
    pub(crate) fn finish(self) -> Result<(), Error> {
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
