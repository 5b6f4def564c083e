//! QMP, the control protocol QEMU's users know: a [`Server`] that a VMM embeds and a [`Client`]
//! that drives whimbrel and QEMU alike.
//!
//! The server knows the protocol and nothing of migration: whatever a command does, it does
//! through [`Backend`]. No thread of a migration ever waits for it, nor it for them: replies and
//! events go through a bounded queue per client, and who does not read them is disconnected.
//!
//! Commands, arguments, replies and the texts of errors follow QEMU 10.0 for the part of QMP that
//! is about migration and running; nothing else of QMP is here.
#![forbid(unsafe_code)]

mod backend;
mod client;
mod endpoint;
mod engine;
mod error;
mod framing;
mod json;
mod server;
mod stream;

pub use backend::{Backend, EventListener, ParameterChange, Subscription};
pub use client::{Client, ClientError, MigrationReport, PeerEvent, PeerRunState, PeerStatus};
pub use endpoint::{Endpoint, EndpointError};
pub use engine::MigratorBackend;
pub use error::{ErrorClass, QmpError};
pub use server::{Server, ServerError, ServerOptions};
