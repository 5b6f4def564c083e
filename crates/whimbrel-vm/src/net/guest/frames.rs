//! Frames as the guest understands them, and as it makes them.

use smoltcp::phy::ChecksumCapabilities;
use smoltcp::wire::{
    ArpOperation, ArpPacket, ArpRepr, EthernetAddress, EthernetFrame, EthernetProtocol,
    EthernetRepr, Icmpv4Packet, Icmpv4Repr, IpAddress, IpProtocol, Ipv4Address, Ipv4Packet,
    Ipv4Repr, TcpControl, TcpPacket, TcpRepr, TcpSeqNumber,
};

use super::connection::Say;
use crate::net::{NetConfig, SERVICE_PORT};

/// Whom the guest talks to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Peer {
    pub(super) ip: [u8; 4],
    /// Its own, or that of the way to it.
    pub(super) mac: [u8; 6],
    pub(super) port: u16,
}

impl Peer {
    /// The same end of a connection, be it by another way.
    pub(super) fn is_same(&self, other: &Peer) -> bool {
        (self.ip, self.port) == (other.ip, other.port)
    }
}

/// What a peer says to the service.
#[derive(Clone, Copy, Debug)]
pub(super) struct Segment<'a> {
    pub(super) seq: u32,
    pub(super) ack: Option<u32>,
    pub(super) syn: bool,
    pub(super) fin: bool,
    pub(super) rst: bool,
    pub(super) window: u16,
    pub(super) payload: &'a [u8],
}

impl Segment<'_> {
    /// It asks for a connection.
    pub(super) fn begins(&self) -> bool {
        self.syn && self.ack.is_none() && !self.rst
    }
}

/// What has come.
#[derive(Debug)]
pub(super) enum Heard<'a> {
    /// Nothing that the guest knows, or nothing for it.
    Nothing,
    /// What is answered at once.
    Answer(Vec<u8>),
    Segment(Peer, Segment<'a>),
}

/// Everything is checked, and made, in software.
fn checksums() -> ChecksumCapabilities {
    ChecksumCapabilities::default()
}

/// What a frame says to a guest of that name.
pub(super) fn parse(frame: &[u8], own: NetConfig) -> Heard<'_> {
    understand(frame, own).unwrap_or(Heard::Nothing)
}

fn understand(frame: &[u8], own: NetConfig) -> Option<Heard<'_>> {
    let frame = EthernetFrame::new_checked(frame).ok()?;
    let to = frame.dst_addr();
    if to != EthernetAddress(own.mac) && !to.is_broadcast() {
        return None;
    }
    match frame.ethertype() {
        EthernetProtocol::Arp => arp(frame.payload(), own).map(Heard::Answer),
        EthernetProtocol::Ipv4 => ipv4(frame.src_addr(), frame.payload(), own),
        _ => None,
    }
}

fn arp(packet: &[u8], own: NetConfig) -> Option<Vec<u8>> {
    let asked = ArpRepr::parse(&ArpPacket::new_checked(packet).ok()?).ok()?;
    let ArpRepr::EthernetIpv4 {
        operation: ArpOperation::Request,
        source_hardware_addr,
        source_protocol_addr,
        target_protocol_addr,
        ..
    } = asked
    else {
        return None;
    };
    if target_protocol_addr != Ipv4Address::from(own.ip) {
        return None;
    }
    let answer = ArpRepr::EthernetIpv4 {
        operation: ArpOperation::Reply,
        source_hardware_addr: EthernetAddress(own.mac),
        source_protocol_addr: own.ip.into(),
        target_hardware_addr: source_hardware_addr,
        target_protocol_addr: source_protocol_addr,
    };
    let protocol = EthernetProtocol::Arp;
    Some(ethernet(own.mac, source_hardware_addr.0, protocol, answer.buffer_len(), |payload| {
        answer.emit(&mut ArpPacket::new_unchecked(payload));
    }))
}

