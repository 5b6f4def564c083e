//! Holds what a guest sends to the world until its copy has said the same.
//!
//! What has left cannot be taken back, so nothing leaves of which a copy that takes over would not
//! know: either the copy has said it too, or it is older than a checkpoint that is complete. Where
//! the two differ, or one of them is silent for too long, a checkpoint makes them one again.
//!
//! From the boundary of a checkpoint, where the guest stands still, until it is complete nothing is
//! compared. The copy that will be begins at the boundary and has said nothing yet, and whatever is
//! still heard is of the copy that was.

use std::collections::BTreeMap;
use std::time::Duration;

use super::connections::{Connections, Heard};
use super::flow::{Flow, Packet, Said};

/// How much is held, and kept to compare, before a checkpoint is asked for.
const BYTES_MOST: usize = 64 << 20;

/// Connections that are known at a time.
const CONNECTIONS_MOST: usize = 4096;

/// About what a held packet takes beside its bytes.
const HELD: usize = 160;

#[derive(Debug)]
pub(crate) struct Comparer {
    timeout: Duration,
    bytes_most: usize,
    connections: Connections,
    /// The guest's packets that have not left, in its order.
    held: BTreeMap<u64, Held>,
    held_bytes: usize,
    /// The number of the guest's next packet.
    next: u64,
    released: Vec<Vec<u8>>,
    /// A checkpoint of the guest up to this packet is on its way.
    open: Option<u64>,
    /// The first one since the last checkpoint.
    difference: Option<Difference>,
    /// There is no room to compare: what comes is held for the next checkpoint.
    full: bool,
}

#[derive(Debug)]
struct Held {
    packet: Vec<u8>,
    flow: Flow,
    since: Duration,
    /// Its connection knows of it.
    taken: bool,
}

/// Where in what the guest sends a checkpoint is.
#[derive(Debug)]
#[must_use = "what is held before it may leave when the checkpoint is complete"]
pub(crate) struct Boundary(u64);

/// Why a checkpoint is to be taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Difference {
    #[error("the guest and its copy differ: {1} ({0})")]
    Unlike(Flow, Unlike),
    #[error("the copy has not said for too long what the guest has ({0})")]
    GuestAlone(Flow),
    #[error("the guest has not said for too long what its copy has ({0})")]
    CopyAlone(Flow),
    #[error("{0} bytes wait to be compared, which is too much")]
    Bytes(usize),
    #[error("too many connections wait to be compared")]
    Connections,
}

/// How what two say is not the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Unlike {
    #[error("bytes at sequence number {0}")]
    Bytes(u32),
    #[error("the sequence number at which the connection begins")]
    Beginning,
    #[error("sequence number {0} is out of every window")]
    Distance(u32),
    #[error("a datagram")]
    Datagram,
}

impl Comparer {
    /// One that has a checkpoint taken when one of the two waits longer than `timeout`.
    pub(crate) fn new(timeout: Duration) -> Comparer {
        Comparer::with_limits(timeout, BYTES_MOST, CONNECTIONS_MOST)
    }

    fn with_limits(timeout: Duration, bytes_most: usize, connections_most: usize) -> Comparer {
        Comparer {
            timeout,
            bytes_most,
            connections: Connections::new(connections_most),
            held: BTreeMap::new(),
            held_bytes: 0,
            next: 0,
            released: Vec::new(),
            open: None,
            difference: None,
            full: false,
        }
    }

    /// The primary's guest sends a packet: it is held until the copy has said the same, or until a
    /// checkpoint of the guest after it is complete.
    pub(crate) fn primary(&mut self, now: Duration, packet: Vec<u8>) {
        let compared = Packet::of(&packet);
        if self.connections.is_repeated(&compared) {
            self.released.push(packet);
            return;
        }
        let id = self.next;
        self.next += 1;
        let flow = compared.flow;
        let mut leaving = Vec::new();
        let taken = self.compares() && {
            let heard = self.connections.guest(now, id, &compared, &mut leaving);
            let heard = heard.unwrap_or_else(|unlike| {
                self.differ(Difference::Unlike(flow, unlike));
                Heard::Untaken
            });
            if heard == Heard::TooMany {
                self.fill(Difference::Connections);
            }
            heard == Heard::Taken
        };
        self.held_bytes += packet.len() + HELD;
        self.held.insert(id, Held { packet, flow, since: now, taken });
        self.let_go(leaving);
        self.look_at_room();
    }

