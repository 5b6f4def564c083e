//! One stream from its header to its end: what is said is checked, what is sent is placed.

mod checkpoint;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use whimbrel_ram::{BlockIndex, GuestRam, RamBlock, RamCache, Received, TARGET_PAGE};
use whimbrel_wire::recovery::{FAREWELL, Identity};
use whimbrel_wire::{
    BlockList, Command, Configuration, Decoded, DeviceSection, DeviceState, MainDecoder,
    MainOptions, RamDiscard, RamRecord, ReturnMessage, xbzrle,
};

use super::ahead::Ahead;
use super::door::Back;
use super::farewell;
use super::held::HeldSections;
use super::input::Input;
use super::multifd::{Cached, PacketInput, Receivers, Target};
use super::placing::{Place, Placing};
use super::postcopy::{self, Begun, Failed, Terms};
use crate::channel::{Arrivals, Channel, Listener};
use crate::error::Error;
use crate::hello::{Features, PING_PARKED};
use crate::kept::Changes;
use crate::kept::keeper::check_memory;
use crate::worker::{Cancel, Woken};

const PAGE: usize = TARGET_PAGE.bytes();

/// How long a source may take to close when its guest has arrived.
const GOODBYE: Duration = Duration::from_secs(5);

/// And when there is no time: longer than a round trip on any link that carries a guest.
const HURRIED_GOODBYE: Duration = Duration::from_millis(200);

/// Who takes the stream in: a VM that runs it or a file that keeps it.
pub(crate) trait Host: Send {
    /// The machine that comes, before anything of it does.
    fn configure(&mut self, configuration: &Configuration) -> Result<(), Error>;

    /// RAM for the blocks that come, in whatever order.
    fn ram(&mut self, announced: &BlockList) -> Result<GuestRam, Error>;

    /// Whether that RAM is all zero.
    fn ram_is_fresh(&self) -> bool;

    /// What is to be told of every page that is placed in that RAM, other than by postcopy.
    fn changes(&self) -> Option<Changes> {
        None
    }

    /// RAM is complete and so are the devices: the source asks whether they could be loaded, or
    /// gives the right to run the guest. Called once, and in COLO for each checkpoint.
    fn load(&mut self, devices: Devices) -> Result<(), Error>;

    /// Whether a guest may come before its RAM (capability `postcopy-ram`).
    fn takes_postcopy(&self) -> bool;

    /// Whether that RAM, all of it, can be placed in pieces of 4 KiB in postcopy.
    fn takes_small_pieces(&self) -> bool;

    /// As [`load`](Host::load), of a guest whose RAM is still arriving: what is touched of it is
    /// asked for, and waited for.
    fn load_ahead(&mut self, devices: Devices) -> Result<(), Error> {
        self.load(devices)
    }

    /// The guest has come, and its RAM is still arriving: the right to run it is here.
    fn run(&mut self) -> Result<(), Error>;

    /// The threads that will run its vCPUs.
    fn vcpu_threads(&self) -> Vec<u32>;
}

/// What has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Arrived {
    /// All of it.
    Whole,
    /// The guest comes now, in a package of so many bytes, and then the rest of its RAM.
    GuestFirst(u32),
}

/// The devices of a stream, as they came.
#[derive(Debug)]
pub(crate) enum Devices {
    /// Of whimbrel's own machines: each section as sent.
    Own(Vec<DeviceSection>),
    /// Of a QEMU: sections before RAM, and all others with their description.
    Qemu { early: Vec<DeviceSection>, state: Box<DeviceState> },
}

/// A stream that is coming in.
#[derive(Debug)]
pub(crate) struct Incoming {
    input: Input,
    /// Multifd channels that wait for the RAM they are to fill.
    channels: Vec<Channel>,
    receivers: Option<Receivers>,
    /// Multifd channels on which nothing may come any more; open to the end, as QEMU has it.
    silent: Vec<PacketInput>,
    /// Ends the waits of all channels when one has failed.
    stop: Cancel,
    placing: Option<Placing>,
    ahead: Ahead,
    return_path: bool,
    own_machine: bool,
    sections: HeldSections,
    loaded: bool,
    placed: Arc<AtomicU64>,
    /// A postcopy of RAM may follow.
    advised: bool,
    agreed: Features,
    /// What makes the migration itself, where it comes from a whimbrel.
    identity: Option<Identity>,
    setup: Option<Setup>,
    /// With capability `x-colo`.
    replica: Option<Replica>,
}

