use etherparse::PacketBuilder;
use proptest::prelude::*;

use super::*;
use crate::colo::output::packets::{
    CLIENT, GUEST, arp, echo, fragment, ip_of, on_another_road, tcp, udp, written,
};

fn protocol(frame: &[u8]) -> Option<Protocol> {
    match Packet::of(frame).flow {
        Flow::Ip { protocol, source, destination, .. } => {
            assert_eq!((source, destination), (IpAddr::from(GUEST), IpAddr::from(CLIENT)));
            Some(protocol)
        }
        Flow::Frames { .. } => None,
    }
}

#[test]
fn a_connection_is_protocol_addresses_and_ports() {
    let segment = tcp("", 1, None).with("x");
    assert_eq!(protocol(&segment), Some(Protocol::Tcp { from: 80, to: 4000 }));
    assert_eq!(protocol(&udp(9, "x")), Some(Protocol::Udp { from: 9, to: 53 }));
    assert_eq!(protocol(&echo(7, 1, "x")), Some(Protocol::Echo(7)));
    assert_eq!(protocol(&ip_of(47, "x")), Some(Protocol::Other(47)));
    assert_eq!(protocol(&arp(1)), None);
}

#[test]
fn a_segment_is_what_it_says() {
    let frame = tcp("sf", 7, Some(9)).with("abc");
    let Said::Segment(segment) = Packet::of(&frame).said else { panic!("it is TCP") };
    let expected = Segment {
        sequence: 7,
        acknowledges: Some(9),
        syn: true,
        fin: true,
        rst: false,
        payload: b"abc",
    };
    assert_eq!(segment, expected);
    assert_eq!(segment.len(), 5);
}

#[test]
fn identification_life_and_checksums_are_of_the_road() {
    for packet in [udp(1, "x"), echo(1, 1, "x"), ip_of(47, "x"), fragment(udp(1, "x"), 0)] {
        assert_eq!(Packet::of(&packet), Packet::of(&on_another_road(packet.clone())));
    }
    let mut unsummed = udp(1, "x");
    unsummed[40..42].fill(0);
    assert_eq!(Packet::of(&unsummed), Packet::of(&udp(1, "x")));
    assert_ne!(Packet::of(&udp(1, "x")), Packet::of(&udp(1, "y")));
    assert_ne!(Packet::of(&echo(1, 1, "x")), Packet::of(&echo(1, 2, "x")));
}

#[test]
fn fragments_are_of_no_port_and_have_a_place() {
    let first = fragment(udp(1, "fragment"), 0);
    assert_eq!(protocol(&first), Some(Protocol::Fragments(17)));
    assert_ne!(Packet::of(&first), Packet::of(&fragment(udp(1, "fragment"), 1)));
}

#[test]
fn vlans_and_ipv6_are_told_apart() {
    let on_vlan = |id: u16| {
        let step = PacketBuilder::ethernet2([0; 6], [0; 6])
            .single_vlan(id.try_into().expect("a VLAN"))
            .ipv6([1; 16], [2; 16], 64)
            .udp(1, 2);
        written(|bytes| step.write(bytes, b"x"))
    };
    let flow = Packet::of(&on_vlan(5)).flow;
    let protocol = Protocol::Udp { from: 1, to: 2 };
    let (source, destination) = (IpAddr::from([1; 16]), IpAddr::from([2; 16]));
    assert_eq!(flow, Flow::Ip { vlans: [5, 0, 0], source, destination, protocol });
    assert_ne!(flow, Packet::of(&on_vlan(6)).flow);
}

#[test]
fn what_contradicts_itself_is_compared_whole() {
    let mut longer = udp(1, "x");
    longer[17] += 1;
    for frame in [&longer[..], &arp(1), &[1, 2, 3], &[]] {
        let packet = Packet::of(frame);
        assert!(matches!(packet.flow, Flow::Frames { .. }), "{packet:?}");
        assert_eq!(packet.said, Said::Datagram(frame.into()));
    }
}

#[test]
fn a_flow_reads_well() {
    let flow = Packet::of(&tcp("", 1, None).bare()).flow;
    assert_eq!(flow.to_string(), "TCP from 10.0.0.1:80 to 10.0.0.2:4000");
    assert_eq!(Packet::of(&arp(1)).flow.to_string(), "frames of type 0x0806");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    #[test]
    fn any_bytes_are_a_packet(
        mut frame in prop_oneof![
            proptest::collection::vec(any::<u8>(), 0..80),
            Just(tcp("s", 1, Some(1)).with("abc")),
            Just(udp(1, "abc")),
            Just(echo(1, 1, "abc")),
        ],
        changes in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..4),
        cut in any::<prop::sample::Index>(),
    ) {
        for (at, value) in changes {
            if !frame.is_empty() {
                *at.get_mut(&mut frame[..]) = value;
            }
        }
        frame.truncate(frame.len() - cut.index(frame.len() / 4 + 1));
        let packet = Packet::of(&frame);
        let is_tcp = matches!(packet.flow, Flow::Ip { protocol: Protocol::Tcp { .. }, .. });
        prop_assert_eq!(is_tcp, matches!(packet.said, Said::Segment(_)));
    }
}
