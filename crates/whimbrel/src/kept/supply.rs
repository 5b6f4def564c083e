//! The threads that have a kept VM's RAM in memory ahead of those who send it, and no more of it
//! than a window.
//!
//! The file's content is cut into chunks, in the order of the blocks. Whoever sends pages asks for
//! them first ([`Supply::have`]): mostly they are there, because a reader was faster; else they are
//! read by whoever needs them, or waited for while another reads them. So nothing depends on the
//! readers but speed, and pages may be asked for in any order. What has been sent is given back
//! ([`Supply::sent`]), and the readers go on.
//!
//! RAM is either mapped from the file, which costs least where the page cache has it, or a copy. A
//! mapping is read in by a call that gives an error, where the file has become too short, and no
//! signal, and so does a system call that sends it. Who looks at the pages is safe only with a copy.

use std::fs::OpenOptions;
use std::io;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use whimbrel_ram::{Backing, BlockIndex, GuestRam, RamBlock};
use whimbrel_wire::page_bitmap as bitmap;

use super::disk::{Disk, bytes, runs};
use super::writing::kept_error;
use super::{Access, DirectIo, KeptVm};
use crate::error::Error;
use crate::worker::{Cancel, Role, Worker};

/// Pages in a chunk: 4 MiB, whole huge folios.
const PAGES: u64 = 1024;

/// How long a wait for another's reading lasts before its reader looks whether it is cancelled.
const LOOK: Duration = Duration::from_millis(100);

const ABSENT: u8 = 0;
const READING: u8 = 1;
const THERE: u8 = 2;

/// A piece of one block that has content.
#[derive(Debug)]
struct Chunk {
    block: BlockIndex,
    pages: Range<u64>,
    /// Pages with content.
    content: u64,
    state: AtomicU8,
    /// Pages with content that have not been sent since it was read.
    left: AtomicU64,
}

/// What a copy is made of.
#[derive(Debug)]
struct Copied {
    disk: Disk,
    /// Where each block's pages begin in the file.
    places: Vec<u64>,
}

#[derive(Debug, Default)]
struct Queue {
    /// The readers' next chunk.
    next: usize,
    /// Chunks in memory.
    held: usize,
    /// Nobody needs anything any more.
    ended: bool,
    /// Why a reader gave up.
    failed: Option<String>,
}

#[derive(Debug)]
struct Shared {
    path: PathBuf,
    ram: GuestRam,
    present: Arc<[Vec<u8>]>,
    /// Where RAM comes from that is no mapping of the file.
    copied: Option<Copied>,
    chunks: Vec<Chunk>,
    /// Each block's chunks by their number in it; `None` of those without content.
    places: Vec<Vec<Option<usize>>>,
    window: usize,
    queue: Mutex<Queue>,
    /// Something has been read, or given back, or has ended.
    changed: Condvar,
    cancel: Cancel,
}

/// A kept VM's RAM as it comes from its file, and the threads `source/read`. Dropping it ends them.
#[derive(Debug)]
pub(crate) struct Supply {
    shared: Arc<Shared>,
    readers: Vec<Worker>,
}

impl Supply {
    /// Chunks that are in memory and have not been sent, at most; beside those that senders read
    /// for themselves.
    pub(super) const WINDOW: usize = 32;

    /// For senders who ask for every page of [`ram`](Supply::ram), and say when it has been sent;
    /// `looked_at` if they do more with it than have the kernel send it.
    pub(crate) fn start(
        vm: &KeptVm,
        access: Access,
        looked_at: bool,
        cancel: &Cancel,
    ) -> Result<Supply, Error> {
        let direct = match access.direct {
            DirectIo::Off | DirectIo::Auto => DirectIo::Off,
            DirectIo::On => DirectIo::On,
        };
        match direct == DirectIo::Off && !looked_at {
            true => Supply::new(vm, vm.ram.clone(), None, access, Supply::WINDOW, cancel),
            false => {
                let copied = Copied::new(vm, direct)?;
                let blocks = vm.ram.blocks();
                let blocks: Result<_, _> = blocks
                    .map(|(_, block)| RamBlock::anonymous(block.name(), 0, block.len()))
                    .collect();
                let ram = GuestRam::new(blocks?);
                Supply::new(vm, ram, Some(copied), access, Supply::WINDOW, cancel)
            }
        }
    }

    /// For senders of the RAM that is mapped who ask nobody: all of it is read ahead, as fast as
    /// it comes. It is the page cache that holds it, and gives it up when memory is needed.
    pub(crate) fn of_everything(
        vm: &KeptVm,
        access: Access,
        cancel: &Cancel,
    ) -> Result<Supply, Error> {
        Supply::new(vm, vm.ram.clone(), None, access, usize::MAX, cancel)
    }

