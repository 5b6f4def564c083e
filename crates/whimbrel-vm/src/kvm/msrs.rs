//! Which model-specific registers are part of a vCPU's state.

use kvm_bindings::{KVM_MAX_MSR_ENTRIES, Msrs, kvm_msr_entry};
use kvm_ioctls::{Kvm, VcpuFd};
use whimbrel::VmError;

/// The most MSRs a state has: more than any KVM lists.
pub(crate) const MSRS_MAX: usize = 1024;

/// The timer's deadline, which is set after the TSC that it is counted in.
const TSC_DEADLINE: u32 = 0x6e0;

/// The MSRs that this host's KVM lists as state.
#[derive(Clone, Debug)]
pub(crate) struct KvmMsrs {
    /// Those a fresh vCPU lets us read.
    readable: Vec<u32>,
    /// Those among them that it does not let us write back what it gave: they are part of the
    /// state all the same, and a state with another value than here is refused.
    fixed: Vec<u32>,
}

impl KvmMsrs {
    /// Tries on a fresh vCPU what can be read and written.
    pub(crate) fn of(kvm: &Kvm, fd: &VcpuFd) -> Result<KvmMsrs, VmError> {
        let error = |error| VmError::new(format!("KVM_GET_MSR_INDEX_LIST: {error}"));
        let mut listed = kvm.get_msr_index_list().map_err(error)?.as_slice().to_vec();
        listed.sort_by_key(|&index| (index == TSC_DEADLINE, index));
        let mut msrs = KvmMsrs { readable: Vec::new(), fixed: Vec::new() };
        for index in listed {
            // One that cannot be read does not exist on this vCPU: it has no state to lose.
            let Some(value) = get_one(fd, index) else { continue };
            msrs.readable.push(index);
            if !set_one(fd, index, value) {
                msrs.fixed.push(index);
            }
        }
        Ok(msrs)
    }

    pub(crate) fn knows(&self, index: u32) -> bool {
        self.readable.contains(&index)
    }

    /// Their values.
    pub(crate) fn get(&self, fd: &VcpuFd) -> Result<Vec<kvm_msr_entry>, VmError> {
        let mut all = Vec::with_capacity(self.readable.len());
        for some in self.readable.chunks(KVM_MAX_MSR_ENTRIES) {
            let entry = |&index| kvm_msr_entry { index, ..Default::default() };
            let mut msrs = list(&some.iter().map(entry).collect::<Vec<_>>())?;
            let error = |error| VmError::new(format!("KVM_GET_MSRS: {error}"));
            let got = fd.get_msrs(&mut msrs).map_err(error)?;
            if let Some(index) = some.get(got) {
                return Err(VmError::new(format!("KVM_GET_MSRS: cannot read MSR {index:#x}")));
            }
            all.extend_from_slice(msrs.as_slice());
        }
        Ok(all)
    }

    /// Sets them.
    pub(crate) fn set(&self, fd: &VcpuFd, values: &[kvm_msr_entry]) -> Result<(), VmError> {
        let (fixed, mut settable): (Vec<_>, Vec<_>) =
            values.iter().copied().partition(|msr| self.fixed.contains(&msr.index));
        settable.sort_by_key(|msr| (msr.index == TSC_DEADLINE, msr.index));
        for some in settable.chunks(KVM_MAX_MSR_ENTRIES) {
            let error = |error| VmError::new(format!("KVM_SET_MSRS: {error}"));
            let set = fd.set_msrs(&list(some)?).map_err(error)?;
            if let Some(kvm_msr_entry { index, data, .. }) = some.get(set) {
                let what = format!("KVM_SET_MSRS: MSR {index:#x} does not take {data:#x}");
                return Err(VmError::new(what));
            }
        }
        for kvm_msr_entry { index, data, .. } in fixed {
            let here = get_one(fd, index);
            if here != Some(data) {
                let here = here.unwrap_or(0);
                return Err(VmError::new(format!(
                    "MSR {index:#x} is {data:#x} in the state and fixed to {here:#x} on this host"
                )));
            }
        }
        Ok(())
    }
}

fn list(entries: &[kvm_msr_entry]) -> Result<Msrs, VmError> {
    Msrs::from_entries(entries).map_err(|error| VmError::new(format!("MSRs: {error:?}")))
}

fn get_one(fd: &VcpuFd, index: u32) -> Option<u64> {
    let mut one = list(&[kvm_msr_entry { index, ..Default::default() }]).ok()?;
    let got = fd.get_msrs(&mut one).ok()?;
    (got == 1).then(|| one.as_slice()[0].data)
}

fn set_one(fd: &VcpuFd, index: u32, data: u64) -> bool {
    let one = list(&[kvm_msr_entry { index, data, ..Default::default() }]);
    one.is_ok_and(|one| fd.set_msrs(&one) == Ok(1))
}
