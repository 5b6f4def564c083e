//! Rounds: nobody begins the next before everybody has ended the one before.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use super::input::PacketInput;
use crate::channel::name;
use crate::error::Error;
use crate::worker::{Bell, Cancel, Woken};

/// Where the receivers of a migration stand, for `dest/main` and for them.
#[derive(Debug)]
pub(super) struct Rounds {
    members: usize,
    state: Mutex<State>,
    released: Condvar,
    /// Wakes `dest/main`.
    bell: Bell,
    stop: Cancel,
}

#[derive(Debug, Default)]
struct State {
    round: u64,
    /// Receivers that have ended their round.
    waiting: usize,
    /// The first channel that its source closed, and after how many bytes.
    closed: Option<(u8, u64)>,
    failure: Option<Error>,
    /// What a receiver says that was ended within a packet.
    cut: Option<Error>,
    /// The channels of receivers that are no more.
    inputs: Vec<(u8, PacketInput)>,
    over: bool,
}

impl Rounds {
    pub(super) fn new(members: usize, stop: Cancel) -> Result<Rounds, Error> {
        Ok(Rounds {
            members,
            state: Mutex::default(),
            released: Condvar::new(),
            bell: Bell::new().map_err(Error::system("making an eventfd"))?,
            stop,
        })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Plain values, whole after every statement.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// `dest/main`: waits until all have ended the round, and begins the next.
    pub(super) fn next(&self) -> Result<(), Error> {
        self.wait_for_all()?;
        let mut state = self.lock();
        state.waiting = 0;
        state.round += 1;
        self.released.notify_all();
        Ok(())
    }

    /// `dest/main`: waits until all have ended the round.
    pub(super) fn wait_for_all(&self) -> Result<(), Error> {
        loop {
            let mut state = self.lock();
            if let Some(error) = state.failure.take() {
                return Err(error);
            }
            if state.waiting == self.members {
                return Ok(());
            }
            if let Some((number, offset)) = state.closed {
                let expected = "the rest of its round, up to a SYNC packet".into();
                return Err(Error::Ended { channel: name::multifd(number), offset, expected });
            }
            drop(state);
            let woken = self.bell.wait(&self.stop, None);
            if woken.map_err(Error::system("waiting for the channels"))? == Woken::Cancelled {
                return Err(self.take_failure().unwrap_or(Error::Cancelled));
            }
        }
    }

    /// A receiver: its round has ended. Returns in the next one, or with false at the end of it
    /// all.
    pub(super) fn wait_for_next(&self) -> bool {
        let mut state = self.lock();
        let round = state.round;
        state.waiting += 1;
        if state.waiting == self.members {
            self.bell.ring();
        }
        while state.round == round && !state.over {
            state = self.released.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        !state.over
    }

    /// A receiver is no more: its channel was closed after so many bytes, or it failed.
    pub(super) fn ended(&self, number: u8, how: Result<u64, Error>, input: PacketInput) {
        let within_a_packet = input.is_within_a_packet();
        let behind_the_end = input.wrong("a packet where nothing was to come any more");
        let mut state = self.lock();
        state.inputs.push((number, input));
        match how {
            Ok(offset) => {
                state.closed.get_or_insert((number, offset));
            }
            // Who was ended where nothing more was to come is not the reason.
            Err(Error::Cancelled) if !within_a_packet => {}
            Err(Error::Cancelled) => {
                state.cut.get_or_insert(behind_the_end);
            }
            Err(error) => {
                state.failure.get_or_insert(error);
                self.stop.set();
            }
        }
        self.bell.ring();
    }

    pub(super) fn take_failure(&self) -> Option<Error> {
        self.lock().failure.take()
    }

    /// The channels of all receivers, which are no more, by their numbers; unless one of them has
    /// failed, or was ended within a packet.
    pub(super) fn take_inputs(&self) -> Result<Vec<PacketInput>, Error> {
        let mut state = self.lock();
        if let Some(error) = state.failure.take().or(state.cut.take()) {
            return Err(error);
        }
        let mut inputs = std::mem::take(&mut state.inputs);
        inputs.sort_by_key(|(number, _)| *number);
        Ok(inputs.into_iter().map(|(_, input)| input).collect())
    }

    /// Lets all receivers go.
    pub(super) fn end(&self) {
        self.lock().over = true;
        self.released.notify_all();
    }
}
