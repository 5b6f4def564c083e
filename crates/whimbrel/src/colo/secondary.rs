//! The side that is kept in step: it has a copy of the guest, and takes over when the primary dies.

use std::sync::Arc;
use std::time::Instant;

use whimbrel_ram::dirty::{DirtyBits, DirtyLog};
use whimbrel_ram::{RamCache, TargetPage};
use whimbrel_wire::ColoMessage;

use super::Checkpoint;
use super::flush::flush;
use crate::destination::incoming::{Host, Incoming};
use crate::destination::live::{Job, Waiting};
use crate::error::Error;
use crate::guest::Guest;
use crate::status::{ColoExitReason, ColoMode, Event, MigrationStatus, RunState};

/// Why no further checkpoint comes.
enum Ended {
    /// The primary, the connection, or the wish to go on is. The guest here is whole.
    Lost(Error),
    /// The guest here: a checkpoint was complete, and could not be made its own.
    Broken(Error),
}

/// Takes in checkpoint after checkpoint, and takes the guest over when no more come.
pub(crate) fn run<'j>(
    job: &'j Job,
    mut incoming: Incoming,
    waiting: &mut Waiting<'j>,
) -> Result<(), Error> {
    let guest = &*job.guest;
    let (cache, ends) = incoming.become_secondary()?;
    let log = Watching::start(guest.vm().dirty_log())?;
    let mut copy = Copy { guest, runs: false };
    guest.set_state(RunState::Colo);
    job.colo.output().becomes_copys(0);
    let begun = copy
        .go_on(waiting.is_to_run())
        .and_then(|()| job.colo.begins(&ends))
        .and_then(|()| incoming.is_secondary());
    if let Err(error) = begun {
        job.colo.is_left();
        copy.stop()?;
        job.colo.output().opens();
        guest.set_state(RunState::Inmigrate);
        return Err(error);
    }
    job.set_status(MigrationStatus::Colo);
    let mut secondary =
        Secondary { job, incoming: &mut incoming, waiting, copy, cache, log, epoch: 0 };
    let ended = loop {
        if let Err(ended) = secondary.checkpoint() {
            break ended;
        }
    };
    let Secondary { copy, .. } = secondary;
    match ended {
        Ended::Lost(error) => {
            // If it is not dead it is to know.
            incoming.hang_up();
            take_over(job, waiting, copy, error)
        }
        Ended::Broken(error) => {
            guest.set_state(RunState::InternalError);
            // Its guest stands still, or cannot be stopped: nothing of it is let out.
            job.colo.ends(false);
            job.colo.is_left();
            Err(error)
        }
    }
}

/// A guest that is a copy of the primary's.
struct Copy<'g> {
    guest: &'g Guest,
    runs: bool,
}

impl Copy<'_> {
    fn go_on(&mut self, wanted: bool) -> Result<(), Error> {
        if wanted && !self.runs {
            self.guest.resume_copy()?;
            self.runs = true;
        }
        Ok(())
    }

    fn stop(&mut self) -> Result<(), Error> {
        if std::mem::replace(&mut self.runs, false) {
            self.guest.pause_copy()?;
        }
        Ok(())
    }
}

impl Drop for Copy<'_> {
    fn drop(&mut self) {
        // Nobody holds the right to run it.
        let _ = self.stop();
    }
}

/// A dirty log that is on.
struct Watching<'v>(&'v dyn DirtyLog);

impl<'v> Watching<'v> {
    fn start(log: &'v dyn DirtyLog) -> Result<Watching<'v>, Error> {
        log.start().map_err(Error::DirtyLog)?;
        let watching = Watching(log);
        // One that is armed lazily says at first that everything is dirty, and nothing is: what is
        // in the cache is what the guest has.
        watching.forget(&[])?;
        Ok(watching)
    }

    /// What shows now was not written by the guest; from here on every page of `taken` and of that is
    /// watched again.
    fn forget(&self, taken: &[&DirtyBits]) -> Result<(), Error> {
        let ours = self.0.take().map_err(Error::DirtyLog)?;
        for bits in taken.iter().copied().chain([&ours]) {
            bits.runs()
                .try_for_each(|(block, first, count)| self.0.rearm(block, TargetPage(first), count))
                .map_err(Error::DirtyLog)?;
        }
        Ok(())
    }
}

impl Drop for Watching<'_> {
    fn drop(&mut self) {
        self.0.stop();
    }
}

