//! The return path: what a destination answered.

use std::io::Write;

use whimbrel_wire::{Name, ReturnDecoded, ReturnDecoder, ReturnMessage, TargetPage};

use super::command;
use super::feed::{self, Fault};
use super::pages::PageList;
use super::report::{Entry, Report};
use super::source::Source;

/// Whether a recording begins with the number of a message. An urgent channel, whose first byte is
/// zero too, begins with an offset in a block: it would have to be one of 2^48 bytes or more.
pub(super) fn begins_like_one(first: &[u8]) -> bool {
    first.first_chunk().is_some_and(|number| (1..=7).contains(&u16::from_be_bytes(*number)))
}

/// Reads a return path to its end.
pub(super) fn read<W: Write>(
    source: &mut Source,
    report: &mut Report,
    pages: &mut PageList<W>,
    page: TargetPage,
) -> Result<(), Fault> {
    let mut reader = Reader {
        source,
        report,
        pages,
        decoder: ReturnDecoder::with_colo(page),
        block: None,
        shut: false,
        colo: false,
        again: false,
    };
    let outcome = reader.read();
    reader.report.bytes = reader.decoder.offset();
    outcome
}

struct Reader<'r, W> {
    source: &'r mut Source,
    report: &'r mut Report,
    pages: &'r mut PageList<W>,
    decoder: ReturnDecoder,
    /// The block that requests mean when they name none.
    block: Option<Name>,
    shut: bool,
    /// A word of COLO has come: more of them may follow SHUT.
    colo: bool,
    again: bool,
}

impl<W: Write> Reader<'_, W> {
    fn read(&mut self) -> Result<(), Fault> {
        loop {
            let message = match feed::next(self.source, &mut self.decoder) {
                Ok(Some((at, message))) => (at, message),
                Ok(None) => break,
                Err(fault) => return Err(self.trailing().unwrap_or(fault)),
            };
            self.message(message.0, &message.1)?;
            self.again = true;
        }
        if let Some(fault) = self.trailing() {
            return Err(fault);
        }
        let end = self.decoder.offset() + self.source.pending().len() as u64;
        if !self.source.pending().is_empty() {
            return Err(Fault::truncated(end, "the rest of a message of the return path"));
        }
        if !self.decoder.at_boundary() {
            return Err(Fault::truncated(end, "the bitmap of a RAM block"));
        }
        self.report.complete = true;
        Ok(())
    }

    /// Behind SHUT nothing but COLO's words may come.
    fn trailing(&self) -> Option<Fault> {
        let found = self.source.pending().first().filter(|_| self.shut && !self.colo)?;
        Some(Fault::trailing(self.decoder.offset(), *found))
    }

    fn message(&mut self, at: u64, message: &ReturnDecoded) -> Result<(), Fault> {
        match message {
            ReturnDecoded::NeedMore(_) => {}
            ReturnDecoded::Message(message) => self.frame(at, message),
            ReturnDecoded::BitmapFollows { len } => self.bitmap(at, *len)?,
            ReturnDecoded::BitmapEnd => {}
            ReturnDecoded::Colo(message) => {
                self.colo = true;
                self.report.message(command::colo_entry(*message, at), self.again);
            }
        }
        Ok(())
    }

    fn frame(&mut self, at: u64, message: &ReturnMessage) {
        let name = match message {
            ReturnMessage::Shut(_) => "SHUT",
            ReturnMessage::Pong(_) => "PONG",
            ReturnMessage::RequestPagesOf { .. } | ReturnMessage::RequestPages { .. } => {
                "REQ_PAGES"
            }
            ReturnMessage::RecvBitmap(_) => "RECV_BITMAP",
            ReturnMessage::ResumeAck(_) => "RESUME_ACK",
            ReturnMessage::SwitchoverAck => "SWITCHOVER_ACK",
        };
        let mut entry = Entry::new(name, at);
        match message {
            ReturnMessage::Shut(value) => {
                entry.value = Some((*value).into());
                self.shut = true;
            }
            ReturnMessage::Pong(value) | ReturnMessage::ResumeAck(value) => {
                entry.value = Some((*value).into());
            }
            ReturnMessage::RequestPagesOf { start, len, block } => {
                self.block = Some(block.clone());
                self.request(&mut entry, *start, *len, at);
            }
            ReturnMessage::RequestPages { start, len } => {
                self.request(&mut entry, *start, *len, at);
            }
            ReturnMessage::RecvBitmap(block) => {
                entry.block = Some(block.to_string());
                self.block = Some(block.clone());
            }
            ReturnMessage::SwitchoverAck => {}
        }
        self.report.message(entry, self.again);
    }

    fn request(&mut self, entry: &mut Entry, start: whimbrel_wire::BlockOffset, len: u32, at: u64) {
        // The decoder refuses a request that names no block before one that does.
        let Some(block) = &self.block else { return };
        entry.block = Some(block.to_string());
        entry.bytes = Some(len.into());
        let counted = self.report.block_named(block);
        counted.requests += 1;
        counted.requested_bytes = counted.requested_bytes.saturating_add(len.into());
        self.pages.add("request", (block, start, len.into()), at);
    }

    /// Counts the pages that a bitmap says have arrived.
    fn bitmap(&mut self, at: u64, len: u64) -> Result<(), Fault> {
        let mut present = 0_u64;
        let what = "the rest of the bitmap of a RAM block";
        let outcome = feed::take(self.source, &mut self.decoder, len, what, |piece| {
            present += piece.iter().map(|byte| u64::from(byte.count_ones())).sum::<u64>();
        });
        let mut entry = Entry::new("bitmap", at);
        entry.block = self.block.as_ref().map(ToString::to_string);
        entry.bytes = Some(len);
        entry.pages = Some(present);
        self.report.message(entry, false);
        outcome
    }
}