fn ipv4(from: EthernetAddress, packet: &[u8], own: NetConfig) -> Option<Heard<'_>> {
    let packet = Ipv4Packet::new_checked(packet).ok()?;
    let ip = Ipv4Repr::parse(&packet, &checksums()).ok()?;
    if ip.dst_addr != Ipv4Address::from(own.ip) {
        return None;
    }
    let peer = Peer { ip: ip.src_addr.octets(), mac: from.0, port: 0 };
    match ip.next_header {
        IpProtocol::Icmp => echo(packet.payload(), own, &peer).map(Heard::Answer),
        IpProtocol::Tcp => {
            let (src, dst) = (IpAddress::Ipv4(ip.src_addr), IpAddress::Ipv4(ip.dst_addr));
            let packet = TcpPacket::new_checked(packet.payload()).ok()?;
            let tcp = TcpRepr::parse(&packet, &src, &dst, &checksums()).ok()?;
            let segment = Segment {
                seq: number(tcp.seq_number),
                ack: tcp.ack_number.map(number),
                syn: tcp.control == TcpControl::Syn,
                fin: tcp.control == TcpControl::Fin,
                rst: tcp.control == TcpControl::Rst,
                window: tcp.window_len,
                payload: tcp.payload,
            };
            let peer = Peer { port: tcp.src_port, ..peer };
            match tcp.dst_port {
                SERVICE_PORT => Some(Heard::Segment(peer, segment)),
                port => refuse(own, &peer, &segment, port).map(Heard::Answer),
            }
        }
        _ => None,
    }
}

fn echo(packet: &[u8], own: NetConfig, peer: &Peer) -> Option<Vec<u8>> {
    let packet = Icmpv4Packet::new_checked(packet).ok()?;
    let Icmpv4Repr::EchoRequest { ident, seq_no, data } =
        Icmpv4Repr::parse(&packet, &checksums()).ok()?
    else {
        return None;
    };
    let answer = Icmpv4Repr::EchoReply { ident, seq_no, data };
    Some(ip(own, peer, IpProtocol::Icmp, answer.buffer_len(), |payload| {
        answer.emit(&mut Icmpv4Packet::new_unchecked(payload), &checksums());
    }))
}

/// What the guest says on one of its connections.
pub(super) fn segment(own: NetConfig, peer: &Peer, say: &Say) -> Vec<u8> {
    let control = match say {
        Say { syn: true, .. } => TcpControl::Syn,
        Say { fin: true, .. } => TcpControl::Fin,
        Say { payload, .. } if !payload.is_empty() => TcpControl::Psh,
        Say { .. } => TcpControl::None,
    };
    let tcp = TcpRepr {
        src_port: SERVICE_PORT,
        dst_port: peer.port,
        control,
        seq_number: TcpSeqNumber(say.seq.cast_signed()),
        ack_number: Some(TcpSeqNumber(say.ack.cast_signed())),
        window_len: say.window,
        window_scale: None,
        max_seg_size: say.syn.then_some(1460),
        sack_permitted: false,
        sack_ranges: [None; 3],
        timestamp: None,
        payload: &say.payload,
    };
    emit(own, peer, &tcp)
}

/// The answer to a segment of no connection that there is.
pub(super) fn refusal(own: NetConfig, peer: &Peer, segment: &Segment<'_>) -> Option<Vec<u8>> {
    refuse(own, peer, segment, SERVICE_PORT)
}

fn refuse(own: NetConfig, peer: &Peer, segment: &Segment<'_>, port: u16) -> Option<Vec<u8>> {
    if segment.rst {
        return None;
    }
    let length = u32::try_from(segment.payload.len()).ok()?;
    let numbers = length + u32::from(segment.syn) + u32::from(segment.fin);
    let (seq, ack) = match segment.ack {
        Some(ack) => (ack, None),
        None => (0, Some(segment.seq.wrapping_add(numbers))),
    };
    let tcp = TcpRepr {
        src_port: port,
        dst_port: peer.port,
        control: TcpControl::Rst,
        seq_number: TcpSeqNumber(seq.cast_signed()),
        ack_number: ack.map(|ack| TcpSeqNumber(ack.cast_signed())),
        window_len: 0,
        window_scale: None,
        max_seg_size: None,
        sack_permitted: false,
        sack_ranges: [None; 3],
        timestamp: None,
        payload: &[],
    };
    Some(emit(own, peer, &tcp))
}

