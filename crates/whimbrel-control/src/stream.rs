//! Sockets of either kind: a listener that leaves nothing behind, and a connected stream.

use std::io::{self, ErrorKind, Read, Write};
use std::net::{TcpListener, TcpStream, ToSocketAddrs};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};
use whimbrel::unix_socket::{SocketFile, listen_at};

use crate::Endpoint;

/// Connections the kernel keeps for us until they are accepted.
const BACKLOG: i32 = 16;

/// A connected QMP socket.
#[derive(Debug)]
pub(crate) enum Stream {
    Unix(UnixStream),
    Tcp(TcpStream),
}

impl Stream {
    /// Connects within `timeout`.
    pub(crate) fn connect(endpoint: &Endpoint, timeout: Duration) -> io::Result<Stream> {
        match endpoint {
            Endpoint::Unix(path) => connect_unix(path, timeout).map(Stream::Unix),
            Endpoint::Tcp { host, port } => {
                let host = if host.is_empty() { "localhost" } else { host };
                let deadline = Instant::now() + timeout;
                let mut outcome = Err(io::Error::new(ErrorKind::NotFound, "host has no address"));
                for address in (host, *port).to_socket_addrs()? {
                    let left = deadline.saturating_duration_since(Instant::now());
                    if left.is_zero() {
                        return Err(ErrorKind::TimedOut.into());
                    }
                    outcome = TcpStream::connect_timeout(&address, left);
                    if outcome.is_ok() {
                        break;
                    }
                }
                outcome.and_then(Stream::from_tcp)
            }
        }
    }

    fn from_tcp(stream: TcpStream) -> io::Result<Stream> {
        stream.set_nodelay(true)?;
        Ok(Stream::Tcp(stream))
    }

    pub(crate) fn set_nonblocking(&self) -> io::Result<()> {
        match self {
            Stream::Unix(stream) => stream.set_nonblocking(true),
            Stream::Tcp(stream) => stream.set_nonblocking(true),
        }
    }

    pub(crate) fn set_read_timeout(&self, timeout: Duration) -> io::Result<()> {
        match self {
            Stream::Unix(stream) => stream.set_read_timeout(Some(timeout)),
            Stream::Tcp(stream) => stream.set_read_timeout(Some(timeout)),
        }
    }

    pub(crate) fn set_write_timeout(&self, timeout: Duration) -> io::Result<()> {
        match self {
            Stream::Unix(stream) => stream.set_write_timeout(Some(timeout)),
            Stream::Tcp(stream) => stream.set_write_timeout(Some(timeout)),
        }
    }
}

impl Read for &Stream {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Stream::Unix(stream) => (&*stream).read(buffer),
            Stream::Tcp(stream) => (&*stream).read(buffer),
        }
    }
}

impl Write for &Stream {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Stream::Unix(stream) => (&*stream).write(bytes),
            Stream::Tcp(stream) => (&*stream).write(bytes),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl AsFd for Stream {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Stream::Unix(stream) => stream.as_fd(),
            Stream::Tcp(stream) => stream.as_fd(),
        }
    }
}

/// The kernel answers at once, unless the listener's backlog is full: then it is tried again.
fn connect_unix(path: &Path, timeout: Duration) -> io::Result<UnixStream> {
    const PAUSE: Duration = Duration::from_millis(10);
    let address = SocketAddrUnix::new(path)?;
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    let deadline = Instant::now() + timeout;
    while let Err(error) = connect(&socket, &address) {
        match error {
            Errno::INTR => {}
            Errno::AGAIN if Instant::now() < deadline => thread::sleep(PAUSE),
            Errno::AGAIN => return Err(ErrorKind::TimedOut.into()),
            _ => return Err(error.into()),
        }
    }
    let stream = UnixStream::from(socket);
    stream.set_nonblocking(false)?;
    Ok(stream)
}

/// A listening QMP socket, non-blocking. The file of a Unix socket goes with it.
#[derive(Debug)]
pub(crate) enum Listener {
    Unix { listener: UnixListener, file: SocketFile },
    Tcp(TcpListener),
}

impl Listener {
    /// Listens. A Unix socket is its owner's only (mode 0600) from the start, and takes the place
    /// of one that nobody listens on any more.
    pub(crate) fn bind(endpoint: &Endpoint) -> io::Result<Listener> {
        match endpoint {
            Endpoint::Unix(path) => {
                let (listener, file) = listen_at(path, BACKLOG)?;
                Ok(Listener::Unix { listener, file })
            }
            Endpoint::Tcp { host, port } => {
                let host = if host.is_empty() { "localhost" } else { host };
                let listener = TcpListener::bind((host, *port))?;
                listener.set_nonblocking(true)?;
                Ok(Listener::Tcp(listener))
            }
        }
    }

    /// Whether others than this host's users can connect.
    pub(crate) fn is_open_to_others(&self) -> bool {
        match self {
            Listener::Unix { .. } => false,
            Listener::Tcp(listener) => !listener
                .local_addr()
                .is_ok_and(|address| address.ip().to_canonical().is_loopback()),
        }
    }

    /// Where it listens, with the real port.
    pub(crate) fn endpoint(&self) -> io::Result<Endpoint> {
        match self {
            Listener::Unix { file, .. } => Ok(Endpoint::Unix(file.path().into())),
            Listener::Tcp(listener) => {
                let address = listener.local_addr()?;
                Ok(Endpoint::Tcp { host: address.ip().to_string(), port: address.port() })
            }
        }
    }

    pub(crate) fn accept(&self) -> io::Result<Stream> {
        match self {
            Listener::Unix { listener, .. } => listener.accept().map(|(s, _)| Stream::Unix(s)),
            Listener::Tcp(listener) => listener.accept().and_then(|(s, _)| Stream::from_tcp(s)),
        }
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Listener::Unix { listener, .. } => listener.as_fd(),
            Listener::Tcp(listener) => listener.as_fd(),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn a_unix_socket_is_private_and_goes_with_its_listener() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("qmp");
        let listener = Listener::bind(&Endpoint::Unix(path.clone())).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        let second = Listener::bind(&Endpoint::Unix(path.clone())).unwrap_err();
        assert_eq!(second.kind(), ErrorKind::AddrInUse);
        drop(listener);
        assert!(!path.exists());
    }

    #[test]
    fn without_a_host_tcp_is_for_this_host_alone() {
        let listens = |host: &str| Listener::bind(&Endpoint::Tcp { host: host.into(), port: 0 });
        let private = listens("").unwrap();
        assert!(!private.is_open_to_others(), "{:?}", private.endpoint());
        assert!(!listens("127.0.0.1").unwrap().is_open_to_others());
        let open = listens("0.0.0.0").unwrap();
        assert!(open.is_open_to_others(), "{:?}", open.endpoint());
    }
}
