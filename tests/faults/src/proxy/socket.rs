//! Where connections come from and go to: TCP on this machine, or Unix sockets.

use std::fmt;
use std::io;
use std::net::{Ipv4Addr, SocketAddrV4, TcpStream};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, listen, socket_with, sockopt,
};

/// How many connections may wait.
const BACKLOG: i32 = 64;

/// An address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    /// A port of this machine; 0 is any.
    Tcp(u16),
    Unix(PathBuf),
}

/// As `migrate` takes it.
impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Place::Tcp(port) => write!(f, "tcp:127.0.0.1:{port}"),
            Place::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

impl Place {
    /// A connection to it that never blocks.
    pub(super) fn connect(&self) -> io::Result<OwnedFd> {
        let fd: OwnedFd = match self {
            Place::Tcp(port) => {
                let stream = TcpStream::connect((Ipv4Addr::LOCALHOST, *port))?;
                stream.set_nodelay(true)?;
                stream.into()
            }
            Place::Unix(path) => UnixStream::connect(path)?.into(),
        };
        rustix::io::ioctl_fionbio(&fd, true)?;
        Ok(fd)
    }
}

/// A bound address that takes connections, or refuses them.
#[derive(Debug)]
pub(super) struct Door {
    place: Place,
    socket: OwnedFd,
}

impl Door {
    /// Binds `place`, and takes connections from now on.
    pub(super) fn open(place: &Place) -> io::Result<Door> {
        let socket = bound(place)?;
        listen(&socket, BACKLOG)?;
        let place = match place {
            Place::Tcp(_) => {
                Place::Tcp(SocketAddrV4::try_from(rustix::net::getsockname(&socket)?)?.port())
            }
            Place::Unix(_) => place.clone(),
        };
        Ok(Door { place, socket })
    }

    pub(super) fn place(&self) -> &Place {
        &self.place
    }

    /// Refuses connections: whoever bound the address and does not listen does that.
    pub(super) fn shut(&mut self) -> io::Result<()> {
        const FREE: Duration = Duration::from_secs(5);
        // The address is free only when the old socket is closed, also in a process that another run
        // starts just now: it has a copy until it runs its program.
        self.socket = socket_of(&self.place)?;
        let until = Instant::now() + FREE;
        self.socket = loop {
            match bound(&self.place) {
                Err(error)
                    if error.kind() == io::ErrorKind::AddrInUse && Instant::now() < until =>
                {
                    std::thread::sleep(Duration::from_millis(1));
                }
                other => break other?,
            }
        };
        Ok(())
    }

    /// Takes connections again.
    pub(super) fn reopen(&mut self) -> io::Result<()> {
        Ok(listen(&self.socket, BACKLOG)?)
    }

    /// The next connection that has come.
    pub(super) fn accept(&self) -> Option<OwnedFd> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let accepted = rustix::net::accept_with(&self.socket, flags).ok()?;
        if matches!(self.place, Place::Tcp(_)) {
            // Gone already is as good.
            let _ = sockopt::set_tcp_nodelay(&accepted, true);
        }
        Some(accepted)
    }
}

impl AsFd for Door {
    fn as_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl Drop for Door {
    fn drop(&mut self) {
        if let Place::Unix(path) = &self.place {
            let _ = std::fs::remove_file(path);
        }
    }
}

fn socket_of(place: &Place) -> io::Result<OwnedFd> {
    let family = match place {
        Place::Tcp(_) => AddressFamily::INET,
        Place::Unix(_) => AddressFamily::UNIX,
    };
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    Ok(socket_with(family, SocketType::STREAM, flags, None)?)
}

fn bound(place: &Place) -> io::Result<OwnedFd> {
    let socket = socket_of(place)?;
    match place {
        Place::Tcp(port) => {
            sockopt::set_socket_reuseaddr(&socket, true)?;
            bind(&socket, &SocketAddrV4::new(Ipv4Addr::LOCALHOST, *port))?;
        }
        Place::Unix(path) => {
            let _ = std::fs::remove_file(path);
            bind(&socket, &SocketAddrUnix::new(path)?)?;
        }
    }
    Ok(socket)
}

/// What is in flight to the peer is dropped when the connection is closed, and it is told so.
pub(super) fn reset_on_close(socket: &OwnedFd) {
    // Unix sockets do not know it.
    let _ = sockopt::set_socket_linger(socket, Some(Duration::ZERO));
}
