//! Waiting for the way in, at the destination.

use std::fs;
use std::io;
use std::net::{SocketAddr, TcpListener, ToSocketAddrs};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::connect::open_error;
use super::tls::TlsServer;
use super::waiting::Waiting;
use super::{Channel, Kind, exec, fd, file};
use crate::address::Address;
use crate::error::Error;
use crate::status::SocketAddressInfo;
use crate::worker::Cancel;

/// A bound address that the source has not come to yet.
#[derive(Debug)]
pub(crate) struct Listener {
    address: Address,
    socket: Socket,
    /// With it, every channel is secret.
    tls: Option<TlsServer>,
    /// Connections that have come, and that nobody has waited for yet.
    waiting: Mutex<Waiting>,
    refusals: Refusals,
}

/// Connections that were turned away while others are waited for.
#[derive(Default)]
struct Refusals {
    told: Option<Box<dyn Fn(&Error) + Send + Sync>>,
    last: Mutex<Option<String>>,
}

impl std::fmt::Debug for Refusals {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Refusals").field("last", &self.last).finish_non_exhaustive()
    }
}

#[derive(Debug)]
enum Socket {
    Tcp(TcpListener),
    Unix(UnixListener, SocketFile),
    /// Nothing to wait for: opened when it is accepted.
    Direct,
}

/// The name of a Unix socket in the file system; it goes when the listener goes.
#[derive(Debug)]
struct SocketFile(PathBuf);

impl Drop for SocketFile {
    fn drop(&mut self) {
        // Gone already is as good.
        let _ = fs::remove_file(&self.0);
    }
}

impl Listener {
    /// Binds `address`, so that a source can connect from now on.
    pub(crate) fn bind(address: &Address, cancel: &Cancel) -> Result<Listener, Error> {
        let socket = match address {
            Address::Tcp { host, port } => tcp(host, *port).map(Socket::Tcp),
            Address::Unix(path) => unix(path),
            Address::Fd(_) | Address::Exec(_) | Address::File { .. } => Ok(Socket::Direct),
        }
        .map_err(|source| open_error(address, source, cancel))?;
        Ok(Listener {
            address: address.clone(),
            socket,
            tls: None,
            waiting: Mutex::default(),
            refusals: Refusals::default(),
        })
    }

    /// With `tls`, every channel is secret, or it is none.
    pub(crate) fn secured(self, tls: Option<TlsServer>) -> Listener {
        Listener { tls, ..self }
    }

    /// Calls `told` with the reason whenever a connection is turned away and another one waited
    /// for. It must not block.
    pub(crate) fn telling(self, told: impl Fn(&Error) + Send + Sync + 'static) -> Listener {
        let refusals = Refusals { told: Some(Box::new(told)), ..self.refusals };
        Listener { refusals, ..self }
    }

    /// A connection has been turned away.
    pub(super) fn refuse(&self, reason: &Error) {
        *lock(&self.refusals.last) = Some(reason.to_string());
        if let Some(told) = &self.refusals.told {
            told(reason);
        }
    }

    /// Why the last connection was turned away, for an error to end in.
    pub(super) fn last_refusal(&self) -> String {
        let last = lock(&self.refusals.last);
        last.as_ref().map(|why| format!("; a connection was refused: {why}")).unwrap_or_default()
    }

    /// Takes over the connections that have come and have not been waited for.
    pub(super) fn take_waiting(&self) -> Waiting {
        std::mem::take(&mut lock(&self.waiting))
    }

    /// Leaves connections to whoever waits next.
    pub(super) fn leave_waiting(&self, waiting: Waiting) {
        *lock(&self.waiting) = waiting;
    }

    /// Where it really listens, the port chosen included.
    pub(crate) fn socket_address(&self) -> Option<SocketAddressInfo> {
        match (&self.socket, &self.address) {
            (Socket::Tcp(listener), _) => listener.local_addr().ok().map(|at| {
                SocketAddressInfo::Inet { host: at.ip().to_string(), port: at.port().to_string() }
            }),
            (Socket::Unix(..), Address::Unix(path)) => {
                Some(SocketAddressInfo::Unix { path: path.display().to_string() })
            }
            _ => None,
        }
    }

