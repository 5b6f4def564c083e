//! What can go wrong between a client and its peer.

use std::io;
use std::time::Duration;

use crate::Endpoint;

/// Why a client could not do what was asked of it.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Nobody answers there.
    #[error("cannot connect to the QMP socket {endpoint}: {cause}")]
    Connect {
        /// Where.
        endpoint: Endpoint,
        /// Why.
        #[source]
        cause: io::Error,
    },
    /// Whoever answers does not speak QMP, or sent something that is none.
    #[error("{endpoint}: waiting for {awaited}, found what is no QMP: {found}")]
    NotQmp {
        /// Where.
        endpoint: Endpoint,
        /// What was awaited.
        awaited: String,
        /// What came, or the beginning of it.
        found: String,
    },
    /// The peer refused a command, or the client itself.
    #[error("{endpoint}: {awaited} was refused: {desc} ({class})")]
    Refused {
        /// Where.
        endpoint: Endpoint,
        /// The command.
        awaited: String,
        /// QMP's class, for a program.
        class: String,
        /// The peer's text.
        desc: String,
    },
    /// The peer answered a command with something else than QMP says it does.
    #[error("{endpoint}: the reply to {command} is not understood: {cause}")]
    Reply {
        /// Where.
        endpoint: Endpoint,
        /// The command.
        command: String,
        /// Why.
        #[source]
        cause: serde_json::Error,
    },
    /// The peer is silent. It may be busy, and may have another client whom alone it serves.
    #[error("{endpoint}: no {awaited} within {} ms", .limit.as_millis())]
    TimedOut {
        /// Where.
        endpoint: Endpoint,
        /// What was awaited.
        awaited: String,
        /// For how long.
        limit: Duration,
    },
    /// The peer closed the connection.
    #[error("{endpoint}: disconnected while waiting for {awaited}")]
    Closed {
        /// Where.
        endpoint: Endpoint,
        /// What was awaited.
        awaited: String,
    },
    /// The connection failed.
    #[error("{endpoint}: waiting for {awaited}: {cause}")]
    Connection {
        /// Where.
        endpoint: Endpoint,
        /// What was awaited.
        awaited: String,
        /// How.
        #[source]
        cause: io::Error,
    },
}

impl ClientError {
    /// Whether the connection is over, so that only a new client can go on.
    pub fn is_disconnect(&self) -> bool {
        match self {
            ClientError::Connect { .. }
            | ClientError::NotQmp { .. }
            | ClientError::Closed { .. }
            | ClientError::Connection { .. } => true,
            ClientError::Refused { .. }
            | ClientError::Reply { .. }
            | ClientError::TimedOut { .. } => false,
        }
    }
}