fn emit(own: NetConfig, peer: &Peer, tcp: &TcpRepr<'_>) -> Vec<u8> {
    let (src, dst) = (IpAddress::Ipv4(own.ip.into()), IpAddress::Ipv4(peer.ip.into()));
    ip(own, peer, IpProtocol::Tcp, tcp.buffer_len(), |payload| {
        tcp.emit(&mut TcpPacket::new_unchecked(payload), &src, &dst, &checksums());
    })
}

fn ip(
    own: NetConfig,
    peer: &Peer,
    protocol: IpProtocol,
    len: usize,
    fill: impl FnOnce(&mut [u8]),
) -> Vec<u8> {
    let ip = Ipv4Repr {
        src_addr: own.ip.into(),
        dst_addr: peer.ip.into(),
        next_header: protocol,
        payload_len: len,
        hop_limit: 64,
    };
    ethernet(own.mac, peer.mac, EthernetProtocol::Ipv4, ip.buffer_len() + len, |packet| {
        let mut packet = Ipv4Packet::new_unchecked(packet);
        ip.emit(&mut packet, &checksums());
        fill(packet.payload_mut());
    })
}

fn ethernet(
    from: [u8; 6],
    to: [u8; 6],
    protocol: EthernetProtocol,
    len: usize,
    fill: impl FnOnce(&mut [u8]),
) -> Vec<u8> {
    let ethernet = EthernetRepr {
        src_addr: EthernetAddress(from),
        dst_addr: EthernetAddress(to),
        ethertype: protocol,
    };
    let mut bytes = vec![0; ethernet.buffer_len() + len];
    let mut frame = EthernetFrame::new_unchecked(&mut bytes[..]);
    ethernet.emit(&mut frame);
    fill(frame.payload_mut());
    bytes
}

/// A number as TCP has it, without a sign.
fn number(seq: TcpSeqNumber) -> u32 {
    seq.0.cast_unsigned()
}

#[cfg(test)]
mod tests {
    use super::*;

    const OWN: NetConfig = NetConfig { mac: [2, 0, 0, 0, 0, 1], ip: [10, 0, 0, 1] };

    #[test]
    fn what_is_said_is_understood() {
        let peer = Peer { ip: [10, 0, 0, 2], mac: [2, 0, 0, 0, 0, 2], port: 4000 };
        let say = Say {
            seq: u32::MAX,
            ack: 5,
            syn: false,
            fin: false,
            window: 512,
            payload: vec![7; 16],
        };
        let frame = segment(OWN, &peer, &say);
        let them = NetConfig { mac: peer.mac, ip: peer.ip };
        // To the peer's own port, which is not the service's.
        assert!(matches!(parse(&frame, them), Heard::Answer(_)));
        let frame = {
            let peer = Peer { port: SERVICE_PORT, ..peer };
            segment(OWN, &peer, &say)
        };
        let Heard::Segment(from, heard) = parse(&frame, them) else { panic!("{frame:?}") };
        assert!(from.ip == OWN.ip && from.mac == OWN.mac && from.port == SERVICE_PORT);
        assert_eq!((heard.seq, heard.ack, heard.payload), (u32::MAX, Some(5), &[7; 16][..]));
    }

    #[test]
    fn anything_can_come() {
        let peer = Peer { ip: [10, 0, 0, 1], mac: OWN.mac, port: SERVICE_PORT };
        let say = Say { seq: 1, ack: 2, syn: true, fin: false, window: 9, payload: Vec::new() };
        let frame = segment(NetConfig { ip: [10, 0, 0, 9], ..OWN }, &peer, &say);
        assert!(matches!(parse(&frame, OWN), Heard::Segment(..)));
        for len in 0..frame.len() {
            assert!(matches!(parse(&frame[..len], OWN), Heard::Nothing), "{len}");
        }
        for at in 0..frame.len() {
            for bit in 0..8 {
                let mut damaged = frame.clone();
                damaged[at] ^= 1 << bit;
                drop(parse(&damaged, OWN));
            }
        }
    }
}
