//! `fd:N`: a descriptor inherited from whoever started us.
#![expect(unsafe_code, reason = "a number from the command line becomes an owned descriptor")]

use std::io;
use std::os::fd::{FromRawFd, OwnedFd};

use super::Kind;

/// Takes over descriptor `number`; it is closed at the end of the migration.
pub(super) fn take(number: i32) -> io::Result<(OwnedFd, Kind)> {
    // Standard streams are shared with everybody; and a number that is not open is a mistake.
    if number <= 2 || rustix::fs::stat(format!("/proc/self/fd/{number}")).is_err() {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "not an inherited descriptor: pass the number of one that was open when this process started",
        ));
    }
    // SAFETY: `fd:N` is the contract with whoever started us that N is ours to own; nothing in
    // this process opened a descriptor under a number the user knows.
    let fd = unsafe { OwnedFd::from_raw_fd(number) };
    let kind = match rustix::fs::fstat(&fd).map(|s| rustix::fs::FileType::from_raw_mode(s.st_mode))
    {
        Ok(rustix::fs::FileType::Socket) => Kind::Socket,
        _ => Kind::Pipe,
    };
    rustix::io::fcntl_setfd(&fd, rustix::io::FdFlags::CLOEXEC)?;
    Ok((fd, kind))
}
