//! What a failed or cancelled migration leaves behind: the guest as it was, and nothing else.

use std::cell::RefCell;

use whimbrel_ram::dirty::{DirtyBits, DirtyLog};
use whimbrel_ram::{Claim, PageMap, TargetPage};

use super::multifd::Log;
use super::{Held, Job};
use crate::error::Error;
use crate::guest::Guest;
use crate::status::{MigrationStatus, RunState};

/// A dirty log that is on. Dropped before [`delivered`](Logging::delivered), every page taken from
/// it is put back.
pub(crate) struct Logging<'v> {
    log: &'v dyn DirtyLog,
    /// All that was taken so far; of this migration's thread alone.
    taken: RefCell<Option<DirtyBits>>,
}

impl std::fmt::Debug for Logging<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let taken = self.taken.borrow().as_ref().map(DirtyBits::count);
        f.debug_struct("Logging").field("taken", &taken).finish_non_exhaustive()
    }
}

impl<'v> Logging<'v> {
    pub(super) fn start(log: &'v dyn DirtyLog) -> Result<Logging<'v>, Error> {
        log.start().map_err(Error::DirtyLog)?;
        Ok(Logging { log, taken: RefCell::new(None) })
    }

    /// Takes the dirty pages onto the map; gives how many there were.
    pub(super) fn take_into(&self, map: &PageMap) -> Result<u64, Error> {
        self.take_bits_into(map).map(|bits| bits.count())
    }

    /// The same; gives the dirty pages.
    pub(super) fn take_bits_into(&self, map: &PageMap) -> Result<DirtyBits, Error> {
        let bits = self.log.take().map_err(Error::DirtyLog)?;
        map.mark(&bits);
        match &mut *self.taken.borrow_mut() {
            Some(taken) => taken.merge(&bits),
            none => *none = Some(bits.clone()),
        }
        Ok(bits)
    }

    /// Has the log watch the claim's pages again; must come before their content is read.
    pub(super) fn rearm(&self, claim: &Claim<'_>) -> Result<(), Error> {
        let span = claim.span();
        let count = span.end - span.start;
        self.log.rearm(claim.block(), TargetPage(span.start), count).map_err(Error::DirtyLog)
    }

    /// The log, for threads that only have it watch pages again.
    pub(super) fn log(&self) -> Log<'v> {
        Log(self.log)
    }

    /// The destination has it all.
    pub(crate) fn delivered(self) {
        self.taken.take();
    }
}

impl Drop for Logging<'_> {
    fn drop(&mut self) {
        if let Some(bits) = self.taken.take() {
            self.log.put_back(bits);
        }
        self.log.stop();
    }
}

/// Lets a guest that was stopped for the migration's sake be as it was before.
pub(crate) fn give_back(guest: &Guest, held: &mut Held) -> Result<(), Error> {
    let Held::Stopped { right, before } = std::mem::replace(held, Held::Untouched) else {
        return Ok(());
    };
    let before = match (before, guest.take_asked()) {
        (RunState::Running | RunState::Paused | RunState::Prelaunch, Some(asked)) => asked,
        (before, _) => before,
    };
    let resumed = match before {
        RunState::Running => guest.resume(&right),
        _ => Ok(()),
    };
    let state = if resumed.is_ok() { before } else { RunState::InternalError };
    guest.put_right(right, state);
    resumed
}

/// Ends a migration that did not come through.
pub(super) fn undo(job: &Job, held: Held, error: Error) {
    let cancelled = job.cancel.is_set() && !matches!(error, Error::InDoubt { .. });
    let mut text = error.to_string();
    let mut held = held;
    if let Err(error) = give_back(&job.guest, &mut held) {
        text = format!("{text}; then {error}");
    }
    if cancelled {
        job.set_status(MigrationStatus::Cancelling);
        job.set_status(MigrationStatus::Cancelled);
    } else {
        job.report.set_error(text);
        job.set_status(MigrationStatus::Failed);
    }
}
