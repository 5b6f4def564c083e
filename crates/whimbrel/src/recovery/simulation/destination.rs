//! The destination's threads: what drives a [`DestinationExchange`] and the decoders, as
//! `destination/{session,recover,fault,farewell}.rs` do.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use whimbrel_ram::{BlockIndex, Received, TargetPage};
use whimbrel_wire::recovery::{FAREWELL, Hello, HelloKind, Proof};
use whimbrel_wire::return_path::{encode_bitmap_end, encode_bitmap_size};
use whimbrel_wire::{
    BlockOffset, Command, Decoded, MainDecoder, RamRecord, RecordDecoded, RecordDecoder,
    RecordFormat, ReturnMessage,
};

use super::door::{Door, Visitor};
use super::net::{Broken, End, Line};
use super::shape::{PAGE, Shape};
use super::world::{Actor, BEAT, SILENCE, World};
use crate::recovery::ANSWER;
use crate::recovery::exchange::{DestinationExchange, Say, bitmap_words};
use crate::recovery::proofs::{Attempt, Proofs, Ticket};
use crate::source::setup::name;

/// A request without an answer is sent again after this long, and then ever more seldom.
const ASK_AGAIN: Duration = Duration::from_secs(1);
const ASK_AGAIN_MAX: Duration = Duration::from_secs(16);
/// How long nothing may come when the source has sent everything and pages are still missing.
const REST: Duration = Duration::from_secs(30);
/// How long RUN, which may be on its way, is waited for when another channel has failed.
const RUN_MAY_COME: Duration = Duration::from_secs(1);
/// How long the source's farewell is waited for.
const GOODBYE: Duration = Duration::from_secs(5);

/// A unit asked for: its block, and where it begins.
type Request = (BlockIndex, u64);

#[derive(Debug)]
struct Waiting {
    since: Duration,
    written: Option<Duration>,
    again_after: Duration,
}

/// What comes on one channel, put together to whole units.
#[derive(Debug, Default)]
struct Coming {
    /// The page whose content follows.
    page: Option<(BlockIndex, u64)>,
    /// The unit that has come in part: its first page, and which parts.
    unit: Option<(BlockIndex, u64, u64)>,
}

#[derive(Debug)]
enum State {
    /// RUN has not come.
    Run,
    Session,
    /// The source has sent everything.
    Rest(Duration),
    Paused,
    MeetWhimbrel {
        exchange: DestinationExchange,
        deadline: Duration,
    },
    MeetQemu(DestinationExchange),
    /// SHUT has been said; the source's last bytes come.
    LastWord {
        last: Vec<u8>,
        deadline: Duration,
    },
    /// Everything is here, and the source may not know.
    SeeOff,
    /// It has come back for the last word.
    Again {
        exchange: DestinationExchange,
        proved: bool,
        deadline: Duration,
    },
    Done,
    Failed,
    /// One of these is being changed.
    Busy,
}

impl State {
    /// When it is over, whatever comes.
    fn deadline(&self) -> Option<Duration> {
        match self {
            State::Rest(until) => Some(*until),
            State::MeetWhimbrel { deadline, .. }
            | State::LastWord { deadline, .. }
            | State::Again { deadline, .. } => Some(*deadline),
            _ => None,
        }
    }
}

#[derive(Debug)]
pub(super) struct Destination {
    state: State,
    pub(super) received: Received,
    pub(super) proofs: Option<Proofs>,
    pub(super) door: Door,
    /// The connections are of no use any more.
    pub(super) broken: bool,
    decoder: Option<MainDecoder>,
    main: Option<Line>,
    urgent: Option<(Line, RecordDecoder)>,
    coming: [Coming; 2],
    /// When something came last.
    heard: Duration,
    asked: BTreeMap<Request, Waiting>,
    outbox: Outbox,
    run_may_come: Option<Duration>,
}

/// The return path, and what is to be said on it.
#[derive(Debug, Default)]
struct Outbox {
    line: Option<Line>,
    say: VecDeque<Say>,
    requests: VecDeque<Request>,
    asks: bool,
    last: Option<BlockIndex>,
}

