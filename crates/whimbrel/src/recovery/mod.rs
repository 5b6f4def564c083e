//! A migration whose link broke in postcopy, and how it goes on.
//!
//! Neither side has the whole guest then, and both keep what they have: the source's RAM, which
//! nobody writes any more, and the destination's, whose guest runs until it touches what is
//! missing. To go on the source connects anew, the destination says which pages it has
//! ([`exchange`]), and only the others are sent again.
//!
//! Who may go on is decided by [`proofs`] and [`admission`] between two whimbrels; a QEMU proves nothing, and so is
//! waited for only where somebody says so ([`way_on`]). When to try is
//! [`plan::Retry`](crate::plan::Retry)'s to say. The source's part is `source/recover.rs`, the
//! destination's `destination/recover.rs` and `destination/door.rs`.

mod admission;
pub(crate) mod exchange;
pub(crate) mod proofs;
#[cfg(test)]
mod simulation;
mod way_on;

use std::time::{Duration, Instant};

pub(crate) use admission::Admission;
pub(crate) use way_on::WayOn;

use crate::settings::{AutoRecover, Parameters};
use crate::worker::Links;

/// How long the other side of a recovery may take to say its part, which is a round trip and no
/// more.
pub(crate) const ANSWER: Duration = Duration::from_secs(5);

/// The PING that only asks whether the other side is there.
pub(crate) const PING_BEAT: u32 = 0x5748_4254;

/// How long a peer may be silent, if it may not be for ever.
pub(crate) fn silence(parameters: &Parameters) -> Option<Duration> {
    (parameters.silence_limit > 0).then(|| Duration::from_millis(parameters.silence_limit))
}

/// How often something has to be said for the other side to know that one is there.
pub(crate) fn beat(parameters: &Parameters) -> Option<Duration> {
    silence(parameters).map(|limit| limit / 4)
}

/// Whether a migration that is paused may go on without anybody saying so. `proves` is whether each
/// side can show the other who it is.
pub(crate) fn is_automatic(links: &Links, parameters: &Parameters, proves: bool) -> bool {
    !links.are_held()
        && match parameters.auto_recover {
            AutoRecover::Auto => proves,
            AutoRecover::On => true,
            AutoRecover::Off => false,
        }
}

/// When it is time again to say that one is there.
#[derive(Debug)]
pub(crate) struct Beat {
    every: Option<Duration>,
    last: Instant,
}

impl Beat {
    /// `every` so often, from now on; `None` is never.
    pub(crate) fn new(every: Option<Duration>) -> Beat {
        Beat { every, last: Instant::now() }
    }

    /// Whether it is time; then the next time is that much later.
    pub(crate) fn is_due(&mut self) -> bool {
        let due = self.every.is_some_and(|every| self.last.elapsed() >= every);
        if due {
            self.last = Instant::now();
        }
        due
    }

    /// How long it is until then.
    pub(crate) fn wait(&self) -> Option<Duration> {
        self.every.map(|every| every.saturating_sub(self.last.elapsed()))
    }
}
