//! A part of a VM, opened: everything it says is checked before anything of it is used.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use whimbrel_ram::{Backing, BlockIndex, GuestRam, TargetPage};

use super::memory_file::{self, Description};
use super::missing::Missing;
use super::record::{Record, TRAILER};
use super::{Side, hex};
use crate::error::Error;
use crate::kept::KeptVm;
use crate::kept::disk::{bytes, runs};
use crate::kept::writing::kept_error;

/// The first bytes of a part's file: whoever expects a whole VM there does not start from it.
pub(crate) const MAGIC: [u8; 4] = *b"WHPT";

/// A part of a VM: what one side of a postcopy had when the other was gone.
#[derive(Debug)]
pub struct Part {
    path: PathBuf,
    file: File,
    side: Side,
    machine: String,
    uuid: Option<[u8; 16]>,
    migration: Option<[u8; 16]>,
    blocks: Vec<Block>,
    missing: Missing,
    /// The VM, but for what is missing; not of the memory of a process.
    pub(super) vm: Option<KeptVm>,
}

/// Where a block is.
#[derive(Debug)]
struct Block {
    name: String,
    len: u64,
    /// Where its pages begin in the file.
    at: u64,
}

/// A block of a [`Part`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PartBlock<'p> {
    /// Its name.
    pub name: &'p str,
    /// Its length in bytes.
    pub bytes: u64,
    /// How many pages of 4 KiB are missing of it.
    pub missing_pages: u64,
}

impl Part {
    /// Whether the file at `path` is a part, or described as the memory of a process.
    pub fn is_one(path: &Path) -> bool {
        begins_like_one(path) || memory_file::description_of(path).exists()
    }

    /// Opens the part at `path`: what a side has kept, or the shared memory of a process that is gone,
    /// with its description beside it ([`describe`](super::describe)).
    pub fn open(path: &Path) -> Result<Part, Error> {
        let unreadable = |error: io::Error| kept_error(path, "cannot be opened", &error);
        let file = File::open(path).map_err(unreadable)?;
        if begins_like_one(path) {
            return Part::kept(path, file);
        }
        match Description::of(path)? {
            Some(description) => Part::memory(path, file, description),
            None => Err(Error::Kept {
                path: path.into(),
                reason: format!(
                    "it is no part of a VM: neither what 'whimbrel rescue keep' has written, nor \
                     memory that {} describes",
                    memory_file::description_of(path).display()
                ),
            }),
        }
    }

    fn kept(path: &Path, file: File) -> Result<Part, Error> {
        let unreadable = |error: io::Error| kept_error(path, "cannot be read", &error);
        let wrong = |reason: String| Error::Kept { path: path.into(), reason };
        let len = file.metadata().map_err(unreadable)?.len();
        let trailer_at = len.checked_sub(TRAILER as u64);
        let trailer_at = trailer_at.ok_or_else(|| wrong("it is cut off".into()))?;
        let mut trailer = [0; TRAILER];
        file.read_exact_at(&mut trailer, trailer_at).map_err(unreadable)?;
        let at = Record::begins_at(&trailer, len).map_err(wrong)?;
        let record_len = usize::try_from(trailer_at - at).expect("not longer than allowed");
        let mut record = vec![0; record_len];
        file.read_exact_at(&mut record, at).map_err(unreadable)?;
        let record = Record::decode(&record).map_err(wrong)?;
        let again = file.try_clone().map_err(unreadable)?;
        let vm = KeptVm::open_part(path, again, at)?;
        let has: Vec<(String, u64)> =
            vm.ram().blocks().map(|(_, block)| (block.name().into(), block.len())).collect();
        if has != record.blocks {
            let what = "its record of what is missing is not of the RAM blocks that it holds";
            return Err(wrong(what.into()));
        }
        let blocks = vm.ram().blocks().map(|(_, block)| {
            let Backing::PrivateFile { offset, .. } = block.backing() else {
                unreachable!("a kept VM's RAM is a private mapping of its file");
            };
            Block { name: block.name().into(), len: block.len(), at: *offset }
        });
        Ok(Part {
            path: path.into(),
            blocks: blocks.collect(),
            file,
            side: record.side,
            machine: vm.machine(),
            uuid: vm.configuration.uuid,
            migration: record.migration,
            missing: record.missing,
            vm: Some(vm),
        })
    }

    fn memory(path: &Path, file: File, description: Description) -> Result<Part, Error> {
        let len =
            file.metadata().map_err(|error| kept_error(path, "cannot be read", &error))?.len();
        let wrong = |reason| Error::Kept { path: path.into(), reason };
        let (machine, uuid, migration, places) = description.check(len).map_err(wrong)?;
        // Whoever has it as memory holds a lock on it until it ends, however it does.
        if let Err(error) = file.try_lock_shared() {
            return Err(Error::Kept {
                path: path.into(),
                reason: format!(
                    "the process whose memory it is still has it ({error}): while it lives, \
                     'whimbrel rescue keep' has it say what it has"
                ),
            });
        }
        let missing = Missing::nothing(places.iter().map(|place| place.1));
        let blocks = places.into_iter().map(|(name, len, at)| Block { name, len, at }).collect();
        let (path, side) = (path.into(), Side::Source);
        Ok(Part { path, file, side, machine, uuid, migration, blocks, missing, vm: None })
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Which side's it is.
    pub fn side(&self) -> Side {
        self.side
    }

    /// The machine type's full name.
    pub fn machine(&self) -> &str {
        &self.machine
    }

    /// The migration's identifier, if it is known.
    pub fn migration(&self) -> Option<[u8; 16]> {
        self.migration
    }

    /// Whether the devices' state is in it, and not RAM alone.
    pub fn has_devices(&self) -> bool {
        self.vm.is_some()
    }

    /// Bytes of RAM, all blocks together, with what is missing.
    pub fn ram_bytes(&self) -> u64 {
        self.blocks.iter().map(|block| block.len).sum()
    }

    /// How many pages of 4 KiB are missing.
    pub fn missing_pages(&self) -> u64 {
        self.missing.count()
    }

    /// Its blocks.
    pub fn blocks(&self) -> impl Iterator<Item = PartBlock<'_>> {
        self.blocks.iter().enumerate().map(|(index, block)| PartBlock {
            name: &block.name,
            bytes: block.len,
            missing_pages: self.missing.in_block(index),
        })
    }

