//! Pages on channels of their own: how a test has both sides set.

use std::fmt;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, ensure};
use serde_json::json;

use crate::install::Peer;
use crate::journey::{Journey, MIGRATION_MAX, Transport};
use crate::qemu::Qemu;

/// How pages are packed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Compression {
    /// As they are.
    None,
    /// By zlib, at this level.
    Zlib(u8),
    /// By zstd, at this level.
    Zstd(u8),
}

impl Compression {
    /// One of each kind.
    pub const ALL: [Self; 3] = [Self::None, Self::Zlib(1), Self::Zstd(1)];

    const fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Zlib(_) => "zlib",
            Self::Zstd(_) => "zstd",
        }
    }

    const fn level(self) -> Option<u8> {
        match self {
            Self::None => None,
            Self::Zlib(level) | Self::Zstd(level) => Some(level),
        }
    }
}

/// Who looks for pages of zeros.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ZeroPages {
    /// Nobody.
    None,
    /// The source's main thread, which tells them on the main channel.
    Legacy,
    /// The threads of the channels.
    Multifd,
}

impl ZeroPages {
    /// All kinds.
    pub const ALL: [Self; 3] = [Self::None, Self::Legacy, Self::Multifd];

    const fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Legacy => "legacy",
            Self::Multifd => "multifd",
        }
    }
}

/// The channels of one migration, and what goes over them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Multifd {
    /// How many.
    pub channels: u8,
    /// How pages are packed.
    pub compression: Compression,
    /// `None` leaves it to the machine type.
    pub zero_pages: Option<ZeroPages>,
}

impl fmt::Display for Multifd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { channels, compression, zero_pages } = self;
        write!(f, "{channels} channels, {compression:?}, zero pages {zero_pages:?}")
    }
}

impl Multifd {
    /// So many channels, and pages as they are.
    #[must_use]
    pub const fn of(channels: u8) -> Self {
        Self { channels, compression: Compression::None, zero_pages: None }
    }

    /// Every number of channels, every compression, and every way with zero pages that this peer
    /// can be told, not all with all.
    #[must_use]
    pub fn some_of_each(peer: Peer) -> Vec<Self> {
        let mut all: Vec<Self> = [1, 2, 4, 8].map(Self::of).to_vec();
        let kinds: Vec<Option<ZeroPages>> = match peer.knows_zero_page_detection() {
            true => ZeroPages::ALL.map(Some).to_vec(),
            false => vec![None],
        };
        for (compression, channels) in Compression::ALL.into_iter().zip([4, 2, 3]) {
            let more = kinds.iter().map(|&zero_pages| Self { channels, compression, zero_pages });
            all.extend(more);
        }
        // Other levels: a receiver must not mind.
        let packed = [Compression::Zlib(0), Compression::Zlib(9), Compression::Zstd(10)];
        all.extend(packed.map(|compression| Self { compression, ..Self::of(2) }));
        all
    }

    /// Tells a QEMU what both ends must agree on.
    ///
    /// # Errors
    /// QEMU's own.
    pub fn agree(&self, qemu: &mut Qemu) -> Result<()> {
        qemu.qmp.enable(&["multifd"])?;
        let parameters = json!({
            "multifd-channels": self.channels,
            "multifd-compression": self.compression.name(),
        });
        qemu.qmp.execute("migrate-set-parameters", &parameters).map(drop)
    }

    /// Tells a QEMU that is to send.
    ///
    /// # Errors
    /// QEMU's own.
    pub fn set(&self, source: &mut Qemu) -> Result<()> {
        self.agree(source)?;
        let mut parameters = json!({});
        if let Some(level) = self.compression.level() {
            parameters[format!("multifd-{}-level", self.compression.name())] = level.into();
        }
        if let Some(zero_pages) = self.zero_pages {
            parameters["zero-page-detection"] = zero_pages.name().into();
        }
        source.qmp.execute("migrate-set-parameters", &parameters).map(drop)
    }

    /// The arguments of `whimbrel receive`.
    #[must_use]
    pub fn receive(&self) -> Vec<String> {
        vec!["--multifd".to_owned(), self.channels.to_string()]
    }

    /// The arguments of `whimbrel restore`.
    #[must_use]
    pub fn restore(&self) -> Vec<String> {
        let mut arguments = self.receive();
        arguments.extend(["--compression".to_owned(), self.compression.name().to_owned()]);
        if let Some(level) = self.compression.level() {
            arguments.extend(["--level".to_owned(), level.to_string()]);
        }
        if let Some(zero_pages) = self.zero_pages {
            let name = zero_pages.name().to_owned();
            arguments.extend(["--zero-page-detection".to_owned(), name]);
        }
        arguments
    }
}

impl Journey<'_> {
    /// Moves the guest out of `source` by multifd into a file that `whimbrel receive` keeps.
    /// `halfway` is done while it is under way.
    ///
    /// # Errors
    /// Either side's own.
    pub fn keep_by_multifd(
        &self,
        source: &mut Qemu,
        transport: Transport,
        multifd: &Multifd,
        halfway: impl FnOnce(&mut Qemu) -> Result<()>,
    ) -> Result<PathBuf> {
        let kept = self.file("kept");
        let arguments = multifd.receive();
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        let (mut receiver, uri) = self.receiving_with(transport, &kept, &arguments)?;
        multifd.set(source)?;
        source.qmp.migrate(&uri)?;
        let sent = halfway(source).and_then(|()| source.wait_migrated(MIGRATION_MAX));
        if let Err(error) = sent {
            // What a receiver that has given up says is the reason; another waits for ever.
            if receiver.is_running()? {
                return Err(error);
            }
            let said = receiver.wait(MIGRATION_MAX)?.complaints;
            return Err(error.context(format!("whimbrel: {said}")));
        }
        receiver.wait(MIGRATION_MAX)?.succeeded()?;
        ensure!(kept.is_file(), "whimbrel receive ended well but kept nothing");
        Ok(kept)
    }

    /// Restores a kept guest by multifd into a QEMU that does not run it yet.
    ///
    /// # Errors
    /// Either side's own.
    pub fn restore_by_multifd(
        &self,
        kept: &Path,
        peer: Peer,
        transport: Transport,
        multifd: &Multifd,
    ) -> Result<Qemu> {
        let mut destination = self.incoming_stopped(peer)?;
        multifd.agree(&mut destination)?;
        let uri = self.listen(&mut destination, transport, &[])?;
        let kept = kept.to_str().context("a path in UTF-8")?;
        let arguments = multifd.restore();
        let arguments = arguments.iter().map(String::as_str);
        let arguments: Vec<&str> = ["restore", kept, &uri].into_iter().chain(arguments).collect();
        self.whimbrel(&arguments)?
            .succeeded()
            .with_context(|| format!("QEMU says {:?}", destination.complaint()))?;
        destination.wait_migrated(MIGRATION_MAX)?;
        Ok(destination)
    }
}
