//! Commands: what the source tells the destination to do, on the main channel.

use alloc::vec::Vec;

use crate::cursor::{Cursor, Stop, bad};
use crate::recovery::Identity;
use crate::section::mark;
use crate::{BlockOffset, ErrorKind, HEADER_MAX, Name};

/// A command of the source.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Command {
    /// The destination may answer on the reverse direction of this connection.
    OpenReturnPath,
    /// Answer with a PONG of the same value.
    Ping(u32),
    /// A postcopy may follow. `None` when only dirty bitmaps are sent after the switch.
    PostcopyAdvise(Option<PageSizes>),
    /// Take pages while the rest of the package loads.
    PostcopyListen,
    /// Run the guest.
    PostcopyRun,
    /// These parts of a block will be sent again: throw them away.
    RamDiscard(RamDiscard),
    /// So many bytes follow, which are a stream of their own.
    Packaged {
        /// Length of the package in bytes.
        len: u32,
    },
    /// COLO follows (sources up to 10.2).
    EnableColo,
    /// Recovery: the source goes on.
    PostcopyResume,
    /// Recovery: say which pages of this block have arrived.
    RecvBitmap(Name),
    /// The source has stopped the guest; the last data follows.
    SwitchoverStart,
    /// What makes this migration itself, for a recovery. Between whimbrels only.
    Identity(Identity),
}

/// What POSTCOPY_ADVISE says of the source's page sizes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PageSizes {
    /// The page sizes of all RAM blocks, or-ed together.
    pub host_summary: u64,
    /// The guest's page size.
    pub target: u64,
}

/// Parts of one RAM block that the destination must forget.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RamDiscard {
    /// The block.
    pub block: Name,
    /// At least one range, at most [`RamDiscard::RANGES_LIMIT`].
    pub ranges: Vec<DiscardRange>,
}

/// A range of a RAM block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DiscardRange {
    /// Its start.
    pub start: BlockOffset,
    /// Its length in bytes.
    pub length: u64,
}

impl RamDiscard {
    /// As many ranges as QEMU puts in one command: send no more than this to a peer.
    pub const RANGES_MAX: usize = 12;
    /// As many ranges as are taken from a peer: what fits [`HEADER_MAX`] under the longest name.
    pub const RANGES_LIMIT: usize = (PAYLOAD_MAX - 3 - Name::MAX) / 16;
    const VERSION: u8 = 0;
    const LEN_MIN: u16 = 20;

    fn encode(&self, payload: &mut Vec<u8>) {
        assert!(
            (1..=Self::RANGES_LIMIT).contains(&self.ranges.len()),
            "a discard has a range, and not too many for one command"
        );
        payload.push(Self::VERSION);
        self.block.encode(payload);
        payload.push(0);
        for range in &self.ranges {
            payload.extend_from_slice(&range.start.0.to_be_bytes());
            payload.extend_from_slice(&range.length.to_be_bytes());
        }
    }

    fn parse(cursor: &mut Cursor<'_>, end: usize) -> Result<Self, Stop> {
        let start = cursor.at();
        cursor.mark(Self::VERSION, "version 0 of POSTCOPY_RAM_DISCARD")?;
        let block = cursor.name()?;
        cursor.mark(0, "the zero byte after the block name")?;
        let mut ranges = Vec::new();
        while cursor.at() < end {
            let at = cursor.at();
            let range = DiscardRange { start: BlockOffset(cursor.be64()?), length: cursor.be64()? };
            if range.length == 0 || range.start.0.checked_add(range.length).is_none() {
                let expected = "the length of a range inside the block";
                return bad(at + 8, ErrorKind::Unexpected { expected, found: range.length });
            }
            if ranges.len() == Self::RANGES_LIMIT {
                let limit = Self::RANGES_LIMIT as u64;
                return bad(at, ErrorKind::TooLarge { what: "ranges", found: limit + 1, limit });
            }
            ranges.push(range);
        }
        if ranges.is_empty() || cursor.at() != end {
            let found = u16::try_from(end - start).unwrap_or(u16::MAX);
            let command = "POSTCOPY_RAM_DISCARD";
            let expected = "3 bytes, the name and 16 bytes for each range";
            return bad(start, ErrorKind::CommandLength { command, expected, found });
        }
        Ok(Self { block, ranges })
    }
}

