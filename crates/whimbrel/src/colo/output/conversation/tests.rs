//! The rules of TCP, each by a guest and a copy that send packets.

use std::time::Duration;

use crate::colo::output::compare::{Comparer, Difference, Unlike};
use crate::colo::output::packets::{Tcp, tcp};

const NOW: Duration = Duration::from_secs(100);
const TIMEOUT: Duration = Duration::from_secs(3);
const ACK: Option<u32> = Some(500);

struct Two(Comparer);

impl Two {
    fn new() -> Two {
        Two(Comparer::new(TIMEOUT))
    }

    /// Both have begun the connection at 99, so that the next byte is 100.
    fn begun() -> Two {
        let mut two = Two::new();
        two.copy(tcp("s", 99, ACK).bare());
        two.guest(&[tcp("s", 99, ACK).bare()]);
        two.let_out(&[tcp("s", 99, ACK).bare()]);
        two
    }

    fn guest(&mut self, packets: &[Vec<u8>]) {
        for packet in packets {
            self.0.primary(NOW, packet.clone());
        }
    }

    fn copy(&mut self, packet: Vec<u8>) {
        self.0.copy(NOW, &packet);
    }

    /// Exactly these have left since this was asked for last.
    #[track_caller]
    fn let_out(&mut self, packets: &[Vec<u8>]) {
        assert_eq!(self.0.released(), packets);
        assert_eq!(self.0.differs(NOW), None);
    }

    #[track_caller]
    fn differ(&mut self, expected: Unlike) {
        assert_eq!(self.0.released(), Vec::<Vec<u8>>::new());
        match self.0.differs(NOW) {
            Some(Difference::Unlike(_, unlike)) => assert_eq!(unlike, expected),
            other => panic!("{other:?} instead of {expected:?}"),
        }
    }

    fn checkpoint(&mut self) {
        let boundary = self.0.boundary();
        self.0.complete(NOW, boundary);
        assert_eq!(self.0.differs(NOW), None);
    }
}

fn at(sequence: u32) -> Tcp {
    tcp("", sequence, ACK)
}

#[test]
fn a_packet_leaves_when_the_copy_has_said_its_bytes() {
    let mut two = Two::begun();
    let packets = [at(100).with("abc"), at(103).with("def")];
    two.guest(&packets);
    two.copy(at(100).with("ab"));
    two.let_out(&[]);
    two.copy(at(102).with("cde"));
    two.let_out(&packets[..1]);
    two.copy(at(105).with("fghi"));
    two.let_out(&packets[1..]);
    let whole = at(106).window(5).with("ghi");
    two.guest(std::slice::from_ref(&whole));
    two.let_out(&[whole]);
    assert_eq!(two.0.wait(NOW), None);
}

#[test]
fn the_copy_may_say_it_out_of_order_and_again() {
    let mut two = Two::begun();
    let packets = [at(100).with("abc"), at(103).with("def")];
    two.guest(&packets);
    two.copy(at(103).with("def"));
    two.copy(at(103).with("def"));
    two.let_out(&[]);
    two.copy(at(100).with("abcd"));
    two.let_out(&packets);
}

#[test]
fn sequence_numbers_wrap() {
    let mut two = Two::new();
    two.copy(tcp("s", u32::MAX - 2, ACK).with("abcdef"));
    let packets =
        [tcp("s", u32::MAX - 2, ACK).bare(), at(u32::MAX - 1).with("abc"), at(1).with("def")];
    two.guest(&packets);
    two.let_out(&packets);
    two.guest(&[at(4).with("gh")]);
    two.copy(at(4).with("gx"));
    two.differ(Unlike::Bytes(5));
}

#[test]
fn what_was_compared_leaves_at_once_when_it_is_said_again() {
    let mut two = Two::begun();
    two.copy(at(100).with("abcdef"));
    two.guest(&[at(100).with("abcdef"), at(106).with("held")]);
    two.let_out(&[at(100).with("abcdef")]);
    two.guest(&[at(102).with("cd"), tcp("", 102, Some(501)).with("cd"), at(104).with("efhe")]);
    two.let_out(&[at(102).with("cd")]);
}

