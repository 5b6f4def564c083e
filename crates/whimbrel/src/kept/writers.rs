//! The threads that write a guest's RAM into its file, also while it is still arriving.
//!
//! RAM is written in chunks. Whoever places a page marks it *after* its content is there, and offers
//! its chunk when as many pages have come as it has; a writer takes the marks away *before* it
//! looks at the pages. So a page that changes while it is written, or later, is marked again, and a
//! chunk that is marked when nothing arrives any more is written once more, at the end. One writer
//! at a time has a chunk: an older content never overwrites a newer one, and the bits of its pages
//! have one owner.

use std::collections::VecDeque;
use std::io;
use std::ops::Range;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use whimbrel_ram::{BlockIndex, GuestRam, TargetPage};

use super::Access;
use super::disk::{Disk, bytes, runs};
use super::layout::Layout;
use super::writing::kept_error;
use crate::error::Error;
use crate::worker::{Cancel, Role, Worker};

/// Words of marks in a chunk, 64 pages each: 4 MiB, long enough for the disk and short enough for
/// all threads to have something to do.
const WORDS: usize = 16;
const PAGES: u64 = 64 * WORDS as u64;

/// Nobody has it in hand.
const IDLE: u8 = 0;
/// It waits for a writer.
const QUEUED: u8 = 1;
/// A writer has it.
const TAKEN: u8 = 2;
/// A writer has it, and it has been offered since: it is queued again afterwards.
const TAKEN_AND_OFFERED: u8 = 3;

/// A piece of one block.
#[derive(Debug)]
struct Chunk {
    block: BlockIndex,
    pages: Range<u64>,
    state: AtomicU8,
    /// Pages that have come since it was last looked at.
    came: AtomicU64,
    /// Pages that were placed after they were last looked at.
    marked: [AtomicU64; WORDS],
    /// Pages that were not zero when they were last looked at. Its writer alone changes it.
    present: [AtomicU64; WORDS],
}

/// Why RAM was not written.
#[derive(Debug)]
pub(super) enum Failed {
    Disk(io::Error),
    Cancelled,
}

impl Failed {
    pub(super) fn at(self, path: &Path) -> Error {
        match self {
            Failed::Disk(error) => kept_error(path, "cannot be written", &error),
            Failed::Cancelled => Error::Cancelled,
        }
    }
}

#[derive(Debug, Default)]
struct Queue {
    chunks: VecDeque<usize>,
    /// Nothing more comes: who finds it empty ends.
    closed: bool,
    /// The first error. Whoever sees it ends.
    failed: Option<Failed>,
}

#[derive(Debug)]
struct Shared {
    ram: GuestRam,
    disk: Disk,
    /// Where the pages of each block begin in the file.
    places: Vec<u64>,
    chunks: Vec<Chunk>,
    /// The place of each block's first chunk.
    first_chunks: Vec<usize>,
    queue: Mutex<Queue>,
    offered: Condvar,
    /// Pages are marked as they come; otherwise all count as marked in the end.
    told: AtomicBool,
    cancel: Cancel,
    last_copy: AtomicBool,
}

/// The threads `dest/write`. Dropping it ends them.
#[derive(Debug)]
pub(super) struct Writers {
    shared: Arc<Shared>,
    workers: Vec<Worker>,
}

/// To be told of the pages that come, by all threads that place them. Cheap to clone.
#[derive(Clone, Debug)]
pub(crate) struct Changes {
    shared: Arc<Shared>,
}

