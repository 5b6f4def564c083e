//! A file that is read or written past the page cache where its file system can, and by several
//! threads at once: every access names its place.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use whimbrel_ram::kernel_copy::{Gather, Scatter};
use whimbrel_ram::{RamBlock, TARGET_PAGE};

/// Whether a kept VM's file is read and written past the page cache (`O_DIRECT`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DirectIo {
    /// Through the page cache.
    Off,
    /// Whatever is faster. It is written past it where the file system can: all of it goes to the
    /// disk before the source is told. It is read through it: that is as fast when the page cache
    /// has nothing of it, and much faster when it has (docs/benchmarks.md).
    #[default]
    Auto,
    /// Past it. A file system that cannot is an error.
    On,
}

/// A run of pages shorter than this is no work for direct I/O, which waits for each of them: the
/// page cache collects them.
const SHORT_RUN: usize = 64 << 10;

/// The file, once through the page cache and where it can be, once past it.
#[derive(Debug)]
pub(super) struct Disk {
    cached: File,
    direct: Option<File>,
    /// It may go through the page cache instead.
    may_fall_back: bool,
    /// It has to: the file system takes such a descriptor, but not our accesses.
    fallen_back: AtomicBool,
}

impl Disk {
    /// The file `cached`, which is at `path`; `access` says how it is to be opened.
    ///
    /// # Errors
    /// Only where direct I/O is insisted on, and is not to be had.
    pub(super) fn new(
        cached: File,
        path: &Path,
        access: &OpenOptions,
        direct: DirectIo,
    ) -> io::Result<Disk> {
        let open = || access.clone().custom_flags(libc::O_DIRECT).open(path);
        let (direct, may_fall_back) = match direct {
            DirectIo::Off => (None, true),
            DirectIo::Auto => (open().ok(), true),
            DirectIo::On => (Some(open().map_err(explain)?), false),
        };
        Ok(Disk { cached, direct, may_fall_back, fallen_back: AtomicBool::new(false) })
    }

    /// Whether long runs go past the page cache.
    pub(super) fn is_direct(&self) -> bool {
        self.direct.is_some() && !self.fallen_back.load(Ordering::Relaxed)
    }

    fn file(&self, len: usize) -> &File {
        match &self.direct {
            Some(direct) if len >= SHORT_RUN && self.is_direct() => direct,
            _ => &self.cached,
        }
    }

    /// After an error of direct I/O: whether to go on without.
    fn falls_back(&self, error: &io::Error) -> bool {
        let falls =
            self.may_fall_back && self.is_direct() && error.raw_os_error() == Some(libc::EINVAL);
        if falls {
            self.fallen_back.store(true, Ordering::Relaxed);
        }
        falls
    }

    /// Writes `len` bytes of `block` from `offset` on, whole pages, to byte `at` of the file.
    pub(super) fn write(
        &self,
        block: &RamBlock,
        offset: u64,
        len: usize,
        at: u64,
    ) -> io::Result<()> {
        let mut pieces = Gather::new();
        pieces.push_guest(block, offset, len).map_err(io::Error::other)?;
        let write = |file: BorrowedFd<'_>, at| pieces.write_at(file, at);
        self.move_all(len, at, io::ErrorKind::WriteZero, write)
    }

    /// Reads `len` bytes, whole pages, from byte `at` of the file into `block` from `offset` on.
    pub(super) fn read(
        &self,
        block: &RamBlock,
        offset: u64,
        len: usize,
        at: u64,
    ) -> io::Result<()> {
        let mut pieces = Scatter::new();
        pieces.push_guest(block, offset, len).map_err(io::Error::other)?;
        let read = |file: BorrowedFd<'_>, at| pieces.read_at(file, at);
        self.move_all(len, at, io::ErrorKind::UnexpectedEof, read)
    }

