//! One of the guest's TCP connections, and the service on it.
//!
//! As little of TCP as the service needs: segments that come out of order are not kept, what is not
//! acknowledged in time is all sent again.

use super::frames::{Peer, Segment};
use crate::net::chain;

/// A request of the service's.
const REQUEST: usize = 8;
/// An answer.
const ANSWER: usize = 16;
/// Room for answers that are not acknowledged.
const ROOM: usize = 64 * ANSWER;

/// How many bytes of RAM one takes.
pub(super) const BYTES: usize = 80 + ROOM;

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum State {
    #[default]
    Free,
    /// It has been asked for, and that has been granted.
    Opening,
    Open,
    /// The other side says no more; it ends when all answers have been acknowledged.
    Ending,
}

/// A connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Connection {
    state: State,
    peer: Peer,
    /// The oldest number that is not acknowledged, and the next that is sent.
    unacknowledged: u32,
    next: u32,
    /// The number that is to come next.
    awaited: u32,
    window: u16,
    answered: u64,
    chain: u64,
    /// A request of which a part has come.
    part: Vec<u8>,
    /// Answers from `unacknowledged` on.
    answers: Vec<u8>,
}

impl Default for Connection {
    fn default() -> Connection {
        Connection {
            state: State::Free,
            peer: Peer::default(),
            unacknowledged: 0,
            next: 0,
            awaited: 0,
            window: 0,
            answered: 0,
            chain: 0,
            part: Vec::new(),
            answers: Vec::new(),
        }
    }
}

/// What is said on a connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Say {
    pub(super) seq: u32,
    pub(super) ack: u32,
    pub(super) syn: bool,
    pub(super) fin: bool,
    pub(super) window: u16,
    pub(super) payload: Vec<u8>,
}

impl Connection {
    /// One that `segment` asks for, whose numbers begin with `first`.
    pub(super) fn open(peer: Peer, first: u32, segment: &Segment<'_>) -> Connection {
        Connection {
            state: State::Opening,
            peer,
            unacknowledged: first,
            next: first,
            awaited: segment.seq.wrapping_add(1),
            window: segment.window,
            ..Connection::default()
        }
    }

    pub(super) fn is_open(&self) -> bool {
        self.state != State::Free
    }

    pub(super) fn peer(&self) -> Peer {
        self.peer
    }

    /// The oldest number that is waited for to be acknowledged.
    pub(super) fn unacknowledged(&self) -> Option<u32> {
        (self.is_open() && self.next != self.unacknowledged).then_some(self.unacknowledged)
    }

    /// Takes a segment in; gives what has to be said at once.
    pub(super) fn receive(&mut self, segment: &Segment<'_>) -> Vec<Say> {
        if segment.rst {
            if segment.seq == self.awaited {
                *self = Connection::default();
            }
            return Vec::new();
        }
        if segment.syn {
            if self.state == State::Opening {
                // It has not been heard: said once more.
                self.next = self.unacknowledged;
                return Vec::new();
            }
            return vec![self.say()];
        }
        let Some(ack) = segment.ack else { return Vec::new() };
        self.window = segment.window;
        self.acknowledge(ack);
        let mut says = Vec::new();
        if self.is_open() && (!segment.payload.is_empty() || segment.fin) {
            self.take(segment);
            says.push(self.say());
        }
        says
    }

    fn acknowledge(&mut self, ack: u32) {
        let acknowledged = ack.wrapping_sub(self.unacknowledged);
        if acknowledged == 0 || acknowledged > self.sayable() {
            return; // Nothing new, or of what was never said.
        }
        if self.state == State::Opening {
            // A SYN has a number.
            self.state = State::Open;
            (self.unacknowledged, self.next) = (ack, ack);
            return;
        }
        let answers = (acknowledged as usize).min(self.answers.len());
        self.answers.drain(..answers);
        if self.next.wrapping_sub(self.unacknowledged) < acknowledged {
            // Of what was to be sent again.
            self.next = ack;
        }
        self.unacknowledged = ack;
        if acknowledged as usize > answers {
            *self = Connection::default(); // Also of the end.
        }
    }

    /// How many numbers there are from `unacknowledged` on.
    fn sayable(&self) -> u32 {
        let answers = u32::try_from(self.answers.len()).expect("no more than there is room for");
        match self.state {
            State::Free => 0,
            State::Opening => 1,
            State::Open => answers,
            State::Ending => answers + 1,
        }
    }

