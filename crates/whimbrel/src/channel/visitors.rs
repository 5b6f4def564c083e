//! Connections that have to say what they are before they are anything: at a destination that waits
//! for its source to come back.

use std::os::fd::BorrowedFd;
use std::time::{Duration, Instant};

use rustix::io::Errno;

use super::{Channel, Listener};
use crate::error::Error;
use crate::worker::{Cancel, Woken};

/// A visitor that has not said what it is within this time leaves.
const INTRODUCTION: Duration = Duration::from_secs(5);

/// How often a visitor that has said a part of it is listened to again.
const LOOK: Duration = Duration::from_millis(1);

/// How long it is before visitors are taken in again, when the system lacks what that needs.
const PAUSE: Duration = Duration::from_millis(100);

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
            let lacks = match waiting.admit(self, "visiting", cancel) {
                Ok(_) => false,
                Err(error) if passes(&error) => {
                    self.refuse(&error);
                    true
                }
                Err(error) => break Err(error),
            };
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
            if lacks {
                // Without looking at the listener, where somebody waits all the time.
                match cancel.wait_any(wake, PAUSE).map_err(Error::system("waiting for visitors")) {
                    Ok(Woken::Cancelled) => break Err(Error::Cancelled),
                    Ok(Woken::Ready | Woken::TimedOut) => continue,
                    Err(error) => break Err(error),
                }
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

/// Whether a visitor could not be taken in for want of something that may be there a moment later.
/// One that has gone meanwhile is no error: see [`accept_now`](Listener::accept_now).
fn passes(error: &Error) -> bool {
    let Error::Open { source, .. } = error else { return false };
    let lacking = [Errno::MFILE, Errno::NFILE, Errno::NOBUFS, Errno::NOMEM];
    Errno::from_io_error(source).is_some_and(|errno| lacking.contains(&errno))
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
    use std::fs::File;
    use std::io::Write;
    use std::os::fd::{AsFd, AsRawFd};
    use std::os::unix::net::UnixStream;
    use std::process::Command;

    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

    use super::*;
    use crate::address::Address;
    use crate::worker::Bell;

    /// Lets in whoever has said something.
    fn one_word(channel: &mut Channel) -> Judged<()> {
        match channel.receive_all_until(&mut [0], Instant::now(), "its first word") {
            Ok(()) => Judged::LetIn(()),
            Err(reason) => Judged::Refused(reason),
        }
    }

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
        // Whoever is not let in at once is not at all.
        let now = Bell::new().unwrap();
        now.ring();
        let came = listener.next_visitor(&mut one_word, &[now.as_fd()], &door).unwrap();
        assert!(came.is_some(), "{}", listener.last_refusal());
    }
    /// In a process of its own, which has no descriptor left until the visitor has been refused once.
    #[test]
    fn a_visitor_that_no_descriptor_was_left_for_is_heard_later() {
        const ALONE: &str = "WHIMBREL_NO_DESCRIPTOR_LEFT";
        if std::env::var_os(ALONE).is_none() {
            let name = "channel::visitors::tests::\
                        a_visitor_that_no_descriptor_was_left_for_is_heard_later";
            let mut alone = Command::new(std::env::current_exe().unwrap());
            let output = alone.args(["--exact", name]).env(ALONE, "1").output().unwrap();
            let said = String::from_utf8_lossy(&output.stdout);
            assert!(output.status.success() && said.contains("1 passed"), "{said}");
            return;
        }
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("door");
        let (cancel, never) = (Cancel::new().unwrap(), Bell::new().unwrap());
        let usual = getrlimit(Resource::Nofile);
        let told = move |_: &Error| setrlimit(Resource::Nofile, usual).unwrap();
        let listener = Listener::bind(&Address::Unix(path.clone()), &cancel).unwrap().telling(told);
        let mut back = UnixStream::connect(&path).unwrap();
        back.write_all(b"!").unwrap();
        let next = File::open("/dev/null").unwrap().as_raw_fd();
        let none = Rlimit { current: Some(u64::try_from(next).unwrap()), ..usual };
        setrlimit(Resource::Nofile, none).unwrap();
        let came = listener.next_visitor(&mut one_word, &[never.as_fd()], &cancel).unwrap();
        assert!(came.is_some());
        assert!(listener.last_refusal().contains("Too many open files"));
    }
}
