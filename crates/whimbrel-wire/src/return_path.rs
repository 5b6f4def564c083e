//! The return path: what the destination tells the source, on the reverse of the main channel.

use alloc::vec::Vec;
use core::num::NonZeroUsize;

use crate::colo::ColoMessage;
use crate::cursor::{Cursor, Stop, bad};
use crate::{BlockOffset, Error, ErrorKind, Name, TargetPage};

/// Longest payload of a frame, as QEMU's sources limit it.
pub const RETURN_PAYLOAD_MAX: usize = 512;

/// The 64-bit mark behind a bitmap of received pages.
const BITMAP_END: u64 = 0x0123_4567_89ab_cdef;

/// Largest bitmap that is taken: that of a block of 64 TiB in 4 KiB pages.
const BITMAP_MAX: u64 = 2 << 30;

/// A message of the destination.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ReturnMessage {
    /// The last message: 0 when all went well.
    Shut(u32),
    /// The answer to a PING of the same value.
    Pong(u32),
    /// A fault: send these bytes of this block first.
    RequestPagesOf {
        /// The block, which later requests mean when they name none.
        block: Name,
        /// Where the host page begins.
        start: BlockOffset,
        /// Its length in bytes.
        len: u32,
    },
    /// A fault in the block that was named last on this connection.
    RequestPages {
        /// Where the host page begins.
        start: BlockOffset,
        /// Its length in bytes.
        len: u32,
    },
    /// The bitmap of received pages of this block follows.
    RecvBitmap(Name),
    /// The destination is ready to go on: 1.
    ResumeAck(u32),
    /// The destination's devices agree to the switchover.
    SwitchoverAck,
}

impl ReturnMessage {
    const fn number(&self) -> u16 {
        match self {
            Self::Shut(_) => 1,
            Self::Pong(_) => 2,
            Self::RequestPagesOf { .. } => 3,
            Self::RequestPages { .. } => 4,
            Self::RecvBitmap(_) => 5,
            Self::ResumeAck(_) => 6,
            Self::SwitchoverAck => 7,
        }
    }

    /// Appends the frame.
    pub fn encode(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.number().to_be_bytes());
        let name_len = |name: &Name| 1 + u16::from(name.length_byte());
        let len = match self {
            Self::Shut(_) | Self::Pong(_) | Self::ResumeAck(_) => 4,
            Self::RequestPagesOf { block, .. } => 12 + name_len(block),
            Self::RequestPages { .. } => 12,
            Self::RecvBitmap(block) => name_len(block),
            Self::SwitchoverAck => 0,
        };
        out.extend_from_slice(&len.to_be_bytes());
        match self {
            Self::Shut(value) | Self::Pong(value) | Self::ResumeAck(value) => {
                out.extend_from_slice(&value.to_be_bytes());
            }
            Self::RequestPages { start, len } | Self::RequestPagesOf { start, len, .. } => {
                out.extend_from_slice(&start.0.to_be_bytes());
                out.extend_from_slice(&len.to_be_bytes());
            }
            Self::RecvBitmap(_) | Self::SwitchoverAck => {}
        }
        if let Self::RequestPagesOf { block, .. } | Self::RecvBitmap(block) = self {
            block.encode(out);
        }
    }

    /// Reads one frame.
    fn parse(cursor: &mut Cursor<'_>) -> Result<Self, Stop> {
        let number = cursor.be16()?;
        if !(1..=7).contains(&number) {
            let expected = "a return path message of 1 to 7";
            return bad(0, ErrorKind::Unexpected { expected, found: number.into() });
        }
        let at = cursor.at();
        let len = cursor.be16()?;
        let expected = match number {
            1 | 2 | 6 if len != 4 => Some("4 bytes of payload"),
            3 if !(14..=268).contains(&len) => Some("14 to 268 bytes of payload"),
            4 if len != 12 => Some("12 bytes of payload"),
            5 if !(2..=256).contains(&len) => Some("2 to 256 bytes of payload"),
            7 if len != 0 => Some("0 bytes of payload"),
            _ => None,
        };
        if let Some(expected) = expected {
            return bad(at, ErrorKind::Unexpected { expected, found: len.into() });
        }
        let start = cursor.at();
        let payload = cursor.bytes(len.into())?;
        let mut inside = Cursor::new(payload);
        let message = Self::parse_payload(number, &mut inside).map_err(|stop| match stop {
            Stop::Bad { at, kind } => Stop::Bad { at: start + at, kind },
            Stop::NeedMore(_) => length_mismatch(at, len),
        })?;
        if inside.is_empty() { Ok(message) } else { Err(length_mismatch(at, len)) }
    }

    fn parse_payload(number: u16, cursor: &mut Cursor<'_>) -> Result<Self, Stop> {
        Ok(match number {
            1 => Self::Shut(cursor.be32()?),
            2 => Self::Pong(cursor.be32()?),
            3 => {
                let (start, len) = (BlockOffset(cursor.be64()?), cursor.be32()?);
                Self::RequestPagesOf { block: cursor.name()?, start, len }
            }
            4 => Self::RequestPages { start: BlockOffset(cursor.be64()?), len: cursor.be32()? },
            5 => Self::RecvBitmap(cursor.name()?),
            6 => Self::ResumeAck(cursor.be32()?),
            _ => Self::SwitchoverAck,
        })
    }
}

