//! One set of connections of a postcopy: what `dest/main` does with it, and the threads beside.
//!
//! `dest/main` reads the main channel, `dest/urgent` the urgent one, `dest/recv-N` multifd channels.
//! Whichever fails first ends all of them, and its reason is the one told.

use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::PollFlags;
use whimbrel_ram::TARGET_PAGE;
use whimbrel_wire::recovery::HelloKind;
use whimbrel_wire::{BlockList, Command, Decoded, RamRecord, ReturnMessage};

use super::arriving::{Arriving, Via};
use super::assembly::Assembly;
use super::door::Door;
use super::input::Input;
use super::multifd::PacketInput;
use super::outbox::Outbox;
use super::postcopy::{RUN, Shared};
use super::rest;
use super::urgent::{self, Urgent};
use crate::channel::{Channel, Listener};
use crate::error::Error;
use crate::worker::{Cancel, Role, Woken, scoped};

/// How long nothing may arrive, when the source has sent everything and pages are still missing.
const SILENCE: Duration = Duration::from_secs(30);

/// How long RUN may take behind a package that has come: the source waits meanwhile for its devices
/// to be loaded.
const LOADING: Duration = Duration::from_secs(10);

/// How long RUN, which may be on its way, is waited for when another channel has failed.
const RUN_MAY_COME: Duration = Duration::from_secs(1);

/// Where the channels beside the main one come from.
pub(super) enum Beside<'s> {
    /// The first of all.
    First {
        /// Where the urgent channel comes, with capability `postcopy-preempt`.
        urgent: Option<&'s Listener>,
        /// Multifd channels that go on.
        multifd: Vec<PacketInput>,
    },
    /// In a recovery.
    Again {
        /// Whether there is an urgent channel.
        urgent: bool,
        /// How many multifd channels there are.
        multifd: u8,
    },
}

/// One set of connections.
pub(super) struct Session<'s> {
    shared: &'s Shared,
    arriving: &'s Arriving<'s>,
    announced: Arc<BlockList>,
    door: &'s Door<'s>,
    /// How long the source may say nothing, where it has promised to.
    quiet: Option<Duration>,
    ends: Arc<Ends>,
}

/// How a session ends before its time.
#[derive(Debug)]
pub(super) struct Ends {
    /// Ends the waits of the threads beside `dest/main`.
    stop: Cancel,
    /// Ends those of `dest/main`.
    links: Cancel,
    /// Why it fails, told by the first thread that knew.
    reason: Mutex<Option<Error>>,
}

impl Ends {
    /// Ends it, because of an error of a thread beside the main channel: as long as RUN has not come
    /// (`has_run`) it may be on its way, and then it must be heard. So `dest/main` ends by itself.
    pub(super) fn fail(&self, error: Error, has_run: bool) {
        self.reason.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
        self.stop.set();
        if has_run {
            self.links.set();
        }
    }

    /// Ends it, whatever may still be on its way.
    pub(super) fn end(&self) {
        self.stop.set();
        self.links.set();
    }
}

