//! A kept VM's pages on multifd channels.

use std::ops::Range;
use std::time::Duration;

use whimbrel_ram::{BlockIndex, PageMap, TARGET_PAGE};
use whimbrel_wire::encode_end_of_section;

use super::KeptVm;
use super::machine::dialect;
use super::restore::Restoring;
use super::supply::Supply;
use crate::address::Address;
use crate::channel::Route;
use crate::error::Error;
use crate::report::set;
use crate::settings::{MultifdCompression, Parameters, ZeroPageDetection};
use crate::source::multifd::{self, Channels, Crew, Opening, Terms};
use crate::source::setup::{PINGS_AT_SETUP, RAM_SECTION, Stream};

/// How often it is looked whether the destination has something to say.
const LOOK: Duration = Duration::from_millis(50);

/// How long a destination may take for its first answer, which costs it nothing.
pub(super) const ANSWER_MAX: Duration = Duration::from_secs(30);

/// How a kept VM goes on several channels. The destination has capability `multifd` on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Multifd {
    /// The destination's `multifd-channels`, 1 to 255.
    pub channels: u8,
    /// A stock QEMU insists on its own `multifd-compression`, and takes `auto` for `zstd`.
    pub compression: MultifdCompression,
    /// The method's level; `None` for its usual one.
    pub level: Option<u8>,
    /// How pages of zeros are told of; `None` for what the machine type's receivers understand.
    pub zero_page_detection: Option<ZeroPageDetection>,
    /// The UUID that the destination expects; `None` for that of the kept VM, if it is known.
    pub uuid: Option<[u8; 16]>,
}

impl Multifd {
    /// So many channels, without compression.
    pub fn new(channels: u8) -> Multifd {
        Multifd {
            channels,
            compression: MultifdCompression::None,
            level: None,
            zero_page_detection: None,
            uuid: None,
        }
    }

    /// Whether more is done with the pages than have the kernel send them.
    pub(super) fn looks_at_pages(&self) -> bool {
        self.compression != MultifdCompression::None
    }

    fn parameters(&self) -> Result<Parameters, Error> {
        let usual = Parameters::default();
        let parameters = Parameters {
            multifd_channels: self.channels,
            multifd_compression: self.compression,
            multifd_zlib_level: self.level.unwrap_or(usual.multifd_zlib_level),
            multifd_zstd_level: self.level.unwrap_or(usual.multifd_zstd_level),
            ..usual
        };
        // A level counts only for the method that has it.
        let judged = match self.compression {
            MultifdCompression::Zlib => Parameters { multifd_zstd_level: 1, ..parameters.clone() },
            _ => Parameters { multifd_zlib_level: 1, ..parameters.clone() },
        };
        judged.check()?;
        Ok(parameters)
    }
}

pub(super) fn connect(
    vm: &KeptVm,
    route: &Route,
    multifd: &Multifd,
    restoring: &Restoring,
) -> Result<Channels, Error> {
    let opening = Opening {
        uuid: multifd.uuid.or(vm.configuration.uuid).unwrap_or_default(),
        dialect: dialect(&vm.machine(), multifd.zero_page_detection),
        zero_copy: false,
        channels: multifd.channels,
    };
    Channels::connect(route, &restoring.cancel, &restoring.links, &opening, &multifd.parameters()?)
}

/// A destination answers when all channels have come, and never when they are not as many as it
/// waits for; a QEMU of version 7 then says so nowhere.
pub(super) fn wait_for_answer(
    address: &Address,
    channels: &Channels,
    stream: &mut Stream,
) -> Result<(), Error> {
    let Some(answers) = &mut stream.answers else { return Ok(()) };
    match answers.pongs_within(stream.out.channel(), PINGS_AT_SETUP, ANSWER_MAX)? {
        true => Ok(()),
        false => Err(Error::Refused(format!(
            "{address}: the destination has not answered within {} s: it may wait for another \
             number of channels than {}: set capability multifd and the same multifd-channels there",
            ANSWER_MAX.as_secs(),
            channels.count()
        ))),
    }
}

/// Sends all pages, as the `ram` section's END.
pub(super) fn send_pages(
    vm: &KeptVm,
    supply: &Supply,
    channels: &mut Channels,
    stream: &mut Stream,
    restoring: &Restoring,
) -> Result<(), Error> {
    let report = &*restoring.progress.0;
    let map = PageMap::new(supply.ram());
    map.fill();
    let terms = Terms {
        ram: supply.ram(),
        report,
        log: None,
        content: Some(vm.content()),
        supply: Some(supply),
        beside: None,
    };
    RAM_SECTION.encode_end(stream.out.words());
    let lead = |crew: &Crew<'_>| {
        crew.set_agreed(stream.agreed());
        crew.begin();
        while !crew.wait(LOOK)? {
            stream.check_answers()?;
            set(&report.counters.transferred, stream.out.bytes());
            set(&report.counters.remaining, map.pending() * TARGET_PAGE.bytes() as u64);
        }
        crew.mark(&mut stream.out);
        encode_end_of_section(stream.out.words());
        RAM_SECTION.encode_footer(stream.out.words());
        stream.flush()
    };
    let sent = channels.send(&map, terms, lead);
    set(&report.counters.remaining, 0);
    sent.map_err(|error| {
        stream.out.channel().heed(restoring.cancel.clone());
        stream.explain(error)
    })
}

impl multifd::Supply for Supply {
    fn have(&self, block: BlockIndex, pages: Range<u64>) -> Result<(), Error> {
        Supply::have(self, block, pages)
    }

    fn sent(&self, block: BlockIndex, pages: Range<u64>) {
        Supply::sent(self, block, pages);
    }
}
