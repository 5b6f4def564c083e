//! The main channel: a decoder that follows the whole stream from its header to its end.

use alloc::boxed::Box;
use alloc::collections::BTreeSet;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::num::NonZeroUsize;

use crate::blocks::{EntryFields, Setup};
use crate::colo::ColoStep;
use crate::cursor::{Cursor, Stop, bad};
use crate::decoded::{Decoded, MainOptions};
use crate::device::DeviceState;
use crate::device_tail::DeviceTail;
use crate::header::capability;
use crate::order::{Order, Phase};
use crate::record::RecordParser;
use crate::section::mark;
use crate::section_collector::SectionCollector;
use crate::vmdesc::VM_DESCRIPTION_MAX;
use crate::{
    BlockList, ColoMessage, Command, Configuration, Delimiting, Error, ErrorKind, FileHeader,
    HEADER_MAX, RamRecord, RecordFormat, SectionHeader, SectionId, TargetPage,
};

/// The section of guest RAM.
pub const RAM_SECTION: &str = "ram";

/// The one version of the `ram` section in use.
pub const RAM_VERSION: u32 = 4;

/// What the next bytes are.
#[derive(Debug)]
enum State {
    Header,
    Configuration,
    Top,
    /// The first word of the `ram` section.
    SetupWord(SectionId),
    /// Entries of the block list.
    Setup(SectionId, Box<Setup>),
    Records(SectionId),
    Footer(SectionId),
    Section(Box<SectionCollector>),
    Tail(Box<DeviceTail>),
    AfterEof,
    Description {
        len: usize,
        bytes: Vec<u8>,
    },
    Colo,
}

/// Where the `ram` section stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Ram {
    Unknown,
    Started(SectionId),
    Ended(SectionId),
}

/// Most sections whose numbers are remembered.
const SECTIONS_MAX: usize = 1 << 16;

/// Follows a main channel.
///
/// It is given the bytes not yet consumed, in pieces of any size, and says what they are.
/// Bytes of pages, packages and checkpoints are the caller's: after a message that announces
/// them ([`payload_left`](Self::payload_left) is not zero) the caller takes them off the channel
/// and says so ([`payload_taken`](Self::payload_taken)).
#[derive(Debug)]
pub struct MainDecoder {
    options: MainOptions,
    state: State,
    offset: u64,
    payload: u64,
    page: TargetPage,
    fields: EntryFields,
    own_length: bool,
    order: Order,
    ram: Ram,
    /// A recovery seen without its beginning: PART and END are taken as RAM's.
    learn: bool,
    /// Numbers of the sections seen.
    bound: BTreeSet<SectionId>,
    /// Inside a COLO checkpoint, or pages ahead of one.
    checkpoint: bool,
    colo_step: ColoStep,
    records: RecordParser,
}

impl MainDecoder {
    /// For a connection or file that begins with the header.
    #[must_use]
    pub fn new(options: MainOptions) -> Self {
        let page = options.target_page.unwrap_or_default();
        Self {
            state: State::Header,
            offset: options.start_offset,
            payload: 0,
            page,
            fields: EntryFields::default(),
            own_length: false,
            order: Order::new(),
            ram: Ram::Unknown,
            learn: false,
            bound: BTreeSet::new(),
            checkpoint: false,
            colo_step: ColoStep::Request,
            records: RecordParser::new(Arc::default(), page, RecordFormat::Precopy),
            options,
        }
    }

    /// For the connection that takes the place of a broken one in a recovery, which has no
    /// header: the sections and blocks are those of the connection before.
    ///
    /// # Errors
    /// When the connection before had not reached its postcopy phase.
    pub fn reconnected(self) -> Result<Self, ErrorKind> {
        let (Ram::Started(id) | Ram::Ended(id)) = self.ram else {
            return Err(not_recoverable());
        };
        if self.order.phase != Phase::Postcopy {
            return Err(not_recoverable());
        }
        let blocks = Arc::clone(self.records.blocks());
        Ok(Self {
            state: State::Top,
            offset: 0,
            payload: 0,
            order: Order::recovery(),
            ram: Ram::Started(id),
            records: RecordParser::new(blocks, self.page, RecordFormat::Postcopy),
            ..self
        })
    }

