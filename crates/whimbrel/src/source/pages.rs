//! From the page map to the channel: claim, look for zeros, gather, send, spend.

use whimbrel_ram::dirty::DirtyBits;
use whimbrel_ram::{BlockIndex, Claim, PageMap, Sweep, TargetPage};

use super::Job;
use super::setup::Stream;
use super::undo::Logging;
use super::xbzrle::{Deltas, Sent};
use crate::error::Error;
use crate::report::add;

/// The most bytes of one system call's pages.
pub(super) const BATCH_MAX: usize = 2 << 20;

/// Pages on their way out.
#[derive(Debug)]
pub(super) struct Pages<'j> {
    job: &'j Job,
    /// A claim that did not fit into the last batch as a whole.
    open: Option<Claim<'j>>,
    /// Claims whose pages are all gathered.
    gathered: Vec<Claim<'j>>,
    /// In the first pass: pages that may hold something else than zeros.
    touched: Option<DirtyBits>,
    /// With capability `xbzrle`.
    deltas: Option<Deltas>,
    first_pass: bool,
    normal: u64,
    duplicate: u64,
}

impl<'j> Pages<'j> {
    pub(super) fn new(job: &'j Job, deltas: Option<Deltas>) -> Pages<'j> {
        let gathered = Vec::new();
        Pages {
            job,
            open: None,
            gathered,
            touched: None,
            deltas,
            first_pass: true,
            normal: 0,
            duplicate: 0,
        }
    }

    /// The dirty log is on: pages that were never touched up to now are zero, or show in the log.
    pub(super) fn leave_untouched(mut self) -> Self {
        // A kernel that cannot tell has every page looked at.
        self.touched = self.job.guest.vm().ram().touched().ok();
        self
    }

    /// Every page has been sent once.
    pub(super) fn first_pass_is_over(&mut self) {
        self.first_pass = false;
        self.touched = None;
        if let Some(deltas) = &mut self.deltas {
            self.job.report.set_xbzrle(deltas.stats());
        }
    }

    /// Sends up to `most` bytes of what the map still has; says whether the sweep came to its end.
    pub(super) fn batch(
        &mut self,
        map: &'j PageMap,
        sweep: &mut Sweep,
        log: &Logging<'_>,
        stream: &mut Stream,
        most: usize,
    ) -> Result<bool, Error> {
        let mut turn_done = false;
        while stream.out.gathered() < most && !stream.out.is_full() {
            if self.open.is_none() {
                let Some(claim) = map.claim_next(sweep) else {
                    turn_done = true;
                    break;
                };
                log.rearm(&claim)?;
                self.open = Some(claim);
            }
            let Some(claim) = &mut self.open else { break };
            match claim.next_page() {
                Some(page) => {
                    let block = claim.block();
                    self.push(block, page, stream)?;
                }
                None => self.gathered.extend(self.open.take()),
            }
        }
        stream.flush()?;
        for claim in self.gathered.drain(..) {
            claim.spend();
        }
        add(&self.job.report.counters.normal, std::mem::take(&mut self.normal));
        add(&self.job.report.counters.duplicate, std::mem::take(&mut self.duplicate));
        Ok(turn_done && self.open.is_none())
    }

    fn push(
        &mut self,
        index: BlockIndex,
        page: TargetPage,
        stream: &mut Stream,
    ) -> Result<(), Error> {
        let block = self.job.guest.vm().ram().block(index);
        let untouched = self.touched.as_ref().is_some_and(|touched| !touched.contains(index, page));
        if untouched || block.is_zero(page) {
            if let Some(deltas) = &mut self.deltas {
                deltas.sent_as_zero(index, page);
            }
            stream.out.push_zero(index, page);
            self.duplicate += 1;
            return Ok(());
        }
        match &mut self.deltas {
            Some(deltas) if !self.first_pass => match deltas.prepare(block, index, page)? {
                Sent::Nothing => {}
                Sent::Delta(delta) => stream.out.push_delta(index, page, delta),
                Sent::Page(content) => {
                    stream.out.push_copy(index, page, content);
                    self.normal += 1;
                }
            },
            _ => {
                stream.out.push_page(index, page);
                self.normal += 1;
            }
        }
        Ok(())
    }
}
