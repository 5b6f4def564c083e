//! COLO: a second VM is kept in step with a guest, checkpoint after checkpoint, and takes over when
//! the guest's host dies.
//!
//! It begins where a precopy ends: all of the guest is at the other side, and nobody has given it
//! away. From there on the [`primary`] keeps the one right to run it, and the [`secondary`] has a
//! copy, of which nothing is let out. Each checkpoint brings the copy to where the guest is: the
//! primary stops, sends what has changed, and goes on as soon as that is with the kernel; the
//! secondary takes it in beside its memory, and into it only when all of it is there. So whichever
//! side is lost, at whatever byte, the other one has a whole guest.
//!
//! What comes and goes on the wire is `destination/checkpoint.rs` and, at the primary, the same
//! code that ends a precopy.

pub(crate) mod flush;
pub(crate) mod output;
pub(crate) mod primary;
pub(crate) mod rounds;
pub(crate) mod secondary;

use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use self::output::MaybeOutput;
use crate::error::Error;
use crate::latency::Latencies;
use crate::settings::ColoFailover;
use crate::status::{ColoExitReason, ColoMode, ColoStats, ColoStatus};
use crate::vm::VmError;
use crate::worker::{Bell, Cancel};

/// What makes sure that the other side runs no more.
pub(crate) type Fence = Arc<dyn Fn() -> Result<(), VmError> + Send + Sync>;

/// A side of COLO, as it is told and asked from outside.
pub(crate) struct Replication {
    side: ColoMode,
    /// Something was said that a side waits for; there is none before it begins.
    said: OnceLock<Bell>,
    fence: Option<Fence>,
    output: MaybeOutput,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    status: ColoStatus,
    /// `x-colo-lost-heartbeat`.
    asked: bool,
    /// A checkpoint is to be taken now.
    wanted: bool,
    /// What ends the waits on the connections, while there are any.
    ends: Option<Cancel>,
    counted: Counted,
}

#[derive(Debug, Default)]
struct Counted {
    checkpoints: u64,
    pages: u64,
    ahead: u64,
    stop: Latencies,
    memory: Latencies,
}

/// A checkpoint that is complete.
#[derive(Clone, Copy, Debug)]
struct Checkpoint {
    /// How long the guest stood still.
    stop: Duration,
    /// The part of it that was memory's.
    memory: Duration,
    pages: u64,
    /// Pages that had gone ahead of it.
    ahead: u64,
}

impl std::fmt::Debug for Replication {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Replication").field("state", &self.lock()).finish_non_exhaustive()
    }
}

impl Replication {
    pub(crate) fn new(side: ColoMode, fence: Option<Fence>, output: MaybeOutput) -> Replication {
        Replication { side, said: OnceLock::new(), fence, output, state: Mutex::default() }
    }

    /// What the guest says to the world.
    fn output(&self) -> &MaybeOutput {
        &self.output
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Plain values, whole after every statement.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Both sides have all of the guest. `ends` is what ends the waits on the connections.
    fn begins(&self, ends: &Cancel) -> Result<(), Error> {
        let said = Bell::new().map_err(Error::system("making an eventfd"))?;
        assert!(self.said.set(said).is_ok(), "it begins once");
        let mut state = self.lock();
        state.status.mode = self.side;
        state.ends = Some(ends.clone());
        Ok(())
    }

    fn said(&self) -> &Bell {
        self.said.get().expect("it has begun")
    }

    /// Whether it ever came so far.
    pub(crate) fn has_begun(&self) -> bool {
        let state = self.lock();
        state.status.mode != ColoMode::None || state.status.last_mode != ColoMode::None
    }

    /// `x-colo-lost-heartbeat`: the other side is gone, whatever the connection says, and this one
    /// goes on alone.
    pub(crate) fn lose_heartbeat(&self) -> Result<(), Error> {
        let ends = {
            let mut state = self.lock();
            if state.status.mode == ColoMode::None {
                return Err(not_in_colo());
            }
            state.asked = true;
            state.ends.clone()
        };
        if let Some(ends) = ends {
            ends.set();
        }
        self.said().ring();
        Ok(())
    }

    fn is_asked(&self) -> bool {
        self.lock().asked
    }

    /// A checkpoint is to be taken now, and not only when it is time.
    pub(crate) fn want_checkpoint(&self) -> Result<(), Error> {
        let mut state = self.lock();
        match state.status.mode {
            ColoMode::Primary => {
                state.wanted = true;
                drop(state);
                self.said().ring();
                Ok(())
            }
            ColoMode::Secondary => Err(Error::Refused(
                "this is the secondary: it is the primary that takes checkpoints".into(),
            )),
            ColoMode::None => Err(not_in_colo()),
        }
    }

    /// Whether a checkpoint is wanted; from here on one has to be wanted anew.
    fn is_wanted(&self) -> bool {
        self.said().heed();
        std::mem::take(&mut self.lock().wanted)
    }

    /// Whether one is wanted, or the other side is not: whatever else is under way is to end.
    fn wants_checkpoint(&self) -> bool {
        let state = self.lock();
        state.wanted || state.asked
    }

    fn is_complete(&self, checkpoint: Checkpoint) {
        let counted = &mut self.lock().counted;
        counted.checkpoints += 1;
        counted.pages += checkpoint.pages;
        counted.ahead += checkpoint.ahead;
        counted.stop.record(checkpoint.stop);
        counted.memory.record(checkpoint.memory);
    }

    /// It is over, on request if it was asked for or `cancelled`; gives why.
    fn ends(&self, cancelled: bool) -> ColoExitReason {
        let mut state = self.lock();
        let reason = match state.asked || cancelled {
            true => ColoExitReason::Request,
            false => ColoExitReason::Error,
        };
        state.status.reason = reason;
        state.ends = None;
        reason
    }

    /// This side goes on alone.
    fn is_left(&self) {
        let mut state = self.lock();
        (state.status.last_mode, state.status.mode) = (self.side, ColoMode::None);
    }

    /// Waits until somebody says that the other side is gone; false when it is all ended before.
    fn wait_until_asked(&self, cancel: &Cancel) -> bool {
        loop {
            if self.is_asked() {
                return true;
            }
            // Without a descriptor to wait on there is nothing to be done but to end.
            if self.said().wait(cancel, None).is_ok_and(|woken| woken.is_ready()) {
                continue;
            }
            return self.is_asked();
        }
    }

    fn has_fence(&self) -> bool {
        self.fence.is_some()
    }

    /// Makes sure that the other side runs no more, without being told: `None` when that is not for
    /// this side to say.
    fn fence(&self, failover: ColoFailover) -> Option<Result<(), VmError>> {
        match failover {
            ColoFailover::Auto => self.fence.as_ref().map(|fence| fence()),
            ColoFailover::Manual => None,
        }
    }

    pub(crate) fn status(&self) -> ColoStatus {
        self.lock().status
    }

    /// The checkpoints so far; `None` when it has not come so far.
    pub(crate) fn stats(&self) -> Option<ColoStats> {
        if !self.has_begun() {
            return None;
        }
        let Counted { checkpoints, pages, ahead, stop, memory } = &self.lock().counted;
        Some(ColoStats {
            checkpoints: *checkpoints,
            pages: *pages,
            ahead: *ahead,
            stop_us: stop.summary(),
            memory_us: memory.summary(),
        })
    }
}

pub(crate) fn not_in_colo() -> Error {
    Error::Refused("VM is not in COLO mode".into())
}
