//! Which accelerator and which dirty log a VM gets.

use std::sync::Arc;

use kvm_ioctls::Kvm;
use whimbrel_ram::GuestRam;
use whimbrel_ram::dirty::DirtyLog;

use crate::config::{AccelChoice, Config};
use crate::dirty;
use crate::error::Error;
use crate::kvm::{self, KvmMachine};
use crate::layout::Layout;
use crate::machine::Machine;
use crate::native::NativeMachine;
use crate::net::Nic;
use crate::pace::Gap;
use crate::serial::SerialPort;

/// vCPUs, and what sees their writes.
pub(crate) struct Made {
    pub(crate) machine: Arc<dyn Machine>,
    pub(crate) dirty: Arc<dyn DirtyLog>,
    pub(crate) dirty_name: &'static str,
}

/// Opens KVM, when it is asked for, or usable and not declined; a guest that is to have a network
/// has none on KVM.
pub(crate) fn open(choice: AccelChoice, network: bool) -> Result<Option<Kvm>, Error> {
    match choice {
        AccelChoice::Auto if network => Ok(None),
        AccelChoice::Native => Ok(None),
        AccelChoice::Kvm => kvm::open().map(Some),
        AccelChoice::Auto => Ok(kvm::open().ok()),
    }
}

/// Makes what the configuration asks for, on `kvm` or natively.
pub(crate) fn make(
    config: &Config,
    kvm: Option<&Kvm>,
    ram: &GuestRam,
    layout: &Arc<Layout>,
    serial: &Arc<SerialPort>,
    gaps: &Arc<[Gap]>,
    nic: Option<&Arc<Nic>>,
) -> Result<Made, Error> {
    if let Some(kvm) = kvm {
        if nic.is_some() {
            return Err(Error::NoDriver);
        }
        let machine = KvmMachine::new(kvm, ram, layout, serial, gaps, config.dirty)?;
        let (dirty, dirty_name) = machine.dirty_log();
        return Ok(Made { machine: Arc::new(machine), dirty, dirty_name });
    }
    let (dirty, dirty_name, marks) = dirty::for_native(config.dirty, ram)?;
    let machine = Arc::new(NativeMachine::new(ram, layout, marks, serial, gaps, nic.cloned()));
    Ok(Made { machine, dirty, dirty_name })
}
