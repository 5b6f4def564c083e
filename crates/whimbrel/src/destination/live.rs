//! A VM that waits for its migration.

use std::sync::Arc;

use whimbrel_ram::{AbsentRam, GuestRam};
use whimbrel_wire::{BlockList, Configuration, DeviceSection};

use super::incoming::{Arrived, Devices, Host, Incoming};
use super::postcopy::{Failed, Terms};
use crate::channel::{Arrivals, Listener};
use crate::colo::{Replication, secondary};
use crate::error::Error;
use crate::global_state;
use crate::guest::Guest;
use crate::loaders::Loaders;
use crate::objects::Router;
use crate::recovery::WayOn;
use crate::report::{EndsFailed, Report};
use crate::rescue::{Orders, poison_as_told};
use crate::settings::{Capabilities, Capability};
use crate::status::{Event, MigrationStatus, RunState};
use crate::vm::DeviceState;
use crate::worker::{Cancel, Links};

/// Everything one incoming migration is given.
#[derive(Debug)]
pub(crate) struct Job {
    pub(crate) guest: Arc<Guest>,
    pub(crate) capabilities: Capabilities,
    /// How many multifd channels there are.
    pub(crate) multifd: u8,
    /// Shared with the control side: most parameters can be changed while the migration runs.
    pub(crate) router: Router,
    /// Whether the guest is to run at once when it did at the source.
    pub(crate) autostart: bool,
    pub(crate) report: Arc<Report>,
    pub(crate) cancel: Cancel,
    /// The connections in postcopy: `migrate-pause`, and the end.
    pub(crate) links: Links,
    /// Rescues.
    pub(crate) orders: Arc<Orders>,
    /// `migrate-recover`.
    pub(crate) recover: Arc<WayOn<Listener>>,
    /// With capability `x-colo`.
    pub(crate) colo: Arc<Replication>,
}

impl Job {
    pub(crate) fn set_status(&self, status: MigrationStatus) {
        if self.report.set_status(status) {
            self.guest.emit(&Event::Migration(status));
        }
    }

    /// How a migration in postcopy stands now, and why it is paused.
    fn stands(&self, status: MigrationStatus, reason: Option<&Error>) {
        match reason {
            Some(reason) => self.report.set_error(reason.text_of_pause()),
            None if status == MigrationStatus::PostcopyActive => self.report.forget_error(),
            None => {}
        }
        self.set_status(status);
    }

    /// Multifd channels always say which VM they are of, as far as it has a UUID.
    fn check_uuid(&self, arrivals: &Arrivals) -> Result<(), Error> {
        match self.guest.vm().uuid() {
            Some(here) if arrivals.uuid != [0; 16] && arrivals.uuid != here => {
                let (source_has, here) = (uuid_text(arrivals.uuid), uuid_text(here));
                Err(Error::Mismatch { what: "UUID".into(), source_has, here })
            }
            _ => Ok(()),
        }
    }
}

fn uuid_text(uuid: [u8; 16]) -> String {
    format!("{:032x}", u128::from_be_bytes(uuid))
}

/// Takes the guest in. The body of `dest/main`.
pub(crate) fn run(job: &Job, listener: Listener) {
    let _guard = EndsFailed(&job.report);
    job.guest.emit(&Event::Migration(MigrationStatus::Setup));
    match receive(job, listener) {
        Ok(()) => {}
        Err(_) if job.cancel.is_set() => job.set_status(MigrationStatus::Cancelled),
        Err(error) => {
            job.report.set_error(error.to_string());
            job.set_status(MigrationStatus::Failed);
        }
    }
}

