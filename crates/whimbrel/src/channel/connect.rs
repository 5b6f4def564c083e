//! Opening the way out, at the source.

use std::io;
use std::net::{SocketAddr, ToSocketAddrs};
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::{Arc, Weak};
use std::time::Duration;

use rustix::event::PollFlags;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

use super::end::End;
use super::tls::TlsClient;
use super::{Channel, Kind, exec, fd, file, hint};
use crate::address::Address;
use crate::error::Error;
use crate::worker::{Cancel, Links, Woken};

/// Where channels go, and how.
#[derive(Clone, Debug)]
pub(crate) struct Route {
    pub(crate) address: Address,
    /// With it, every channel is secret.
    pub(crate) tls: Option<TlsClient>,
    /// How long the peer may take nothing of what is sent; `None` is for ever.
    pub(crate) silence: Option<Duration>,
}

impl Route {
    /// Connects to (or creates) what the address names, for writing: the channel `name`, one of
    /// `links`.
    pub(crate) fn connect(
        &self,
        name: &'static str,
        cancel: &Cancel,
        links: &Links,
    ) -> Result<Channel, Error> {
        self.equip(open(name, &self.address, cancel, links)?)
    }

    /// Makes a connection what it has to be before anything is said on it.
    pub(super) fn equip(&self, mut channel: Channel) -> Result<Channel, Error> {
        channel.wait_no_longer_than(self.silence);
        if let Some(tls) = &self.tls {
            channel.secure_as_client(tls)?;
            channel.finish_handshake()?;
        }
        Ok(channel)
    }
}

fn open(
    name: &'static str,
    address: &Address,
    cancel: &Cancel,
    links: &Links,
) -> Result<Channel, Error> {
    let (fd, kind) = match address {
        Address::Tcp { host, port } => tcp(host, *port, cancel, links).map(|fd| (fd, Kind::Socket)),
        Address::Unix(path) => unix(path).map(|fd| (fd, Kind::Socket)),
        Address::Fd(number) => fd::take(*number),
        Address::Exec(words) => {
            exec::Command::reader(address, words).map(|(fd, command)| (fd, Kind::Command(command)))
        }
        Address::File { path, offset } => {
            file::Target::create(path, *offset).map(|(fd, target)| (fd, Kind::File(target)))
        }
    }
    .map_err(|source| open_error(address, source, cancel))?;
    Channel::new(name, fd, kind, cancel)
        .map(|channel| channel.joined(links))
        .map_err(|source| open_error(address, source, cancel))
}

pub(super) fn open_error(address: &Address, source: io::Error, cancel: &Cancel) -> Error {
    match cancel.is_set() {
        true => Error::Cancelled,
        false => not_reached(address, source),
    }
}

pub(super) fn not_reached(address: &Address, source: io::Error) -> Error {
    let hint = hint(&source);
    Error::Open { address: address.clone(), source, hint }
}

fn tcp(host: &str, port: u16, cancel: &Cancel, links: &Links) -> io::Result<OwnedFd> {
    let host = if host.is_empty() { "localhost" } else { host };
    let mut last = io::Error::new(io::ErrorKind::NotFound, "the name has no address");
    for address in (host, port).to_socket_addrs()? {
        match tcp_to(&address, cancel, links) {
            Ok(fd) => return Ok(fd),
            Err(error) => last = error,
        }
    }
    Err(last)
}

fn tcp_to(address: &SocketAddr, cancel: &Cancel, links: &Links) -> io::Result<OwnedFd> {
    let family = if address.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    let socket = nonblocking_socket(family)?;
    // Nobody may answer there: this wait, too, can be ended.
    let end = Arc::new(End::socket(socket.try_clone()?));
    let joined: Weak<End> = Arc::downgrade(&end);
    links.join(joined);
    let connected = finish_connect(rustix::net::connect(&socket, address), &socket, cancel);
    end.check().and(connected)?;
    rustix::net::sockopt::set_tcp_nodelay(&socket, true)?;
    Ok(socket)
}

fn unix(path: &Path) -> io::Result<OwnedFd> {
    let socket = nonblocking_socket(AddressFamily::UNIX)?;
    rustix::net::connect(&socket, &SocketAddrUnix::new(path)?)?;
    Ok(socket)
}

pub(super) fn nonblocking_socket(family: AddressFamily) -> io::Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    Ok(rustix::net::socket_with(family, SocketType::STREAM, flags, None)?)
}

fn finish_connect(
    started: rustix::io::Result<()>,
    socket: &OwnedFd,
    cancel: &Cancel,
) -> io::Result<()> {
    match started {
        Ok(()) => Ok(()),
        Err(rustix::io::Errno::INPROGRESS) => {
            match cancel.wait(socket.as_fd(), PollFlags::OUT, None)? {
                Woken::Cancelled => Err(io::ErrorKind::Interrupted.into()),
                Woken::Ready | Woken::TimedOut => Ok(rustix::net::sockopt::socket_error(socket)??),
            }
        }
        Err(error) => Err(error.into()),
    }
}
