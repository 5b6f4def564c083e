//! What an accelerator does for the VM: it runs vCPUs and knows their state.

use std::sync::Arc;

use whimbrel::{DeviceState, VmError};
use whimbrel_ram::{BlockIndex, GuestRam, TargetPage};

use crate::config::Accel;
use crate::error::Error;
use crate::gate::Gate;
use crate::layout::Layout;

/// Names of the devices that more than one accelerator has.
pub(crate) const VCPU: &str = "vcpu";

/// What becomes of a guest that touches a page which is lost, and cannot go on without it.
pub(crate) fn machine_check(ram: &GuestRam, block: BlockIndex, offset: u64) -> VmError {
    let name = ram.block(block).name();
    let page = TargetPage::containing(offset).0;
    VmError::new(format!("machine check: the guest touched page {page} of {name}, which is lost"))
}

/// The vCPUs of a VM, on KVM or on native threads.
pub(crate) trait Machine: Send + Sync {
    fn accel(&self) -> Accel;

    /// Puts into the memory of a fresh guest what this accelerator needs there.
    fn install(&self, layout: &Layout) -> Result<(), Error>;

    /// Runs a vCPU on the calling thread until it is recalled.
    fn run(&self, cpu: u32, gate: &Gate) -> Result<(), VmError>;

    /// The signal that gets a vCPU thread out of the guest, and out of waiting for a page that is
    /// missing, after everything was done so that it does not go back in.
    fn kick(&self) -> libc::c_int;

    /// The devices of this accelerator, in the order in which they are saved.
    fn devices(&self) -> Vec<(&'static str, u32)>;

    /// Their state, while no vCPU runs.
    fn save(&self) -> Result<Vec<DeviceState>, VmError>;

    /// Begins to take the state of [`devices`](Machine::devices), while no vCPU runs.
    fn begin_load(&self) -> Result<Box<dyn LoadMachine + '_>, VmError>;
}

/// The devices of an accelerator, being loaded: all of them or none.
pub(crate) trait LoadMachine: Sync {
    /// Takes the state of one of them, of a guest laid out so. Several threads call, for different
    /// devices.
    fn load(&self, layout: &Layout, device: &DeviceState) -> Result<(), VmError>;

    /// Each has been loaded: this is the guest that runs next.
    fn finish(self: Box<Self>, layout: &Arc<Layout>);

    /// One of them, or another device of the VM, cannot be loaded: all is as it was.
    fn undo(self: Box<Self>) -> Result<(), VmError>;
}
