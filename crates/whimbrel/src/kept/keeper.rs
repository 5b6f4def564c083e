//! Taking a migration in to keep it.

use std::path::{Path, PathBuf};

use whimbrel_ram::{GuestRam, RamBlock, TARGET_PAGE};
use whimbrel_wire::{
    BlockList, Configuration, DeviceSection, encode_eof, encode_vm_description, header::capability,
    vmdesc::describe,
};

use super::touch::{self, Touch};
use super::writers::Changes;
use super::writing::Writing;
use super::{Access, KeptSummary};
use crate::destination::incoming::{Devices, Host};
use crate::error::Error;
use crate::rescue::{Missing, Side, write_part};
use crate::source::setup::name;
use crate::worker::{Cancel, Worker};

/// A machine of any kind that is kept, not run: RAM is made as the source announces it.
#[derive(Debug)]
pub(super) struct Keeper {
    path: PathBuf,
    configuration: Option<Configuration>,
    ram: Option<GuestRam>,
    access: Access,
    cancel: Cancel,
    /// What becomes the file, under a name of its own until the source has let go.
    writing: Option<Writing>,
    /// All of it is on the disk.
    written: Option<KeptSummary>,
    /// Devices that came before RAM was complete.
    ahead: Option<Devices>,
    touch: Touch,
    toucher: Option<Worker>,
    /// The UUID that multifd channels told, if any.
    uuid: Option<[u8; 16]>,
}

impl Keeper {
    pub(super) fn new(path: &Path, touch: Touch, access: Access, cancel: &Cancel) -> Keeper {
        Keeper {
            path: path.into(),
            configuration: None,
            ram: None,
            access,
            cancel: cancel.clone(),
            writing: None,
            written: None,
            ahead: None,
            touch,
            toucher: None,
            uuid: None,
        }
    }

    /// The VM has this UUID, unless it is zero: kept, because multifd channels to its next host
    /// have to tell it again.
    pub(super) fn is_of(&mut self, uuid: [u8; 16]) {
        self.uuid = Some(uuid).filter(|uuid| *uuid != [0; 16]);
    }

    /// The guest comes first: its RAM is complete only when all of it has followed.
    pub(super) fn pause(&mut self) -> Result<(), Error> {
        self.writing.as_mut().map_or(Ok(()), Writing::pause)
    }

    /// RAM of a guest that came first is complete: everything goes to the disk.
    pub(super) fn complete(&mut self) -> Result<(), Error> {
        self.toucher = None;
        match self.ahead.take() {
            // The guest is nowhere else any more: nothing but the disk may keep it from being kept.
            Some(devices) => self.write(devices, true),
            None => Ok(()),
        }
    }

    /// The guest came first, and nothing more comes: keeps what is not `missing` as a part, beside the
    /// file that was asked for; gives its name.
    pub(super) fn keep_part(
        &mut self,
        missing: &Missing,
        migration: Option<[u8; 16]>,
    ) -> Result<PathBuf, Error> {
        self.toucher = None;
        self.writing = None;
        let configuration = self.kept_configuration()?;
        let (Some(ram), Some(devices)) = (&self.ram, self.ahead.take()) else {
            return Err(Error::Refused("its devices have not come".into()));
        };
        let mut name = self.path.as_os_str().to_owned();
        name.push(".part");
        let path = PathBuf::from(name);
        let writing = Writing::begin(&path, &configuration, ram, self.access, &self.cancel)?;
        let (early, tail, _) = encode(devices);
        let stream = (&configuration, &early[..], &tail[..]);
        write_part(writing, ram, stream, Side::Destination, migration, missing)?;
        Ok(path)
    }

    /// The source has given its guest away: the file gets its name.
    ///
    /// # Panics
    /// Before the stream was received as a whole.
    pub(super) fn keep(self) -> Result<KeptSummary, Error> {
        let (Some(writing), Some(summary)) = (self.writing, self.written) else {
            panic!("a stream that was received was loaded");
        };
        writing.keep()?;
        Ok(summary)
    }

    /// The configuration of what is in the file.
    fn kept_configuration(&self) -> Result<Configuration, Error> {
        configuration_of_file(self.configuration.as_ref())
    }

    fn write(&mut self, devices: Devices, last_copy: bool) -> Result<(), Error> {
        let configuration = self.kept_configuration()?;
        let (Some(ram), Some(writing)) = (&self.ram, &mut self.writing) else {
            return Err(Error::Refused("main channel: the stream has no RAM".into()));
        };
        self.written = Some(write(writing, &configuration, ram, devices, last_copy)?);
        Ok(())
    }
}

/// Has everything written to the disk, and tells what that was.
pub(super) fn write(
    writing: &mut Writing,
    configuration: &Configuration,
    ram: &GuestRam,
    devices: Devices,
    last_copy: bool,
) -> Result<KeptSummary, Error> {
    let (early, tail, count) = encode(devices);
    let pages = writing.finish(configuration, &early, &tail, last_copy)?;
    Ok(KeptSummary {
        machine: configuration.machine.to_string(),
        ram_bytes: ram.total_bytes(),
        stored_bytes: pages * TARGET_PAGE.bytes() as u64,
        devices: count,
        faults: None,
    })
}

