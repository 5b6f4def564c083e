//! Which accelerator and which dirty log a VM gets.

use std::sync::Arc;

use whimbrel_ram::GuestRam;
use whimbrel_ram::dirty::DirtyLog;

use crate::config::{AccelChoice, Config};
use crate::dirty::{Marks, OwnWrites};
use crate::error::Error;
use crate::kvm::{self, KvmMachine};
use crate::layout::Layout;
use crate::machine::Machine;
use crate::native::NativeMachine;
use crate::pace::Gap;
use crate::serial::SerialPort;

/// vCPUs, and what sees their writes.
pub(crate) struct Made {
    pub(crate) machine: Arc<dyn Machine>,
    pub(crate) dirty: Arc<dyn DirtyLog>,
    pub(crate) dirty_name: &'static str,
}

/// Makes what the configuration asks for.
pub(crate) fn make(
    config: &Config,
    ram: &GuestRam,
    layout: &Arc<Layout>,
    serial: &Arc<SerialPort>,
    gaps: &Arc<[Gap]>,
) -> Result<Made, Error> {
    let kvm = match config.accel {
        AccelChoice::Native => None,
        AccelChoice::Kvm => Some(kvm::open()?),
        AccelChoice::Auto => kvm::open().ok(),
    };
    let own = Arc::new(OwnWrites::new(ram));
    if let Some(kvm) = kvm {
        let machine = KvmMachine::new(&kvm, ram, layout, serial, gaps)?;
        return Ok(Made { machine: Arc::new(machine), dirty: own, dirty_name: "own-writes" });
    }
    let marks = Marks(Some(Arc::clone(&own)));
    let machine = Arc::new(NativeMachine::new(ram, layout, marks, serial, gaps));
    Ok(Made { machine, dirty: own, dirty_name: "own-writes" })
}