    /// For looking at the stream of a recovery recorded alone: takes PART and END of any section
    /// as RAM's, and every block and offset. Never for placing pages.
    #[must_use]
    pub fn learning_recovery(options: MainOptions) -> Self {
        let mut decoder = Self::new(options);
        decoder.state = State::Top;
        decoder.order = Order::recovery();
        decoder.learn = true;
        decoder.records.set_format(RecordFormat::Postcopy);
        decoder.records.learn_blocks();
        decoder
    }

    /// Looks at the bytes not yet consumed and returns how many of them it consumed, and what
    /// they were. Both may say that nothing is complete yet: some bytes consumed, and
    /// [`Decoded::NeedMore`].
    ///
    /// # Errors
    /// When the bytes break the protocol. The decoder must not be used again.
    ///
    /// # Panics
    /// When the bytes that follow the last message were not [taken](Self::payload_taken).
    #[inline]
    pub fn decode(&mut self, input: &[u8]) -> Result<(usize, Decoded), Error> {
        assert!(self.payload == 0, "what follows the last message is the caller's to take");
        if let State::Records(_) = self.state {
            let mut cursor = Cursor::new(input);
            let outcome = self.records.parse(&mut cursor);
            if let Ok(record @ RamRecord::PageFollows { len, .. }) = outcome {
                self.offset += cursor.at() as u64;
                self.payload = len as u64;
                return Ok((cursor.at(), Decoded::Ram(record)));
            }
            let outcome = outcome.map(|record| Some(self.after_record(record)));
            let (taken, decoded) = self.settle(&cursor, outcome)?;
            return Ok((taken, decoded.unwrap_or(need_more(1))));
        }
        self.decode_other(input)
    }

    fn decode_other(&mut self, input: &[u8]) -> Result<(usize, Decoded), Error> {
        let mut consumed = 0;
        loop {
            let rest = input.get(consumed..).unwrap_or_default();
            if let Some(outcome) = self.collect(rest) {
                let (taken, decoded) = outcome?;
                return Ok((consumed + taken, decoded));
            }
            // Headers are read from no more than `HEADER_MAX` bytes, however large the input
            // is: so its size decides nothing.
            let mut cursor = Cursor::new(rest.get(..HEADER_MAX).unwrap_or(rest));
            let outcome = self.step(&mut cursor);
            match self.settle(&cursor, outcome)? {
                (taken, Some(decoded)) => return Ok((consumed + taken, decoded)),
                (taken, None) => consumed += taken,
            }
        }
    }

    /// Accounts for what was read and turns a stop into an error at its place.
    fn settle(
        &mut self,
        cursor: &Cursor<'_>,
        outcome: Result<Option<Decoded>, Stop>,
    ) -> Result<(usize, Option<Decoded>), Error> {
        match outcome {
            Ok(decoded) => {
                self.offset += cursor.at() as u64;
                Ok((cursor.at(), decoded))
            }
            Err(Stop::NeedMore(need)) if need > HEADER_MAX => {
                let (found, limit) = (need as u64, HEADER_MAX as u64);
                let what = "bytes of a header";
                Err(Error::new(self.offset, ErrorKind::TooLarge { what, found, limit }))
            }
            Err(Stop::NeedMore(need)) => Ok((0, Some(need_more(need)))),
            Err(Stop::Bad { at, kind }) => {
                Err(Error::new(self.offset.saturating_add(at as u64), kind))
            }
        }
    }

