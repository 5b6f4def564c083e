//! The link: three network namespaces in a row, whose queue lies behind the sender.
//!
//! The middle one forwards, and only its interface towards the destination is slow: what waits,
//! waits where the source's own queueing discipline does not see it, as at any switch of a real
//! network. The way back is not shaped.

use std::fmt;
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, ensure};

use super::janitor::{Janitor, Trace};

pub(super) const SOURCE_ADDRESS: &str = "192.0.2.1";
pub(super) const DESTINATION_ADDRESS: &str = "192.0.2.5";

/// The queue, as the time a byte spends in it when it is full.
const QUEUE: &str = "20ms";
/// What may go out at once. One segment of the largest size that a sender hands down (64 KiB)
/// passes whole; at 10 Gbit/s this is 0.1 ms.
const BURST: &str = "128kb";

/// What the two hosts' TCP is set to: the kernel's own defaults, whatever this machine has, and no
/// memory of earlier connections, so that every run begins alike.
const SETTINGS: [(&str, &str); 4] = [
    ("net/ipv4/tcp_wmem", "4096 16384 4194304"),
    ("net/ipv4/tcp_rmem", "4096 131072 6291456"),
    ("net/ipv4/tcp_no_metrics_save", "1"),
    ("net/ipv4/tcp_slow_start_after_idle", "1"),
];
/// The same, for settings that belong to a namespace in some kernels only.
const SETTINGS_IF_ANY: [(&str, &str); 2] =
    [("net/core/wmem_max", "212992"), ("net/core/rmem_max", "212992")];

/// How fast the link is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Link {
    pub(super) mbit_per_s: u32,
}

impl Link {
    /// From Gbit/s, such as `2.5`.
    pub(super) fn parse(text: &str) -> Result<Self, String> {
        let wrong =
            || format!("{text:?} is no rate in Gbit/s with up to three decimals, such as 2.5");
        let (whole, decimals) = text.split_once('.').unwrap_or((text, ""));
        if decimals.len() > 3 {
            return Err(wrong());
        }
        let thousandths: u32 = format!("{whole}{decimals:0<3}").parse().map_err(|_| wrong())?;
        match thousandths {
            0 => Err(wrong()),
            mbit_per_s => Ok(Self { mbit_per_s }),
        }
    }
}

impl fmt::Display for Link {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{} Gbit/s", f64::from(self.mbit_per_s) / 1000.0)
    }
}

/// What lies between the two sides.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Between {
    Loopback,
    Link(Link),
}

impl Between {
    /// From `loopback` or Gbit/s.
    pub(super) fn parse(text: &str) -> Result<Self, String> {
        match text {
            "loopback" => Ok(Self::Loopback),
            rate => Link::parse(rate).map(Self::Link).map_err(|why| format!("loopback, or: {why}")),
        }
    }
}

impl fmt::Display for Between {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Loopback => formatter.write_str("loopback"),
            Self::Link(link) => link.fmt(formatter),
        }
    }
}

/// Which end of the link.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum End {
    Source,
    Destination,
}

/// How two ends reach each other.
#[derive(Debug, Clone, Copy)]
pub(super) enum Way<'a> {
    Loopback,
    Link(&'a Network),
}

impl Way<'_> {
    /// The same command, run at this end.
    pub(super) fn at(self, end: End, command: Command) -> Command {
        match self {
            Self::Loopback => command,
            Self::Link(network) => network.at(end, &command),
        }
    }

    /// The destination's own address.
    pub(super) fn destination(self) -> &'static str {
        match self {
            Self::Loopback => "127.0.0.1",
            Self::Link(_) => DESTINATION_ADDRESS,
        }
    }
}

/// The namespaces of one link. The janitor removes them, interfaces and all.
#[derive(Debug)]
pub(super) struct Network {
    source: String,
    middle: String,
    destination: String,
}

