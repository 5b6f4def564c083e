//! The way of one guest: out of a QEMU, into a file or another QEMU, and what must hold then.

use std::fs;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::json;
use tempfile::TempDir;

use crate::guest::Guest;
use crate::install::Peer;
use crate::memory::Backing;
use crate::qemu::{Begin, Machine, Qemu};
use crate::wait;
use crate::whimbrel::{Ended, Whimbrel};

/// From boot, or arrival, to a guest well under way, on a busy machine without KVM.
pub const SETTLE_MAX: Duration = Duration::from_secs(120);
/// For any one migration of the small guests here.
pub const MIGRATION_MAX: Duration = Duration::from_secs(60);
/// For a whimbrel to begin to listen.
const LISTEN_MAX: Duration = Duration::from_secs(20);
/// The state of a listening socket in /proc/net/tcp.
const TCP_LISTEN: &str = "0A";

/// What a migration goes over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Transport {
    /// Loopback, on a port nobody had.
    Tcp,
    /// A socket in the journey's folder.
    Unix,
}

/// A guest's journey, with a folder for all its files.
#[derive(Debug)]
pub struct Journey<'a> {
    folder: TempDir,
    machine: &'a str,
    guest: &'a dyn Guest,
    /// What its memory lies in, at the source and at the destination.
    backings: [Backing; 2],
}

impl<'a> Journey<'a> {
    /// A journey of this guest in machines of this type.
    ///
    /// # Errors
    /// No room for temporary files.
    pub fn new(machine: &'a str, guest: &'a dyn Guest) -> Result<Self> {
        let backings = [Backing::Ordinary; 2];
        Ok(Self { folder: tempfile::tempdir()?, machine, guest, backings })
    }

    /// Its memory lies in these, at the source and at the destination.
    #[must_use]
    pub fn in_memory_of(self, source: Backing, destination: Backing) -> Self {
        Self { backings: [source, destination], ..self }
    }

