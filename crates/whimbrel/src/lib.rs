//! Live migration for virtual machines: the engine a VMM embeds.
//!
//! A VMM implements [`Vm`]; the engine moves it to another host while it runs, speaking QEMU's
//! migration protocol. Names of states, capabilities, parameters and report fields are QMP's.
#![forbid(unsafe_code)]

mod address;
mod settings;
mod status;
mod vm;

pub use address::{Address, AddressError, MigrationAddress, MigrationChannel, SocketAddress};
pub use settings::{Capabilities, Capability, Parameters, SettingError};
pub use status::{
    Event, MigrationInfo, MigrationStats, MigrationStatus, RunState, SocketAddressInfo,
    XbzrleCacheStats,
};
pub use vm::{DeviceState, Vm, VmError};
