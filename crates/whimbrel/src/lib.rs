//! Live migration for virtual machines: the engine a VMM embeds.
//!
//! A VMM implements [`Vm`]; the engine moves it to another host while it runs, speaking QEMU's
//! migration protocol. Names of states, capabilities, parameters and report fields are QMP's.
mod address;
mod channel;
mod destination;
mod error;
mod global_state;
mod guest;
pub mod kept;
mod migrator;
mod plan;
mod report;
mod settings;
mod source;
mod status;
mod vm;
mod worker;

pub use address::{Address, AddressError, MigrationAddress, MigrationChannel, SocketAddress};
pub use error::Error;
pub use migrator::{Migrator, Start, Subscription};
pub use settings::{Capabilities, Capability, Parameters, SettingError};
pub use status::{
    Event, MigrationInfo, MigrationStats, MigrationStatus, RunState, SocketAddressInfo,
    XbzrleCacheStats,
};
pub use vm::{DeviceState, Vm, VmError};
