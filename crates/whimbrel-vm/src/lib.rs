//! Whimbrel's reference VM: a guest on KVM or on native threads that is busy with its memory and
//! checks it, so that a page which was lost, stale or torn by a migration is noticed by the guest
//! itself.
//!
//! [`ReferenceVm`] implements the engine's [`Vm`](whimbrel::Vm). It obeys: whether it may run is
//! for the engine to know.

mod accelerator;
mod build;
mod check;
mod config;
mod dirty;
mod error;
mod gate;
mod guarded;
mod kvm;
mod layout;
mod loading;
mod machine;
mod memory;
mod native;
pub mod net;
mod pace;
mod pattern;
mod serial;
mod software;
mod state;
mod vcpus;
mod vm;
mod workload;

pub use check::{CheckError, SelfCheck};
pub use config::{
    Accel, AccelChoice, Config, DirtyKind, Fill, ParseError, SerialOutput, parse_page_size,
    parse_size,
};
pub use error::{Error, Size};
pub use layout::{FIRMWARE_NAME, RAM_NAME, WritableKind, WritablePages};
pub use pace::Progress;
pub use pattern::MismatchKind;
pub use vm::{MACHINE, ReferenceVm};
pub use workload::{Workload, WorkloadKind};