impl<'s> Session<'s> {
    pub(super) fn new(
        shared: &'s Shared,
        arriving: &'s Arriving<'s>,
        announced: Arc<BlockList>,
        door: &'s Door<'s>,
        (links, quiet): (Cancel, Option<Duration>),
    ) -> Result<Session<'s>, Error> {
        let stop = Cancel::new().map_err(Error::system("making an eventfd"))?;
        let ends = Arc::new(Ends { stop, links, reason: Mutex::default() });
        shared.attend(&ends);
        Ok(Session { shared, arriving, announced, door, quiet, ends })
    }

    /// Takes in all that comes; returns when every page is there, or when it has failed.
    pub(super) fn run(&self, input: &mut Input, beside: Beside<'_>) -> Result<(), Error> {
        let result = thread::scope(|scope| {
            let result = self.take_all(scope, input, beside);
            // The urgent channel is the source's to end, and it need not.
            self.ends.stop.set();
            result
        });
        let reason = self.ends.reason.lock().unwrap_or_else(PoisonError::into_inner).take();
        result.map_err(|error| reason.unwrap_or(error))
    }

    fn take_all<'t>(
        &'t self,
        scope: &'t thread::Scope<'t, '_>,
        input: &mut Input,
        beside: Beside<'t>,
    ) -> Result<(), Error> {
        let spawning = || Error::system("starting a thread");
        let outbox = &self.shared.outbox;
        let has_others = match beside {
            Beside::First { urgent, multifd } => {
                let has_others = urgent.is_some() || !multifd.is_empty();
                match urgent {
                    Some(listener) => {
                        let accept = move || {
                            let channel = listener.accept("urgent", &self.ends.stop);
                            self.door.open();
                            self.take_urgent(channel?)
                        };
                        self.beside(scope, Role::DestinationUrgent, accept).map_err(spawning())?;
                    }
                    None => self.door.open(),
                }
                for (mut channel, number) in multifd.into_iter().zip(0u8..) {
                    channel.heed(self.ends.stop.clone());
                    let body = move || rest::run(channel, number, self.arriving);
                    let role = Role::DestinationReceive(number);
                    self.beside(scope, role, body).map_err(spawning())?;
                }
                take_run(input, &self.ends, self.quiet)?;
                self.shared.run.set();
                if self.ends.stop.is_set() {
                    return Err(Error::Cancelled); // Somebody has told why.
                }
                has_others
            }
            Beside::Again { urgent, multifd } => {
                if urgent {
                    let body = move || {
                        let wait = |kind| self.door.wait_for(kind, "urgent", &self.ends.stop);
                        self.take_urgent(wait(HelloKind::Urgent)?)
                    };
                    self.beside(scope, Role::DestinationUrgent, body).map_err(spawning())?;
                }
                for number in 0..multifd {
                    let body = move || {
                        let (kind, via) = (HelloKind::Multifd(number), Via::Multifd(number));
                        let channel = self.door.wait_for(kind, via.name(), &self.ends.stop)?;
                        rest::run(PacketInput::new(channel), number, self.arriving)
                    };
                    let role = Role::DestinationReceive(number);
                    self.beside(scope, role, body).map_err(spawning())?;
                }
                urgent || multifd > 0
            }
        };
        input.channel().expect_something_within(self.quiet);
        take_pages(input, self.arriving, outbox)?;
        wait_for_all(self.arriving, &self.ends.links, has_others)
    }

    /// A thread beside `dest/main`: should it fail, all do.
    fn beside<'t>(
        &'t self,
        scope: &'t thread::Scope<'t, '_>,
        role: Role,
        body: impl FnOnce() -> Result<(), Error> + Send + 't,
    ) -> std::io::Result<()> {
        let body = move || match body() {
            Err(_) if self.ends.stop.is_set() => {}
            Err(error) => self.ends.fail(error, self.shared.run.is_set()),
            Ok(()) => {}
        };
        scoped(scope, role, body).map(drop)
    }

    /// The body of `dest/urgent`.
    fn take_urgent(&self, channel: Channel) -> Result<(), Error> {
        let arriving = self.arriving;
        match Urgent::new(channel, self.announced.clone(), arriving).run(arriving) {
            // A source may close it when it has sent all: QEMU does, without a word.
            Err(Error::Truncated { .. }) if arriving.is_complete() => Ok(()),
            Err(error) => Err(error),
            Ok(urgent::Ended::Closed(offset)) if !arriving.is_complete() => {
                let expected = "the rest of the pages".into();
                Err(Error::Ended { channel: Via::Urgent.name(), offset, expected })
            }
            Ok(urgent::Ended::Closed(_) | urgent::Ended::Mark) => Ok(()),
        }
    }
}