    fn new(
        vm: &KeptVm,
        ram: GuestRam,
        copied: Option<Copied>,
        access: Access,
        window: usize,
        cancel: &Cancel,
    ) -> Result<Supply, Error> {
        let (mut chunks, mut places) = (Vec::new(), Vec::new());
        for (index, block) in vm.ram.blocks() {
            let present = &vm.present[index.index()];
            let starts = (0..block.target_pages()).step_by(usize::try_from(PAGES).expect("small"));
            let of_block = starts.map(|start| {
                let pages = start..block.target_pages().min(start + PAGES);
                let is_content = |page: &u64| bitmap::is_set(present, *page);
                let content = pages.clone().filter(is_content).count() as u64;
                let (state, left) = (AtomicU8::new(ABSENT), AtomicU64::new(content));
                (content > 0).then(|| {
                    chunks.push(Chunk { block: index, pages, content, state, left });
                    chunks.len() - 1
                })
            });
            places.push(of_block.collect());
        }
        let shared = Arc::new(Shared {
            path: vm.path.clone(),
            ram,
            present: vm.present.clone(),
            copied,
            chunks,
            places,
            window,
            queue: Mutex::default(),
            changed: Condvar::new(),
            cancel: cancel.clone(),
        });
        let mut supply = Supply { shared, readers: Vec::new() };
        for _ in 0..access.threads.get() {
            let ended = Cancel::new().map_err(Error::system("making an eventfd"))?;
            let shared = supply.shared.clone();
            let reader = Worker::start(Role::SourceRead, ended, move || shared.read_ahead())
                .map_err(Error::system("starting a thread"))?;
            supply.readers.push(reader);
        }
        Ok(supply)
    }

    /// What to send from.
    pub(crate) fn ram(&self) -> &GuestRam {
        &self.shared.ram
    }

    /// Has the content of these pages in memory; those that are not [present](KeptVm::is_present)
    /// hold anything. May wait for the disk. Costs next to nothing when they are there.
    pub(crate) fn have(&self, block: BlockIndex, pages: Range<u64>) -> Result<(), Error> {
        for place in self.shared.places_of(block, &pages) {
            // What has been sent is not read again for the pages without content behind it.
            if self.shared.chunks[place].state.load(Ordering::Acquire) != THERE
                && self.shared.content_in(place, &pages) > 0
            {
                self.shared.have(place)?;
            }
        }
        Ok(())
    }

    /// These pages have been sent: nobody needs them any more. Asked for again, they are read again.
    pub(crate) fn sent(&self, block: BlockIndex, pages: Range<u64>) {
        for place in self.shared.places_of(block, &pages) {
            self.shared.sent(place, &pages);
        }
    }

    /// Chunks in memory that have not been sent.
    #[cfg(test)]
    pub(super) fn held(&self) -> usize {
        self.shared.queue().held
    }

    /// The reason why pages that were there could not be sent, if it lies with the file.
    pub(crate) fn explain(&self, error: Error) -> Error {
        match error {
            // The kernel found no page where the mapping has one: the file ends before it now.
            Error::Channel { source, .. } if source.raw_os_error() == Some(libc::EFAULT) => {
                self.shared.error(&reason(&source))
            }
            other => other,
        }
    }
}

impl Copied {
    fn new(vm: &KeptVm, direct: DirectIo) -> Result<Copied, Error> {
        let (mut file, mut places) = (None, Vec::new());
        for (_, block) in vm.ram.blocks() {
            let Backing::PrivateFile { file: of_block, offset } = block.backing() else {
                unreachable!("a kept VM's RAM is a private mapping of its file");
            };
            places.push(*offset);
            file = Some(of_block);
        }
        let unreadable = |error| kept_error(&vm.path, "cannot be read", &error);
        let file = file.ok_or_else(|| unreadable(io::ErrorKind::NotFound.into()))?;
        let file = file.try_clone().map_err(unreadable)?;
        let disk = Disk::new(file, &vm.path, OpenOptions::new().read(true), direct);
        Ok(Copied { disk: disk.map_err(unreadable)?, places })
    }
}

impl Drop for Supply {
    fn drop(&mut self) {
        self.shared.queue().ended = true;
        self.shared.changed.notify_all();
    }
}