fn receive(job: &Job, listener: Listener) -> Result<(), Error> {
    let listener = Arc::new(listener);
    let arrivals = Arrivals::wait(&listener, job.multifd, &job.cancel)?;
    job.report.forget_error(); // It was that of a connection that was turned away.
    job.check_uuid(&arrivals)?;
    job.set_status(MigrationStatus::Active);
    let stop = arrivals.stop.clone();
    let mut incoming = Incoming::new(arrivals);
    if job.capabilities.has(Capability::XColo) {
        incoming = incoming.kept_in_step();
    }
    let mut waiting = Waiting { job, runs: true };
    let preempt = job.capabilities.has(Capability::PostcopyPreempt);
    let mut receive = || incoming.receive(&mut waiting);
    let arrived = match preempt {
        true => listener.greeting(true, &stop, receive),
        false => receive(),
    };
    let arrived = match arrived {
        Ok(arrived) => arrived,
        Err(error) => {
            incoming.fail();
            return Err(error);
        }
    };
    let listener = match arrived {
        Arrived::Whole => {
            drop(listener); // The address is free again.
            if job.capabilities.has(Capability::XColo) {
                return secondary::run(job, incoming, &mut waiting);
            }
            // The source has given up the right to run the guest: its stream says so.
            match waiting.start() {
                Ok(()) => job.set_status(MigrationStatus::Completed),
                Err(error) => {
                    incoming.fail();
                    return Err(error);
                }
            }
            None
        }
        Arrived::GuestFirst(package) => {
            let terms = Terms {
                report: &job.report,
                links: &job.links,
                preempt,
                blocktime: job.capabilities.has(Capability::PostcopyBlocktime),
                parameters: job.router.parameters(),
                recover: Some(&job.recover),
                orders: Some(&job.orders),
                stands: &|status, reason| job.stands(status, reason),
            };
            job.set_status(MigrationStatus::PostcopyDevice);
            match incoming.receive_rest(package, &mut waiting, (listener, &terms)) {
                Ok(listener) => {
                    job.set_status(MigrationStatus::Completed);
                    listener
                }
                Err(Failed::Before(error)) => {
                    incoming.fail();
                    return Err(error);
                }
                Err(Failed::After(error, absent)) => {
                    drop(incoming);
                    pause(job, &error, *absent);
                    return Ok(());
                }
            }
        }
    };
    // The guest is here and runs: a source that has gone cannot change that.
    let _ = incoming.see_off(listener, &job.links, job.router.parameters());
    Ok(())
}

/// The guest runs, and the rest of its RAM does not come any more: it goes on until it touches that, or
/// somebody brings it.
fn pause(job: &Job, error: &Error, absent: AbsentRam) {
    job.report.set_error(error.text_of_pause());
    let attending = job.orders.attend();
    job.set_status(MigrationStatus::PostcopyPaused);
    if attending.until_whole(job.links.ended(), &absent) {
        job.report.forget_error();
        if let Err(error) = absent.finish().map_err(Error::system("letting go of guest RAM")) {
            job.report.set_error(error.to_string());
        }
        return job.set_status(MigrationStatus::Completed);
    }
    // Pages that never came must not be taken for zeros: whoever touches them waits until the
    // process ends.
    #[cfg(feature = "fuzzing")]
    crate::fuzzing::keep(absent);
    #[cfg(not(feature = "fuzzing"))]
    std::mem::forget(absent);
}

/// A VM that takes its guest in.
pub(crate) struct Waiting<'j> {
    job: &'j Job,
    /// It ran at the source.
    runs: bool,
}

impl Waiting<'_> {
    /// Whether the guest that was loaded last is to run.
    pub(crate) fn is_to_run(&self) -> bool {
        self.runs && self.job.autostart
    }

    /// The right to run the guest has come.
    fn start(&self) -> Result<(), Error> {
        let guest = &self.job.guest;
        let right = guest.right_has_come();
        let started = match self.is_to_run() {
            true => guest.resume(&right).map(|()| RunState::Running),
            false => Ok(RunState::Paused),
        };
        let state = started.as_ref().copied().unwrap_or(RunState::InternalError);
        guest.put_right(right, state);
        started.map(|_| ())
    }
}

