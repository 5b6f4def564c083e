//! The VM's network: a device that frames go through, what the native guest does with them, and how
//! they reach the host.
//!
//! The guest answers on TCP port [`SERVICE_PORT`], to ARP and to ping. All that it knows of its
//! connections lies in its RAM, as a guest's kernel has it: so they go where the guest goes.

mod attachment;
mod client;
mod guest;
mod hub;
mod nic;
mod tap;

use std::fmt;
use std::str::FromStr;

pub use self::attachment::{Attachment, read_frame, write_frame};
pub use self::client::{Client, ClientError};
pub(crate) use self::guest::{Driver, NET_BYTES, install};
pub use self::hub::Hub;
pub(crate) use self::nic::DEVICE;
pub use self::nic::Nic;
use crate::config::ParseError;

/// Where the guest's service listens.
///
/// It takes requests of 8 bytes and answers each with 16: how many of this connection's it has
/// answered, and a value that follows from all of them. So an answer tells whether the guest still
/// knows everything that came before.
pub const SERVICE_PORT: u16 = 7;

/// The largest frame, without its checksum.
pub(crate) const FRAME_MAX: usize = 14 + 1500;

/// Who the guest is in its network.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NetConfig {
    /// Its MAC address.
    pub mac: [u8; 6],
    /// Its IPv4 address.
    pub ip: [u8; 4],
}

/// Where the VM's network device is plugged in: `tap:NAME` or `unix:PATH`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NetPlug {
    /// A TAP device of the host's, made if it is not there.
    Tap(String),
    /// A stream socket, to which the VM connects: each frame behind its length (u32, big-endian), as
    /// QEMU's `-netdev stream` has it.
    Unix(std::path::PathBuf),
}

impl FromStr for NetPlug {
    type Err = ParseError;
    fn from_str(text: &str) -> Result<Self, ParseError> {
        let error = || ParseError::new("network", text, "tap:NAME or unix:PATH");
        match text.split_once(':') {
            Some(("tap", name)) if !name.is_empty() => Ok(NetPlug::Tap(name.to_owned())),
            Some(("unix", path)) if !path.is_empty() => Ok(NetPlug::Unix(path.into())),
            _ => Err(error()),
        }
    }
}

impl fmt::Display for NetPlug {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            NetPlug::Tap(name) => write!(f, "tap:{name}"),
            NetPlug::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

/// What follows from a request and all before it.
pub(crate) fn chain(before: u64, request: u64) -> u64 {
    // One round of a mixing function: every bit of both counts.
    let mut value = (before ^ request).wrapping_add(0x9e37_79b9_7f4a_7c15);
    value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    value ^ (value >> 27)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plugs_are_written_as_on_the_command_line() {
        for text in ["tap:tap0", "unix:/run/net.sock"] {
            assert_eq!(text.parse::<NetPlug>().unwrap().to_string(), text);
        }
        for bad in ["tap", "tap:", "udp:1", ""] {
            let error = bad.parse::<NetPlug>().unwrap_err().to_string();
            assert!(error.ends_with("expected tap:NAME or unix:PATH"), "{error}");
        }
    }
}
