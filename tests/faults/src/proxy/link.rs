//! One connection: two directions, each with bytes that have been taken and not yet been given.

use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, Shutdown, recv, send, shutdown};

use crate::plan::{Channel, Direction};

/// Bytes taken at a time.
const TAKEN: usize = 64 << 10;
/// The same where bytes are counted out.
const TAKEN_SLOWLY: usize = 4 << 10;
/// How much of its beginning is remembered, to be said again.
const FIRST: usize = 4 << 10;

/// Until when nothing moves.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Until {
    Time(Instant),
    Forever,
}

/// Bytes a second, until then.
#[derive(Clone, Copy, Debug)]
pub(super) struct Throttle {
    pub(super) rate: u64,
    pub(super) until: Instant,
}

/// One direction.
#[derive(Debug, Default)]
pub(super) struct Pipe {
    held: Vec<u8>,
    /// How much of `held` has gone.
    gone: usize,
    /// Bytes forwarded, those of earlier connections of the channel included.
    pub(super) passed: u64,
    /// The sender is done.
    ended: bool,
    /// The receiver was told so.
    told: bool,
    /// What still comes is thrown away.
    deaf: bool,
    pub(super) silent: Option<Until>,
    pub(super) throttle: Option<Throttle>,
    /// Not before then, by the throttle.
    next: Option<Instant>,
    /// Bits of the next byte to be changed.
    pub(super) flips: Vec<usize>,
}

/// What came of moving bytes once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Moved {
    /// There may be more.
    Some,
    /// The descriptors have to be waited for, or time.
    Nothing,
    /// The receiver or the sender is gone without a word.
    Broken,
}

/// A connection and the one it is forwarded to.
#[derive(Debug)]
pub(super) struct Link {
    pub(super) channel: Channel,
    pub(super) near: OwnedFd,
    /// Not yet connected: it waits for others to go first.
    pub(super) far: Option<OwnedFd>,
    /// Forth and back.
    pub(super) pipes: [Pipe; 2],
    /// What the source said first.
    pub(super) first: Vec<u8>,
    /// It is being closed, gently: what comes is thrown away until then.
    pub(super) closing: Option<Instant>,
    pub(super) broken: bool,
}

impl Link {
    pub(super) fn new(channel: Channel, near: OwnedFd, passed: [u64; 2]) -> Link {
        let pipes = passed.map(|passed| Pipe { passed, ..Pipe::default() });
        Link { channel, near, far: None, pipes, first: Vec::new(), closing: None, broken: false }
    }

    pub(super) fn is_over(&self, now: Instant) -> bool {
        let done = self.pipes.iter().all(|pipe| pipe.told && pipe.ended);
        self.broken || done || self.closing.is_some_and(|until| until <= now)
    }

    fn ends(&self, direction: Direction) -> Option<(&OwnedFd, &OwnedFd)> {
        let far = self.far.as_ref()?;
        Some(match direction {
            Direction::Forth => (&self.near, far),
            Direction::Back => (far, &self.near),
        })
    }

    /// What has to be waited for in a direction: to take, or to give.
    pub(super) fn wants(&self, direction: Direction, now: Instant) -> Option<(&OwnedFd, bool)> {
        let pipe = &self.pipes[direction as usize];
        let (from, to) = self.ends(direction)?;
        if self.closing.is_none() && pipe.is_held_up(now) {
            return None;
        }
        match pipe.left() {
            0 if pipe.ended => None,
            0 => Some((from, false)),
            _ => Some((to, true)),
        }
    }

    /// Takes bytes if none are held; says whether there are new ones.
    pub(super) fn take(&mut self, direction: Direction) -> Result<bool, Moved> {
        let pipe = &self.pipes[direction as usize];
        if pipe.ended || pipe.left() > 0 {
            return Ok(false);
        }
        let size = if pipe.throttle.is_some() { TAKEN_SLOWLY } else { TAKEN };
        let mut buffer = std::mem::take(&mut self.pipes[direction as usize].held);
        buffer.resize(size, 0);
        let taken = match self.ends(direction) {
            Some((from, _)) => recv(from, buffer.as_mut_slice(), RecvFlags::empty()),
            None => Err(Errno::AGAIN),
        };
        let pipe = &mut self.pipes[direction as usize];
        pipe.gone = 0;
        buffer.truncate(taken.as_ref().map_or(0, |(count, _)| *count));
        pipe.held = buffer;
        match taken {
            Ok((0, _)) => {
                pipe.ended = true;
                Ok(false)
            }
            Ok(_) if pipe.deaf => {
                pipe.held.clear();
                Err(Moved::Some)
            }
            Ok(_) => {
                if direction == Direction::Forth && self.first.len() < FIRST {
                    let room = FIRST - self.first.len();
                    self.first.extend(pipe.held.iter().take(room));
                }
                Ok(true)
            }
            Err(Errno::AGAIN | Errno::INTR) => Err(Moved::Nothing),
            Err(_) => Err(Moved::Broken),
        }
    }

