//! The guest and the one right to run it (invariant 3).

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use crate::error::Error;
use crate::status::{Event, RunState};
use crate::vm::Vm;

/// The right to run a guest. One exists for each guest in the whole world: whoever holds it may
/// call `resume`, nobody else. A source that hands its guest over gives it up *before* the first
/// byte that lets the destination start.
#[derive(Debug)]
#[must_use = "a right to run that is dropped leaves a guest that nobody may run"]
pub(crate) struct RunRight(());

type Subscriber = Arc<dyn Fn(&Event) + Send + Sync>;

/// A VM with its run state and whoever wants to know of it.
pub(crate) struct Guest {
    vm: Arc<dyn Vm>,
    inner: Mutex<Inner>,
    returned: Condvar,
    subscribers: Mutex<Vec<(u64, Subscriber)>>,
}

struct Inner {
    state: RunState,
    right: Slot,
    /// How the guest was told to be while a migration held it.
    asked: Option<RunState>,
    /// Pages of RAM that are lost: whoever reads one is killed.
    lost_pages: u64,
    next_subscriber: u64,
}

/// What came of asking for the right.
#[derive(Debug)]
pub(crate) enum Taken {
    /// It is the asker's, to be brought back or given up.
    Right(RunRight),
    /// A migration holds it while it switches over.
    SwitchingOver,
    /// It is not here.
    Elsewhere,
}

/// Where the right is.
enum Slot {
    /// Here, to be taken.
    Here(RunRight),
    /// With somebody who will bring it back or give it up.
    Taken,
    /// With another host, or not come yet.
    Elsewhere,
    /// Given up, and the migration waits to hear whether the destination took it.
    HandedOver,
    /// Given up, and nobody knows whether the destination took it: a human has to say.
    InDoubt,
}

/// A migration out of here; its end is that of all waiting for the other host.
#[derive(Debug)]
pub(crate) struct HandingOver<'g>(&'g Guest);

impl Drop for HandingOver<'_> {
    fn drop(&mut self) {
        let mut inner = self.0.lock();
        if matches!(inner.right, Slot::HandedOver) {
            inner.right = Slot::InDoubt;
        }
    }
}

impl std::fmt::Debug for Guest {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Guest").field("state", &self.state()).finish_non_exhaustive()
    }
}

impl Guest {
    /// A guest in `state`. `Inmigrate` means that the right to run it is still elsewhere.
    pub(crate) fn new(vm: Arc<dyn Vm>, state: RunState) -> Guest {
        let right = match state {
            RunState::Inmigrate => Slot::Elsewhere,
            RunState::Prelaunch
            | RunState::Running
            | RunState::Paused
            | RunState::FinishMigrate
            | RunState::Postmigrate
            | RunState::Colo
            | RunState::InternalError => Slot::Here(RunRight(())),
        };
        Guest {
            vm,
            inner: Mutex::new(Inner {
                state,
                right,
                asked: None,
                lost_pages: 0,
                next_subscriber: 0,
            }),
            returned: Condvar::new(),
            subscribers: Mutex::default(),
        }
    }

    pub(crate) fn vm(&self) -> &dyn Vm {
        &*self.vm
    }

    pub(crate) fn state(&self) -> RunState {
        self.lock().state
    }

    pub(crate) fn set_state(&self, state: RunState) {
        self.lock().state = state;
        // Who waits for the right may have to see that it is not worth waiting.
        self.returned.notify_all();
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        // Only plain values are stored under the lock: a panic elsewhere cannot leave it half done.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes the right, waiting for whoever has it for a moment. A migration that switches over
    /// has it for longer: nobody waits for that.
    pub(crate) fn take_right(&self) -> Taken {
        let mut inner = self.lock();
        loop {
            match std::mem::replace(&mut inner.right, Slot::Taken) {
                Slot::Here(right) => return Taken::Right(right),
                Slot::Taken if inner.state.is_held_by_migration() => {
                    return Taken::SwitchingOver;
                }
                Slot::Taken => {
                    inner = self.returned.wait(inner).unwrap_or_else(PoisonError::into_inner);
                }
                elsewhere @ (Slot::Elsewhere | Slot::HandedOver | Slot::InDoubt) => {
                    inner.right = elsewhere;
                    return Taken::Elsewhere;
                }
            }
        }
    }

    /// How the guest was told to be while a migration held it (`stop`, and in COLO `cont`); forgets it.
    pub(crate) fn take_asked(&self) -> Option<RunState> {
        self.lock().asked.take()
    }

    /// Brings the right back, with the state the guest is in.
    pub(crate) fn put_right(&self, right: RunRight, state: RunState) {
        let mut inner = self.lock();
        inner.right = Slot::Here(right);
        inner.state = state;
        self.returned.notify_all();
    }

    /// The right has been given up for another host to take. Nobody gets it here until it is known
    /// that the host did take it ([`right_is_taken`](Guest::right_is_taken)), or that nobody will
    /// ever know ([`handing_over`](Guest::handing_over)).
    pub(crate) fn give_up_right(&self, right: RunRight) {
        let RunRight(()) = right;
        let mut inner = self.lock();
        inner.right = Slot::HandedOver;
        inner.state = RunState::Postmigrate;
        self.returned.notify_all();
    }

    /// For the time of a migration out of here: when it ends, and the right was given up for good
    /// and nobody knows whether the other host took it, only a human can decide that it did not.
    pub(crate) fn handing_over(&self) -> HandingOver<'_> {
        HandingOver(self)
    }

    /// The other host said that it has the right that was given up.
    pub(crate) fn right_is_taken(&self) {
        self.lock().right = Slot::Elsewhere;
    }

