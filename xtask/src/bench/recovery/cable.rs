//! The link as something that fails and comes back, without a process being started for it: what is timed
//! is the link's return, not the shell's.

use std::fmt;
use std::io::{BufRead as _, BufReader, Write as _};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use anyhow::{Context as _, Result, ensure};
use clap::ValueEnum;

use crate::bench::network::{DESTINATION_ADDRESS, Network, SOURCE_ADDRESS};

/// The middle's interface towards the destination.
const INTERFACE: &str = "destination";

/// What fails.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum Fault {
    /// Something in the middle of the network, which loses every packet: back is back
    Middle,
    /// The cable to the destination: it loses its carrier, and after that the kernels at both ends have
    /// to find each other again (ARP)
    Cable,
}

impl fmt::Display for Fault {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::Middle => "middle",
            Self::Cable => "cable",
        })
    }
}

impl Fault {
    /// In the words of `ip`.
    fn orders(self, back: bool) -> String {
        match (self, back) {
            (Self::Cable, false) => format!("link set {INTERFACE} down\n"),
            (Self::Cable, true) => format!("link set {INTERFACE} up\n"),
            (Self::Middle, _) => {
                let what = if back { "del" } else { "add" };
                [DESTINATION_ADDRESS, SOURCE_ADDRESS]
                    .map(|host| format!("route {what} blackhole {host}/32\n"))
                    .concat()
            }
        }
    }
}

/// The link under control. Dropped, it stays as it is.
#[derive(Debug)]
pub(super) struct Cable {
    fault: Fault,
    ip: Child,
    tell: ChildStdin,
    says: BufReader<ChildStdout>,
}

impl Cable {
    pub(super) fn of(network: &Network, fault: Fault) -> Result<Self> {
        let mut ip = Command::new("ip")
            .args(["-n", network.middle(), "-oneline", "-batch", "-"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .context("ip did not start: iproute2 is needed")?;
        let tell = ip.stdin.take().context("ip has no input")?;
        let says = BufReader::new(ip.stdout.take().context("ip has no output")?);
        Ok(Self { fault, ip, tell, says })
    }

    pub(super) fn pull(&mut self) -> Result<()> {
        self.set(false)
    }

    pub(super) fn plug_in(&mut self) -> Result<()> {
        self.set(true)
    }

    /// Returns when it is done: `ip` obeys in order, ends at the first order that fails, and tells of the
    /// interface only then.
    fn set(&mut self, back: bool) -> Result<()> {
        let orders = format!("{}link show {INTERFACE}\n", self.fault.orders(back));
        self.tell.write_all(orders.as_bytes()).context("ip is gone")?;
        let mut said = String::new();
        self.says.read_line(&mut said)?;
        let expected = back || self.fault == Fault::Middle;
        ensure!(!said.is_empty() && is_up(&said) == expected, "ip did not obey {orders:?}: {said}");
        Ok(())
    }
}

impl Drop for Cable {
    fn drop(&mut self) {
        // Both fail only for a process that is gone, which is what is wanted.
        let _ = self.ip.kill();
        let _ = self.ip.wait();
    }
}

/// Whether a line like `3: a@b: <BROADCAST,UP,M-DOWN> mtu 1500 ..` tells of an interface that is up.
fn is_up(line: &str) -> bool {
    let flags = line.split_once('<').and_then(|(_, rest)| rest.split_once('>'));
    flags.is_some_and(|(flags, _)| flags.split(',').any(|flag| flag == "UP"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_interface_is_up_by_its_own_flag() {
        assert!(is_up("3: a@b: <NO-CARRIER,BROADCAST,UP,M-DOWN> mtu 1500 state DOWN"));
        assert!(!is_up("3: a@b: <BROADCAST,MULTICAST,LOWER_UP> mtu 1500 state DOWN"));
        assert!(!is_up(""));
    }
}
