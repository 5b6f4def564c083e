//! Connections that have come and are not known yet: their handshakes go on side by side, and none
//! delays another.

use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, Instant};

use super::{Channel, Listener};
use crate::error::Error;
use crate::worker::{Cancel, Woken};

/// How many there may be beside those that are waited for.
const STRANGERS_MAX: usize = 128;

/// A connection that has said nothing for so long may be dropped for another one.
const SILENCE: Duration = Duration::from_secs(1);

/// Connections, in the order in which they came.
#[derive(Debug)]
pub(super) struct Waiting {
    channels: Vec<(Channel, Instant)>,
    most: usize,
}

impl Default for Waiting {
    fn default() -> Waiting {
        Waiting { channels: Vec::new(), most: STRANGERS_MAX }
    }
}

impl Waiting {
    /// With room for `expected` connections that are waited for.
    pub(super) fn with_room_for(self, expected: usize) -> Waiting {
        Waiting { most: expected + STRANGERS_MAX, ..self }
    }

    /// Takes in those that have come meanwhile; says whether any has. What there is no room for stays
    /// in the listener's queue, until whoever was here first has spoken, or been silent too long.
    pub(super) fn admit(
        &mut self,
        listener: &Listener,
        name: &'static str,
        cancel: &Cancel,
    ) -> Result<bool, Error> {
        let mut any = false;
        while self.make_room()
            && let Some(channel) = listener.accept_now(name, cancel)?
        {
            self.channels.push((channel, Instant::now()));
            any = true;
            if listener.as_fd().is_none() {
                break; // Of what is not listened to there is one.
            }
        }
        Ok(any)
    }

    /// Whether another one can be taken in; the oldest goes for it, if it has been silent too long.
    fn make_room(&mut self) -> bool {
        match self.until_room() {
            None => true,
            Some(wait) if wait.is_zero() => {
                self.channels.remove(0);
                true
            }
            Some(_) => false,
        }
    }

    /// How long it is until another one can be taken in, if there is no room now.
    fn until_room(&self) -> Option<Duration> {
        let (_, since) = self.channels.first()?;
        (self.channels.len() >= self.most).then(|| SILENCE.saturating_sub(since.elapsed()))
    }

    /// Goes on with all handshakes, and takes out the first connection whose peer has shown who it
    /// is, or need not. Whoever shows the wrong thing is turned away.
    pub(super) fn next_known(&mut self, listener: &Listener) -> Option<Channel> {
        let mut known = None;
        for (mut channel, since) in std::mem::take(&mut self.channels) {
            match (&known, channel.handshake()) {
                (None, Ok(None)) => known = Some(channel),
                (_, Ok(_)) => self.channels.push((channel, since)),
                (_, Err(reason)) => listener.refuse(&reason),
            }
        }
        known
    }

    /// Keeps one that is known, before all others.
    pub(super) fn keep_known(&mut self, channel: Channel) {
        self.channels.insert(0, (channel, Instant::now()));
    }

    /// Takes them all out, to be looked at.
    pub(super) fn take_all(&mut self) -> Vec<(Channel, Instant)> {
        std::mem::take(&mut self.channels)
    }

    /// Keeps one that was taken out, and of which nothing is known yet.
    pub(super) fn keep(&mut self, channel: Channel, since: Instant) {
        self.channels.push((channel, since));
    }

    /// When the oldest of them came.
    pub(super) fn oldest(&self) -> Option<Instant> {
        self.channels.first().map(|(_, since)| *since)
    }

    /// The same as [`wait`](Waiting::wait), also until one of `wake` can be read, and without saying
    /// what ended it.
    pub(super) fn wait_or(
        &self,
        listener: &Listener,
        wake: &[BorrowedFd<'_>],
        timeout: Option<Duration>,
        cancel: &Cancel,
    ) -> Result<(), Error> {
        self.wait_for(listener, (wake, &[]), timeout, cancel).map(drop)
    }

    /// Waits until one of them, or another one, may have something to say, a handshake has lasted
    /// too long, or one of `arrived` is closed by its peer; for `timeout` at most.
    ///
    /// A handshake of this side's writes little, and into an empty socket: it never waits for that.
    pub(super) fn wait(
        &self,
        listener: &Listener,
        arrived: &[BorrowedFd<'_>],
        timeout: Option<Duration>,
        cancel: &Cancel,
    ) -> Result<Woken, Error> {
        self.wait_for(listener, (&[], arrived), timeout, cancel)
    }

    fn wait_for(
        &self,
        listener: &Listener,
        (wake, arrived): (&[BorrowedFd<'_>], &[BorrowedFd<'_>]),
        timeout: Option<Duration>,
        cancel: &Cancel,
    ) -> Result<Woken, Error> {
        let now = Instant::now();
        let channels = || self.channels.iter().map(|(channel, _)| channel);
        let handshakes = channels().filter_map(Channel::handshake_deadline).min();
        let handshakes = handshakes.map(|deadline| deadline.saturating_duration_since(now));
        let room = self.until_room();
        let first =
            [timeout, handshakes, room].into_iter().flatten().min().unwrap_or(Duration::MAX);
        let mut fds: Vec<_> = channels().map(AsFd::as_fd).chain(wake.iter().copied()).collect();
        fds.extend(listener.as_fd().filter(|_| room.is_none()));
        let woken = cancel.wait_any_or_close(&fds, arrived, first);
        match woken.map_err(Error::system("waiting for connections"))? {
            Woken::Cancelled => Err(Error::Cancelled),
            // A handshake's time is over, or there is room for another one.
            Woken::TimedOut if timeout.is_none_or(|timeout| first < timeout) => Ok(Woken::Ready),
            woken => Ok(woken),
        }
    }
}
