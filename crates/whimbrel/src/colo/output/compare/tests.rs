use super::*;
use crate::colo::output::packets::{arp, echo, fragment, ip_of, on_another_road, tcp, udp};

const TIMEOUT: Duration = Duration::from_secs(3);

fn seconds(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

fn comparer() -> Comparer {
    Comparer::new(TIMEOUT)
}

fn nothing() -> Vec<Vec<u8>> {
    Vec::new()
}

#[test]
fn datagrams_leave_one_by_one_when_the_copy_says_them() {
    let ways: [fn(&str) -> Vec<u8>; 3] =
        [|text| udp(1, text), |text| echo(7, 1, text), |text| ip_of(47, text)];
    for say in ways {
        let mut comparer = comparer();
        comparer.primary(seconds(0), say("one"));
        comparer.primary(seconds(0), say("two"));
        assert_eq!(comparer.released(), nothing());
        comparer.copy(seconds(0), &on_another_road(say("one")));
        assert_eq!(comparer.released(), [say("one")]);
        comparer.copy(seconds(0), &say("two"));
        comparer.copy(seconds(0), &say("three"));
        assert_eq!(comparer.released(), [say("two")]);
        comparer.primary(seconds(0), say("three"));
        assert_eq!(comparer.released(), [say("three")]);
        assert_eq!((comparer.held_bytes(), comparer.wait(seconds(0))), (0, None));
        // One of the same flow that is not the same.
        comparer.primary(seconds(0), say("four"));
        comparer.copy(seconds(0), &say("five"));
        let difference = comparer.differs(seconds(0));
        assert!(matches!(difference, Some(Difference::Unlike(_, Unlike::Datagram))));
        comparer.copy(seconds(0), &say("four"));
        assert_eq!(comparer.released(), nothing());
    }
}

#[test]
fn other_frames_and_fragments_are_compared_whole() {
    let mut comparer = comparer();
    let packets =
        [arp(1), fragment(udp(1, "fragment"), 0), fragment(udp(2, "fragment"), 1), arp(2)];
    for packet in &packets {
        comparer.primary(seconds(0), packet.clone());
    }
    comparer.copy(seconds(0), &packets[1]);
    comparer.copy(seconds(0), &packets[0]);
    assert_eq!(comparer.released(), [packets[1].clone(), packets[0].clone()]);
    comparer.copy(seconds(0), &packets[3]);
    comparer.copy(seconds(0), &packets[1]);
    assert_eq!(comparer.released(), [packets[3].clone()]);
    let Some(Difference::Unlike(flow, Unlike::Datagram)) = comparer.differs(seconds(0)) else {
        panic!("the second fragment differs");
    };
    assert!(flow.to_string().starts_with("fragments of IP protocol 17"), "{flow}");
}

#[test]
fn whoever_waits_too_long_makes_a_difference() {
    let mut comparer = comparer();
    assert_eq!(comparer.wait(seconds(9)), None);
    comparer.copy(seconds(10), &udp(1, "copy"));
    comparer.primary(seconds(11), udp(2, "guest"));
    assert_eq!(comparer.wait(seconds(12)), Some(seconds(1)));
    assert_eq!(comparer.differs(seconds(12)), None);
    assert!(matches!(comparer.differs(seconds(13)), Some(Difference::CopyAlone(_))));
    comparer.primary(seconds(13), udp(1, "copy"));
    assert_eq!(comparer.differs(seconds(13)), None);
    assert_eq!(comparer.wait(seconds(13)), Some(seconds(1)));
    let late = comparer.differs(seconds(14)).expect("the guest has waited");
    assert_eq!(
        late.to_string(),
        "the copy has not said for too long what the guest has (UDP from 10.0.0.1:2 to 10.0.0.2:53)"
    );
}

#[test]
fn a_checkpoint_lets_out_what_was_before_it() {
    let mut comparer = comparer();
    comparer.primary(seconds(0), udp(1, "before"));
    comparer.primary(seconds(0), arp(1));
    comparer.copy(seconds(0), &udp(2, "the copy that was"));
    assert!(comparer.differs(seconds(3)).is_some());
    let boundary = comparer.boundary();
    comparer.primary(seconds(3), udp(1, "after"));
    comparer.copy(seconds(4), &udp(1, "after"));
    assert_eq!((comparer.differs(seconds(9)), comparer.wait(seconds(9))), (None, None));
    assert_eq!(comparer.released(), nothing());
    comparer.complete(seconds(10), boundary);
    assert_eq!(comparer.released(), [udp(1, "before"), arp(1)]);
    // What has waited for the checkpoint has not waited for the copy.
    assert_eq!(comparer.wait(seconds(10)), Some(TIMEOUT));
    assert_eq!(comparer.differs(seconds(12)), None);
    comparer.copy(seconds(12), &udp(1, "after"));
    assert_eq!(comparer.released(), [udp(1, "after")]);
    assert_eq!((comparer.held_bytes(), comparer.wait(seconds(12))), (0, None));
}

#[test]
fn everything_goes_when_the_secondary_is_gone() {
    let mut comparer = comparer();
    comparer.copy(seconds(0), &udp(3, "same"));
    let packets = [udp(3, "same"), udp(1, "one"), arp(1), udp(1, "two")];
    comparer.primary(seconds(0), packets[0].clone());
    comparer.primary(seconds(0), packets[1].clone());
    let boundary = comparer.boundary();
    comparer.primary(seconds(0), packets[2].clone());
    comparer.primary(seconds(0), packets[3].clone());
    assert_eq!(comparer.let_all_go(), packets);
    comparer.complete(seconds(0), boundary);
    assert_eq!((comparer.let_all_go(), comparer.held_bytes()), (nothing(), 0));
}

#[test]
fn too_many_bytes_are_held_for_a_checkpoint() {
    let mut comparer = Comparer::with_limits(TIMEOUT, 100_000, 100);
    let mut sent = Vec::new();
    while comparer.differs(seconds(0)).is_none() {
        sent.push(udp(1, [0; 1000]));
        comparer.primary(seconds(0), udp(1, [0; 1000]));
        assert!(sent.len() < 100, "the limit holds");
    }
    assert!(matches!(comparer.differs(seconds(0)), Some(Difference::Bytes(100_001..))));
    // Nothing is compared any more, and nothing dropped.
    comparer.copy(seconds(0), &udp(1, [0; 1000]));
    sent.push(udp(2, "x"));
    comparer.primary(seconds(0), udp(2, "x"));
    assert_eq!(comparer.released(), nothing());
    let boundary = comparer.boundary();
    comparer.complete(seconds(0), boundary);
    assert_eq!(comparer.released(), sent);
    assert_eq!((comparer.differs(seconds(0)), comparer.held_bytes()), (None, 0));
}

#[test]
fn the_bytes_of_the_copy_count_and_so_does_the_least_of_packets() {
    let mut comparer = Comparer::with_limits(TIMEOUT, 100_000, 100);
    for at in 0..2000_u32 {
        comparer.copy(seconds(0), &tcp("", 2 * at, None).with("x"));
    }
    assert!(matches!(comparer.differs(seconds(0)), Some(Difference::Bytes(100_001..110_000))));
}

#[test]
fn idle_connections_are_forgotten_and_others_are_not() {
    let mut comparer = Comparer::with_limits(TIMEOUT, 100_000, 3);
    let segment = |to| tcp("", 100, None).to(to).with("abc");
    for to in [1, 2, 3] {
        comparer.primary(seconds(0), segment(to));
        comparer.copy(seconds(0), &segment(to));
    }
    assert_eq!(comparer.released().len(), 3);
    // The first is heard of again, so that it is the second that is forgotten.
    comparer.primary(seconds(0), tcp("", 103, None).to(1).with("def"));
    comparer.copy(seconds(0), &tcp("", 103, None).to(1).with("def"));
    comparer.primary(seconds(0), segment(4));
    assert_eq!(comparer.released().len(), 1);
    comparer.primary(seconds(0), segment(1));
    assert_eq!(comparer.released(), [segment(1)]);
    comparer.primary(seconds(0), segment(2));
    assert_eq!((comparer.released(), comparer.differs(seconds(0))), (nothing(), None));
    // Now all of them wait but the first.
    comparer.primary(seconds(0), segment(5));
    comparer.primary(seconds(0), segment(6));
    assert_eq!(comparer.differs(seconds(0)), Some(Difference::Connections));
    comparer.copy(seconds(0), &segment(4));
    assert_eq!(comparer.released(), nothing());
    let boundary = comparer.boundary();
    comparer.complete(seconds(0), boundary);
    assert_eq!(comparer.released(), [4, 2, 5, 6].map(segment));
    assert_eq!(comparer.differs(seconds(0)), None);
}

#[test]
fn a_connection_too_many_of_the_copy_asks_for_a_checkpoint() {
    let mut comparer = Comparer::with_limits(TIMEOUT, 100_000, 1);
    comparer.copy(seconds(0), &udp(1, "x"));
    comparer.copy(seconds(0), &udp(2, "x"));
    assert_eq!(comparer.differs(seconds(0)), Some(Difference::Connections));
}
