//! The proxy's thread: forwards whatever can be, up to the byte at which something goes wrong.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{RecvFlags, SendFlags, recv, send};
use rustix::process::{Pid, Signal, kill_process};

use super::link::{Link, Moved, Throttle, Until};
use super::reading::{self, Back, Forth};
use super::socket::{Door, Place, reset_on_close};
use super::{Fired, Order, Shared};
use crate::phase::Phase;
use crate::plan::{Action, Channel, Direction, Fault, How, Plan, Scope, Side, Trigger};

/// How long a connection that is closed gently may take to be drained.
const DRAINED: Duration = Duration::from_millis(20);
/// How long the first connections are kept for others to overtake them.
const OVERTAKEN: Duration = Duration::from_millis(40);
/// A process that is stopped for ever is not, should nobody end the run before.
const STOPPED_MAX: Duration = Duration::from_secs(4);
const DIRECTIONS: [Direction; 2] = [Direction::Forth, Direction::Back];

/// What is going to happen at a time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Alarm {
    Fire(usize),
    Continue(Side),
    Reopen,
    /// Those that waited for others connect now.
    Overtaken,
}

/// A connection that says again what another one said.
#[derive(Debug)]
struct Echo {
    socket: OwnedFd,
    until: Instant,
}

#[derive(Debug)]
pub(super) struct Relay {
    faults: Vec<Fault>,
    fired: Vec<bool>,
    door: Door,
    upstream: Place,
    /// Multifd channels, which connect after the main one.
    channels: u8,
    tls: bool,
    processes: [Pid; 2],
    shared: Arc<Shared>,
    links: Vec<Link>,
    echoes: Vec<Echo>,
    alarms: Vec<(Instant, Alarm)>,
    /// Connections that have come since the last main one.
    come: usize,
    /// How many connections have still to come before the first ones are let go, in another order.
    overtaking: Option<usize>,
    /// New connections are not looked at.
    deaf: Option<Until>,
    /// Bytes forwarded on each channel by connections that are over.
    passed: BTreeMap<(Channel, Direction), u64>,
    forth: Forth,
    back: Back,
    over: bool,
}

impl Relay {
    pub(super) fn new(
        plan: &Plan,
        at: &Place,
        upstream: Place,
        processes: [Pid; 2],
        shared: Arc<Shared>,
    ) -> Result<Relay> {
        let begin = Instant::now();
        let times =
            plan.faults.iter().enumerate().filter_map(
                |(fault, Fault { trigger, .. })| match trigger {
                    Trigger::Time(after) => Some((begin + *after, Alarm::Fire(fault))),
                    _ => None,
                },
            );
        let readable = !plan.scene.tls;
        Ok(Relay {
            faults: plan.faults.clone(),
            fired: vec![false; plan.faults.len()],
            door: Door::open(at).with_context(|| format!("listening at {at}"))?,
            upstream,
            channels: plan.scene.channels,
            tls: plan.scene.tls,
            processes,
            shared,
            links: Vec::new(),
            echoes: Vec::new(),
            alarms: times.collect(),
            come: 0,
            overtaking: None,
            deaf: None,
            passed: BTreeMap::new(),
            forth: Forth::new(readable),
            back: Back::new(readable),
            over: false,
        })
    }

    pub(super) fn place(&self) -> Result<Place> {
        Ok(self.door.place().clone())
    }

    pub(super) fn run(mut self) {
        // What is timed for the very beginning comes before the first connection.
        self.ring(Instant::now());
        while !self.over {
            let due = self.expire(Instant::now());
            self.wait(due);
            let now = Instant::now();
            self.ring(now);
            self.obey();
            self.accept(now);
            self.forward(now);
            self.links.retain(|link| !link.is_over(now));
        }
        self.let_go();
    }

    /// Whoever is stopped goes on: it has to be able to end.
    fn let_go(&mut self) {
        for side in Side::BOTH {
            if self.shared.stopped[side as usize].load(Ordering::SeqCst) {
                self.signal(side, Signal::CONT);
            }
        }
    }

    /// Forgets what is over, and gives when something is due next.
    fn expire(&mut self, now: Instant) -> Option<Instant> {
        self.echoes.retain(|echo| echo.until > now);
        let Relay { links, echoes, alarms, .. } = self;
        let pipes = links.iter_mut().flat_map(|link| &mut link.pipes);
        let mut due: Vec<Instant> = pipes.filter_map(|pipe| pipe.expire(now)).collect();
        due.extend(links.iter().filter_map(|link| link.closing));
        due.extend(echoes.iter().map(|echo| echo.until));
        due.extend(alarms.iter().map(|(at, _)| *at));
        if let Some(Until::Time(until)) = self.deaf {
            match until > now {
                true => due.push(until),
                false => self.deaf = None,
            }
        }
        self.shared.busy.store(!due.is_empty(), Ordering::SeqCst);
        due.into_iter().min()
    }

