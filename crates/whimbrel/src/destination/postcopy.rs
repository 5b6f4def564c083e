//! Postcopy: the guest runs here, and the rest of its RAM follows.
//!
//! What comes on the connections is taken in by a [`session`]; when they break, another one takes
//! its place ([`recover`](super::recover)). As long as pages are missing, whatever becomes of the
//! connections, live: `dest/fault`, which asks for what the guest touches; `dest/load`, which loads
//! the devices and runs the guest, so that pages can come meanwhile; `dest/restore`, which makes huge
//! pages of small ones; and `dest/door`, which looks who comes back.
//!
//! [`session`]: super::session

use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use rustix::event::PollFlags;
use whimbrel_ram::{AbsentRam, PageSize, Received, Split, TARGET_PAGE};
use whimbrel_wire::recovery::Identity;
use whimbrel_wire::{BlockList, Command, DeviceSection, DeviceState, Package, ReturnMessage};

use super::arriving::{Arriving, Via};
use super::asked::Asked;
use super::blocktime::Blocktime;
use super::door::{Back, Door};
use super::fault::Asking;
use super::incoming::{Devices, Host};
use super::input::Input;
use super::multifd::PacketInput;
use super::outbox::Outbox;
use super::recover::{ComingBack, Stands};
use super::restore;
use super::session::{Beside, Ends, Session};
use crate::channel::Listener;
use crate::error::Error;
use crate::hello::{Features, PONG_PACKAGE};
use crate::recovery::exchange::Say;
use crate::recovery::proofs::Proofs;
use crate::recovery::{self, WayOn};
use crate::report::Report;
use crate::rescue::Orders;
use crate::settings::{Current, Parameters};
use crate::worker::{Cancel, Links, Role, Woken, scoped};

/// The last command of a package.
pub(super) const RUN: usize = 5;

/// What becomes of the guest: of the two that follow, the first to be said.
const UNDECIDED: u8 = 0;
/// It was given to the host to be run.
const RAN: u8 = 1;
/// It will not run here.
const GIVEN_UP: u8 = 2;

/// What a destination has for its guest's RAM to follow.
pub(crate) struct Terms<'a> {
    pub(crate) report: &'a Report,
    pub(crate) links: &'a Links,
    /// Capability `postcopy-preempt`: the urgent channel comes to where the main one came.
    pub(crate) preempt: bool,
    /// Capability `postcopy-blocktime`.
    pub(crate) blocktime: bool,
    /// They may change meanwhile.
    pub(crate) parameters: &'a Current,
    /// `migrate-recover`; `None` where nobody can say that.
    pub(crate) recover: Option<&'a WayOn<Listener>>,
    /// Is told how the migration stands.
    pub(crate) stands: &'a Stands<'a>,
    /// Rescues, while the migration is paused.
    pub(crate) orders: Option<&'a Orders>,
}

/// The stream up to the package.
pub(super) struct Begun<'i> {
    pub(super) input: &'i mut Input,
    pub(super) announced: Arc<BlockList>,
    /// The stream's blocks, by their place in its list.
    pub(super) blocks: Vec<whimbrel_ram::BlockIndex>,
    pub(super) ram: whimbrel_ram::GuestRam,
    pub(super) received: Arc<Received>,
    pub(super) agreed: Features,
    pub(super) own_machine: bool,
    /// Sections of a QEMU that came before RAM.
    pub(super) early: Vec<DeviceSection>,
    /// The length of the package.
    pub(super) len: u32,
    /// Multifd channels. Where they do not go on they stay open to the end, as QEMU has it.
    pub(super) channels: Vec<PacketInput>,
    /// What a source has to know that comes back, where it is a whimbrel.
    pub(super) identity: Option<Identity>,
    /// Where it connects to.
    pub(super) listener: Arc<Listener>,
}

/// How it failed.
#[derive(Debug)]
pub(crate) enum Failed {
    /// The guest has not run.
    Before(Error),
    /// It runs, on RAM of which a part is missing: that must stay watched.
    After(Error, Box<AbsentRam>),
}

