//! The link: three network namespaces in a row, whose queue lies behind the sender.
//!
//! The middle one forwards, and only its interface towards the destination is slow: what waits,
//! waits where the source's own queueing discipline does not see it, as at any switch of a real
//! network. The way back is not shaped.

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

/// Which end of the link.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum End {
    Source,
    Destination,
}

/// The namespaces of one link. The janitor removes them, interfaces and all.
#[derive(Debug)]
pub(super) struct Network {
    source: String,
    destination: String,
}

impl Network {
    /// Builds a link of so many Mbit/s, its hosts set to this congestion control.
    pub(super) fn build(
        janitor: &mut Janitor,
        name: &str,
        mbit_per_s: u32,
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
                "qdisc add dev destination root tbf rate {mbit_per_s}mbit burst {BURST} \
                 latency {QUEUE}"
            )
            .split_whitespace(),
        ))?;
        Ok(Self { source, destination })
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
        let network = Network { source: "a".into(), destination: "b".into() };
        let mut command = Command::new("qemu");
        command.args(["-m", "2 G"]).env("MODULES", "here");
        let inside = network.at(End::Destination, &command);
        assert_eq!(inside.get_program(), "ip");
        let arguments: Vec<_> = inside.get_args().collect();
        assert_eq!(arguments, ["netns", "exec", "b", "qemu", "-m", "2 G"]);
        assert_eq!(inside.get_envs().count(), 1);
    }
}