impl Host for Waiting<'_> {
    fn configure(&mut self, configuration: &Configuration) -> Result<(), Error> {
        let vm = self.job.guest.vm();
        let here = vm.machine();
        if configuration.machine != here.as_str() {
            return Err(Error::Mismatch {
                what: "machine type".into(),
                source_has: configuration.machine.to_string(),
                here,
            });
        }
        if self.job.capabilities.has(Capability::ValidateUuid)
            && let (Some(source), Some(here)) = (configuration.uuid, vm.uuid())
            && source != here
        {
            let (source_has, here) = (uuid_text(source), uuid_text(here));
            return Err(Error::Mismatch { what: "UUID".into(), source_has, here });
        }
        Ok(())
    }

    fn ram(&mut self, announced: &BlockList) -> Result<GuestRam, Error> {
        let ram = self.job.guest.vm().ram();
        for (_, info) in announced.iter() {
            let name = info.name.to_string();
            let Some((_, block)) = ram.find(&name) else {
                let names: Vec<&str> = ram.blocks().map(|(_, block)| block.name()).collect();
                return Err(Error::Mismatch {
                    what: "RAM blocks".into(),
                    source_has: format!("a block {name}"),
                    here: format!("only {}", names.join(", ")),
                });
            };
            if block.len() != info.used_length {
                return Err(Error::Mismatch {
                    what: format!("length of RAM block {name}"),
                    source_has: format!("{} bytes", info.used_length),
                    here: format!("{} bytes", block.len()),
                });
            }
        }
        if announced.len() != ram.block_count() {
            return Err(Error::Mismatch {
                what: "RAM blocks".into(),
                source_has: announced.len().to_string(),
                here: ram.block_count().to_string(),
            });
        }
        Ok(ram.clone())
    }

    fn ram_is_fresh(&self) -> bool {
        self.job.guest.vm().ram_is_fresh()
    }

    fn load(&mut self, devices: Devices) -> Result<(), Error> {
        let Devices::Own(sections) = devices else {
            return Err(Error::Refused(
                "main channel: the devices are those of a QEMU: 'whimbrel receive' keeps such a VM"
                    .into(),
            ));
        };
        let devices: Result<Vec<DeviceState>, Error> = sections.into_iter().map(device).collect();
        let mut devices = devices?;
        self.runs = global_state::take(&mut devices)?;
        let guest = &self.job.guest;
        guest.add_lost(poison_as_told(&mut devices, guest.vm().ram())?);
        let loaders = Loaders::of_this_host();
        self.job.guest.vm().load_with(loaders, devices).map_err(Error::vm("loading the devices"))
    }

    fn takes_postcopy(&self) -> bool {
        self.job.capabilities.has(Capability::PostcopyRam)
    }

    fn takes_small_pieces(&self) -> bool {
        self.job.guest.vm().ram().blocks().all(|(_, block)| AbsentRam::takes_small_pieces(block))
    }

    fn run(&mut self) -> Result<(), Error> {
        self.start()?;
        // The link may have broken meanwhile.
        if self.job.report.status() == MigrationStatus::PostcopyDevice {
            self.job.set_status(MigrationStatus::PostcopyActive);
        }
        Ok(())
    }

    fn vcpu_threads(&self) -> Vec<u32> {
        self.job.guest.vm().vcpu_threads()
    }
}

fn device(section: DeviceSection) -> Result<DeviceState, Error> {
    let name = section.header.name.to_string();
    let data = section
        .own_data()
        .map_err(|kind| Error::Refused(format!("main channel: device section {name}: {kind}")))?;
    let length = section.payload.len() - data.len();
    let DeviceSection { header, payload: mut bytes } = section;
    // Not copied: it may be large.
    bytes.drain(..length);
    let (instance_id, version_id) = (header.instance_id, header.version_id);
    Ok(DeviceState { name, instance_id, version_id, bytes })
}
