//! One direction of a TCP connection, compared by what it says and not by how it is cut.
//!
//! A packet of the guest's may leave when the copy has said all that it says, byte by byte and at
//! the same sequence numbers, and has acknowledged as much: else a client would be told that
//! something was received of which a copy that takes over knows nothing.

use std::collections::VecDeque;
use std::ops::Range;
use std::time::Duration;

use super::compare::Unlike;
use super::flow::Segment;
use super::stream::{Kind, Side, Stream};

/// No window of TCP's is larger: what is said farther away is of no connection that goes on.
const WINDOW_MOST: u32 = 1 << 30;

/// The position of the first sequence number seen. What lies before it has positions as well.
const START: u64 = 1 << 32;

/// About what a waiting packet takes here.
const WAITING: usize = 64;

#[derive(Debug, Default)]
pub(super) struct Conversation {
    stream: Stream,
    /// The farthest end of what was said: sequence numbers are turned into positions by it.
    end: Option<(u32, u64)>,
    /// Where the connection began, if that was seen, and who has said so.
    syn: Option<u32>,
    begun: Sides,
    /// The guest's packets that may not leave yet, in its order.
    waiting: VecDeque<Waiting>,
    /// What was acknowledged.
    guest: Option<u32>,
    copy: Option<u32>,
    reset_by_guest: bool,
    reset_by_copy: Option<Duration>,
    /// Nothing leaves, and nothing is heard, until a checkpoint has made the two one again.
    differs: bool,
}

#[derive(Clone, Copy, Debug, Default)]
struct Sides {
    guest: bool,
    copy: bool,
}

#[derive(Debug)]
struct Waiting {
    id: u64,
    range: Range<u64>,
    acknowledges: Option<u32>,
    rst: bool,
}

impl Conversation {
    /// The guest has sent a packet. True when it was taken in; false when the two differ already,
    /// so that it can only wait for a checkpoint.
    pub(super) fn guest(
        &mut self,
        now: Duration,
        id: u64,
        segment: &Segment<'_>,
    ) -> Result<bool, Unlike> {
        if self.differs {
            return Ok(false);
        }
        let range = self.hear(now, Side::Guest, segment)?;
        let rst = segment.rst;
        let acknowledges = segment.acknowledges.filter(|_| !rst);
        match rst {
            true => self.reset_by_guest = true,
            false => self.guest = later(self.guest, acknowledges),
        }
        self.waiting.push_back(Waiting { id, range, acknowledges, rst });
        Ok(true)
    }

    /// The copy has sent a packet.
    pub(super) fn copy(&mut self, now: Duration, segment: &Segment<'_>) -> Result<(), Unlike> {
        if self.differs || (self.syn.is_some() && !self.begun.copy && !segment.syn) {
            // The latter is of a connection before this one.
            return Ok(());
        }
        let first = segment.syn && !self.begun.copy;
        self.hear(now, Side::Copy, segment)?;
        match (segment.rst, first) {
            (true, _) => self.reset_by_copy = self.reset_by_copy.or(Some(now)),
            (false, true) => self.copy = segment.acknowledges,
            (false, false) => self.copy = later(self.copy, segment.acknowledges),
        }
        Ok(())
    }

    /// Whether the segment says only what both have said before: the client may not have got it,
    /// and waits for it, whatever of the guest's else is held.
    pub(super) fn is_repeated(&self, segment: &Segment<'_>) -> bool {
        let begun = self.syn.is_none() || self.begun.guest;
        let same_start = !segment.syn || self.syn == Some(segment.sequence);
        !self.differs
            && !segment.rst
            && segment.len() > 0
            && begun
            && same_start
            && self.acknowledged(segment.acknowledges)
            && self.place(segment).is_some_and(|range| self.stream.is_agreed(&range))
    }

    /// Which of the guest's packets may leave now.
    pub(super) fn leave(&mut self, leaving: &mut Vec<u64>) {
        while let Some(first) = self.waiting.front()
            && !self.differs
            && self.stream.is_agreed(&first.range)
            && self.acknowledged(first.acknowledges)
            && (!first.rst || self.reset_by_copy.is_some())
        {
            leaving.push(first.id);
            self.waiting.pop_front();
        }
    }

    /// The copy is where the guest is.
    pub(super) fn restart(&mut self) {
        if self.syn.is_some() && !self.begun.guest {
            // Only the copy knew of it.
            *self = Conversation::default();
            return;
        }
        self.stream.restart();
        *self = Conversation {
            stream: std::mem::take(&mut self.stream),
            end: self.end,
            syn: self.syn,
            begun: Sides { guest: true, copy: true },
            guest: self.guest,
            copy: self.guest,
            ..Conversation::default()
        };
    }

