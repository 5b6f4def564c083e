//! What an accelerator does for the VM: it runs vCPUs and knows their state.

use std::sync::Arc;

use whimbrel::{DeviceState, VmError};

use crate::config::Accel;
use crate::error::Error;
use crate::gate::Gate;
use crate::layout::Layout;

/// Names of the devices that more than one accelerator has.
pub(crate) const VCPU: &str = "vcpu";

/// The vCPUs of a VM, on KVM or on native threads.
pub(crate) trait Machine: Send + Sync {
    fn accel(&self) -> Accel;

    /// Puts into the memory of a fresh guest what this accelerator needs there.
    fn install(&self, layout: &Layout) -> Result<(), Error>;

    /// Runs a vCPU on the calling thread until it is recalled.
    fn run(&self, cpu: u32, gate: &Gate) -> Result<(), VmError>;

    /// The signal that gets a vCPU thread out of the guest, after everything was done so that it
    /// does not go back in.
    fn kick(&self) -> Option<libc::c_int>;

    /// The devices of this accelerator, in the order in which they are saved.
    fn devices(&self) -> Vec<(&'static str, u32)>;

    /// Their state, while no vCPU runs.
    fn save(&self) -> Result<Vec<DeviceState>, VmError>;

    /// Takes the state of [`devices`](Machine::devices), one each and in that order, of a guest
    /// laid out so. All of it or, with an error, nothing.
    fn load(&self, layout: &Arc<Layout>, devices: &[DeviceState]) -> Result<(), VmError>;
}