    /// The right has come from another host: the source has given it up, as its stream says.
    pub(crate) fn right_has_come(&self) -> RunRight {
        let mut inner = self.lock();
        assert!(matches!(inner.right, Slot::Elsewhere), "the right to run comes once");
        inner.right = Slot::Taken;
        RunRight(())
    }

    /// The right had been given up, and the other host was not told so: it comes back.
    pub(crate) fn right_is_returned(&self) -> Option<RunRight> {
        self.right_out_of(|slot| matches!(slot, Slot::HandedOver))
    }

    /// A human takes the right back after a hand-over whose outcome nobody knows.
    fn right_by_order(&self) -> Option<RunRight> {
        self.right_out_of(|slot| matches!(slot, Slot::InDoubt))
    }

    fn right_out_of(&self, given_up: impl Fn(&Slot) -> bool) -> Option<RunRight> {
        let mut inner = self.lock();
        if !given_up(&inner.right) {
            return None;
        }
        inner.right = Slot::Taken;
        Some(RunRight(()))
    }

    fn is_handed_over(&self) -> bool {
        matches!(self.lock().right, Slot::HandedOver)
    }

    /// So many more pages of RAM are lost, and have been given up.
    pub(crate) fn add_lost(&self, pages: u64) {
        self.lock().lost_pages += pages;
    }

    /// How many pages of RAM are lost.
    pub(crate) fn lost_pages(&self) -> u64 {
        self.lock().lost_pages
    }

    /// `stop`.
    pub(crate) fn stop(&self) -> Result<(), Error> {
        let right = match self.take_right() {
            Taken::Right(right) => right,
            Taken::Elsewhere => return Ok(()), // It does not run here: nothing to stop.
            Taken::SwitchingOver => {
                // It stands still already, and is to stay so if it comes back.
                self.lock().asked = Some(RunState::Paused);
                return Ok(());
            }
        };
        let before = self.state();
        if before != RunState::Running {
            self.put_right(right, before);
            return Ok(());
        }
        let result = self.pause(&right);
        self.put_right(right, if result.is_ok() { RunState::Paused } else { before });
        result
    }

    /// `cont`.
    pub(crate) fn cont(&self) -> Result<(), Error> {
        let right = match self.take_right() {
            Taken::Right(right) => right,
            Taken::SwitchingOver if self.state() == RunState::Colo => {
                self.lock().asked = Some(RunState::Running);
                return Ok(()); // It goes on when the checkpoint has been taken.
            }
            Taken::SwitchingOver => {
                return Err(Error::Refused(
                    "the guest is being switched over: it runs at the destination soon \
                     (or here, after 'migrate_cancel')"
                        .into(),
                ));
            }
            Taken::Elsewhere => self.right_by_order().ok_or_else(|| match self.state() {
                RunState::Colo => Error::Refused(
                    "the guest is the primary's, and this VM only keeps in step with it: \
                     'x-colo-lost-heartbeat' takes it over"
                        .into(),
                ),
                RunState::Inmigrate => Error::Refused(
                    "the guest has not arrived yet: it runs when its migration is complete".into(),
                ),
                _ if self.is_handed_over() => Error::Refused(
                    "the guest has been handed over and may be running at the destination: \
                     wait for the end of the migration, which says more"
                        .into(),
                ),
                _ => Error::Refused("the guest has moved to the destination and runs there".into()),
            })?,
        };
        let before = self.state();
        if before == RunState::Running {
            self.put_right(right, before);
            return Ok(());
        }
        let result = self.resume(&right);
        self.put_right(right, if result.is_ok() { RunState::Running } else { before });
        result
    }

    /// Stops the guest; the holder of the right says so.
    pub(crate) fn pause(&self, _right: &RunRight) -> Result<(), Error> {
        self.vm.pause().map_err(Error::vm("stopping the guest"))?;
        self.emit(&Event::Stop);
        Ok(())
    }

    /// Runs the guest; only the holder of the right can.
    pub(crate) fn resume(&self, _right: &RunRight) -> Result<(), Error> {
        self.vm.resume().map_err(Error::vm("running the guest"))?;
        self.emit(&Event::Resume);
        Ok(())
    }

    /// At a secondary of COLO: runs a copy of the primary's guest, of which nothing is let out.
    pub(crate) fn resume_copy(&self) -> Result<(), Error> {
        self.vm.resume().map_err(Error::vm("running the copy of the guest"))
    }

    /// Stops the copy.
    pub(crate) fn pause_copy(&self) -> Result<(), Error> {
        self.vm.pause().map_err(Error::vm("stopping the copy of the guest"))
    }

    /// Calls `subscriber` on every event until [`unsubscribe`](Guest::unsubscribe).
    pub(crate) fn subscribe(&self, subscriber: Subscriber) -> u64 {
        let id = {
            let mut inner = self.lock();
            inner.next_subscriber += 1;
            inner.next_subscriber
        };
        self.subscribers.lock().unwrap_or_else(PoisonError::into_inner).push((id, subscriber));
        id
    }

    pub(crate) fn unsubscribe(&self, id: u64) {
        let mut all = self.subscribers.lock().unwrap_or_else(PoisonError::into_inner);
        all.retain(|(other, _)| *other != id);
    }

    /// Tells every subscriber, with no lock held.
    pub(crate) fn emit(&self, event: &Event) {
        let all: Vec<Subscriber> = {
            let list = self.subscribers.lock().unwrap_or_else(PoisonError::into_inner);
            list.iter().map(|(_, subscriber)| subscriber.clone()).collect()
        };
        for subscriber in all {
            subscriber(event);
        }
    }
}
