//! Postcopy: the guest runs here, and the rest of its RAM follows.
//!
//! `dest/main` goes on reading the main channel, `dest/urgent` the urgent one; `dest/fault` asks
//! for what the guest touches; `dest/load` loads the devices and runs the guest, so that pages can
//! come meanwhile; `dest/restore` makes huge pages of small ones. Whichever fails first breaks all
//! connections, and its reason is the one told.

use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::PollFlags;
use whimbrel_ram::{AbsentRam, PageSize, Received, Split, TARGET_PAGE};
use whimbrel_wire::{
    BlockList, Command, Decoded, DeviceSection, DeviceState, Package, RamRecord, ReturnMessage,
};

use super::arriving::{Arriving, Via};
use super::asked::Asked;
use super::assembly::Assembly;
use super::blocktime::Blocktime;
use super::fault::Asking;
use super::incoming::{Devices, Host};
use super::input::Input;
use super::multifd::PacketInput;
use super::outbox::Outbox;
use super::urgent::{self, Urgent};
use super::{rest, restore};
use crate::channel::Listener;
use crate::error::Error;
use crate::hello::Features;
use crate::report::Report;
use crate::worker::{Cancel, Links, Role, Woken, scoped};

/// The last command of a package.
const RUN: usize = 5;

/// How long nothing may arrive, when the source has sent everything and pages are still missing.
const SILENCE: Duration = Duration::from_secs(30);

/// How long RUN, which may be on its way, is waited for when another channel has failed.
const RUN_MAY_COME: Duration = Duration::from_secs(1);

/// How long devices whose guest was given to us may take to load when pages come no more.
const LOADING: Duration = Duration::from_secs(5);

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
    /// Where the urgent channel comes, with capability `postcopy-preempt`.
    pub(crate) urgent: Option<&'a Listener>,
    /// Capability `postcopy-blocktime`.
    pub(crate) blocktime: bool,
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
struct Shared<'a> {
    links: &'a Links,
    /// Ends the waits of all threads but `dest/main`, which heeds the links.
    stop: Cancel,
    /// All went well: what ends now, ends because it is told to.
    over: AtomicBool,
    outbox: Outbox,
    /// Set when RUN has come.
    run: Cancel,
    /// Set when the devices are loaded, or could not be.
    loaded: Cancel,
    /// What becomes of the guest.
    fate: AtomicU8,
    /// Why it fails, told by the first thread that knew.
    reason: Mutex<Option<Error>>,
}

