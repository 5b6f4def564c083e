//! Telling channels apart by the first bytes that arrive on a connection.

use crate::header::FILE_MAGIC;
use crate::multifd::MULTIFD_MAGIC;
use crate::section::mark;

/// What a connection is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ChannelKind {
    /// A main channel from its start.
    Main,
    /// A multifd channel.
    Multifd,
    /// A main channel of a recovery, which begins with a command.
    RecoveringMain,
    /// Bare RAM records: the urgent channel.
    Preempt,
}

impl ChannelKind {
    /// How many bytes [`of`](Self::of) looks at.
    pub const BYTES: usize = 4;

    /// Classifies a connection; `None` when no channel begins like this.
    ///
    /// An urgent channel has no magic: its first record is at a low offset of its block, so
    /// that the first byte is zero.
    #[must_use]
    pub const fn of(first: [u8; Self::BYTES]) -> Option<Self> {
        match (u32::from_be_bytes(first), first) {
            (FILE_MAGIC, _) => Some(Self::Main),
            (MULTIFD_MAGIC, _) => Some(Self::Multifd),
            (_, [mark::COMMAND, ..]) => Some(Self::RecoveringMain),
            (_, [0, ..]) => Some(Self::Preempt),
            (_, _) => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_channel_has_its_first_bytes() {
        assert_eq!(ChannelKind::of(*b"QEVM"), Some(ChannelKind::Main));
        assert_eq!(ChannelKind::of([0x11, 0x22, 0x33, 0x44]), Some(ChannelKind::Multifd));
        assert_eq!(ChannelKind::of([8, 0, 10, 0]), Some(ChannelKind::RecoveringMain));
        assert_eq!(ChannelKind::of([0, 0, 0, 0]), Some(ChannelKind::Preempt));
        assert_eq!(ChannelKind::of(*b"GET "), None);
    }
}
