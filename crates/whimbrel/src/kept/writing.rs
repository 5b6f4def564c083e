//! A kept VM's file while it is written: beside the one asked for, under a name of its own.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use whimbrel_ram::GuestRam;
use whimbrel_wire::Configuration;

use super::Access;
use super::disk::Disk;
use super::layout::Layout;
use super::writers::{Changes, Writers};
use crate::channel::create_partial;
use crate::error::Error;
use crate::worker::Cancel;

/// A file being written. Dropped before [`keep`](Writing::keep), it goes.
#[derive(Debug)]
pub(crate) struct Writing {
    /// What RAM is written by; ends before the file does.
    writers: Writers,
    file: Partial,
    ram: GuestRam,
    access: Access,
    cancel: Cancel,
    /// Where RAM is in the file.
    layout: Layout,
    /// Where the stream ends, when everything has been written.
    end: u64,
}

impl Writing {
    /// Begins the file that is to become `path`, for a guest with RAM of its own that is all zero.
    pub(crate) fn begin(
        path: &Path,
        configuration: &Configuration,
        ram: &GuestRam,
        access: Access,
        cancel: &Cancel,
    ) -> Result<Writing, Error> {
        let file = Partial::create(path)?;
        let layout = Layout::plan(configuration, &[], ram)?;
        let writers = Writers::start(ram.clone(), &layout, file.disk(access)?, access, cancel)?;
        let (ram, cancel) = (ram.clone(), cancel.clone());
        Ok(Writing { writers, file, ram, access, cancel, layout, end: 0 })
    }

    /// What is to be told of every page that is placed in RAM from now on, whatever road it comes
    /// by, other than by postcopy: so it is written while the rest arrives.
    pub(crate) fn changes(&self) -> Changes {
        self.writers.changes()
    }

    /// What comes now comes by postcopy, and is waited for by whoever touches it before: nothing is
    /// written before all of it is there.
    pub(super) fn pause(&mut self) -> Result<(), Error> {
        self.writers.stop();
        self.writers = self.new_writers(&self.layout)?;
        Ok(())
    }

    fn new_writers(&self, layout: &Layout) -> Result<Writers, Error> {
        let disk = self.file.disk(self.access)?;
        Writers::start(self.ram.clone(), layout, disk, self.access, &self.cancel)
    }

    /// Writes everything that has not been written, and has it reach the disk; gives how many
    /// pages are not zero. `early` and `devices` are encoded sections, `devices` with the end of
    /// the stream. Not to be cancelled when the guest is nowhere else any more (`last_copy`).
    pub(crate) fn finish(
        &mut self,
        configuration: &Configuration,
        early: &[u8],
        devices: &[u8],
        last_copy: bool,
    ) -> Result<u64, Error> {
        let layout = Layout::plan(configuration, early, &self.ram)?;
        if !layout.has_pages_of(&self.layout) {
            // Sections before RAM, which are rare, and so many that RAM begins elsewhere.
            // Nobody tells these writers of pages: they write all of them.
            self.writers.stop();
            self.file.error_of(self.file.file.set_len(0))?;
            self.writers = self.new_writers(&layout)?;
        }
        self.writers.finish(last_copy).map_err(|failed| failed.at(&self.file.path))?;
        let stored = self.writers.stored();
        for (index, _) in self.ram.blocks() {
            self.write(layout.header(index).bitmap_offset, &self.writers.bitmap(index))?;
        }
        for words in layout.into_words(devices) {
            self.write(words.at, &words.bytes)?;
            self.end = words.at + words.bytes.len() as u64;
        }
        // "Loaded" is what the source hears next: so it is on the disk.
        self.file.error_of(self.file.file.sync_all())?;
        Ok(stored)
    }

    /// What has been written is only a part of a VM: so it begins with `magic`, with which nobody
    /// starts from it, and ends in what `record` gives for the place it begins at.
    pub(crate) fn mark_as_part(
        &mut self,
        magic: [u8; 4],
        record: impl FnOnce(u64) -> Vec<u8>,
    ) -> Result<(), Error> {
        self.write(self.end, &record(self.end))?;
        self.write(0, &magic)?;
        self.file.error_of(self.file.file.sync_all())
    }

    fn write(&self, at: u64, bytes: &[u8]) -> Result<(), Error> {
        self.file.error_of(self.file.file.write_all_at(bytes, at))
    }

    /// It gets its name.
    pub(crate) fn keep(self) -> Result<(), Error> {
        self.file.keep()
    }
}

/// A file beside the one asked for. Dropped before it is kept, it goes.
#[derive(Debug)]
pub(crate) struct Partial {
    pub(crate) file: File,
    partial: PathBuf,
    path: PathBuf,
    kept: bool,
}

impl Partial {
    pub(crate) fn create(path: &Path) -> Result<Partial, Error> {
        let (partial, file) =
            create_partial(path).map_err(|error| kept_error(path, "cannot be created", &error))?;
        Ok(Partial { file, partial, path: path.into(), kept: false })
    }

    fn disk(&self, access: Access) -> Result<Disk, Error> {
        let file = self.error_of(self.file.try_clone())?;
        let mut options = OpenOptions::new();
        self.error_of(Disk::new(file, &self.partial, options.write(true), access.direct))
    }

    pub(crate) fn error_of<T>(&self, result: io::Result<T>) -> Result<T, Error> {
        result.map_err(|error| kept_error(&self.path, "cannot be written", &error))
    }

    pub(crate) fn keep(mut self) -> Result<(), Error> {
        self.error_of(std::fs::rename(&self.partial, &self.path))?;
        self.kept = true;
        // Its content is on the disk; that its name is, too, not every file system can promise.
        let folder = self.path.parent().filter(|folder| !folder.as_os_str().is_empty());
        if let Ok(folder) = File::open(folder.unwrap_or(Path::new("."))) {
            let _ = folder.sync_all();
        }
        Ok(())
    }
}

impl Drop for Partial {
    fn drop(&mut self) {
        if !self.kept {
            // Best effort by nature: the error that brought us here is the one to report.
            let _ = std::fs::remove_file(&self.partial);
        }
    }
}

pub(crate) fn kept_error(path: &Path, what: &str, error: &io::Error) -> Error {
    Error::Kept { path: path.into(), reason: format!("{what}: {error}") }
}
