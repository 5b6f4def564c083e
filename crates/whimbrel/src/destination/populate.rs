//! Taking memory from the host ahead of the pages that come: the first touch of a page costs
//! more than receiving it, and here another core pays.
//!
//! Only where pages with content follow each other, and no further ahead than as much again as
//! has come in a row: zero pages are not to take memory.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};

use whimbrel_ram::{BlockIndex, GuestRam};

use crate::error::Error;
use crate::worker::{Cancel, Role, Worker};

/// What is populated at once: whole huge folios, and short enough to end soon.
const CHUNK: u64 = 4 << 20;

/// How far ahead at most.
const WINDOW: u64 = 128 << 20;

/// Chunks waiting to be populated.
const WAITING: usize = (WINDOW / CHUNK) as usize;

/// A chunk of memory that is likely to be filled soon.
#[derive(Clone, Copy, Debug)]
struct Chunk {
    block: BlockIndex,
    start: u64,
    len: u64,
}

/// The thread `dest/populate`. Dropping it ends it.
#[derive(Debug)]
pub(super) struct Populate {
    chunks: Option<SyncSender<Chunk>>,
    /// Where the stream is, in bytes of its block: what it has passed is not worth it any more.
    position: Arc<AtomicU64>,
    block: Option<BlockIndex>,
    /// Up to where chunks have been handed over.
    asked: u64,
    /// Declared after `chunks`: its end is the thread's.
    _worker: Worker,
}

impl Populate {
    pub(super) fn start(ram: GuestRam) -> Result<Populate, Error> {
        let (chunks, waiting) = sync_channel(WAITING);
        let position = Arc::new(AtomicU64::new(0));
        let passed = position.clone();
        let cancel = Cancel::new().map_err(Error::system("making an eventfd"))?;
        let ended = cancel.clone();
        let worker = Worker::start(Role::DestinationPopulate, cancel, move || {
            populate(&ram, &waiting, &passed, &ended);
        })
        .map_err(Error::system("starting a thread"))?;
        Ok(Populate { chunks: Some(chunks), position, block: None, asked: 0, _worker: worker })
    }

    /// Pages with content have come up to `offset` of `block`, `in_a_row` bytes of them.
    pub(super) fn follow(&mut self, block: BlockIndex, block_len: u64, offset: u64, in_a_row: u64) {
        if self.block != Some(block) || self.asked < offset || self.asked > offset + WINDOW {
            self.block = Some(block);
            self.asked = offset.next_multiple_of(CHUNK);
        }
        self.position.store(offset, Ordering::Relaxed);
        let end = offset.saturating_add(in_a_row.min(WINDOW)).min(block_len);
        while self.asked + CHUNK <= end {
            let chunk = Chunk { block, start: self.asked, len: CHUNK };
            // Full: it is as far ahead as it may be. Gone: memory is touched where it is filled.
            let Some(chunks) = &self.chunks else { return };
            if chunks.try_send(chunk).is_err() {
                return;
            }
            self.asked += CHUNK;
        }
    }
}

impl Drop for Populate {
    fn drop(&mut self) {
        // Ends the thread's wait; the worker then joins it.
        self.chunks = None;
    }
}

fn populate(ram: &GuestRam, chunks: &Receiver<Chunk>, position: &AtomicU64, ended: &Cancel) {
    let mut block_before = None;
    while let Ok(chunk) = chunks.recv() {
        if ended.is_set() {
            return;
        }
        let other_block = block_before.replace(chunk.block) != Some(chunk.block);
        if !other_block && chunk.start + chunk.len <= position.load(Ordering::Relaxed) {
            continue;
        }
        // Too little memory, or a kernel that cannot: the page itself will say so, or do without.
        if ram.block(chunk.block).populate(chunk.start, chunk.len).is_err() {
            return;
        }
    }
}
