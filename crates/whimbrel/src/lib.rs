//! Live migration for virtual machines: the engine a VMM embeds.
//!
//! A VMM implements [`Vm`]; the engine moves it to another host while it runs, speaking QEMU's
//! migration protocol. Names of states, capabilities, parameters and report fields are QMP's.
//!
//! ```no_run
//! # use std::sync::Arc;
//! # use whimbrel::{Capability, Migrator, MigrationStatus, Start, Vm};
//! # fn example(vm: Arc<dyn Vm>) -> Result<(), whimbrel::Error> {
//! let migrator = Migrator::new(vm, Start::Paused);
//! migrator.cont()?; // The guest runs.
//! migrator.set_capabilities(&[(Capability::ReturnPath, true)])?;
//! migrator.update_parameters(|parameters| parameters.downtime_limit = 100)?;
//! migrator.migrate("tcp:192.0.2.7:4444".parse()?)?; // Returns at once.
//! let info = migrator.wait();
//! assert_eq!(info.status, Some(MigrationStatus::Completed));
//! # Ok(())
//! # }
//! ```
//!
//! At the other end a VM is made with the same RAM blocks, given to a [`Migrator`] as
//! [`Start::Incoming`], and told where to wait with [`Migrator::incoming`]. [`kept`] takes VMs of
//! any kind into files and out of them; [`rescue`] is for when one side of a postcopy is gone for
//! good.
mod address;
mod channel;
mod colo;
mod destination;
mod error;
#[cfg(feature = "fuzzing")]
#[doc(hidden)]
pub mod fuzzing;
mod global_state;
mod guest;
mod hello;
pub mod kept;
mod latency;
mod loaders;
mod migrator;
mod objects;
mod own_devices;
mod packing;
mod plan;
mod recovery;
mod report;
pub mod rescue;
mod settings;
mod source;
mod status;
mod vm;
mod worker;

pub use address::{Address, AddressError, MigrationAddress, MigrationChannel, SocketAddress};
pub use channel::tls::{
    Authorization, Format as AuthorizationFormat, Policy as AuthorizationPolicy, TlsCredentials,
    TlsEndpoint, TlsOptions,
};
#[doc(hidden)]
pub use channel::unix_socket;
pub use colo::output::{Outlet, Output, OutputStats};
pub use error::Error;
pub use loaders::{LoadRule, Loaders};
pub use migrator::{Migrator, Start, Subscription};
pub use objects::Object;
pub use packing::UnpackError;
pub use settings::{
    AutoRecover, Capabilities, Capability, ColoFailover, ColoOutput, MultifdCompression,
    Parameters, SettingError, ZeroPageDetection,
};
pub use status::{
    AnswerStats, ColoExitReason, ColoMode, ColoStats, ColoStatus, Event, FaultStats, Latency,
    MigrationInfo, MigrationStats, MigrationStatus, RunState, SocketAddressInfo, XbzrleCacheStats,
};
pub use vm::{DeviceState, Vm, VmError};
