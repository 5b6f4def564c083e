//! From the page map to the channel: claim, look for zeros, gather, send, spend.

use whimbrel_ram::dirty::DirtyBits;
use whimbrel_ram::{BlockIndex, Claim, GuestRam, PageMap, Sweep, TargetPage};

use super::out::Out;
use super::undo::Logging;
use super::xbzrle::{Deltas, Sent};
use crate::error::Error;
use crate::report::{Report, add};

/// The most bytes of one system call's pages.
pub(super) const BATCH_MAX: usize = 2 << 20;

/// Pages on their way out.
#[derive(Debug)]
pub(super) struct Pages<'j> {
    ram: &'j GuestRam,
    report: &'j Report,
    /// A claim that did not fit into the last batch as a whole.
    open: Option<Claim<'j>>,
    /// Claims whose pages are all gathered.
    gathered: Vec<Claim<'j>>,
    /// Pages that may hold something else than zeros, where that is known.
    touched: Option<DirtyBits>,
    /// With capability `xbzrle`.
    deltas: Option<Deltas>,
    first_pass: bool,
    normal: u64,
    duplicate: u64,
}

impl<'j> Pages<'j> {
    pub(super) fn new(ram: &'j GuestRam, report: &'j Report, deltas: Option<Deltas>) -> Pages<'j> {
        let gathered = Vec::new();
        Pages {
            ram,
            report,
            open: None,
            gathered,
            touched: None,
            deltas,
            first_pass: true,
            normal: 0,
            duplicate: 0,
        }
    }

    /// The RAM they are of.
    pub(super) fn ram(&self) -> &'j GuestRam {
        self.ram
    }

    /// The dirty log is on: pages that were never touched up to now are zero, or show in the log.
    pub(super) fn leave_untouched(self) -> Self {
        // A kernel that cannot tell has every page looked at.
        let touched = self.ram.touched().ok();
        self.only_content_in(touched)
    }

    /// Pages that are not in `touched` are zero.
    pub(super) fn only_content_in(mut self, touched: Option<DirtyBits>) -> Self {
        self.touched = touched;
        self
    }

    /// Every page has been sent once.
    pub(super) fn first_pass_is_over(&mut self) {
        self.first_pass = false;
        self.touched = None;
        if let Some(deltas) = &mut self.deltas {
            self.report.set_xbzrle(deltas.stats());
        }
    }

    /// Gathers up to `most` bytes of what the map still has; says whether the sweep came to its
    /// end. `log` is that of a guest that runs.
    pub(super) fn gather(
        &mut self,
        map: &'j PageMap,
        sweep: &mut Sweep,
        log: Option<&Logging<'_>>,
        out: &mut Out,
        most: usize,
    ) -> Result<bool, Error> {
        while out.gathered() < most && !out.is_full() {
            if self.open.is_none() {
                let Some(claim) = map.claim_next(sweep) else { return Ok(true) };
                if let Some(log) = log {
                    log.rearm(&claim)?;
                }
                self.open = Some(claim);
            }
            self.gather_open(out, most)?;
        }
        Ok(false)
    }

    /// Gathers the pages of `claim`, or as many as fit; what is left is gathered next.
    pub(super) fn gather_claim(
        &mut self,
        claim: Claim<'j>,
        out: &mut Out,
        most: usize,
    ) -> Result<(), Error> {
        assert!(self.open.is_none(), "one claim after the other");
        self.open = Some(claim);
        self.gather_open(out, most)
    }

    /// Gathers what is left of a claim that did not fit.
    pub(super) fn gather_open(&mut self, out: &mut Out, most: usize) -> Result<(), Error> {
        while out.gathered() < most && !out.is_full() {
            let Some(claim) = &mut self.open else { return Ok(()) };
            let block = claim.block();
            match claim.next_page() {
                Some(page) => self.push(block, page, out)?,
                None => self.gathered.extend(self.open.take()),
            }
        }
        Ok(())
    }

    /// Whether a host page has been begun, and not all of it gathered.
    pub(super) fn has_begun_one(&self) -> bool {
        self.open.is_some()
    }

    /// Whether somebody waits for the host page that has been begun.
    pub(super) fn is_waited_for(&self) -> bool {
        self.open.as_ref().is_some_and(Claim::is_urgent)
    }

    /// What was gathered has been sent.
    pub(super) fn sent(&mut self) {
        for claim in self.gathered.drain(..) {
            claim.spend();
        }
        add(&self.report.counters.normal, std::mem::take(&mut self.normal));
        add(&self.report.counters.duplicate, std::mem::take(&mut self.duplicate));
    }

    fn push(&mut self, index: BlockIndex, page: TargetPage, out: &mut Out) -> Result<(), Error> {
        let block = self.ram.block(index);
        let untouched = self.touched.as_ref().is_some_and(|touched| !touched.contains(index, page));
        if untouched || block.is_zero(page) {
            if let Some(deltas) = &mut self.deltas {
                deltas.sent_as_zero(index, page);
            }
            out.push_zero(index, page);
            self.duplicate += 1;
            return Ok(());
        }
        match &mut self.deltas {
            Some(deltas) if !self.first_pass => match deltas.prepare(block, index, page)? {
                Sent::Nothing => {}
                Sent::Delta(delta) => out.push_delta(index, page, delta),
                Sent::Page(content) => {
                    out.push_copy(index, page, content);
                    self.normal += 1;
                }
            },
            _ => {
                out.push_page(index, page);
                self.normal += 1;
            }
        }
        Ok(())
    }
}
