//! Connections that have come and are not known yet: their handshakes go on side by side, and none
//! delays another.

use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use super::{Channel, Listener};
use crate::error::Error;
use crate::worker::{Cancel, Woken};

/// How many there may be; the oldest go first.
const WAITING_MAX: usize = 64;

/// Connections, in the order in which they came.
#[derive(Debug, Default)]
pub(super) struct Waiting(Vec<Channel>);

impl Waiting {
    /// Takes in those that have come meanwhile; says whether any has.
    pub(super) fn admit(
        &mut self,
        listener: &Listener,
        name: &'static str,
        cancel: &Cancel,
    ) -> Result<bool, Error> {
        let mut any = false;
        while let Some(channel) = listener.accept_now(name, cancel)? {
            if self.0.len() == WAITING_MAX {
                self.0.remove(0);
            }
            self.0.push(channel);
            any = true;
            if listener.as_fd().is_none() {
                break; // Of what is not listened to there is one.
            }
        }
        Ok(any)
    }

    /// Goes on with all handshakes, and takes out the first connection whose peer has shown who it
    /// is, or need not. Whoever shows the wrong thing is turned away.
    pub(super) fn next_known(&mut self, listener: &Listener) -> Option<Channel> {
        let mut known = None;
        for mut channel in std::mem::take(&mut self.0) {
            match (&known, channel.handshake()) {
                (None, Ok(None)) => known = Some(channel),
                (_, Ok(_)) => self.0.push(channel),
                (_, Err(reason)) => listener.refuse(&reason),
            }
        }
        known
    }

    /// Keeps a connection of which nothing is known yet.
    pub(super) fn keep(&mut self, channel: Channel) {
        self.0.push(channel);
    }

    /// Takes them all out.
    pub(super) fn take_all(&mut self) -> Vec<Channel> {
        std::mem::take(&mut self.0)
    }

    /// Waits until one of them, or another one, may have something to say, or a handshake has
    /// lasted too long; for `timeout` at most.
    ///
    /// A handshake of this side's writes little, and into an empty socket: it never waits for that.
    pub(super) fn wait(
        &self,
        listener: &Listener,
        timeout: Option<Duration>,
        cancel: &Cancel,
    ) -> Result<Woken, Error> {
        let now = Instant::now();
        let handshakes = self.0.iter().filter_map(Channel::handshake_deadline).min();
        let handshakes = handshakes.map(|deadline| deadline.saturating_duration_since(now));
        let first = [timeout, handshakes].into_iter().flatten().min().unwrap_or(Duration::MAX);
        let mut fds: Vec<_> = self.0.iter().map(AsFd::as_fd).collect();
        fds.extend(listener.as_fd());
        match cancel.wait_any(&fds, first).map_err(Error::system("waiting for connections"))? {
            Woken::Cancelled => Err(Error::Cancelled),
            // A handshake's time is over: that is its affair.
            Woken::TimedOut if timeout.is_none_or(|timeout| first < timeout) => Ok(Woken::Ready),
            woken => Ok(woken),
        }
    }
}
