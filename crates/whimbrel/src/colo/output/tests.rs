//! A stream that both send, however each of them cuts and repeats it.

use std::collections::VecDeque;
use std::time::Duration;

use proptest::prelude::*;

use super::compare::{Comparer, Difference};
use super::packets::tcp;

const NOW: Duration = Duration::from_secs(1);

/// The sequence number of the first byte, near the end of the numbers.
const FIRST: u32 = u32::MAX - 100;

/// What a client has sent before the first byte.
const CLIENT: u32 = u32::MAX - 50;

/// A packet by its place in the stream, and what the client has been told by then.
#[derive(Clone, Copy, Debug)]
struct Sent {
    from: usize,
    to: usize,
    acknowledges: usize,
    again: bool,
}

/// How a side goes on: with so many bytes, from a place of what was said, acknowledging more.
type Step = (usize, Option<prop::sample::Index>, usize);

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = (
        1..60_usize,
        proptest::option::weighted(0.3, any::<prop::sample::Index>()),
        prop_oneof![Just(0), 0..100_usize],
    );
    proptest::collection::vec(step, 1..40)
}

/// What a side sends of `len` bytes and a FIN after it has said and acknowledged so much; in the end
/// it has acknowledged `received`.
fn sent(
    steps: &[Step],
    len: usize,
    received: usize,
    (mut said, mut acknowledges): (usize, usize),
) -> VecDeque<Sent> {
    let mut all = VecDeque::new();
    for &(step, again, more) in steps.iter().cycle().take(500) {
        acknowledges = received.min(acknowledges + more);
        let from = again.map_or(said, |at| at.index(said + 1));
        let to = (from + step).min(len);
        all.push_back(Sent { from, to, acknowledges, again: to <= said && from < to });
        said = said.max(to);
        if said == len {
            break;
        }
    }
    all.push_back(Sent { from: said, to: len, acknowledges, again: false });
    all.push_back(Sent { from: len, to: len + 1, acknowledges: received, again: false });
    all
}

fn packet(stream: &[u8], sent: &Sent) -> Vec<u8> {
    let number = |first: u32, at: usize| first.wrapping_add(u32::try_from(at).expect("short"));
    let (last, flags) = match sent.to > stream.len() {
        true => (stream.len(), "f"),
        false => (sent.to, ""),
    };
    tcp(flags, number(FIRST, sent.from), Some(number(CLIENT, sent.acknowledges)))
        .with(&stream[sent.from..last])
}

/// The comparer with what the copy has said and acknowledged, by a table.
struct World {
    comparer: Comparer,
    said: Vec<bool>,
    acknowledged: Option<usize>,
    /// What has not left, in order.
    held: Vec<(Sent, Vec<u8>)>,
    /// How far what has left goes.
    left: usize,
    /// What the guest has said and acknowledged.
    guest: (usize, usize),
}

impl World {
    fn new(len: usize) -> World {
        World {
            comparer: Comparer::new(Duration::from_secs(3)),
            said: vec![false; len + 1],
            acknowledged: None,
            held: Vec::new(),
            left: 0,
            guest: (0, 0),
        }
    }

    fn guest(&mut self, stream: &[u8], sent: Sent) -> Result<(), TestCaseError> {
        let packet = packet(stream, &sent);
        self.guest = (self.guest.0.max(sent.to), sent.acknowledges);
        self.held.push((sent, packet.clone()));
        self.comparer.primary(NOW, packet);
        self.look()
    }

    fn copy(&mut self, stream: &[u8], sent: Sent) -> Result<(), TestCaseError> {
        self.said[sent.from..sent.to].fill(true);
        self.acknowledged = self.acknowledged.max(Some(sent.acknowledges));
        self.comparer.copy(NOW, &packet(stream, &sent));
        self.look()
    }

    /// What has left was said by the copy, and leaves in order but for what is said again.
    fn look(&mut self) -> Result<(), TestCaseError> {
        for packet in self.comparer.released() {
            let place = self.held.iter().position(|(_, held)| *held == packet);
            let place = place.ok_or_else(|| TestCaseError::fail("it was never sent"))?;
            let (sent, _) = self.held.remove(place);
            prop_assert!(place == 0 || sent.again, "{:?} overtakes", sent);
            prop_assert!(self.said[sent.from..sent.to].iter().all(|&said| said), "{:?}", sent);
            self.left = self.left.max(sent.to);
            prop_assert!(self.acknowledged >= Some(sent.acknowledges), "{:?}", sent);
        }
        Ok(())
    }
}

/// Has both speak, in turns by `turns`, until both have said everything; `copied` is the copy's
/// version of the stream.
fn play(
    stream: &[u8],
    copied: &[u8],
    received: usize,
    (guest, copy): (&[Step], &[Step]),
    turns: &[bool],
) -> Result<World, TestCaseError> {
    let mut world = World::new(stream.len());
    let mut guest = sent(guest, stream.len(), received, (0, 0));
    let mut copy = sent(copy, stream.len(), received, (0, 0));
    for &turn in turns.iter().cycle() {
        if turn {
            guest.pop_front().map_or(Ok(()), |sent| world.guest(stream, sent))?;
        } else {
            copy.pop_front().map_or(Ok(()), |sent| world.copy(copied, sent))?;
        }
        if guest.is_empty() && copy.is_empty() {
            break;
        }
    }
    Ok(world)
}