    fn wait(&self, due: Option<Instant>) {
        let now = Instant::now();
        let timeout = due.map(|due| due.saturating_duration_since(now));
        let timeout = timeout.and_then(|time| Timespec::try_from(time).ok());
        let mut fds = vec![PollFd::new(&self.shared.wake, PollFlags::IN)];
        if self.deaf.is_none() {
            fds.push(PollFd::new(&self.door, PollFlags::IN));
        }
        let echoes = self.echoes.iter().map(|echo| (echo.socket.as_fd(), PollFlags::IN));
        let mut wanted: Vec<(BorrowedFd<'_>, PollFlags)> = echoes.collect();
        for link in &self.links {
            for direction in DIRECTIONS {
                if let Some((fd, gives)) = link.wants(direction, now) {
                    let what = if gives { PollFlags::OUT } else { PollFlags::IN };
                    wanted.push((fd.as_fd(), what));
                }
            }
        }
        fds.extend(wanted.into_iter().map(|(fd, what)| PollFd::from_borrowed_fd(fd, what)));
        // Interrupted or short of memory: it is looked again.
        let _ = poll(&mut fds, timeout.as_ref());
    }

    fn ring(&mut self, now: Instant) {
        let due = |(at, _): &(Instant, Alarm)| *at <= now;
        let ringing: Vec<Alarm> =
            self.alarms.iter().filter(|alarm| due(alarm)).map(|(_, alarm)| *alarm).collect();
        self.alarms.retain(|alarm| !due(alarm));
        for alarm in ringing {
            match alarm {
                Alarm::Fire(fault) => self.fire(fault),
                Alarm::Continue(side) => self.signal(side, Signal::CONT),
                Alarm::Reopen => self.door.reopen().expect("a socket that is bound can listen"),
                Alarm::Overtaken => self.let_pass(),
            }
        }
    }

    fn obey(&mut self) {
        // It is looked at anyway: how often it was woken says nothing.
        let _ = rustix::io::read(&self.shared.wake, &mut [0; 8]);
        let orders = std::mem::take(&mut *self.shared.orders());
        for order in orders {
            match order {
                Order::Fire(fault) => self.fire(fault),
                Order::Heal => self.heal(),
                Order::Upstream(place) => self.upstream = place,
                Order::End => self.over = true,
            }
        }
    }

    fn heal(&mut self) {
        self.links.iter_mut().flat_map(|link| &mut link.pipes).for_each(super::link::Pipe::heal);
        self.deaf = None;
        self.fired.fill(true);
        let later = |alarm: &Alarm| matches!(alarm, Alarm::Reopen | Alarm::Continue(_));
        let alarms = std::mem::take(&mut self.alarms);
        self.alarms = alarms.into_iter().filter(|(_, alarm)| later(alarm)).collect();
        let soon = Instant::now();
        self.alarms.iter_mut().for_each(|(at, _)| *at = soon);
        self.let_pass();
    }

    fn accept(&mut self, now: Instant) {
        if self.deaf.is_some() {
            return;
        }
        while let Some(near) = self.door.accept() {
            if !self.links.iter().any(|link| link.channel == Channel::Main) {
                self.come = 0;
            }
            let channel = match u8::try_from(self.come) {
                Ok(0) => Channel::Main,
                Ok(number) if number <= self.channels => Channel::Multifd(number - 1),
                _ => Channel::Urgent,
            };
            self.come += 1;
            if channel == Channel::Main && self.passed.contains_key(&(channel, Direction::Forth)) {
                // What takes the place of a broken connection does not begin as that one did.
                self.forth.close();
                self.back.close();
            }
            let passed = DIRECTIONS.map(|direction| self.passed_on(channel, direction));
            let mut link = Link::new(channel, near, passed);
            if self.overtaking.is_none() {
                link.far = self.upstream.connect().ok();
                // Nobody there: the source is told so as it is by a host.
                link.broken = link.far.is_none();
            }
            self.links.push(link);
            if let Some(left) = &mut self.overtaking {
                *left -= 1;
                match left {
                    0 => self.let_pass(),
                    _ => self.alarms.push((now + OVERTAKEN, Alarm::Overtaken)),
                }
            }
        }
    }

    /// Those that waited are connected, the last first.
    fn let_pass(&mut self) {
        self.overtaking = None;
        for link in self.links.iter_mut().rev().filter(|link| link.far.is_none()) {
            link.far = self.upstream.connect().ok();
            link.broken = link.far.is_none();
        }
    }

    /// How many bytes of a channel have been forwarded.
    fn passed_on(&self, channel: Channel, direction: Direction) -> u64 {
        self.passed.get(&(channel, direction)).copied().unwrap_or(0)
    }

    fn forward(&mut self, now: Instant) {
        for at in 0..self.links.len() {
            for direction in DIRECTIONS {
                // A few times, so that no connection keeps the others waiting.
                for _ in 0..4 {
                    match self.step(at, direction, now) {
                        Moved::Some => {}
                        Moved::Nothing => break,
                        Moved::Broken => {
                            reset_on_close(&self.links[at].near);
                            self.links[at].far.iter().for_each(reset_on_close);
                            self.links[at].broken = true;
                            break;
                        }
                    }
                }
            }
        }
        for echo in &self.echoes {
            // What the destination says to it, nobody hears.
            let _ = recv(&echo.socket, &mut [0u8; 4096][..], RecvFlags::empty());
        }
    }

    /// Takes and gives bytes of one direction once.
    fn step(&mut self, at: usize, direction: Direction, now: Instant) -> Moved {
        let link = &mut self.links[at];
        if link.broken || link.far.is_none() {
            return Moved::Nothing;
        }
        if link.closing.is_none() && link.pipes[direction as usize].is_held_up(now) {
            return Moved::Nothing;
        }
        let channel = link.channel;
        let taken = link.take(direction);
        if taken == Ok(true) && channel == Channel::Main {
            let bytes = link.pipes[direction as usize].held();
            match direction {
                Direction::Forth => self.forth.take(bytes),
                Direction::Back => self.back.take(bytes),
            }
        }
        if self.fire_due(channel, direction, at) {
            return Moved::Some;
        }
        if let Err(other) = taken {
            return other;
        }
        let passed = self.links[at].pipes[direction as usize].passed;
        let due = self.due(channel, direction, passed);
        let mut most = due.map_or(u64::MAX, |due| due - passed);
        if let Some(changed) = self.flip(at, direction) {
            most = most.min(changed);
        }
        let link = &mut self.links[at];
        if link.pipes[direction as usize].left() == 0 {
            link.tell_end(direction);
            return Moved::Nothing;
        }
        let moved = link.give(direction, most, now);
        let pipe = &link.pipes[direction as usize];
        let given = pipe.passed - passed;
        self.passed.insert((channel, direction), pipe.passed);
        self.shared.moved.fetch_add(given, Ordering::Relaxed);
        moved
    }

    /// Changes what is to be changed, or gives how many bytes may go before.
    fn flip(&mut self, at: usize, direction: Direction) -> Option<u64> {
        let link = &mut self.links[at];
        let pipe = &mut link.pipes[direction as usize];
        if pipe.flips.is_empty() || pipe.left() == 0 {
            return None;
        }
        if link.channel == Channel::Main
            && direction == Direction::Forth
            && let Some(end) = self.forth.page_end(pipe.passed)
        {
            return Some(end - pipe.passed);
        }
        let fault = pipe.flips.remove(0);
        let bit = usize::try_from(pipe.passed % 8).expect("below 8");
        pipe.flip(bit);
        if link.channel == Channel::Main {
            self.forth.close();
            self.back.close();
        }
        self.note(fault);
        Some(1)
    }

    /// Where the next fault waits in a direction of a channel.
    fn due(&self, channel: Channel, direction: Direction, passed: u64) -> Option<u64> {
        let marks = || self.forth.marks.iter().chain(&self.back.marks);
        let waiting = self.faults.iter().zip(&self.fired).filter(|(_, fired)| !**fired);
        let places = waiting.filter_map(|(fault, _)| match fault.trigger {
            Trigger::Byte(on, towards, at) => (on == channel && towards == direction).then_some(at),
            Trigger::Mark(mark, then) => {
                let here = channel == Channel::Main && mark.direction() == direction;
                let (_, begin) = marks().find(|(known, _)| here && *known == mark)?;
                Some(begin + then)
            }
            Trigger::Status(..) | Trigger::Time(_) => None,
        });
        places.filter(|at| *at >= passed).min()
    }

    /// Has everything happen that is due at this byte; says whether anything was.
    fn fire_due(&mut self, channel: Channel, direction: Direction, at: usize) -> bool {
        let passed = self.links[at].pipes[direction as usize].passed;
        if self.due(channel, direction, passed) != Some(passed) {
            return false;
        }
        for fault in 0..self.faults.len() {
            let place = match self.faults[fault].trigger {
                _ if self.fired[fault] => None,
                Trigger::Byte(on, towards, at) if on == channel && towards == direction => Some(at),
                Trigger::Mark(mark, then) if channel == Channel::Main => {
                    let mut marks = self.forth.marks.iter().chain(&self.back.marks);
                    let begin = marks.find(|(known, _)| *known == mark).map(|(_, at)| at + then);
                    begin.filter(|_| mark.direction() == direction)
                }
                _ => None,
            };
            if place == Some(passed) {
                self.fire(fault);
            }
        }
        true
    }

    fn phase(&self) -> Phase {
        let told = Phase::from_number(self.shared.phase.load(Ordering::Relaxed));
        let passed = DIRECTIONS.map(|direction| self.passed_on(Channel::Main, direction));
        Phase::seen(told, reading::phase(&self.forth.marks, &self.back.marks, passed))
    }

    fn note(&self, fault: usize) {
        self.shared.fired().push(Fired { fault, phase: self.phase(), at: Instant::now() });
    }

    /// The fault happens.
    fn fire(&mut self, fault: usize) {
        if std::mem::replace(&mut self.fired[fault], true) {
            return;
        }
        let Fault { trigger, action } = self.faults[fault];
        let (channel, direction) =
            (trigger.channel().unwrap_or(Channel::Main), trigger.direction());
        let now = Instant::now();
        if action != Action::Flip {
            self.note(fault);
        }
        match action {
            Action::Cut(scope, how, outage) => {
                self.cut(scope, channel, how, now);
                if !outage.is_zero() {
                    self.refuse(now + outage);
                }
            }
            Action::HalfClose => {
                self.one(channel, |link| link.half_close(direction));
            }
            Action::Delay(time) => {
                let until = Until::Time(now + time);
                self.one(channel, |link| link.pipes[direction as usize].be_silent(until));
            }
            Action::Throttle(scope, rate, time) => {
                let throttle = Throttle { rate, until: now + time };
                self.each(scope, channel, |link| {
                    link.pipes.iter_mut().for_each(|pipe| pipe.throttle = Some(throttle));
                });
            }
            Action::Freeze(scope, time) => {
                let until = time.map_or(Until::Forever, |time| Until::Time(now + time));
                if scope == Scope::All {
                    self.deaf = self.deaf.max(Some(until));
                }
                self.each(scope, channel, |link| {
                    link.pipes.iter_mut().for_each(|pipe| pipe.be_silent(until));
                });
            }
            Action::Duplicate(time) => self.duplicate(channel, now + time),
            Action::Flip => {
                let main = channel == Channel::Main && direction == Direction::Forth;
                // Only what is read along is known not to be a page of the guest's.
                if self.tls || !main || self.forth.can_read() {
                    self.one(channel, |link| link.pipes[direction as usize].flips.push(fault));
                }
            }
            Action::Reorder => {
                let held = 1 + usize::from(self.channels);
                self.overtaking = (self.come == 0).then_some(held);
            }
            Action::Kill(side) => self.signal(side, Signal::KILL),
            Action::Stop(side, time) => {
                self.signal(side, Signal::STOP);
                let time = time.unwrap_or(STOPPED_MAX);
                self.alarms.push((now + time, Alarm::Continue(side)));
            }
            // The run's to do; here it is counted.
            Action::Pause(_) => {}
            Action::Refuse(time) => self.refuse(now + time),
        }
    }

    fn cut(&mut self, scope: Scope, channel: Channel, how: How, now: Instant) {
        self.each(scope, channel, |link| match how {
            How::Reset => {
                reset_on_close(&link.near);
                link.far.iter().for_each(reset_on_close);
                link.broken = true;
            }
            How::Close => link.close_gently(now + DRAINED),
        });
    }

    fn refuse(&mut self, until: Instant) {
        // The port is ours, and the path, too: whoever has taken them meanwhile has broken the run.
        self.door.shut().expect("the address is still free");
        self.alarms.retain(|(_, alarm)| *alarm != Alarm::Reopen);
        self.alarms.push((until, Alarm::Reopen));
    }

    fn duplicate(&mut self, channel: Channel, until: Instant) {
        let Some(link) = self.links.iter().rev().find(|link| link.channel == channel) else {
            return;
        };
        if let Ok(socket) = self.upstream.connect() {
            // As much of it as goes.
            let _ = send(&socket, &link.first, SendFlags::NOSIGNAL);
            self.echoes.push(Echo { socket, until });
        }
    }

    fn signal(&self, side: Side, signal: Signal) {
        let to = side as usize;
        match signal {
            Signal::KILL => self.shared.killed[to].store(true, Ordering::SeqCst),
            _ => self.shared.stopped[to].store(signal == Signal::STOP, Ordering::SeqCst),
        }
        // Nobody has waited for the process: its number is still its own, though it may have ended.
        let _ = kill_process(self.processes[to], signal);
    }

    /// The last connection of a channel.
    fn one(&mut self, channel: Channel, act: impl FnOnce(&mut Link)) {
        let mut links = self.links.iter_mut().rev();
        if let Some(link) = links.find(|link| link.channel == channel && !link.broken) {
            act(link);
        }
    }

    fn each(&mut self, scope: Scope, channel: Channel, mut act: impl FnMut(&mut Link)) {
        match scope {
            Scope::One => self.one(channel, act),
            Scope::All => self.links.iter_mut().for_each(&mut act),
        }
    }
}
