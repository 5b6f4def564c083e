//! The link's far half, which is pulled and plugged in without starting a process for it: what is timed
//! is the link's return, not the shell's.

use std::io::{BufRead as _, BufReader, Write as _};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use anyhow::{Context as _, Result, ensure};

use crate::bench::network::Network;

/// Pulled where the middle forwards to the destination: what it is sent meanwhile it answers as a router
/// does (ICMP, network unreachable), and both hosts keep their addresses and routes.
const INTERFACE: &str = "destination";

/// The interface under control. Dropped, it stays as it is.
#[derive(Debug)]
pub(super) struct Cable {
    ip: Child,
    tell: ChildStdin,
    says: BufReader<ChildStdout>,
}

impl Cable {
    pub(super) fn of(network: &Network) -> Result<Self> {
        let mut ip = Command::new("ip")
            .args(["-n", network.middle(), "-oneline", "-batch", "-"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .context("ip did not start: iproute2 is needed")?;
        let tell = ip.stdin.take().context("ip has no input")?;
        let says = BufReader::new(ip.stdout.take().context("ip has no output")?);
        Ok(Self { ip, tell, says })
    }

    pub(super) fn pull(&mut self) -> Result<()> {
        self.set("down")
    }

    pub(super) fn plug_in(&mut self) -> Result<()> {
        self.set("up")
    }

    /// Returns when it is done: `ip` obeys in order, and tells of the interface only then.
    fn set(&mut self, state: &str) -> Result<()> {
        let orders = format!("link set {INTERFACE} {state}\nlink show {INTERFACE}\n");
        self.tell.write_all(orders.as_bytes()).context("ip is gone")?;
        let mut said = String::new();
        self.says.read_line(&mut said)?;
        ensure!(
            is_up(&said) == (state == "up"),
            "the link is not {state}: ip says {:?}",
            said.trim()
        );
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