/// What becomes of a guest that is to be kept in step, and not moved.
#[derive(Clone, Debug, Default)]
struct Replica {
    /// The source has said that it wants it so. One of QEMU 11 and later does not say so.
    enabled: bool,
    cache: Option<Arc<RamCache>>,
}

/// The RAM of a stream.
#[derive(Clone, Debug)]
struct Setup {
    announced: Arc<BlockList>,
    ram: GuestRam,
    /// The stream's blocks, by their place in its list.
    blocks: Vec<BlockIndex>,
    /// Which pages have come, where a postcopy may follow.
    received: Option<Arc<Received>>,
}

impl Incoming {
    pub(crate) fn new(arrivals: Arrivals) -> Incoming {
        let Arrivals { main, multifd, stop, .. } = arrivals;
        Incoming {
            input: Input::new(main, MainDecoder::new(MainOptions::default())),
            channels: multifd,
            receivers: None,
            silent: Vec::new(),
            stop,
            placing: None,
            ahead: Ahead::default(),
            return_path: false,
            own_machine: false,
            sections: HeldSections::default(),
            loaded: false,
            placed: Arc::default(),
            advised: false,
            agreed: Features::default(),
            identity: None,
            setup: None,
            replica: None,
        }
    }

    /// The guest that comes is to be kept in step with its source (capability `x-colo`).
    pub(crate) fn kept_in_step(self) -> Incoming {
        let options = MainOptions { colo: true, ..MainOptions::default() };
        let input = Input::new(self.input.into_channel(), MainDecoder::new(options));
        Incoming { input, replica: Some(Replica::default()), ..self }
    }

    /// Counts the bytes of RAM that have been placed in `placed`.
    pub(crate) fn with_progress(self, placed: Arc<AtomicU64>) -> Incoming {
        Incoming { placed, ..self }
    }

    /// Takes the stream in up to where its guest may run, because the source has given up the
    /// right, or up to the package of a postcopy.
    pub(crate) fn receive(&mut self, host: &mut dyn Host) -> Result<Arrived, Error> {
        let result = self.receive_stream(host);
        // Whatever this thread met when it was woken, that was first.
        let first = self.receivers.as_ref().and_then(Receivers::take_failure);
        match (result, first) {
            (Err(_), Some(error)) => Err(error),
            (result, _) => result,
        }
    }

    fn receive_stream(&mut self, host: &mut dyn Host) -> Result<Arrived, Error> {
        loop {
            self.read_ahead()?;
            let return_path = self.return_path;
            let next = self.input.next(|channel, ping| match return_path {
                true => send(channel, &ReturnMessage::Pong(ping)),
                false => Ok(()),
            })?;
            match next {
                Some(Decoded::Ram(record)) => self.record(record)?,
                Some(Decoded::Eof) => {
                    let own = self.sections.take();
                    return self.load(host, Devices::Own(own)).map(|()| Arrived::Whole);
                }
                Some(Decoded::DeviceState(state)) => {
                    let early = self.sections.take();
                    let devices = Devices::Qemu { early, state };
                    return self.load(host, devices).map(|()| Arrived::Whole);
                }
                Some(Decoded::PackageFollows { len }) => return Ok(Arrived::GuestFirst(len)),
                Some(other) => self.message(host, other)?,
                None => return self.finish_at_close(host).map(|()| Arrived::Whole),
            }
        }
    }