impl Writers {
    pub(super) fn start(
        ram: GuestRam,
        layout: &Layout,
        disk: Disk,
        access: Access,
        cancel: &Cancel,
    ) -> Result<Writers, Error> {
        let (mut chunks, mut first_chunks, mut places) = (Vec::new(), Vec::new(), Vec::new());
        for (index, block) in ram.blocks() {
            first_chunks.push(chunks.len());
            places.push(layout.header(index).pages_offset);
            let pages = block.target_pages();
            let starts = (0..pages).step_by(usize::try_from(PAGES).expect("small"));
            chunks.extend(starts.map(|start| Chunk {
                block: index,
                pages: start..pages.min(start + PAGES),
                state: AtomicU8::new(IDLE),
                came: AtomicU64::new(0),
                marked: Default::default(),
                present: Default::default(),
            }));
        }
        let shared = Arc::new(Shared {
            ram,
            disk,
            places,
            chunks,
            first_chunks,
            queue: Mutex::default(),
            offered: Condvar::new(),
            told: AtomicBool::new(false),
            cancel: cancel.clone(),
            last_copy: AtomicBool::new(false),
        });
        let mut writers = Writers { shared, workers: Vec::new() };
        for _ in 0..access.threads.get() {
            let ended = Cancel::new().map_err(Error::system("making an eventfd"))?;
            let shared = writers.shared.clone();
            let worker = Worker::start(Role::DestinationWrite, ended, move || shared.work())
                .map_err(Error::system("starting a thread"))?;
            writers.workers.push(worker);
        }
        Ok(writers)
    }

    /// What is to be told of every page from now on, whatever road it comes by, but for those of a
    /// postcopy.
    pub(super) fn changes(&self) -> Changes {
        self.shared.told.store(true, Ordering::Relaxed);
        Changes { shared: self.shared.clone() }
    }

    /// Nothing arrives any more: has everything written that has not been. Where nobody has asked to
    /// tell of pages, that is all of them. Not to be cancelled when the
    /// guest is nowhere else any more (`last_copy`), which is the end of a postcopy.
    pub(super) fn finish(&mut self, last_copy: bool) -> Result<(), Failed> {
        let shared = &self.shared;
        shared.last_copy.store(last_copy, Ordering::Relaxed);
        let told = shared.told.load(Ordering::Relaxed);
        for (place, chunk) in shared.chunks.iter().enumerate() {
            if !told {
                chunk.mark_all();
            }
            if chunk.is_marked() {
                shared.offer(place);
            }
        }
        shared.queue().closed = true;
        shared.offered.notify_all();
        self.workers.drain(..).for_each(Worker::join);
        match shared.queue().failed.take() {
            Some(failed) => Err(failed),
            None => Ok(()),
        }
    }

    /// Ends them without anything more being written.
    pub(super) fn stop(&mut self) {
        let mut queue = self.shared.queue();
        queue.failed.get_or_insert(Failed::Cancelled);
        drop(queue);
        self.shared.offered.notify_all();
        self.workers.clear();
    }

    /// Pages that are not zero, when everything has been written.
    pub(super) fn stored(&self) -> u64 {
        let words = self.shared.chunks.iter().flat_map(|chunk| &chunk.present);
        words.map(|word| u64::from(word.load(Ordering::Relaxed).count_ones())).sum()
    }

    /// A block's bitmap as it is in the file, when everything has been written.
    pub(super) fn bitmap(&self, block: BlockIndex) -> Vec<u8> {
        let chunks = self.shared.chunks.iter().filter(|chunk| chunk.block == block);
        let words = chunks.flat_map(|chunk| {
            let words = (chunk.pages.end - chunk.pages.start).div_ceil(64);
            chunk.present.iter().take(usize::try_from(words).expect("of one chunk"))
        });
        words.flat_map(|word| word.load(Ordering::Relaxed).to_le_bytes()).collect()
    }
}

impl Drop for Writers {
    fn drop(&mut self) {
        self.stop();
    }
}

impl Changes {
    /// Pages have changed, and are as they are to be.
    pub(crate) fn placed(&self, block: BlockIndex, pages: Range<u64>) {
        let mut start = pages.start;
        while start < pages.end {
            let place = self.shared.place_of(block, start);
            let chunk = &self.shared.chunks[place];
            let end = pages.end.min(chunk.pages.end);
            (start..end).for_each(|page| chunk.mark(page));
            self.shared.count(place, end - start);
            start = end;
        }
    }

    /// A page that was zero is zero.
    pub(crate) fn stays_zero(&self, block: BlockIndex, page: TargetPage) {
        self.shared.count(self.shared.place_of(block, page.0), 1);
    }
}

impl Chunk {
    fn word(&self, page: u64) -> (usize, u64) {
        let at = page - self.pages.start;
        (usize::try_from(at / 64).expect("of this chunk"), 1 << (at % 64))
    }