    /// The states that hold bytes: they take what there is.
    fn collect(&mut self, input: &[u8]) -> Option<Result<(usize, Decoded), Error>> {
        let outcome = match &mut self.state {
            State::Section(collector) => collector.feed(input).map(|(taken, section)| {
                (taken, section.map(|section| (State::Top, Decoded::DeviceSection(section))))
            }),
            State::Tail(tail) => tail.feed(input).map(|(taken, state)| {
                let decoded = |state| (State::Colo, Decoded::DeviceState(Box::new(state)));
                (taken, state.map(decoded))
            }),
            State::Description { len, bytes } => {
                let want = *len - bytes.len();
                let taken = input.get(..want).unwrap_or(input);
                bytes.extend_from_slice(taken);
                let complete = (bytes.len() == *len).then(|| core::mem::take(bytes));
                let decoded = complete.map(|json| (State::Colo, Decoded::VmDescription(json)));
                Ok((taken.len(), decoded))
            }
            State::Header
            | State::Configuration
            | State::Top
            | State::SetupWord(_)
            | State::Setup(..)
            | State::Records(_)
            | State::Footer(_)
            | State::AfterEof
            | State::Colo => return None,
        };
        Some(outcome.map(|(taken, complete)| {
            self.offset += taken as u64;
            match complete {
                None => (taken, need_more(1)),
                Some((next, decoded)) => {
                    self.state = next;
                    (taken, decoded)
                }
            }
        }))
    }

    /// Reads one thing; all of its bytes or none. `None` when it is no message of its own.
    fn step(&mut self, cursor: &mut Cursor<'_>) -> Result<Option<Decoded>, Stop> {
        match &mut self.state {
            State::Header => {
                let header = FileHeader::parse(cursor)?;
                self.state = State::Configuration;
                Ok(Some(Decoded::Header(header)))
            }
            // Machine types of QEMU 2.3 and before send none.
            State::Configuration if cursor.peek()? != mark::CONFIGURATION => {
                self.state = State::Top;
                Ok(None)
            }
            State::Configuration => self.configuration(cursor).map(Some),
            State::Top => self.top(cursor),
            State::SetupWord(id) => {
                let setup = Setup::parse(cursor, self.fields, self.page)?;
                self.state = State::Setup(*id, Box::new(setup));
                Ok(None)
            }
            State::Setup(id, setup) => {
                let id = *id;
                if setup.is_complete() {
                    let blocks = Arc::new(core::mem::take(&mut setup.list));
                    return Ok(Some(self.setup_complete(id, blocks)));
                }
                setup.parse_entry(cursor, self.offset)?;
                let read = self.offset.saturating_add(cursor.at() as u64);
                let mapped = setup.last_mapped(read);
                self.payload = mapped.map_or(0, |(_, skip)| skip);
                Ok(mapped.map(|(block, skip)| Decoded::MappedBlock { block, skip }))
            }
            State::Footer(id) => {
                let id = *id;
                id.parse_footer(cursor)?;
                self.state = State::Top;
                Ok(Some(Decoded::Footer(id)))
            }
            State::AfterEof => self.after_eof(cursor),
            State::Colo => self.colo(cursor).map(Some),
            State::Records(_) | State::Section(_) | State::Tail(_) | State::Description { .. } => {
                unreachable!("these states are decoded before")
            }
        }
    }

    fn configuration(&mut self, cursor: &mut Cursor<'_>) -> Result<Decoded, Stop> {
        let configuration = Configuration::parse(cursor)?;
        if let Some(found) = configuration.target_page {
            if let Some(expected) = self.options.target_page.filter(|page| *page != found) {
                let (expected, found) = (expected.size(), found.size());
                return bad(0, ErrorKind::TargetPage { expected, found });
            }
            self.page = found;
        }
        self.fields.guest_address = configuration.has(capability::IGNORE_SHARED);
        self.fields.mapped_ram = configuration.has(capability::MAPPED_RAM);
        self.own_length = configuration.is_whimbrel();
        self.state = State::Top;
        Ok(Decoded::Configuration(configuration))
    }

    fn setup_complete(&mut self, id: SectionId, blocks: Arc<BlockList>) -> Decoded {
        let mapped = self.fields.mapped_ram;
        let format = if mapped { RecordFormat::MappedRam } else { RecordFormat::Precopy };
        self.records = RecordParser::new(Arc::clone(&blocks), self.page, format);
        self.state = State::Records(id);
        Decoded::RamSetup(blocks)
    }

