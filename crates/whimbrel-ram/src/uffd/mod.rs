//! userfaultfd: thin bindings to what the kernel offers. Opening and registering here, then what
//! answers faults and what tells of them.
#![expect(unsafe_code, reason = "ioctls on a userfaultfd")]

mod events;
mod resolve;

use std::fs::OpenOptions;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

pub(crate) use events::Event;

const UFFD_API: u64 = 0xAA;
/// `_IO(0xAA, 0x00)` on `/dev/userfaultfd`.
const USERFAULTFD_IOC_NEW: libc::Ioctl = 0xAA00;
/// `_IOWR(0xAA, 0x3f, struct uffdio_api)`.
const UFFDIO_API: libc::Ioctl = 0xC018_AA3F;
/// `_IOWR(0xAA, 0x00, struct uffdio_register)`.
const UFFDIO_REGISTER: libc::Ioctl = 0xC020_AA00;
/// `_IOR(0xAA, 0x01, struct uffdio_range)`.
const UFFDIO_UNREGISTER: libc::Ioctl = 0x8010_AA01;
/// `_IOWR(0xAA, 0x06, struct uffdio_writeprotect)`.
const UFFDIO_WRITEPROTECT: libc::Ioctl = 0xC018_AA06;

/// Tells of the first touch of pages that are not there.
pub(crate) const MISSING: u64 = 1 << 0;
/// Tells of writes to protected pages.
pub(crate) const WRITE_PROTECT: u64 = 1 << 1;
/// Tells of the first touch of pages that are in the page cache and not mapped.
pub(crate) const MINOR: u64 = 1 << 2;

const UFFDIO_WRITEPROTECT_MODE_WP: u64 = 1 << 0;
const UFFD_USER_MODE_ONLY: libc::c_int = 1;

/// What the kernel can do, by its numbers.
pub(crate) mod feature {
    /// Events say whether the page was missing or protected.
    pub(crate) const FLAG_WP: u64 = 1 << 0;
    /// Missing pages of hugetlb.
    pub(crate) const MISSING_HUGETLBFS: u64 = 1 << 4;
    /// Missing pages of shared memory.
    pub(crate) const MISSING_SHMEM: u64 = 1 << 5;
    /// Events name the thread.
    pub(crate) const THREAD_ID: u64 = 1 << 8;
    /// Pages of shared memory that are in the page cache and not mapped.
    pub(crate) const MINOR_SHMEM: u64 = 1 << 10;
    /// Events name the very byte, not the start of its page.
    pub(crate) const EXACT_ADDRESS: u64 = 1 << 11;
    /// Write protection of hugetlb and shared memory too.
    pub(crate) const WP_HUGETLBFS_SHMEM: u64 = 1 << 12;
    /// Write protection of pages that are not there yet.
    pub(crate) const WP_UNPOPULATED: u64 = 1 << 13;
    /// Pages that kill whoever touches them.
    pub(crate) const POISON: u64 = 1 << 14;
    /// Write protection that the kernel lifts by itself when somebody writes.
    pub(crate) const WP_ASYNC: u64 = 1 << 15;
}

/// Whose faults are told of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Faults {
    /// User space's, and the kernel's (KVM's, of system calls) where that is allowed.
    AtLeastUser,
    /// User space's and the kernel's.
    All,
}

/// Addresses of this process: start and length in bytes, whole pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Span {
    pub(crate) start: u64,
    pub(crate) len: u64,
}

#[repr(C)]
struct UffdioApi {
    api: u64,
    features: u64,
    ioctls: u64,
}

#[repr(C)]
struct UffdioRange {
    start: u64,
    len: u64,
}

#[repr(C)]
struct UffdioRegister {
    range: UffdioRange,
    mode: u64,
    ioctls: u64,
}

#[repr(C)]
struct UffdioWriteprotect {
    range: UffdioRange,
    mode: u64,
}

/// A userfaultfd with the features it was opened for.
#[derive(Debug)]
pub(crate) struct Userfaultfd {
    fd: OwnedFd,
}

impl Userfaultfd {
    /// Opens one that has all of `features`.
    pub(crate) fn open(faults: Faults, features: u64) -> io::Result<Userfaultfd> {
        let uffd = Userfaultfd { fd: new_fd(faults)? };
        uffd.agree(features).map_err(|error| {
            let text = format!("this kernel's userfaultfd lacks features {features:#x}: {error}");
            io::Error::new(io::ErrorKind::Unsupported, text)
        })?;
        Ok(uffd)
    }