impl Command {
    /// QEMU's name of the command.
    #[must_use]
    pub const fn name(&self) -> &'static str {
        name_of(self.number())
    }

    const fn number(&self) -> u16 {
        match self {
            Self::OpenReturnPath => 1,
            Self::Ping(_) => 2,
            Self::PostcopyAdvise(_) => 3,
            Self::PostcopyListen => 4,
            Self::PostcopyRun => 5,
            Self::RamDiscard(_) => 6,
            Self::Packaged { .. } => 7,
            Self::EnableColo => 8,
            Self::PostcopyResume => 9,
            Self::RecvBitmap(_) => 10,
            Self::SwitchoverStart => 11,
            Self::Identity(_) => IDENTITY,
        }
    }

    /// Appends the command with its mark.
    ///
    /// # Panics
    /// When a discard has no range or more than [`RamDiscard::RANGES_LIMIT`].
    pub fn encode(&self, out: &mut Vec<u8>) {
        out.push(mark::COMMAND);
        out.extend_from_slice(&self.number().to_be_bytes());
        let length_at = out.len();
        out.extend_from_slice(&[0, 0]);
        match self {
            Self::Ping(value) | Self::Packaged { len: value } => {
                out.extend_from_slice(&value.to_be_bytes());
            }
            Self::PostcopyAdvise(Some(sizes)) => {
                out.extend_from_slice(&sizes.host_summary.to_be_bytes());
                out.extend_from_slice(&sizes.target.to_be_bytes());
            }
            Self::RamDiscard(discard) => discard.encode(out),
            Self::RecvBitmap(block) => block.encode(out),
            Self::Identity(identity) => identity.encode(out),
            Self::OpenReturnPath
            | Self::PostcopyAdvise(None)
            | Self::PostcopyListen
            | Self::PostcopyRun
            | Self::EnableColo
            | Self::PostcopyResume
            | Self::SwitchoverStart => {}
        }
        let len = u16::try_from(out.len() - length_at - 2).unwrap_or(u16::MAX);
        if let Some(field) = out.get_mut(length_at..length_at + 2) {
            field.copy_from_slice(&len.to_be_bytes());
        }
    }

    /// Reads what follows the mark.
    pub(crate) fn parse(cursor: &mut Cursor<'_>) -> Result<Self, Stop> {
        let at = cursor.at();
        let number = cursor.be16()?;
        let length_at = cursor.at();
        let len = cursor.be16()?;
        let expected = match number {
            1 | 4 | 5 | 8 | 9 | 11 if len != 0 => Some("0 bytes"),
            2 | 7 if len != 4 => Some("4 bytes"),
            3 if len != 0 && len != 16 => Some("16 or 0 bytes"),
            6 if len < RamDiscard::LEN_MIN => Some("20 bytes or more"),
            10 if len < 2 => Some("2 to 256 bytes"),
            IDENTITY if usize::from(len) != Identity::LEN => Some("52 bytes"),
            1..=11 | IDENTITY => None,
            _ => return bad(at, ErrorKind::UnknownCommand { found: number }),
        };
        if let Some(expected) = expected {
            let command = name_of(number);
            return bad(length_at, ErrorKind::CommandLength { command, expected, found: len });
        }
        if usize::from(len) > PAYLOAD_MAX {
            let what = "bytes of a command's payload";
            let (found, limit) = (len.into(), PAYLOAD_MAX as u64);
            return bad(length_at, ErrorKind::TooLarge { what, found, limit });
        }
        // All of the payload must be there before any of it is read, so that no field of it
        // can lie beyond the length announced and still be waited for.
        let start = cursor.at();
        let payload = cursor.bytes(len.into())?;
        Self::parse_payload(number, payload).map_err(|stop| match stop {
            Stop::Bad { at, kind } => Stop::Bad { at: start + at, kind },
            Stop::NeedMore(_) => Stop::Bad {
                at: length_at,
                kind: ErrorKind::CommandLength {
                    command: name_of(number),
                    expected: "as many bytes as its fields have",
                    found: len,
                },
            },
        })
    }

    fn parse_payload(number: u16, payload: &[u8]) -> Result<Self, Stop> {
        let mut cursor = Cursor::new(payload);
        Ok(match number {
            1 => Self::OpenReturnPath,
            2 => Self::Ping(cursor.be32()?),
            3 if payload.is_empty() => Self::PostcopyAdvise(None),
            3 => Self::PostcopyAdvise(Some(PageSizes {
                host_summary: cursor.be64()?,
                target: cursor.be64()?,
            })),
            4 => Self::PostcopyListen,
            5 => Self::PostcopyRun,
            6 => Self::RamDiscard(RamDiscard::parse(&mut cursor, payload.len())?),
            7 => Self::Packaged { len: cursor.be32()? },
            8 => Self::EnableColo,
            9 => Self::PostcopyResume,
            10 => {
                let name = cursor.name()?;
                if !cursor.is_empty() {
                    return Err(Stop::NeedMore(0));
                }
                Self::RecvBitmap(name)
            }
            11 => Self::SwitchoverStart,
            IDENTITY => match payload.first_chunk() {
                Some(identity) => Self::Identity(Identity::parse(identity)),
                None => return Err(Stop::NeedMore(0)),
            },
            other => return bad(0, ErrorKind::UnknownCommand { found: other }),
        })
    }
}

/// "WI": the number of whimbrel's own command.
const IDENTITY: u16 = 0x5749;

/// Most bytes of payload that are taken from a peer: with its mark, number and length a command
/// is a header.
const PAYLOAD_MAX: usize = HEADER_MAX - 5;

const fn name_of(number: u16) -> &'static str {
    match number {
        1 => "OPEN_RETURN_PATH",
        2 => "PING",
        3 => "POSTCOPY_ADVISE",
        4 => "POSTCOPY_LISTEN",
        5 => "POSTCOPY_RUN",
        6 => "POSTCOPY_RAM_DISCARD",
        7 => "PACKAGED",
        8 => "ENABLE_COLO",
        9 => "POSTCOPY_RESUME",
        10 => "RECV_BITMAP",
        11 => "SWITCHOVER_START",
        IDENTITY => "WHIMBREL_IDENTITY",
        _ => "(unknown)",
    }
}