    /// After a restart: what the guest had said before it without being compared.
    pub(super) fn pass(&mut self, segment: &Segment<'_>) {
        if segment.rst {
            return;
        }
        if segment.len() > 0 {
            let goes_on = !segment.syn || self.syn == Some(segment.sequence);
            let range = self.place(segment).filter(|_| goes_on).or_else(|| {
                let syn = segment.syn.then_some(segment.sequence);
                let begun = Sides { guest: true, copy: true };
                *self = Conversation { syn, begun, ..Conversation::default() };
                self.place(segment)
            });
            let Some(range) = range else { return };
            self.reach(segment, &range);
            self.stream.mark(range);
        }
        self.guest = later(self.guest, segment.acknowledges);
        self.copy = self.guest;
    }

    /// Whether nothing is waited for, so that it can be forgotten.
    pub(super) fn is_settled(&self) -> bool {
        self.waiting.is_empty()
            && self.stream.is_settled()
            && !self.differs
            && (self.reset_by_guest || self.reset_by_copy.is_none())
    }

    /// Since when the copy has waited for the guest to say what it has said. What it has
    /// acknowledged is no part of that: nobody was told.
    pub(super) fn ahead(&self) -> Option<Duration> {
        let reset = self.reset_by_copy.filter(|_| !self.reset_by_guest);
        [self.stream.ahead(), reset].into_iter().flatten().min()
    }

    /// What it takes of memory, about.
    pub(super) fn cost(&self) -> usize {
        self.stream.cost() + self.waiting.len() * WAITING
    }

    fn hear(
        &mut self,
        now: Duration,
        side: Side,
        segment: &Segment<'_>,
    ) -> Result<Range<u64>, Unlike> {
        let heard = self.begin(side, segment).and_then(|()| self.say(now, side, segment));
        self.differs |= heard.is_err();
        heard
    }

    fn begin(&mut self, side: Side, segment: &Segment<'_>) -> Result<(), Unlike> {
        match (segment.syn, self.syn) {
            // It goes on, and it has to have begun: as far as anybody has seen its beginning.
            (false, None) => return Ok(()),
            (false, Some(_)) if *self.begun(side) => return Ok(()),
            (false, Some(_)) => return Err(Unlike::Beginning),
            (true, Some(syn)) if syn == segment.sequence => {}
            (true, _) if self.is_settled() => {
                *self = Conversation { syn: Some(segment.sequence), ..Conversation::default() };
            }
            (true, _) => return Err(Unlike::Beginning),
        }
        *self.begun(side) = true;
        Ok(())
    }

    fn begun(&mut self, side: Side) -> &mut bool {
        match side {
            Side::Guest => &mut self.begun.guest,
            Side::Copy => &mut self.begun.copy,
        }
    }

    fn say(
        &mut self,
        now: Duration,
        side: Side,
        segment: &Segment<'_>,
    ) -> Result<Range<u64>, Unlike> {
        if segment.len() == 0 {
            return Ok(0..0);
        }
        let range = self.place(segment).ok_or(Unlike::Distance(segment.sequence))?;
        self.reach(segment, &range);
        let mut at = range.start;
        let (syn, fin): (&[u8], &[u8]) =
            (&[0][..usize::from(segment.syn)], &[0][..usize::from(segment.fin)]);
        for (kind, words) in [(Kind::Syn, syn), (Kind::Byte, segment.payload), (Kind::Fin, fin)] {
            self.stream.say(now, side, at, kind, words).map_err(|position| {
                let offset = u32::try_from(position - range.start).unwrap_or(u32::MAX);
                Unlike::Bytes(segment.sequence.wrapping_add(offset))
            })?;
            at += words.len() as u64;
        }
        Ok(range)
    }

    /// The positions of what a segment says; `None` where it cannot be of this connection.
    fn place(&self, segment: &Segment<'_>) -> Option<Range<u64>> {
        let (sequence, position) = self.end.unwrap_or((segment.sequence, START));
        let distance = segment.sequence.wrapping_sub(sequence).cast_signed();
        if distance.unsigned_abs() > WINDOW_MOST {
            return None;
        }
        let start = position.checked_add_signed(distance.into())?;
        Some(start..start.checked_add(segment.len() as u64)?)
    }

    fn reach(&mut self, segment: &Segment<'_>, range: &Range<u64>) {
        if self.end.is_none_or(|(_, position)| range.end > position) {
            // A packet is shorter than 4 GiB.
            let len = u32::try_from(segment.len()).unwrap_or(u32::MAX);
            self.end = Some((segment.sequence.wrapping_add(len), range.end));
        }
    }

    fn acknowledged(&self, number: Option<u32>) -> bool {
        later(self.copy, number) == self.copy
    }
}

/// The later of two sequence numbers, as TCP reckons.
fn later(one: Option<u32>, other: Option<u32>) -> Option<u32> {
    match (one, other) {
        (Some(one), Some(other)) if other.wrapping_sub(one).cast_signed() > 0 => Some(other),
        (one, other) => one.or(other),
    }
}

#[cfg(test)]
mod tests;