fn turns() -> impl Strategy<Value = Vec<bool>> {
    proptest::collection::vec(any::<bool>(), 2..80).prop_map(|mut turns| {
        turns.extend([true, false]);
        turns
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    #[test]
    fn everything_that_both_say_leaves(
        stream in proptest::collection::vec(any::<u8>(), 0..1000),
        received in 0..500_usize,
        (guest, copy) in (steps(), steps()),
        turns in turns(),
    ) {
        let mut world = play(&stream, &stream, received, (&guest, &copy), &turns)?;
        prop_assert!(world.held.is_empty(), "{:?} are held", world.held);
        prop_assert_eq!(world.comparer.differs(NOW + Duration::from_secs(9)), None);
        prop_assert_eq!(world.comparer.let_all_go(), Vec::<Vec<u8>>::new());
    }

    #[test]
    fn nothing_leaves_from_a_byte_on_that_differs(
        stream in proptest::collection::vec(any::<u8>(), 1..1000),
        received in 0..500_usize,
        (guest, copy) in (steps(), steps()),
        turns in turns(),
        flipped in any::<prop::sample::Index>(),
        bit in 0..8_u8,
        by_checkpoint in any::<bool>(),
    ) {
        let at = flipped.index(stream.len());
        let mut copied = stream.clone();
        copied[at] ^= 1_u8 << bit;
        let mut world = play(&stream, &copied, received, (&guest, &copy), &turns)?;
        prop_assert!(world.left <= at, "{} of {} have left", world.left, at);
        let difference = world.comparer.differs(NOW);
        prop_assert!(matches!(difference, Some(Difference::Unlike(..))), "{:?}", difference);
        let left_at_last = if by_checkpoint {
            let boundary = world.comparer.boundary();
            world.comparer.complete(NOW, boundary);
            world.comparer.released()
        } else {
            world.comparer.let_all_go()
        };
        let held: Vec<_> = world.held.iter().map(|(_, packet)| packet.clone()).collect();
        prop_assert_eq!(left_at_last, held);
        prop_assert_eq!(world.comparer.differs(NOW), None);
    }

    #[test]
    fn a_checkpoint_sets_the_copy_where_the_guest_is(
        stream in proptest::collection::vec(any::<u8>(), 1..1000),
        received in 0..500_usize,
        (guest, copy, copy_anew) in (steps(), steps(), steps()),
        turns in turns(),
        flipped in proptest::option::of(any::<prop::sample::Index>()),
        (before, meanwhile) in (0..60_usize, 0..40_usize),
    ) {
        let mut copied = stream.clone();
        if let Some(flipped) = flipped {
            *flipped.get_mut(&mut copied[..]) ^= 1;
        }
        let len = stream.len();
        let mut world = World::new(len);
        let mut guest = sent(&guest, len, received, (0, 0));
        let mut copy = sent(&copy, len, received, (0, 0));
        for &turn in turns.iter().cycle().take(before) {
            if turn {
                guest.pop_front().map_or(Ok(()), |sent| world.guest(&stream, sent))?;
            } else {
                copy.pop_front().map_or(Ok(()), |sent| world.copy(&copied, sent))?;
            }
        }
        let boundary = world.comparer.boundary();
        let (said, acknowledged) = world.guest;
        for sent in guest.drain(..meanwhile.min(guest.len())) {
            world.guest(&stream, sent)?;
        }
        // From here on the copy has said what the guest had at the boundary, and nothing else.
        world.said.fill(false);
        world.said[..said].fill(true);
        world.acknowledged = Some(acknowledged);
        world.comparer.complete(NOW, boundary);
        world.look()?;
        let mut copy = sent(&copy_anew, len, received, (said.min(len), acknowledged));
        for &turn in turns.iter().cycle() {
            if turn {
                guest.pop_front().map_or(Ok(()), |sent| world.guest(&stream, sent))?;
            } else {
                copy.pop_front().map_or(Ok(()), |sent| world.copy(&stream, sent))?;
            }
            if guest.is_empty() && copy.is_empty() {
                break;
            }
        }
        prop_assert!(world.held.is_empty(), "{:?} are held", world.held);
        prop_assert_eq!(world.comparer.differs(NOW), None);
    }

    #[test]
    fn no_packets_are_too_much(
        packets in proptest::collection::vec(
            (
                any::<bool>(),
                prop_oneof![Just(""), Just("s"), Just("f"), Just("r"), Just("sf"), Just("sr")],
                prop_oneof![0..20_u32, any::<u32>()],
                proptest::option::of(prop_oneof![0..20_u32, any::<u32>()]),
                0..12_usize,
            ),
            0..60,
        ),
        checkpoints in proptest::collection::vec(any::<prop::sample::Index>(), 0..6),
    ) {
        let mut comparer = Comparer::new(Duration::from_secs(3));
        let (mut sent, mut left, mut open) = (Vec::new(), Vec::new(), None);
        let checkpoints: Vec<_> = checkpoints.iter().map(|at| at.index(61)).collect();
        for (turn, (is_guest, flags, sequence, acknowledges, len)) in packets.iter().enumerate() {
            let packet = tcp(flags, *sequence, *acknowledges).with(&[7; 12][..*len]);
            if *is_guest {
                sent.push(packet.clone());
                comparer.primary(NOW, packet);
            } else {
                comparer.copy(NOW, &packet);
            }
            if checkpoints.contains(&turn) {
                match open.take() {
                    None => open = Some(comparer.boundary()),
                    Some(boundary) => comparer.complete(NOW, boundary),
                }
            }
            left.extend(comparer.released());
        }
        left.extend(comparer.let_all_go());
        left.sort();
        sent.sort();
        prop_assert_eq!(left, sent, "nothing is lost, and nothing invented");
    }
}