/// The last command of the package: from here on the guest is ours.
fn take_run(input: &mut Input, ends: &Ends, quiet: Option<Duration>) -> Result<(), Error> {
    let (at, links) = (input.decoder().offset(), &ends.links);
    let mut until: Option<Instant> = None;
    // The end of the stream is told below.
    input.hold(RUN, |main| {
        if until.is_none() {
            let limit = quiet.map_or(Duration::MAX, |quiet| quiet.max(LOADING));
            let woken = links.wait_any(&[main, ends.stop.as_fd()], limit);
            match woken.map_err(Error::system("waiting for RUN"))? {
                Woken::Cancelled => return Err(Error::Cancelled),
                Woken::TimedOut => return Err(Error::Silent { channel: "main", limit }),
                Woken::Ready => {}
            }
            if !ends.stop.is_set() {
                return Ok(());
            }
        }
        // It has failed elsewhere.
        let left = until.get_or_insert_with(|| Instant::now() + RUN_MAY_COME);
        let left = left.saturating_duration_since(Instant::now());
        match links.wait(main, PollFlags::IN, Some(left)) {
            Ok(Woken::Ready) => Ok(()),
            Ok(Woken::Cancelled | Woken::TimedOut) => Err(Error::Cancelled),
            Err(error) => Err(Error::system("waiting for RUN")(error)),
        }
    })?;
    let mut run = Vec::with_capacity(RUN);
    Command::PostcopyRun.encode(&mut run);
    match input.take_many(RUN, "RUN, the end of the package")? {
        found if found == run => Ok(()),
        found if found == withdrawn() => Err(Error::Refused(
            "main channel: the source has kept its guest: see what it says".into(),
        )),
        _ => Err(Error::Refused(format!(
            "main channel, byte {at}: the package ends in something else than POSTCOPY_RUN"
        ))),
    }
}

/// What comes in RUN's place when a whimbrel keeps its guest.
fn withdrawn() -> Vec<u8> {
    let mut words = Vec::new();
    Command::PostcopyResume.encode(&mut words);
    words
}

/// The rest of the main channel.
fn take_pages(input: &mut Input, arriving: &Arriving<'_>, outbox: &Outbox) -> Result<(), Error> {
    let mut assembly = Assembly::new(arriving, Via::Main);
    let mut content = [0; TARGET_PAGE.bytes()];
    loop {
        if !input.holds(PAGE_RECORD) {
            // What comes next may have to be waited for.
            assembly.place_run()?;
        }
        let read = Instant::now();
        match input.next(|_, _| Ok(()))? {
            Some(Decoded::Ram(RamRecord::PageFollows { block, offset, .. })) => {
                let block = arriving.block(block);
                match input.take_held(content.len()) {
                    Some(held) => assembly.page(block, offset.0, held, read)?,
                    None => {
                        input.take_bytes(&mut content, "a page")?;
                        assembly.page(block, offset.0, &content, read)?;
                    }
                }
            }
            Some(Decoded::Ram(RamRecord::Zero { block, offset })) => {
                assembly.zero(arriving.block(block), offset.0, read)?;
            }
            Some(Decoded::Command(Command::Ping(value))) => {
                outbox.push(&ReturnMessage::Pong(value))?;
            }
            // Between whimbrels the proof has said so.
            Some(Decoded::Command(Command::PostcopyResume)) => {}
            Some(Decoded::Eof) => return assembly.finish(),
            Some(
                Decoded::Ram(RamRecord::EndOfSection)
                | Decoded::SectionPart(_)
                | Decoded::SectionEnd(_)
                | Decoded::Footer(_),
            ) => {}
            Some(other) => {
                return Err(Error::Refused(format!(
                    "main channel, before byte {}: {other:?} has no meaning in postcopy",
                    input.decoder().offset()
                )));
            }
            None => return Err(input.ended("the rest of RAM")),
        }
    }
}

/// A page and its record, as most of them are.
const PAGE_RECORD: usize = TARGET_PAGE.bytes() + 8;

/// The source has sent everything: what is still on its way on the urgent channel comes soon.
fn wait_for_all(arriving: &Arriving<'_>, links: &Cancel, beside_urgent: bool) -> Result<(), Error> {
    let mut missing = arriving.absent.received().missing();
    // Without another channel there is nothing to wait for.
    let patience = if beside_urgent { SILENCE } else { Duration::ZERO };
    loop {
        let woken = links
            .wait(arriving.complete().as_fd(), PollFlags::IN, Some(patience))
            .map_err(Error::system("waiting for the last pages"))?;
        let left = arriving.absent.received().missing();
        match woken {
            Woken::Ready => return Ok(()),
            Woken::Cancelled => return Err(Error::Cancelled),
            Woken::TimedOut if left < missing => missing = left,
            Woken::TimedOut => {
                let elsewhere = match beside_urgent {
                    true => "",
                    false => {
                        "; a source with capability postcopy-preempt on sends some on a second \
                         connection, which is not waited for here: set the same on both sides"
                    }
                };
                return Err(Error::Refused(format!(
                    "main channel: the source has sent everything, and {left} pages never came\
                     {elsewhere}"
                )));
            }
        }
    }
}