    fn top(&mut self, cursor: &mut Cursor<'_>) -> Result<Option<Decoded>, Stop> {
        match cursor.u8()? {
            mark::EOF => self.eof().map(Some),
            mark::START => self.start(cursor).map(Some),
            mark::PART => {
                let id = self.ram_section(SectionId(cursor.be32()?), false)?;
                self.state = State::Records(id);
                Ok(Some(Decoded::SectionPart(id)))
            }
            mark::END => {
                let id = self.ram_section(SectionId(cursor.be32()?), self.checkpoint)?;
                self.ram = Ram::Ended(id);
                self.state = State::Records(id);
                Ok(Some(Decoded::SectionEnd(id)))
            }
            mark::FULL => self.full(cursor),
            mark::COMMAND => self.command(cursor).map(Some),
            found => {
                let expected = "a section, a command or the end of the stream";
                bad(0, ErrorKind::Unexpected { expected, found: found.into() })
            }
        }
    }

    fn eof(&mut self) -> Result<Decoded, Stop> {
        let Ram::Ended(_) = self.ram else {
            let (expected, found) = ("the end of section \"ram\" before that of the stream", 0);
            return bad(0, ErrorKind::Unexpected { expected, found });
        };
        let words = self.checkpoint || self.order.phase == Phase::Postcopy;
        self.state = if words { State::Colo } else { State::AfterEof };
        self.checkpoint = false;
        Ok(Decoded::Eof)
    }

    fn start(&mut self, cursor: &mut Cursor<'_>) -> Result<Decoded, Stop> {
        let header = SectionHeader::parse(cursor)?;
        let id = header.id;
        if header.name != RAM_SECTION {
            return bad(0, ErrorKind::UnknownSection { name: header.name });
        }
        if header.instance_id != 0 {
            let (expected, found) = ("instance 0 of section \"ram\"", header.instance_id.into());
            return bad(0, ErrorKind::Unexpected { expected, found });
        }
        if header.version_id != RAM_VERSION {
            let (what, expected) = ("section \"ram\"", RAM_VERSION);
            return bad(0, ErrorKind::Version { what, expected, found: header.version_id });
        }
        if self.ram != Ram::Unknown || self.order.phase == Phase::Postcopy {
            let problem = "starts \"ram\" a second time";
            return bad(0, ErrorKind::SectionOrder { id, problem });
        }
        self.bind(&header)?;
        self.order.setup_done();
        self.fields.page_size = self.order.ram_advised;
        self.ram = Ram::Started(id);
        self.state = State::SetupWord(id);
        Ok(Decoded::SectionStart(header))
    }

    /// Checks that a PART or END is of RAM, and that RAM has not ended before.
    fn ram_section(&mut self, id: SectionId, again: bool) -> Result<SectionId, Stop> {
        let problem = match self.ram {
            _ if self.order.waits_for_resume() => "comes before POSTCOPY_RESUME",
            _ if self.checkpoint && !again => "is not part of a checkpoint",
            Ram::Unknown if self.learn => return Ok(self.learn_ram(id)),
            Ram::Started(ram) if ram == id => return Ok(id),
            Ram::Ended(ram) if ram == id && again => return Ok(id),
            Ram::Ended(ram) if ram == id => "goes on after its end",
            Ram::Unknown | Ram::Started(_) | Ram::Ended(_) => "was never started",
        };
        bad(0, ErrorKind::SectionOrder { id, problem })
    }

    const fn learn_ram(&mut self, id: SectionId) -> SectionId {
        self.ram = Ram::Started(id);
        id
    }