impl<'a> Shared<'a> {
    fn new(links: &'a Links) -> Result<Shared<'a>, Error> {
        let make = || {
            Ok(Shared {
                links,
                stop: Cancel::new()?,
                over: AtomicBool::new(false),
                outbox: Outbox::new()?,
                run: Cancel::new()?,
                loaded: Cancel::new()?,
                fate: AtomicU8::new(UNDECIDED),
                reason: Mutex::default(),
            })
        };
        make().map_err(Error::system("making an eventfd"))
    }

    /// Takes note of an error, and ends all others.
    fn check<T>(&self, result: Result<T, Error>) -> Option<T> {
        let checked = self.check_beside(result);
        if checked.is_none() && !self.over.load(Ordering::SeqCst) {
            self.links.break_now();
        }
        checked
    }

    /// The same of a thread beside the main channel, and the devices: as long as RUN has not come
    /// it may be on its way, and then it must be heard. So `dest/main` ends by itself.
    fn check_beside<T>(&self, result: Result<T, Error>) -> Option<T> {
        match result {
            Ok(value) => Some(value),
            Err(_) if self.over.load(Ordering::SeqCst) => None,
            Err(error) => {
                let mut reason = self.reason.lock().unwrap_or_else(PoisonError::into_inner);
                reason.get_or_insert(error);
                drop(reason);
                self.stop.set();
                if self.run.is_set() {
                    self.links.break_now();
                }
                None
            }
        }
    }

    /// Says what becomes of the guest; false when something else was said before.
    fn decide(&self, fate: u8) -> bool {
        let before = (Ordering::SeqCst, Ordering::SeqCst);
        self.fate.compare_exchange(UNDECIDED, fate, before.0, before.1).is_ok()
    }

    fn take_reason(&self) -> Option<Error> {
        self.reason.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

/// Takes the guest in, and then its RAM. Returns when all of it is there.
pub(super) fn run(begun: Begun<'_>, host: &mut dyn Host, terms: &Terms<'_>) -> Result<(), Failed> {
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
    let shared = Shared::new(terms.links).map_err(before)?;
    let result = receive(begun, package, &absent, &asked, host, terms, &shared);
    let ran = shared.fate.load(Ordering::SeqCst) == RAN;
    match shared.take_reason().or(result.err()) {
        Some(reason) if !ran => Err(Failed::Before(reason)),
        Some(reason) if absent.received().missing() > 0 => {
            Err(Failed::After(reason, Box::new(absent)))
        }
        // Every page has come: what failed after that takes nothing from the guest.
        _ => {
            if let Err(error) = absent.finish().map_err(Error::system("letting go of guest RAM")) {
                terms.report.set_error(error.to_string());
            }
            Ok(())
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

/// `dest/main`'s part, and the threads beside it.
fn receive(
    begun: Begun<'_>,
    package: Vec<u8>,
    absent: &AbsentRam,
    asked: &Asked,
    host: &mut dyn Host,
    terms: &Terms<'_>,
    shared: &Shared<'_>,
) -> Result<(), Error> {
    let new_cancel = || Cancel::new().map_err(Error::system("making an eventfd"));
    let spawning = || Error::system("starting a thread");
    let links = terms.links.current();
    let Begun { input, announced, blocks, early, own_machine, agreed, channels, .. } = begun;
    let arriving = Arriving::new(absent, asked, blocks, new_cancel()?, channels.len());
    let goes_on = agreed.has(Features::MULTIFD_GOES_ON) && !channels.is_empty();
    // Otherwise they stay open, and nothing comes.
    let (taken, _silent) = if goes_on { (channels, Vec::new()) } else { (Vec::new(), channels) };
    let (devices, pings) = devices(package, early, own_machine, input)?;
    input.channel().heed(links.clone());
    let mut output = input.channel().other_direction("return path");
    // Not what ends its other waits: at the end `dest/main` waits for this thread, which may be
    // waiting for a source that reads no answer.
    output.heed(links.clone());
    let done = new_cancel()?;
    let asking = Asking {
        arriving: &arriving,
        outbox: &shared.outbox,
        output,
        stop: shared.stop.clone(),
        done: done.clone(),
        last: None,
    };
    thread::scope(|scope| {
        let run = || {
            let asking =
                scoped(scope, Role::DestinationFault, || shared.check_beside(asking.run()))
                    .map_err(spawning())?;
            if let Some(listener) = terms.urgent {
                let arriving = &arriving;
                let body = move || {
                    shared.check_beside(take_urgent(listener, announced, arriving, &shared.stop))
                };
                scoped(scope, Role::DestinationUrgent, body).map_err(spawning())?;
            }
            for (mut channel, number) in taken.into_iter().zip(0u8..) {
                channel.heed(shared.stop.clone());
                let arriving = &arriving;
                let body = move || shared.check_beside(rest::run(channel, number, arriving));
                scoped(scope, Role::DestinationReceive(number), body).map_err(spawning())?;
            }
            if restore::is_of_use(absent) {
                let body = || shared.check_beside(restore::run(absent, &shared.stop));
                scoped(scope, Role::DestinationRestore, body).map_err(spawning())?;
            }
            let body = move || {
                let done = shared.check(load(devices, &pings, host, asked, shared));
                shared.loaded.set();
                done
            };
            let loading = scoped(scope, Role::DestinationLoad, body).map_err(spawning())?;
            take_run(input, &links, shared)?;
            shared.run.set();
            if shared.stop.is_set() {
                return Err(Error::Cancelled); // Somebody has told why.
            }
            take_pages(input, &arriving, &shared.outbox)?;
            wait_for_all(&arriving, &links, terms.urgent.is_some() || goes_on)?;
            if !matches!(loading.join(), Ok(Some(()))) {
                return Err(Error::Cancelled); // It has told why.
            }
            done.set();
            if !matches!(asking.join(), Ok(Some(()))) {
                return Err(Error::Cancelled);
            }
            Ok(())
        };
        if shared.check(run()).is_none() {
            give_up(absent, shared);
        }
        // The urgent channel is the source's to end, and it need not.
        shared.over.store(true, Ordering::SeqCst);
        shared.stop.set();
    });
    Ok(())
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
    shared: &Shared<'_>,
) -> Result<(), Error> {
    host.load_ahead(devices)?;
    for ping in pings {
        shared.outbox.push(&ReturnMessage::Pong(*ping))?;
    }
    let links = shared.links.current();
    let woken = links
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

/// It has failed. A guest that was given to us runs all the same when its devices are loaded; but
/// loading them may be waiting for pages that do not come any more, and that must end.
fn give_up(absent: &AbsentRam, shared: &Shared<'_>) {
    if shared.run.is_set() {
        shared.links.wait_for_end_or(shared.loaded.as_fd(), LOADING);
    }
    if shared.decide(GIVEN_UP) {
        // Where it cannot be ended, whoever loads waits on.
        let _ = absent.abandon();
    }
}

/// The last command of the package: from here on the guest is ours.
fn take_run(input: &mut Input, links: &Cancel, shared: &Shared<'_>) -> Result<(), Error> {
    let at = input.decoder().offset();
    let mut until: Option<Instant> = None;
    // The end of the stream is told below.
    input.hold(RUN, |main| {
        if until.is_none() {
            let woken = links.wait_any(&[main, shared.stop.as_fd()], Duration::MAX);
            let woken = woken.map_err(Error::system("waiting for RUN"))?;
            if woken == Woken::Cancelled {
                return Err(Error::Cancelled);
            }
            if !shared.stop.is_set() {
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
        _ => Err(Error::Refused(format!(
            "main channel, byte {at}: the package ends in something else than POSTCOPY_RUN"
        ))),
    }
}

/// The body of `dest/urgent`.
fn take_urgent(
    listener: &Listener,
    announced: Arc<BlockList>,
    arriving: &Arriving<'_>,
    stop: &Cancel,
) -> Result<(), Error> {
    let channel = listener.accept("urgent", stop)?;
    match Urgent::new(channel, announced, arriving).run(arriving) {
        // A source may close it when it has sent all: QEMU does, without a word.
        Err(Error::Truncated { .. }) if arriving.is_complete() => Ok(()),
        Err(error) => Err(error),
        Ok(urgent::Ended::Closed) if !arriving.is_complete() => Err(Error::Refused(
            "urgent channel: the source closed it before every page had come".into(),
        )),
        Ok(urgent::Ended::Closed | urgent::Ended::Mark) => Ok(()),
    }
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
