//! A VM's devices as sections of our own kind.

use whimbrel_wire::{DeviceSection, SectionHeader, SectionId};

use crate::error::Error;
use crate::global_state;
use crate::source::setup::name;
use crate::vm::{DeviceState, Vm};

/// The devices of a guest that stands still, and is to run (or not) when they are loaded.
pub(crate) fn sections(vm: &dyn Vm, runs: bool) -> Result<Vec<DeviceSection>, Error> {
    let devices = vm.save().map_err(Error::vm("saving the devices"))?;
    let all = std::iter::once(global_state::section(runs)).chain(devices);
    (1..).zip(all).map(|(id, device)| section(id, &device)).collect()
}

/// A device's state as the section of that number.
pub(crate) fn section(id: u32, device: &DeviceState) -> Result<DeviceSection, Error> {
    let header = SectionHeader {
        id: SectionId(id),
        name: name(&device.name)?,
        instance_id: device.instance_id,
        version_id: device.version_id,
    };
    Ok(DeviceSection::with_own_length(header, &device.bytes))
}
