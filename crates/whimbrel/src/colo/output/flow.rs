//! What a packet is: of which connection, and what of it both guests have to say alike.
//!
//! The clocks, identifiers and paths of two hosts differ, so not all of a packet is compared: of IP
//! neither the identification nor the time to live, of UDP and ICMP not the checksum (a guest may
//! leave it to the host), of TCP what [`Segment`] has. What cannot be taken apart is compared whole.

use std::borrow::Cow;
use std::fmt;
use std::net::{IpAddr, SocketAddr};

use etherparse::{
    IpNumber, IpPayloadSlice, Ipv6ExtensionSlice, LinkExtSlice, NetSlice, SlicedPacket, TcpSlice,
    TransportSlice,
};

/// A connection, from its sender's side: packets of one are compared with each other only.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum Flow {
    Ip { vlans: Vlans, source: IpAddr, destination: IpAddr, protocol: Protocol },
    Frames { ether_type: u16, source: Mac, destination: Mac },
}

/// The outermost first; 0, which is no VLAN, where there are fewer.
type Vlans = [u16; 3];

type Mac = [u8; 6];

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum Protocol {
    Tcp {
        from: u16,
        to: u16,
    },
    Udp {
        from: u16,
        to: u16,
    },
    /// An echo's or an answer's, by its identifier.
    Echo(u16),
    Other(u8),
    /// Fragments of packets of this protocol: which ports they are of only the first one says.
    Fragments(u8),
}

