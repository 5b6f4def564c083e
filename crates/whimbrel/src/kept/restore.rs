//! Sending a kept VM to whoever waits for it.

use std::sync::Arc;
use std::time::Duration;

use whimbrel_ram::{BlockIndex, GuestRam, PageSize, TARGET_PAGE, TargetPage};
use whimbrel_wire::encode_end_of_section;
use whimbrel_wire::header::capability;

use super::by_postcopy::{self, ByPostcopy};
use super::on_channels::{self, Multifd};
use super::supply::Supply;
use super::{Access, KeptVm, Progress, Stop, report};
use crate::address::Address;
use crate::channel::tls::TlsCredentials;
use crate::channel::{Channel, Route};
use crate::error::Error;
use crate::report::{Report, add, get, set};
use crate::settings::Parameters;
use crate::source::handover;
use crate::source::multifd::{Channels, Dialect};
use crate::source::postcopy::Failed;
use crate::source::setup::{Announcement, RAM_SECTION, Stream};
use crate::status::{MigrationInfo, MigrationStatus};
use crate::worker::{Cancel, Links};

/// The most bytes of one system call's pages.
const BATCH_MAX: usize = 2 << 20;

/// A kept VM on its way out.
#[derive(Debug)]
pub struct Restoring {
    pub(super) progress: Progress,
    pub(super) cancel: Cancel,
    pub(super) links: Links,
    pub(super) access: Access,
    pub(super) silence_limit: u64,
    multifd: Option<Multifd>,
    tls: Option<(TlsCredentials, Option<String>)>,
}

impl KeptVm {
    /// Prepares sending it.
    pub fn restoring(&self) -> Result<Restoring, Error> {
        let cancel = Cancel::new().map_err(Error::system("making an eventfd"))?;
        let links = Links::new().map_err(Error::system("making an eventfd"))?;
        let (progress, access) = (Progress(Arc::new(report())), Access::default());
        let silence_limit = Parameters::default().silence_limit;
        Ok(Restoring { progress, cancel, links, access, silence_limit, multifd: None, tls: None })
    }
}

impl Restoring {
    /// The file is read like this; by postcopy always through the page cache.
    #[must_use]
    pub fn reading_by(self, access: Access) -> Restoring {
        Restoring { access, ..self }
    }

    /// A destination that is silent for so many ms has gone (`silence-limit`); 0 is to wait for ever.
    #[must_use]
    pub fn waiting_no_longer_than(self, silence_limit: u64) -> Restoring {
        Restoring { silence_limit, ..self }
    }

    /// Sends the pages on several channels, in precopy.
    #[must_use]
    pub fn with_multifd(self, multifd: Option<Multifd>) -> Restoring {
        Restoring { multifd, ..self }
    }

    /// Sends everything over TLS. The destination's certificate has to be for `hostname`, or else for
    /// the host in the address.
    #[must_use]
    pub fn with_tls(self, credentials: TlsCredentials, hostname: Option<String>) -> Restoring {
        Restoring { tls: Some((credentials, hostname)), ..self }
    }

    pub(super) fn route(&self, address: &Address) -> Result<Route, Error> {
        let tls = match &self.tls {
            Some((credentials, hostname)) => {
                Some(credentials.client(address, hostname.as_deref())?)
            }
            None => None,
        };
        let silence = (self.silence_limit > 0).then(|| Duration::from_millis(self.silence_limit));
        Ok(Route { address: address.clone(), tls, silence })
    }

    /// What ends it from another thread.
    pub fn stopper(&self) -> Stop {
        Stop { cancel: self.cancel.clone(), links: self.links.clone() }
    }

    /// The report, to be read while it is sent.
    pub fn progress(&self) -> Progress {
        self.progress.clone()
    }

    /// Sends `vm` to `address` by precopy. The file is only read: what was kept stays kept, also
    /// when the destination has taken it.
    pub fn send(self, vm: &KeptVm, address: &Address) -> Result<MigrationInfo, Error> {
        self.ended(send(vm, address, &self), MigrationStatus::Failed)
    }

    /// Sends `vm` to `address` by postcopy: the guest runs there first, and its RAM follows, what
    /// it touches before everything else.
    pub fn send_by_postcopy(
        self,
        vm: &KeptVm,
        address: &Address,
        how: &ByPostcopy,
    ) -> Result<MigrationInfo, Error> {
        match by_postcopy::send(vm, address, how, &self) {
            Ok(()) => self.ended(Ok(()), MigrationStatus::Failed),
            Err(Failed::Before(error)) => self.ended(Err(error), MigrationStatus::Failed),
            Err(Failed::After(error)) => {
                // Whatever broke first when it was stopped is not the reason.
                let error = if self.cancel.is_set() { Error::Cancelled } else { error };
                let missing = get(&self.progress.0.counters.remaining);
                let error = Error::Refused(format!(
                    "{error}; the guest had been handed over to {address}, and {missing} bytes of \
                     its RAM had not been sent: end it there and restore it anew, for what was \
                     kept is as it was"
                ));
                self.ended(Err(error), MigrationStatus::PostcopyPaused)
            }
        }
    }

