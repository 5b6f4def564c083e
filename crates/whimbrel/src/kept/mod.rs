//! Kept VMs: migrations that end in a file, and begin from one.
//!
//! The file is QEMU's own mapped-ram format, in which every page has a fixed place: a stock QEMU
//! of 9.0 or later starts from it by itself.

mod keeper;
mod layout;
mod open;
mod restore;

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

pub use open::KeptVm;

use crate::address::Address;
use crate::channel::Listener;
use crate::destination::incoming::Incoming;
use crate::error::Error;
use crate::report::{Report, Side};
use crate::status::{MigrationInfo, SocketAddressInfo};
use crate::worker::Cancel;

/// Takes one migration in and keeps it. Made first, so that the address is bound before the
/// source is told to connect.
#[derive(Debug)]
pub struct Receiver {
    listener: Listener,
    cancel: Cancel,
    placed: Arc<AtomicU64>,
}

/// What has been kept.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KeptSummary {
    /// The machine type's full name.
    pub machine: String,
    /// Bytes of RAM, all blocks together.
    pub ram_bytes: u64,
    /// Bytes of RAM that are not zero, and so are in the file.
    pub stored_bytes: u64,
    /// Device sections.
    pub devices: usize,
}

/// Ends what a [`Receiver`] or [`KeptVm`] does, from another thread.
#[derive(Clone, Debug)]
pub struct Stop(Cancel);

impl Stop {
    /// Ends it: the operation returns [`Error::Cancelled`] and leaves nothing half written.
    pub fn stop(&self) {
        self.0.set();
    }
}

impl Receiver {
    /// Binds `address`.
    pub fn bind(address: &Address) -> Result<Receiver, Error> {
        let cancel = Cancel::new().map_err(Error::system("making an eventfd"))?;
        let listener = Listener::bind(address, &cancel)?;
        Ok(Receiver { listener, cancel, placed: Arc::default() })
    }

    /// Where it listens, the port chosen included; `None` for what is not listened to.
    pub fn socket_address(&self) -> Option<SocketAddressInfo> {
        self.listener.socket_address()
    }

    /// What ends it from another thread.
    pub fn stopper(&self) -> Stop {
        Stop(self.cancel.clone())
    }

    /// Bytes of RAM placed so far, to be read while [`receive`](Receiver::receive) runs.
    pub fn progress(&self) -> Arc<AtomicU64> {
        self.placed.clone()
    }

    /// Waits for the source, takes everything in, and writes it to `path` before the source is
    /// told that it has arrived. On any error the source keeps its guest, and `path` is untouched.
    pub fn receive(self, path: &Path) -> Result<KeptSummary, Error> {
        let mut keeper = keeper::Keeper::new(path);
        let channel = self.listener.accept("main", &self.cancel)?;
        let mut incoming = Incoming::new(channel).with_progress(self.placed);
        let kept = incoming.receive(&mut keeper).and_then(|()| keeper.keep());
        if kept.is_err() {
            incoming.fail();
            return kept;
        }
        // It is on the disk: a source that has gone cannot change that.
        let _ = incoming.finish();
        kept
    }
}

/// How a kept VM's way out went (the fields of `query-migrate`).
pub(crate) fn report() -> Report {
    Report::new(Side::Source)
}

/// A report to be read while a kept VM is sent.
#[derive(Clone, Debug)]
pub struct Progress(Arc<Report>);

impl Progress {
    /// As of now.
    pub fn info(&self) -> MigrationInfo {
        self.0.info()
    }
}
