//! Taking the state of a guest's devices: several at a time, and all of it or nothing.

use std::fmt;
use std::sync::{Arc, OnceLock};

use vm_superio::serial::SerialState;
use whimbrel::{DeviceState, LoadRule, Loaders, VmError};

use crate::kvm;
use crate::layout::Layout;
use crate::machine::{LoadMachine, VCPU};
use crate::net::{self, Nic};
use crate::serial::{self, SerialPort};
use crate::software::{self, Software};
use crate::vm::ReferenceVm;

const MISSING: &str = "its state is missing";

/// Devices that have all been loaded, and are still to be put in the place of those that were there.
pub(crate) struct Loaded<'v> {
    vm: &'v ReferenceVm,
    machine: Box<dyn LoadMachine + 'v>,
    layout: Arc<Layout>,
    serial: SerialState,
}

impl Loaded<'_> {
    /// Puts them there; gives how the guest is laid out.
    pub(crate) fn install(self) -> Arc<Layout> {
        self.machine.finish(&self.layout);
        self.vm.serial.set(&self.serial);
        self.layout
    }
}

/// Loads the devices of `vm`, of which no vCPU runs.
pub(crate) fn load(
    vm: &ReferenceVm,
    loaders: Loaders,
    devices: Vec<DeviceState>,
) -> Result<Loaded<'_>, VmError> {
    // The workload first: what else does not fit follows from what it says.
    let layout = Arc::new(layout(vm, &devices)?);
    check_all_are_there(vm, &devices)?;
    let serial = OnceLock::new();
    let machine = vm.machine.begin_load()?;
    let one = |device: DeviceState| match device.name.as_str() {
        software::DEVICE => Ok(()),
        net::DEVICE => Nic::check(&device),
        serial::DEVICE => {
            let state = SerialPort::parse(&device)?;
            serial.get_or_init(|| state);
            Ok(())
        }
        _ => machine.load(&layout, &device),
    };
    if let Err(error) = loaders.load(devices, rule, one) {
        machine
            .undo()
            .map_err(|again| VmError::new(format!("{error}; and then, going back: {again}")))?;
        return Err(error);
    }
    let serial = serial.into_inner().expect("it was there, and loaded");
    Ok(Loaded { vm, machine, layout, serial })
}

/// Which devices wait for which. None has to be alone: what they share, the kernel locks.
fn rule(device: &DeviceState) -> LoadRule {
    match device.name.as_str() {
        // Setting a vCPU's MSRs sets the clock, too.
        kvm::CLOCK => LoadRule::beside_others().after(VCPU),
        _ => LoadRule::beside_others(),
    }
}

/// How the guest that comes is laid out.
fn layout(vm: &ReferenceVm, devices: &[DeviceState]) -> Result<Layout, VmError> {
    let refused =
        |why: &dyn fmt::Display| VmError::new(format!("device {}/0: {why}", software::DEVICE));
    let device = devices.iter().find(|device| device.name == software::DEVICE);
    let device = device.ok_or_else(|| refused(&MISSING))?;
    let software = software::parse(device, &vm.layout(), vm.accel());
    software
        .map(|Software { layout }| layout.with_network(vm.nic().is_some()))
        .map_err(|error| refused(&error))
}

/// Every device of the VM is there once, and no other.
fn check_all_are_there(vm: &ReferenceVm, devices: &[DeviceState]) -> Result<(), VmError> {
    let known = vm.devices();
    let refuse = |(name, id): (&str, u32), why: &str| {
        Err(VmError::new(format!("device {name}/{id}: {why}")))
    };
    for device in devices {
        let key = (&device.name[..], device.instance_id);
        if !known.contains(&key) {
            return refuse(key, "this VM has none such");
        }
    }
    for key in known {
        let is_it = |device: &&DeviceState| (&device.name[..], device.instance_id) == key;
        match devices.iter().filter(is_it).count() {
            1 => {}
            0 => return refuse(key, MISSING),
            _ => return refuse(key, "its state is there twice"),
        }
    }
    Ok(())
}
