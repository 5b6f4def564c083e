//! Making a whole VM of two parts.

use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;

use whimbrel_wire::{TargetPage, page_bitmap as bitmap};

use super::part::Part;
use super::{Lost, Side, lost};
use crate::error::Error;
use crate::kept::KeptVm;
use crate::kept::disk::{bytes, runs};
use crate::kept::keeper::encode_own;
use crate::kept::layout::Layout;
use crate::kept::writing::Partial;
use crate::own_devices;

/// How many pages are copied at once: 4 MiB.
const PAGES: u64 = 1024;

/// Fewer pages than this that both have, and that are not zero, a guest may just have written.
const COMPARED: u64 = 256;

/// Otherwise one in so many should be the same in both.
const SAME: u64 = 16;

/// How parts are joined.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct How {
    /// What becomes of pages that neither has.
    pub lost: Lost,
    /// Parts that do not name their migration, and of which hardly a page is the same, are taken for
    /// those of two VMs, unless this is set: a guest may have written all of its RAM since it was
    /// handed over.
    pub unlike_too: bool,
}

/// What has been joined.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Joined {
    /// The machine type's full name.
    pub machine: String,
    /// Bytes of RAM, all blocks together.
    pub ram_bytes: u64,
    /// Bytes of RAM that are not zero, and so are in the file.
    pub stored_bytes: u64,
    /// Pages of 4 KiB that were missing in the one part, and have been taken from the other.
    pub pages_taken: u64,
    /// Pages that neither has, and that are given up.
    pub lost_pages: u64,
}

/// Makes a kept VM at `path` of what a destination had, `part`, and of `other`, which has what was
/// missing. Both stay as they are.
///
/// What the destination had counts: its guest has gone on with it. Without `other`, everything that
/// is missing is lost.
///
/// # Errors
/// When the parts are not of the same VM, or pages are missing in both, unless these are to be
/// given up: then whoever takes the VM in has to be a whimbrel's VMM, by precopy.
pub fn join(part: &Part, other: Option<&Part>, how: How, path: &Path) -> Result<Joined, Error> {
    if part.side() != Side::Destination {
        return Err(refused(
            part,
            "it is the source's: the first part has to be the destination's, which has the devices",
        ));
    }
    if let Some(other) = other {
        if other.side() != Side::Source {
            return Err(refused(
                other,
                "it is another destination's: the other part is the source's",
            ));
        }
        other.check_matches(part)?;
        if !how.unlike_too {
            check_alike(part, other)?;
        }
    }
    Joining { part, other, lost: how.lost }.write(path)
}

/// Makes a kept VM at `path` of what a source had, and of nothing else: the guest as it was when it
/// was handed over. Whatever it has done since at the destination is undone, and forgotten; what it
/// has told the world by then, and written to disks, is not.
pub fn roll_back(part: &Part, path: &Path) -> Result<Joined, Error> {
    if part.side() != Side::Source || !part.has_devices() {
        return Err(refused(part, "it is not what a source process has kept, with its devices"));
    }
    Joining { part, other: None, lost: Lost::Refuse }.write(path)
}

fn refused(part: &Part, reason: &str) -> Error {
    Error::Kept { path: part.path().into(), reason: reason.into() }
}

/// Refuses parts that do not name their migration and have hardly a page in common, though both have
/// many: a guest that has gone on has hardly changed all of its RAM. VMs that began with the same
/// content are not told apart by this.
fn check_alike(part: &Part, other: &Part) -> Result<(), Error> {
    if part.migration().is_some() && part.migration() == other.migration() {
        return Ok(());
    }
    let page = usize::try_from(TargetPage::FOUR_KIB.size()).expect("small");
    let (mut here, mut there) = (vec![0; page], vec![0; page]);
    let (mut compared, mut same) = (0, 0);
    for (block, _) in part.blocks().enumerate() {
        let Some(place) = other.place_of(part.block_name(block)) else { continue };
        for number in 0..part.pages(block) {
            if part.is_missing(block, number) || other.is_missing(place, number) {
                continue;
            }
            part.read(block, number..number + 1, &mut here)?;
            if here.iter().all(|byte| *byte == 0) {
                continue;
            }
            other.read(place, number..number + 1, &mut there)?;
            compared += 1;
            same += u64::from(here == there);
        }
    }
    if compared < COMPARED || same >= compared / SAME {
        return Ok(());
    }
    let reason = format!(
        "it seems to be of another VM: of {compared} pages that both parts have {same} are the same as \
         in {}; if the guest may have written all others since, join them all the same (--unlike)",
        part.path().display()
    );
    Err(refused(other, &reason))
}

struct Joining<'a> {
    part: &'a Part,
    other: Option<&'a Part>,
    lost: Lost,
}