    /// A file of the journey.
    #[must_use]
    pub fn file(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Boots the guest and waits until it is well under way.
    ///
    /// # Errors
    /// QEMU's own, or a guest that does not get there.
    pub fn boot(&self, peer: Peer) -> Result<Qemu> {
        let Self { machine, guest, backings: [backing, _], .. } = *self;
        let machine = Machine { peer, machine, guest, backing };
        let source = machine.start(self.folder.path(), "source", Begin::Boot)?;
        source.console.wait_for(guest.settled_lines(), SETTLE_MAX)?;
        Ok(source)
    }

    /// A QEMU that has not been told yet where its guest will come from.
    ///
    /// # Errors
    /// QEMU's own.
    pub fn incoming(&self, peer: Peer) -> Result<Qemu> {
        self.incoming_as(peer, self.machine)
    }

    /// The same with another machine type.
    ///
    /// # Errors
    /// QEMU's own.
    pub fn incoming_as(&self, peer: Peer, machine: &str) -> Result<Qemu> {
        self.start_incoming(peer, machine, Begin::Incoming)
    }

    /// A QEMU that waits like [`Self::incoming`], and does not run what has come.
    ///
    /// # Errors
    /// QEMU's own.
    pub fn incoming_stopped(&self, peer: Peer) -> Result<Qemu> {
        self.start_incoming(peer, self.machine, Begin::IncomingStopped)
    }

    fn start_incoming(&self, peer: Peer, machine: &str, begin: Begin) -> Result<Qemu> {
        let Self { guest, backings: [_, backing], .. } = *self;
        let machine = Machine { peer, machine, guest, backing };
        machine.start(self.folder.path(), "destination", begin)
    }

    /// A QEMU that waits for a migration, and the URI it waits at.
    ///
    /// # Errors
    /// QEMU's own.
    pub fn waiting(
        &self,
        peer: Peer,
        transport: Transport,
        capabilities: &[&str],
    ) -> Result<(Qemu, String)> {
        let mut destination = self.incoming(peer)?;
        let uri = self.listen(&mut destination, transport, capabilities)?;
        Ok((destination, uri))
    }

    /// Has a QEMU wait for a migration, and gives the URI it waits at.
    ///
    /// # Errors
    /// QEMU's own.
    pub fn listen(
        &self,
        destination: &mut Qemu,
        transport: Transport,
        capabilities: &[&str],
    ) -> Result<String> {
        let uri = match transport {
            Transport::Tcp => "tcp:127.0.0.1:0".to_owned(),
            Transport::Unix => format!("unix:{}", self.file("destination.migration").display()),
        };
        destination.listen(&uri, capabilities)
    }

    /// Starts `whimbrel receive --store` of this file, and waits until it listens.
    ///
    /// # Errors
    /// It does not get there.
    pub fn receiving(&self, transport: Transport, kept: &Path) -> Result<(Whimbrel, String)> {
        self.receiving_with(transport, kept, &[])
    }

    /// The same with more arguments.
    ///
    /// # Errors
    /// It does not get there.
    pub fn receiving_with(
        &self,
        transport: Transport,
        kept: &Path,
        more: &[&str],
    ) -> Result<(Whimbrel, String)> {
        let kept = kept.to_str().context("a path in UTF-8")?;
        let socket = self.file("whimbrel.migration");
        let port = free_port()?;
        let uri = match transport {
            Transport::Tcp => format!("tcp:127.0.0.1:{port}"),
            Transport::Unix => format!("unix:{}", socket.display()),
        };
        let arguments = [&["receive", &uri, "--store", kept], more].concat();
        let mut receiver = Whimbrel::start(self.folder.path(), "receive", &arguments)?;
        wait::until(&format!("whimbrel receive to listen at {uri}"), LISTEN_MAX, || {
            // An attempt to connect would be taken for the migration.
            let listens = match transport {
                Transport::Tcp => is_listening(port)?,
                Transport::Unix => socket.exists(),
            };
            if !listens && !receiver.is_running()? {
                receiver.wait(LISTEN_MAX)?.succeeded()?;
                bail!("whimbrel receive ended well before anything came");
            }
            Ok(listens.then_some(()))
        })?;
        Ok((receiver, uri))
    }

    /// Moves the guest out of `source` into a file that `whimbrel receive` keeps.
    ///
    /// # Errors
    /// Either side's own.
    pub fn keep(
        &self,
        source: &mut Qemu,
        transport: Transport,
        capabilities: &[&str],
    ) -> Result<PathBuf> {
        let kept = self.file("kept");
        let (mut receiver, uri) = self.receiving(transport, &kept)?;
        source.migrate_away(&uri, capabilities, MIGRATION_MAX)?;
        receiver.wait(MIGRATION_MAX)?.succeeded()?;
        ensure!(kept.is_file(), "whimbrel receive ended well but kept nothing");
        Ok(kept)
    }

    /// Runs `whimbrel` with these arguments to its end.
    ///
    /// # Errors
    /// It has not been built, or takes too long. A refusal is not an error here.
    pub fn whimbrel(&self, arguments: &[&str]) -> Result<Ended> {
        self.start_whimbrel(arguments)?.wait(MIGRATION_MAX)
    }

    /// Starts `whimbrel` with these arguments.
    ///
    /// # Errors
    /// It has not been built.
    pub fn start_whimbrel(&self, arguments: &[&str]) -> Result<Whimbrel> {
        let name = arguments.first().context("a subcommand")?;
        Whimbrel::start(self.folder.path(), name, arguments)
    }

    /// Restores a kept guest into a fresh QEMU, and waits until it has arrived.
    ///
    /// # Errors
    /// Either side's own.
    pub fn restore(
        &self,
        kept: &Path,
        peer: Peer,
        transport: Transport,
        capabilities: &[&str],
    ) -> Result<Qemu> {
        let (mut destination, uri) = self.waiting(peer, transport, capabilities)?;
        let kept = kept.to_str().context("a path in UTF-8")?;
        self.whimbrel(&["restore", kept, &uri])?
            .succeeded()
            .with_context(|| format!("QEMU says {:?}", destination.complaint()))?;
        destination.wait_migrated(MIGRATION_MAX)?;
        Ok(destination)
    }

    /// A QEMU that starts from a mapped-ram file, by itself.
    ///
    /// # Errors
    /// QEMU's own.
    pub fn start_from(&self, kept: &Path, peer: Peer) -> Result<Qemu> {
        let mut destination = self.incoming(peer)?;
        destination.listen(&format!("file:{}", kept.display()), &["mapped-ram"])?;
        destination.wait_migrated(MIGRATION_MAX)?;
        Ok(destination)
    }

    /// Has `source` write its guest into a file, by itself.
    ///
    /// # Errors
    /// QEMU's own.
    pub fn write_file(&self, source: &mut Qemu, peer: Peer, mapped_ram: bool) -> Result<PathBuf> {
        let path = self.file("written-by-qemu");
        let capabilities: &[&str] = if mapped_ram { &["mapped-ram"] } else { &[] };
        // A file as a transport came with mapped-ram.
        let uri = match peer.knows_mapped_ram() {
            true => format!("file:{}", path.display()),
            false => format!("exec:cat > {}", path.display()),
        };
        // What a running guest writes while it is being kept would be sent again and again.
        source.qmp.execute("migrate-set-parameters", &json!({ "max-bandwidth": 0 }))?;
        source.migrate_away(&uri, capabilities, MIGRATION_MAX)?;
        Ok(path)
    }

    /// Waits until the guest is well under way again, and checks all it said.
    ///
    /// # Errors
    /// What shows that it did not go on where it stopped.
    pub fn check_arrived(&self, source: &Qemu, destination: &Qemu) -> Result<()> {
        destination
            .console
            .wait_for(self.guest.settled_lines(), SETTLE_MAX)
            .with_context(|| format!("QEMU says {:?}", destination.complaint()))?;
        self.guest.check_continues(&source.console.written(), &destination.console.written())
    }
}

/// A port that was free a moment ago.
///
/// # Errors
/// None is.
pub fn free_port() -> Result<u16> {
    Ok(TcpListener::bind(("127.0.0.1", 0))?.local_addr()?.port())
}

fn is_listening(port: u16) -> Result<bool> {
    let mut sockets = fs::read_to_string("/proc/net/tcp")?;
    sockets += &fs::read_to_string("/proc/net/tcp6").unwrap_or_default();
    let ours = format!(":{port:04X}");
    // sl local_address rem_address st ..
    Ok(sockets.lines().map(|line| line.split_whitespace().collect::<Vec<_>>()).any(
        |columns| matches!(columns[..], [_, local, _, TCP_LISTEN, ..] if local.ends_with(&ours)),
    ))
}
