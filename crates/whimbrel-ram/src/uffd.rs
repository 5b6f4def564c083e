//! userfaultfd: thin bindings to what the kernel offers.
#![expect(unsafe_code, reason = "ioctls on a userfaultfd")]

use std::fs::OpenOptions;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use crate::RamBlock;

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

const UFFDIO_REGISTER_MODE_WP: u64 = 1 << 1;
const UFFDIO_WRITEPROTECT_MODE_WP: u64 = 1 << 0;
const UFFD_USER_MODE_ONLY: libc::c_int = 1;

/// Write protection of hugetlb and shared memory too.
pub(crate) const WP_HUGETLBFS_SHMEM: u64 = 1 << 12;
/// Write protection of pages that are not there yet.
pub(crate) const WP_UNPOPULATED: u64 = 1 << 13;
/// Write protection that the kernel lifts by itself when somebody writes.
pub(crate) const WP_ASYNC: u64 = 1 << 15;

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
    pub(crate) fn open(features: u64) -> io::Result<Userfaultfd> {
        let uffd = Userfaultfd { fd: new_fd()? };
        let mut api = UffdioApi { api: UFFD_API, features, ioctls: 0 };
        // SAFETY: `api` is what this ioctl reads and writes.
        check(unsafe { libc::ioctl(uffd.fd.as_raw_fd(), UFFDIO_API, &raw mut api) }).map_err(
            |error| {
                let text =
                    format!("this kernel's userfaultfd lacks features {features:#x}: {error}");
                io::Error::new(io::ErrorKind::Unsupported, text)
            },
        )?;
        Ok(uffd)
    }

    /// Registers a block for write protection.
    pub(crate) fn register_write_protect(&self, block: &RamBlock) -> io::Result<()> {
        let mode = UFFDIO_REGISTER_MODE_WP;
        let mut register = UffdioRegister { range: range(block), mode, ioctls: 0 };
        // SAFETY: `register` is what this ioctl reads and writes; the range is a mapping of ours,
        // whose content it does not change.
        check(unsafe { libc::ioctl(self.fd.as_raw_fd(), UFFDIO_REGISTER, &raw mut register) })
    }

    /// Ends the registration of a block, and with it its write protection.
    pub(crate) fn unregister(&self, block: &RamBlock) -> io::Result<()> {
        let mut range = range(block);
        // SAFETY: `range` is what this ioctl reads.
        check(unsafe { libc::ioctl(self.fd.as_raw_fd(), UFFDIO_UNREGISTER, &raw mut range) })
    }

    /// Write-protects all of a block.
    pub(crate) fn write_protect(&self, block: &RamBlock) -> io::Result<()> {
        let mode = UFFDIO_WRITEPROTECT_MODE_WP;
        let mut protect = UffdioWriteprotect { range: range(block), mode };
        // SAFETY: `protect` is what this ioctl reads; the range is a mapping of ours, whose content
        // it does not change.
        check(unsafe { libc::ioctl(self.fd.as_raw_fd(), UFFDIO_WRITEPROTECT, &raw mut protect) })
    }
}

fn range(block: &RamBlock) -> UffdioRange {
    UffdioRange {
        start: block.host_address().as_ptr().expose_provenance() as u64,
        len: block.len(),
    }
}

/// From the device, whose file permissions say who may; else by the system call, which needs a
/// privilege or a sysctl; else by the same for faults of user space alone, which anybody may.
fn new_fd() -> io::Result<OwnedFd> {
    let flags = libc::O_CLOEXEC | libc::O_NONBLOCK;
    if let Ok(device) = OpenOptions::new().read(true).write(true).open("/dev/userfaultfd") {
        // SAFETY: this ioctl takes flags and gives a new file descriptor.
        let fd = unsafe { libc::ioctl(device.as_raw_fd(), USERFAULTFD_IOC_NEW, flags) };
        if fd >= 0 {
            // SAFETY: the kernel has just given it to us alone.
            return Ok(unsafe { OwnedFd::from_raw_fd(fd) });
        }
    }
    let mut error = io::Error::from(io::ErrorKind::Unsupported);
    for flags in [flags, flags | UFFD_USER_MODE_ONLY] {
        // SAFETY: the system call takes flags and gives a new file descriptor.
        let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, flags) };
        match libc::c_int::try_from(fd) {
            // SAFETY: the kernel has just given it to us alone.
            Ok(fd) if fd >= 0 => return Ok(unsafe { OwnedFd::from_raw_fd(fd) }),
            _ => error = io::Error::last_os_error(),
        }
    }
    let text = format!(
        "cannot open a userfaultfd: {error} (give the user access to /dev/userfaultfd, \
         or set sysctl vm.unprivileged_userfaultfd=1)"
    );
    Err(io::Error::new(error.kind(), text))
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