    fn mark(&self, page: u64) {
        let (word, bit) = self.word(page);
        self.marked[word].fetch_or(bit, Ordering::AcqRel);
    }

    fn mark_all(&self) {
        self.pages.clone().for_each(|page| self.mark(page));
    }

    fn is_marked(&self) -> bool {
        self.marked.iter().any(|word| word.load(Ordering::Acquire) != 0)
    }
}

impl Shared {
    fn queue(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn place_of(&self, block: BlockIndex, page: u64) -> usize {
        self.first_chunks[block.index()]
            + usize::try_from(page / PAGES).expect("RAM fits in memory")
    }

    /// So many pages of a chunk have come. When as many have as it has, it is likely to stay as it
    /// is for a while: in the first round each comes once.
    fn count(&self, place: usize, pages: u64) {
        let chunk = &self.chunks[place];
        let whole = chunk.pages.end - chunk.pages.start;
        let before = chunk.came.fetch_add(pages, Ordering::Relaxed);
        if before < whole && before + pages >= whole {
            self.offer(place);
        }
    }

    /// Has a chunk written, now or when its writer is done.
    fn offer(&self, place: usize) {
        let next = |state| match state {
            IDLE => Some(QUEUED),
            TAKEN => Some(TAKEN_AND_OFFERED),
            _ => None,
        };
        let state = &self.chunks[place].state;
        if state.fetch_update(Ordering::AcqRel, Ordering::Acquire, next) == Ok(IDLE) {
            self.queue().chunks.push_back(place);
            self.offered.notify_one();
        }
    }

    /// What a writer does.
    fn work(&self) {
        while let Some(place) = self.take() {
            let chunk = &self.chunks[place];
            if let Err(failed) = self.write(chunk) {
                self.queue().failed.get_or_insert(failed);
                self.offered.notify_all();
                return;
            }
            let next = |state| Some(if state == TAKEN_AND_OFFERED { QUEUED } else { IDLE });
            let before = chunk.state.fetch_update(Ordering::AcqRel, Ordering::Acquire, next);
            if before == Ok(TAKEN_AND_OFFERED) {
                self.queue().chunks.push_back(place);
                self.offered.notify_one();
            }
        }
    }

    fn take(&self) -> Option<usize> {
        let mut queue = self.queue();
        loop {
            if queue.failed.is_some() {
                return None;
            }
            if let Some(place) = queue.chunks.pop_front() {
                drop(queue);
                self.chunks[place].state.store(TAKEN, Ordering::Release);
                return Some(place);
            }
            if queue.closed {
                return None;
            }
            queue = self.offered.wait(queue).unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn write(&self, chunk: &Chunk) -> Result<(), Failed> {
        let block = self.ram.block(chunk.block);
        chunk.came.store(0, Ordering::Relaxed);
        let mut content = [0; WORDS];
        for (word, content) in content.iter_mut().enumerate() {
            let marked = chunk.marked[word].swap(0, Ordering::AcqRel);
            let first = chunk.pages.start + 64 * word as u64;
            let has = |bit: &u64| !block.is_zero(TargetPage(first + bit));
            *content = (0..64)
                .filter(|bit| marked >> bit & 1 == 1)
                .filter(has)
                .fold(0, |all, bit| all | 1 << bit);
            let unmarked = chunk.present[word].load(Ordering::Relaxed) & !marked;
            chunk.present[word].store(unmarked | *content, Ordering::Relaxed);
        }
        let is_content = |page| {
            let (word, bit) = chunk.word(page);
            content[word] & bit != 0
        };
        for run in runs(chunk.pages.clone(), PAGES, is_content) {
            if self.cancel.is_set() && !self.last_copy.load(Ordering::Relaxed) {
                return Err(Failed::Cancelled);
            }
            let (offset, len) = (bytes(run.start), bytes(run.end - run.start));
            let len = usize::try_from(len).expect("not longer than a chunk");
            let at = self.places[chunk.block.index()] + offset;
            self.disk.write(block, offset, len, at).map_err(Failed::Disk)?;
        }
        Ok(())
    }
}
