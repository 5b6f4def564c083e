//! What a VMM gives the engine.

use std::error::Error;
use std::fmt;

use whimbrel_ram::GuestRam;
use whimbrel_ram::dirty::DirtyLog;

use crate::loaders::Loaders;

/// A virtual machine that can be moved.
///
/// The engine calls from its own threads and never holds a lock of its own across a call. What
/// lock the VMM needs (its "big lock") it takes inside.
pub trait Vm: Send + Sync {
    /// The machine type's full versioned name. Source and destination must agree on it.
    fn machine(&self) -> String;

    /// The VM's UUID, sent and compared with capability `validate-uuid`.
    fn uuid(&self) -> Option<[u8; 16]> {
        None
    }

    /// Its RAM, the same blocks in the same order for as long as a migration runs.
    fn ram(&self) -> &GuestRam;

    /// Whether every byte of RAM is zero when a migration comes in, because nothing was written
    /// since it was mapped. Then zero pages are not looked at, and not taken from the host.
    fn ram_is_fresh(&self) -> bool {
        false
    }

    /// What tells which pages the guest (and the VMM itself) writes.
    fn dirty_log(&self) -> &dyn DirtyLog;

    /// Stops the guest. When it returns, no vCPU runs and nothing writes guest RAM.
    fn pause(&self) -> Result<(), VmError>;

    /// Runs the guest, from where it was stopped or from the state loaded.
    fn resume(&self) -> Result<(), VmError>;

    /// The state of every device, vCPUs included, in the order in which it has to be loaded.
    /// Called while the guest is stopped.
    fn save(&self) -> Result<Vec<DeviceState>, VmError>;

    /// Takes the state of every device, in the order in which it was saved. Called once, before
    /// the guest first runs; at a secondary of COLO (capability `x-colo`) for each checkpoint, while
    /// its copy of the guest stands still. All of its state has arrived then, and no lock of the engine's is held;
    /// in postcopy some of its RAM has not, and who touches that waits for it.
    fn load(&self, devices: Vec<DeviceState>) -> Result<(), VmError>;

    /// The same with threads that load several devices at a time, and what is called; a VMM whose
    /// devices need not all be loaded one after the other says so here, with a [`LoadRule`](crate::LoadRule) for each:
    ///
    /// ```
    /// # use whimbrel::{DeviceState, LoadRule, Loaders, VmError};
    /// # struct Vmm;
    /// # impl Vmm {
    /// #     fn load_device(&self, device: DeviceState) -> Result<(), VmError> { Ok(()) }
    /// # fn
    /// load_with(&self, loaders: Loaders, devices: Vec<DeviceState>) -> Result<(), VmError> {
    ///     let rule = |device: &DeviceState| match device.name.as_str() {
    ///         "vcpu" | "virtio-net" | "virtio-blk" => LoadRule::beside_others(),
    ///         // Reads what the vCPUs' local APICs hold.
    ///         "ioapic" => LoadRule::beside_others().after("vcpu"),
    ///         // Everything else one by one, and nothing beside it.
    ///         _ => LoadRule::alone(),
    ///     };
    ///     loaders.load(devices, rule, |device| self.load_device(device))
    /// }
    /// # }
    /// ```
    ///
    /// The VMM's own lock is the VMM's to take: by the devices whose loading needs it, for as long as
    /// that takes, and not for the others.
    fn load_with(&self, loaders: Loaders, devices: Vec<DeviceState>) -> Result<(), VmError> {
        let _ = loaders;
        self.load(devices)
    }

    /// The kernel's numbers of the threads that run vCPUs, in their order (`gettid`), as far as it
    /// is known: who waits for a page is told by them. Asked when the guest is about to run.
    fn vcpu_threads(&self) -> Vec<u32> {
        Vec::new()
    }

    /// Slows the guest down: every vCPU runs for `100 - percent` of the time. 0 ends it.
    fn throttle(&self, percent: u8) {
        let _ = percent;
    }
}

/// The state of one device, opaque to the engine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceState {
    /// The device (`idstr` on the wire), 1 to 255 bytes.
    pub name: String,
    /// Which one of that name.
    pub instance_id: u32,
    /// The version of the format of `bytes`: a VM refuses what is newer than it knows.
    pub version_id: u32,
    /// As the VMM wrote it.
    pub bytes: Vec<u8>,
}

/// Why a VMM could not do what the engine asked for.
#[derive(Debug)]
pub struct VmError(Box<dyn Error + Send + Sync>);

impl VmError {
    /// An error of the VMM, or a text.
    pub fn new(error: impl Into<Box<dyn Error + Send + Sync>>) -> VmError {
        VmError(error.into())
    }

    /// The same, of a device.
    pub(crate) fn of_device(name: &str, instance_id: u32, source: VmError) -> VmError {
        VmError::new(DeviceError { name: name.to_owned(), instance_id, source })
    }
}

/// What is wrong with a device.
#[derive(Debug, thiserror::Error)]
#[error("device {name}/{instance_id}: {source}")]
struct DeviceError {
    name: String,
    instance_id: u32,
    source: VmError,
}

impl fmt::Display for VmError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl Error for VmError {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        self.0.source()
    }
}