    /// The runs of pages that are missing of the block of that place in [`blocks`](Part::blocks).
    ///
    /// # Panics
    /// When there is no such block.
    pub fn missing_runs(&self, block: usize) -> impl Iterator<Item = Range<u64>> {
        self.missing.runs(block, 0..self.pages(block), u64::MAX)
    }

    pub(super) fn is_missing(&self, block: usize, page: u64) -> bool {
        self.missing.has(block, page)
    }

    pub(super) fn pages(&self, block: usize) -> u64 {
        self.blocks[block].len / TargetPage(1).offset()
    }

    pub(super) fn block_name(&self, block: usize) -> &str {
        &self.blocks[block].name
    }

    /// Whether a page's content is in the file; otherwise it is zero, if it is not missing.
    fn is_present(&self, block: usize, page: u64) -> bool {
        let index = BlockIndex(u16::try_from(block).expect("at most 65,535 blocks"));
        self.vm.as_ref().is_none_or(|vm| vm.is_present(index, TargetPage(page)))
    }

    /// Reads pages into `out`, from its beginning on. Those that are missing are zeros.
    pub(super) fn read(
        &self,
        block: usize,
        pages: Range<u64>,
        out: &mut [u8],
    ) -> Result<(), Error> {
        let place = |page: u64| usize::try_from(bytes(page - pages.start)).expect("in memory");
        out[..place(pages.end)].fill(0);
        let has = |page| !self.is_missing(block, page) && self.is_present(block, page);
        for run in runs(pages.clone(), u64::MAX, has) {
            let at = self.blocks[block].at + bytes(run.start);
            self.file
                .read_exact_at(&mut out[place(run.start)..place(run.end)], at)
                .map_err(|error| self.unreadable(&error))?;
        }
        Ok(())
    }

    fn unreadable(&self, error: &io::Error) -> Error {
        match error.kind() {
            io::ErrorKind::UnexpectedEof => Error::Kept {
                path: self.path.clone(),
                reason: "it has become shorter while it was read".into(),
            },
            _ => kept_error(&self.path, "cannot be read", error),
        }
    }

    /// Refuses RAM of another VM.
    pub(super) fn check_is_of(&self, machine: &str, ram: &GuestRam) -> Result<(), Error> {
        let there = ram.blocks().map(|(_, block)| (block.name(), block.len()));
        self.check_same(machine, there)
    }

    /// Refuses a part of another VM, or of another migration of the same.
    pub(super) fn check_matches(&self, other: &Part) -> Result<(), Error> {
        let there = other.blocks.iter().map(|block| (block.name.as_str(), block.len));
        self.check_same(&other.machine, there)?;
        let ids = [("UUID", self.uuid, other.uuid), ("migration", self.migration, other.migration)];
        for (what, here, there) in ids {
            if let (Some(here), Some(there)) = (here, there)
                && here != there
            {
                return Err(self.differs(what, hex(&here), hex(&there)));
            }
        }
        Ok(())
    }

    fn check_same<'b>(
        &self,
        machine: &str,
        there: impl Iterator<Item = (&'b str, u64)>,
    ) -> Result<(), Error> {
        if self.machine != machine {
            return Err(self.differs("machine type", self.machine.clone(), machine.into()));
        }
        let mut found = 0;
        for (name, len) in there {
            let Some(here) = self.place_of(name).map(|place| &self.blocks[place]) else {
                if self.vm.is_none() {
                    continue; // Memory of a process may be in several files.
                }
                let text = format!("a block {name}");
                return Err(self.differs("RAM blocks", "none of that name".into(), text));
            };
            found += 1;
            if here.len != len {
                let what = format!("length of RAM block {name}");
                return Err(self.differs(&what, here.len.to_string(), len.to_string()));
            }
        }
        if found != self.blocks.len() {
            let (here, count) = (self.blocks.len().to_string(), found.to_string());
            return Err(self.differs("RAM blocks", here, format!("{count} of these")));
        }
        Ok(())
    }

    fn differs(&self, what: &str, here: String, there: String) -> Error {
        Error::Kept {
            path: self.path.clone(),
            reason: format!("it is of another VM: {what}: {here} here, {there} there"),
        }
    }

    /// The place of the block of that name; the memory of a process need not have all.
    pub(super) fn place_of(&self, name: &str) -> Option<usize> {
        self.blocks.iter().position(|block| block.name == name)
    }
}

fn begins_like_one(path: &Path) -> bool {
    let mut magic = [0; 4];
    let file = File::open(path);
    file.is_ok_and(|file| file.read_exact_at(&mut magic, 0).is_ok() && magic == MAGIC)
}
