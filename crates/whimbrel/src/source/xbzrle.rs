//! Capability `xbzrle`: pages that were sent before go out as what changed in them.
//!
//! The cache holds what the destination holds, so a page that goes through it is copied first and
//! sent from the copy: the guest may write the page meanwhile.

use std::collections::hash_map::DefaultHasher;
use std::hash::{Hash, Hasher};

use whimbrel_ram::{BlockIndex, RamBlock, TARGET_PAGE, TargetPage};
use whimbrel_wire::xbzrle::{Delta, encode};

use super::Job;
use crate::error::Error;
use crate::status::XbzrleCacheStats;

const PAGE: usize = TARGET_PAGE.bytes();

/// What goes out of a page.
#[derive(Debug)]
pub(super) enum Sent<'d> {
    /// It is as it was when it was sent last.
    Nothing,
    /// What changed.
    Delta(&'d [u8]),
    /// All of it, from the copy that is now in the cache.
    Page(&'d [u8]),
}

/// Pages as they were sent last, as many as `xbzrle-cache-size` holds.
#[derive(Debug)]
pub(super) struct Deltas {
    /// One page a slot, where its place in RAM says; a newer page takes the place of an older.
    slots: Vec<Option<Slot>>,
    delta: Vec<u8>,
    stats: XbzrleCacheStats,
    looked_up: u64,
    missed: u64,
    encoded_pages_bytes: u64,
}

#[derive(Debug)]
struct Slot {
    block: BlockIndex,
    page: TargetPage,
    content: Box<[u8; PAGE]>,
}

impl Deltas {
    pub(super) fn new(job: &Job) -> Deltas {
        let cache_size = job.parameters().with(|p| p.xbzrle_cache_size);
        let count = usize::try_from(cache_size / PAGE as u64).unwrap_or(usize::MAX);
        // More slots than pages would stay empty.
        let pages = job.guest.vm().ram().total_bytes() / PAGE as u64;
        let count = count.clamp(1, usize::try_from(pages).unwrap_or(usize::MAX).max(1));
        Deltas {
            slots: std::iter::repeat_with(|| None).take(count).collect(),
            delta: Vec::with_capacity(PAGE),
            stats: XbzrleCacheStats { cache_size, ..XbzrleCacheStats::default() },
            looked_up: 0,
            missed: 0,
            encoded_pages_bytes: 0,
        }
    }

    fn place(&self, block: BlockIndex, page: TargetPage) -> usize {
        let mut hasher = DefaultHasher::new();
        (block, page).hash(&mut hasher);
        let slots = self.slots.len() as u64;
        usize::try_from(hasher.finish() % slots).expect("below the number of slots")
    }

    /// The page was sent as zero: that is what the destination holds now.
    pub(super) fn sent_as_zero(&mut self, block: BlockIndex, page: TargetPage) {
        let place = self.place(block, page);
        if let Some(slot) = &mut self.slots[place]
            && (slot.block, slot.page) == (block, page)
        {
            slot.content.fill(0);
        }
    }

    /// Copies the page as it is now, remembers the copy, and gives what has to be sent.
    pub(super) fn prepare(
        &mut self,
        ram: &RamBlock,
        block: BlockIndex,
        page: TargetPage,
    ) -> Result<Sent<'_>, Error> {
        let mut now = [0; PAGE];
        ram.read(page.offset(), &mut now)?;
        self.looked_up += 1;
        let place = self.place(block, page);
        let known = |slot: &Slot| (slot.block, slot.page) == (block, page);
        if !self.slots[place].as_ref().is_some_and(known) {
            self.missed += 1;
            self.stats.cache_miss += 1;
            let slot = self.slots[place].insert(Slot { block, page, content: Box::new(now) });
            return Ok(Sent::Page(&slot.content[..]));
        }
        let slot = self.slots[place].as_mut().expect("looked at above");
        self.delta.clear();
        match encode(&slot.content[..], &now, &mut self.delta) {
            Delta::Unchanged => Ok(Sent::Nothing),
            Delta::Encoded(len) => {
                *slot.content = now;
                self.stats.pages += 1;
                self.stats.bytes += len as u64;
                self.encoded_pages_bytes += PAGE as u64;
                Ok(Sent::Delta(&self.delta))
            }
            Delta::TooLong => {
                *slot.content = now;
                self.stats.overflow += 1;
                Ok(Sent::Page(&slot.content[..]))
            }
        }
    }

    /// How the cache does; the miss rate is that since the last call.
    pub(super) fn stats(&mut self) -> XbzrleCacheStats {
        if self.looked_up > 0 {
            self.stats.cache_miss_rate = self.missed as f64 / self.looked_up as f64;
        }
        if self.stats.bytes > 0 {
            self.stats.encoding_rate = self.encoded_pages_bytes as f64 / self.stats.bytes as f64;
        }
        (self.looked_up, self.missed) = (0, 0);
        self.stats.clone()
    }
}
