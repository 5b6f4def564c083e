//! The beginning of a stream: header, configuration, return path, RAM's block list.

use std::sync::Arc;

use whimbrel_ram::GuestRam;
use whimbrel_wire::{
    BlockInfo, BlockList, Command, Configuration, FileHeader, Name, RAM_SECTION as RAM,
    RAM_VERSION, SectionHeader, SectionId, encode_end_of_section,
};

use super::Job;
use super::answers::Answers;
use super::out::Out;
use crate::channel::Channel;
use crate::error::Error;
use crate::report::set;
use crate::settings::Capability;

/// The number of the `ram` section in our streams and files: above any that a QEMU gives its
/// devices, whose sections are replayed as they came.
pub(crate) const RAM_SECTION: SectionId = SectionId(0x7fff_ffff);

/// The first PING: its answer shows that the destination reads the main channel.
const PING_SETUP: u32 = 1;

/// A stream under way, both directions.
#[derive(Debug)]
pub(crate) struct Stream {
    pub(crate) out: Out,
    /// What the destination says, with capability `return-path`.
    pub(crate) answers: Option<Answers>,
}

impl Stream {
    /// Looks at what the destination has said, if anything.
    pub(crate) fn check_answers(&mut self) -> Result<(), Error> {
        match &mut self.answers {
            Some(answers) => answers.check(self.out.channel()),
            None => Ok(()),
        }
    }

    /// Sends what was gathered; where that fails, what the destination said of it counts more.
    pub(crate) fn flush(&mut self) -> Result<(), Error> {
        self.out.flush().map_err(|error| self.explain(error))
    }

    /// A broken connection often has its reason waiting on the return path.
    pub(crate) fn explain(&mut self, error: Error) -> Error {
        match (&error, self.check_answers()) {
            (Error::Channel { .. }, Err(reason @ Error::PeerFailed)) => reason,
            _ => error,
        }
    }
}

/// Announces a running VM's migration.
pub(crate) fn begin(job: &Job, channel: Channel) -> Result<Stream, Error> {
    let vm = job.guest.vm();
    let mut configuration = Configuration::new(name(&vm.machine())?);
    if job.has(Capability::ValidateUuid) {
        configuration.uuid = vm.uuid();
    }
    set(&job.report.counters.total, vm.ram().total_bytes());
    let return_path = job.has(Capability::ReturnPath);
    announce(&configuration, vm.ram(), channel, return_path, |_| {})
}

/// Announces a migration: everything up to the first page. `early` appends the sections that have
/// to come before RAM.
pub(crate) fn announce(
    configuration: &Configuration,
    ram: &GuestRam,
    channel: Channel,
    return_path: bool,
    early: impl FnOnce(&mut Vec<u8>),
) -> Result<Stream, Error> {
    let blocks = Arc::new(block_list(ram)?);
    let mut out = Out::new(channel, ram.clone(), blocks.clone());
    let words = out.words();
    FileHeader.encode(words);
    configuration.encode(words);
    if return_path {
        Command::OpenReturnPath.encode(words);
        Command::Ping(PING_SETUP).encode(words);
    }
    early(words);
    ram_section()?.encode_start(words);
    blocks.encode(words);
    encode_end_of_section(words);
    RAM_SECTION.encode_footer(words);
    let mut stream = Stream { out, answers: return_path.then(Answers::new) };
    stream.flush()?;
    Ok(stream)
}

/// The header of the `ram` section.
pub(crate) fn ram_section() -> Result<SectionHeader, Error> {
    Ok(SectionHeader { id: RAM_SECTION, name: name(RAM)?, instance_id: 0, version_id: RAM_VERSION })
}

/// The blocks as they are announced.
pub(crate) fn block_list(ram: &GuestRam) -> Result<BlockList, Error> {
    let infos: Result<Vec<BlockInfo>, Error> = ram
        .blocks()
        .map(|(_, block)| Ok(BlockInfo::new(name(block.name())?, block.len())))
        .collect();
    BlockList::new(infos?)
        .map_err(|kind| Error::Refused(format!("these RAM blocks cannot be announced: {kind}")))
}

/// A name as it goes on the wire.
pub(crate) fn name(text: &str) -> Result<Name, Error> {
    Name::new(text).map_err(|_| {
        Error::Refused(format!("'{text}' is no name for the wire: names have 1 to 255 bytes"))
    })
}
