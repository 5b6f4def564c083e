//! The thread that looks who comes while a guest's RAM is arriving: `dest/door`.
//!
//! When the link has broken the source comes back, on new connections. A whimbrel shows by its first
//! words that it is the source of this very migration, so it is let in at any time: it knows before
//! this side that the old connections are dead. A QEMU shows nothing: it is waited for only while the
//! migration is paused, and only where somebody has said so.

use std::os::fd::AsFd;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use whimbrel_wire::recovery::{Hello, HelloKind};

use crate::channel::{Channel, Judged, Listener};
use crate::error::Error;
use crate::recovery::proofs::{Proofs, Ticket};
use crate::recovery::{self, Admission, WayOn};
use crate::settings::Current;
use crate::worker::{Bell, Cancel, Links};

/// How often a wait for a channel looks whether it is still wanted.
const LOOK: Duration = Duration::from_millis(20);

/// The first bytes of a QEMU's new main channel: the command RECV_BITMAP.
const RECV_BITMAP: [u8; 3] = [8, 0, 10];

/// What is shared with `dest/main`, and with the threads that wait for their channels.
pub(super) struct Door<'a> {
    proofs: Option<Proofs>,
    links: &'a Links,
    parameters: &'a Current,
    /// `migrate-recover`.
    recover: Option<&'a WayOn<Listener>>,
    /// A QEMU has a channel for urgent pages.
    preempt: bool,
    state: Mutex<State>,
    /// A channel that somebody waits for has come.
    came: Condvar,
    /// For the thread: something has changed.
    look: Bell,
    /// For `dest/main`: the source is back.
    back: Bell,
}

#[derive(Debug)]
struct State {
    listener: Option<Arc<Listener>>,
    /// The first connections are all there: whoever comes now comes back.
    open: bool,
    /// Nothing arrives.
    paused: bool,
    /// Somebody has said where to wait.
    told: bool,
    visitor: Option<(Channel, Visitor)>,
    /// Which whimbrel is let in.
    admission: Admission,
    /// A QEMU's main channel has come: the next one is its urgent channel.
    expects_urgent: bool,
    beside: Vec<(HelloKind, Channel)>,
}

/// Where a source would come back to, and after which try.
#[derive(Debug)]
pub(crate) struct Back {
    listener: Arc<Listener>,
    /// The last try that was let in.
    attempt: u32,
}

impl Back {
    /// Nobody has come back to `listener` yet.
    pub(super) fn to(listener: Arc<Listener>) -> Back {
        Back { listener, attempt: 0 }
    }
}

/// Who has come back.
#[derive(Debug)]
pub(super) enum Visitor {
    /// A whimbrel, with its first words.
    Whimbrel(Hello),
    /// A QEMU.
    Qemu,
}

/// What a connection is.
enum Seen {
    Main(Visitor),
    Beside(HelloKind),
}