const fn length_mismatch(at: usize, len: u16) -> Stop {
    let expected = "a payload as long as its fields";
    Stop::Bad { at, kind: ErrorKind::Unexpected { expected, found: len as u64 } }
}

/// Appends the size of a bitmap of received pages, which follows its
/// [`ReturnMessage::RecvBitmap`]. The bitmap comes after it (see [`crate::page_bitmap`]), then
/// [`encode_bitmap_end`].
pub fn encode_bitmap_size(bytes: u64, out: &mut Vec<u8>) {
    out.extend_from_slice(&bytes.to_be_bytes());
}

/// Appends the mark that closes a bitmap of received pages.
pub fn encode_bitmap_end(out: &mut Vec<u8>) {
    out.extend_from_slice(&BITMAP_END.to_be_bytes());
}

/// What [`ReturnDecoder::decode`] found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ReturnDecoded {
    /// Come back when the input has at least so many bytes; at most 4 + 512.
    NeedMore(NonZeroUsize),
    /// A message.
    Message(ReturnMessage),
    /// So many bytes follow, the bitmap of the block just named: the caller takes them.
    BitmapFollows {
        /// A multiple of 8.
        len: u64,
    },
    /// The bitmap was complete.
    BitmapEnd,
    /// A word of COLO, after SHUT.
    Colo(ColoMessage),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Frame,
    BitmapSize,
    BitmapEnd,
    Colo,
    End,
}

/// Reads the return path at the source.
#[derive(Debug)]
pub struct ReturnDecoder {
    page: TargetPage,
    colo: bool,
    state: State,
    block_named: bool,
    offset: u64,
    payload: u64,
}

impl ReturnDecoder {
    /// For a new connection.
    #[must_use]
    pub const fn new(page: TargetPage) -> Self {
        let state = State::Frame;
        Self { page, colo: false, state, block_named: false, offset: 0, payload: 0 }
    }

    /// For a connection on which COLO's words follow SHUT.
    #[must_use]
    pub const fn with_colo(page: TargetPage) -> Self {
        let mut decoder = Self::new(page);
        decoder.colo = true;
        decoder
    }

    /// Looks at the bytes not yet consumed and returns how many of them it consumed, and what
    /// they were.
    ///
    /// # Errors
    /// When they are not a legal message. Whether a block exists and a request lies inside it
    /// is for the caller to check.
    ///
    /// # Panics
    /// When a bitmap was not [taken](Self::payload_taken).
    pub fn decode(&mut self, input: &[u8]) -> Result<(usize, ReturnDecoded), Error> {
        assert!(self.payload == 0, "the bitmap is the caller's to take");
        let mut cursor = Cursor::new(input);
        match self.step(&mut cursor) {
            Ok(decoded) => {
                self.offset += cursor.at() as u64;
                Ok((cursor.at(), decoded))
            }
            Err(Stop::NeedMore(need)) => {
                let need = NonZeroUsize::new(need).unwrap_or(NonZeroUsize::MIN);
                Ok((0, ReturnDecoded::NeedMore(need)))
            }
            Err(Stop::Bad { at, kind }) => Err(Error::new(self.offset + at as u64, kind)),
        }
    }

