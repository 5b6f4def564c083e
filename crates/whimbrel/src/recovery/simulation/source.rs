//! The source's threads: what drives a [`SourceExchange`], a page map and a [`Retry`], as
//! `source/{postcopy,urgent,background,recover}.rs` do.

use std::collections::VecDeque;
use std::time::Duration;

use whimbrel_ram::{Asked, BlockIndex, Claim, HostPage, PageMap, Sweep, TargetPage};
use whimbrel_wire::recovery::{FAREWELL, HelloKind, Welcome};
use whimbrel_wire::{BlockOffset, Command, Name, RecordEncoder, encode_end_of_section, encode_eof};

use super::heard::{Answers, Heard};
use super::net::{Between, Broken, End, Line};
use super::shape::Shape;
use super::world::{Actor, BEAT, Event, Right, SILENCE, World};
use crate::plan::Retry;
use crate::recovery::exchange::SourceExchange;
use crate::recovery::proofs::{Proofs, Ticket};
use crate::recovery::{ANSWER, PING_BEAT};
use crate::source::setup::RAM_SECTION;

/// How long the last word may take.
const LAST_WORD: Duration = Duration::from_secs(30);
/// Connections that have lasted longer have been some.
const AT_ONCE: Duration = Duration::from_secs(1);

#[derive(Debug)]
pub(super) struct Source<'m> {
    proofs: Option<Proofs>,
    attempts: u32,
    dials: u32,
    state: State<'m>,
    /// The next connection finds a thief, who keeps what is said.
    pub(super) thief: bool,
    /// Until then connections find an impostor.
    pub(super) impostor: Duration,
    /// The next try is made by two ways.
    pub(super) twice: bool,
    /// What destinations have said, for impostors to say again.
    pub(super) welcomes: Vec<Vec<u8>>,
}

#[derive(Debug)]
enum State<'m> {
    Session(Box<Session<'m>>),
    Away(Away),
    Meeting(Box<Meeting>),
    Done,
    /// One of these is being changed.
    Busy,
}

#[derive(Debug)]
struct Session<'m> {
    main: Line,
    urgent: Option<Line>,
    answers: Answers,
    exchange: Option<SourceExchange>,
    records: RecordEncoder,
    urgent_records: RecordEncoder,
    open: Option<Claim<'m>>,
    sweep: Sweep,
    queue: VecDeque<HostPage>,
    stage: Stage,
    in_part: bool,
    next_beat: Duration,
    heard: Duration,
    last_block: Option<BlockIndex>,
    /// The outage before it, and when that was over.
    before: Option<(Away, Duration)>,
}

/// How far the main channel is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    Run,
    Begin,
    Rest,
    AllSent,
}

#[derive(Debug)]
struct Away {
    since: Duration,
    retry: Retry,
    dials: Vec<u32>,
}

#[derive(Debug)]
struct Meeting {
    away: Away,
    line: Line,
    urgent: Option<Line>,
    answers: Answers,
    exchange: SourceExchange,
    /// With a whimbrel that has not answered.
    welcome: bool,
    deadline: Duration,
}

impl<'m> Source<'m> {
    pub(super) fn new(
        shape: &Shape,
        map: &'m PageMap,
        (main, urgent): (Line, Option<Line>),
        qemu: bool,
    ) -> Source<'m> {
        let session = Session::new(shape, map, (main, urgent), None, Stage::Run);
        Source {
            proofs: (!qemu).then(|| Proofs::of(shape.identity)),
            attempts: 0,
            dials: 0,
            state: State::Session(Box::new(session)),
            thief: false,
            impostor: Duration::ZERO,
            twice: false,
            welcomes: Vec::new(),
        }
    }

    pub(super) fn is_done(&self) -> bool {
        matches!(self.state, State::Done)
    }
}

impl<'m> Session<'m> {
    fn new(
        shape: &Shape,
        map: &'m PageMap,
        (main, urgent): (Line, Option<Line>),
        exchange: Option<SourceExchange>,
        stage: Stage,
    ) -> Session<'m> {
        Session {
            main,
            urgent,
            answers: Answers::new(),
            exchange,
            records: RecordEncoder::new(shape.blocks.clone()),
            urgent_records: RecordEncoder::new(shape.blocks.clone()),
            open: None,
            sweep: map.sweep(),
            queue: VecDeque::new(),
            stage,
            in_part: false,
            next_beat: Duration::ZERO,
            heard: Duration::ZERO,
            last_block: None,
            before: None,
        }
    }
}