    /// Calls `some` until `len` bytes have moved, each time with where it is to go on; it gives how
    /// many it has moved, none of which is the error `none`.
    fn move_all(
        &self,
        len: usize,
        at: u64,
        none: io::ErrorKind,
        mut some: impl FnMut(BorrowedFd<'_>, u64) -> io::Result<usize>,
    ) -> io::Result<()> {
        let mut done = 0;
        while done < len {
            match some(self.file(len).as_fd(), at + done as u64) {
                Ok(0) => return Err(none.into()),
                Ok(bytes) => done += bytes,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if self.falls_back(&error) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

fn explain(error: io::Error) -> io::Error {
    match error.raw_os_error() {
        Some(libc::EINVAL) => io::Error::other(
            "its file system has no direct I/O (O_DIRECT): keep the file elsewhere, or do not ask \
             for it",
        ),
        _ => error,
    }
}

/// Runs of pages, from a test of each: those that pass and follow each other, `most` at most.
pub(crate) fn runs(
    pages: std::ops::Range<u64>,
    most: u64,
    mut is_in: impl FnMut(u64) -> bool,
) -> impl Iterator<Item = std::ops::Range<u64>> {
    let mut next = pages.start;
    std::iter::from_fn(move || {
        let start = (next..pages.end).find(|&page| is_in(page))?;
        let limit = pages.end.min(start.saturating_add(most));
        let end = (start + 1..limit).find(|&page| !is_in(page)).unwrap_or(limit);
        // The one that did not pass need not be asked again.
        next = if end < limit { end + 1 } else { end };
        Some(start..end)
    })
}

/// So many pages, in bytes.
pub(crate) fn bytes(pages: u64) -> u64 {
    pages * TARGET_PAGE.bytes() as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    fn opened(path: &Path, direct: DirectIo) -> Disk {
        let mut access = OpenOptions::new();
        access.read(true).write(true);
        let file = access.open(path).expect("ours");
        Disk::new(file, path, &access, direct).expect("a file system of tests")
    }

    #[test]
    fn long_and_short_runs_come_back_in_every_way() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("file");
        File::create(&path).expect("ours");
        const LEN: usize = 1 << 20;
        let block = RamBlock::anonymous("ram", 0, LEN as u64).expect("1 MiB");
        let again = RamBlock::anonymous("ram", 0, LEN as u64).expect("1 MiB");
        for (turn, direct) in [DirectIo::Off, DirectIo::Auto].into_iter().enumerate() {
            let disk = opened(&path, direct);
            for offset in (0..LEN as u64).step_by(8) {
                block.store_u64(offset, offset + turn as u64).expect("inside");
            }
            disk.write(&block, 0, 4096, 1 << 20).expect("room");
            disk.write(&block, 4096, LEN - 4096, (1 << 20) + 4096).expect("room");
            disk.read(&again, 0, SHORT_RUN, 1 << 20).expect("it is there");
            let rest = SHORT_RUN as u64;
            disk.read(&again, rest, LEN - SHORT_RUN, (1 << 20) + rest).expect("it is there");
            for offset in (0..LEN as u64).step_by(8) {
                assert_eq!(again.load_u64(offset).expect("inside"), offset + turn as u64);
            }
            let beyond = disk.read(&again, 0, LEN, (1 << 20) + 8192).expect_err("too short");
            assert_eq!(beyond.kind(), io::ErrorKind::UnexpectedEof);
        }
    }

    #[test]
    fn what_direct_io_refuses_goes_through_the_page_cache_unless_it_is_insisted_on() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("file");
        std::fs::write(&path, [5; 128 << 10]).expect("room");
        let block = RamBlock::anonymous("ram", 0, 128 << 10).expect("memory");
        // At no multiple of any block size: what a file system with large blocks says of ours.
        let read = |disk: &Disk| disk.read(&block, 0, 64 << 10, 1);
        let auto = opened(&path, DirectIo::Auto);
        if !auto.is_direct() {
            return println!("skipped: no direct I/O here");
        }
        read(&auto).expect("through the page cache");
        if auto.is_direct() {
            return println!("skipped: this file system takes any place");
        }
        assert_eq!(block.load_u64(0).expect("inside"), 0x0505_0505_0505_0505);
        let error = read(&opened(&path, DirectIo::On)).expect_err("insisted on");
        assert_eq!(error.raw_os_error(), Some(libc::EINVAL));
    }

    #[test]
    fn runs_are_as_long_as_they_may_be() {
        let bits = [true, true, false, true, true, true, true, false, false, true];
        let found = |most| -> Vec<_> {
            let is_in = |page| bits[usize::try_from(page).expect("small")];
            runs(0..10, most, is_in).collect()
        };
        assert_eq!(found(100), [0..2, 3..7, 9..10]);
        assert_eq!(found(3), [0..2, 3..6, 6..7, 9..10]);
        assert_eq!(found(1).len(), 7);
        let mut asked = 0;
        let none = runs(0..10, 4, |_| {
            asked += 1;
            false
        });
        assert_eq!(none.count(), 0);
        assert_eq!(asked, 10);
    }
}