    fn step(&mut self, cursor: &mut Cursor<'_>) -> Result<ReturnDecoded, Stop> {
        match self.state {
            State::Frame => {
                let message = ReturnMessage::parse(cursor)?;
                self.check(&message)?;
                Ok(ReturnDecoded::Message(message))
            }
            State::BitmapSize => {
                let len = cursor.be64()?;
                if len == 0 || len % 8 != 0 {
                    let expected = "the size of a bitmap in whole 64-bit words";
                    return bad(0, ErrorKind::Unexpected { expected, found: len });
                }
                if len > BITMAP_MAX {
                    let (what, limit) = ("bytes of a bitmap", BITMAP_MAX);
                    return bad(0, ErrorKind::TooLarge { what, found: len, limit });
                }
                self.payload = len;
                self.state = State::BitmapEnd;
                Ok(ReturnDecoded::BitmapFollows { len })
            }
            State::BitmapEnd => {
                let found = cursor.be64()?;
                if found != BITMAP_END {
                    let expected = "the end mark of a bitmap 0x123456789abcdef";
                    return bad(0, ErrorKind::Unexpected { expected, found });
                }
                self.state = State::Frame;
                Ok(ReturnDecoded::BitmapEnd)
            }
            State::Colo => ColoMessage::parse(cursor).map(ReturnDecoded::Colo),
            State::End => bad(0, ErrorKind::Trailing { found: cursor.peek()? }),
        }
    }

    fn check(&mut self, message: &ReturnMessage) -> Result<(), Stop> {
        const PAYLOAD: usize = 4;
        match message {
            ReturnMessage::Shut(value) => {
                let colo = self.colo && *value == 0;
                self.state = if colo { State::Colo } else { State::End };
            }
            ReturnMessage::RequestPagesOf { start, len, .. } => {
                self.check_range(*start, *len)?;
                self.block_named = true;
            }
            ReturnMessage::RequestPages { start, len } => {
                if !self.block_named {
                    return bad(0, ErrorKind::NoBlock);
                }
                self.check_range(*start, *len)?;
            }
            ReturnMessage::RecvBitmap(_) => self.state = State::BitmapSize,
            ReturnMessage::ResumeAck(value) if *value != 1 => {
                let (expected, found) = ("RESUME_ACK of 1", (*value).into());
                return bad(PAYLOAD, ErrorKind::Unexpected { expected, found });
            }
            ReturnMessage::ResumeAck(_) | ReturnMessage::Pong(_) | ReturnMessage::SwitchoverAck => {
            }
        }
        Ok(())
    }

    fn check_range(&self, start: BlockOffset, len: u32) -> Result<(), Stop> {
        const START: usize = 4;
        if !self.page.divides(start.0) || start.0.checked_add(len.into()).is_none() {
            let expected = "a request from the start of a page";
            return bad(START, ErrorKind::Unexpected { expected, found: start.0 });
        }
        if len == 0 || !self.page.divides(len.into()) {
            let expected = "a request of whole pages";
            return bad(START + 8, ErrorKind::Unexpected { expected, found: len.into() });
        }
        Ok(())
    }

    /// Says that the caller took `len` bytes of a bitmap off the channel.
    ///
    /// # Panics
    /// When fewer bytes than that follow.
    pub fn payload_taken(&mut self, len: u64) {
        self.payload = self.payload.checked_sub(len).expect("no more than the bitmap follows");
        self.offset += len;
    }

    /// Position in the channel of the next byte.
    #[must_use]
    pub const fn offset(&self) -> u64 {
        self.offset
    }

    /// Bytes of a bitmap that the caller has still to take.
    #[must_use]
    pub const fn payload_left(&self) -> u64 {
        self.payload
    }

    /// Whether the channel may end here: nothing was begun and not finished.
    #[must_use]
    pub const fn at_boundary(&self) -> bool {
        matches!(self.state, State::Frame | State::Colo | State::End)
    }
}