impl Joining<'_> {
    fn write(&self, path: &Path) -> Result<Joined, Error> {
        let part = self.part;
        let vm = part.vm.as_ref().expect("of a side that had kept its devices");
        let lost = self.nowhere();
        let lost_pages = lost.iter().map(|(_, run)| run.end - run.start).sum();
        if lost_pages > 0 && self.lost == Lost::Refuse {
            return Err(lost::refusal(lost_pages));
        }
        let mut early = Vec::new();
        vm.early.iter().for_each(|section| section.encode(&mut early));
        let layout = Layout::plan(&vm.configuration, &early, vm.ram())?;
        let file = Partial::create(path)?;
        let (mut stored, mut pages_taken) = (0, 0);
        for (index, _) in vm.ram().blocks() {
            let header = layout.header(index);
            let copied = self.copy(index.index(), header.pages_offset, &file)?;
            stored += copied.stored;
            pages_taken += copied.taken;
            let bits = file.file.write_all_at(&copied.present, header.bitmap_offset);
            file.error_of(bits)?;
        }
        let tail = self.tail(vm, &lost)?;
        for words in layout.into_words(&tail) {
            file.error_of(file.file.write_all_at(&words.bytes, words.at))?;
        }
        file.error_of(file.file.sync_all())?;
        file.keep()?;
        Ok(Joined {
            machine: part.machine().into(),
            ram_bytes: part.ram_bytes(),
            stored_bytes: bytes(stored),
            pages_taken,
            lost_pages,
        })
    }

    /// The devices, with the end of the stream.
    fn tail(&self, vm: &KeptVm, lost: &[(String, Range<u64>)]) -> Result<Vec<u8>, Error> {
        let mut tail = Vec::new();
        if vm.configuration.is_whimbrel() {
            let mut sections = vm.devices.sections.clone();
            if !lost.is_empty() {
                let ids = sections.iter().map(|section| section.header.id.0);
                let id = ids.max().map_or(1, |last| last.wrapping_add(1));
                sections.push(own_devices::section(id, &lost::section(lost))?);
            }
            encode_own(&sections, &mut tail);
            return Ok(tail);
        }
        if !lost.is_empty() {
            return Err(refused(
                self.part,
                "it is a QEMU's, and pages of it are lost: no QEMU can be told so",
            ));
        }
        let mut devices = vm.devices.clone();
        // A stock QEMU waits for a description, be it an empty one.
        devices.vmdesc.get_or_insert_with(|| b"{}".to_vec());
        devices.encode(&mut tail);
        Ok(tail)
    }

    /// Where the other part has a block.
    fn there(&self, block: usize) -> Option<(&Part, usize)> {
        let other = self.other?;
        Some((other, other.place_of(self.part.block_name(block))?))
    }

    fn is_nowhere(&self, block: usize, page: u64) -> bool {
        self.part.is_missing(block, page)
            && self.there(block).is_none_or(|(other, there)| other.is_missing(there, page))
    }

    /// The pages that neither part has.
    fn nowhere(&self) -> Vec<(String, Range<u64>)> {
        let all = 0..self.part.blocks().count();
        let in_block = |block: usize| {
            let is_nowhere = move |page| self.is_nowhere(block, page);
            let runs = runs(0..self.part.pages(block), u64::MAX, is_nowhere);
            runs.map(move |run| (self.part.block_name(block).to_owned(), run))
        };
        all.flat_map(in_block).collect()
    }

    /// Copies a block's pages to byte `at` of the file on.
    fn copy(&self, block: usize, at: u64, file: &Partial) -> Result<Copied, Error> {
        let pages = self.part.pages(block);
        let bits = bitmap::bitmap_len(bytes(pages), TargetPage::FOUR_KIB);
        let mut copied = Copied {
            present: vec![0; usize::try_from(bits).expect("RAM fits in memory")],
            stored: 0,
            taken: 0,
        };
        let place = |page: u64| usize::try_from(bytes(page)).expect("within a chunk");
        let mut buffer = vec![0; place(PAGES)];
        let mut start = 0;
        while start < pages {
            let chunk = start..pages.min(start + PAGES);
            self.part.read(block, chunk.clone(), &mut buffer)?;
            if let Some((other, there)) = self.there(block) {
                let takes =
                    |page| self.part.is_missing(block, page) && !other.is_missing(there, page);
                for run in runs(chunk.clone(), PAGES, takes) {
                    copied.taken += run.end - run.start;
                    other.read(there, run.clone(), &mut buffer[place(run.start - start)..])?;
                }
            }
            let content = |page: u64| {
                let page = &buffer[place(page - start)..place(page + 1 - start)];
                page.iter().any(|byte| *byte != 0)
            };
            for run in runs(chunk.clone(), PAGES, content) {
                let piece = &buffer[place(run.start - start)..place(run.end - start)];
                file.error_of(file.file.write_all_at(piece, at + bytes(run.start)))?;
                copied.stored += run.end - run.start;
                run.for_each(|page| bitmap::set(&mut copied.present, page, true));
            }
            start = chunk.end;
        }
        Ok(copied)
    }
}

struct Copied {
    /// The pages that are not zero.
    present: Vec<u8>,
    /// How many these are.
    stored: u64,
    /// How many pages are the other part's.
    taken: u64,
}
