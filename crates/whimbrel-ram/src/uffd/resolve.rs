//! Answering faults: making pages present, and waking who waits for them.

use std::io;
use std::os::fd::AsRawFd;

use super::{Span, UffdioRange, Userfaultfd, check};

/// `_IOR(0xAA, 0x02, struct uffdio_range)`.
const UFFDIO_WAKE: libc::Ioctl = 0x8010_AA02;
/// `_IOWR(0xAA, 0x03, struct uffdio_copy)`.
const UFFDIO_COPY: libc::Ioctl = 0xC028_AA03;
/// `_IOWR(0xAA, 0x04, struct uffdio_zeropage)`.
const UFFDIO_ZEROPAGE: libc::Ioctl = 0xC020_AA04;
/// `_IOWR(0xAA, 0x07, struct uffdio_continue)`.
const UFFDIO_CONTINUE: libc::Ioctl = 0xC020_AA07;
/// `_IOWR(0xAA, 0x08, struct uffdio_poison)`.
const UFFDIO_POISON: libc::Ioctl = 0xC020_AA08;

#[repr(C)]
struct UffdioCopy {
    to: u64,
    from: u64,
    len: u64,
    mode: u64,
    copied: i64,
}

/// `struct uffdio_zeropage`, `uffdio_continue` and `uffdio_poison`.
#[repr(C)]
struct UffdioPages {
    range: UffdioRange,
    mode: u64,
    done: i64,
}

/// How far one call came: bytes from the start of its range, and what it met there. Who waited for
/// those bytes is awake. Zero bytes without an error: try again.
pub(crate) type Progress = (u64, io::Result<()>);

impl Userfaultfd {
    /// Makes the pages at `to` present with the content of a range, each at once. Stops with
    /// `AlreadyExists` at one that is there.
    pub(crate) fn copy(&self, to: u64, from: Span) -> Progress {
        let Span { start: from, len } = from;
        let mut copy = UffdioCopy { to, from, len, mode: 0, copied: 0 };
        // SAFETY: `copy` is what this ioctl reads and writes. It reads from memory that is mapped,
        // or fails, and puts pages into a registered range, where no Rust reference can point: it is guest memory.
        let result = check(unsafe { libc::ioctl(self.fd.as_raw_fd(), UFFDIO_COPY, &raw mut copy) });
        progress(result, len, copy.copied)
    }

    /// Makes the pages of a range present as zeros; not of hugetlb. Stops as `copy` does.
    pub(crate) fn zero(&self, span: Span) -> Progress {
        self.pages(UFFDIO_ZEROPAGE, span)
    }

    /// Maps the pages of a range that are in the page cache. Stops with `AlreadyExists` at one that
    /// is mapped, with EFAULT at one that is not in the page cache.
    pub(crate) fn map_cached(&self, span: Span) -> Progress {
        self.pages(UFFDIO_CONTINUE, span)
    }

    /// Makes the pages of a range, which are not there, kill whoever touches them (SIGBUS).
    pub(crate) fn poison(&self, span: Span) -> Progress {
        self.pages(UFFDIO_POISON, span)
    }

    /// Wakes who waits for a page of a range; they touch it again.
    pub(crate) fn wake(&self, span: Span) -> io::Result<()> {
        let mut range = UffdioRange::from(span);
        // SAFETY: `range` is what this ioctl reads.
        check(unsafe { libc::ioctl(self.fd.as_raw_fd(), UFFDIO_WAKE, &raw mut range) })
    }

    fn pages(&self, request: libc::Ioctl, span: Span) -> Progress {
        let mut pages = UffdioPages { range: span.into(), mode: 0, done: 0 };
        // SAFETY: `pages` is what these ioctls read and write. They put pages into a registered
        // range, where no Rust reference can point: it is guest memory.
        let result = check(unsafe { libc::ioctl(self.fd.as_raw_fd(), request, &raw mut pages) });
        progress(result, span.len, pages.done)
    }
}

/// The kernel says EAGAIN after a part, and when the address space is just changing.
fn progress(result: io::Result<()>, len: u64, done: i64) -> Progress {
    match result {
        Ok(()) => (len, Ok(())),
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
            (u64::try_from(done).unwrap_or(0), Ok(()))
        }
        Err(error) => (0, Err(error)),
    }
}

#[cfg(test)]
mod tests {
    use std::io;

    use super::progress;

    #[test]
    fn a_part_is_progress_and_an_error_is_none() {
        let again = || Err(io::Error::from_raw_os_error(libc::EAGAIN));
        assert!(matches!(progress(Ok(()), 8192, 8192), (8192, Ok(()))));
        assert!(matches!(progress(again(), 8192, 4096), (4096, Ok(()))));
        assert!(matches!(progress(again(), 8192, i64::from(-libc::EAGAIN)), (0, Ok(()))));
        let there = io::Error::from_raw_os_error(libc::EEXIST);
        assert!(matches!(progress(Err(there), 8192, i64::from(-libc::EEXIST)), (0, Err(_))));
    }
}
