//! Connections that have to say what they are before they are anything: at a destination that waits
//! for its source to come back.

use std::os::fd::BorrowedFd;
use std::time::{Duration, Instant};

use super::{Channel, Listener};
use crate::error::Error;
use crate::worker::Cancel;

/// A visitor that has not said what it is within this time leaves.
const INTRODUCTION: Duration = Duration::from_secs(5);

/// How often a visitor that has said a part of it is listened to again.
const LOOK: Duration = Duration::from_millis(1);

/// What a visitor turned out to be, by its first bytes.
pub(crate) enum Judged<T> {
    /// It has not said enough.
    NotYet {
        /// But something.
        partly: bool,
    },
    /// This, and it is let in.
    LetIn(T),
    /// Nobody who is waited for.
    Refused(Error),
}

impl Listener {
    /// Waits for the first visitor that `judge` lets in; `None` when one of `wake` can be read
    /// before. Visitors that are not heard out by then are left to whoever waits next.
    pub(crate) fn next_visitor<T>(
        &self,
        judge: &mut dyn FnMut(&mut Channel) -> Judged<T>,
        wake: &[BorrowedFd<'_>],
        cancel: &Cancel,
    ) -> Result<Option<(Channel, T)>, Error> {
        let mut waiting = self.take_waiting();
        let outcome = loop {
            if let Err(error) = waiting.admit(self, "visiting", cancel) {
                break Err(error);
            }
            let (mut let_in, mut partly) = (None, false);
            for (mut channel, since) in waiting.take_all() {
                // It may have been taken in by a wait that has ended since.
                channel.heed(cancel.clone());
                let judged = match &let_in {
                    None => judge(&mut channel),
                    Some(_) => Judged::NotYet { partly: false },
                };
                match judged {
                    Judged::LetIn(what) => let_in = Some((channel, what)),
                    Judged::Refused(reason) => self.refuse(&reason),
                    Judged::NotYet { partly: part } => {
                        if since.elapsed() < INTRODUCTION {
                            partly |= part;
                            waiting.keep(channel, since);
                        }
                    }
                }
            }
            if let_in.is_some() {
                break Ok(let_in);
            }
            if cancel.wait_any(wake, Duration::ZERO).is_ok_and(|woken| woken.is_ready()) {
                break Ok(None);
            }
            // For the rest of what has come in part `poll` does not wait.
            let look = partly.then_some(LOOK);
            match waiting.wait_or(self, wake, look.or(waiting.until_introduced()), cancel) {
                Ok(()) => {}
                Err(error) => break Err(error),
            }
        };
        self.leave_waiting(waiting);
        outcome
    }
}

impl super::waiting::Waiting {
    /// How long it is until the oldest visitor has to have said what it is.
    fn until_introduced(&self) -> Option<Duration> {
        let oldest: Option<Instant> = self.oldest();
        oldest.map(|since| INTRODUCTION.saturating_sub(since.elapsed()))
    }
}
