//! Multifd at the destination: each connection has a thread, `dest/recv-N`, that reads packets and
//! has the kernel place their pages ([`receiver`]).
//!
//! Where `dest/main` meets a mark in the main channel, it waits until every channel has delivered
//! what was sent before it; a channel that has waits there until all have ([`rounds`]).

mod input;
mod receiver;
mod rounds;
mod target;

use std::sync::Arc;

use crate::error::Error;
use crate::worker::{Cancel, Role, Worker};

pub(super) use input::PacketInput;
use receiver::Receiver;
use rounds::Rounds;
pub(super) use target::{Cached, Target};

/// The threads that take pages in. Dropping them ends them.
#[derive(Debug)]
pub(super) struct Receivers {
    rounds: Arc<Rounds>,
    /// Every end of a `ram` section is a mark; known after the stream's beginning.
    mark_each_section: Option<bool>,
    workers: Vec<Worker>,
    /// Ends the threads' waits, and nobody else's.
    end: Cancel,
}

impl Receivers {
    /// Starts a thread for each of `channels`. One that fails sets `stop`.
    pub(super) fn start(
        channels: Vec<PacketInput>,
        target: &Arc<Target>,
        stop: &Cancel,
    ) -> Result<Receivers, Error> {
        let rounds = Arc::new(Rounds::new(channels.len(), stop.clone())?);
        let end = stop.beside().map_err(Error::system("making an eventfd"))?;
        let start = |(mut channel, number): (PacketInput, u8)| {
            let (rounds, target) = (rounds.clone(), target.clone());
            channel.heed(end.clone());
            Worker::start(Role::DestinationReceive(number), end.clone(), move || {
                let mut receiver = Receiver::new(channel, &target, &rounds);
                let how = receiver.run();
                rounds.ended(number, how, receiver.into_input());
            })
            .map_err(Error::system("starting a thread"))
        };
        let workers = channels.into_iter().zip(0u8..).map(start).collect::<Result<_, Error>>()?;
        Ok(Receivers { rounds, mark_each_section: None, workers, end })
    }

    /// A mark of its own has come.
    pub(super) fn mark(&mut self) -> Result<(), Error> {
        self.mark_each_section = Some(false);
        self.rounds.next()
    }

    /// A `ram` section has ended, which is a mark in the streams of older machine types: those
    /// whose beginning ended without one of its own.
    pub(super) fn section_ends(&mut self) -> Result<(), Error> {
        match self.mark_each_section.get_or_insert(true) {
            true => self.rounds.next(),
            false => Ok(()),
        }
    }

    /// Waits until each has ended its round, and lets none begin the next.
    pub(super) fn wait_for_all(&self) -> Result<(), Error> {
        self.rounds.wait_for_all()
    }

    /// Why one of them has failed.
    pub(super) fn take_failure(&self) -> Option<Error> {
        self.rounds.take_failure()
    }

    /// The guest comes before the rest of its RAM: ends the threads, and gives their channels in
    /// the order of their numbers. With `behind_a_round`, when all of them have ended a last round
    /// for that; otherwise nothing may come on them any more.
    pub(super) fn retire(mut self, behind_a_round: bool) -> Result<Vec<PacketInput>, Error> {
        if behind_a_round {
            self.rounds.wait_for_all()?;
        }
        self.end_threads();
        self.rounds.take_inputs()
    }

    fn end_threads(&mut self) {
        self.rounds.end();
        // Dropped one by one, each wakes all of them first.
        self.workers.clear();
    }
}

impl Drop for Receivers {
    fn drop(&mut self) {
        self.end.set();
        self.end_threads();
    }
}
