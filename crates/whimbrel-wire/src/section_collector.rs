//! Collecting one FULL section from a stream, when that can be done before the stream ends.

use alloc::vec::Vec;

use crate::cut::find_footer;
use crate::device::{DeviceSection, OWN_LENGTH};
use crate::section::{FOOTER_LEN, mark};
use crate::{Error, ErrorKind, SectionHeader};

/// How the end of the section is found.
#[derive(Debug)]
enum End {
    /// Its footer, followed by the mark of something: `scanned` bytes hold none.
    Footer { scanned: usize },
    /// Its own length; so many bytes with the footer, once the length is there.
    OwnLength(Option<usize>),
}

#[derive(Debug)]
pub(crate) struct SectionCollector {
    header: SectionHeader,
    base: u64,
    limit: usize,
    bytes: Vec<u8>,
    end: End,
}

impl SectionCollector {
    /// Begins behind the header, at `base` of the stream.
    pub(crate) const fn new(
        header: SectionHeader,
        base: u64,
        limit: usize,
        own_length: bool,
    ) -> Self {
        let end = if own_length { End::OwnLength(None) } else { End::Footer { scanned: 0 } };
        Self { header, base, limit, bytes: Vec::new(), end }
    }

    /// Takes bytes up to the section's footer; returns how many and the section when complete.
    pub(crate) fn feed(&mut self, input: &[u8]) -> Result<(usize, Option<DeviceSection>), Error> {
        match self.end {
            End::Footer { scanned } => self.feed_to_footer(input, scanned),
            End::OwnLength(None) => {
                let taken = self.feed_length(input)?;
                match self.end {
                    End::OwnLength(Some(end)) => {
                        let rest = input.get(taken..).unwrap_or_default();
                        let (more, section) = self.feed_to_length(rest, end)?;
                        Ok((taken + more, section))
                    }
                    End::OwnLength(None) | End::Footer { .. } => Ok((taken, None)),
                }
            }
            End::OwnLength(Some(end)) => self.feed_to_length(input, end),
        }
    }

    fn feed_to_footer(
        &mut self,
        input: &[u8],
        mut scanned: usize,
    ) -> Result<(usize, Option<DeviceSection>), Error> {
        let before = self.bytes.len();
        // A footer needs one more byte behind it to be believed.
        let room = (self.limit + FOOTER_LEN + 1).saturating_sub(before);
        self.bytes.extend_from_slice(input.get(..room).unwrap_or(input));
        while let Some(place) = self
            .bytes
            .get(scanned..)
            .and_then(|tail| find_footer(tail, self.header.id).map(|place| scanned + place))
        {
            let end = place + FOOTER_LEN;
            match self.bytes.get(end).copied() {
                None => {
                    self.end = End::Footer { scanned: place };
                    return Ok((self.bytes.len() - before, None));
                }
                Some(0..=mark::FULL | mark::COMMAND) => {
                    // What stands behind the footer was not there at the last call.
                    let taken = end - before;
                    return Ok((taken, Some(self.section(place))));
                }
                Some(_) => scanned = place + 1,
            }
        }
        if self.bytes.len() > self.limit + FOOTER_LEN {
            return Err(self.too_large(self.bytes.len()));
        }
        scanned = scanned.max(self.bytes.len().saturating_sub(FOOTER_LEN - 1));
        self.end = End::Footer { scanned };
        Ok((self.bytes.len() - before, None))
    }

    /// Takes the length that the payload begins with; returns how many bytes that were.
    fn feed_length(&mut self, input: &[u8]) -> Result<usize, Error> {
        let taken = input.get(..OWN_LENGTH - self.bytes.len()).unwrap_or(input);
        self.bytes.extend_from_slice(taken);
        if let Some(len) = self.bytes.first_chunk::<OWN_LENGTH>() {
            let len = usize::try_from(u32::from_be_bytes(*len)).unwrap_or(usize::MAX);
            if len > self.limit {
                return Err(self.too_large(len));
            }
            self.end = End::OwnLength(Some(OWN_LENGTH + len + FOOTER_LEN));
        }
        Ok(taken.len())
    }

    fn feed_to_length(
        &mut self,
        input: &[u8],
        end: usize,
    ) -> Result<(usize, Option<DeviceSection>), Error> {
        let taken = input.get(..end - self.bytes.len()).unwrap_or(input);
        self.bytes.extend_from_slice(taken);
        if self.bytes.len() < end {
            return Ok((taken.len(), None));
        }
        let payload = end - FOOTER_LEN;
        let footer = self.bytes.get(payload..).unwrap_or_default();
        if *footer != self.header.id.footer() {
            let found = footer.iter().fold(0, |value, byte| value << 8 | u64::from(*byte));
            let kind = ErrorKind::Footer { expected: self.header.id, found };
            return Err(Error::new(self.base + payload as u64, kind));
        }
        Ok((taken.len(), Some(self.section(payload))))
    }

    fn section(&mut self, payload: usize) -> DeviceSection {
        self.bytes.truncate(payload);
        let payload = core::mem::take(&mut self.bytes);
        DeviceSection { header: self.header.clone(), payload }
    }

    fn too_large(&self, found: usize) -> Error {
        let (found, limit) = (found as u64, self.limit as u64);
        let what = "bytes of a device section";
        Error::new(self.base, ErrorKind::TooLarge { what, found, limit })
    }
}