struct Secondary<'s, 'j> {
    job: &'j Job,
    incoming: &'s mut Incoming,
    waiting: &'s mut Waiting<'j>,
    copy: Copy<'j>,
    cache: Arc<RamCache>,
    log: Watching<'j>,
    /// How many checkpoints the copy has been brought to.
    epoch: u64,
}

impl Secondary<'_, '_> {
    fn checkpoint(&mut self) -> Result<(), Ended> {
        self.incoming.checkpoint_request().map_err(Ended::Lost)?;
        let begun = Instant::now();
        self.copy.stop().map_err(Ended::Broken)?;
        self.incoming.say_colo(ColoMessage::CheckpointReply).map_err(Ended::Lost)?;
        let devices = self.incoming.checkpoint().map_err(Ended::Lost)?;
        self.incoming.say_colo(ColoMessage::VmstateReceived).map_err(Ended::Lost)?;
        // All of it is here: nothing that happens to the primary stops this half-way.
        let flushing = Instant::now();
        let pages = self.flush().map_err(Ended::Broken)?;
        let memory = flushing.elapsed();
        self.waiting.load(devices).map_err(Ended::Broken)?;
        self.epoch += 1;
        self.job.colo.output().becomes_copys(self.epoch);
        self.copy.go_on(self.waiting.is_to_run()).map_err(Ended::Broken)?;
        let stop = begun.elapsed();
        self.job.colo.is_complete(Checkpoint { stop, memory, pages, ahead: 0 });
        self.incoming.say_colo(ColoMessage::VmstateLoaded).map_err(Ended::Lost)
    }

    /// Makes the guest's memory what the cache is; gives how many pages that were.
    fn flush(&self) -> Result<u64, Error> {
        let ram = self.job.guest.vm().ram();
        let written = self.log.0.take().map_err(Error::DirtyLog)?;
        let pages = flush(&self.cache, ram, &written)?;
        self.log.forget(&[&written])?;
        Ok(pages)
    }
}

/// No more checkpoints come: the copy becomes the guest, as soon as the primary is certain to run no
/// more.
fn take_over(
    job: &Job,
    waiting: &Waiting<'_>,
    mut copy: Copy<'_>,
    error: Error,
) -> Result<(), Error> {
    let guest = &job.guest;
    let reason = job.colo.ends(job.cancel.is_set());
    guest.emit(&Event::ColoExit { mode: ColoMode::Secondary, reason });
    let takes_over = match reason {
        ColoExitReason::Error => {
            may_take_over(job, &error) || job.colo.wait_until_asked(&job.cancel)
        }
        _ => job.colo.is_asked(),
    };
    job.colo.is_left();
    if !takes_over {
        copy.stop()?;
        job.colo.output().opens();
        guest.set_state(RunState::Inmigrate);
        return Err(Error::Cancelled);
    }
    job.colo.output().opens();
    let right = guest.right_has_come();
    let state = match (waiting.is_to_run(), std::mem::replace(&mut copy.runs, false)) {
        (false, _) => Ok(RunState::Paused),
        (true, false) => guest.resume(&right).map(|()| RunState::Running),
        (true, true) => {
            guest.emit(&Event::Resume);
            Ok(RunState::Running)
        }
    };
    guest.put_right(right, state.as_ref().copied().unwrap_or(RunState::InternalError));
    state?;
    job.set_status(MigrationStatus::Completed);
    Ok(())
}

/// Whether the primary is certain to run no more, without anybody having said so.
fn may_take_over(job: &Job, error: &Error) -> bool {
    let lost = format!("the primary is lost: {error}");
    let (text, may) = match job.colo.fence(job.router.parameters().with(|all| all.x_colo_failover))
    {
        Some(Ok(())) => (format!("{lost}; it has been fenced off"), true),
        Some(Err(why)) => {
            (format!("{lost}; the fence does not say that it runs no more: {why}; {WAITS}"), false)
        }
        None => (format!("{lost}; {WAITS}"), false),
    };
    job.report.set_error(text);
    may
}

/// What is left to be done.
const WAITS: &str = "'x-colo-lost-heartbeat' takes the guest over, if it is certain that it does not \
                     run there";