/// A packet as far as it is compared.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Packet<'a> {
    pub(super) flow: Flow,
    pub(super) said: Said<'a>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Said<'a> {
    /// Of the flows of [`Protocol::Tcp`], and only of those.
    Segment(Segment<'a>),
    Datagram(Cow<'a, [u8]>),
}

/// What a TCP segment says to the other end. Window and options are not part of it, nor where it
/// was cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Segment<'a> {
    pub(super) sequence: u32,
    pub(super) acknowledges: Option<u32>,
    pub(super) syn: bool,
    pub(super) fin: bool,
    pub(super) rst: bool,
    pub(super) payload: &'a [u8],
}

impl<'a> Packet<'a> {
    pub(super) fn of(frame: &'a [u8]) -> Packet<'a> {
        // Strictly: what has lengths that contradict each other is compared whole.
        Packet::of_ip(frame).unwrap_or_else(|| Packet::whole(frame))
    }

    fn of_ip(frame: &'a [u8]) -> Option<Packet<'a>> {
        let packet = SlicedPacket::from_ethernet(frame).ok()?;
        let mut vlans = [0; 3];
        for (place, extension) in vlans.iter_mut().zip(&packet.link_exts) {
            let LinkExtSlice::Vlan(vlan) = extension else { return None };
            *place = vlan.vlan_identifier().value();
        }
        let net = packet.net?;
        let payload = net.ip_payload_ref()?;
        let (source, destination): (IpAddr, IpAddr) = match &net {
            NetSlice::Ipv4(ip) => {
                (ip.header().source_addr().into(), ip.header().destination_addr().into())
            }
            NetSlice::Ipv6(ip) => {
                (ip.header().source_addr().into(), ip.header().destination_addr().into())
            }
            NetSlice::Arp(_) => return None,
        };
        let (protocol, said) = match &packet.transport {
            _ if payload.fragmented => fragment(&net, payload)?,
            Some(TransportSlice::Tcp(tcp)) => {
                let protocol =
                    Protocol::Tcp { from: tcp.source_port(), to: tcp.destination_port() };
                (protocol, Said::Segment(Segment::of(tcp)))
            }
            Some(TransportSlice::Udp(udp)) => {
                let protocol =
                    Protocol::Udp { from: udp.source_port(), to: udp.destination_port() };
                (protocol, Said::Datagram(without_checksum(payload.payload, 6)))
            }
            _ => other(payload),
        };
        Some(Packet { flow: Flow::Ip { vlans, source, destination, protocol }, said })
    }

    fn whole(frame: &'a [u8]) -> Packet<'a> {
        let flow = Flow::Frames {
            destination: field(frame, 0).unwrap_or_default(),
            source: field(frame, 6).unwrap_or_default(),
            ether_type: u16::from_be_bytes(field(frame, 12).unwrap_or_default()),
        };
        Packet { flow, said: Said::Datagram(Cow::Borrowed(frame)) }
    }
}

impl<'a> Segment<'a> {
    fn of(tcp: &TcpSlice<'a>) -> Segment<'a> {
        Segment {
            sequence: tcp.sequence_number(),
            acknowledges: tcp.ack().then(|| tcp.acknowledgment_number()),
            syn: tcp.syn(),
            fin: tcp.fin(),
            rst: tcp.rst(),
            payload: tcp.payload(),
        }
    }

    /// How far it goes in sequence numbers.
    pub(super) fn len(&self) -> usize {
        usize::from(self.syn) + self.payload.len() + usize::from(self.fin)
    }
}

/// Without the identification, which says what belongs together to those who put it together.
fn fragment<'a>(net: &NetSlice<'a>, payload: &IpPayloadSlice<'a>) -> Option<(Protocol, Said<'a>)> {
    let (offset, more) = match net {
        NetSlice::Ipv4(ip) => {
            let header = ip.header();
            (header.fragments_offset().value(), header.more_fragments())
        }
        NetSlice::Ipv6(ip) => ip.extensions().clone().into_iter().find_map(|header| {
            let Ipv6ExtensionSlice::Fragment(header) = header else { return None };
            Some((header.fragment_offset().value(), header.more_fragments()))
        })?,
        NetSlice::Arp(_) => return None,
    };
    let mut said = Vec::with_capacity(3 + payload.payload.len());
    said.extend_from_slice(&offset.to_be_bytes());
    said.push(u8::from(more));
    said.extend_from_slice(payload.payload);
    Some((Protocol::Fragments(payload.ip_number.0), Said::Datagram(Cow::Owned(said))))
}

fn other<'a>(payload: &IpPayloadSlice<'a>) -> (Protocol, Said<'a>) {
    let said = payload.payload;
    match (payload.ip_number, said.first()) {
        (IpNumber::ICMP, Some(0 | 8)) | (IpNumber::IPV6_ICMP, Some(128 | 129)) => {
            let identifier = u16::from_be_bytes(field(said, 4).unwrap_or_default());
            (Protocol::Echo(identifier), Said::Datagram(without_checksum(said, 2)))
        }
        (number @ (IpNumber::ICMP | IpNumber::IPV6_ICMP), _) => {
            (Protocol::Other(number.0), Said::Datagram(without_checksum(said, 2)))
        }
        (number, _) => (Protocol::Other(number.0), Said::Datagram(Cow::Borrowed(said))),
    }
}

fn without_checksum(said: &[u8], at: usize) -> Cow<'_, [u8]> {
    let mut said = Cow::Borrowed(said);
    if said.len() >= at + 2 {
        said.to_mut()[at..at + 2].fill(0);
    }
    said
}

fn field<const N: usize>(bytes: &[u8], at: usize) -> Option<[u8; N]> {
    bytes.get(at..at + N)?.try_into().ok()
}

impl fmt::Display for Flow {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (source, destination, protocol) = match *self {
            Flow::Ip { source, destination, protocol, .. } => (source, destination, protocol),
            Flow::Frames { ether_type, .. } => {
                return write!(f, "frames of type {ether_type:#06x}");
            }
        };
        match protocol {
            Protocol::Tcp { from, to } | Protocol::Udp { from, to } => {
                let name = if matches!(protocol, Protocol::Tcp { .. }) { "TCP" } else { "UDP" };
                let (from, to) = (SocketAddr::new(source, from), SocketAddr::new(destination, to));
                write!(f, "{name} from {from} to {to}")
            }
            Protocol::Echo(id) => write!(f, "ICMP echo {id} from {source} to {destination}"),
            Protocol::Other(number) => {
                write!(f, "IP protocol {number} from {source} to {destination}")
            }
            Protocol::Fragments(number) => {
                write!(f, "fragments of IP protocol {number} from {source} to {destination}")
            }
        }
    }
}

#[cfg(test)]
mod tests;