    /// Takes the guest in whose package is next, has the host run it, and takes in the rest of its
    /// RAM. Gives where the source would come back to, should it not hear of that.
    pub(crate) fn receive_rest(
        &mut self,
        package: u32,
        host: &mut dyn Host,
        (listener, terms): (Arc<Listener>, &Terms<'_>),
    ) -> Result<Option<Back>, Failed> {
        let refused = |text: &str| Failed::Before(Error::Refused(format!("main channel: {text}")));
        if !host.takes_postcopy() {
            return Err(refused(
                "the source goes over to postcopy, and capability postcopy-ram is off here",
            ));
        }
        let (Some(Setup { announced, ram, blocks, received: Some(received) }), true) =
            (self.setup.clone(), self.return_path)
        else {
            return Err(refused(
                "a package, but no return path was opened or no postcopy of RAM announced before",
            ));
        };
        // With it goes the thread that populates memory: what has not come must stay untouched.
        self.placing = None;
        let channels = match self.receivers.take() {
            Some(receivers) => {
                let goes_on = self.agreed.has(Features::MULTIFD_GOES_ON);
                receivers.retire(goes_on).map_err(Failed::Before)?
            }
            None => Vec::new(),
        };
        let begun = Begun {
            input: &mut self.input,
            announced,
            blocks,
            ram,
            received,
            agreed: self.agreed,
            own_machine: self.own_machine,
            early: self.sections.take(),
            len: package,
            channels,
            identity: self.identity,
            listener,
        };
        postcopy::run(begun, host, terms)
    }

    fn read_ahead(&mut self) -> Result<(), Error> {
        let Some(placing) = &mut self.placing else { return Ok(()) };
        loop {
            let pages = self.ahead.read(&mut self.input, placing)?;
            if pages == 0 {
                return Ok(());
            }
            count(&self.placed, pages);
        }
    }

    /// The other side closed: only a QEMU that describes no devices ends like that.
    fn finish_at_close(&mut self, host: &mut dyn Host) -> Result<(), Error> {
        match self.input.close()? {
            Some(state) => {
                let early = self.sections.take();
                self.load(host, Devices::Qemu { early, state: Box::new(state) })
            }
            None => Err(self.input.ended("the rest of the migration")),
        }
    }

    fn load(&mut self, host: &mut dyn Host, devices: Devices) -> Result<(), Error> {
        if self.placing.is_none() {
            return Err(Error::Refused(
                "main channel: the stream has devices but no RAM: it is not a whole migration"
                    .into(),
            ));
        }
        if std::mem::replace(&mut self.loaded, true) {
            return Ok(());
        }
        if let Some(receivers) = self.receivers.take() {
            // Nobody but the guest writes its memory from here on.
            self.silent = receivers.retire(false)?;
        }
        host.load(devices)
    }

    fn message(&mut self, host: &mut dyn Host, message: Decoded) -> Result<(), Error> {
        match message {
            Decoded::Configuration(configuration) => {
                self.own_machine = configuration.is_whimbrel();
                host.configure(&configuration)
            }
            Decoded::RamSetup(announced) => self.setup(host, announced),
            Decoded::Command(command) => self.command(host, command),
            Decoded::DeviceSection(section) if self.loaded => Err(Error::Refused(format!(
                "main channel: device section {} comes after the devices had been loaded",
                section.header.name
            ))),
            Decoded::DeviceSection(section) => {
                self.sections.push(section, self.input.decoder().offset())
            }
            Decoded::MappedBlock { .. } => Err(Error::Refused(
                "main channel: this is a kept VM's file (mapped-ram), not a stream: \
                 send it with 'whimbrel restore'"
                    .into(),
            )),
            Decoded::Header(_)
            | Decoded::SectionStart(_)
            | Decoded::SectionPart(_)
            | Decoded::SectionEnd(_)
            | Decoded::Footer(_)
            | Decoded::DeviceStateBegins
            | Decoded::VmDescription(_) => Ok(()),
            other => Err(unsupported(&format!("{other:?}"))),
        }
    }

    fn setup(&mut self, host: &mut dyn Host, announced: Arc<BlockList>) -> Result<(), Error> {
        let ram = host.ram(&announced)?;
        let place = |info: &whimbrel_wire::BlockInfo| {
            let name = info.name.as_str().unwrap_or_default();
            ram.find(name).map(|(index, _)| index).expect("the host took every block announced")
        };
        let blocks: Vec<BlockIndex> = announced.iter().map(|(_, info)| place(info)).collect();
        let received = self.advised.then(|| Arc::new(Received::new(&ram)));
        if let Some(replica) = &mut self.replica {
            if self.own_machine && !replica.enabled {
                return Err(Error::Refused(
                    "main channel: capability x-colo is on here, and off at the source: set the same \
                     on both sides"
                        .into(),
                ));
            }
            check_memory(ram.total_bytes())?;
            replica.cache = Some(Arc::new(RamCache::new(&ram)?));
        }
        let cache = self.replica.as_ref().and_then(|replica| replica.cache.clone());
        let target = Arc::new(Target {
            content: Arc::new(Received::new(&ram)),
            ram: ram.clone(),
            fresh: host.ram_is_fresh(),
            arrived: received.clone(),
            placed: self.placed.clone(),
            changes: host.changes(),
            cache: cache.map(Cached::Beside),
        });
        if !self.channels.is_empty() {
            let channels = self.channels.drain(..).map(PacketInput::new).collect();
            self.receivers = Some(Receivers::start(channels, &target, &self.stop)?);
        }
        let mut placing = Placing::new(target, blocks.clone());
        if self.receivers.is_none() {
            placing = placing.populating_ahead()?;
        }
        self.placing = Some(placing);
        self.setup = Some(Setup { announced, ram, blocks, received });
        Ok(())
    }

    /// What was sent of these ranges has changed since.
    fn discard(&self, discard: &RamDiscard) -> Result<(), Error> {
        let wrong = |problem: &str| {
            Error::Refused(format!(
                "main channel, before byte {}: discarding a part of block {}: {problem}",
                self.input.decoder().offset(),
                discard.block
            ))
        };
        let Some(Setup { ram, received: Some(received), .. }) = &self.setup else {
            return Err(wrong("no postcopy was announced"));
        };
        let name = discard.block.as_str().unwrap_or_default();
        let (index, block) = ram.find(name).ok_or_else(|| wrong("there is no such block"))?;
        for range in &discard.ranges {
            let (start, end) = (range.start.0, range.start.0.saturating_add(range.length));
            let page = PAGE as u64;
            if end > block.len() || !start.is_multiple_of(page) || !end.is_multiple_of(page) {
                return Err(wrong("a range that is no pages of it"));
            }
            received.clear(index, start / page..end / page);
        }
        Ok(())
    }

    fn command(&mut self, host: &mut dyn Host, command: Command) -> Result<(), Error> {
        match command {
            Command::OpenReturnPath => {
                if !self.input.channel().is_two_way() {
                    return Err(Error::Refused(
                        "the source wants to be answered, and this transport has no way back: \
                         switch return-path off at the source or use tcp: or unix:"
                            .into(),
                    ));
                }
                self.return_path = true;
                Ok(())
            }
            Command::Ping(value) if Features::asked_by(value).is_some() => {
                let theirs = Features::asked_by(value).unwrap_or_default();
                self.agreed = theirs.and(Features::of_destination(host.takes_small_pieces()));
                self.answer(&ReturnMessage::Pong(self.agreed.answer()))
            }
            Command::Ping(PING_PARKED) if self.agreed.has(Features::MULTIFD_GOES_ON) => {
                if let Some(receivers) = &self.receivers {
                    receivers.wait_for_all()?;
                }
                self.answer(&ReturnMessage::Pong(PING_PARKED))
            }
            Command::Ping(value) => {
                // Behind the devices of our own machines the question is whether they load.
                if self.own_machine && !self.sections.is_empty() {
                    let own = self.sections.take();
                    self.load(host, Devices::Own(own))?;
                }
                self.answer(&ReturnMessage::Pong(value))
            }
            // A source that could go over to postcopy later, and has not yet.
            Command::PostcopyAdvise(sizes) => {
                self.advised = sizes.is_some();
                Ok(())
            }
            Command::RamDiscard(discard) => self.discard(&discard),
            Command::Identity(identity) if self.agreed.has(Features::RECOVERS) => {
                self.identity = Some(identity);
                Ok(())
            }
            Command::SwitchoverStart => Ok(()),
            Command::EnableColo => match &mut self.replica {
                Some(replica) => {
                    replica.enabled = true;
                    Ok(())
                }
                None => Err(Error::Refused(
                    "main channel: capability x-colo is on at the source, and off here: set the same \
                     on both sides"
                        .into(),
                )),
            },
            other => Err(unsupported(other.name())),
        }
    }

    fn record(&mut self, record: RamRecord) -> Result<(), Error> {
        let Some(placing) = &mut self.placing else {
            return Err(unsupported("a page before the block list"));
        };
        match record {
            other if self.loaded && other != RamRecord::EndOfSection => {
                Err(Error::Refused(format!(
                    "main channel, before byte {}: {other:?} behind the devices",
                    self.input.decoder().offset()
                )))
            }
            RamRecord::PageFollows { block, offset, .. } => {
                let place = Place { block: block.get(), offset: offset.0 };
                self.input.take_page(placing.block(place), place.offset)?;
                placing.placed(place);
                count(&self.placed, 1);
                Ok(())
            }
            RamRecord::Zero { block, offset } => {
                count(&self.placed, 1);
                placing.place_zero(Place { block: block.get(), offset: offset.0 })
            }
            RamRecord::XbzrleFollows { block, offset, len } => {
                let place = Place { block: block.get(), offset: offset.0 };
                delta(&mut self.input, placing.block(place), place.offset, len)?;
                placing.placed(place);
                Ok(())
            }
            RamRecord::EndOfSection => match &mut self.receivers {
                Some(receivers) => receivers.section_ends(),
                None => Ok(()),
            },
            RamRecord::MultifdFlush => match &mut self.receivers {
                Some(receivers) => receivers.mark(),
                None => Err(Error::Refused(
                    "main channel: the source has capability multifd on and this side has not: \
                     set the same on both sides, and the same multifd-channels"
                        .into(),
                )),
            },
        }
    }

    fn answer(&mut self, message: &ReturnMessage) -> Result<(), Error> {
        send(self.input.channel(), message)
    }

    /// The guest has all it needs and is on its way: says so, and ends the connection.
    pub(crate) fn finish(mut self) -> Result<(), Error> {
        let told = self.last_word_of_all();
        self.read_to_the_end(told.is_ok())?;
        told.and(self.input.into_channel().finish())
    }

    /// The same of a connection that may be followed by another one; says whether the source says
    /// that it has heard it.
    pub(super) fn say_farewell(&mut self) -> bool {
        let told = self.last_word_of_all();
        let last = self.read_to_the_end(told.is_ok()).unwrap_or_default();
        self.input.channel().hang_up();
        told.is_ok() && farewell::is_farewell(&last)
    }

    fn last_word_of_all(&mut self) -> Result<(), Error> {
        match self.return_path {
            true => self.last_word(&ReturnMessage::Shut(0)),
            false => Ok(()),
        }
    }

    /// What is still coming (the description of our own machines) only explains; but closed before
    /// the source has, the connection could lose the answer. So also when there is no time to lose:
    /// whoever is told of the guest's arrival may move it on at once. Gives the last bytes.
    fn read_to_the_end(&mut self, told: bool) -> Result<Vec<u8>, Error> {
        let (mut rest, mut deadline) = ([0; 4096], Instant::now() + GOODBYE);
        let mut last = Vec::new();
        let channel = self.input.channel();
        while Instant::now() < deadline {
            match channel.receive_until(&mut rest, deadline) {
                Ok(Some(bytes @ 1..)) => {
                    last.extend_from_slice(&rest[..bytes]);
                    last.drain(..last.len().saturating_sub(FAREWELL.len()));
                }
                Err(Error::Cancelled) if told => {
                    channel.heed(Cancel::new().map_err(Error::system("making an eventfd"))?);
                    deadline = deadline.min(Instant::now() + HURRIED_GOODBYE);
                }
                _ => break,
            }
        }
        Ok(last)
    }

    /// What makes the migration itself, where it comes from a whimbrel.
    pub(super) fn identity(&self) -> Option<Identity> {
        self.identity
    }

    /// The RAM that comes.
    pub(super) fn ram(&self) -> Option<&GuestRam> {
        self.setup.as_ref().map(|setup| &setup.ram)
    }

    /// The main channel.
    pub(super) fn input(&mut self) -> &mut Input {
        &mut self.input
    }

    /// The migration failed here: tells the source, as far as it listens.
    pub(crate) fn fail(mut self) {
        if self.return_path {
            // One whose connection is what failed hears of it otherwise.
            let _ = self.last_word(&ReturnMessage::Shut(1));
        }
    }

    /// Says it at once, though all waits may have been ended: a source that does not read is told
    /// nothing.
    fn last_word(&mut self, message: &ReturnMessage) -> Result<(), Error> {
        let now = Cancel::new().map_err(Error::system("making an eventfd"))?;
        let waits = self.input.channel().heed(now);
        let told = match self.input.channel().ready_to_send(Some(Duration::ZERO)) {
            Ok(Woken::Ready) => self.answer(message),
            Ok(Woken::Cancelled | Woken::TimedOut) => Err(Error::Cancelled),
            Err(error) => Err(error),
        };
        self.input.channel().heed(waits);
        told
    }
}

/// Applies the delta of `len` bytes that follows to the page at `offset`.
fn delta(input: &mut Input, block: &RamBlock, offset: u64, len: usize) -> Result<(), Error> {
    let mut delta = [0; PAGE];
    let delta = &mut delta[..len];
    let at = input.decoder().offset();
    input.take_bytes(delta, "a delta")?;
    let mut page = [0; PAGE];
    block.read(offset, &mut page)?;
    xbzrle::decode(delta, &mut page).map_err(|source| Error::Delta {
        channel: "main",
        offset: at,
        source,
    })?;
    block.write(offset, &page)?;
    Ok(())
}

fn count(placed: &AtomicU64, pages: usize) {
    placed.fetch_add((pages * PAGE) as u64, Ordering::Relaxed);
}

fn send(channel: &mut Channel, message: &ReturnMessage) -> Result<(), Error> {
    let mut bytes = Vec::new();
    message.encode(&mut bytes);
    channel.send_bytes(&bytes)
}

fn unsupported(what: &str) -> Error {
    Error::Refused(format!("main channel: {what} is not supported here"))
}