impl Shared {
    fn queue(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn error(&self, reason: &str) -> Error {
        Error::Kept { path: self.path.clone(), reason: reason.to_owned() }
    }

    fn places_of(&self, block: BlockIndex, pages: &Range<u64>) -> impl Iterator<Item = usize> {
        let number = |page: u64| usize::try_from(page / PAGES).expect("RAM fits in memory");
        let range = number(pages.start)..number(pages.end + PAGES - 1);
        self.places[block.index()][range].iter().flatten().copied()
    }

    /// How many of these pages are the chunk's and have content.
    fn content_in(&self, place: usize, pages: &Range<u64>) -> u64 {
        let chunk = &self.chunks[place];
        let present = &self.present[chunk.block.index()];
        let here = pages.start.max(chunk.pages.start)..pages.end.min(chunk.pages.end);
        here.filter(|page| bitmap::is_set(present, *page)).count() as u64
    }

    /// What a reader does.
    fn read_ahead(&self) {
        let mut queue = self.queue();
        while !queue.ended && queue.failed.is_none() && queue.next < self.chunks.len() {
            if queue.held >= self.window {
                queue = self.changed.wait(queue).unwrap_or_else(PoisonError::into_inner);
                continue;
            }
            let place = queue.next;
            queue.next += 1;
            if self.chunks[place].state.load(Ordering::Relaxed) != ABSENT {
                continue;
            }
            // Why it failed is told to whoever asks for it.
            let _ = self.read(place, queue);
            queue = self.queue();
        }
    }

    /// Reads a chunk that nobody reads.
    fn read(&self, place: usize, mut queue: MutexGuard<'_, Queue>) -> Result<(), Error> {
        let chunk = &self.chunks[place];
        chunk.state.store(READING, Ordering::Relaxed);
        queue.held += 1;
        drop(queue);
        let result = self.fill(chunk);
        let mut queue = self.queue();
        let result = result.map_err(|error| {
            let reason = reason(&error);
            let told = self.error(&reason);
            queue.failed.get_or_insert(reason);
            told
        });
        let state = if result.is_ok() { THERE } else { ABSENT };
        chunk.state.store(state, Ordering::Release);
        drop(queue);
        self.changed.notify_all();
        result
    }

    fn fill(&self, chunk: &Chunk) -> io::Result<()> {
        let (block, present) = (self.ram.block(chunk.block), &self.present[chunk.block.index()]);
        for run in runs(chunk.pages.clone(), PAGES, |page| bitmap::is_set(present, page)) {
            let range = bytes(run.start)..bytes(run.end);
            match &self.copied {
                Some(copied) => {
                    let len = usize::try_from(range.end - range.start).expect("within a chunk");
                    let at = copied.places[chunk.block.index()] + range.start;
                    copied.disk.read(block, range.start, len, at)?;
                }
                None => match block.read_in(range) {
                    // A kernel that cannot: whoever sends the pages has them read.
                    Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {}
                    result => result?,
                },
            }
        }
        Ok(())
    }

    fn have(&self, place: usize) -> Result<(), Error> {
        let mut queue = self.queue();
        loop {
            if let Some(reason) = &queue.failed {
                return Err(self.error(reason));
            }
            match self.chunks[place].state.load(Ordering::Acquire) {
                THERE => return Ok(()),
                ABSENT => {
                    // Behind it is where the readers are of use.
                    queue.next = queue.next.max(place + 1);
                    return self.read(place, queue);
                }
                _ => {}
            }
            if self.cancel.is_set() {
                return Err(Error::Cancelled);
            }
            let waited = self.changed.wait_timeout(queue, LOOK);
            queue = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    fn sent(&self, place: usize, pages: &Range<u64>) {
        let chunk = &self.chunks[place];
        let sent = self.content_in(place, pages);
        if sent == 0 || chunk.left.fetch_sub(sent, Ordering::AcqRel) != sent {
            return;
        }
        // The last of it: no sender has anything to do with it.
        let range = bytes(chunk.pages.start)..bytes(chunk.pages.end);
        // Where it is refused, memory stays taken until the end.
        let _ = self.ram.block(chunk.block).give_back(range);
        chunk.left.store(chunk.content, Ordering::Relaxed);
        let mut queue = self.queue();
        chunk.state.store(ABSENT, Ordering::Release);
        queue.held -= 1;
        drop(queue);
        self.changed.notify_all();
    }
}

/// What a read error means.
fn reason(error: &io::Error) -> String {
    let short =
        error.kind() == io::ErrorKind::UnexpectedEof || error.raw_os_error() == Some(libc::EFAULT);
    match short {
        true => "it has become shorter while it was read, or its disk has failed: \
                 restore it from a file that nobody changes"
            .to_owned(),
        false => format!("cannot be read: {error}"),
    }
}
