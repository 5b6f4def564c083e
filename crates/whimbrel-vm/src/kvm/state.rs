//! All of a vCPU's state, out and in: in the kernel's own structures (its userspace ABI), each a
//! field.
#![expect(unsafe_code, reason = "KVM's XSAVE calls trust the size of the buffer they are given")]

use kvm_bindings::{
    CpuId, KVM_MAX_CPUID_ENTRIES, Xsave, kvm_cpuid_entry2, kvm_debugregs, kvm_lapic_state,
    kvm_mp_state, kvm_msr_entry, kvm_regs, kvm_sregs, kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::{Cap, Error as Errno, VcpuFd, VmFd};
use whimbrel::{DeviceState, VmError};
use zerocopy::{FromBytes, Immutable, IntoBytes};

use crate::machine::VCPU;
use crate::state::{Fields, Tag, Writer};

use super::msrs::{KvmMsrs, MSRS_MAX};

const REGS: Tag = Tag(1, "regs");
const SREGS: Tag = Tag(2, "sregs");
const XSAVE: Tag = Tag(3, "xsave");
const XCRS: Tag = Tag(4, "xcrs");
const DEBUG_REGS: Tag = Tag(5, "debugregs");
const LAPIC: Tag = Tag(6, "lapic");
const MSRS: Tag = Tag(7, "msrs");
const EVENTS: Tag = Tag(8, "events");
const MP_STATE: Tag = Tag(9, "mp-state");
const CPUID: Tag = Tag(10, "cpuid");
const TSC_KHZ: Tag = Tag(11, "tsc-khz");
const GAP: Tag = Tag(12, "gap");
const LAST: Tag = Tag(13, "last-update");

const KNOWN: [Tag; 13] = [
    REGS, SREGS, XSAVE, XCRS, DEBUG_REGS, LAPIC, MSRS, EVENTS, MP_STATE, CPUID, TSC_KHZ, GAP, LAST,
];

/// KVM takes a TSC that runs this much faster or slower for the same, in millionths.
const TSC_TOLERANCE_PPM: u64 = 250;

/// A vCPU's state, as the kernel gives and takes it.
#[derive(Clone)]
pub(crate) struct CpuState {
    regs: kvm_regs,
    sregs: kvm_sregs,
    /// The XSAVE area, as many words as this host's KVM has.
    xsave: Vec<u32>,
    xcrs: kvm_xcrs,
    debug_regs: kvm_debugregs,
    lapic: kvm_lapic_state,
    msrs: Vec<kvm_msr_entry>,
    events: kvm_vcpu_events,
    mp_state: kvm_mp_state,
    cpuid: Vec<kvm_cpuid_entry2>,
    tsc_khz: u32,
    /// Longest gap between updates and time of the last.
    pub(crate) gap: (u64, u64),
}

/// What this host's KVM can carry of a vCPU.
#[derive(Clone, Debug)]
pub(crate) struct Abilities {
    /// Words of the XSAVE area.
    xsave_words: usize,
    tsc_control: bool,
    pub(crate) msrs: KvmMsrs,
}

/// Words of an XSAVE area without what was added to it in Linux 5.17.
const XSAVE_WORDS: usize = size_of::<kvm_xsave>() / 4;

impl Abilities {
    pub(crate) fn of(vm: &VmFd, msrs: KvmMsrs) -> Abilities {
        // Where the capability is not known it is 0, and the area has its old size.
        let xsave = usize::try_from(vm.check_extension_int(Cap::Xsave2)).unwrap_or(0);
        Abilities {
            xsave_words: (xsave / 4).max(XSAVE_WORDS),
            tsc_control: vm.check_extension(Cap::TscControl),
            msrs,
        }
    }
}

/// Which of the kernel's calls failed.
fn call<T>(name: &'static str, result: Result<T, Errno>) -> Result<T, VmError> {
    result.map_err(|error| VmError::new(format!("{name}: {error}")))
}

impl CpuState {
    /// Reads a stopped vCPU. What is pending of its last exit must have been completed.
    pub(crate) fn get(fd: &VcpuFd, can: &Abilities) -> Result<CpuState, VmError> {
        // The run state first: reading it takes in events that change what is read below.
        let mp_state = call("KVM_GET_MP_STATE", fd.get_mp_state())?;
        let mut xsave = call("XSAVE buffer", new_xsave(can))?;
        if can.xsave_words > XSAVE_WORDS {
            // SAFETY: the buffer has the size that KVM_CAP_XSAVE2 told, and no feature that
            // enlarges it has been enabled since.
            call("KVM_GET_XSAVE2", unsafe { fd.get_xsave2(&mut xsave) })?;
        } else {
            let area = call("KVM_GET_XSAVE", fd.get_xsave())?;
            // SAFETY: only the area is written, not the length beside it.
            unsafe { xsave.as_mut_fam_struct() }.xsave = area;
        }
        let cpuid = call("KVM_GET_CPUID2", fd.get_cpuid2(KVM_MAX_CPUID_ENTRIES))?;
        Ok(CpuState {
            mp_state,
            regs: call("KVM_GET_REGS", fd.get_regs())?,
            sregs: call("KVM_GET_SREGS", fd.get_sregs())?,
            xsave: [&xsave.as_fam_struct_ref().xsave.region[..], xsave.as_slice()].concat(),
            xcrs: call("KVM_GET_XCRS", fd.get_xcrs())?,
            debug_regs: call("KVM_GET_DEBUGREGS", fd.get_debug_regs())?,
            lapic: call("KVM_GET_LAPIC", fd.get_lapic())?,
            msrs: can.msrs.get(fd)?,
            // Last: what is pending may have changed by what was read above.
            events: call("KVM_GET_VCPU_EVENTS", fd.get_vcpu_events())?,
            cpuid: cpuid.as_slice().to_vec(),
            tsc_khz: call("KVM_GET_TSC_KHZ", fd.get_tsc_khz())?,
            gap: (0, 0),
        })
    }

    /// Gives a vCPU that has not run yet this state.
    pub(crate) fn set(&self, fd: &VcpuFd, can: &Abilities) -> Result<(), VmError> {
        let cpuid = CpuId::from_entries(&self.cpuid);
        let cpuid = cpuid.map_err(|error| VmError::new(format!("cpuid: {error:?}")))?;
        call("KVM_SET_CPUID2", fd.set_cpuid2(&cpuid))?;
        if can.tsc_control && call("KVM_GET_TSC_KHZ", fd.get_tsc_khz())? != self.tsc_khz {
            call("KVM_SET_TSC_KHZ", fd.set_tsc_khz(self.tsc_khz))?;
        }
        call("KVM_SET_MP_STATE", fd.set_mp_state(self.mp_state))?;
        call("KVM_SET_REGS", fd.set_regs(&self.regs))?;
        call("KVM_SET_SREGS", fd.set_sregs(&self.sregs))?;
        self.set_xsave(fd, can)?;
        call("KVM_SET_XCRS", fd.set_xcrs(&self.xcrs))?;
        call("KVM_SET_DEBUGREGS", fd.set_debug_regs(&self.debug_regs))?;
        call("KVM_SET_LAPIC", fd.set_lapic(&self.lapic))?;
        // After the LAPIC, whose timer mode the deadline's MSR needs.
        can.msrs.set(fd, &self.msrs)?;
        // Last: the calls above make and unmake pending events.
        call("KVM_SET_VCPU_EVENTS", fd.set_vcpu_events(&self.events))
    }

    fn set_xsave(&self, fd: &VcpuFd, can: &Abilities) -> Result<(), VmError> {
        let mut xsave = call("XSAVE buffer", new_xsave(can))?;
        let (area, more) = self.xsave.split_at(XSAVE_WORDS);
        // SAFETY: only the area is written, not the length beside it.
        unsafe { xsave.as_mut_fam_struct() }.xsave.region.copy_from_slice(area);
        xsave.as_mut_slice().copy_from_slice(more);
        // SAFETY: the buffer has the size that KVM_CAP_XSAVE2 told.
        call("KVM_SET_XSAVE", unsafe { fd.set_xsave2(&xsave) })
    }

    pub(crate) fn save(&self, cpu: u32) -> DeviceState {
        let mut writer = Writer::new();
        writer.bytes(REGS, self.regs.as_bytes());
        writer.bytes(SREGS, self.sregs.as_bytes());
        writer.bytes(XSAVE, self.xsave.as_bytes());
        writer.bytes(XCRS, self.xcrs.as_bytes());
        writer.bytes(DEBUG_REGS, self.debug_regs.as_bytes());
        writer.bytes(LAPIC, self.lapic.as_bytes());
        writer.bytes(MSRS, self.msrs.as_bytes());
        writer.bytes(EVENTS, self.events.as_bytes());
        writer.bytes(MP_STATE, self.mp_state.as_bytes());
        writer.bytes(CPUID, self.cpuid.as_bytes());
        writer.u64(TSC_KHZ, u64::from(self.tsc_khz));
        writer.u64(GAP, self.gap.0);
        writer.u64(LAST, self.gap.1);
        writer.device(VCPU, cpu)
    }

    /// Reads a state that this host can carry; `here` is the TSC's frequency of the vCPU that is
    /// to take it.
    pub(crate) fn parse(
        device: &DeviceState,
        can: &Abilities,
        here: u32,
    ) -> Result<CpuState, VmError> {
        let fields = Fields::read(device, &KNOWN)?;
        let xsave: Vec<u32> = entries(&fields, XSAVE, can.xsave_words)?;
        if xsave.len() != can.xsave_words {
            let (there, here) = (xsave.len() * 4, can.xsave_words * 4);
            let what = format!("its XSAVE area has {there} bytes, this host's {here}");
            return Err(VmError::new(what));
        }
        let tsc_khz = fields.u32(TSC_KHZ)?;
        let apart = u64::from(tsc_khz.abs_diff(here));
        if !can.tsc_control && apart * 1_000_000 > u64::from(here) * TSC_TOLERANCE_PPM {
            return Err(VmError::new(format!(
                "its TSC runs at {tsc_khz} kHz, this host's at {here}, and this KVM cannot scale it"
            )));
        }
        let msrs: Vec<kvm_msr_entry> = entries(&fields, MSRS, MSRS_MAX)?;
        if let Some(unknown) = msrs.iter().find(|msr| !can.msrs.knows(msr.index)) {
            let what = format!("MSR {:#x} is not known to this host's KVM", unknown.index);
            return Err(VmError::new(what));
        }
        Ok(CpuState {
            regs: structure(&fields, REGS)?,
            sregs: structure(&fields, SREGS)?,
            xsave,
            xcrs: structure(&fields, XCRS)?,
            debug_regs: structure(&fields, DEBUG_REGS)?,
            lapic: structure(&fields, LAPIC)?,
            msrs,
            events: structure(&fields, EVENTS)?,
            mp_state: structure(&fields, MP_STATE)?,
            cpuid: entries(&fields, CPUID, KVM_MAX_CPUID_ENTRIES)?,
            tsc_khz,
            gap: (fields.u64(GAP)?, fields.u64(LAST)?),
        })
    }
}

fn new_xsave(can: &Abilities) -> Result<Xsave, Errno> {
    Xsave::new(can.xsave_words - XSAVE_WORDS).map_err(|_| Errno::new(libc::ENOMEM))
}

fn structure<T: FromBytes>(fields: &Fields<'_>, tag: Tag) -> Result<T, VmError> {
    let bytes = fields.bytes(tag)?;
    T::read_from_bytes(bytes).map_err(|_| wrong_length::<T>(tag, bytes.len()))
}

fn wrong_length<T>(tag: Tag, found: usize) -> VmError {
    let expected = size_of::<T>();
    VmError::new(format!("field {} has {found} bytes, expected {expected}", tag.1))
}

fn entries<T>(fields: &Fields<'_>, tag: Tag, most: usize) -> Result<Vec<T>, VmError>
where
    T: FromBytes + IntoBytes + Immutable,
{
    let bytes = fields.bytes(tag)?;
    let each = size_of::<T>();
    if !bytes.len().is_multiple_of(each) || bytes.len() / each > most {
        let found = bytes.len();
        let what = format!("has {found} bytes, expected at most {most} entries of {each} bytes");
        return Err(VmError::new(format!("field {} {what}", tag.1)));
    }
    let read = |entry| T::read_from_bytes(entry).map_err(|_| wrong_length::<T>(tag, each));
    bytes.chunks_exact(each).map(read).collect()
}
