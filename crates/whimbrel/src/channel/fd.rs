//! `fd:N`: a descriptor inherited from whoever started us.
#![expect(unsafe_code, reason = "a number from the command line becomes an owned descriptor")]

use std::io;
use std::os::fd::{BorrowedFd, FromRawFd, OwnedFd, RawFd};

use rustix::io::{FdFlags, fcntl_getfd, fcntl_setfd};

use super::Kind;

/// Takes over descriptor `number`; it is closed at the end of the migration.
pub(super) fn take(number: RawFd) -> io::Result<(OwnedFd, Kind)> {
    if !is_inherited(number) {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "not an inherited descriptor: pass the number of one that was open when this process \
             started",
        ));
    }
    // SAFETY: it is inherited, so nothing in this process opened it or owns it; and it is taken
    // once, since from here on it has the flag that `is_inherited` looks for.
    let fd = unsafe { OwnedFd::from_raw_fd(number) };
    fcntl_setfd(&fd, FdFlags::CLOEXEC)?;
    let kind = match rustix::fs::fstat(&fd).map(|s| rustix::fs::FileType::from_raw_mode(s.st_mode))
    {
        Ok(rustix::fs::FileType::Socket) => Kind::Socket,
        _ => Kind::Pipe,
    };
    Ok((fd, kind))
}

/// Whether a number is that of a descriptor that came with the start of the process. Whatever is
/// opened in a Rust process is closed on exec, and what came through an exec is not. Standard
/// streams are shared with everybody, and not to be had.
fn is_inherited(number: RawFd) -> bool {
    if number <= 2 {
        return false;
    }
    // SAFETY: only asked about, which says so if it is not open.
    let fd = unsafe { BorrowedFd::borrow_raw(number) };
    fcntl_getfd(fd).is_ok_and(|flags| !flags.contains(FdFlags::CLOEXEC))
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsRawFd;

    use super::*;

    #[test]
    fn descriptors_of_our_own_are_not_to_be_had() {
        let ours = std::fs::File::open("/dev/null").unwrap();
        for number in [0, 1, 2, ours.as_raw_fd(), 1 << 20] {
            let error = take(number).unwrap_err().to_string();
            assert!(error.contains("not an inherited descriptor"), "{number}: {error}");
        }
    }
}