#[test]
fn a_packet_waits_until_the_copy_has_acknowledged_as_much() {
    let mut two = Two::begun();
    let packets = [
        tcp("", 100, Some(600)).bare(),
        tcp("", 100, Some(600)).with("abc"),
        tcp("", 103, Some(601)).bare(),
    ];
    two.guest(&packets);
    two.copy(tcp("", 100, Some(599)).with("abc"));
    two.let_out(&[]);
    two.copy(tcp("", 103, Some(600)).bare());
    two.let_out(&packets[..2]);
    two.copy(tcp("", 103, Some(550)).bare());
    two.let_out(&[]);
    two.copy(tcp("", 103, Some(700)).bare());
    two.let_out(&packets[2..]);
}

#[test]
fn acknowledgements_wrap() {
    let mut two = Two::new();
    let packets = [tcp("s", 99, Some(u32::MAX)).bare(), tcp("", 100, Some(5)).bare()];
    two.guest(&packets);
    two.copy(packets[0].clone());
    two.let_out(&packets[..1]);
    two.copy(tcp("", 100, Some(4)).bare());
    two.let_out(&[]);
    two.copy(tcp("", 100, Some(6)).bare());
    two.let_out(&packets[1..]);
}

#[test]
fn an_acknowledgement_of_the_copy_alone_is_no_difference() {
    let mut two = Two::begun();
    two.copy(tcp("", 100, Some(900)).bare());
    assert_eq!(two.0.wait(NOW), None);
}

#[test]
fn bytes_that_differ_are_a_difference_at_once() {
    let mut two = Two::begun();
    two.guest(&[at(100).with("abc"), at(103).with("def")]);
    two.copy(at(100).with("abxd"));
    two.differ(Unlike::Bytes(102));
    two.copy(at(100).with("abcdef"));
    two.guest(&[at(100).with("a"), at(106).with("ghi")]);
    two.differ(Unlike::Bytes(102));
    two.checkpoint();
    assert_eq!(two.0.released().len(), 4);
    two.guest(&[at(106).with("ghi")]);
    two.let_out(&[at(106).with("ghi")]);
}

#[test]
fn a_guest_that_differs_from_itself_is_a_difference() {
    let mut two = Two::begun();
    two.guest(&[at(100).with("abc"), at(101).with("x")]);
    two.differ(Unlike::Bytes(101));
}

#[test]
fn a_fin_is_said_like_a_byte() {
    let mut two = Two::begun();
    let packets = [tcp("f", 100, ACK).with("abc"), tcp("", 104, ACK).bare()];
    two.guest(&packets);
    two.copy(at(100).with("abc"));
    two.let_out(&[]);
    two.copy(tcp("f", 103, ACK).bare());
    two.let_out(&packets);
    let mut two = Two::begun();
    two.guest(&[tcp("f", 100, ACK).bare()]);
    two.copy(at(100).with([0]));
    two.differ(Unlike::Bytes(100));
}

#[test]
fn a_reset_leaves_when_the_copy_has_sent_one() {
    let mut two = Two::begun();
    let packets = [at(100).with("abc"), tcp("r", 103, Some(777)).bare()];
    two.guest(&packets);
    two.copy(at(100).with("abc"));
    two.let_out(&packets[..1]);
    two.copy(tcp("r", 102, None).bare());
    two.let_out(&packets[1..]);
    two.guest(&packets[1..]);
    two.let_out(&packets[1..]);
}

#[test]
fn a_reset_of_the_copy_alone_waits_for_the_guest() {
    let mut two = Two::begun();
    two.copy(tcp("r", 100, None).bare());
    assert_eq!(two.0.wait(NOW), Some(TIMEOUT));
    assert!(matches!(two.0.differs(NOW + TIMEOUT), Some(Difference::CopyAlone(_))));
    two.guest(&[tcp("r", 100, None).bare()]);
    assert_eq!(two.0.wait(NOW), None);
}

