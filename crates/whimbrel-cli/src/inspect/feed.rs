//! Feeding a decoder from a source: one message after the other, and what follows them.

use std::fmt;
use std::io;

use serde::Serialize;
use whimbrel_wire::{
    Decoded, Error, ErrorKind, MainDecoder, MultifdDecoded, MultifdDecoder, RamRecord,
    RecordDecoded, RecordDecoder, ReturnDecoded, ReturnDecoder,
};

use super::source::Source;

/// What is wrong with a recording, and where.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(super) struct Fault {
    /// Position in the stream, decompressed.
    pub(super) offset: u64,
    /// What was expected and what was found.
    pub(super) message: String,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "byte {}: {}", self.offset, self.message)
    }
}

impl From<Error> for Fault {
    fn from(error: Error) -> Fault {
        Fault { offset: error.offset, message: error.kind.to_string() }
    }
}

impl Fault {
    /// The recording ends although more must come.
    pub(super) fn truncated(offset: u64, expected: &'static str) -> Fault {
        Error::new(offset, ErrorKind::Truncated { expected }).into()
    }

    /// Bytes stand behind the end.
    pub(super) fn trailing(offset: u64, found: u8) -> Fault {
        Error::new(offset, ErrorKind::Trailing { found }).into()
    }

    fn unreadable(offset: u64, error: &io::Error) -> Fault {
        Fault { offset, message: format!("cannot be read from here on: {error}") }
    }
}

/// What the decoders of all channels have in common.
pub(super) trait Decoder {
    type Message;
    /// Bytes consumed, and a message if one is complete.
    fn decode(&mut self, input: &[u8]) -> Result<(usize, Option<Self::Message>), Error>;
    /// Bytes that follow the last message and were not taken.
    fn payload_left(&self) -> u64;
    fn payload_taken(&mut self, len: u64);
    fn offset(&self) -> u64;
}

impl Decoder for MainDecoder {
    type Message = Decoded;
    fn decode(&mut self, input: &[u8]) -> Result<(usize, Option<Decoded>), Error> {
        Ok(match MainDecoder::decode(self, input)? {
            (taken, Decoded::NeedMore(_)) => (taken, None),
            (taken, message) => (taken, Some(message)),
        })
    }
    fn payload_left(&self) -> u64 {
        MainDecoder::payload_left(self)
    }
    fn payload_taken(&mut self, len: u64) {
        MainDecoder::payload_taken(self, len);
    }
    fn offset(&self) -> u64 {
        MainDecoder::offset(self)
    }
}

impl Decoder for RecordDecoder {
    type Message = RamRecord;
    fn decode(&mut self, input: &[u8]) -> Result<(usize, Option<RamRecord>), Error> {
        Ok(match RecordDecoder::decode(self, input)? {
            (taken, RecordDecoded::NeedMore(_)) => (taken, None),
            (taken, RecordDecoded::Record(record)) => (taken, Some(record)),
        })
    }
    fn payload_left(&self) -> u64 {
        RecordDecoder::payload_left(self) as u64
    }
    fn payload_taken(&mut self, len: u64) {
        RecordDecoder::payload_taken(self, usize::try_from(len).expect("at most one page"));
    }
    fn offset(&self) -> u64 {
        RecordDecoder::offset(self)
    }
}

impl Decoder for ReturnDecoder {
    type Message = ReturnDecoded;
    fn decode(&mut self, input: &[u8]) -> Result<(usize, Option<ReturnDecoded>), Error> {
        Ok(match ReturnDecoder::decode(self, input)? {
            (taken, ReturnDecoded::NeedMore(_)) => (taken, None),
            (taken, message) => (taken, Some(message)),
        })
    }
    fn payload_left(&self) -> u64 {
        ReturnDecoder::payload_left(self)
    }
    fn payload_taken(&mut self, len: u64) {
        ReturnDecoder::payload_taken(self, len);
    }
    fn offset(&self) -> u64 {
        ReturnDecoder::offset(self)
    }
}

impl Decoder for MultifdDecoder {
    type Message = MultifdDecoded;
    fn decode(&mut self, input: &[u8]) -> Result<(usize, Option<MultifdDecoded>), Error> {
        Ok(match MultifdDecoder::decode(self, input)? {
            (taken, MultifdDecoded::NeedMore(_)) => (taken, None),
            (taken, message) => (taken, Some(message)),
        })
    }
    fn payload_left(&self) -> u64 {
        MultifdDecoder::payload_left(self).into()
    }
    fn payload_taken(&mut self, len: u64) {
        MultifdDecoder::payload_taken(self, u32::try_from(len).expect("at most one packet"));
    }
    fn offset(&self) -> u64 {
        MultifdDecoder::offset(self)
    }
}

/// The next message and where it begins; `None` when the source has no more. What is then still
/// pending in the source is the beginning of a message.
pub(super) fn next<D: Decoder>(
    source: &mut Source,
    decoder: &mut D,
) -> Result<Option<(u64, D::Message)>, Fault> {
    let begins = decoder.offset();
    loop {
        let (taken, message) = decoder.decode(source.pending())?;
        source.consume(taken);
        if let Some(message) = message {
            return Ok(Some((begins, message)));
        }
        // A decoder may stop short of what is there; only one that took nothing needs more.
        if taken > 0 && !source.pending().is_empty() {
            continue;
        }
        let more = source.fill().map_err(|error| Fault::unreadable(decoder.offset(), &error))?;
        if !more {
            return Ok(None);
        }
    }
}

/// Leaves out all that follows the last message.
pub(super) fn skip<D: Decoder>(
    source: &mut Source,
    decoder: &mut D,
    what: &'static str,
) -> Result<(), Fault> {
    let left = decoder.payload_left();
    skip_some(source, decoder, left, what)
}

/// Leaves out some of what follows the last message.
pub(super) fn skip_some<D: Decoder>(
    source: &mut Source,
    decoder: &mut D,
    len: u64,
    what: &'static str,
) -> Result<(), Fault> {
    let skipped = source.skip(len).map_err(|error| Fault::unreadable(decoder.offset(), &error))?;
    decoder.payload_taken(skipped);
    if skipped == len { Ok(()) } else { Err(Fault::truncated(decoder.offset(), what)) }
}

/// Hands some of what follows the last message over, piece by piece.
pub(super) fn take<D: Decoder>(
    source: &mut Source,
    decoder: &mut D,
    len: u64,
    what: &'static str,
    mut each: impl FnMut(&[u8]),
) -> Result<(), Fault> {
    let mut left = len;
    while left > 0 {
        if source.pending().is_empty() {
            let more =
                source.fill().map_err(|error| Fault::unreadable(decoder.offset(), &error))?;
            if !more {
                return Err(Fault::truncated(decoder.offset(), what));
            }
        }
        let pending = source.pending();
        let piece = usize::try_from(left).unwrap_or(usize::MAX).min(pending.len());
        each(&pending[..piece]);
        source.consume(piece);
        decoder.payload_taken(piece as u64);
        left -= piece as u64;
    }
    Ok(())
}