impl<'a> Door<'a> {
    pub(super) fn new(
        back: Back,
        recover: Option<&'a WayOn<Listener>>,
        proofs: Option<Proofs>,
        preempt: bool,
        (links, parameters): (&'a Links, &'a Current),
    ) -> Result<Door<'a>, Error> {
        let bell = || Bell::new().map_err(Error::system("making an eventfd"));
        let state = State {
            listener: Some(back.listener),
            open: false,
            paused: false,
            told: false,
            visitor: None,
            admission: Admission::after(back.attempt),
            expects_urgent: false,
            beside: Vec::new(),
        };
        Ok(Door {
            proofs,
            links,
            parameters,
            recover,
            preempt,
            state: Mutex::new(state),
            came: Condvar::new(),
            look: bell()?,
            back: bell()?,
        })
    }

    /// What a door has to know that takes the place of this one, where there is one to be.
    pub(super) fn into_back(self) -> Option<Back> {
        let state = self.state.into_inner().unwrap_or_else(PoisonError::into_inner);
        state.listener.map(|listener| Back { listener, attempt: state.admission.attempt() })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Whole values are stored under it.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn change(&self, change: impl FnOnce(&mut State)) {
        change(&mut self.lock());
        self.look.ring();
    }

    /// All connections are there that were to come before the link could break.
    pub(super) fn open(&self) {
        self.change(|state| state.open = true);
    }

    /// The link is broken. Whoever is not to come back without somebody saying so finds nobody.
    pub(super) fn is_paused(&self) {
        let mut beside = Vec::new();
        self.change(|state| {
            (state.open, state.paused, state.told) = (true, true, false);
            state.admission.close();
            state.expects_urgent = false;
            beside = std::mem::take(&mut state.beside);
        });
        drop(beside); // Closed without the lock.
        self.close_unless_expected();
    }

    /// Nobody may come back without somebody saying so: whoever has, in the moment before that was
    /// said, is sent away.
    fn close_unless_expected(&self) {
        if self.is_automatic() {
            return;
        }
        let mut closed = None;
        self.change(|state| {
            if !state.told {
                closed = Some((state.listener.take(), state.visitor.take()));
            }
        });
        drop(closed); // Without the lock.
    }

    /// Pages move again.
    pub(super) fn is_active(&self) {
        self.change(|state| state.paused = false);
    }

    /// Channels with this ticket are let in.
    pub(super) fn admit(&self, ticket: Ticket) {
        self.change(|state| state.admission.admit(ticket));
    }

    /// Whether the source may come back without somebody saying so.
    pub(super) fn is_automatic(&self) -> bool {
        self.parameters.with(|p| recovery::is_automatic(self.links, p, self.proofs.is_some()))
    }

    /// Readable when the source may be back.
    pub(super) fn back(&self) -> &Bell {
        &self.back
    }

    /// Who has come back, if anybody has.
    pub(super) fn visitor(&self) -> Option<(Channel, Visitor)> {
        self.back.heed();
        self.close_unless_expected();
        self.lock().visitor.take()
    }

    /// Waits for the channel `kind`, until `stop` is set.
    pub(super) fn wait_for(
        &self,
        kind: HelloKind,
        name: &'static str,
        stop: &Cancel,
    ) -> Result<Channel, Error> {
        let mut state = self.lock();
        loop {
            if stop.is_set() {
                return Err(Error::Cancelled);
            }
            if let Some(at) = state.beside.iter().position(|(other, _)| *other == kind) {
                let (_, mut channel) = state.beside.swap_remove(at);
                channel.rename(name);
                channel.heed(stop.clone());
                return Ok(channel);
            }
            let woken = self.came.wait_timeout(state, LOOK);
            state = woken.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// The thread's body: until `stop` is set.
    pub(super) fn run(&self, stop: &Cancel) {
        while !stop.is_set() {
            self.look.heed();
            if let Some(listener) = self.recover.and_then(WayOn::take) {
                self.links.let_go();
                let before = {
                    let mut state = self.lock();
                    state.told = true;
                    state.listener.replace(Arc::new(listener))
                };
                drop(before); // Its address is free.
            }
            let recover = self.recover.map(AsFd::as_fd);
            let wake: Vec<_> = recover.into_iter().chain([self.look.as_fd()]).collect();
            let Some(listener) = self.listens() else {
                // Woken, or not to be: looked at again in either case.
                let _ = stop.wait_any(&wake, Duration::MAX);
                continue;
            };
            match listener.next_visitor(&mut |channel| self.judge(channel), &wake, stop) {
                Ok(Some((channel, seen))) => self.let_in(channel, seen),
                Ok(None) => {}
                Err(_) if stop.is_set() => {}
                Err(error) => {
                    // The listener itself is broken, or shut down on request: it waits for another.
                    listener.refuse(&error);
                    self.lock().listener = None;
                }
            }
        }
    }

    /// Where to wait for visitors now, if anywhere.
    fn listens(&self) -> Option<Arc<Listener>> {
        let automatic = self.is_automatic();
        let state = self.lock();
        let expected = match &self.proofs {
            Some(_) => automatic || state.told,
            None => state.paused && (automatic || state.told) || state.expects_urgent,
        };
        (state.open && expected).then(|| state.listener.clone()).flatten()
    }

    fn let_in(&self, channel: Channel, seen: Seen) {
        let mut state = self.lock();
        let old = match seen {
            Seen::Main(visitor) => {
                match &visitor {
                    Visitor::Whimbrel(hello) => state.admission.begin(hello.attempt),
                    Visitor::Qemu => state.expects_urgent = self.preempt,
                }
                let old = state.visitor.replace((channel, visitor));
                if !state.paused {
                    // It knows that the old connections are dead.
                    self.links.break_now();
                }
                self.back.ring();
                old.map(|(channel, _)| channel)
            }
            Seen::Beside(kind) => {
                if kind == HelloKind::Urgent {
                    state.expects_urgent = false;
                }
                state.beside.push((kind, channel));
                self.came.notify_all();
                None
            }
        };
        drop(state);
        drop(old); // Closed without the lock.
    }

    fn judge(&self, channel: &mut Channel) -> Judged<Seen> {
        let mut first = [0; Hello::LEN];
        let bytes = match channel.peek(&mut first) {
            Ok(bytes) => bytes,
            Err(reason) => return Judged::Refused(reason),
        };
        match &self.proofs {
            Some(proofs) => match bytes {
                None => Judged::NotYet { partly: false },
                Some(0) => Judged::Refused(nobody("it closed without a word")),
                Some(bytes) => self.judge_whimbrel(proofs, channel, &first[..bytes]),
            },
            None => self.judge_qemu(&first[..bytes.unwrap_or(0)], bytes.is_some()),
        }
    }

    fn judge_whimbrel(&self, proofs: &Proofs, channel: &mut Channel, first: &[u8]) -> Judged<Seen> {
        let admission = self.lock().admission.clone();
        let seen = match admission.judge(proofs, first) {
            Ok(Some(hello)) if hello.kind == HelloKind::Main => {
                Seen::Main(Visitor::Whimbrel(hello))
            }
            Ok(Some(hello)) => Seen::Beside(hello.kind),
            Ok(None) => return Judged::NotYet { partly: true },
            Err(why) => return Judged::Refused(nobody(why)),
        };
        // All of it is there.
        let mut hello = [0; Hello::LEN];
        match channel.receive_all_until(&mut hello, Instant::now(), "its first words") {
            Ok(()) => Judged::LetIn(seen),
            Err(reason) => Judged::Refused(reason),
        }
    }

    fn judge_qemu(&self, first: &[u8], is_there: bool) -> Judged<Seen> {
        if self.lock().expects_urgent {
            // It need not say anything.
            return Judged::LetIn(Seen::Beside(HelloKind::Urgent));
        }
        let begun = first.len().min(RECV_BITMAP.len());
        if is_there && begun == 0 {
            return Judged::Refused(nobody("it closed without a word"));
        }
        if first[..begun] != RECV_BITMAP[..begun] {
            // Its urgent channel may be before its main channel, and begins like a page.
            return match self.preempt && first.first() == Some(&0) {
                true => Judged::NotYet { partly: false },
                false => Judged::Refused(nobody("it does not begin as a recovery does")),
            };
        }
        match begun == RECV_BITMAP.len() {
            true => Judged::LetIn(Seen::Main(Visitor::Qemu)),
            false => Judged::NotYet { partly: begun > 0 },
        }
    }
}

fn nobody(why: &str) -> Error {
    Error::Refused(format!(
        "a connection was refused while the migration is in postcopy: {why}: only its own source may \
         come back"
    ))
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::net::TcpStream;
    use std::thread;

    use super::*;
    use crate::address::Address;
    use crate::recovery::proofs::new_identity;
    use crate::status::SocketAddressInfo;

    /// `migrate-pause` in the moment in which the source comes back by itself.
    #[test]
    fn who_was_let_in_before_the_migration_was_held_is_sent_away() {
        let (links, stop) = (Links::new().unwrap(), Cancel::new().unwrap());
        let proofs = Proofs::of(new_identity(1000).unwrap());
        let anywhere = Address::Tcp { host: "127.0.0.1".into(), port: 0 };
        let listener = Listener::bind(&anywhere, &stop).unwrap();
        let Some(SocketAddressInfo::Inet { host, port }) = listener.socket_address() else {
            panic!("tcp:");
        };
        let place = (host, port.parse::<u16>().unwrap());
        let (back, parameters) = (Back::to(Arc::new(listener)), Current::default());
        let shared = (&links, &parameters);
        let door = Door::new(back, None, Some(proofs.clone()), false, shared).unwrap();
        door.open();
        thread::scope(|scope| {
            let thread = thread::Builder::new().name("door".into());
            thread.spawn_scoped(scope, || door.run(&stop)).unwrap();
            let mut source = TcpStream::connect((&*place.0, place.1)).unwrap();
            let mut words = Vec::new();
            proofs.hello(1, [7; 16]).encode(&mut words);
            source.write_all(&words).unwrap();
            let let_in = stop.wait_any(&[door.back().as_fd()], Duration::from_secs(30)).unwrap();
            assert!(let_in.is_ready());
            links.hold();
            door.is_paused();
            assert!(door.visitor().is_none());
            assert!(matches!(source.read(&mut [0]), Ok(0) | Err(_)), "it is sent away");
            assert!(door.lock().listener.is_none(), "and finds nobody any more");
            stop.set();
        });
    }
}