#[test]
fn beginnings_that_differ_are_a_difference() {
    let mut two = Two::new();
    two.guest(&[tcp("s", 99, ACK).bare()]);
    two.copy(tcp("s", 98, ACK).bare());
    two.differ(Unlike::Beginning);
    let mut two = Two::new();
    two.copy(tcp("s", 98, ACK).bare());
    two.guest(&[tcp("s", 99, ACK).bare()]);
    two.differ(Unlike::Beginning);
}

#[test]
fn a_connection_may_begin_anew_when_nothing_is_waited_for() {
    let anew = [tcp("s", 7, Some(3_000_000_000)).bare(), tcp("", 8, Some(3_000_000_001)).with("a")];
    for copy_first in [false, true] {
        let mut two = Two::begun();
        if copy_first {
            two.copy(anew[0].clone());
            two.guest(&anew);
        } else {
            two.guest(&anew);
            // These are of the connection before, of which nothing is known any more.
            two.copy(at(100).bare());
            two.copy(tcp("r", 100, None).bare());
            two.copy(anew[0].clone());
        }
        two.let_out(&anew[..1]);
        two.copy(anew[1].clone());
        two.let_out(&anew[1..]);
    }
    let mut two = Two::begun();
    two.guest(&[at(100).with("abc"), anew[0].clone()]);
    two.differ(Unlike::Beginning);
}

#[test]
fn old_words_after_a_new_beginning_of_the_copy_are_a_difference() {
    let mut two = Two::begun();
    two.copy(tcp("s", 7, ACK).bare());
    two.guest(&[at(100).bare()]);
    two.differ(Unlike::Beginning);
    two.checkpoint();
    assert_eq!(two.0.released().len(), 1);
    two.guest(&[at(100).with("abc")]);
    two.copy(at(100).with("abc"));
    two.let_out(&[at(100).with("abc")]);
}

#[test]
fn what_no_window_can_hold_is_a_difference() {
    let mut two = Two::begun();
    two.guest(&[at(100 + (1 << 31)).with("abc")]);
    two.differ(Unlike::Distance(100 + (1 << 31)));
}

#[test]
fn a_connection_need_not_be_seen_from_its_beginning() {
    let mut two = Two::new();
    two.guest(&[at(100).with("abc")]);
    two.copy(at(97).with("xyza"));
    two.let_out(&[]);
    two.copy(at(101).with("bc"));
    two.let_out(&[at(100).with("abc")]);
}

#[test]
fn connections_are_compared_apart() {
    let mut two = Two::new();
    let [one, other] = [at(100).with("abc"), at(100).to(1).with("xyz")];
    two.guest(&[one.clone(), other.clone()]);
    two.copy(other.clone());
    two.let_out(&[other]);
    two.copy(one.clone());
    two.let_out(&[one]);
}

#[test]
fn after_a_checkpoint_the_copy_knows_what_the_guest_had_said() {
    let mut two = Two::begun();
    let before = [at(100).with("abc"), tcp("", 103, Some(600)).bare()];
    two.guest(&before);
    two.copy(at(100).with("abcd"));
    two.let_out(&before[..1]);
    let boundary = two.0.boundary();
    let after = [tcp("", 100, Some(600)).with("abc"), at(103).with("x")];
    two.guest(&after);
    // The copy that was.
    two.copy(tcp("", 103, Some(700)).with("x"));
    two.let_out(&[]);
    two.0.complete(NOW, boundary);
    two.let_out(&[before[1].clone(), after[0].clone()]);
    two.copy(at(103).with("x"));
    two.let_out(&after[1..]);
}

#[test]
fn what_was_never_compared_belongs_to_a_checkpoint_too() {
    let mut two = Two::begun();
    two.guest(&[at(100).with("abc")]);
    two.copy(at(100).with("xxx"));
    let anew = [tcp("s", 7, Some(9)).bare(), tcp("", 8, Some(9)).with("abc")];
    two.guest(&anew);
    two.checkpoint();
    assert_eq!(two.0.released().len(), 3);
    let after = [tcp("", 9, Some(9)).with("bc"), tcp("", 11, Some(9)).with("d")];
    two.guest(&after);
    two.let_out(&after[..1]);
    two.copy(tcp("", 11, Some(9)).with("d"));
    two.let_out(&after[1..]);
}
