//! Reading integers and names off the front of a slice that may end too early.

use crate::{Error, ErrorKind, Name};

/// Why a parse stopped.
#[derive(Debug)]
pub(crate) enum Stop {
    /// The input must hold at least so many bytes, counted from its start.
    NeedMore(usize),
    /// The bytes from `at` on are wrong.
    Bad { at: usize, kind: ErrorKind },
}

impl Stop {
    /// Turns a stop at the end of a stream, or in a part known to be complete, into an error.
    pub(crate) fn into_error(self, base: u64, expected: &'static str) -> Error {
        match self {
            Self::NeedMore(need) => Error::new(
                base.saturating_add(need.saturating_sub(1) as u64),
                ErrorKind::Truncated { expected },
            ),
            Self::Bad { at, kind } => Error::new(base.saturating_add(at as u64), kind),
        }
    }
}

/// The unread part of an input.
#[derive(Debug, Clone)]
pub(crate) struct Cursor<'a> {
    rest: &'a [u8],
    at: usize,
}

impl<'a> Cursor<'a> {
    pub(crate) const fn new(input: &'a [u8]) -> Self {
        Self { rest: input, at: 0 }
    }

    /// Bytes read so far.
    pub(crate) const fn at(&self) -> usize {
        self.at
    }

    pub(crate) const fn is_empty(&self) -> bool {
        self.rest.is_empty()
    }

    /// Bytes not read yet.
    pub(crate) const fn rest(&self) -> &'a [u8] {
        self.rest
    }

    /// The next byte, which stays unread.
    pub(crate) fn peek(&self) -> Result<u8, Stop> {
        self.rest.first().copied().ok_or(Stop::NeedMore(self.at.saturating_add(1)))
    }

    pub(crate) fn array<const N: usize>(&mut self) -> Result<&'a [u8; N], Stop> {
        let Some((head, rest)) = self.rest.split_first_chunk::<N>() else {
            return Err(Stop::NeedMore(self.at.saturating_add(N)));
        };
        self.rest = rest;
        self.at += N;
        Ok(head)
    }

    pub(crate) fn bytes(&mut self, len: usize) -> Result<&'a [u8], Stop> {
        let Some((head, rest)) = self.rest.split_at_checked(len) else {
            return Err(Stop::NeedMore(self.at.saturating_add(len)));
        };
        self.rest = rest;
        self.at += len;
        Ok(head)
    }

    pub(crate) fn u8(&mut self) -> Result<u8, Stop> {
        self.array::<1>().map(|&[byte]| byte)
    }

    pub(crate) fn be16(&mut self) -> Result<u16, Stop> {
        self.array().map(|bytes| u16::from_be_bytes(*bytes))
    }

    pub(crate) fn be32(&mut self) -> Result<u32, Stop> {
        self.array().map(|bytes| u32::from_be_bytes(*bytes))
    }

    pub(crate) fn be64(&mut self) -> Result<u64, Stop> {
        self.array().map(|bytes| u64::from_be_bytes(*bytes))
    }

    /// One length byte and so many bytes; at least one.
    pub(crate) fn name(&mut self) -> Result<Name, Stop> {
        self.name_bytes().and_then(|(at, bytes)| {
            Name::new(bytes).map_err(|_| Stop::Bad {
                at,
                kind: ErrorKind::Unexpected { expected: "a name of 1 to 255 bytes", found: 0 },
            })
        })
    }

    /// Like `name`, without owning it: where it stands and its bytes, which may be none.
    pub(crate) fn name_bytes(&mut self) -> Result<(usize, &'a [u8]), Stop> {
        let at = self.at;
        let len = self.u8()?;
        Ok((at, self.bytes(usize::from(len))?))
    }

    /// Reads one byte that can only have one value.
    pub(crate) fn mark(&mut self, mark: u8, expected: &'static str) -> Result<(), Stop> {
        let at = self.at;
        let found = self.u8()?;
        if found == mark {
            Ok(())
        } else {
            Err(Stop::Bad { at, kind: ErrorKind::Unexpected { expected, found: found.into() } })
        }
    }
}

/// An error at the byte `at` of the input.
pub(crate) const fn bad<T>(at: usize, kind: ErrorKind) -> Result<T, Stop> {
    Err(Stop::Bad { at, kind })
}