    fn ended(
        &self,
        outcome: Result<(), Error>,
        failed: MigrationStatus,
    ) -> Result<MigrationInfo, Error> {
        let report = &self.progress.0;
        match outcome {
            Ok(()) => {
                report.set_status(MigrationStatus::Completed);
                Ok(report.info())
            }
            Err(error) => {
                report.set_error(error.to_string());
                report.set_status(failed);
                Err(error)
            }
        }
    }
}

/// What the stream says of a kept VM before its first page.
pub(super) fn announce(
    vm: &KeptVm,
    ram: &GuestRam,
    channel: Channel,
    (postcopy, multifd): (bool, Option<Dialect>),
    units: &dyn Fn(BlockIndex) -> PageSize,
    report: &Report,
) -> Result<Stream, Error> {
    let return_path = channel.is_two_way();
    let mut configuration = vm.configuration.clone();
    configuration.capabilities.retain(|name| *name != capability::MAPPED_RAM);
    set(&report.counters.total, vm.ram.total_bytes());
    let announcement =
        Announcement { configuration: &configuration, ram, units, return_path, postcopy, multifd };
    let early = |words: &mut Vec<u8>| vm.early.iter().for_each(|section| section.encode(words));
    let stream = announcement.send(channel, early)?;
    report.setup_is_done();
    report.set_status(MigrationStatus::Active);
    Ok(stream)
}

fn send(vm: &KeptVm, address: &Address, restoring: &Restoring) -> Result<(), Error> {
    let report = &restoring.progress.0;
    let route = restoring.route(address)?;
    let mut channel = route.connect("main", &restoring.cancel, &restoring.links)?;
    let mut channels = match &restoring.multifd {
        Some(multifd) => Some(on_channels::connect(vm, &route, multifd, restoring)?),
        None => None,
    };
    if let Some(channels) = &channels {
        channel.heed(channels.stop().clone());
    }
    let dialect = channels.as_ref().map(Channels::dialect);
    let looked_at = restoring.multifd.as_ref().is_some_and(Multifd::looks_at_pages);
    let supply = Supply::start(vm, restoring.access, looked_at, &restoring.cancel)?;
    let mut stream =
        announce(vm, supply.ram(), channel, (false, dialect), &|_| TARGET_PAGE, report)?;
    let sent = match &mut channels {
        Some(channels) => {
            on_channels::wait_for_answer(address, channels, &mut stream)?;
            on_channels::send_pages(vm, &supply, channels, &mut stream, restoring)
        }
        None => send_pages(vm, &supply, &mut stream, restoring),
    };
    sent.map_err(|error| supply.explain(error))?;
    drop(supply);
    report.set_status(MigrationStatus::Device);
    for section in &vm.devices.sections {
        section.encode(stream.out.words());
    }
    handover::confirm_loaded(&mut stream)?;
    let empty = b"{}".to_vec();
    let result = handover::commit(&mut stream, vm.devices.vmdesc.as_ref().unwrap_or(&empty));
    set(&report.counters.transferred, stream.out.bytes());
    result?;
    if let Some(channels) = channels {
        // The destination has everything, and has said so where it can.
        let _ = channels.finish();
    }
    stream.out.into_channel().finish()
}

fn send_pages(
    vm: &KeptVm,
    supply: &Supply,
    stream: &mut Stream,
    restoring: &Restoring,
) -> Result<(), Error> {
    let counters = &restoring.progress.0.counters;
    RAM_SECTION.encode_end(stream.out.words());
    for (index, block) in supply.ram().blocks() {
        // What has been gathered since the last call to the kernel.
        let mut gathered = 0;
        for page in (0..block.target_pages()).map(TargetPage) {
            match vm.is_present(index, page) {
                true => stream.out.push_page(index, page),
                false => stream.out.push_zero(index, page),
            }
            add(if vm.is_present(index, page) { &counters.normal } else { &counters.duplicate }, 1);
            let block_ends = page.0 + 1 == block.target_pages();
            if stream.out.is_full() || stream.out.gathered() >= BATCH_MAX || block_ends {
                let pages = gathered..page.0 + 1;
                gathered = pages.end;
                supply.have(index, pages.clone())?;
                stream.flush()?;
                supply.sent(index, pages);
                stream.check_answers()?;
                set(&counters.transferred, stream.out.bytes());
                set(&counters.remaining, block.len() - page.offset());
            }
        }
    }
    set(&counters.remaining, 0);
    encode_end_of_section(stream.out.words());
    RAM_SECTION.encode_footer(stream.out.words());
    stream.flush()
}