    /// Takes a connection that is there already, as `name`; `None` when none is. Of what is not
    /// listened to there is one.
    pub(crate) fn accept_now(
        &self,
        name: &'static str,
        cancel: &Cancel,
    ) -> Result<Option<Channel>, Error> {
        let accepted = match &self.socket {
            Socket::Tcp(listener) => listener.accept().and_then(|(stream, _)| {
                stream.set_nodelay(true)?;
                Ok((OwnedFd::from(stream), Kind::Socket))
            }),
            Socket::Unix(listener, _file) => {
                listener.accept().map(|(stream, _)| (OwnedFd::from(stream), Kind::Socket))
            }
            Socket::Direct => open(&self.address),
        };
        let error = |source| open_error(&self.address, source, cancel);
        match accepted {
            Ok((fd, kind)) => {
                let mut channel = Channel::new(name, fd, kind, cancel).map_err(error)?;
                if let Some(tls) = &self.tls {
                    channel.secure_as_server(tls)?;
                }
                Ok(Some(channel))
            }
            // One that went away between connecting and being accepted is none.
            Err(source)
                if matches!(
                    source.kind(),
                    io::ErrorKind::WouldBlock | io::ErrorKind::ConnectionAborted
                ) =>
            {
                Ok(None)
            }
            Err(source) => Err(error(source)),
        }
    }

    /// What can be read when a connection has come, where there is one to wait for.
    pub(crate) fn as_fd(&self) -> Option<BorrowedFd<'_>> {
        match &self.socket {
            Socket::Tcp(listener) => Some(listener.as_fd()),
            Socket::Unix(listener, _file) => Some(listener.as_fd()),
            Socket::Direct => None,
        }
    }

    /// Waits for the source's next channel, which gets `name`. One that has to show first who it is
    /// delays no other by that. The address is taken until the listener goes.
    pub(crate) fn accept(&self, name: &'static str, cancel: &Cancel) -> Result<Channel, Error> {
        let mut waiting = self.take_waiting();
        let accepted = loop {
            waiting.admit(self, name, cancel)?;
            if let Some(channel) = waiting.next_known(self) {
                break channel;
            }
            waiting.wait(self, None, cancel)?;
        };
        self.leave_waiting(waiting);
        Ok(accepted.known_as(name, cancel))
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Whole values are stored under it.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn open(address: &Address) -> io::Result<(OwnedFd, Kind)> {
    match address {
        Address::Fd(number) => fd::take(*number),
        Address::Exec(words) => {
            exec::Command::writer(address, words).map(|(fd, command)| (fd, Kind::Command(command)))
        }
        Address::File { path, offset } => Ok((file::open(path, *offset)?, Kind::Pipe)),
        Address::Tcp { .. } | Address::Unix(_) => unreachable!("these are bound"),
    }
}

fn tcp(host: &str, port: u16) -> io::Result<TcpListener> {
    let host = if host.is_empty() { "0.0.0.0" } else { host };
    let addresses: Vec<SocketAddr> = (host, port).to_socket_addrs()?.collect();
    let listener = TcpListener::bind(&*addresses)?;
    listener.set_nonblocking(true)?;
    Ok(listener)
}

fn unix(path: &Path) -> io::Result<Socket> {
    let left_behind = fs::symlink_metadata(path).is_ok_and(|m| m.file_type().is_socket())
        && UnixStream::connect(path).is_err();
    if left_behind {
        fs::remove_file(path)?; // Nobody answers: its owner died without removing it.
    }
    let listener = UnixListener::bind(path)?;
    let file = SocketFile(path.into());
    fs::set_permissions(path, fs::Permissions::from_mode(0o600))?;
    listener.set_nonblocking(true)?;
    Ok(Socket::Unix(listener, file))
}
