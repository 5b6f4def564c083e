//! Sending a kept VM by postcopy: its guest runs at the destination at once, on RAM that is still
//! in the file.

use whimbrel_ram::{BlockIndex, PageMap, PageSize, TARGET_PAGE};

use super::on_channels::ANSWER_MAX;
use super::restore::{Restoring, announce};
use super::supply::Supply;
use super::{KeptVm, machine};
use crate::address::Address;
use crate::error::Error;
use crate::rescue::LOST_PAGES;
use crate::settings::{AutoRecover, Current, Parameters};
use crate::source::postcopy::{self, Failed, HandOver, Postcopy};
use crate::source::recover::Ways;
use crate::source::setup::PINGS_AT_SETUP;
use crate::status::MigrationStatus;

/// How a kept VM goes by postcopy.
#[derive(Clone, Debug)]
pub struct ByPostcopy {
    /// The destination has capability `postcopy-preempt` on: what the guest waits for goes on a
    /// connection of its own.
    pub preempt: bool,
    /// Page sizes of the destination's memory other than 4 KiB, by block. It insists on being told
    /// the same sizes as it has, and on whole pages of them.
    pub page_sizes: Vec<(String, PageSize)>,
    /// Bytes a second that nobody asked for (`max-postcopy-bandwidth`); 0 is without limit.
    pub max_bandwidth: u64,
    /// Whether, and for how long, the destination is looked for when the link breaks
    /// (`auto-recover`, `recover-time-limit` in seconds). A QEMU has to be told `migrate-recover`
    /// meanwhile, with the same address.
    pub auto_recover: (AutoRecover, u64),
    /// Another address of the destination (`recover-uri`).
    pub other_address: Option<Address>,
}

impl Default for ByPostcopy {
    fn default() -> ByPostcopy {
        let usual = Parameters::default();
        ByPostcopy {
            preempt: false,
            page_sizes: Vec::new(),
            max_bandwidth: usual.max_postcopy_bandwidth,
            auto_recover: (usual.auto_recover, usual.recover_time_limit),
            other_address: None,
        }
    }
}

/// Nobody runs a VM that is in a file: there is no right to give up.
struct Kept<'a>(&'a Restoring);

impl HandOver for Kept<'_> {
    fn give_up(&mut self) {}

    fn take_back(&mut self) {}

    fn gone(&mut self) {
        self.0.progress.0.set_status(MigrationStatus::PostcopyActive);
    }

    fn stands(&mut self, status: MigrationStatus) {
        if status == MigrationStatus::PostcopyActive {
            self.0.progress.0.forget_error();
        }
        self.0.progress.0.set_status(status);
    }

    fn paused(&mut self, reason: &Error) {
        self.0.progress.0.set_error(reason.text_of_pause());
        self.0.progress.0.set_status(MigrationStatus::PostcopyPaused);
    }
}

pub(super) fn send(
    vm: &KeptVm,
    address: &Address,
    how: &ByPostcopy,
    restoring: &Restoring,
) -> Result<(), Failed> {
    let report = &*restoring.progress.0;
    let mut sections = vm.devices.sections.iter();
    if sections.any(|section| section.header.name == *LOST_PAGES) {
        return Err(Failed::Before(Error::Refused(
            "pages of this VM's RAM are lost, and can be given up at its destination by precopy only"
                .into(),
        )));
    }
    let ends_with_mark = machine::is_up_to((7, 2), &vm.machine());
    let route = restoring.route(address).map_err(Failed::Before)?;
    let other = match &how.other_address {
        Some(address) => Some(restoring.route(address).map_err(Failed::Before)?),
        None => None,
    };
    let prepare = || {
        let units = units(vm, &how.page_sizes)?;
        let channel = route.connect("main", &restoring.cancel, &restoring.links)?;
        if !channel.is_two_way() {
            return Err(Error::Refused(format!(
                "{address}: postcopy needs a way back, which this transport has not: \
                 use tcp: or unix:"
            )));
        }
        let unit = |block: BlockIndex| units[block.index()];
        let mut stream = announce(vm, &vm.ram, channel, (true, None), &unit, report)?;
        let open = || postcopy::open_urgent(&route, &restoring.cancel, &restoring.links);
        // A QEMU up to 7.2 waits for this connection before it reads anything.
        let early = if how.preempt && ends_with_mark { Some(open()?) } else { None };
        let answers = stream.answers.as_mut().expect("the channel is two-way");
        if !answers.pongs_within(stream.out.channel(), PINGS_AT_SETUP, ANSWER_MAX)? {
            return Err(Error::Refused(format!(
                "{address}: the destination has not answered within {} s: a QEMU of version 7 with \
                 capability postcopy-preempt on waits for a second connection before it does: set \
                 the same on both sides",
                ANSWER_MAX.as_secs()
            )));
        }
        let agreed = answers.agreed();
        let urgent = match early {
            None if how.preempt => Some(open()?),
            early => early,
        };
        let map = PageMap::with_units(&vm.ram, unit);
        map.fill();
        Ok((stream, urgent, postcopy::map_for(agreed, &vm.ram, map)))
    };
    let reading = Supply::of_everything(vm, restoring.access, &restoring.cancel);
    // Ahead of who sends, and of what is asked for; dropped when all has been sent.
    let _reading = reading.map_err(Failed::Before)?;
    let (stream, urgent, map) = prepare().map_err(Failed::Before)?;
    report.guest_stops();
    report.set_status(MigrationStatus::Device);
    let (auto_recover, recover_time_limit) = how.auto_recover;
    let parameters = Current::of(Parameters {
        max_postcopy_bandwidth: how.max_bandwidth,
        auto_recover,
        recover_time_limit,
        silence_limit: restoring.silence_limit,
        ..Parameters::default()
    });
    let postcopy = Postcopy {
        ram: &vm.ram,
        report,
        parameters: &parameters,
        cancel: &restoring.cancel,
        links: &restoring.links,
        content: Some(vm.content()),
        hot: None,
        urgent_ends_with_mark: ends_with_mark,
        channels: None,
        route: route.clone(),
        ways: Ways { told: None, other: &|| other.clone() },
    };
    postcopy.run(&map, stream, urgent, vm.devices.sections.clone(), &mut Kept(restoring))
}

/// The page size of each block at the destination.
fn units(vm: &KeptVm, sizes: &[(String, PageSize)]) -> Result<Vec<PageSize>, Error> {
    let mut units = vec![TARGET_PAGE; vm.ram.block_count()];
    for (name, size) in sizes {
        let Some((index, block)) = vm.ram.find(name) else {
            let names: Vec<&str> = vm.ram.blocks().map(|(_, block)| block.name()).collect();
            let names = names.join(", ");
            return Err(Error::Refused(format!(
                "page size of RAM block {name}: the kept VM has no such block, only {names}"
            )));
        };
        if !block.len().is_multiple_of(size.bytes() as u64) {
            let len = block.len();
            return Err(Error::Refused(format!(
                "page size of RAM block {name}: its {len} bytes are no multiple of {size}"
            )));
        }
        units[index.index()] = *size;
    }
    Ok(units)
}
