//! The guest stands still: the rest of RAM, and the devices.

use std::sync::atomic::Ordering;
use std::time::Duration;

use rustix::event::PollFlags;
use whimbrel_ram::{PageMap, TARGET_PAGE};
use whimbrel_wire::{DeviceSection, encode_end_of_section};

use super::multifd::Crew;
use super::pages::{BATCH_MAX, Pages};
use super::setup::{RAM_SECTION, Stream};
use super::undo::Logging;
use super::{Held, Job};
use crate::error::Error;
use crate::guest::Taken;
use crate::own_devices;
use crate::report::{add, set};
use crate::settings::Capability;
use crate::status::{MigrationStatus, RunState};

/// How often it is looked whether the destination has something to say.
const LOOK: Duration = Duration::from_millis(50);

/// Stops the guest, and waits for `migrate-continue` where that is asked for.
pub(super) fn stop(job: &Job, held: &mut Held) -> Result<(), Error> {
    let Taken::Right(right) = job.guest.take_right() else {
        return Err(Error::Refused("the guest is not here: it cannot be moved from here".into()));
    };
    let before = job.guest.state();
    job.guest.set_state(RunState::FinishMigrate);
    job.report.guest_stops();
    let stopped = if before == RunState::Running { job.guest.pause(&right) } else { Ok(()) };
    *held = Held::Stopped { right, before };
    stopped?;
    if job.has(Capability::PauseBeforeSwitchover) {
        job.set_status(MigrationStatus::PreSwitchover);
        wait_for_continue(job)?;
    }
    job.set_status(MigrationStatus::Device);
    Ok(())
}

fn wait_for_continue(job: &Job) -> Result<(), Error> {
    let wake = job.proceed.as_fd();
    job.cancel.wait(wake, PollFlags::IN, None).map_err(Error::system("waiting"))?;
    if job.cancel.is_set() { Err(Error::Cancelled) } else { Ok(()) }
}

/// Sends every page that is still dirty, unpaced, as the `ram` section's END; gives how many the log
/// had.
pub(crate) fn send_rest(
    job: &Job,
    map: &PageMap,
    log: &Logging<'_>,
    crew: Option<&Crew<'_>>,
    stream: &mut Stream,
) -> Result<u64, Error> {
    let dirty = log.take_into(map)?;
    job.report.counters.dirty_sync_count.fetch_add(1, Ordering::Relaxed);
    let bytes = |stream: &Stream| stream.out.bytes() + crew.map_or(0, Crew::bytes);
    let before = bytes(stream);
    RAM_SECTION.encode_end(stream.out.words());
    match crew {
        Some(crew) => rest_on_channels(job, map, crew, stream)?,
        None => rest_on_main(job, map, log, stream)?,
    }
    assert_eq!(map.pending(), 0, "the guest stands still and one turn has sent it all");
    encode_end_of_section(stream.out.words());
    RAM_SECTION.encode_footer(stream.out.words());
    stream.flush()?;
    add(&job.report.counters.downtime_bytes, bytes(stream) - before);
    set(&job.report.counters.transferred, stream.out.bytes());
    set(&job.report.counters.remaining, 0);
    Ok(dirty)
}

fn rest_on_main(
    job: &Job,
    map: &PageMap,
    log: &Logging<'_>,
    stream: &mut Stream,
) -> Result<(), Error> {
    let mut pages = Pages::new(job.guest.vm().ram(), &job.report, None);
    let mut sweep = map.sweep();
    let mut turn_done = false;
    while !turn_done {
        turn_done = pages.gather(map, &mut sweep, Some(log), &mut stream.out, BATCH_MAX)?;
        stream.flush()?;
        pages.sent();
        set(&job.report.counters.transferred, stream.out.bytes());
        set(&job.report.counters.remaining, map.pending() * TARGET_PAGE.bytes() as u64);
    }
    Ok(())
}

fn rest_on_channels(
    job: &Job,
    map: &PageMap,
    crew: &Crew<'_>,
    stream: &mut Stream,
) -> Result<(), Error> {
    crew.first_pass_is_over();
    crew.set_rate(None);
    crew.rewind();
    crew.begin();
    while !crew.wait(LOOK)? {
        set(&job.report.counters.remaining, map.pending() * TARGET_PAGE.bytes() as u64);
        stream.check_answers()?;
    }
    crew.mark(&mut stream.out);
    Ok(())
}

/// Every device's state, as sections of our own kind.
pub(crate) fn device_sections(job: &Job, held: &Held) -> Result<Vec<DeviceSection>, Error> {
    let runs = matches!(held, Held::Stopped { before: RunState::Running, .. });
    own_devices::sections(job.guest.vm(), runs)
}
