//! The side whose guest counts: it runs, and is stopped for a checkpoint again and again.

use std::convert::Infallible;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use whimbrel_ram::PageMap;
use whimbrel_wire::vmdesc::describe;
use whimbrel_wire::{ColoMessage, encode_eof};

use super::Checkpoint;
use super::output::Due;
use super::rounds::Rounds;
use crate::error::Error;
use crate::guest::{Guest, Taken};
use crate::recovery;
use crate::report::get;
use crate::settings::ColoFailover;
use crate::source::multifd::Crew;
use crate::source::setup::Stream;
use crate::source::undo::{Logging, give_back};
use crate::source::{Held, Job, handover, switchover};
use crate::status::{ColoExitReason, ColoMode, Event, MigrationStatus, RunState};
use crate::worker::Cancel;

/// How often it is looked whether the time between checkpoints has been changed.
const LOOK: Duration = Duration::from_secs(1);

/// For ever, as far as a migration can tell.
const FOREVER: Duration = Duration::from_secs(3600);

/// What a guest that was sent as a whole, and stands still, is kept in step with.
pub(crate) struct Primary<'a, 'j> {
    pub(crate) job: &'j Job,
    pub(crate) held: &'a mut Held,
    pub(crate) map: &'a PageMap,
    pub(crate) log: &'a Logging<'j>,
    pub(crate) crew: Option<&'a Crew<'j>>,
    pub(crate) stream: &'a mut Stream,
    pub(crate) rounds: Rounds,
}

impl Primary<'_, '_> {
    /// Sends the devices, and when the secondary has loaded them takes checkpoint after checkpoint,
    /// until one side or the connection is lost, or COLO is left on request. `ends` is what ends the
    /// waits on the connections. The guest runs when this returns, if it is known how it stands;
    /// otherwise it is held.
    pub(crate) fn run(&mut self, ends: &Cancel) -> Result<Infallible, Error> {
        self.stream.out.channel().heed(ends.clone());
        self.begin()?;
        self.job.colo.begins(ends)?;
        self.job.report.guest_has_gone();
        self.holds_output();
        give_back(&self.job.guest, self.held)?;
        self.job.set_status(MigrationStatus::Colo);
        loop {
            self.wait(ends)?;
            self.checkpoint()?;
        }
    }

    /// From here on what the guest says leaves when it may.
    fn holds_output(&self) {
        let (policy, timeout) = self.job.parameters().with(|parameters| {
            (parameters.x_colo_output, Duration::from_millis(parameters.x_colo_compare_timeout))
        });
        let colo = Arc::downgrade(&self.job.colo);
        let wake = move || {
            if let Some(colo) = colo.upgrade() {
                // Over meanwhile: nothing is held any more.
                let _ = colo.want_checkpoint();
            }
        };
        self.job.colo.output().becomes_primarys(policy, timeout, Arc::new(wake));
    }

    /// The first checkpoint is the end of a precopy.
    fn begin(&mut self) -> Result<(), Error> {
        let devices = switchover::device_sections(self.job, self.held)?;
        for device in &devices {
            device.encode(self.stream.out.words());
        }
        handover::confirm_loaded(self.stream)?;
        handover::commit(self.stream, &describe(4096, &devices))?;
        self.expect(ColoMessage::CheckpointReady)
    }

    /// Waits until it is time for the next checkpoint, or somebody wants one. Meanwhile pages go ahead
    /// of it, where that is agreed on.
    fn wait(&mut self, ends: &Cancel) -> Result<(), Error> {
        let begun = Instant::now();
        loop {
            let delay = self.job.parameters().with(|parameters| parameters.x_checkpoint_delay);
            let delay = Duration::from_millis(delay);
            let Some(left) = delay.checked_sub(begun.elapsed()) else { return Ok(()) };
            let due = match self.job.colo.output().is_due() {
                Due::Now => return Ok(()),
                Due::Within(limit) => limit.unwrap_or(left),
            };
            let until_round = self.until_round(delay, left);
            if until_round == Some(Duration::ZERO) {
                // A checkpoint that is a little late costs the guest less than pages in its stop.
                self.round(begun + delay + delay / 4)?;
                if self.job.colo.is_wanted() {
                    return Ok(());
                }
                continue;
            }
            let left = until_round.unwrap_or(left).min(due);
            let channel = self.stream.out.channel();
            let fds = [channel.as_fd(), self.job.colo.said().as_fd()];
            ends.wait_any(&fds, left.min(LOOK)).map_err(Error::system("waiting"))?;
            // Nothing is to be said now: it is the end, or the reason for it.
            self.stream.check_answers()?;
            if self.job.colo.is_wanted() {
                return Ok(());
            }
        }
    }

