//! COLO: the words by which primary and secondary agree on a checkpoint.
//!
//! They follow the precopy stream on the main connection, and on its reverse direction the
//! return path's SHUT.

use alloc::vec::Vec;

use crate::ErrorKind;
use crate::cursor::{Cursor, Stop, bad};

/// A word of COLO.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ColoMessage {
    /// The secondary runs (secondary to primary, once).
    CheckpointReady,
    /// A checkpoint begins (primary to secondary).
    CheckpointRequest,
    /// The secondary has stopped its guest.
    CheckpointReply,
    /// RAM follows: the sections of a checkpoint, up to EOF (primary to secondary).
    VmstateSend,
    /// So many bytes of device state follow (primary to secondary).
    VmstateSize(u64),
    /// The secondary holds the whole checkpoint.
    VmstateReceived,
    /// The secondary has loaded it and runs.
    VmstateLoaded,
    /// Whimbrel's own: dirty pages follow ahead of the next checkpoint, a section up to EOF (primary to
    /// secondary, between two checkpoints).
    PagesAhead,
}

/// No word of QEMU's.
const PAGES_AHEAD: u32 = 0x5748_4150;

impl ColoMessage {
    const fn number(self) -> u32 {
        match self {
            Self::CheckpointReady => 0,
            Self::CheckpointRequest => 1,
            Self::CheckpointReply => 2,
            Self::VmstateSend => 3,
            Self::VmstateSize(_) => 4,
            Self::VmstateReceived => 5,
            Self::VmstateLoaded => 6,
            Self::PagesAhead => PAGES_AHEAD,
        }
    }

    /// Appends the word, and the size if it has one.
    pub fn encode(self, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.number().to_be_bytes());
        if let Self::VmstateSize(size) = self {
            out.extend_from_slice(&size.to_be_bytes());
        }
    }

    /// Reads one word and its size.
    pub(crate) fn parse(cursor: &mut Cursor<'_>) -> Result<Self, Stop> {
        let at = cursor.at();
        Ok(match cursor.be32()? {
            0 => Self::CheckpointReady,
            1 => Self::CheckpointRequest,
            2 => Self::CheckpointReply,
            3 => Self::VmstateSend,
            4 => Self::VmstateSize(cursor.be64()?),
            5 => Self::VmstateReceived,
            6 => Self::VmstateLoaded,
            PAGES_AHEAD => Self::PagesAhead,
            other => {
                let expected = "a COLO message of 0 to 6";
                return bad(at, ErrorKind::Unexpected { expected, found: other.into() });
            }
        })
    }
}

/// Which word the primary sends next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ColoStep {
    Request,
    Send,
    Size,
}

impl ColoStep {
    /// The step after a word; the primary sends three of them in turn, and pages before the first.
    pub(crate) fn take(self, message: ColoMessage) -> Result<Self, ErrorKind> {
        let (next, expected) = match self {
            Self::Request => (Self::Send, "CHECKPOINT_REQUEST (1)"),
            Self::Send => (Self::Size, "VMSTATE_SEND (3)"),
            Self::Size => (Self::Request, "VMSTATE_SIZE (4)"),
        };
        match (self, message) {
            (Self::Request, ColoMessage::PagesAhead) => Ok(self),
            (Self::Request, ColoMessage::CheckpointRequest)
            | (Self::Send, ColoMessage::VmstateSend)
            | (Self::Size, ColoMessage::VmstateSize(_)) => Ok(next),
            (Self::Request | Self::Send | Self::Size, other) => {
                Err(ErrorKind::Unexpected { expected, found: other.number().into() })
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_go_ahead_of_a_checkpoint_and_not_into_it() {
        let request = ColoStep::Request;
        assert_eq!(request.take(ColoMessage::PagesAhead), Ok(request));
        let send = request.take(ColoMessage::CheckpointRequest).unwrap();
        assert!(send.take(ColoMessage::PagesAhead).is_err());
        let size = send.take(ColoMessage::VmstateSend).unwrap();
        assert!(size.take(ColoMessage::PagesAhead).is_err());
        assert_eq!(size.take(ColoMessage::VmstateSize(7)), Ok(request));
        let mut bytes = Vec::new();
        ColoMessage::PagesAhead.encode(&mut bytes);
        assert_eq!(
            ColoMessage::parse(&mut Cursor::new(&bytes)).ok(),
            Some(ColoMessage::PagesAhead)
        );
    }
}