impl Destination {
    pub(super) fn new(
        shape: &Shape,
        received: Received,
        (main, urgent): (Line, Option<Line>),
        qemu: bool,
    ) -> Destination {
        Destination {
            state: State::Run,
            received,
            proofs: (!qemu).then(|| Proofs::of(shape.identity)),
            door: Door::default(),
            broken: false,
            decoder: Some(shape.decoder()),
            main: Some(main),
            urgent: urgent.map(|urgent| (urgent, records(shape))),
            coming: Default::default(),
            heard: Duration::ZERO,
            asked: BTreeMap::new(),
            outbox: Outbox {
                line: Some(main),
                say: VecDeque::from([Say::Requests]),
                ..Outbox::default()
            },
            run_may_come: None,
        }
    }

    pub(super) fn is_done(&self) -> bool {
        matches!(self.state, State::Done)
    }

    pub(super) fn has_failed(&self) -> bool {
        matches!(self.state, State::Failed)
    }

    /// Everything is here, and only the source does not say that it knows.
    pub(super) fn sees_off(&self) -> bool {
        matches!(self.state, State::SeeOff)
    }

    /// A vCPU waits for a page.
    pub(super) fn wait_for(&mut self, block: BlockIndex, page: u64, shape: &Shape, now: Duration) {
        let unit = shape.unit(block).bytes() as u64;
        let offset = TargetPage(page).offset();
        let request = (block, offset - offset % unit);
        if self.asked.contains_key(&request) {
            return;
        }
        let waiting = Waiting { since: now, written: None, again_after: ASK_AGAIN };
        self.asked.insert(request, waiting);
        if self.outbox.asks {
            self.outbox.requests.push_back(request);
        }
    }

    /// These pages have come.
    pub(super) fn forget_asked(&mut self, block: BlockIndex, first: u64, pages: u64) {
        for page in first..first + pages {
            self.asked.remove(&(block, TargetPage(page).offset()));
        }
    }

    fn unanswered(&mut self) -> VecDeque<Request> {
        let mut all: Vec<_> =
            self.asked.iter().map(|(request, waiting)| (waiting.since, *request)).collect();
        all.sort_unstable();
        self.asked.values_mut().for_each(|waiting| waiting.again_after = ASK_AGAIN);
        all.into_iter().map(|(_, request)| request).collect()
    }

    fn has_all(&self) -> bool {
        self.received.missing() == 0
    }
}

fn records(shape: &Shape) -> RecordDecoder {
    let page = whimbrel_wire::TargetPage::FOUR_KIB;
    RecordDecoder::new(shape.blocks.clone(), page, RecordFormat::Postcopy)
}