    /// Opens one that has all of `required`, and of `wished` what the kernel has; gives its features.
    pub(crate) fn open_with(
        faults: Faults,
        required: u64,
        wished: u64,
    ) -> io::Result<(Userfaultfd, u64)> {
        // Features can be agreed on only once, and what there is is known only then.
        let offered = Userfaultfd { fd: new_fd(faults)? }.agree(0)?;
        let features = required | (wished & offered);
        Ok((Userfaultfd::open(faults, features)?, features))
    }

    /// Gives all the features that the kernel has.
    fn agree(&self, features: u64) -> io::Result<u64> {
        let mut api = UffdioApi { api: UFFD_API, features, ioctls: 0 };
        // SAFETY: `api` is what this ioctl reads and writes.
        check(unsafe { libc::ioctl(self.fd.as_raw_fd(), UFFDIO_API, &raw mut api) })?;
        Ok(api.features)
    }

    /// Registers a range for the faults of `modes`.
    pub(crate) fn register(&self, span: Span, modes: u64) -> io::Result<()> {
        let mut register = UffdioRegister { range: span.into(), mode: modes, ioctls: 0 };
        // SAFETY: `register` is what this ioctl reads and writes; the range is a mapping of ours,
        // whose content it does not change.
        check(unsafe { libc::ioctl(self.fd.as_raw_fd(), UFFDIO_REGISTER, &raw mut register) })
    }

    /// Ends the registration of a range, and with it its write protection; wakes who waits.
    pub(crate) fn unregister(&self, span: Span) -> io::Result<()> {
        let mut range = UffdioRange::from(span);
        // SAFETY: `range` is what this ioctl reads.
        check(unsafe { libc::ioctl(self.fd.as_raw_fd(), UFFDIO_UNREGISTER, &raw mut range) })
    }

    /// Write-protects a range, or ends that and wakes who waits.
    pub(crate) fn write_protect(&self, span: Span, on: bool) -> io::Result<()> {
        let mode = if on { UFFDIO_WRITEPROTECT_MODE_WP } else { 0 };
        let mut protect = UffdioWriteprotect { range: span.into(), mode };
        loop {
            // SAFETY: `protect` is what this ioctl reads; the range is a mapping of ours, whose
            // content it does not change.
            let result = check(unsafe {
                libc::ioctl(self.fd.as_raw_fd(), UFFDIO_WRITEPROTECT, &raw mut protect)
            });
            match result {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                result => return result,
            }
        }
    }
}

impl AsFd for Userfaultfd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl From<Span> for UffdioRange {
    fn from(span: Span) -> UffdioRange {
        UffdioRange { start: span.start, len: span.len }
    }
}

impl Span {
    /// Where `bytes` are.
    pub(crate) fn of(bytes: &[u8]) -> Span {
        Span { start: bytes.as_ptr().expose_provenance() as u64, len: bytes.len() as u64 }
    }
}

/// From the device, whose file permissions say who may; else by the system call, which needs a
/// privilege or a sysctl; else, where that is enough, by the same for faults of user space alone,
/// which anybody may.
fn new_fd(faults: Faults) -> io::Result<OwnedFd> {
    let flags = libc::O_CLOEXEC | libc::O_NONBLOCK;
    if let Ok(device) = OpenOptions::new().read(true).write(true).open("/dev/userfaultfd") {
        // SAFETY: this ioctl takes flags and gives a new file descriptor.
        let fd = unsafe { libc::ioctl(device.as_raw_fd(), USERFAULTFD_IOC_NEW, flags) };
        if fd >= 0 {
            // SAFETY: the kernel has just given it to us alone.
            return Ok(unsafe { OwnedFd::from_raw_fd(fd) });
        }
    }
    let user_only = (faults == Faults::AtLeastUser).then_some(flags | UFFD_USER_MODE_ONLY);
    let mut error = io::Error::from(io::ErrorKind::Unsupported);
    for flags in [Some(flags), user_only].into_iter().flatten() {
        // SAFETY: the system call takes flags and gives a new file descriptor.
        let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, flags) };
        match libc::c_int::try_from(fd) {
            // SAFETY: the kernel has just given it to us alone.
            Ok(fd) if fd >= 0 => return Ok(unsafe { OwnedFd::from_raw_fd(fd) }),
            _ => error = io::Error::last_os_error(),
        }
    }
    let whose = match faults {
        Faults::AtLeastUser => "",
        Faults::All => " for the kernel's own faults, such as a vCPU's",
    };
    let text = format!(
        "cannot open a userfaultfd{whose}: {error} (give the user access to /dev/userfaultfd, \
         or set sysctl vm.unprivileged_userfaultfd=1)"
    );
    Err(io::Error::new(error.kind(), text))
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
