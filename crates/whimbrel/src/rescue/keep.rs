//! Keeping what one side has.

use std::path::Path;

use whimbrel_ram::{AbsentRam, GuestRam, TARGET_PAGE};
use whimbrel_wire::{Configuration, header::capability};

use super::Side;
use super::answering::answering;
use super::missing::Missing;
use super::part::MAGIC;
use super::record::Record;
use crate::error::Error;
use crate::kept::Access;
use crate::kept::disk::runs;
use crate::kept::keeper::encode_own;
use crate::kept::writing::Writing;
use crate::own_devices;
use crate::source::setup::name;
use crate::vm::Vm;
use crate::worker::Cancel;

/// What of a VM is to be kept. Its guest stands still.
pub(crate) struct Origin<'a> {
    pub(crate) vm: &'a dyn Vm,
    /// Whether its guest is to run when it is restored.
    pub(crate) runs: bool,
    /// The migration's identifier, if it has one.
    pub(crate) migration: Option<[u8; 16]>,
    /// What has come, at a destination; a source has all of its RAM.
    pub(crate) absent: Option<&'a AbsentRam>,
}

/// What has been kept.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KeptPart {
    /// Which side's it is.
    pub side: Side,
    /// The machine type's full name.
    pub machine: String,
    /// Bytes of RAM, all blocks together, with what is missing.
    pub ram_bytes: u64,
    /// Bytes of RAM that are there and not zero, and so are in the file.
    pub stored_bytes: u64,
    /// Pages of 4 KiB that are missing.
    pub missing_pages: u64,
    /// Device sections.
    pub devices: usize,
}

/// Writes a part to `path`, which appears there when all of it is on the disk.
pub(crate) fn keep(origin: &Origin<'_>, path: &Path) -> Result<KeptPart, Error> {
    let Origin { vm, runs, migration, absent } = *origin;
    let ram = vm.ram();
    let side = if absent.is_some() { Side::Destination } else { Side::Source };
    let mut configuration = Configuration::new(name(&vm.machine())?);
    configuration.uuid = vm.uuid();
    configuration.capabilities.push(name(capability::MAPPED_RAM)?);
    // As of now: what comes meanwhile is missing in the file.
    let missing = match absent {
        Some(absent) => Missing::of(absent.received(), ram),
        None => Missing::nothing(ram.blocks().map(|(_, block)| block.len())),
    };
    let write = || {
        let sections = own_devices::sections(vm, runs)?;
        let mut tail = Vec::new();
        encode_own(&sections, &mut tail);
        let cancel = Cancel::new().map_err(Error::system("making an eventfd"))?;
        let writing = Writing::begin(path, &configuration, ram, Access::default(), &cancel)?;
        let stream = (&configuration, &[][..], &tail[..]);
        let stored = write_part(writing, ram, stream, side, migration, &missing)?;
        Ok((stored, sections.len()))
    };
    let (stored, devices) = match absent {
        Some(absent) => answering(absent, write)?,
        None => write()?,
    };
    Ok(KeptPart {
        side,
        machine: vm.machine(),
        ram_bytes: ram.total_bytes(),
        stored_bytes: stored * TARGET_PAGE.bytes() as u64,
        missing_pages: missing.count(),
        devices,
    })
}

/// Writes the pages of `ram` that are not `missing`, which nobody has told `writing` of yet, and the
/// stream around them: configuration, encoded sections before RAM, and those after it with the end
/// of it. Gives how many pages are not zero.
pub(crate) fn write_part(
    mut writing: Writing,
    ram: &GuestRam,
    (configuration, early, tail): (&Configuration, &[u8], &[u8]),
    side: Side,
    migration: Option<[u8; 16]>,
    missing: &Missing,
) -> Result<u64, Error> {
    let changes = writing.changes();
    for (index, block) in ram.blocks() {
        let has = |page| !missing.has(index.index(), page);
        runs(0..block.target_pages(), u64::MAX, has).for_each(|run| changes.placed(index, run));
    }
    // Nothing but the disk may keep it from being kept.
    let stored = writing.finish(configuration, early, tail, true)?;
    let blocks = ram.blocks().map(|(_, block)| (block.name().into(), block.len())).collect();
    let record = Record { side, migration, blocks, missing: missing.clone() };
    writing.mark_as_part(MAGIC, |at| record.encode(at))?;
    writing.keep()?;
    Ok(stored)
}