    /// Gives held bytes, `most` of them at most.
    pub(super) fn give(&mut self, direction: Direction, most: u64, now: Instant) -> Moved {
        let pipe = &self.pipes[direction as usize];
        let mut count = pipe.left().min(usize::try_from(most).unwrap_or(usize::MAX));
        if pipe.throttle.is_some() {
            count = count.min(TAKEN_SLOWLY);
        }
        let Some((_, to)) = self.ends(direction) else { return Moved::Nothing };
        let bytes = &pipe.held[pipe.gone..pipe.gone + count];
        // A receiver that is gone is no reason for a signal.
        match send(to, bytes, SendFlags::NOSIGNAL) {
            Ok(sent) => {
                let pipe = &mut self.pipes[direction as usize];
                pipe.gone += sent;
                pipe.passed += sent as u64;
                if let Some(Throttle { rate, .. }) = pipe.throttle {
                    let time = Duration::from_nanos(sent as u64 * 1_000_000_000 / rate.max(1));
                    pipe.next = Some(now + time);
                }
                Moved::Some
            }
            Err(Errno::AGAIN | Errno::INTR) => Moved::Nothing,
            Err(_) => Moved::Broken,
        }
    }

    /// Tells the receiver that the sender is done, once all has been given.
    pub(super) fn tell_end(&mut self, direction: Direction) {
        let pipe = &self.pipes[direction as usize];
        if !pipe.ended || pipe.told || pipe.left() > 0 {
            return;
        }
        if let Some((_, to)) = self.ends(direction) {
            // Gone already is as good.
            let _ = shutdown(to, Shutdown::Write);
            self.pipes[direction as usize].told = true;
        }
    }

    /// The receiver of a direction sees the end; what its sender says from now on is lost.
    pub(super) fn half_close(&mut self, direction: Direction) {
        if let Some((_, to)) = self.ends(direction) {
            let _ = shutdown(to, Shutdown::Write);
            let pipe = &mut self.pipes[direction as usize];
            pipe.told = true;
            pipe.deaf = true;
            pipe.forget();
        }
    }

    /// Both ends see the end of the stream, not a reset, although they may still be sending.
    pub(super) fn close_gently(&mut self, until: Instant) {
        for direction in [Direction::Forth, Direction::Back] {
            self.half_close(direction);
        }
        self.closing = Some(until);
    }
}

impl Pipe {
    /// What has been taken and not been given.
    pub(super) fn held(&self) -> &[u8] {
        &self.held[self.gone..]
    }

    pub(super) fn left(&self) -> usize {
        self.held.len() - self.gone
    }

    fn forget(&mut self) {
        self.held.clear();
        self.gone = 0;
    }

    /// Changes a bit of the next byte to be given.
    pub(super) fn flip(&mut self, bit: usize) {
        if let Some(byte) = self.held.get_mut(self.gone) {
            *byte ^= 1 << (bit % 8);
        }
    }

    pub(super) fn is_held_up(&self, now: Instant) -> bool {
        let throttled = self.throttle.is_some() && self.next.is_some_and(|next| next > now);
        throttled
            || match self.silent {
                None => false,
                Some(Until::Forever) => true,
                Some(Until::Time(until)) => until > now,
            }
    }

    /// Drops what is over, and gives when the next thing is.
    pub(super) fn expire(&mut self, now: Instant) -> Option<Instant> {
        if self.throttle.is_some_and(|throttle| throttle.until <= now) {
            self.throttle = None;
        }
        if self.silent.is_some_and(|silent| silent <= Until::Time(now)) {
            self.silent = None;
        }
        let silent = match self.silent {
            Some(Until::Time(until)) => Some(until),
            _ => None,
        };
        let next = self.throttle.and(self.next).filter(|next| *next > now);
        let throttle = self.throttle.map(|throttle| throttle.until);
        [silent, next, throttle].into_iter().flatten().min()
    }

    pub(super) fn heal(&mut self) {
        self.silent = None;
        self.throttle = None;
    }

    /// Nothing moves until then, or later if that was so already.
    pub(super) fn be_silent(&mut self, until: Until) {
        self.silent = self.silent.max(Some(until));
    }
}
