//! The beginning of a stream: header, configuration, return path, RAM's block list.

use std::sync::Arc;

use whimbrel_ram::{BlockIndex, GuestRam, PageSize, TARGET_PAGE};
use whimbrel_wire::{
    BlockInfo, BlockList, Command, Configuration, FileHeader, Name, PageSizes, RAM_SECTION as RAM,
    RAM_VERSION, SectionHeader, SectionId, encode_end_of_section,
};

use super::Job;
use super::answers::Answers;
use super::multifd::Dialect;
use super::out::Out;
use crate::channel::Channel;
use crate::error::Error;
use crate::hello::Features;
use crate::report::set;
use crate::settings::Capability;

/// The number of the `ram` section in our streams and files: above any that a QEMU gives its
/// devices, whose sections are replayed as they came.
pub(crate) const RAM_SECTION: SectionId = SectionId(0x7fff_ffff);

/// The first PING: its answer shows that the destination reads the main channel.
const PING_SETUP: u32 = 1;

/// PINGs at the beginning of a stream with a return path: the first, and the question who is there.
pub(crate) const PINGS_AT_SETUP: u64 = 2;

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

    /// What was agreed on with a destination that is a whimbrel, as far as it has answered.
    pub(crate) fn agreed(&self) -> Features {
        self.answers.as_ref().map(Answers::agreed).unwrap_or_default()
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
pub(crate) fn begin(
    job: &Job,
    channel: Channel,
    multifd: Option<Dialect>,
) -> Result<Stream, Error> {
    let vm = job.guest.vm();
    let mut configuration = Configuration::new(name(&vm.machine())?);
    if job.has(Capability::ValidateUuid) {
        configuration.uuid = vm.uuid();
    }
    set(&job.report.counters.total, vm.ram().total_bytes());
    let ram = vm.ram();
    let announcement = Announcement {
        configuration: &configuration,
        ram,
        units: &|block| ram.block(block).host_page_size(),
        return_path: job.wants_answers(),
        postcopy: job.has(Capability::PostcopyRam),
        multifd,
    };
    let colo = job.has(Capability::XColo);
    let early = |words: &mut Vec<u8>| {
        if colo {
            Command::EnableColo.encode(words);
        }
    };
    let mut stream = announcement.send(channel, early)?;
    if colo {
        stream.answers = stream.answers.map(Answers::with_colo);
    }
    Ok(stream)
}

/// What a stream says of itself before the first page.
pub(crate) struct Announcement<'a> {
    pub(crate) configuration: &'a Configuration,
    pub(crate) ram: &'a GuestRam,
    /// The page size of each block's backing.
    pub(crate) units: &'a dyn Fn(BlockIndex) -> PageSize,
    pub(crate) return_path: bool,
    /// Whether a postcopy may follow. Needs the return path.
    pub(crate) postcopy: bool,
    /// With multifd channels, which are connected.
    pub(crate) multifd: Option<Dialect>,
}

impl Announcement<'_> {
    /// Sends everything up to the first page. `early` appends what else has to come before RAM.
    pub(crate) fn send(
        &self,
        channel: Channel,
        early: impl FnOnce(&mut Vec<u8>),
    ) -> Result<Stream, Error> {
        let blocks = Arc::new(self.block_list()?);
        let mut out = Out::new(channel, self.ram.clone(), blocks.clone());
        let words = out.words();
        FileHeader.encode(words);
        self.configuration.encode(words);
        if self.return_path {
            Command::OpenReturnPath.encode(words);
            Command::Ping(PING_SETUP).encode(words);
            Command::Ping(Features::ALL.question()).encode(words);
        }
        if self.postcopy {
            Command::PostcopyAdvise(Some(self.page_sizes())).encode(words);
        }
        early(words);
        ram_section()?.encode_start(words);
        blocks.encode(words);
        if let Some(dialect) = self.multifd {
            dialect.encode_mark(words);
        }
        encode_end_of_section(words);
        RAM_SECTION.encode_footer(words);
        let mut stream = Stream { out, answers: self.return_path.then(Answers::new) };
        stream.flush()?;
        Ok(stream)
    }

    fn page_sizes(&self) -> PageSizes {
        let sizes = self.ram.blocks().map(|(index, _)| (self.units)(index).bytes() as u64);
        let host_summary = sizes.fold(0, std::ops::BitOr::bitor);
        PageSizes { host_summary, target: TARGET_PAGE.bytes() as u64 }
    }

    fn block_list(&self) -> Result<BlockList, Error> {
        let mut list = block_infos(self.ram)?;
        for ((index, _), info) in self.ram.blocks().zip(&mut list) {
            let unit = (self.units)(index);
            // As QEMU does: only where a postcopy may follow, and only what is not ordinary.
            info.page_size = (self.postcopy && unit != TARGET_PAGE).then_some(unit.bytes() as u64);
        }
        made_into_list(list)
    }
}

/// The header of the `ram` section.
pub(crate) fn ram_section() -> Result<SectionHeader, Error> {
    Ok(SectionHeader { id: RAM_SECTION, name: name(RAM)?, instance_id: 0, version_id: RAM_VERSION })
}

/// The blocks as they are announced where no postcopy follows.
pub(crate) fn block_list(ram: &GuestRam) -> Result<BlockList, Error> {
    made_into_list(block_infos(ram)?)
}

fn block_infos(ram: &GuestRam) -> Result<Vec<BlockInfo>, Error> {
    ram.blocks().map(|(_, block)| Ok(BlockInfo::new(name(block.name())?, block.len()))).collect()
}

fn made_into_list(infos: Vec<BlockInfo>) -> Result<BlockList, Error> {
    BlockList::new(infos)
        .map_err(|kind| Error::Refused(format!("these RAM blocks cannot be announced: {kind}")))
}

/// A name as it goes on the wire.
pub(crate) fn name(text: &str) -> Result<Name, Error> {
    Name::new(text).map_err(|_| {
        Error::Refused(format!("'{text}' is no name for the wire: names have 1 to 255 bytes"))
    })
}