/// What the threads have in common.
pub(super) struct Shared {
    pub(super) outbox: Outbox,
    /// Set when RUN has come.
    pub(super) run: Cancel,
    /// Set when the devices are loaded.
    loaded: Cancel,
    /// Ends the waits of the threads that outlive a set of connections.
    end: Cancel,
    /// What becomes of the guest.
    fate: AtomicU8,
    /// The connections there are now.
    session: Mutex<Option<Arc<Ends>>>,
    /// Why no other connections can help.
    fatal: Mutex<Option<Error>>,
}

impl Shared {
    fn new() -> Result<Shared, Error> {
        let make = || {
            Ok(Shared {
                outbox: Outbox::new()?,
                run: Cancel::new()?,
                loaded: Cancel::new()?,
                end: Cancel::new()?,
                fate: AtomicU8::new(UNDECIDED),
                session: Mutex::default(),
                fatal: Mutex::default(),
            })
        };
        make().map_err(Error::system("making an eventfd"))
    }

    /// These are the connections from now on.
    pub(super) fn attend(&self, ends: &Arc<Ends>) {
        *self.session.lock().unwrap_or_else(PoisonError::into_inner) = Some(ends.clone());
        if self.is_fatal() {
            ends.end();
        }
    }

    fn session(&self) -> Option<Arc<Ends>> {
        self.session.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The connections are of no use any more.
    fn fail_session(&self, error: Error) {
        if let Some(session) = self.session() {
            session.fail(error, self.run.is_set());
        }
    }

    /// Takes note of an error of a thread that no other connections can help.
    fn check<T>(&self, result: Result<T, Error>) -> Option<T> {
        match result {
            Ok(value) => Some(value),
            Err(_) if self.end.is_set() => None,
            Err(error) => {
                let mut fatal = self.fatal.lock().unwrap_or_else(PoisonError::into_inner);
                fatal.get_or_insert(error);
                drop(fatal);
                if let Some(session) = self.session() {
                    session.end();
                }
                None
            }
        }
    }

    pub(super) fn is_fatal(&self) -> bool {
        self.fatal.lock().unwrap_or_else(PoisonError::into_inner).is_some()
    }

    fn take_fatal(&self) -> Option<Error> {
        self.fatal.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    /// Says what becomes of the guest; false when something else was said before.
    fn decide(&self, fate: u8) -> bool {
        let before = (Ordering::SeqCst, Ordering::SeqCst);
        self.fate.compare_exchange(UNDECIDED, fate, before.0, before.1).is_ok()
    }
}

/// Takes the guest in, and then its RAM. Returns when all of it is there; gives where the source would
/// come back to.
pub(super) fn run(
    begun: Begun<'_>,
    host: &mut dyn Host,
    terms: &Terms<'_>,
) -> Result<Option<Back>, Failed> {
    let before = |error| Failed::Before(error);
    let package = read_package(begun.input, begun.len).map_err(before)?;
    let split = match begun.agreed.has(Features::SMALL_PIECES) {
        true => Split::Small,
        false => Split::Whole,
    };
    let absent = AbsentRam::watch(&begun.ram, begun.received.clone(), split)
        .map_err(Error::system("watching for page faults"))
        .map_err(before)?;
    let units = request_units(&begun, &absent).map_err(before)?;
    let blocktime = Blocktime::new(terms.blocktime);
    let asked = Arc::new(Asked::new(&absent, units, blocktime));
    terms.report.set_faults(asked.clone());
    let shared = Shared::new().map_err(before)?;
    let result = receive(begun, package, &absent, &asked, host, terms, &shared);
    let ran = shared.fate.load(Ordering::SeqCst) == RAN;
    let (back, error) = match result {
        Ok(back) => (back, None),
        Err(error) => (None, Some(error)),
    };
    match shared.take_fatal().or(error) {
        Some(reason) if !ran => Err(Failed::Before(reason)),
        Some(reason) if absent.received().missing() > 0 => {
            Err(Failed::After(reason, Box::new(absent)))
        }
        // Every page has come: what failed after that takes nothing from the guest.
        _ => {
            if let Err(error) = absent.finish().map_err(Error::system("letting go of guest RAM")) {
                terms.report.set_error(error.to_string());
            }
            Ok(back)
        }
    }
}

/// All of the package but its last command, and then it.
fn read_package(input: &mut Input, len: u32) -> Result<Vec<u8>, Error> {
    let len = usize::try_from(len).expect("32 bits fit");
    let Some(without_run) = len.checked_sub(RUN) else {
        return Err(Error::Refused(format!("main channel: a package of {len} bytes has no RUN")));
    };
    input.take_many(without_run, "the package of devices")
}

/// How much a request is for: whole pages of the source's backing, or what is placed here, where
/// both are whimbrels.
fn request_units(begun: &Begun<'_>, absent: &AbsentRam) -> Result<Box<[PageSize]>, Error> {
    let mut units = vec![TARGET_PAGE; begun.ram.block_count()].into_boxed_slice();
    for (&index, (_, info)) in begun.blocks.iter().zip(begun.announced.iter()) {
        let announced = info.page_size.map_or(Some(TARGET_PAGE), |bytes| {
            PageSize::new(usize::try_from(bytes).unwrap_or(usize::MAX))
        });
        let (here, name) = (absent.unit(index), &info.name);
        units[index.index()] = match announced {
            _ if begun.agreed.has(Features::SMALL_PIECES) && here == TARGET_PAGE => TARGET_PAGE,
            Some(there) if there >= here => there,
            _ => {
                return Err(Error::Mismatch {
                    what: format!("page size of RAM block {name}"),
                    source_has: format!("{} bytes", info.page_size.unwrap_or(4096)),
                    here: format!("{} bytes", here.bytes()),
                });
            }
        };
    }
    Ok(units)
}

/// `dest/main`'s part, and the threads beside it that outlive a set of connections.
fn receive(
    begun: Begun<'_>,
    package: Vec<u8>,
    absent: &AbsentRam,
    asked: &Asked,
    host: &mut dyn Host,
    terms: &Terms<'_>,
    shared: &Shared,
) -> Result<Option<Back>, Error> {
    let new_cancel = || Cancel::new().map_err(Error::system("making an eventfd"));
    let spawning = || Error::system("starting a thread");
    let Begun { input, announced, blocks, early, own_machine, agreed, channels, .. } = begun;
    let (identity, listener) = (begun.identity, begun.listener);
    let links = terms.links.current();
    let arriving = Arriving::new(absent, asked, blocks, new_cancel()?, channels.len());
    let goes_on = agreed.has(Features::MULTIFD_GOES_ON);
    // Otherwise they stay open, and nothing comes.
    let (taken, _silent) = if goes_on { (channels, Vec::new()) } else { (Vec::new(), channels) };
    let multifd = u8::try_from(taken.len()).expect("at most 255 channels");
    let (devices, pings) = devices(package, early, own_machine, input)?;
    input.channel().heed(links.clone());
    let mut line = input.channel().other_direction("return path");
    // Not what ends its other waits: at the end `dest/main` waits for this thread, which may be
    // waiting for a source that reads no answer.
    line.heed(links.clone());
    shared.outbox.connect(line, vec![Say::Requests]);
    if agreed.has(Features::RECOVERS) {
        shared.outbox.push(&ReturnMessage::Pong(PONG_PACKAGE))?;
    }
    let quiet = terms.parameters.with(|parameters| quiet(identity.as_ref(), parameters));
    if let Some(identity) = &identity {
        terms.report.is_of(identity.id);
    }
    let proofs = identity.map(Proofs::of);
    let door = Door::new(
        Back::to(listener.clone()),
        terms.recover,
        proofs.clone(),
        terms.preempt,
        (terms.links, terms.parameters),
    )?;
    let done = new_cancel()?;
    let result = thread::scope(|scope| {
        let run = || {
            let asking = Asking::new(&arriving, &shared.outbox, shared.end.clone(), done.clone());
            let ask = || shared.check(asking.run(&|error| shared.fail_session(error)));
            let asking = scoped(scope, Role::DestinationFault, ask).map_err(spawning())?;
            if restore::is_of_use(absent) {
                let body = || shared.check(restore::run(absent, &shared.end));
                scoped(scope, Role::DestinationRestore, body).map_err(spawning())?;
            }
            let body = move || shared.check(load(devices, &pings, host, asked, shared));
            let loading = scoped(scope, Role::DestinationLoad, body).map_err(spawning())?;
            scoped(scope, Role::DestinationDoor, || door.run(&shared.end)).map_err(spawning())?;
            let session =
                Session::new(shared, &arriving, announced.clone(), &door, (links, quiet))?;
            let urgent = terms.preempt.then_some(&*listener);
            let mut outcome = session.run(input, Beside::First { urgent, multifd: taken });
            drop(listener); // The door has it, and closes it when nobody may come back.
            let mut coming_back = ComingBack {
                shared,
                arriving: &arriving,
                announced,
                door: &door,
                proofs,
                terms,
                multifd,
                quiet,
            };
            // What was said last before the source may give the guest away.
            let run_apart = agreed.has(Features::RUN_APART) && terms.preempt;
            while let Err(error) = outcome {
                if arriving.is_complete() && shared.run.is_set() {
                    break;
                }
                let may_be_ours = identity.is_some()
                    && (!run_apart || shared.loaded.is_set())
                    && error.is_of_the_link();
                if shared.is_fatal() || !(shared.run.is_set() || may_be_ours) {
                    return Err(error);
                }
                outcome = coming_back.run(input, error)?;
            }
            if !matches!(loading.join(), Ok(Some(()))) {
                return Err(Error::Cancelled); // It has told why.
            }
            done.set();
            if !matches!(asking.join(), Ok(Some(()))) {
                return Err(Error::Cancelled);
            }
            Ok(())
        };
        let result = run();
        if result.is_err() && shared.decide(GIVEN_UP) {
            // Loading the devices may be waiting for pages that do not come any more. Where it cannot
            // be ended, whoever loads waits on.
            let _ = absent.abandon();
        }
        shared.end.set();
        result
    });
    result.map(|()| door.into_back())
}

/// How long the source may say nothing.
fn quiet(identity: Option<&Identity>, parameters: &Parameters) -> Option<Duration> {
    let promised = identity.map(|identity| identity.beat_ms).filter(|beat| *beat > 0)?;
    let silence = recovery::silence(parameters)?;
    // Four times it has said so little that once may have been lost.
    Some(silence.max(Duration::from_millis(promised.into()) * 4))
}

/// The devices of a package, and the PINGs to be answered when they are loaded.
fn devices(
    mut package: Vec<u8>,
    early: Vec<DeviceSection>,
    own_machine: bool,
    input: &Input,
) -> Result<(Devices, Vec<u32>), Error> {
    let base = input.decoder().offset() - package.len() as u64;
    Command::PostcopyRun.encode(&mut package);
    let Package { sections, pings } = Package::decode(&package, base, input.decoder().delimiting())
        .map_err(|source| Error::Protocol { channel: Via::Main.name(), source })?;
    let devices = match own_machine {
        true => Devices::Own(sections),
        false => Devices::Qemu {
            early,
            state: Box::new(DeviceState { sections, ..DeviceState::default() }),
        },
    };
    Ok((devices, pings))
}

/// The body of `dest/load`.
fn load(
    devices: Devices,
    pings: &[u32],
    host: &mut dyn Host,
    asked: &Asked,
    shared: &Shared,
) -> Result<(), Error> {
    host.load_ahead(devices)?;
    // Before the source can know it: from then on RUN may be on its way.
    shared.loaded.set();
    for ping in pings {
        shared.outbox.push(&ReturnMessage::Pong(*ping))?;
    }
    let woken = shared
        .end
        .wait(shared.run.as_fd(), PollFlags::IN, None)
        .map_err(Error::system("waiting for RUN"))?;
    // When RUN has come the guest is ours alone, whatever has become of the connection since.
    if woken == Woken::Cancelled && !shared.run.is_set() {
        return Err(Error::Cancelled);
    }
    asked.set_vcpus(host.vcpu_threads());
    if !shared.decide(RAN) {
        return Err(Error::Cancelled);
    }
    host.run()
}
