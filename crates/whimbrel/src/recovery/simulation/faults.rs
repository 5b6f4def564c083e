//! What befalls the link, and who else comes.

use std::time::Duration;

use whimbrel_wire::recovery::{Hello, HelloKind, Identity};

use super::dice::Dice;
use super::net::{Between, End, Line};
use super::world::{Event, MS, Setting, World};
use crate::recovery::proofs::{Attempt, Proofs};

#[derive(Clone, Copy, Debug)]
pub(super) enum Fault {
    /// All connections break, the ends notice with this chance of a hundred, and the link stays
    /// away for a while.
    Cut { noticed: u64, down: Duration },
    /// One connection breaks.
    CutOne,
    /// Whatever is connected breaks after so many bytes more.
    CutAfter(usize),
    /// Everything takes longer from now on.
    Slow(u32),
    /// After so many words of exchanges a bit of the next is another one.
    Flip(u64),
    /// Somebody who knows nothing connects to the destination.
    Stranger(Guise),
    /// Somebody else answers the source for so long.
    Impostor(Duration),
    /// The next hello of the source gets to a thief, who says it to the destination later.
    Thief,
    /// The next time the source connects by two ways.
    Twice,
}

/// What a stranger says.
#[derive(Clone, Copy, Debug)]
pub(super) enum Guise {
    Nothing,
    Garbage,
    /// As a QEMU begins a recovery.
    Qemu,
    /// A hello with another secret.
    Forged(HelloKind),
    /// Half of one.
    Half,
    /// The source's own, from an earlier try.
    Replayed,
}

/// The faults of a schedule.
pub(super) fn draw(dice: &mut Dice, latency: Duration, setting: Setting) -> Vec<(Duration, Fault)> {
    let scale = 30 * setting.step + 4 * latency;
    let count = match dice.percent(5) {
        true => 20 + dice.below(20),
        false => dice.below(8),
    };
    let mut at = Duration::ZERO;
    let mut next = |_| {
        at += dice.within(scale);
        (at, draw_one(dice, scale, setting.qemu))
    };
    (0..count).map(&mut next).collect()
}

fn draw_one(dice: &mut Dice, scale: Duration, qemu: bool) -> Fault {
    match dice.below(16) {
        0..=4 => {
            let noticed = match dice.below(3) {
                // Without a promise to say something its silence means nothing: the kernel notices.
                _ if qemu => 100,
                0 => 0,
                1 => 40,
                _ => 100,
            };
            let down = match dice.below(4) {
                0 => Duration::ZERO,
                1 => dice.within(5000 * MS),
                _ => dice.within(2 * scale),
            };
            Fault::Cut { noticed, down }
        }
        5 => Fault::CutOne,
        6 | 7 => {
            let most = if dice.percent(50) { 300 } else { 20_000 };
            Fault::CutAfter(dice.index(most))
        }
        8 => Fault::Slow(1 + u32::try_from(dice.below(6)).expect("few")),
        9 => Fault::Flip(dice.below(8)),
        10 | 11 if !qemu => Fault::Stranger(match dice.below(8) {
            0 => Guise::Nothing,
            1 => Guise::Garbage,
            2 => Guise::Qemu,
            3 => Guise::Half,
            4 => Guise::Forged(HelloKind::Main),
            5 => Guise::Forged(HelloKind::Urgent),
            _ => Guise::Replayed,
        }),
        10 | 11 => Fault::Stranger(Guise::Garbage),
        12 if !qemu => Fault::Impostor(dice.within(50 * MS)),
        13 if !qemu => Fault::Thief,
        _ => Fault::Twice,
    }
}