    /// Takes what a segment says, as far as it is what is awaited and there is room for its answers.
    fn take(&mut self, segment: &Segment<'_>) {
        if self.state != State::Open {
            return;
        }
        let known = self.awaited.wrapping_sub(segment.seq) as usize;
        let Some(fresh) = segment.payload.get(known..) else { return };
        let taken = &fresh[..fresh.len().min(self.room())];
        for &byte in taken {
            self.part.push(byte);
            if let Ok(request) = <[u8; REQUEST]>::try_from(&self.part[..]) {
                self.part.clear();
                self.answer(u64::from_le_bytes(request));
            }
        }
        let count = u32::try_from(taken.len()).expect("no more than a frame");
        self.awaited = self.awaited.wrapping_add(count);
        if segment.fin && taken.len() == fresh.len() {
            self.awaited = self.awaited.wrapping_add(1);
            self.state = State::Ending;
        }
    }

    fn answer(&mut self, request: u64) {
        self.answered += 1;
        self.chain = chain(self.chain, request);
        self.answers.extend(self.answered.to_le_bytes());
        self.answers.extend(self.chain.to_le_bytes());
    }

    /// How many bytes of requests there is room for the answers of.
    fn room(&self) -> usize {
        let free = (ROOM - self.answers.len()) / ANSWER;
        (free * REQUEST).saturating_sub(self.part.len())
    }

    /// Sends what can be sent now.
    pub(super) fn send(&mut self, says: &mut Vec<Say>) {
        if self.state == State::Opening {
            if self.next == self.unacknowledged {
                says.push(Say { syn: true, ..self.say() });
                self.next = self.next.wrapping_add(1);
            }
            return;
        }
        let sent = self.next.wrapping_sub(self.unacknowledged) as usize;
        let may = self.answers.len().min(usize::from(self.window));
        if self.is_open() && sent < may {
            let payload = self.answers[sent..may].to_vec();
            // It acknowledges as well: nothing has to that says nothing else.
            says.retain(|say| !say.payload.is_empty());
            says.push(Say { payload, ..self.say() });
            let count = u32::try_from(may - sent).expect("no more than there is room for");
            self.next = self.next.wrapping_add(count);
        }
        let sent = self.next.wrapping_sub(self.unacknowledged) as usize;
        if self.state == State::Ending && sent == self.answers.len() {
            says.push(Say { fin: true, ..self.say() });
            self.next = self.next.wrapping_add(1);
        }
    }

    /// Sends again all that is not acknowledged.
    pub(super) fn send_again(&mut self, says: &mut Vec<Say>) {
        self.next = self.unacknowledged;
        self.send(says);
    }

    fn say(&self) -> Say {
        Say {
            seq: self.next,
            ack: self.awaited,
            syn: false,
            fin: false,
            window: u16::try_from(self.room()).expect("no more than there is room for"),
            payload: Vec::new(),
        }
    }

    /// Writes it down.
    pub(super) fn write(&self, out: &mut Vec<u8>) {
        let begun = out.len();
        let state = match self.state {
            State::Free => 0u8,
            State::Opening => 1,
            State::Open => 2,
            State::Ending => 3,
        };
        let lens = [self.part.len(), self.answers.len() / ANSWER, self.answers.len() % ANSWER];
        out.push(state);
        out.extend(lens.map(|len| u8::try_from(len).expect("there is no room for more")));
        out.extend(self.peer.ip);
        out.extend(self.peer.mac);
        out.extend(self.peer.port.to_le_bytes());
        out.extend([self.unacknowledged, self.next, self.awaited].map(u32::to_le_bytes).concat());
        out.extend(u64::from(self.window).to_le_bytes());
        out.extend(self.answered.to_le_bytes());
        out.extend(self.chain.to_le_bytes());
        out.extend(&self.part);
        out.resize(begun + BYTES - ROOM, 0);
        out.extend(&self.answers);
        out.resize(begun + BYTES, 0);
    }

