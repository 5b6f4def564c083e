//! The thread that takes in what was asked for: bare records on a channel of their own, placed as
//! they come.

use std::sync::Arc;
use std::time::Instant;

use whimbrel_ram::TARGET_PAGE;
use whimbrel_wire::{BlockList, RamRecord, RecordDecoded, RecordDecoder, RecordFormat, TargetPage};

use super::arriving::{Arriving, Via};
use super::assembly::Assembly;
use super::buffer::Buffer;
use crate::channel::Channel;
use crate::error::Error;

const PAGE: usize = TARGET_PAGE.bytes();

/// Sixteen pages and their words: little, for a page is placed when it is there.
const BUFFER: usize = 16 * (PAGE + 16);

/// How the channel ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Ended {
    /// By its mark.
    Mark,
    /// It was closed, between two records, behind so many bytes.
    Closed(u64),
}

/// The thread's own.
pub(super) struct Urgent<'a> {
    channel: Channel,
    decoder: RecordDecoder,
    assembly: Assembly<'a>,
    buffer: Buffer,
    /// When the first byte that is not decoded yet was read.
    read: Instant,
}

impl<'a> Urgent<'a> {
    pub(super) fn new(
        channel: Channel,
        blocks: Arc<BlockList>,
        arriving: &'a Arriving<'a>,
    ) -> Urgent<'a> {
        Urgent {
            channel,
            decoder: RecordDecoder::new(blocks, TargetPage::FOUR_KIB, RecordFormat::Postcopy),
            assembly: Assembly::new(arriving, Via::Urgent),
            buffer: Buffer::new(BUFFER),
            read: Instant::now(),
        }
    }

    /// Places what comes until the channel ends.
    pub(super) fn run(mut self, arriving: &Arriving<'_>) -> Result<Ended, Error> {
        loop {
            let (used, decoded) = self
                .decoder
                .decode(self.buffer.held())
                .map_err(|source| Error::Protocol { channel: Via::Urgent.name(), source })?;
            self.buffer.take(used);
            match decoded {
                RecordDecoded::NeedMore(_) => {
                    self.assembly.place_run()?;
                    if !self.fill()? {
                        return match self.buffer.is_empty() {
                            true => {
                                let offset = self.decoder.offset();
                                self.assembly.finish().map(|()| Ended::Closed(offset))
                            }
                            false => Err(self.ended("the rest of a record")),
                        };
                    }
                }
                RecordDecoded::Record(RamRecord::PageFollows { block, offset, .. }) => {
                    while self.buffer.len() < PAGE {
                        self.assembly.place_run()?;
                        if !self.fill()? {
                            return Err(self.ended("the rest of a page"));
                        }
                    }
                    let content = self.buffer.take(PAGE);
                    self.assembly.page(arriving.block(block), offset.0, content, self.read)?;
                    self.decoder.payload_taken(PAGE);
                }
                RecordDecoded::Record(RamRecord::Zero { block, offset }) => {
                    self.assembly.zero(arriving.block(block), offset.0, self.read)?;
                }
                RecordDecoded::Record(RamRecord::EndOfSection) => {
                    self.assembly.finish()?;
                    return Ok(Ended::Mark);
                }
                RecordDecoded::Record(
                    other @ (RamRecord::XbzrleFollows { .. } | RamRecord::MultifdFlush),
                ) => {
                    return Err(Error::Refused(format!(
                        "urgent channel, before byte {}: {other:?} has no meaning here",
                        self.decoder.offset()
                    )));
                }
            }
        }
    }

    /// Reads once; false at the end of the stream.
    fn fill(&mut self) -> Result<bool, Error> {
        let was_empty = self.buffer.is_empty();
        let bytes = self.buffer.fill(&mut self.channel)?;
        if was_empty {
            self.read = Instant::now();
        }
        Ok(bytes > 0)
    }

    fn ended(&self, expected: &str) -> Error {
        let offset = self.decoder.offset() + self.buffer.len() as u64;
        Error::Ended { channel: Via::Urgent.name(), offset, expected: expected.into() }
    }
}
