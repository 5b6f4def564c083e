//! Holding a channel of the background to what leaves the link to urgent pages.

use std::os::fd::AsFd;
use std::time::Duration;

use super::wanted::Wanted;
use crate::channel::Channel;
use crate::channel::link::{self, Class, Flow};
use crate::plan::{Outflow, Window};

/// Bytes claimed and sent at once where there is no link to be held to.
const PIECE: usize = 64 << 10;

/// How a channel of the background is held to leave the link's queue to urgent pages.
#[derive(Debug)]
pub(super) struct Held {
    window: Window,
    /// When to decide anew; `None` where there is nothing to decide: no TCP.
    next: Option<Duration>,
    pub(super) piece: usize,
}

impl Held {
    /// Beside an urgent channel, or without one: then what was asked for goes on this channel, too,
    /// behind what is under way on it.
    pub(super) fn new(beside_urgent: bool, channel: &mut Channel) -> Held {
        channel.send_apart();
        if beside_urgent {
            link::classify(channel.as_fd(), Class::Background);
        }
        Held { window: Window::new(), next: Some(Duration::ZERO), piece: PIECE }
    }

    /// Decides anew, where it is time to.
    pub(super) fn look(&mut self, channel: &Channel, wanted: &Wanted, now: Duration) {
        if self.next.is_none_or(|next| now < next) {
            return;
        }
        let Some(facts) = link::facts(channel.as_fd()) else {
            self.next = None;
            return;
        };
        let Outflow { flow, piece, again } = self.window.next(now, &facts, wanted.quiet_for());
        link::hold(channel.as_fd(), flow);
        self.piece = piece;
        self.next = Some(now + again);
    }

    /// Nobody is left to be in the way of.
    pub(super) fn let_go(&mut self, channel: &Channel) {
        if self.next.take().is_some() {
            link::hold(channel.as_fd(), Flow { window: None, rate: None });
        }
    }
}