impl World<'_> {
    /// One step of `dest/main`.
    pub(super) fn destination_main(&mut self) {
        let state = std::mem::replace(&mut self.destination.state, State::Busy);
        let next = match state {
            State::Run => self.take_run(),
            State::Session | State::Rest(_) | State::MeetWhimbrel { .. } | State::MeetQemu(_)
                if self.destination.broken =>
            {
                Err(Broken)
            }
            State::Session => self.take_main(),
            State::Rest(until) if self.destination.has_all() || self.now >= until => {
                if self.destination.has_all() { Ok(self.last_word()) } else { Err(Broken) }
            }
            State::Paused => self.look_for_visitor(),
            State::MeetWhimbrel { exchange, deadline } => self.meet_whimbrel(exchange, deadline),
            State::MeetQemu(exchange) => self.meet_qemu(exchange),
            State::LastWord { last, deadline } => Ok(self.hear_farewell(last, deadline)),
            State::SeeOff => Ok(self.look_who_comes_again()),
            State::Again { exchange, proved, deadline } => {
                let told = self.tell_again(exchange, proved, deadline);
                Ok(told.unwrap_or_else(|Broken| self.see_off()))
            }
            other => Ok(other),
        };
        self.destination.state = next.unwrap_or_else(|Broken| self.destination_breaks());
        if let Some(deadline) = self.destination.state.deadline() {
            self.wake_at(Actor::DestinationMain, deadline);
        }
    }

    fn destination_breaks(&mut self) -> State {
        self.hang_up();
        if self.destination.has_all() && self.guest.runs {
            return self.after_all();
        }
        if self.destination.proofs.is_none() && !self.guest.runs {
            return State::Failed; // It is not known whether the guest is ours.
        }
        self.door_is_paused();
        self.wake(Actor::DestinationMain);
        State::Paused
    }

    fn hang_up(&mut self) {
        let urgent = self.destination.urgent.take().map(|(line, _)| line);
        for line in self.destination.main.take().into_iter().chain(urgent) {
            self.close(line, End::Destination);
        }
        self.destination.broken = false;
        self.destination.outbox = Outbox::default();
        self.destination.coming = Default::default();
    }

    fn take_run(&mut self) -> Result<State, Broken> {
        let line = self.destination.main.expect("the first connection");
        let run = &self.shape.run;
        let here = self.net.here(line, End::Destination);
        if here.len() >= run.len() {
            assert!(here.starts_with(run), "RUN goes out first");
            self.net.take(line, End::Destination, run.len());
            let decoder = self.destination.decoder.as_mut().expect("between two messages");
            decoder.payload_taken(run.len() as u64);
            self.runs();
            self.destination.heard = self.now;
            self.wake(Actor::DestinationMain);
            return Ok(State::Session);
        }
        if self.net.is_over(line, End::Destination) {
            return Err(Broken);
        }
        if self.destination.broken {
            // It may be on its way.
            let until = *self.destination.run_may_come.get_or_insert(self.now + RUN_MAY_COME);
            if self.now >= until {
                return Err(Broken);
            }
            self.wake_at(Actor::DestinationMain, until);
        }
        Ok(State::Run)
    }

    /// One message of the main channel.
    fn take_main(&mut self) -> Result<State, Broken> {
        let line = self.destination.main.expect("in a session");
        if self.destination.proofs.is_some() {
            // The source has promised to say something.
            let until = self.destination.heard + SILENCE.max(4 * BEAT) + BEAT / 2;
            if self.now >= until {
                return Err(Broken);
            }
            self.wake_at(Actor::DestinationMain, until);
        }
        if let Some((block, offset)) = self.destination.coming[0].page {
            return match self.take_content(line, block, offset)? {
                false => self.or_over(line, State::Session),
                true => {
                    self.comes(0, block, offset)?;
                    Ok(self.go_on())
                }
            };
        }
        let here = self.net.here(line, End::Destination);
        let decoder = self.destination.decoder.as_mut().expect("between two messages");
        let (used, decoded) = decoder.decode(here).map_err(|_| Broken)?;
        self.net.take(line, End::Destination, used);
        match decoded {
            Decoded::NeedMore(_) if used > 0 => return Ok(self.go_on()),
            Decoded::NeedMore(_) => return self.or_over(line, State::Session),
            Decoded::Ram(RamRecord::PageFollows { block, offset, .. }) => {
                let block = self.block(block);
                self.destination.coming[0].page = Some((block, offset.0));
            }
            Decoded::Ram(RamRecord::Zero { block, offset }) => {
                let block = self.block(block);
                self.is_zero(block, offset.0);
                self.comes(0, block, offset.0)?;
            }
            Decoded::Command(Command::Ping(value)) => self.push(&ReturnMessage::Pong(value)),
            Decoded::Command(Command::PostcopyResume) => {}
            Decoded::Eof => {
                assert_eq!(self.destination.coming[0].unit, None, "a unit is begun and not ended");
                let patience = if self.setting.preempt { REST } else { Duration::ZERO };
                self.wake(Actor::DestinationMain);
                return Ok(State::Rest(self.now + patience));
            }
            Decoded::Ram(RamRecord::EndOfSection)
            | Decoded::SectionPart(_)
            | Decoded::SectionEnd(_)
            | Decoded::Footer(_) => {}
            _ => return Err(Broken),
        }
        Ok(self.go_on())
    }

    fn go_on(&mut self) -> State {
        self.destination.heard = self.now;
        self.wake(Actor::DestinationMain);
        State::Session
    }

    /// More has to come, if it can.
    fn or_over(&self, line: Line, state: State) -> Result<State, Broken> {
        if self.net.is_over(line, End::Destination) { Err(Broken) } else { Ok(state) }
    }

    fn block(&self, place: whimbrel_wire::BlockIndex) -> BlockIndex {
        BlockIndex(u16::try_from(place.get()).expect("few"))
    }

    /// The content of a page, if all of it has come.
    fn take_content(&mut self, line: Line, block: BlockIndex, offset: u64) -> Result<bool, Broken> {
        let Some(here) = self.net.here(line, End::Destination).get(..PAGE) else {
            return Ok(false);
        };
        let place = self.shape.place(block, TargetPage::containing(offset).0);
        let expected = self.shape.content[place].as_deref();
        assert!(expected == Some(here), "page {place} comes as another one");
        self.net.take(line, End::Destination, PAGE);
        let main = self.destination.main == Some(line);
        let coming = &mut self.destination.coming[usize::from(!main)];
        coming.page = None;
        if main {
            let decoder = self.destination.decoder.as_mut().expect("between two messages");
            decoder.payload_taken(PAGE as u64);
        } else if let Some((_, decoder)) = &mut self.destination.urgent {
            decoder.payload_taken(PAGE);
        }
        Ok(true)
    }

    fn is_zero(&self, block: BlockIndex, offset: u64) {
        let place = self.shape.place(block, TargetPage::containing(offset).0);
        assert!(self.shape.content[place].is_none(), "page {place} comes as zeros");
    }

    /// A page has come on a channel; a unit is placed when all of it has.
    fn comes(&mut self, via: usize, block: BlockIndex, offset: u64) -> Result<(), Broken> {
        let each = self.shape.unit(block).target_pages();
        let page = TargetPage::containing(offset).0;
        let (first, part) = (page - page % each, 1 << (page % each));
        let held = self.destination.coming[via].unit.take().unwrap_or((block, first, 0));
        assert_eq!((held.0, held.1), (block, first), "a unit is begun, and another one comes");
        assert_eq!(held.2 & part, 0, "a part comes twice");
        let other = self.destination.coming[1 - via].unit;
        let split = other.is_some_and(|other| (other.0, other.1) == (block, first));
        assert!(!split, "a unit comes on two channels");
        let parts: u64 = held.2 | part;
        if u64::from(parts.count_ones()) < each {
            self.destination.coming[via].unit = Some((block, first, parts));
            return Ok(());
        }
        self.places(block, first, each);
        if self.destination.has_all() {
            self.wake(Actor::DestinationMain);
        }
        Ok(())
    }

    /// One step of `dest/urgent`.
    pub(super) fn destination_urgent(&mut self) {
        let state = &self.destination.state;
        if !matches!(state, State::Session | State::Rest(_) | State::Run) {
            return;
        }
        let Some((line, mut decoder)) = self.destination.urgent.take() else {
            let beside = &mut self.destination.door.beside;
            let found = beside.iter().position(|(kind, _)| *kind == HelloKind::Urgent);
            if let Some(at) = found.filter(|_| self.setting.preempt) {
                let (_, line) = beside.swap_remove(at);
                self.destination.urgent = Some((line, records(self.shape)));
                self.attend(Some(line), End::Destination, false);
            }
            return;
        };
        let result = self.take_urgent(line, &mut decoder);
        self.destination.urgent = Some((line, decoder));
        match result {
            Ok(true) => self.wake(Actor::DestinationUrgent),
            Ok(false) => {}
            Err(Broken) => {
                self.destination.broken = true;
                self.wake(Actor::DestinationMain);
            }
        }
    }

    /// One record; says whether there may be more.
    fn take_urgent(&mut self, line: Line, decoder: &mut RecordDecoder) -> Result<bool, Broken> {
        if let Some((block, offset)) = self.destination.coming[1].page {
            if !self.take_content(line, block, offset)? {
                return self.end_of_urgent(line);
            }
            decoder.payload_taken(PAGE);
            return self.comes(1, block, offset).map(|()| true);
        }
        let here = self.net.here(line, End::Destination);
        let (used, decoded) = decoder.decode(here).map_err(|_| Broken)?;
        self.net.take(line, End::Destination, used);
        match decoded {
            RecordDecoded::NeedMore(_) => return self.end_of_urgent(line),
            RecordDecoded::Record(RamRecord::PageFollows { block, offset, .. }) => {
                self.destination.coming[1].page = Some((self.block(block), offset.0));
            }
            RecordDecoded::Record(RamRecord::Zero { block, offset }) => {
                let block = self.block(block);
                self.is_zero(block, offset.0);
                self.comes(1, block, offset.0)?;
            }
            RecordDecoded::Record(_) => return Err(Broken),
        }
        Ok(true)
    }

    fn end_of_urgent(&self, line: Line) -> Result<bool, Broken> {
        let early = self.net.is_over(line, End::Destination) && !self.destination.has_all();
        if early { Err(Broken) } else { Ok(false) }
    }

    fn look_for_visitor(&mut self) -> Result<State, Broken> {
        let Some((line, visitor)) = self.destination.door.visitor.take() else {
            return Ok(State::Paused);
        };
        self.destination.main = Some(line);
        self.destination.heard = self.now;
        self.attend(Some(line), End::Destination, true);
        match visitor {
            Visitor::Whimbrel(hello) => {
                let (exchange, say) = self.greet(&hello);
                self.connect_outbox(line, say);
                let deadline = self.now + ANSWER;
                Ok(State::MeetWhimbrel { exchange, deadline })
            }
            Visitor::Qemu => {
                self.connect_outbox(line, Vec::new());
                self.reconnect();
                Ok(State::MeetQemu(DestinationExchange::with_qemu()))
            }
        }
    }

    /// The answer to a hello that was let in.
    fn greet(&mut self, hello: &Hello) -> (DestinationExchange, Vec<Say>) {
        let (nonce, ram) = (self.dice.fill(), &self.shape.ram);
        let proofs = self.destination.proofs.clone().expect("between whimbrels");
        let attempt = Attempt { number: hello.attempt, source: hello.nonce, destination: nonce };
        self.destination.door.admission.admit(Ticket::new(&proofs, attempt));
        self.wake(Actor::Door);
        DestinationExchange::with_whimbrel(proofs, hello, nonce, ram)
    }

    fn connect_outbox(&mut self, line: Line, say: Vec<Say>) {
        let say = say.into();
        self.destination.outbox = Outbox { line: Some(line), say, ..Outbox::default() };
        self.wake(Actor::DestinationFault);
    }

    fn reconnect(&mut self) {
        let decoder = self.destination.decoder.take().expect("between two messages");
        let decoder = decoder.reconnected().expect("it is in postcopy");
        self.destination.decoder = Some(decoder);
    }

    fn meet_whimbrel(
        &mut self,
        mut exchange: DestinationExchange,
        deadline: Duration,
    ) -> Result<State, Broken> {
        if !self.take_proof(&mut exchange, deadline)? {
            return Ok(State::MeetWhimbrel { exchange, deadline });
        }
        self.reconnect();
        Ok(self.is_back())
    }

    /// Whether the source has proved that it is here.
    fn take_proof(
        &mut self,
        exchange: &mut DestinationExchange,
        deadline: Duration,
    ) -> Result<bool, Broken> {
        let line = self.destination.main.expect("a visitor");
        let here = self.net.here(line, End::Destination);
        let Some(proof) = here.first_chunk::<{ Proof::LEN }>().copied() else {
            let late = self.now >= deadline || self.net.is_over(line, End::Destination);
            return if late { Err(Broken) } else { Ok(false) };
        };
        self.net.take(line, End::Destination, Proof::LEN);
        let proved = Proof::parse(&proof).is_some_and(|proof| exchange.proof(&proof).is_ok());
        if !proved {
            self.summary.refused += 1;
            return Err(Broken);
        }
        let between = self.net.between(line);
        assert_eq!(between, super::net::Between::Sides, "a stranger is believed");
        assert!(exchange.is_over());
        Ok(true)
    }

    /// The source has given the guest away, or it would not be here.
    fn is_back(&mut self) -> State {
        self.runs();
        self.destination.door.paused = false;
        self.wake(Actor::Door);
        self.wake(Actor::DestinationUrgent);
        self.go_on()
    }

    fn meet_qemu(&mut self, mut exchange: DestinationExchange) -> Result<State, Broken> {
        let line = self.destination.main.expect("a visitor");
        let here = self.net.here(line, End::Destination);
        let decoder = self.destination.decoder.as_mut().expect("between two messages");
        let (used, decoded) = decoder.decode(here).map_err(|_| Broken)?;
        self.net.take(line, End::Destination, used);
        match decoded {
            Decoded::NeedMore(_) => {
                return self.or_over(line, State::MeetQemu(exchange));
            }
            Decoded::Command(Command::Ping(value)) => self.push(&ReturnMessage::Pong(value)),
            Decoded::Command(command) => {
                let say = exchange.command(&command, &self.shape.ram).map_err(|_| Broken)?;
                self.destination.outbox.say.extend(say);
                self.wake(Actor::DestinationFault);
            }
            _ => return Err(Broken),
        }
        self.wake(Actor::DestinationMain);
        Ok(if exchange.is_over() { self.is_back() } else { State::MeetQemu(exchange) })
    }

    fn push(&mut self, message: &ReturnMessage) {
        let mut bytes = Vec::new();
        message.encode(&mut bytes);
        self.destination.outbox.say.push_back(Say::Words(bytes));
        self.wake(Actor::DestinationFault);
    }

    /// One step of `dest/fault`.
    pub(super) fn destination_fault(&mut self) {
        let Some(line) = self.destination.outbox.line else { return };
        let mut words = Vec::new();
        let mut again = true;
        let outbox = &mut self.destination.outbox;
        if let Some(request) = outbox.requests.pop_front() {
            self.encode_request(request, &mut words);
        } else {
            match outbox.say.pop_front() {
                Some(Say::Words(said)) => words = said,
                Some(Say::Bitmap(block)) => self.encode_bitmap(block, false, &mut words),
                Some(Say::Requests) => {
                    let requests = self.destination.unanswered();
                    let outbox = &mut self.destination.outbox;
                    (outbox.asks, outbox.requests) = (true, requests);
                }
                None => {
                    again = self.ask_again();
                }
            }
        }
        if again {
            self.wake(Actor::DestinationFault);
        }
        if !words.is_empty() && self.say(line, End::Destination, &words).is_err() {
            self.destination.outbox = Outbox::default();
            self.destination.broken = true;
            self.wake(Actor::DestinationMain);
        }
    }

    fn ask_again(&mut self) -> bool {
        let mut next = None::<Duration>;
        let mut again = Vec::new();
        if self.destination.outbox.asks {
            for (request, waiting) in &mut self.destination.asked {
                let Some(written) = waiting.written else { continue };
                let due = written + waiting.again_after;
                if due > self.now {
                    next = Some(next.map_or(due, |next| next.min(due)));
                    continue;
                }
                waiting.again_after = (waiting.again_after * 2).min(ASK_AGAIN_MAX);
                again.push(*request);
            }
        }
        if let Some(next) = next {
            self.wake_at(Actor::DestinationFault, next);
        }
        let any = !again.is_empty();
        self.destination.outbox.requests.extend(again);
        any
    }

    fn encode_request(&mut self, (block, start): Request, words: &mut Vec<u8>) {
        let Some(waiting) = self.destination.asked.get_mut(&(block, start)) else { return };
        waiting.written = Some(self.now);
        let start = BlockOffset(start);
        let len = u32::try_from(self.shape.unit(block).bytes()).expect("short");
        let message = match self.destination.outbox.last.replace(block) {
            Some(last) if last == block => ReturnMessage::RequestPages { start, len },
            _ => {
                let block = name(self.shape.ram.block(block).name()).expect("a name");
                ReturnMessage::RequestPagesOf { block, start, len }
            }
        };
        message.encode(words);
    }

    fn encode_bitmap(&self, block: BlockIndex, full: bool, words: &mut Vec<u8>) {
        let ram = &self.shape.ram;
        ReturnMessage::RecvBitmap(name(ram.block(block).name()).expect("a name")).encode(words);
        encode_bitmap_size(bitmap_words(ram, block) as u64 * 8, words);
        for word in self.destination.received.words(block) {
            let word = if full { u64::MAX } else { word };
            words.extend_from_slice(&word.to_le_bytes());
        }
        encode_bitmap_end(words);
    }

    /// Everything is here: says so on the connection there is.
    fn last_word(&mut self) -> State {
        let line = self.destination.main.expect("in a session");
        let mut words = Vec::new();
        for say in std::mem::take(&mut self.destination.outbox.say) {
            if let Say::Words(said) = say {
                words.extend(said);
            }
        }
        ReturnMessage::Shut(0).encode(&mut words);
        let told = self.write(line, End::Destination, &words);
        if self.destination.proofs.is_none() {
            self.hang_up();
            return State::Done;
        }
        if told.is_err() {
            return self.see_off();
        }
        let deadline = self.now + GOODBYE;
        self.destination.outbox = Outbox::default();
        self.wake(Actor::DestinationMain);
        State::LastWord { last: Vec::new(), deadline }
    }

    /// Everything is here, and the connections are broken.
    fn after_all(&mut self) -> State {
        if self.destination.proofs.is_none() { State::Done } else { self.see_off() }
    }

    fn hear_farewell(&mut self, mut last: Vec<u8>, deadline: Duration) -> State {
        let line = self.destination.main.expect("SHUT was said on it");
        let here = self.net.here(line, End::Destination);
        last.extend_from_slice(here);
        self.net.take(line, End::Destination, here.len());
        if self.net.is_over(line, End::Destination) || self.now >= deadline {
            if last.ends_with(&FAREWELL) {
                self.hang_up();
                return State::Done;
            }
            return self.see_off();
        }
        State::LastWord { last, deadline }
    }

    /// Waits for a source that has not heard the last word.
    fn see_off(&mut self) -> State {
        self.hang_up();
        self.door_is_paused();
        self.wake(Actor::DestinationMain);
        State::SeeOff
    }

    fn look_who_comes_again(&mut self) -> State {
        let Some((line, Visitor::Whimbrel(hello))) = self.destination.door.visitor.take() else {
            return State::SeeOff;
        };
        self.destination.main = Some(line);
        self.attend(Some(line), End::Destination, true);
        let (exchange, say) = self.greet(&hello);
        let mut words = Vec::new();
        for say in say {
            match say {
                Say::Words(bytes) => words.extend_from_slice(&bytes),
                Say::Requests => {}
                Say::Bitmap(block) => self.encode_bitmap(block, true, &mut words),
            }
        }
        if self.say(line, End::Destination, &words).is_err() {
            return self.see_off();
        }
        let deadline = self.now + ANSWER;
        State::Again { exchange, proved: false, deadline }
    }

    fn tell_again(
        &mut self,
        mut exchange: DestinationExchange,
        mut proved: bool,
        mut deadline: Duration,
    ) -> Result<State, Broken> {
        let line = self.destination.main.expect("a visitor");
        if self.now >= deadline {
            return Err(Broken);
        }
        if !proved {
            proved = self.take_proof(&mut exchange, deadline)?;
            if !proved {
                return Ok(State::Again { exchange, proved, deadline });
            }
            self.reconnect();
        }
        let here = self.net.here(line, End::Destination);
        let decoder = self.destination.decoder.as_mut().expect("between two messages");
        let (used, decoded) = decoder.decode(here).map_err(|_| Broken)?;
        self.net.take(line, End::Destination, used);
        match decoded {
            Decoded::Eof => return Ok(self.last_word()),
            Decoded::NeedMore(_) if used == 0 => {
                return self.or_over(line, State::Again { exchange, proved, deadline });
            }
            Decoded::Command(Command::Ping(value)) => {
                let mut pong = Vec::new();
                ReturnMessage::Pong(value).encode(&mut pong);
                self.write(line, End::Destination, &pong)?;
            }
            Decoded::Ram(record) if record.is_page() => return Err(Broken),
            _ => {}
        }
        deadline = self.now + ANSWER;
        self.wake(Actor::DestinationMain);
        Ok(State::Again { exchange, proved, deadline })
    }
}