impl<'m> World<'m> {
    fn take_source(&mut self) -> State<'m> {
        std::mem::replace(&mut self.source.state, State::Busy)
    }

    /// One step of `source/main`.
    pub(super) fn source_main(&mut self) {
        self.source.state = match self.take_source() {
            State::Session(mut session) => match self.send(&mut session) {
                Ok(()) => State::Session(session),
                Err(Broken) => self.source_breaks(*session),
            },
            State::Away(away) => self.find(away),
            State::Meeting(meeting) if self.now >= meeting.deadline => self.part(*meeting),
            State::Meeting(meeting) => {
                self.wake_at(Actor::SourceMain, meeting.deadline);
                State::Meeting(meeting)
            }
            other => other,
        };
    }

    /// One step of `source/urgent`, or of who waits for answers before there is one.
    pub(super) fn source_urgent(&mut self) {
        self.source.state = match self.take_source() {
            State::Session(mut session) => match self.hear(&mut session) {
                Ok(false) => State::Session(session),
                Ok(true) => {
                    self.close_lines(session.main, session.urgent);
                    State::Done
                }
                Err(Broken) => self.source_breaks(*session),
            },
            State::Meeting(meeting) => self.meet(*meeting),
            other => other,
        };
    }

    fn close_lines(&mut self, main: Line, urgent: Option<Line>) {
        self.close(main, End::Source);
        if let Some(urgent) = urgent {
            self.close(urgent, End::Source);
        }
    }

    fn source_breaks(&mut self, mut session: Session<'m>) -> State<'m> {
        self.close_lines(session.main, session.urgent);
        if self.guest.right != Right::Gone {
            self.guest.right = Right::Here;
            return State::Done; // Nobody was given anything: the migration has failed.
        }
        self.wake(Actor::SourceMain);
        match session.before.take() {
            // Connections that broke at once were none.
            Some((away, over)) if self.now - over < AT_ONCE => State::Away(away),
            _ => {
                let (since, retry) = (self.now, Retry::new(Duration::ZERO));
                State::Away(Away { since, retry, dials: Vec::new() })
            }
        }
    }

    fn part(&mut self, meeting: Meeting) -> State<'m> {
        self.close_lines(meeting.line, meeting.urgent);
        self.wake(Actor::SourceMain);
        State::Away(meeting.away)
    }

    fn find(&mut self, mut away: Away) -> State<'m> {
        let since = self.now - away.since;
        if away.retry.is_due(since) {
            let ways = if std::mem::take(&mut self.source.twice) { 2 } else { 1 };
            for _ in 0..ways {
                self.source.dials += 1;
                away.dials.push(self.source.dials);
                let took = 2 * self.net.latency + self.dice.within(self.net.latency);
                self.note(self.now + took, Event::Dialled(self.source.dials));
            }
        }
        self.wake_at(Actor::SourceMain, self.now + away.retry.wait(since));
        State::Away(away)
    }

    /// An attempt to connect has come to its end.
    pub(super) fn dialled(&mut self, number: u32) {
        if !self.is_link_up() {
            return;
        }
        let mut away = match self.take_source() {
            State::Away(away) if away.dials.contains(&number) => away,
            other => {
                self.source.state = other;
                // Another way was faster: this one is given up, and the door sees nobody.
                let line = self.net.connect(Between::Sides);
                self.note(self.now + self.net.latency, Event::Accept(line));
                self.close(line, End::Source);
                return;
            }
        };
        let stolen = std::mem::take(&mut self.source.thief);
        let between = match stolen || self.now < self.source.impostor {
            true => Between::Impostor,
            false => Between::Sides,
        };
        away.dials.clear();
        let line = self.connect(between);
        self.net.set_reader(line, End::Source, Actor::SourceUrgent);
        let (exchange, words) = match self.source.proofs.clone() {
            Some(proofs) => {
                self.source.attempts += 1;
                let nonce = self.dice.fill();
                let (attempts, ram) = (self.source.attempts, &self.shape.ram);
                SourceExchange::with_whimbrel(proofs, attempts, nonce, ram)
            }
            None => SourceExchange::with_qemu(&self.shape.ram).expect("good names"),
        };
        let said = self.say(line, End::Source, &words);
        let urgent = (self.setting.preempt && !self.setting.qemu && between == Between::Sides)
            .then(|| self.connect(between));
        if between == Between::Impostor {
            self.impersonate(line, &words, stolen);
        } else if !self.setting.qemu {
            self.recorded.push(words);
        }
        let welcome = !self.setting.qemu;
        let deadline = self.now + if welcome { ANSWER } else { SILENCE };
        self.wake_at(Actor::SourceMain, deadline);
        let answers = Answers::new();
        let meeting = Meeting { away, line, urgent, answers, exchange, welcome, deadline };
        self.source.state = match said {
            Ok(()) => State::Meeting(Box::new(meeting)),
            Err(Broken) => self.part(meeting),
        };
    }

    fn connect(&mut self, between: Between) -> Line {
        let line = self.net.connect(between);
        if between == Between::Sides {
            let at = self.now + self.net.latency + self.dice.within(self.net.latency);
            self.note(at, Event::Accept(line));
        }
        line
    }

    /// What has come of the destination's part of the exchange.
    fn meet(&mut self, mut meeting: Meeting) -> State<'m> {
        match self.meet_step(&mut meeting) {
            Ok(false) => State::Meeting(Box::new(meeting)),
            Ok(true) => {
                // A QEMU has told all; a whimbrel says the rest while pages move.
                let exchange = Some(meeting.exchange).filter(|exchange| !exchange.is_over());
                self.session += 1;
                self.summary.sessions += 1;
                let lines = (meeting.line, meeting.urgent);
                let mut session = Session::new(self.shape, self.map, lines, exchange, Stage::Begin);
                session.heard = self.now;
                session.before = Some((meeting.away, self.now));
                self.wake(Actor::SourceMain);
                self.wake(Actor::SourceUrgent);
                State::Session(Box::new(session))
            }
            Err(Broken) => self.part(meeting),
        }
    }

    /// One part of it; says whether pages may go.
    fn meet_step(&mut self, meeting: &mut Meeting) -> Result<bool, Broken> {
        let line = meeting.line;
        let here = self.net.here(line, End::Source);
        if meeting.welcome {
            let Some(welcome) = here.first_chunk::<{ Welcome::LEN }>().copied() else {
                return self.expect_more(line).map(|()| false);
            };
            self.net.take(line, End::Source, Welcome::LEN);
            let Some((attempt, words)) =
                Welcome::parse(&welcome).and_then(|welcome| meeting.exchange.welcome(&welcome))
            else {
                self.summary.refused += 1;
                return Err(Broken);
            };
            assert_eq!(self.net.between(line), Between::Sides, "an impostor is believed");
            self.source.welcomes.push(welcome.to_vec());
            self.say(line, End::Source, &words)?;
            let proofs = self.source.proofs.as_ref().expect("with a whimbrel");
            if let Some(urgent) = meeting.urgent {
                let words = Ticket::new(proofs, attempt).words(HelloKind::Urgent);
                self.say(urgent, End::Source, &words)?;
            }
            return Ok(true);
        }
        let (used, heard) = match meeting.answers.next(&self.shape.ram, here) {
            Ok(next) => next,
            Err(_) => return Err(Broken),
        };
        self.net.take(line, End::Source, used);
        let Some(heard) = heard else { return self.expect_more(line).map(|()| false) };
        meeting.deadline = self.now + SILENCE;
        self.wake_at(Actor::SourceMain, meeting.deadline);
        self.wake(Actor::SourceUrgent);
        match heard {
            Heard::Pong => Ok(false),
            Heard::Bitmap { block, received } => {
                let told = meeting.exchange.bitmap(self.map, block, &received);
                if !told.map_err(|_| Broken)? {
                    return Ok(false);
                }
                if self.setting.preempt {
                    if !self.is_link_up() {
                        return Err(Broken);
                    }
                    meeting.urgent = Some(self.connect(Between::Sides));
                }
                let words = meeting.exchange.resume();
                self.say(line, End::Source, &words)?;
                Ok(false)
            }
            Heard::Resumed => {
                meeting.exchange.acknowledged().map_err(|_| Broken)?;
                assert!(meeting.exchange.is_over());
                Ok(true)
            }
            Heard::Request { .. } | Heard::Shut(_) => Err(Broken),
        }
    }

    fn expect_more(&self, line: Line) -> Result<(), Broken> {
        if self.net.is_over(line, End::Source) { Err(Broken) } else { Ok(()) }
    }

    /// One message of the return path; says whether it was the last word.
    fn hear(&mut self, session: &mut Session<'m>) -> Result<bool, Broken> {
        let line = session.main;
        let here = self.net.here(line, End::Source);
        let Ok((used, heard)) = session.answers.next(&self.shape.ram, here) else {
            return Err(Broken);
        };
        self.net.take(line, End::Source, used);
        let Some(heard) = heard else { return self.expect_more(line).map(|()| false) };
        session.heard = self.now;
        self.wake(Actor::SourceUrgent);
        match heard {
            Heard::Pong => {}
            Heard::Request { block, start, len } => self.requested(session, block, start, len)?,
            Heard::Bitmap { block, received } => {
                let exchange = session.exchange.as_mut().ok_or(Broken)?;
                if exchange.bitmap(self.map, block, &received).map_err(|_| Broken)? {
                    assert!(exchange.is_over());
                    session.exchange = None;
                    self.wake(Actor::SourceMain);
                }
            }
            Heard::Resumed => return Err(Broken),
            Heard::Shut(0) if session.stage == Stage::AllSent => {
                if !self.setting.qemu {
                    // Whatever becomes of it, all has gone well.
                    let _ = self.write(line, End::Source, &FAREWELL);
                }
                return Ok(true);
            }
            Heard::Shut(_) => return Err(Broken),
        }
        Ok(false)
    }

    fn requested(
        &mut self,
        session: &mut Session<'m>,
        block: Option<Name>,
        start: u64,
        len: u64,
    ) -> Result<(), Broken> {
        let block = match block {
            Some(name) => self.shape.ram.find(name.as_str().unwrap_or_default()),
            None => session.last_block.map(|block| (block, self.shape.ram.block(block))),
        };
        let (block, ram) = block.ok_or(Broken)?;
        let unit = self.map.unit(block).bytes() as u64;
        let fits = start.checked_add(len).is_some_and(|end| end <= ram.len());
        if len == 0 || !len.is_multiple_of(unit) || !start.is_multiple_of(unit) || !fits {
            return Err(Broken);
        }
        session.last_block = Some(block);
        for number in start / unit..(start + len) / unit {
            self.answer(session, HostPage { block, number })?;
        }
        Ok(())
    }

    fn answer(&mut self, session: &mut Session<'m>, page: HostPage) -> Result<(), Broken> {
        let map = self.map;
        if let Some(exchange) = &session.exchange {
            exchange.asked(map, page);
        }
        let pages = page.target_pages(map.unit(page.block));
        let Some(urgent) = session.urgent else {
            let pending = map.is_pending(page.block, TargetPage(pages.start));
            if pending && !session.queue.contains(&page) {
                session.queue.push_back(page);
                self.wake(Actor::SourceMain);
            }
            return Ok(());
        };
        let Asked::Claimed(mut claim) = map.claim(page) else { return Ok(()) };
        let (mut words, mut sent) = (Vec::new(), Vec::new());
        while let Some(page) = claim.next_page() {
            self.encode(&mut session.urgent_records, claim.block(), page, &mut words);
            sent.push(page);
        }
        self.write(urgent, End::Source, &words)?;
        claim.spend();
        sent.into_iter().for_each(|target| self.sends(page.block, target));
        if let Some(exchange) = &mut session.exchange {
            exchange.went(page);
        }
        if self.dice.percent(50) && pages.end < self.shape.ram.block(page.block).target_pages() {
            session.sweep.go_on_from(page.block, TargetPage(pages.end));
        }
        Ok(())
    }

    fn encode(
        &self,
        records: &mut RecordEncoder,
        block: BlockIndex,
        page: TargetPage,
        words: &mut Vec<u8>,
    ) {
        let (place, offset) = (self.shape.on_the_wire(block), BlockOffset(page.offset()));
        match &self.shape.content[self.shape.place(block, page.0)] {
            Some(content) => {
                records.page_header(place, offset, words);
                words.extend_from_slice(content);
            }
            None => records.zero_page(place, offset, words),
        }
    }

    /// One step of what goes on the main channel.
    fn send(&mut self, session: &mut Session<'m>) -> Result<(), Broken> {
        let line = session.main;
        if self.net.is_over(line, End::Source) {
            return Err(Broken);
        }
        let mut words = Vec::new();
        match session.stage {
            Stage::Run => return self.hand_over(session),
            Stage::Begin => {
                if session.exchange.is_some() {
                    return self.watch(session); // The destination has still to say what it has.
                }
                session.stage = Stage::Rest;
                session.heard = self.now;
                session.next_beat = self.now;
            }
            Stage::Rest | Stage::AllSent => {}
        }
        self.watch(session)?;
        if session.stage == Stage::AllSent {
            return Ok(());
        }
        if self.now >= session.next_beat && session.open.is_none() {
            session.next_beat = self.now + BEAT;
            end_part(session, &mut words);
            Command::Ping(PING_BEAT).encode(&mut words);
        }
        let next = self.now + self.setting.step + self.dice.within(self.setting.step);
        self.wake_at(Actor::SourceMain, next);
        let mut sent = None;
        if self.net.flying(line, End::Destination) < self.setting.window {
            sent = self.gather(session, &mut words);
        }
        if sent.is_none() && session.open.is_none() && self.map.pending() == 0 {
            session.stage = Stage::AllSent;
            end_part(session, &mut words);
            RAM_SECTION.encode_end(&mut words);
            encode_end_of_section(&mut words);
            RAM_SECTION.encode_footer(&mut words);
            encode_eof(&mut words);
        }
        if !words.is_empty() {
            self.write(line, End::Source, &words)?;
        }
        if let Some((block, page)) = sent {
            self.sends(block, page);
        }
        Ok(())
    }

    /// Whether the destination has been silent for too long.
    fn watch(&mut self, session: &Session<'m>) -> Result<(), Broken> {
        let limit = if session.stage == Stage::AllSent { LAST_WORD } else { SILENCE };
        if self.now >= session.heard + limit {
            return Err(Broken);
        }
        self.wake_at(Actor::SourceMain, session.heard + limit);
        Ok(())
    }

    /// The next page, of what is asked for first.
    fn gather(
        &mut self,
        session: &mut Session<'m>,
        words: &mut Vec<u8>,
    ) -> Option<(BlockIndex, TargetPage)> {
        let map = self.map;
        while session.open.is_none() {
            let Some(page) = session.queue.pop_front() else { break };
            if let Asked::Claimed(claim) = map.claim(page) {
                session.open = Some(claim);
            }
        }
        if session.open.is_none() {
            session.sweep.set_batch(1 + u32::try_from(self.dice.below(4)).expect("few"));
            session.open = map.claim_next(&mut session.sweep);
        }
        let claim = session.open.as_mut()?;
        let block = claim.block();
        let Some(page) = claim.next_page() else {
            if let Some(claim) = session.open.take() {
                claim.spend();
            }
            return None;
        };
        if !session.in_part {
            session.in_part = true;
            session.records.forget_last_block();
            RAM_SECTION.encode_part(words);
        }
        self.encode(&mut session.records, block, page, words);
        Some((block, page))
    }

    /// RUN goes out: from its first byte on the guest is not ours, but when not all of it went.
    fn hand_over(&mut self, session: &mut Session<'m>) -> Result<(), Broken> {
        self.guest.right = Right::GivenUp;
        let run = &self.shape.run;
        let accepted = if self.dice.percent(2) { self.dice.index(run.len()) } else { run.len() };
        self.write(session.main, End::Source, &run[..accepted])?;
        if accepted < run.len() {
            return Err(Broken);
        }
        self.guest.right = Right::Gone;
        session.stage = Stage::Begin;
        self.wake(Actor::SourceMain);
        Ok(())
    }
}

fn end_part(session: &mut Session<'_>, words: &mut Vec<u8>) {
    if std::mem::take(&mut session.in_part) {
        encode_end_of_section(words);
        RAM_SECTION.encode_footer(words);
    }
}
