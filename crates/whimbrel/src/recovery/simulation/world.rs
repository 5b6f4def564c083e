//! The clock, the agenda, the guest, and what must hold whatever happens.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::time::Duration;

use whimbrel_ram::{BlockIndex, PageMap, TargetPage};

use super::destination::Destination;
use super::dice::Dice;
use super::faults::Fault;
use super::net::{Between, Broken, End, Line, Net};
use super::shape::Shape;
use super::source::Source;

pub(super) const MS: Duration = Duration::from_millis(1);

/// How long a peer may be silent, and how often something is said so that it is not.
pub(super) const SILENCE: Duration = Duration::from_secs(2);
pub(super) const BEAT: Duration = Duration::from_millis(500);

/// The link stays up from the last fault on: so much later everything is over.
const PATIENCE: Duration = Duration::from_secs(120);

/// Threads of both sides, one step of which is done at a time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Actor {
    SourceMain,
    SourceUrgent,
    Door,
    DestinationMain,
    DestinationUrgent,
    DestinationFault,
}

const ACTORS: usize = 6;

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Event {
    Arrive(Line, End),
    Over(Line, End),
    Accept(Line),
    Step(Actor),
    /// The source's attempt to connect has come to its end.
    Dialled(u32),
    /// A vCPU touches something.
    Touch(usize),
    Fault(usize),
    LinkUp,
    Replay(usize),
}

/// What a schedule is like.
#[derive(Clone, Copy, Debug)]
pub(super) struct Setting {
    /// No whimbrel extensions: as between QEMUs.
    pub(super) qemu: bool,
    pub(super) preempt: bool,
    pub(super) step: Duration,
    /// Pieces that the main channel holds before its writer has to wait.
    pub(super) window: usize,
}

/// What has become of the right to run the guest, at the source.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Right {
    Here,
    /// RUN is being written.
    GivenUp,
    Gone,
}

/// A page as it lies in the destination's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Memory {
    Missing,
    /// As it was at the hand-over.
    HandedOver,
    /// The guest has written it since.
    Written,
}

#[derive(Debug)]
pub(super) struct Guest {
    pub(super) right: Right,
    pub(super) runs: bool,
    pub(super) memory: Vec<Memory>,
    /// What each vCPU waits for.
    pub(super) waits: Vec<Option<usize>>,
    touches: u32,
}

/// What a schedule has come to, summed up over many.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Summary {
    pub(super) schedules: u64,
    pub(super) sessions: u64,
    pub(super) lost: u64,
    pub(super) pages: u64,
    pub(super) faults: u64,
    pub(super) refused: u64,
    /// RUN has not gone out: the guest stays where it was.
    pub(super) kept: u64,
    /// RUN was lost on its way to a destination that nobody comes back to.
    pub(super) stranded: u64,
}

impl Summary {
    pub(super) fn add(&mut self, other: &Summary) {
        self.schedules += other.schedules;
        self.sessions += other.sessions;
        self.lost += other.lost;
        self.pages += other.pages;
        self.faults += other.faults;
        self.refused += other.refused;
        self.kept += other.kept;
        self.stranded += other.stranded;
    }
}

#[derive(Debug)]
pub(super) struct World<'m> {
    pub(super) dice: Dice,
    pub(super) now: Duration,
    agenda: BinaryHeap<Reverse<(Duration, u32, Event)>>,
    noted: u32,
    due: [Option<Duration>; ACTORS],
    pub(super) net: Net,
    pub(super) setting: Setting,
    pub(super) shape: &'m Shape,
    pub(super) map: &'m PageMap,
    pub(super) source: Source<'m>,
    pub(super) destination: Destination,
    pub(super) guest: Guest,
    pub(super) faults: Vec<(Duration, Fault)>,
    pub(super) link_down_until: Duration,
    pub(super) recorded: Vec<Vec<u8>>,
    /// Words were changed on their way: pages may be asked for that nobody waits for.
    pub(super) changed: bool,
    /// For each page, the session in which it was sent last.
    sent: Vec<u64>,
    pub(super) session: u64,
    pub(super) summary: Summary,
}