    /// Reads what was written. Whatever lies there makes a connection, be it a strange one.
    pub(super) fn read(bytes: &[u8]) -> Connection {
        let (head, room) = bytes.split_at(BYTES - ROOM);
        let word = |at: usize| {
            u32::from_le_bytes(head[at..at + 4].try_into().expect("4 bytes of a connection"))
        };
        let long = |at: usize| u64::from(word(at)) | u64::from(word(at + 4)) << 32;
        let state = match head[0] {
            1 => State::Opening,
            2 => State::Open,
            3 => State::Ending,
            _ => return Connection::default(),
        };
        let part = usize::from(head[1]).min(REQUEST - 1);
        let answers = (usize::from(head[2]) * ANSWER + usize::from(head[3])).min(ROOM);
        let mut peer = Peer::default();
        peer.ip.copy_from_slice(&head[4..8]);
        peer.mac.copy_from_slice(&head[8..14]);
        peer.port = u16::from_le_bytes([head[14], head[15]]);
        Connection {
            state,
            peer,
            unacknowledged: word(16),
            next: word(20),
            awaited: word(24),
            window: u16::try_from(long(28)).unwrap_or(u16::MAX),
            answered: long(36),
            chain: long(44),
            part: head[52..52 + part].to_vec(),
            answers: room[..answers].to_vec(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn segment(seq: u32, ack: u32, payload: &[u8]) -> Segment<'_> {
        Segment { seq, ack: Some(ack), syn: false, fin: false, rst: false, window: 4096, payload }
    }

    fn said(connection: &mut Connection, segment: &Segment<'_>) -> Vec<Say> {
        let mut says = connection.receive(segment);
        connection.send(&mut says);
        // It is the same wherever the guest goes.
        let mut bytes = Vec::new();
        connection.write(&mut bytes);
        assert_eq!(Connection::read(&bytes), *connection);
        says
    }

    fn opened() -> Connection {
        let asks = Segment { ack: None, syn: true, ..segment(99, 0, &[]) };
        let mut connection = Connection::open(Peer::default(), 1000, &asks);
        let mut says = Vec::new();
        connection.send(&mut says);
        assert!(says.len() == 1 && says[0].syn && says[0].seq == 1000 && says[0].ack == 100);
        assert_eq!(said(&mut connection, &segment(100, 1001, &[])), []);
        connection
    }

    #[test]
    fn requests_are_answered_however_they_are_cut() {
        let requests: Vec<u8> = (0..4u64).flat_map(u64::to_le_bytes).collect();
        for cut in 1..requests.len() {
            let mut connection = opened();
            let mut answers = Vec::new();
            let mut at = 100;
            for piece in requests.chunks(cut) {
                for say in said(&mut connection, &segment(at, 1001, piece)) {
                    answers.extend(say.payload);
                }
                at += u32::try_from(piece.len()).unwrap();
            }
            let mut expected = (Vec::new(), 0);
            for request in 0..4u64 {
                expected.1 = chain(expected.1, request);
                expected.0.extend((request + 1).to_le_bytes());
                expected.0.extend(expected.1.to_le_bytes());
            }
            assert_eq!(answers, expected.0, "{cut}");
        }
    }

    #[test]
    fn what_comes_again_or_out_of_order_is_not_answered_twice() {
        let mut connection = opened();
        let first = said(&mut connection, &segment(100, 1001, &[1; 8]));
        assert_eq!(first[0].payload.len(), 16);
        let again = said(&mut connection, &segment(100, 1001, &[1; 8]));
        assert!(again.len() == 1 && again[0].payload.is_empty() && again[0].ack == 108);
        let later = said(&mut connection, &segment(116, 1001, &[1; 8]));
        assert!(later.len() == 1 && later[0].ack == 108, "{later:?}");
        let overlapping = said(&mut connection, &segment(100, 1017, &[1; 16]));
        assert!(overlapping[0].payload.len() == 16 && overlapping[0].ack == 116);
    }

    #[test]
    fn no_more_is_taken_than_can_be_answered() {
        let mut connection = opened();
        let says = said(&mut connection, &segment(100, 1001, &[1; 65 * 8]));
        assert_eq!(says.iter().map(|say| say.payload.len()).sum::<usize>(), ROOM);
        assert_eq!((says[0].ack, says[0].window), (100 + 64 * 8, 0));
        let says = said(&mut connection, &segment(100 + 512, 1001 + 32, &[1; 8]));
        assert_eq!(says[0].payload.len(), 16);
    }

    #[test]
    fn what_is_not_acknowledged_is_said_again_and_the_end_too() {
        let mut connection = opened();
        said(&mut connection, &segment(100, 1001, &[1; 8]));
        let mut again = Vec::new();
        connection.send_again(&mut again);
        assert!(again[0].seq == 1001 && again[0].payload.len() == 16);
        // What was to be sent again is acknowledged late.
        connection.next = connection.unacknowledged;
        assert_eq!(said(&mut connection, &segment(108, 1017, &[])), []);
        assert_eq!(connection.unacknowledged(), None);
        let ends = Segment { fin: true, ..segment(108, 1017, &[]) };
        let says = said(&mut connection, &ends);
        assert!(says.iter().any(|say| say.fin && say.seq == 1017 && say.ack == 109), "{says:?}");
        let mut again = Vec::new();
        connection.send_again(&mut again);
        assert!(again.len() == 1 && again[0].fin);
        said(&mut connection, &segment(109, 1018, &[]));
        assert!(!connection.is_open());
    }

    #[test]
    fn a_reset_ends_it_if_it_is_the_peers() {
        let mut connection = opened();
        let reset = Segment { rst: true, ..segment(7, 0, &[]) };
        said(&mut connection, &reset);
        assert!(connection.is_open(), "of another time");
        said(&mut connection, &Segment { seq: 100, ..reset });
        assert!(!connection.is_open());
    }
}