impl Host for Keeper {
    fn configure(&mut self, configuration: &Configuration) -> Result<(), Error> {
        self.configuration = Some(configuration_with_all_ram(configuration, self.uuid)?);
        Ok(())
    }

    fn ram(&mut self, announced: &BlockList) -> Result<GuestRam, Error> {
        let ram = ram_as_announced(announced, 1)?;
        let configuration = self.kept_configuration()?;
        let writing = Writing::begin(&self.path, &configuration, &ram, self.access, &self.cancel)?;
        self.writing = Some(writing);
        self.ram = Some(ram.clone());
        Ok(ram)
    }

    fn ram_is_fresh(&self) -> bool {
        true // Made above.
    }

    fn changes(&self) -> Option<Changes> {
        self.writing.as_ref().map(Writing::changes)
    }

    fn takes_postcopy(&self) -> bool {
        true
    }

    fn takes_small_pieces(&self) -> bool {
        true
    }

    fn load_ahead(&mut self, devices: Devices) -> Result<(), Error> {
        // Nothing of it is run: it goes into the file when RAM is there.
        self.ahead = Some(devices);
        Ok(())
    }

    fn run(&mut self) -> Result<(), Error> {
        if let Some(ram) = &self.ram {
            self.toucher = touch::start(ram.clone(), self.touch)?;
        }
        Ok(())
    }

    fn vcpu_threads(&self) -> Vec<u32> {
        Vec::new()
    }

    fn load(&mut self, devices: Devices) -> Result<(), Error> {
        self.write(devices, false)
    }
}

/// What a source says of its machine, if all of its RAM comes; `uuid` is what multifd channels told.
pub(super) fn configuration_with_all_ram(
    configuration: &Configuration,
    uuid: Option<[u8; 16]>,
) -> Result<Configuration, Error> {
    if configuration.has(capability::IGNORE_SHARED) {
        return Err(Error::Refused(
            "main channel: the source leaves its shared RAM out (x-ignore-shared): \
             it cannot be kept without; switch the capability off"
                .into(),
        ));
    }
    let mut configuration = configuration.clone();
    configuration.uuid = configuration.uuid.or(uuid);
    Ok(configuration)
}

/// The configuration of what is in the file.
pub(super) fn configuration_of_file(
    configuration: Option<&Configuration>,
) -> Result<Configuration, Error> {
    let Some(configuration) = configuration else {
        return Err(Error::Refused("main channel: the stream names no machine type".into()));
    };
    let mut configuration = configuration.clone();
    if !configuration.has(capability::MAPPED_RAM) {
        configuration.capabilities.push(name(capability::MAPPED_RAM)?);
    }
    Ok(configuration)
}

/// RAM for the blocks announced, of which so many `copies` are to be held.
pub(super) fn ram_as_announced(announced: &BlockList, copies: u64) -> Result<GuestRam, Error> {
    check_memory(announced.total().saturating_mul(copies))?;
    let mut blocks = Vec::with_capacity(announced.len());
    for (_, info) in announced.iter() {
        let Some(block_name) = info.name.as_str() else {
            return Err(Error::Refused(format!(
                "main channel: RAM block {} is no text",
                info.name
            )));
        };
        blocks.push(RamBlock::anonymous(block_name, 0, info.used_length)?);
    }
    Ok(GuestRam::new(blocks))
}

/// Sections before RAM, sections after it with the end of the stream, and how many there are.
fn encode(devices: Devices) -> (Vec<u8>, Vec<u8>, usize) {
    let (mut before, mut tail) = (Vec::new(), Vec::new());
    match devices {
        Devices::Own(sections) => {
            encode_own(&sections, &mut tail);
            (before, tail, sections.len())
        }
        Devices::Qemu { early, mut state } => {
            early.iter().for_each(|section| section.encode(&mut before));
            // What was asked of this destination is nothing to ask of the next one.
            state.commands.clear();
            // A stock QEMU waits for a description, be it an empty one.
            state.vmdesc.get_or_insert_with(|| b"{}".to_vec());
            state.encode(&mut tail);
            (before, tail, early.len() + state.sections.len())
        }
    }
}

/// Sections of our own kind, with the end of the stream.
pub(crate) fn encode_own(sections: &[DeviceSection], tail: &mut Vec<u8>) {
    sections.iter().for_each(|section| section.encode(tail));
    encode_eof(tail);
    encode_vm_description(&describe(4096, sections), tail);
}

/// Refuses what cannot be held: the guest's RAM is in memory until it is on the disk.
pub(crate) fn check_memory(wanted: u64) -> Result<(), Error> {
    let text =
        std::fs::read_to_string("/proc/meminfo").map_err(Error::system("reading /proc/meminfo"))?;
    let available = text
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:"))
        .and_then(|rest| rest.trim().strip_suffix(" kB")?.parse::<u64>().ok())
        .map_or(u64::MAX, |kib| kib.saturating_mul(1024));
    if wanted > available {
        return Err(Error::Refused(format!(
            "too little memory: the guest has {} MiB of RAM and {} MiB are available here",
            wanted >> 20,
            available >> 20
        )));
    }
    Ok(())
}
