//! Pages that go ahead of a checkpoint (COLO): the guest runs, and what it writes meanwhile is dirty
//! again.

use std::sync::atomic::Ordering;
use std::time::Duration;

use whimbrel_ram::{PageMap, TARGET_PAGE};
use whimbrel_wire::encode_end_of_section;

use super::Job;
use super::multifd::Crew;
use super::pages::{BATCH_MAX, Pages};
use super::setup::{RAM_SECTION, Stream};
use super::undo::Logging;
use crate::error::Error;
use crate::plan::Pace;
use crate::report::{add, set};

/// How long the channels are left alone at most.
const LOOK: Duration = Duration::from_millis(1);

/// What went ahead.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Went {
    /// Pages that the log had.
    pub(crate) dirty: u64,
    /// Pages that were sent of what was on the map.
    pub(crate) pages: u64,
}

/// Sends what is dirty by now as the `ram` section's END, no faster than a guest that runs is sent
/// otherwise, until that is done or it is `enough`: the rest stays on the map.
pub(crate) fn send_ahead(
    job: &Job,
    map: &PageMap,
    log: &Logging<'_>,
    crew: Option<&Crew<'_>>,
    stream: &mut Stream,
    enough: &dyn Fn() -> bool,
) -> Result<Went, Error> {
    let dirty = log.take_into(map)?;
    let counters = &job.report.counters;
    counters.dirty_sync_count.fetch_add(1, Ordering::Relaxed);
    let bytes = |stream: &Stream| stream.out.bytes() + crew.map_or(0, Crew::bytes);
    let (pending, before) = (map.pending(), bytes(stream));
    RAM_SECTION.encode_end(stream.out.words());
    match crew {
        Some(crew) => on_channels(job, crew, stream, enough)?,
        None => on_main(job, map, log, stream, enough)?,
    }
    encode_end_of_section(stream.out.words());
    RAM_SECTION.encode_footer(stream.out.words());
    stream.flush()?;
    add(&counters.precopy_bytes, bytes(stream) - before);
    set(&counters.transferred, stream.out.bytes());
    set(&counters.remaining, map.pending() * TARGET_PAGE.bytes() as u64);
    Ok(Went { dirty, pages: pending.saturating_sub(map.pending()) })
}

fn on_main(
    job: &Job,
    map: &PageMap,
    log: &Logging<'_>,
    stream: &mut Stream,
    enough: &dyn Fn() -> bool,
) -> Result<(), Error> {
    let rate = || job.parameters().with(|parameters| parameters.max_bandwidth);
    let mut pages = Pages::new(job.guest.vm().ram(), &job.report, None);
    let (mut sweep, mut pace) = (map.sweep(), Pace::new(rate(), job.now()));
    let mut turn_done = false;
    while !turn_done && !enough() {
        let before = stream.out.bytes() - stream.out.gathered() as u64;
        pace.set_rate(rate(), job.now());
        let batch = pace.batch(BATCH_MAX);
        turn_done = pages.gather(map, &mut sweep, Some(log), &mut stream.out, batch)?;
        stream.flush()?;
        pages.sent();
        let wait = pace.sent(stream.out.bytes() - before, job.now());
        if wait > Duration::ZERO {
            stream.out.channel().pause(wait)?;
        }
    }
    Ok(())
}

fn on_channels(
    job: &Job,
    crew: &Crew<'_>,
    stream: &mut Stream,
    enough: &dyn Fn() -> bool,
) -> Result<(), Error> {
    crew.first_pass_is_over();
    crew.set_rate(Some(job.parameters().with(|parameters| parameters.max_bandwidth)));
    crew.rewind();
    crew.begin();
    while !crew.wait(LOOK)? {
        if enough() {
            crew.halt();
        }
    }
    crew.mark(&mut stream.out);
    Ok(())
}
