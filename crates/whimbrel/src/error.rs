//! What can go wrong, where, and what to do.

use std::io;

use whimbrel_ram::BlockError;

use crate::address::{Address, AddressError};
use crate::settings::SettingError;
use crate::vm::VmError;

/// Why a migration was refused or failed. The text is one line: what, where, what to do.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The bytes of a channel are not what the protocol has at that place.
    #[error("{channel} channel, {source}")]
    Protocol {
        /// The channel's name.
        channel: &'static str,
        /// Where in the stream, what was expected and what was found.
        source: whimbrel_wire::Error,
    },
    /// A delta does not fit its page.
    #[error("{channel} channel, byte {offset}: {source}")]
    Delta {
        /// The channel's name.
        channel: &'static str,
        /// Where in the stream.
        offset: u64,
        /// What was expected and what was found.
        source: whimbrel_wire::xbzrle::DeltaError,
    },
    /// The data of a multifd packet do not give its pages.
    #[error("{channel} channel, byte {offset}: {source}")]
    Packet {
        /// The channel's name.
        channel: &'static str,
        /// Where in the stream.
        offset: u64,
        /// What was expected and what was found.
        source: crate::packing::UnpackError,
    },
    /// A channel failed.
    #[error("{channel} channel, byte {offset}: {source}{}", said_of_a_close(source))]
    Channel {
        /// The channel's name.
        channel: &'static str,
        /// How many bytes had passed.
        offset: u64,
        /// What the system said.
        source: io::Error,
    },
    /// The stream ended too early.
    #[error(
        "{channel} channel, byte {offset}: the stream ends here, expected {expected}: \
         the other side broke off, see what it says"
    )]
    Ended {
        /// The channel's name.
        channel: &'static str,
        /// How many bytes had come.
        offset: u64,
        /// What should have come next.
        expected: String,
    },
    /// The other side took nothing of what was sent, or said nothing where it had to.
    #[error(
        "{channel} channel: nothing has come through for {} s: the link or the other side hangs \
         (silence-limit)",
        limit.as_secs_f32()
    )]
    Silent {
        /// The channel's name.
        channel: &'static str,
        /// For how long.
        limit: std::time::Duration,
    },
    /// A secret channel broke, or was cut, before the peer had said that nothing more comes.
    #[error(
        "{channel} channel, byte {offset}: the connection ends here, without the close_notify by \
         which TLS tells an end from a cut: see what the other side says"
    )]
    Truncated {
        /// The channel's name.
        channel: &'static str,
        /// How many bytes had come.
        offset: u64,
    },
    /// The TLS of a channel failed.
    #[error("{channel} channel, TLS: {reason}")]
    Tls {
        /// The channel's name.
        channel: &'static str,
        /// What is wrong, and what to do.
        reason: String,
    },
    /// TLS credentials cannot be used.
    #[error("{}: {reason}", path.display())]
    Credentials {
        /// The file.
        path: std::path::PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// An address could not be reached, bound or opened.
    #[error("{address}: {source}{hint}")]
    Open {
        /// The address.
        address: Address,
        /// What the system said.
        source: io::Error,
        /// What to do about it.
        hint: &'static str,
    },
    /// An `exec:` command failed.
    #[error("{address}: the command ended with {status}")]
    Command {
        /// The address.
        address: Address,
        /// How it ended.
        status: String,
    },
    /// The VMM failed.
    #[error("{doing}: {source}")]
    Vm {
        /// What it was asked to do.
        doing: &'static str,
        /// What it said.
        source: VmError,
    },
    /// A dirty log failed.
    #[error("dirty log: {0}")]
    DirtyLog(#[source] io::Error),
    /// RAM could not be had or reached.
    #[error(transparent)]
    Ram(#[from] BlockError),
    /// What the source announces does not fit the machine that waits here.
    #[error("{what}: the source has {source_has}, here it is {here}")]
    Mismatch {
        /// What was compared.
        what: String,
        /// At the source.
        source_has: String,
        /// At this destination.
        here: String,
    },
    /// The other side said that it failed.
    #[error("the destination reported a failure: see what it says")]
    PeerFailed,
    /// The other side closed its direction.
    #[error("the destination closed the connection before it had everything: see what it says")]
    PeerGone,
    /// The other side did not answer.
    #[error("the destination did not answer within {0} s")]
    PeerSilent(u64),
    /// The guest may run at the destination: it stays stopped here.
    #[error(
        "{cause}; the guest had been handed over and may be running at the destination: \
         it stays stopped here ('cont' runs it here, if it is certain that it does not run there)"
    )]
    InDoubt {
        /// What happened after the hand-over.
        cause: Box<Error>,
    },
    /// Ended on request.
    #[error("the migration was cancelled")]
    Cancelled,
    /// Not possible in this state.
    #[error("{0}")]
    Refused(String),
    /// A capability or parameter is refused.
    #[error(transparent)]
    Setting(#[from] SettingError),
    /// A text is no address.
    #[error(transparent)]
    Address(#[from] AddressError),
    /// A kept VM's file is wrong or cannot be used.
    #[error("{}: {reason}", path.display())]
    Kept {
        /// The file.
        path: std::path::PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// The system refused what every migration needs.
    #[error("{doing}: {source}")]
    System {
        /// What was tried.
        doing: &'static str,
        /// What the system said.
        source: io::Error,
    },
}

/// What to do about a connection that the other side closed while it was sent something.
fn said_of_a_close(source: &io::Error) -> &'static str {
    match source.kind() {
        io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset => {
            ": the other side closed it, see what it says"
        }
        _ => "",
    }
}

impl Error {
    pub(crate) fn system(doing: &'static str) -> impl FnOnce(io::Error) -> Error {
        move |source| Error::System { doing, source }
    }

    /// Whether it may be nobody's doing but the link's.
    pub(crate) fn is_of_the_link(&self) -> bool {
        matches!(
            self,
            Error::Channel { .. }
                | Error::Ended { .. }
                | Error::Truncated { .. }
                | Error::Tls { .. }
                | Error::Silent { .. }
                | Error::Cancelled
        )
    }

    /// Why a postcopy has paused.
    pub(crate) fn text_of_pause(&self) -> String {
        match self {
            Error::Cancelled => "the connections were broken on request".into(),
            other => other.to_string(),
        }
    }

    pub(crate) fn vm(doing: &'static str) -> impl FnOnce(VmError) -> Error {
        move |source| Error::Vm { doing, source }
    }
}
