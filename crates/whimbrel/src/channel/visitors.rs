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

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixStream;

    use super::*;
    use crate::address::Address;
    use crate::worker::Bell;

    /// As a source that is back before its urgent channel was looked for.
    #[test]
    fn a_visitor_that_another_wait_took_in_is_heard_when_that_has_ended() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("door");
        let (session, door) = (Cancel::new().unwrap(), Cancel::new().unwrap());
        let listener = Listener::bind(&Address::Unix(path.clone()), &door).unwrap();
        let _urgent = UnixStream::connect(&path).unwrap();
        let mut back = UnixStream::connect(&path).unwrap();
        back.write_all(b"!").unwrap();
        drop(listener.accept("urgent", &session).unwrap());
        session.set();
        let mut judge = |channel: &mut Channel| match channel.receive_all_until(
            &mut [0],
            Instant::now(),
            "its first word",
        ) {
            Ok(()) => Judged::LetIn(()),
            Err(reason) => Judged::Refused(reason),
        };
        // Whoever is not let in at once is not at all.
        let now = Bell::new().unwrap();
        now.ring();
        let came = listener.next_visitor(&mut judge, &[now.as_fd()], &door).unwrap();
        assert!(came.is_some(), "{}", listener.last_refusal());
    }
}
