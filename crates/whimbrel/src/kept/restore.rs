//! Sending a kept VM to whoever waits for it.

use std::sync::Arc;

use whimbrel_ram::{TARGET_PAGE, TargetPage};
use whimbrel_wire::encode_end_of_section;
use whimbrel_wire::header::capability;

use super::{KeptVm, Progress, Stop, report};
use crate::address::Address;
use crate::channel;
use crate::error::Error;
use crate::report::{add, set};
use crate::source::handover;
use crate::source::setup::{Announcement, RAM_SECTION, Stream};
use crate::status::{MigrationInfo, MigrationStatus};
use crate::worker::{Cancel, Links};

/// The most bytes of one system call's pages.
const BATCH_MAX: usize = 2 << 20;

/// A kept VM on its way out.
#[derive(Debug)]
pub struct Restoring {
    progress: Progress,
    cancel: Cancel,
    links: Links,
}

impl KeptVm {
    /// Prepares sending it.
    pub fn restoring(&self) -> Result<Restoring, Error> {
        let cancel = Cancel::new().map_err(Error::system("making an eventfd"))?;
        let links = Links::new().map_err(Error::system("making an eventfd"))?;
        Ok(Restoring { progress: Progress(Arc::new(report())), cancel, links })
    }
}

impl Restoring {
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
        let report = &self.progress.0;
        match send(vm, address, &self) {
            Ok(()) => {
                report.set_status(MigrationStatus::Completed);
                Ok(report.info())
            }
            Err(error) => {
                report.set_error(error.to_string());
                report.set_status(MigrationStatus::Failed);
                Err(error)
            }
        }
    }
}

fn send(vm: &KeptVm, address: &Address, restoring: &Restoring) -> Result<(), Error> {
    let report = &restoring.progress.0;
    let channel = channel::connect("main", address, &restoring.cancel)?;
    let return_path = channel.is_two_way();
    let mut configuration = vm.configuration.clone();
    configuration.capabilities.retain(|name| *name != capability::MAPPED_RAM);
    set(&report.counters.total, vm.ram.total_bytes());
    let announcement = Announcement {
        configuration: &configuration,
        ram: &vm.ram,
        units: &|_| TARGET_PAGE,
        return_path,
        postcopy: false,
    };
    let mut stream = announcement
        .send(channel, |words| vm.early.iter().for_each(|section| section.encode(words)))?;
    report.setup_is_done();
    report.set_status(MigrationStatus::Active);
    send_pages(vm, &mut stream, restoring)?;
    report.set_status(MigrationStatus::Device);
    for section in &vm.devices.sections {
        section.encode(stream.out.words());
    }
    handover::confirm_loaded(&mut stream)?;
    let empty = b"{}".to_vec();
    let result = handover::commit(&mut stream, vm.devices.vmdesc.as_ref().unwrap_or(&empty));
    set(&report.counters.transferred, stream.out.bytes());
    result?;
    stream.out.into_channel().finish()
}

fn send_pages(vm: &KeptVm, stream: &mut Stream, restoring: &Restoring) -> Result<(), Error> {
    let counters = &restoring.progress.0.counters;
    RAM_SECTION.encode_end(stream.out.words());
    for (index, block) in vm.ram.blocks() {
        for page in (0..block.target_pages()).map(TargetPage) {
            match vm.is_present(index, page) {
                true => stream.out.push_page(index, page),
                false => stream.out.push_zero(index, page),
            }
            add(if vm.is_present(index, page) { &counters.normal } else { &counters.duplicate }, 1);
            if stream.out.is_full() || stream.out.gathered() >= BATCH_MAX {
                stream.flush()?;
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