    fn checkpoint(&mut self) -> Result<(), Error> {
        self.say(ColoMessage::CheckpointRequest)?;
        self.expect(ColoMessage::CheckpointReply)?;
        let (before, stopped) = (self.pages_so_far(), Instant::now());
        stand_still(&self.job.guest, self.held)?;
        let boundary = self.job.colo.output().boundary();
        ColoMessage::VmstateSend.encode(self.stream.out.words());
        let sending = Instant::now();
        let dirty = switchover::send_rest(self.job, self.map, self.log, self.crew, self.stream)?;
        let memory = sending.elapsed();
        let mut devices = Vec::new();
        for device in switchover::device_sections(self.job, self.held)? {
            device.encode(&mut devices);
        }
        encode_eof(&mut devices);
        let words = self.stream.out.words();
        encode_eof(words);
        ColoMessage::VmstateSize(devices.len() as u64).encode(words);
        words.extend_from_slice(&devices);
        self.stream.flush()?;
        // All of it is with the kernel: what the guest does from here on is the next one's. Should
        // this one not arrive, this side has lost nothing.
        give_back(&self.job.guest, self.held)?;
        let stop = stopped.elapsed();
        let pages = self.pages_so_far() - before;
        let ahead = self.rounds.checkpoint(sending, dirty, pages, memory);
        self.expect(ColoMessage::VmstateReceived)?;
        self.job.colo.output().is_complete(boundary);
        self.expect(ColoMessage::VmstateLoaded)?;
        self.job.colo.is_complete(Checkpoint { stop, memory, pages, ahead });
        Ok(())
    }

    /// Pages that have been sent.
    pub(super) fn pages_so_far(&self) -> u64 {
        let counters = &self.job.report.counters;
        get(&counters.normal) + get(&counters.duplicate)
    }

    fn say(&mut self, message: ColoMessage) -> Result<(), Error> {
        message.encode(self.stream.out.words());
        self.stream.flush()
    }

    fn expect(&mut self, message: ColoMessage) -> Result<(), Error> {
        let limit = self.job.parameters().with(recovery::silence).unwrap_or(FOREVER);
        let answers = self.stream.answers.as_mut().expect("x-colo requires return-path");
        answers.wait_for_colo(self.stream.out.channel(), message, limit)
    }
}

fn stand_still(guest: &Guest, held: &mut Held) -> Result<(), Error> {
    let Taken::Right(right) = guest.take_right() else {
        return Err(Error::Refused("the guest is not here any more".into()));
    };
    let before = guest.state();
    guest.set_state(RunState::Colo);
    let stopped = if before == RunState::Running { guest.pause(&right) } else { Ok(()) };
    *held = Held::Stopped { right, before };
    stopped
}

/// Whether the secondary is certain not to take over, without anybody having said so.
fn may_go_on(job: &Job, error: &Error) -> bool {
    let failover = job.parameters().with(|all| all.x_colo_failover);
    match (failover, job.colo.fence(failover)) {
        (ColoFailover::Manual, _) => false,
        // Then nobody else's fence lets a secondary take over.
        (ColoFailover::Auto, None | Some(Ok(()))) => true,
        (ColoFailover::Auto, Some(Err(why))) => {
            job.report.set_error(format!(
                "the secondary is lost: {error}; the fence does not say that it does not take over: \
                 {why}; 'x-colo-lost-heartbeat' has the guest go on, if that is certain"
            ));
            false
        }
    }
}

/// It is all ended while the secondary may have taken over: the guest stands still until a human says
/// otherwise, and what it has said to nobody is forgotten.
fn stay_still(job: &Job, held: &mut Held) {
    if let Held::Stopped { right, .. } = std::mem::replace(held, Held::Untouched) {
        job.guest.put_right(right, RunState::Paused);
    }
    job.colo.is_left();
    job.colo.output().forgets();
}

/// The secondary is lost, or was let go: the guest goes on alone.
pub(crate) fn go_on_alone(job: &Job, held: &mut Held, error: &Error) {
    let reason = job.colo.ends(job.cancel.is_set());
    job.guest.emit(&Event::ColoExit { mode: ColoMode::Primary, reason });
    if reason == ColoExitReason::Error {
        job.report
            .set_error(format!("the secondary is lost, and the guest goes on alone: {error}"));
        // A guest of which it is not certain that it is the only one does nothing until it is.
        let still = match job.colo.has_fence() && !matches!(held, Held::Stopped { .. }) {
            true => stand_still(&job.guest, held),
            false => Ok(()),
        };
        if let Err(error) = still {
            job.report.set_error(error.to_string());
        }
        let alone = may_go_on(job, error) || job.colo.wait_until_asked(&job.cancel);
        if !alone && job.colo.has_fence() {
            return stay_still(job, held);
        }
    }
    if let Err(error) = give_back(&job.guest, held) {
        job.report.set_error(error.to_string());
    }
    job.colo.is_left();
    // Nobody but this guest has said what is held.
    job.colo.output().opens();
}
