//! Connections that lose, delay and change what is said on them.
//!
//! What is written arrives in its order and in pieces of any size. When a connection breaks, a part
//! of what was on its way still arrives, and each end notices some time later, or never.

use std::collections::VecDeque;
use std::time::Duration;

use super::dice::Dice;
use super::world::Actor;

/// A connection, by its number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct Line(pub(super) usize);

/// Who connected, and who was connected to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum End {
    Source,
    Destination,
}

impl End {
    pub(super) const BOTH: [End; 2] = [End::Source, End::Destination];

    pub(super) fn other(self) -> End {
        match self {
            End::Source => End::Destination,
            End::Destination => End::Source,
        }
    }

    fn index(self) -> usize {
        match self {
            End::Source => 0,
            End::Destination => 1,
        }
    }
}

/// Who is at the ends of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Between {
    /// The two sides of the migration.
    Sides,
    /// A stranger has connected to the destination.
    Stranger,
    /// The same, with a hello of the source's that never got where it should have.
    Thief,
    /// The source has connected to somebody else.
    Impostor,
}

/// The end of a connection has come: nothing can be read or written any more.
#[derive(Debug)]
pub(super) struct Broken;

#[derive(Debug, Default)]
struct Pipe {
    flying: VecDeque<(Duration, Vec<u8>)>,
    here: Vec<u8>,
    taken: usize,
    /// When the last piece arrives.
    last: Duration,
    written: usize,
    /// What is written is lost.
    lost: bool,
}

#[derive(Debug)]
struct Connection {
    between: Between,
    /// Towards each end.
    pipes: [Pipe; 2],
    /// The end knows that it is over.
    over: [bool; 2],
    /// The end has closed it.
    closed: [bool; 2],
    /// Who is told that something has come.
    reader: [Option<Actor>; 2],
}

/// All connections there ever were.
#[derive(Debug, Default)]
pub(super) struct Net {
    lines: Vec<Connection>,
    pub(super) latency: Duration,
    /// The connection that was made last is cut after so many bytes more.
    pub(super) cut_after: Option<usize>,
    /// So many pieces more, and one of the words of an exchange is changed.
    pub(super) flip_after: Option<u64>,
}

/// What writing has led to.
#[derive(Debug, Default)]
pub(super) struct Written {
    /// Pieces arrive at these times.
    pub(super) arrivals: Vec<Duration>,
    /// The connection has broken while it was written to.
    pub(super) cut: bool,
}

impl Net {
    pub(super) fn new(latency: Duration) -> Net {
        Net { latency, ..Net::default() }
    }

    pub(super) fn connect(&mut self, between: Between) -> Line {
        self.lines.push(Connection {
            between,
            pipes: Default::default(),
            over: [false; 2],
            closed: [false; 2],
            reader: [None; 2],
        });
        Line(self.lines.len() - 1)
    }

    pub(super) fn between(&self, line: Line) -> Between {
        self.lines[line.0].between
    }

    pub(super) fn set_reader(&mut self, line: Line, end: End, reader: Actor) {
        self.lines[line.0].reader[end.index()] = Some(reader);
    }

    pub(super) fn reader(&self, line: Line, end: End) -> Option<Actor> {
        self.lines[line.0].reader[end.index()]
    }

    /// All that somebody may still say something on.
    pub(super) fn alive(&self) -> Vec<Line> {
        let lines = self.lines.iter().enumerate();
        let alive = lines.filter(|(_, line)| line.pipes.iter().any(|pipe| !pipe.lost));
        alive.map(|(number, _)| Line(number)).collect()
    }

    /// `end` writes: accepted, wherever it goes.
    pub(super) fn write(
        &mut self,
        (line, end): (Line, End),
        bytes: &[u8],
        now: Duration,
        dice: &mut Dice,
    ) -> Result<Written, Broken> {
        let (latency, connection) = (self.latency, &mut self.lines[line.0]);
        if connection.over[end.index()] || connection.closed[end.index()] {
            return Err(Broken);
        }
        let pipe = &mut connection.pipes[end.other().index()];
        pipe.written += bytes.len();
        let mut written = Written::default();
        if pipe.lost {
            return Ok(written);
        }
        let mut left = bytes;
        if let Some(after) = &mut self.cut_after {
            match after.checked_sub(bytes.len()) {
                Some(more) => *after = more,
                None => {
                    left = &bytes[..*after];
                    self.cut_after = None;
                    written.cut = true;
                }
            }
        }
        while !left.is_empty() {
            let len = if dice.percent(20) { 1 + dice.index(left.len()) } else { left.len() };
            let (piece, rest) = left.split_at(len);
            let at = now + latency + dice.within(latency / 4);
            pipe.last = pipe.last.max(at);
            pipe.flying.push_back((pipe.last, piece.to_vec()));
            written.arrivals.push(pipe.last);
            left = rest;
        }
        Ok(written)
    }

    /// How many bytes `end` has ever written.
    pub(super) fn written(&self, line: Line, end: End) -> usize {
        self.lines[line.0].pipes[end.other().index()].written
    }

    /// Pieces that are on their way to `end`.
    pub(super) fn flying(&self, line: Line, end: End) -> usize {
        self.lines[line.0].pipes[end.index()].flying.len()
    }

    /// What is due at `end` is there.
    pub(super) fn arrive(&mut self, line: Line, end: End, now: Duration) {
        let pipe = &mut self.lines[line.0].pipes[end.index()];
        if pipe.taken == pipe.here.len() {
            pipe.here.clear();
            pipe.taken = 0;
        }
        while pipe.flying.front().is_some_and(|(at, _)| *at <= now) {
            let piece = pipe.flying.pop_front().map(|(_, piece)| piece);
            pipe.here.extend_from_slice(&piece.unwrap_or_default());
        }
    }

    /// What has come and was not taken yet.
    pub(super) fn here(&self, line: Line, end: End) -> &[u8] {
        let pipe = &self.lines[line.0].pipes[end.index()];
        &pipe.here[pipe.taken..]
    }

    pub(super) fn take(&mut self, line: Line, end: End, bytes: usize) {
        self.lines[line.0].pipes[end.index()].taken += bytes;
    }

    /// Whether an end knows that the connection is over.
    pub(super) fn is_over(&self, line: Line, end: End) -> bool {
        let line = &self.lines[line.0];
        line.over[end.index()] || line.closed[end.index()]
    }

    /// An end learns that the connection is over.
    pub(super) fn end(&mut self, line: Line, end: End) {
        self.lines[line.0].over[end.index()] = true;
    }

    /// An end closes it. Gives when the other one learns of it, if it does.
    pub(super) fn close(&mut self, line: Line, end: End, now: Duration) -> Option<Duration> {
        let (latency, connection) = (self.latency, &mut self.lines[line.0]);
        if std::mem::replace(&mut connection.closed[end.index()], true) {
            return None;
        }
        connection.pipes[end.index()].lost = true;
        let pipe = &mut connection.pipes[end.other().index()];
        if std::mem::replace(&mut pipe.lost, true) {
            return None;
        }
        pipe.last = pipe.last.max(now + latency);
        Some(pipe.last)
    }

    /// It breaks: of what is on its way some arrives.
    pub(super) fn cut(&mut self, line: Line, dice: &mut Dice) {
        for pipe in &mut self.lines[line.0].pipes {
            pipe.lost = true;
            let keep = dice.index(pipe.flying.len() + 1);
            pipe.flying.truncate(keep);
            if let Some((_, piece)) = pipe.flying.back_mut() {
                piece.truncate(dice.index(piece.len() + 1));
            }
        }
    }
}