impl<'m> World<'m> {
    pub(super) fn new(seed: u64, qemu: bool, shape: &'m Shape, map: &'m PageMap) -> World<'m> {
        let mut dice = Dice::new(seed);
        let latency = Duration::from_micros(20 << dice.below(10));
        let setting = Setting {
            qemu,
            preempt: dice.percent(70),
            step: Duration::from_micros(5 << dice.below(6)),
            window: 1 + dice.index(24),
        };
        let vcpus = 1 + dice.index(4);
        let received = whimbrel_ram::Received::new(&shape.ram);
        let mut memory = vec![Memory::Missing; shape.pages()];
        let precopied = dice.below(90);
        for (block, pages) in shape.ram.blocks() {
            let unit = shape.unit(block).target_pages();
            for first in (0..pages.target_pages()).step_by(usize::try_from(unit).expect("few")) {
                if dice.percent(precopied) {
                    received.set_all(block, first..first + unit);
                    let place = shape.place(block, first);
                    memory[place..place + usize::try_from(unit).expect("few")]
                        .fill(Memory::HandedOver);
                } else {
                    map.mark_run(block, first..first + unit);
                }
            }
        }
        let mut net = Net::new(latency);
        let main = net.connect(Between::Sides);
        let urgent = setting.preempt.then(|| net.connect(Between::Sides));
        let guest = Guest {
            right: Right::Here,
            runs: false,
            memory,
            waits: vec![None; vcpus],
            touches: 200,
        };
        let mut world = World {
            now: Duration::ZERO,
            agenda: BinaryHeap::new(),
            noted: 0,
            due: [None; ACTORS],
            net,
            setting,
            shape,
            map,
            source: Source::new(shape, map, (main, urgent), qemu),
            destination: Destination::new(shape, received, (main, urgent), qemu),
            guest,
            faults: super::faults::draw(&mut dice, latency, setting),
            link_down_until: Duration::ZERO,
            recorded: Vec::new(),
            changed: false,
            sent: vec![u64::MAX; shape.pages()],
            session: 0,
            summary: Summary { schedules: 1, ..Summary::default() },
            dice,
        };
        world.summary.pages = world.destination.received.missing();
        for (line, end) in [(Some(main), End::Source), (Some(main), End::Destination)] {
            world.attend(line, end, true);
        }
        world.attend(urgent, End::Destination, false);
        for (number, (at, _)) in world.faults.clone().into_iter().enumerate() {
            world.note(at, Event::Fault(number));
        }
        world.wake(Actor::SourceMain);
        world
    }

    /// The threads of the two sides read this line from now on.
    pub(super) fn attend(&mut self, line: Option<Line>, end: End, main: bool) {
        let Some(line) = line else { return };
        let actor = match (end, main) {
            (End::Source, _) => Actor::SourceUrgent,
            (End::Destination, true) => Actor::DestinationMain,
            (End::Destination, false) => Actor::DestinationUrgent,
        };
        self.net.set_reader(line, end, actor);
        self.wake(actor);
    }

    pub(super) fn note(&mut self, at: Duration, event: Event) {
        self.noted += 1;
        self.agenda.push(Reverse((at, self.noted, event)));
    }

    /// The thread goes on soon.
    pub(super) fn wake(&mut self, actor: Actor) {
        let at = self.now + self.dice.within(self.setting.step);
        self.wake_at(actor, at);
    }

    pub(super) fn wake_at(&mut self, actor: Actor, at: Duration) {
        let due = &mut self.due[actor as usize];
        if due.is_none_or(|due| at < due) {
            *due = Some(at);
            self.note(at, Event::Step(actor));
        }
    }

    /// Does everything, to its end.
    pub(super) fn run(mut self) -> Summary {
        let last_fault = self.faults.iter().map(|(at, _)| *at).max().unwrap_or_default();
        while !self.is_settled() {
            let Some(Reverse((at, _, event))) = self.agenda.pop() else {
                panic!("at {:?} nothing is left to happen: {}", self.now, self.describe());
            };
            self.happen_at(event, at);
            assert!(
                self.now < last_fault.max(self.link_down_until) + PATIENCE,
                "after {:?} it has not come to its end: {}",
                self.now,
                self.describe()
            );
        }
        if self.guest.right == Right::Here {
            // What is still on its way must not make it run on the other side, too.
            let until = self.now + 10_000 * MS;
            while let Some(Reverse((at, _, event))) = self.agenda.pop()
                && at < until
            {
                self.happen_at(event, at);
            }
        }
        self.check_end();
        self.summary
    }

    fn happen_at(&mut self, event: Event, at: Duration) {
        self.now = self.now.max(at);
        self.happen(event, at);
        assert!(
            !(self.guest.runs && self.guest.right == Right::Here),
            "two guests run at {:?}",
            self.now
        );
    }

    fn happen(&mut self, event: Event, at: Duration) {
        match event {
            Event::Arrive(line, end) => {
                self.net.arrive(line, end, self.now);
                self.tell_reader(line, end);
            }
            Event::Over(line, end) => {
                self.net.arrive(line, end, self.now);
                self.net.end(line, end);
                self.tell_reader(line, end);
            }
            Event::Accept(line) => {
                self.net.set_reader(line, End::Destination, Actor::Door);
                self.destination.door.queue.push(line);
                self.wake(Actor::Door);
            }
            Event::Step(actor) => {
                if self.due[actor as usize] != Some(at) {
                    return;
                }
                self.due[actor as usize] = None;
                match actor {
                    Actor::SourceMain => self.source_main(),
                    Actor::SourceUrgent => self.source_urgent(),
                    Actor::Door => self.door(),
                    Actor::DestinationMain => self.destination_main(),
                    Actor::DestinationUrgent => self.destination_urgent(),
                    Actor::DestinationFault => self.destination_fault(),
                }
            }
            Event::Dialled(number) => self.dialled(number),
            Event::Touch(vcpu) => self.touch(vcpu),
            Event::Fault(number) => self.strike(number),
            Event::LinkUp => {}
            Event::Replay(number) => self.replay(number),
        }
    }

    fn tell_reader(&mut self, line: Line, end: End) {
        if let Some(actor) = self.net.reader(line, end) {
            self.wake(actor);
        }
    }

    /// One end writes, and the world notes what becomes of it.
    pub(super) fn write(&mut self, line: Line, end: End, bytes: &[u8]) -> Result<(), Broken> {
        match (self.net.between(line), end) {
            (Between::Stranger, End::Destination) => panic!("a stranger is told {bytes:?}"),
            (Between::Impostor, End::Source) => {
                let told = self.net.written(line, end) + bytes.len();
                let hello = whimbrel_wire::recovery::Hello::LEN;
                assert!(told <= hello, "an impostor is told more than a hello");
            }
            _ => {}
        }
        let written = self.net.write((line, end), bytes, self.now, &mut self.dice)?;
        for at in written.arrivals {
            self.note(at, Event::Arrive(line, end.other()));
        }
        if written.cut {
            // Between whimbrels silence is noticed; otherwise the kernel has to.
            self.cut(&[line], if self.setting.qemu { 100 } else { 90 });
        }
        Ok(())
    }

    /// The same of the words of an exchange, which may be changed on their way.
    pub(super) fn say(&mut self, line: Line, end: End, bytes: &[u8]) -> Result<(), Broken> {
        let mut bytes = bytes.to_vec();
        match self.net.flip_after {
            Some(0) if !bytes.is_empty() => {
                let at = self.dice.index(bytes.len());
                bytes[at] ^= 1 << self.dice.below(8);
                self.net.flip_after = None;
                self.changed = true;
            }
            Some(more) => self.net.flip_after = more.checked_sub(1),
            None => {}
        }
        self.write(line, end, &bytes)
    }

    /// One end closes it.
    pub(super) fn close(&mut self, line: Line, end: End) {
        if let Some(at) = self.net.close(line, end, self.now) {
            self.note(at, Event::Over(line, end.other()));
        }
    }

    /// These connections break, and each end notices with this chance of a hundred.
    pub(super) fn cut(&mut self, lines: &[Line], noticed: u64) {
        for line in lines {
            self.net.cut(*line, &mut self.dice);
            for end in End::BOTH {
                if self.dice.percent(noticed) {
                    let most = if self.dice.percent(70) { MS } else { 1000 * MS };
                    let at = self.now + self.dice.within(most);
                    self.note(at, Event::Over(*line, end));
                }
            }
        }
    }

    pub(super) fn is_link_up(&self) -> bool {
        self.now >= self.link_down_until
    }

    /// The source sends a page: of which the destination has nothing, nor is it on its way.
    pub(super) fn sends(&mut self, block: BlockIndex, page: TargetPage) {
        let place = self.shape.place(block, page.0);
        let before = std::mem::replace(&mut self.sent[place], self.session);
        if before != u64::MAX {
            self.summary.lost += 1;
        }
        if self.changed {
            return;
        }
        assert!(before != self.session, "page {place} goes out twice on the same connections");
        assert!(
            self.guest.memory[place] == Memory::Missing,
            "page {place} is sent again, and the destination has it"
        );
    }

    /// A unit has come, and is placed where nothing is: what is there stays.
    pub(super) fn places(&mut self, block: BlockIndex, first: u64, pages: u64) {
        for page in first..first + pages {
            let place = self.shape.place(block, page);
            let is_new = self.destination.received.set(block, TargetPage(page));
            assert!(is_new || self.changed, "page {place} comes twice");
            assert_eq!(is_new, self.guest.memory[place] == Memory::Missing);
            if !is_new {
                continue;
            }
            self.guest.memory[place] = Memory::HandedOver;
            for vcpu in 0..self.guest.waits.len() {
                if self.guest.waits[vcpu] == Some(place) {
                    self.guest.waits[vcpu] = None;
                    let at = self.now + self.dice.within(self.setting.step);
                    self.note(at, Event::Touch(vcpu));
                }
            }
        }
        self.destination.forget_asked(block, first, pages);
    }

    /// The guest is the destination's, and runs.
    pub(super) fn runs(&mut self) {
        if std::mem::replace(&mut self.guest.runs, true) {
            return;
        }
        assert_ne!(self.guest.right, Right::GivenUp, "a guest that is not given away yet");
        for vcpu in 0..self.guest.waits.len() {
            self.note(self.now, Event::Touch(vcpu));
        }
    }

    fn touch(&mut self, vcpu: usize) {
        if self.guest.touches == 0 || self.guest.waits[vcpu].is_some() {
            return;
        }
        self.guest.touches -= 1;
        let place = self.dice.index(self.shape.pages());
        match self.guest.memory[place] {
            Memory::Missing => {
                self.guest.waits[vcpu] = Some(place);
                let (block, page) = self.shape.page(place);
                self.destination.wait_for(block, page, self.shape, self.now);
                self.wake(Actor::DestinationFault);
            }
            Memory::HandedOver | Memory::Written => {
                if self.dice.percent(50) {
                    self.guest.memory[place] = Memory::Written;
                }
                let at = self.now + self.dice.within(4 * self.setting.step);
                self.note(at, Event::Touch(vcpu));
            }
        }
    }

    fn is_settled(&self) -> bool {
        let destination = self.destination.is_done();
        let stranded = self.destination.has_failed();
        match self.source.is_done() {
            // A QEMU whose last word is lost is waited for in vain, and by hand.
            false => destination && self.setting.qemu || stranded,
            // A farewell that is lost is waited for, and takes nothing from anybody.
            true => destination || self.destination.sees_off() || self.guest.right == Right::Here,
        }
    }

    fn check_end(&mut self) {
        if self.guest.right == Right::Here {
            assert!(!self.guest.runs, "it runs here, too");
            self.summary.kept += 1;
            return;
        }
        if self.destination.has_failed() {
            assert!(self.setting.qemu && !self.guest.runs, "given up without need");
            self.summary.stranded += 1;
            return;
        }
        assert!(self.guest.runs, "the guest has gone, and runs nowhere");
        assert_eq!(self.destination.received.missing(), 0, "pages are missing");
        let missing = self.guest.memory.iter().position(|page| *page == Memory::Missing);
        assert_eq!(missing, None, "never placed");
        let waiting = self.guest.waits.iter().position(Option::is_some);
        assert_eq!(waiting, None, "a vCPU waits for ever");
    }

    fn describe(&self) -> String {
        format!(
            "{:?}\nsource {:?}\ndestination {:?}\nmissing {}, on the map {}, faults {:?}",
            self.setting,
            self.source,
            self.destination,
            self.destination.received.missing(),
            self.map.pending(),
            self.faults
        )
    }
}
