//! Writing a kept VM's file.

use std::fs::File;
use std::io::{self, Seek, SeekFrom, Write};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

use whimbrel_ram::kernel_copy::Gather;
use whimbrel_ram::{GuestRam, RamBlock, TARGET_PAGE, TargetPage};
use whimbrel_wire::{
    BlockInfo, Configuration, FileHeader, MappedRamHeader, encode_end_of_section,
    page_bitmap as bitmap,
};

use crate::channel::create_partial;
use crate::error::Error;
use crate::source::setup::{RAM_SECTION, block_list, name, ram_section};

/// Pages written with one system call.
const RUN_MAX: u64 = 1024;

/// A file being written beside the one asked for. Dropped before [`keep`](Writing::keep), it goes.
#[derive(Debug)]
pub(super) struct Writing {
    file: File,
    partial: PathBuf,
    path: PathBuf,
    kept: bool,
}

impl Writing {
    /// Begins the file that is to become `path`.
    pub(super) fn begin(path: &Path) -> Result<Writing, Error> {
        let (partial, file) =
            create_partial(path).map_err(|error| kept_error(path, "cannot be created", &error))?;
        Ok(Writing { file, partial, path: path.into(), kept: false })
    }

    /// Writes everything; gives how many pages are not zero. `early` and `devices` are encoded
    /// sections, `devices` with the end of the stream.
    pub(super) fn write(
        &mut self,
        configuration: &Configuration,
        early: &[u8],
        ram: &GuestRam,
        devices: &[u8],
    ) -> Result<u64, Error> {
        let mut words = Vec::new();
        FileHeader.encode(&mut words);
        configuration.encode(&mut words);
        words.extend_from_slice(early);
        ram_section()?.encode_start(&mut words);
        block_list(ram)?.encode_total(&mut words);
        let mut at = 0;
        let mut stored = 0;
        for (_, block) in ram.blocks() {
            let (next, pages) = self.block(block, at, &mut words)?;
            at = next;
            stored += pages;
        }
        encode_end_of_section(&mut words);
        RAM_SECTION.encode_footer(&mut words);
        RAM_SECTION.encode_end(&mut words);
        encode_end_of_section(&mut words);
        RAM_SECTION.encode_footer(&mut words);
        words.extend_from_slice(devices);
        self.write_at(at, &words)?;
        Ok(stored)
    }

    /// Writes what precedes a block (`words`, from `at` on), its bitmap and its pages. Gives where
    /// the next words go, and how many pages are not zero.
    fn block(
        &mut self,
        block: &RamBlock,
        at: u64,
        words: &mut Vec<u8>,
    ) -> Result<(u64, u64), Error> {
        let mut info = BlockInfo::new(name(block.name())?, block.len());
        let record_len = 1 + block.name().len() as u64 + 8;
        let header_at = at + words.len() as u64 + record_len;
        let page = whimbrel_wire::TargetPage::FOUR_KIB;
        let header = MappedRamHeader::place(header_at, block.len(), page).ok_or_else(|| {
            Error::Refused(format!("RAM block {} is too long for a file", block.name()))
        })?;
        info.mapped_ram = Some(header);
        info.encode(words);
        self.write_at(at, words)?;
        words.clear();
        let (bits, stored) = self.pages(block, &header)?;
        self.write_at(header.bitmap_offset, &bits)?;
        Ok((header.end(block.len()), stored))
    }

    fn pages(
        &mut self,
        block: &RamBlock,
        header: &MappedRamHeader,
    ) -> Result<(Vec<u8>, u64), Error> {
        let bytes = bitmap::bitmap_len(block.len(), whimbrel_wire::TargetPage::FOUR_KIB);
        let mut bits = vec![0; usize::try_from(bytes).expect("RAM fits in memory")];
        let mut stored = 0;
        let mut run = 0..0;
        for page in 0..block.target_pages() {
            if block.is_zero(TargetPage(page)) {
                continue;
            }
            bitmap::set(&mut bits, page, true);
            stored += 1;
            if run.end != page || run.end - run.start == RUN_MAX {
                self.run(block, header, run)?;
                run = page..page;
            }
            run.end = page + 1;
        }
        self.run(block, header, run)?;
        Ok((bits, stored))
    }

    fn run(
        &mut self,
        block: &RamBlock,
        header: &MappedRamHeader,
        run: std::ops::Range<u64>,
    ) -> Result<(), Error> {
        if run.is_empty() {
            return Ok(());
        }
        let offset = TargetPage(run.start).offset();
        let len =
            usize::try_from(run.end - run.start).expect("at most RUN_MAX") * TARGET_PAGE.bytes();
        let mut pieces = Gather::new();
        pieces.push_guest(block, offset, len)?;
        let written =
            self.file.seek(SeekFrom::Start(header.pages_offset + offset)).and_then(|_| {
                while pieces.bytes_left() > 0 {
                    match pieces.write(self.file.as_fd()) {
                        Ok(_) => {}
                        Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                        Err(error) => return Err(error),
                    }
                }
                Ok(())
            });
        written.map_err(|error| kept_error(&self.path, "cannot be written", &error))
    }

    fn write_at(&mut self, at: u64, bytes: &[u8]) -> Result<(), Error> {
        let written = self.file.seek(SeekFrom::Start(at)).and_then(|_| self.file.write_all(bytes));
        written.map_err(|error| kept_error(&self.path, "cannot be written", &error))
    }

    /// Everything reaches the disk.
    pub(super) fn sync(&self) -> Result<(), Error> {
        self.file.sync_all().map_err(|error| kept_error(&self.path, "cannot be written", &error))
    }

    /// It gets its name.
    pub(super) fn keep(mut self) -> Result<(), Error> {
        std::fs::rename(&self.partial, &self.path)
            .map_err(|error| kept_error(&self.path, "cannot be written", &error))?;
        self.kept = true;
        Ok(())
    }
}

impl Drop for Writing {
    fn drop(&mut self) {
        if !self.kept {
            // Best effort by nature: the error that brought us here is the one to report.
            let _ = std::fs::remove_file(&self.partial);
        }
    }
}

pub(super) fn kept_error(path: &Path, what: &str, error: &io::Error) -> Error {
    Error::Kept { path: path.into(), reason: format!("{what}: {error}") }
}
