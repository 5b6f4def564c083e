//! A Unix socket to listen on: its owner's only, and gone with whoever listens.
//!
//! Shared with `whimbrel-control`; not meant for others.

use std::fs;
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, fchmod};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, bind, connect, listen};

use super::connect::nonblocking_socket;

/// Listens at `path`, non-blocking; `backlog` connections wait there until they are accepted. Takes
/// the place of a socket that nobody listens on any more.
///
/// # Errors
/// There is something else at `path`, or it cannot be made.
pub fn listen_at(path: &Path, backlog: i32) -> io::Result<(UnixListener, SocketFile)> {
    let address = SocketAddrUnix::new(path)?;
    remove_stale(path, &address)?;
    let socket = nonblocking_socket(AddressFamily::UNIX)?;
    // The name gets the mode of the socket that is bound to it, so that is set before: there is no
    // moment at which another user gets in, and no path that could lead elsewhere meanwhile.
    fchmod(&socket, Mode::RUSR | Mode::WUSR)?;
    bind(&socket, &address)?;
    let made = fs::symlink_metadata(path)?;
    let file = SocketFile { path: path.to_owned(), device: made.dev(), inode: made.ino() };
    listen(&socket, backlog)?;
    Ok((UnixListener::from(socket), file))
}

/// The file of a Unix socket, removed on drop if it is still the one we made.
#[derive(Debug)]
pub struct SocketFile {
    path: PathBuf,
    device: u64,
    inode: u64,
}

impl SocketFile {
    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        let ours = fs::symlink_metadata(&self.path)
            .is_ok_and(|found| found.dev() == self.device && found.ino() == self.inode);
        if ours {
            // Nobody is left to tell; whoever listens next finds it stale and removes it.
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// Removes the socket that somebody left who did not end in order. A file of another kind, or a
/// socket on which someone listens, however busy, stays, and binding reports it.
fn remove_stale(path: &Path, address: &SocketAddrUnix) -> io::Result<()> {
    let is_socket = fs::symlink_metadata(path).is_ok_and(|found| found.file_type().is_socket());
    if !is_socket {
        return Ok(());
    }
    let tried = connect(nonblocking_socket(AddressFamily::UNIX)?, address);
    if tried == Err(Errno::CONNREFUSED) { fs::remove_file(path) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;
    use std::os::unix::net::{UnixDatagram, UnixStream};

    use super::*;

    #[test]
    fn it_is_private_and_goes_with_who_listens() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("socket");
        let (listener, file) = listen_at(&path, 1).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(listen_at(&path, 1).unwrap_err().kind(), io::ErrorKind::AddrInUse);
        drop(UnixStream::connect(file.path()).unwrap());
        drop((listener, file));
        assert!(!path.exists());
    }

    #[test]
    fn a_stale_one_is_replaced_and_another_file_is_not() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("socket");
        drop(UnixListener::bind(&path).unwrap());
        assert!(path.exists());
        drop(listen_at(&path, 1).unwrap());

        fs::write(&path, "kept").unwrap();
        assert_eq!(listen_at(&path, 1).unwrap_err().kind(), io::ErrorKind::AddrInUse);
        assert_eq!(fs::read_to_string(&path).unwrap(), "kept");
    }

    /// It cannot be connected to, and is somebody's all the same.
    #[test]
    fn one_that_does_not_refuse_is_left_alone() {
        let folder = tempfile::tempdir().unwrap();
        let (busy, other) = (folder.path().join("busy"), folder.path().join("other"));
        let (_listener, _file) = listen_at(&busy, 0).unwrap();
        let address = SocketAddrUnix::new(&busy).unwrap();
        let waiting: Vec<_> = std::iter::repeat_with(|| {
            let socket = nonblocking_socket(AddressFamily::UNIX).unwrap();
            connect(&socket, &address).map(|()| socket)
        })
        .take_while(Result::is_ok)
        .collect();
        assert!(!waiting.is_empty());
        let _datagrams = UnixDatagram::bind(&other).unwrap();
        for path in [busy, other] {
            assert_eq!(listen_at(&path, 1).unwrap_err().kind(), io::ErrorKind::AddrInUse);
            assert!(path.exists());
        }
    }

    #[test]
    fn one_that_took_our_place_is_not_removed() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("socket");
        let first = listen_at(&path, 1).unwrap();
        fs::rename(&path, folder.path().join("moved")).unwrap();
        let _second = listen_at(&path, 1).unwrap();
        drop(first);
        assert!(path.exists());
    }
}