    /// The secondary's copy sends a packet.
    pub(crate) fn copy(&mut self, now: Duration, packet: &[u8]) {
        if !self.compares() {
            return;
        }
        let packet = Packet::of(packet);
        let mut leaving = Vec::new();
        match self.connections.copy(now, &packet, &mut leaving) {
            Ok(true) => {}
            Ok(false) => self.fill(Difference::Connections),
            Err(unlike) => self.differ(Difference::Unlike(packet.flow, unlike)),
        }
        self.let_go(leaving);
        self.look_at_room();
    }

    /// The packets that may leave since this was asked for last: of each connection in the order in
    /// which the guest has sent them, but for what it repeats.
    pub(crate) fn released(&mut self) -> Vec<Vec<u8>> {
        std::mem::take(&mut self.released)
    }

    /// Why a checkpoint is to be taken now, if one is. Not while one is on its way.
    pub(crate) fn differs(&self, now: Duration) -> Option<Difference> {
        if self.open.is_some() {
            return None;
        }
        let late = |since: Duration| now >= since.saturating_add(self.timeout);
        let guest = || self.held.values().next().filter(|held| late(held.since));
        let copy = || self.connections.ahead().filter(|&(since, _)| late(since));
        self.difference
            .or_else(|| guest().map(|held| Difference::GuestAlone(held.flow)))
            .or_else(|| copy().map(|(_, flow)| Difference::CopyAlone(flow)))
    }

    /// In what time to ask [`differs`](Self::differs) again at the latest; `None` as long as no
    /// packet comes.
    pub(crate) fn wait(&self, now: Duration) -> Option<Duration> {
        if self.open.is_some() {
            return None;
        }
        if self.difference.is_some() {
            return Some(Duration::ZERO);
        }
        let guest = self.held.values().next().map(|held| held.since);
        let copy = self.connections.ahead().map(|(since, _)| since);
        let since = [guest, copy].into_iter().flatten().min()?;
        Some(since.saturating_add(self.timeout).saturating_sub(now))
    }

    /// The guest stands still for a checkpoint, and its copy already did: everything so far belongs
    /// to the checkpoint.
    pub(crate) fn boundary(&mut self) -> Boundary {
        self.open = Some(self.next);
        Boundary(self.next)
    }

    /// A checkpoint is complete at the secondary, whose copy goes on from there: what was held
    /// before it may leave, and what the copy has said before is void.
    pub(crate) fn complete(&mut self, now: Duration, boundary: Boundary) {
        if self.open.is_none() {
            // Everything was let go in the meantime.
            return;
        }
        assert_eq!(self.open, Some(boundary.0), "one checkpoint at a time");
        self.open = None;
        self.difference = None;
        self.full = false;
        self.connections.restart();
        self.held_bytes = 0;
        let after = self.held.split_off(&boundary.0);
        for Held { packet, taken, .. } in std::mem::take(&mut self.held).into_values() {
            if !taken && let Packet { flow, said: Said::Segment(segment) } = Packet::of(&packet) {
                self.connections.pass(flow, &segment);
            }
            self.released.push(packet);
        }
        for held in after.into_values() {
            self.primary(now, held.packet);
        }
    }

    /// The secondary is gone: everything may leave, in the order in which the guest has sent it.
    pub(crate) fn let_all_go(&mut self) -> Vec<Vec<u8>> {
        let empty = Comparer::with_limits(self.timeout, self.bytes_most, self.connections.most());
        let Comparer { mut released, held, .. } = std::mem::replace(self, empty);
        released.extend(held.into_values().map(|held| held.packet));
        released
    }

    /// What is held and kept to be compared takes of memory, about.
    pub(crate) fn held_bytes(&self) -> usize {
        self.held_bytes + self.connections.cost()
    }

    fn compares(&self) -> bool {
        self.open.is_none() && !self.full
    }

    fn let_go(&mut self, leaving: Vec<u64>) {
        for id in leaving {
            if let Some(held) = self.held.remove(&id) {
                self.held_bytes -= held.packet.len() + HELD;
                self.released.push(held.packet);
            }
        }
    }

    fn look_at_room(&mut self) {
        if self.compares() && self.held_bytes() > self.bytes_most {
            self.fill(Difference::Bytes(self.held_bytes()));
        }
    }

    fn fill(&mut self, difference: Difference) {
        self.full = true;
        self.differ(difference);
    }

    fn differ(&mut self, difference: Difference) {
        self.difference.get_or_insert(difference);
    }
}

#[cfg(test)]
mod tests;
