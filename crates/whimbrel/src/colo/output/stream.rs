//! What a guest and its copy have said in one direction of a TCP connection, position by position.
//!
//! The map has parts that do not overlap. A part was said by both, and then its bytes are
//! forgotten, or by one of them, and then they wait for the other's. Where both have spoken and
//! said different things nothing is noted: the caller is told, and hears no more.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::time::Duration;

/// About what a part takes beside its bytes: whoever says single bytes far apart is to be counted.
const PART: usize = 128;

/// What was said by both may have so many holes after a checkpoint; what is forgotten beyond has to
/// be said by both once more.
const STRETCHES_KEPT: usize = 8;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Side {
    Guest,
    Copy,
}

/// A SYN and a FIN have a position of their own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Syn,
    Byte,
    Fin,
}

#[derive(Debug)]
enum Part {
    Both { len: u64 },
    One(Words),
}

#[derive(Debug)]
struct Words {
    side: Side,
    since: Duration,
    kind: Kind,
    /// A SYN or FIN is any one byte.
    bytes: Vec<u8>,
}

#[derive(Debug, Default)]
pub(super) struct Stream {
    parts: BTreeMap<u64, Part>,
    /// The parts that only the copy has said, by age.
    ahead: BTreeSet<(Duration, u64)>,
    /// How many parts one has said alone.
    pending: usize,
    bytes: usize,
}

impl Part {
    fn len(&self) -> u64 {
        match self {
            Part::Both { len } => *len,
            Part::One(words) => words.bytes.len() as u64,
        }
    }
}

impl Stream {
    /// `side` says `words` from position `at` on. An error is the first position at which the two
    /// differ, or one differs from itself; everything before it is noted.
    ///
    /// The work is bounded by the words and the two parts in which they begin and end.
    pub(super) fn say(
        &mut self,
        now: Duration,
        side: Side,
        mut at: u64,
        kind: Kind,
        mut words: &[u8],
    ) -> Result<(), u64> {
        while !words.is_empty() {
            let (taken, alike) = match self.part_at(at) {
                None => {
                    let len = self.room(at, words.len());
                    let bytes = words[..len].to_vec();
                    self.put(at, Words { side, since: now, kind, bytes });
                    (len, len)
                }
                // Forgotten, and so not compared again: that who repeats it says the same is TCP.
                Some((start, Part::Both { len })) => {
                    let len = at_most(start + len - at, words.len());
                    (len, len)
                }
                Some((start, Part::One(said))) => {
                    let said_from = &said.bytes[at_most(at - start, said.bytes.len())..];
                    let len = said_from.len().min(words.len());
                    let alike = match said.kind == kind {
                        true => alike(&said_from[..len], &words[..len]),
                        false => 0,
                    };
                    if said.side != side && alike > 0 {
                        self.agree(start, at, alike as u64);
                    }
                    (len, alike)
                }
            };
            if alike < taken {
                return Err(at + alike as u64);
            }
            at += taken as u64;
            words = &words[taken..];
        }
        Ok(())
    }

    /// Whether both have said all of it.
    pub(super) fn is_agreed(&self, range: &Range<u64>) -> bool {
        range.is_empty()
            || matches!(self.part_at(range.start),
                Some((start, Part::Both { len })) if start + len >= range.end)
    }

    /// Whether nothing waits to be said by the other one.
    pub(super) fn is_settled(&self) -> bool {
        self.pending == 0
    }

    /// Since when the copy has waited for the guest to say what it has said.
    pub(super) fn ahead(&self) -> Option<Duration> {
        self.ahead.first().map(|&(since, _)| since)
    }

    /// What it takes of memory, about.
    pub(super) fn cost(&self) -> usize {
        self.bytes + self.parts.len() * PART
    }

    /// The copy is where the guest is: both have said what the guest has, and nothing else.
    pub(super) fn restart(&mut self) {
        let parts = std::mem::take(self).parts;
        for (at, part) in parts {
            match part {
                Part::One(Words { side: Side::Copy, .. }) => {}
                part => self.mark(at..at + part.len()),
            }
        }
        while self.parts.len() > STRETCHES_KEPT {
            self.parts.pop_first();
        }
    }

    /// Notes a range as said by both, where no part of it is waited for.
    pub(super) fn mark(&mut self, range: Range<u64>) {
        let Range { mut start, mut end } = range;
        if start == end {
            return;
        }
        if let Some(&Part::Both { len }) = self.parts.get(&end) {
            self.parts.remove(&end);
            end += len;
        }
        while let Some((&at, &Part::Both { len })) = self.parts.range(..end).next_back()
            && at + len >= start
        {
            self.parts.remove(&at);
            (start, end) = (start.min(at), end.max(at + len));
        }
        self.parts.insert(start, Part::Both { len: end - start });
    }

    fn part_at(&self, at: u64) -> Option<(u64, &Part)> {
        let (&start, part) = self.parts.range(..=at).next_back()?;
        (start + part.len() > at).then_some((start, part))
    }

    /// How much of `len` fits in before the next part.
    fn room(&self, at: u64, len: usize) -> usize {
        match self.parts.range(at..).next() {
            Some((&next, _)) => at_most(next - at, len),
            None => len,
        }
    }

    /// `len` from `at` on, which one has said in the part at `start`, both have said now.
    fn agree(&mut self, start: u64, at: u64, len: u64) {
        let Some(mut words) = self.take(start) else { return };
        let mut said = words.bytes.split_off(at_most(at - start, words.bytes.len()));
        let rest = said.split_off(at_most(len, said.len()));
        let Words { side, since, kind, .. } = words;
        if !words.bytes.is_empty() {
            self.put(start, words);
        }
        if !rest.is_empty() {
            self.put(at + len, Words { side, since, kind, bytes: rest });
        }
        self.mark(at..at + len);
    }

    fn put(&mut self, at: u64, words: Words) {
        self.bytes += words.bytes.len();
        self.pending += 1;
        if words.side == Side::Copy {
            self.ahead.insert((words.since, at));
        }
        self.parts.insert(at, Part::One(words));
    }

    fn take(&mut self, at: u64) -> Option<Words> {
        let Some(Part::One(words)) = self.parts.remove(&at) else { return None };
        self.bytes -= words.bytes.len();
        self.pending -= 1;
        self.ahead.remove(&(words.since, at));
        Some(words)
    }
}

/// How many bytes are the same from the beginning on.
fn alike(one: &[u8], other: &[u8]) -> usize {
    match one == other {
        true => one.len(),
        false => one.iter().zip(other).take_while(|(one, other)| one == other).count(),
    }
}

fn at_most(len: u64, most: usize) -> usize {
    usize::try_from(len).map_or(most, |len| len.min(most))
}

#[cfg(test)]
mod tests;
