//! A TAP device of the host's.
#![expect(unsafe_code, reason = "the ioctl that names a TAP device")]

use std::fs::{File, OpenOptions};
use std::io;

use libc::{IFF_NO_PI, IFF_TAP, c_short, ifreq};
use vmm_sys_util::ioctl::ioctl_with_ref;

vmm_sys_util::ioctl_iow_nr!(TUNSETIFF, 0x54, 202, libc::c_int);

/// Opens that of this name; makes it if it is not there, which takes `CAP_NET_ADMIN`.
pub(super) fn open(name: &str) -> io::Result<File> {
    let bad = || io::Error::new(io::ErrorKind::InvalidInput, "a name has 1 to 15 characters");
    let file = OpenOptions::new().read(true).write(true).open("/dev/net/tun")?;
    // SAFETY: a structure of plain numbers, for which zeros are a value.
    let mut request: ifreq = unsafe { std::mem::zeroed() };
    if name.is_empty() || name.len() >= request.ifr_name.len() || name.contains(['/', '\0']) {
        return Err(bad());
    }
    for (to, byte) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = byte.cast_signed();
    }
    request.ifr_ifru.ifru_flags = c_short::try_from(IFF_TAP | IFF_NO_PI).map_err(|_| bad())?;
    // SAFETY: TUNSETIFF reads an `ifreq`, which this is, and keeps no pointer to it.
    match unsafe { ioctl_with_ref(&file, TUNSETIFF(), &request) } {
        0 => Ok(file),
        _ => Err(io::Error::last_os_error()),
    }
}