    fn full(&mut self, cursor: &mut Cursor<'_>) -> Result<Option<Decoded>, Stop> {
        let early = match self.ram {
            _ if self.checkpoint => None,
            Ram::Unknown if self.order.phase != Phase::Postcopy => Some(true),
            Ram::Ended(_) if self.order.phase != Phase::Postcopy => Some(false),
            Ram::Unknown | Ram::Started(_) | Ram::Ended(_) => None,
        };
        if early == Some(false) && !self.own_length {
            let tail = DeviceTail::new(self.offset, self.options.device_state_max);
            self.state = State::Tail(Box::new(tail));
            // Nothing of the section is read: the tail begins with its mark.
            *cursor = Cursor::new(&[]);
            return Ok(Some(Decoded::DeviceStateBegins));
        }
        let header = SectionHeader::parse(cursor)?;
        if early.is_none() {
            let problem = "brings device state while RAM is not complete, or outside its package";
            return bad(0, ErrorKind::SectionOrder { id: header.id, problem });
        }
        self.bind(&header)?;
        let base = self.offset.saturating_add(cursor.at() as u64);
        let limit = self.options.device_state_max;
        let collector = SectionCollector::new(header, base, limit, self.own_length);
        self.state = State::Section(Box::new(collector));
        Ok(None)
    }

    /// Notes the number of a section, which is bound once.
    fn bind(&mut self, header: &SectionHeader) -> Result<(), Stop> {
        if self.bound.len() == SECTIONS_MAX {
            let (found, limit) = (SECTIONS_MAX as u64 + 1, SECTIONS_MAX as u64);
            return bad(0, ErrorKind::TooLarge { what: "sections", found, limit });
        }
        if self.bound.insert(header.id) {
            return Ok(());
        }
        let problem = "has a number that another section has";
        bad(0, ErrorKind::SectionOrder { id: header.id, problem })
    }

    fn command(&mut self, cursor: &mut Cursor<'_>) -> Result<Decoded, Stop> {
        let command = Command::parse(cursor)?;
        if let Err(kind) = self.order.take(&command) {
            return bad(0, kind);
        }
        let Command::Packaged { len } = command else { return Ok(Decoded::Command(command)) };
        if len == 0 || len > self.options.package_max {
            let (what, limit) = ("bytes of a package (1 at least)", self.options.package_max);
            let (found, limit) = (len.into(), limit.into());
            return bad(5, ErrorKind::TooLarge { what, found, limit });
        }
        self.records.set_format(RecordFormat::Postcopy);
        self.payload = len.into();
        Ok(Decoded::PackageFollows { len })
    }

    fn after_record(&mut self, record: RamRecord) -> Decoded {
        self.payload = RecordParser::payload_of(record) as u64;
        if let (RamRecord::EndOfSection, State::Records(id)) = (record, &self.state) {
            self.state = State::Footer(*id);
        }
        Decoded::Ram(record)
    }

    fn after_eof(&mut self, cursor: &mut Cursor<'_>) -> Result<Option<Decoded>, Stop> {
        if cursor.peek()? != mark::VM_DESCRIPTION {
            self.state = State::Colo;
            return Ok(None);
        }
        cursor.u8()?;
        let len = cursor.be32()?;
        let limit = VM_DESCRIPTION_MAX.min(self.options.device_state_max);
        match usize::try_from(len) {
            Ok(len) if len <= limit => {
                self.state = State::Description { len, bytes: Vec::new() };
                Ok(None)
            }
            Ok(_) | Err(_) => {
                let what = "bytes of the description of the device state";
                let (found, limit) = (len.into(), limit as u64);
                bad(1, ErrorKind::TooLarge { what, found, limit })
            }
        }
    }

    fn colo(&mut self, cursor: &mut Cursor<'_>) -> Result<Decoded, Stop> {
        let first = cursor.peek()?;
        if !self.options.colo || self.order.phase == Phase::Postcopy {
            return bad(0, ErrorKind::Trailing { found: first });
        }
        let message = ColoMessage::parse(cursor)?;
        match self.colo_step.take(message) {
            Ok(next) => self.colo_step = next,
            Err(kind) => return bad(0, kind),
        }
        if let ColoMessage::VmstateSize(len) = message {
            self.payload = len;
            return Ok(Decoded::CheckpointFollows { len });
        }
        if matches!(message, ColoMessage::VmstateSend | ColoMessage::PagesAhead) {
            self.state = State::Top;
            self.checkpoint = true;
        }
        Ok(Decoded::Colo(message))
    }

