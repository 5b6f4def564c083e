//! The VM's network: its options, and the way of its guest's frames through the engine.

use std::sync::{Arc, OnceLock};

use clap::Args;
use whimbrel::{Migrator, Outlet, Output};
use whimbrel_vm::ReferenceVm;
use whimbrel_vm::net::{Attachment, NetConfig, NetPlug, Nic};

use crate::failure::Failure;

/// A network for the guest.
#[derive(Clone, Debug, Args)]
pub(crate) struct NetOptions {
    /// Plug a network device in: tap:NAME, or unix:PATH, a stream socket. The native guest answers
    /// there to ping, and on TCP port 7
    #[arg(long, value_name = "PLUG")]
    net: Option<NetPlug>,
    /// The guest's IPv4 address
    #[arg(long, default_value = "10.0.2.15", requires = "net", value_name = "ADDRESS")]
    net_ip: std::net::Ipv4Addr,
    /// The guest's MAC address
    #[arg(
        long,
        default_value = "52:54:00:12:34:56",
        requires = "net",
        value_parser = parse_mac,
        value_name = "ADDRESS"
    )]
    net_mac: [u8; 6],
}

impl NetOptions {
    /// Who the guest is, if it is to have a network.
    pub(crate) fn config(&self) -> Option<NetConfig> {
        self.net.is_some().then(|| NetConfig { mac: self.net_mac, ip: self.net_ip.octets() })
    }

    /// Plugs the VM in: what its guest sends goes through the engine, which holds it while it may
    /// not leave.
    pub(crate) fn plug_in(
        &self,
        vm: &ReferenceVm,
        migrator: &Migrator,
    ) -> Result<Option<Plugged>, Failure> {
        let (Some(plug), Some(nic)) = (&self.net, vm.nic()) else { return Ok(None) };
        let way_out: Arc<OnceLock<Output>> = Arc::default();
        let receive = {
            let (nic, way_out) = (Arc::clone(nic), Arc::clone(&way_out));
            move |frame| {
                // What comes for a primary's guest is not for its copy.
                if way_out.get().is_some_and(|output| !output.is_copys()) {
                    nic.receive(frame);
                }
            }
        };
        let attachment = Attachment::plug(plug, receive)?;
        let output = migrator.set_outlet(ToHost(attachment.sender()));
        nic.on_send({
            let output = output.clone();
            move |frame| output.send(frame)
        });
        let _first = way_out.set(output);
        Ok(Some(Plugged { nic: Arc::clone(nic), _attachment: attachment }))
    }
}

/// Where frames leave.
struct ToHost<F>(F);

impl<F: Fn(&[u8]) + Send + Sync> Outlet for ToHost<F> {
    fn release(&self, packet: &[u8]) {
        (self.0)(packet);
    }
}

/// A VM that is plugged in, until this is dropped.
#[derive(Debug)]
pub(crate) struct Plugged {
    nic: Arc<Nic>,
    _attachment: Attachment,
}

impl Drop for Plugged {
    fn drop(&mut self) {
        self.nic.unplug();
    }
}

fn parse_mac(text: &str) -> Result<[u8; 6], String> {
    let error = || "expected six bytes in hexadecimal with colons: 52:54:00:12:34:56".to_owned();
    let bytes: Vec<u8> = text
        .split(':')
        .map(|byte| match byte.len() {
            2 => u8::from_str_radix(byte, 16).map_err(|_| error()),
            _ => Err(error()),
        })
        .collect::<Result<_, _>>()?;
    let mac: [u8; 6] = bytes.try_into().map_err(|_| error())?;
    match mac[0] & 1 {
        0 => Ok(mac),
        _ => Err("the address of a group cannot be a guest's".into()),
    }
}
