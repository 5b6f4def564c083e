//! What software the guest runs, as device state: a destination takes the workload over from the
//! source, and refuses a guest that is not made for its hardware.

use whimbrel::{DeviceState, VmError};

use crate::config::Accel;
use crate::error::Size;
use crate::layout::Layout;
use crate::state::{Fields, Tag, Writer};
use crate::workload::{Workload, WorkloadKind};

pub(crate) const DEVICE: &str = "workload";

const ACCEL: Tag = Tag(1, "accel");
const MEMORY: Tag = Tag(2, "memory");
const VCPUS: Tag = Tag(3, "vcpus");
const KIND: Tag = Tag(4, "kind");
const SEED: Tag = Tag(5, "seed");
const WORKING_SET: Tag = Tag(6, "working-set");
const RATE: Tag = Tag(7, "rate");

/// What a state says about the guest's software.
#[derive(Debug)]
pub(crate) struct Software {
    pub(crate) layout: Layout,
}

pub(crate) fn save(layout: &Layout, accel: Accel) -> DeviceState {
    let Workload { kind, seed, working_set, rate } = layout.workload;
    let mut writer = Writer::new();
    writer.bytes(ACCEL, accel.name().as_bytes());
    writer.u64(MEMORY, layout.memory);
    writer.u64(VCPUS, u64::from(layout.vcpus));
    writer.u64(KIND, kind.code());
    writer.u64(SEED, seed);
    writer.u64(WORKING_SET, working_set);
    writer.u64(RATE, rate);
    writer.device(DEVICE, 0)
}

/// Reads a state for a VM that is laid out like `mine` (but for the workload) on `accel`.
pub(crate) fn parse(
    device: &DeviceState,
    mine: &Layout,
    accel: Accel,
) -> Result<Software, VmError> {
    let known = [ACCEL, MEMORY, VCPUS, KIND, SEED, WORKING_SET, RATE];
    let fields = Fields::read(device, &known)?;
    let found = fields.bytes(ACCEL)?;
    if found != accel.name().as_bytes() {
        let found = found.escape_ascii();
        return Err(VmError::new(format!(
            "the guest runs on accelerator \"{found}\", this VM on \"{accel}\": start this one \
             with the same --accel"
        )));
    }
    let (memory, vcpus) = (fields.u64(MEMORY)?, fields.u32(VCPUS)?);
    if vcpus != mine.vcpus {
        let here = mine.vcpus;
        return Err(VmError::new(format!(
            "the guest has {vcpus} vCPUs, this VM {here}: start this one with --vcpus {vcpus}"
        )));
    }
    if memory != mine.memory {
        let (there, here) = (Size(memory), Size(mine.memory));
        return Err(VmError::new(format!(
            "the guest has {there} of memory, this VM {here}: start this one with the same --memory"
        )));
    }
    let kind = fields.u64(KIND)?;
    let workload = Workload {
        kind: WorkloadKind::from_code(kind)
            .ok_or_else(|| VmError::new(format!("unknown kind of workload {kind}")))?,
        seed: fields.u64(SEED)?,
        working_set: fields.u64(WORKING_SET)?,
        rate: fields.u64(RATE)?,
    };
    let layout =
        Layout::new(memory, vcpus, workload).map_err(|error| VmError::new(error.to_string()))?;
    Ok(Software { layout })
}