impl Network {
    /// Builds a link, its hosts set to this congestion control.
    pub(super) fn build(
        janitor: &mut Janitor,
        name: &str,
        link: Link,
        congestion: &str,
    ) -> Result<Self> {
        let unique = format!("whimbrel-{}-{name}", std::process::id());
        let [source, middle, destination] =
            ["source", "link", "destination"].map(|role| format!("{unique}-{role}"));
        for namespace in [&source, &middle, &destination] {
            janitor.will_make(&Trace::Namespace(namespace.clone()))?;
            ip(&format!("netns add {namespace}"))?;
            ip(&format!("-n {namespace} link set lo up"))?;
        }
        for (host, port, address, gateway) in [
            (&source, "source", SOURCE_ADDRESS, "192.0.2.2"),
            (&destination, "destination", DESTINATION_ADDRESS, "192.0.2.6"),
        ] {
            ip(&format!("link add host netns {host} type veth peer name {port} netns {middle}"))?;
            ip(&format!("-n {host} address add {address}/30 dev host"))?;
            ip(&format!("-n {middle} address add {gateway}/30 dev {port}"))?;
            ip(&format!("-n {host} link set host up"))?;
            ip(&format!("-n {middle} link set {port} up"))?;
            ip(&format!("-n {host} route add default via {gateway}"))?;
            for (setting, value) in SETTINGS {
                set(host, setting, value)?;
            }
            for (setting, value) in SETTINGS_IF_ANY {
                // Where it is the whole machine's, it is not ours to change.
                let _ = set(host, setting, value);
            }
            set(host, "net/ipv4/tcp_congestion_control", congestion)?;
        }
        set(&middle, "net/ipv4/ip_forward", "1")?;
        run(Command::new("tc").args(["-n", &middle]).args(
            format!(
                "qdisc add dev destination root tbf rate {}mbit burst {BURST} latency {QUEUE}",
                link.mbit_per_s
            )
            .split_whitespace(),
        ))?;
        Ok(Self { source, middle, destination })
    }

    /// The namespace that forwards, whose interface towards the destination is `destination`.
    pub(super) fn middle(&self) -> &str {
        &self.middle
    }

    /// The same command, run at this end.
    pub(super) fn at(&self, end: End, command: &Command) -> Command {
        let namespace = match end {
            End::Source => &self.source,
            End::Destination => &self.destination,
        };
        let mut inside = Command::new("ip");
        inside.args(["netns", "exec", namespace]).arg(command.get_program());
        inside.args(command.get_args());
        for (name, value) in command.get_envs() {
            match value {
                Some(value) => inside.env(name, value),
                None => inside.env_remove(name),
            };
        }
        inside
    }
}

fn set(namespace: &str, setting: &str, value: &str) -> Result<()> {
    let script = format!("echo {value} > /proc/sys/{setting}");
    run(Command::new("ip").args(["netns", "exec", namespace, "sh", "-c", &script]))
}

fn ip(arguments: &str) -> Result<()> {
    run(Command::new("ip").args(arguments.split_whitespace()))
}

fn run(command: &mut Command) -> Result<()> {
    let program = command.get_program().to_string_lossy().into_owned();
    let output = command
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("{program} did not start: iproute2 is needed"))?;
    let complaint = String::from_utf8_lossy(&output.stderr);
    let arguments: Vec<_> = command.get_args().map(std::ffi::OsStr::to_string_lossy).collect();
    ensure!(
        output.status.success(),
        "{program} {} (this needs root): {}",
        arguments.join(" "),
        complaint.trim()
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_keeps_its_arguments_and_variables_inside() {
        let network = Network { source: "a".into(), middle: "-".into(), destination: "b".into() };
        let mut command = Command::new("qemu");
        command.args(["-m", "2 G"]).env("MODULES", "here");
        let inside = network.at(End::Destination, &command);
        assert_eq!(inside.get_program(), "ip");
        let arguments: Vec<_> = inside.get_args().collect();
        assert_eq!(arguments, ["netns", "exec", "b", "qemu", "-m", "2 G"]);
        assert_eq!(inside.get_envs().count(), 1);
    }

    #[test]
    fn rates_are_read_and_written() {
        for (text, mbit_per_s, shown) in [
            ("1", 1000, "1 Gbit/s"),
            ("2.5", 2500, "2.5 Gbit/s"),
            ("10", 10_000, "10 Gbit/s"),
            ("0.125", 125, "0.125 Gbit/s"),
        ] {
            let link = Link::parse(text).unwrap();
            assert_eq!(link.mbit_per_s, mbit_per_s);
            assert_eq!(link.to_string(), shown);
        }
        for wrong in ["", "0", "1.2345", "-1", "fast", "1.-1"] {
            assert!(Link::parse(wrong).is_err(), "{wrong}");
        }
    }
}