impl World<'_> {
    pub(super) fn strike(&mut self, number: usize) {
        self.summary.faults += 1;
        match self.faults[number].1 {
            Fault::Cut { noticed, down } => {
                self.link_down_until = self.link_down_until.max(self.now + down);
                // So that somebody looks at the clock then.
                self.note(self.link_down_until, Event::LinkUp);
                let lines = self.net.alive();
                self.cut(&lines, noticed);
            }
            Fault::CutOne => {
                let lines = self.net.alive();
                if !lines.is_empty() {
                    let line = lines[self.dice.index(lines.len())];
                    self.cut(&[line], 100);
                }
            }
            Fault::CutAfter(bytes) => self.net.cut_after = Some(bytes),
            Fault::Slow(times) => {
                self.net.latency = (self.net.latency * times).min(100 * MS);
            }
            Fault::Flip(after) => self.net.flip_after = Some(after),
            Fault::Stranger(guise) => self.stranger(guise),
            Fault::Impostor(time) => self.source.impostor = self.now + time,
            Fault::Thief => self.source.thief = true,
            Fault::Twice => self.source.twice = true,
        }
    }

    fn come(&mut self, between: Between, words: &[u8]) -> Line {
        let line = self.net.connect(between);
        self.note(self.now + self.net.latency, Event::Accept(line));
        // Whatever becomes of it.
        let _ = self.write(line, End::Source, words);
        if self.dice.percent(30) {
            self.close(line, End::Source);
        }
        line
    }

    fn stranger(&mut self, guise: Guise) {
        if !self.is_link_up() {
            return;
        }
        let identity = Identity { secret: [1; 32], ..self.shape.identity };
        let (forged, mut words) = (Proofs::of(identity), Vec::new());
        match guise {
            Guise::Nothing => {}
            Guise::Garbage => words.extend_from_slice(&self.dice.fill::<120>()),
            Guise::Qemu => words.extend_from_slice(&[8, 0, 10, 0, 4, 3, b'r', b'a', b'm']),
            Guise::Forged(HelloKind::Main) => forged.hello(u32::MAX, [3; 16]).encode(&mut words),
            Guise::Forged(kind) => {
                // What was to be seen of the last try, it has seen.
                let seen = self.recorded.last().and_then(|words| words.first_chunk());
                let (number, source) = seen
                    .and_then(Hello::parse)
                    .map_or((1, [3; 16]), |hello| (hello.attempt, hello.nonce));
                let attempt = Attempt { number, source, destination: [4; 16] };
                forged.beside(&attempt, kind).encode(&mut words);
            }
            Guise::Half => {
                forged.hello(u32::MAX, [3; 16]).encode(&mut words);
                words.truncate(1 + self.dice.index(Hello::LEN - 1));
            }
            Guise::Replayed => {
                let Some(at) = self.recorded.len().checked_sub(1) else { return };
                let at = self.dice.index(at + 1);
                words.clone_from(&self.recorded[at]);
                let hello = words.first_chunk().and_then(Hello::parse).expect("a hello");
                if hello.attempt > self.destination.door.admitted {
                    return; // It is on its way still: that is a thief's to say.
                }
            }
        }
        self.come(Between::Stranger, &words);
    }

    /// Whoever answers the source in the destination's place.
    pub(super) fn impersonate(&mut self, line: Line, hello: &[u8], stolen: bool) {
        if stolen {
            self.recorded.push(hello.to_vec());
            let at = self.now + self.dice.within(20 * MS);
            self.note(at, Event::Replay(self.recorded.len() - 1));
        }
        let mut words = Vec::new();
        match self.dice.below(4) {
            0 => {}
            1 => words.extend_from_slice(&self.dice.fill::<60>()),
            2 if !self.source.welcomes.is_empty() => {
                let at = self.dice.index(self.source.welcomes.len());
                words.clone_from(&self.source.welcomes[at]);
            }
            _ => {
                let identity = Identity { secret: [1; 32], ..self.shape.identity };
                let hello = hello.first_chunk().and_then(Hello::parse).expect("a hello");
                let (number, source) = (hello.attempt, hello.nonce);
                let attempt = Attempt { number, source, destination: [4; 16] };
                Proofs::of(identity).welcome(&attempt).encode(&mut words);
            }
        }
        let _ = self.write(line, End::Destination, &words);
        if self.dice.percent(50) {
            self.close(line, End::Destination);
        }
    }

    /// A thief says to the destination what the source has said.
    pub(super) fn replay(&mut self, number: usize) {
        if !self.is_link_up() {
            return;
        }
        let mut words = self.recorded[number].clone();
        if self.dice.percent(30) {
            words.extend_from_slice(b"WhP1");
            words.extend_from_slice(&self.dice.fill::<32>());
        }
        self.come(Between::Thief, &words);
    }
}
