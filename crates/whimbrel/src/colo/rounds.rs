//! Rounds between two checkpoints: dirty pages go ahead, while the guest runs. They lie in the
//! secondary's cache until a checkpoint is complete, so one that breaks half-way harms nothing.
//! Only between whimbrels.

use std::time::{Duration, Instant};

use whimbrel_wire::{ColoMessage, encode_eof};

use super::primary::Primary;
use crate::error::Error;
use crate::hello::Features;
use crate::plan::Ahead;
use crate::source::ahead::{Went, send_ahead};

/// What is known of the rounds so far.
#[derive(Debug)]
pub(crate) struct Rounds {
    plan: Ahead,
    /// When the dirty log was taken last.
    taken: Instant,
    /// Pages that went in rounds since the last checkpoint.
    pages: u64,
}

impl Rounds {
    pub(crate) fn new() -> Rounds {
        Rounds { plan: Ahead::default(), taken: Instant::now(), pages: 0 }
    }

    fn took(&mut self, dirty: u64, at: Instant) {
        self.plan.taken(dirty, at.saturating_duration_since(self.taken));
        self.taken = at;
    }

    /// The checkpoint's own turn: `dirty` pages were taken from the log at its beginning, `at`, and so
    /// many were sent in so much time. Gives how many had gone ahead.
    pub(super) fn checkpoint(
        &mut self,
        at: Instant,
        dirty: u64,
        pages: u64,
        took: Duration,
    ) -> u64 {
        self.took(dirty, at);
        self.plan.sent(pages, took);
        self.plan.checkpoint();
        std::mem::take(&mut self.pages)
    }
}

impl Primary<'_, '_> {
    /// How long it is until the next round is to begin, `left` before a checkpoint.
    pub(super) fn until_round(&self, between: Duration, left: Duration) -> Option<Duration> {
        if !self.stream.agreed().has(Features::PAGES_AHEAD) {
            return None;
        }
        let rate = self.job.parameters().with(|parameters| parameters.max_bandwidth);
        let least = match rate {
            0 => Duration::ZERO,
            rate => Duration::from_secs_f64(4096.0 / rate as f64),
        };
        let lead = self.rounds.plan.lead(between, self.rounds.taken.elapsed(), least)?;
        Some(left.saturating_sub(lead))
    }

    /// Sends what is dirty by now, until the checkpoint is long `due`, or wanted.
    pub(super) fn round(&mut self, due: Instant) -> Result<(), Error> {
        let begun = Instant::now();
        let before = self.pages_so_far();
        ColoMessage::PagesAhead.encode(self.stream.out.words());
        let enough = || Instant::now() >= due || self.job.colo.wants_checkpoint();
        let went = send_ahead(self.job, self.map, self.log, self.crew, self.stream, &enough)?;
        encode_eof(self.stream.out.words());
        self.stream.flush()?;
        let Went { dirty, pages } = went;
        self.rounds.took(dirty, begun);
        self.rounds.plan.sent(pages, begun.elapsed());
        self.rounds.pages += self.pages_so_far() - before;
        Ok(())
    }
}
