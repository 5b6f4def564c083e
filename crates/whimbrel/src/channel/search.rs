//! Looking for a peer that could not be reached.
//!
//! A connection attempt over a dead link hangs for seconds, and would go on hanging when the link is
//! back. So a new one is begun again and again while those before are still under way; the first
//! that gets through is taken.

use std::io;
use std::net::{SocketAddr, ToSocketAddrs};
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{AddressFamily, SocketAddrUnix};

use super::connect::{nonblocking_socket, not_reached, open_error};
use super::{Channel, Kind, Route};
use crate::address::Address;
use crate::error::Error;
use crate::worker::{Cancel, Links};

/// How long an attempt goes on: longer than a handshake over any link that carries a guest.
const LIFE: Duration = Duration::from_secs(3);

/// How long a name's addresses are good for.
const NAMES: Duration = Duration::from_secs(1);

/// Attempts at a time, at most.
const ATTEMPTS_MAX: usize = 64;

/// The attempts under way.
#[derive(Debug, Default)]
pub(crate) struct Search {
    attempts: Vec<Attempt>,
    names: Vec<(Address, Instant, Vec<SocketAddr>)>,
    /// Why the last attempt failed.
    failed: Option<Error>,
}

#[derive(Debug)]
struct Attempt {
    socket: OwnedFd,
    route: Route,
    begun: Instant,
}

impl Search {
    /// Begins one more attempt to get to where `route` goes.
    pub(crate) fn begin(&mut self, route: &Route) {
        self.attempts.retain(|attempt| attempt.begun.elapsed() < LIFE);
        let excess = (self.attempts.len() + 1).saturating_sub(ATTEMPTS_MAX);
        self.attempts.drain(..excess);
        if let Err(source) = self.try_begin(route) {
            self.fail(route, source);
        }
    }

    fn fail(&mut self, route: &Route, source: io::Error) {
        self.failed = Some(not_reached(&route.address, source));
    }

    fn try_begin(&mut self, route: &Route) -> io::Result<()> {
        match &route.address {
            Address::Tcp { host, port } => {
                for address in self.addresses(&route.address, host, *port)? {
                    let family =
                        if address.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
                    let socket = nonblocking_socket(family)?;
                    rustix::net::sockopt::set_tcp_nodelay(&socket, true)?;
                    match rustix::net::connect(&socket, &address) {
                        Ok(()) | Err(rustix::io::Errno::INPROGRESS) => self.add(socket, route),
                        Err(error) => self.fail(route, error.into()),
                    }
                }
                Ok(())
            }
            Address::Unix(path) => {
                let socket = nonblocking_socket(AddressFamily::UNIX)?;
                rustix::net::connect(&socket, &SocketAddrUnix::new(&**path)?)?;
                self.add(socket, route);
                Ok(())
            }
            Address::Fd(_) | Address::Exec(_) | Address::File { .. } => Err(io::Error::new(
                io::ErrorKind::Unsupported,
                "a connection of this kind is made once: give another address",
            )),
        }
    }

    fn add(&mut self, socket: OwnedFd, route: &Route) {
        self.attempts.push(Attempt { socket, route: route.clone(), begun: Instant::now() });
    }

    fn addresses(
        &mut self,
        address: &Address,
        host: &str,
        port: u16,
    ) -> io::Result<Vec<SocketAddr>> {
        self.names.retain(|(_, since, _)| since.elapsed() < NAMES);
        if let Some((_, _, known)) = self.names.iter().find(|(known, ..)| known == address) {
            return Ok(known.clone());
        }
        let host = if host.is_empty() { "localhost" } else { host };
        let found: Vec<SocketAddr> = (host, port).to_socket_addrs()?.collect();
        self.names.push((address.clone(), Instant::now(), found.clone()));
        Ok(found)
    }

    /// What to wait for: one of the attempts has come to an end.
    pub(crate) fn fds(&self) -> impl Iterator<Item = PollFd<'_>> {
        let fd = |attempt| -> PollFd<'_> {
            let attempt: &Attempt = attempt;
            PollFd::from_borrowed_fd(attempt.socket.as_fd(), PollFlags::OUT)
        };
        self.attempts.iter().map(fd)
    }

    /// Whether no attempt is under way.
    pub(crate) fn is_over(&self) -> bool {
        self.attempts.iter().all(|attempt| attempt.begun.elapsed() >= LIFE)
    }

    /// Why the last attempt that failed did.
    pub(crate) fn take_failure(&mut self) -> Option<Error> {
        self.failed.take()
    }

    /// The first attempt that has got through, as the channel `name` of `links`; all others end.
    pub(crate) fn take_connected(
        &mut self,
        name: &'static str,
        cancel: &Cancel,
        links: &Links,
    ) -> Option<Result<(Channel, Route), Error>> {
        let mut connected = None;
        for attempt in std::mem::take(&mut self.attempts) {
            if connected.is_some() {
                continue; // Closed, should it get through.
            }
            match outcome(&attempt.socket) {
                None => self.attempts.push(attempt),
                Some(Ok(())) => connected = Some(attempt),
                Some(Err(source)) => self.fail(&attempt.route, source),
            }
        }
        let Attempt { socket, route, .. } = connected?;
        self.attempts.clear();
        let channel = Channel::new(name, socket, Kind::Socket, cancel)
            .map_err(|source| open_error(&route.address, source, cancel))
            .and_then(|channel| route.equip(channel.joined(links)));
        Some(channel.map(|channel| (channel, route)))
    }
}

/// How an attempt has ended; `None` while it is under way.
fn outcome(socket: &OwnedFd) -> Option<io::Result<()>> {
    let mut fds = [PollFd::from_borrowed_fd(socket.as_fd(), PollFlags::OUT)];
    match poll(&mut fds, Some(&Timespec::default())) {
        Ok(0) => None,
        Ok(_) => Some(match rustix::net::sockopt::socket_error(socket) {
            Ok(outcome) => outcome.map_err(io::Error::from),
            Err(error) => Err(error.into()),
        }),
        Err(error) => Some(Err(error.into())),
    }
}
