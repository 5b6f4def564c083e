//! A source without manners: does what an input says on connections to the engine.

use std::path::PathBuf;
use std::time::Duration;

use whimbrel::fuzzing::Knowing;
use whimbrel_wire::recovery::{HelloKind, Welcome};

use crate::ends::{End, patience, within};
use crate::telling::{CHANNELS, Step, URGENT, identity};

/// How long an answer may take that is waited for.
const ANSWER: Duration = patience(50);

/// Most connections beside those of the migration.
const STRANGERS_MAX: usize = 8;

/// The source.
pub(crate) struct Speaker {
    /// Where the destination is.
    path: PathBuf,
    ends: [Option<End>; CHANNELS],
    strangers: Vec<Option<End>>,
    knowing: Knowing,
    /// It has come back: channels connect when something is said on them.
    again: bool,
}

impl Speaker {
    /// Connects so many channels: the main one first.
    pub(crate) fn connect(path: PathBuf, channels: usize) -> Speaker {
        let mut speaker = Speaker {
            path,
            ends: Default::default(),
            strangers: Vec::new(),
            knowing: Knowing::new(identity(0)),
            again: false,
        };
        (0..channels).for_each(|channel| speaker.ends[channel] = speaker.connected());
        speaker
    }

    fn connected(&self) -> Option<End> {
        End::connect(&self.path)
    }

    fn send(&mut self, channel: usize, bytes: &[u8]) {
        if self.ends[channel].is_none() && (channel == URGENT || self.again) {
            self.ends[channel] = self.connected();
        }
        if let Some(end) = &mut self.ends[channel] {
            end.send(bytes);
        }
    }

    /// Does it; `recover` has the destination wait elsewhere, if it can.
    pub(crate) fn go(&mut self, step: Step, recover: impl FnOnce() -> Option<PathBuf>) {
        match step {
            Step::Send(channel, bytes) => self.send(channel, &bytes),
            Step::Connect if self.ends[URGENT].is_none() => self.ends[URGENT] = self.connected(),
            Step::Connect if self.strangers.len() < STRANGERS_MAX => {
                self.strangers.push(self.connected());
            }
            Step::Connect => {}
            Step::Close(channel) => self.ends[channel].iter_mut().for_each(End::close),
            Step::Settle => self.settle(),
            Step::Again => self.come_back(),
            Step::Recover => {
                self.ends = Default::default();
                if let Some(path) = recover() {
                    self.path = path;
                }
                self.come_back();
            }
            Step::Hello(channel, attempt, kind) => {
                let hello = match kind {
                    HelloKind::Main => self.knowing.hello(attempt.into()),
                    kind => self.knowing.beside(kind),
                };
                let mut words = Vec::new();
                hello.encode(&mut words);
                self.send(channel, &words);
            }
            Step::Prove(wrong) => self.prove(wrong),
        }
        self.receive();
    }

    fn come_back(&mut self) {
        self.again = true;
        self.ends = Default::default();
        self.ends[0] = self.connected();
    }

    fn prove(&mut self, wrong: bool) {
        let Some(main) = &mut self.ends[0] else { return };
        within(ANSWER, || {
            main.receive();
            main.ended || main.came.len() >= Welcome::LEN
        });
        let Some(welcome) = main.came.first_chunk() else { return };
        let mut words = Vec::new();
        self.knowing.proof(welcome).encode(&mut words);
        if wrong && let Some(last) = words.last_mut() {
            *last ^= 1;
        }
        main.send(&words);
    }

    /// Takes in what is said to it.
    pub(crate) fn receive(&mut self) {
        self.ends.iter_mut().flatten().for_each(|end| {
            end.receive();
        });
    }

    /// Waits until what was said has been taken.
    fn settle(&mut self) {
        self.ends.iter_mut().flatten().for_each(End::settle);
    }

    /// Says no more, on any channel.
    pub(crate) fn close(&mut self) {
        self.settle();
        self.ends.iter_mut().flatten().for_each(End::close);
    }
}