    /// Says that the caller took `len` of the bytes that follow the last message off the channel.
    ///
    /// # Panics
    /// When fewer bytes than that follow.
    #[inline]
    pub fn payload_taken(&mut self, len: u64) {
        self.payload = self.payload.checked_sub(len).expect("no more than was announced follows");
        self.offset = self.offset.saturating_add(len);
    }

    /// Bytes that the caller has still to take.
    #[must_use]
    pub const fn payload_left(&self) -> u64 {
        self.payload
    }

    /// Position in the stream of the next byte.
    #[must_use]
    pub const fn offset(&self) -> u64 {
        self.offset
    }

    /// The guest's page size.
    #[must_use]
    pub const fn target_page(&self) -> TargetPage {
        self.page
    }

    /// The announced blocks; empty before [`Decoded::RamSetup`].
    #[must_use]
    pub const fn blocks(&self) -> &Arc<BlockList> {
        self.records.blocks()
    }

    /// The blocks announced so far, while the list is being read.
    #[must_use]
    pub fn blocks_so_far(&self) -> &BlockList {
        if let State::Setup(_, setup) = &self.state { &setup.list } else { self.records.blocks() }
    }

    /// How the device sections of this stream, and of packages in it, are told apart.
    #[must_use]
    pub const fn delimiting(&self) -> Delimiting {
        if self.own_length { Delimiting::OwnLength } else { Delimiting::Footers }
    }

    /// Whether the last record of a page named its block although that is optional.
    #[must_use]
    pub const fn last_was_named(&self) -> bool {
        self.records.last_was_named()
    }

    /// Whether the stream may end here. In a precopy stream a description may still follow EOF.
    #[must_use]
    pub const fn is_complete(&self) -> bool {
        self.payload == 0 && matches!(self.state, State::AfterEof | State::Colo)
    }

    /// The value of a PING that waits for its answer behind QEMU's device state, which cannot be
    /// told to be complete before the stream goes on ([`DeviceTail::ends_with_ping`]).
    #[must_use]
    pub fn waiting_ping(&self) -> Option<u32> {
        if let State::Tail(tail) = &self.state { tail.ends_with_ping() } else { None }
    }

    /// The channel was closed by the peer, and `rest` was not consumed. Returns the device state
    /// of a QEMU that sent no description, if there is one.
    ///
    /// # Errors
    /// When the stream may not end here.
    pub fn close(self, rest: &[u8]) -> Result<Option<DeviceState>, Error> {
        let complete = self.is_complete();
        let expected = match self.state {
            _ if self.payload != 0 => "the rest of a page, package or block",
            State::Tail(tail) if rest.is_empty() => return tail.finish_at_close().map(Some),
            State::AfterEof | State::Colo if complete && rest.is_empty() => return Ok(None),
            State::Header => "the magic \"QEVM\" and a version",
            State::Configuration => "the configuration",
            State::Top => "a section, a command or the end of the stream",
            State::SetupWord(_) | State::Setup(..) => "the RAM block list",
            State::Records(_) => "a RAM record",
            State::Footer(_) => "the footer of section \"ram\"",
            State::Section(_) | State::Tail(_) => "the rest of the device state",
            State::AfterEof | State::Description { .. } => "the description of the device state",
            State::Colo => "a COLO message",
        };
        let at = self.offset.saturating_add(rest.len() as u64);
        Err(Error::new(at, ErrorKind::Truncated { expected }))
    }
}

fn not_recoverable() -> ErrorKind {
    let (command, state) = ("RECV_BITMAP", "only a migration in its postcopy phase recovers");
    ErrorKind::CommandOrder { command, state }
}

fn need_more(need: usize) -> Decoded {
    Decoded::NeedMore(NonZeroUsize::new(need).unwrap_or(NonZeroUsize::MIN))
}
