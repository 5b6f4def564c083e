//! The thread that reads what the destination asks for, and sends it itself.
//!
//! No queue and no hand-over lies between a request and its page: the thread that has read the
//! request claims the page, and writes it to a channel that carries nothing else. Without such a
//! channel (`postcopy-preempt` off) requests are queued for `source/main`.

use std::time::{Duration, Instant};

use whimbrel_ram::{Asked, BlockIndex, HostPage, PageMap, TargetPage};
use whimbrel_wire::{BlockOffset, Name, encode_end_of_section};

use super::answers::{Answer, Answers};
use super::out::Out;
use super::pages::{BATCH_MAX, Pages};
use super::said::Said;
use super::wanted::Wanted;
use crate::channel::Channel;
use crate::error::Error;
use crate::recovery::exchange::SourceExchange;
use crate::report::{Report, add};

/// How often the thread looks whether it is to end the urgent channel, where it has to.
const LOOK: Duration = Duration::from_millis(20);

/// How long a destination may be silent when it has been sent everything.
const LAST_WORD: Duration = Duration::from_secs(30);

/// For ever, as far as a migration can tell.
const FOREVER: Duration = Duration::from_secs(3600);

/// The thread's own.
pub(super) struct Urgent<'a> {
    pub(super) map: &'a PageMap,
    pub(super) pages: Pages<'a>,
    pub(super) report: &'a Report,
    pub(super) said: &'a Said,
    pub(super) wanted: &'a Wanted,
    pub(super) answers: Answers,
    /// The return path.
    pub(super) input: Channel,
    /// The urgent channel, if there is one.
    pub(super) out: Option<Out>,
    /// Whether the destination wants the urgent channel ended by a mark (QEMU up to 7.2).
    pub(super) ends_with_mark: bool,
    /// Blocks by name, and the one named last.
    pub(super) last_block: Option<BlockIndex>,
    /// In a recovery, what has still to be said.
    pub(super) exchange: Option<SourceExchange>,
    /// How long the destination may say nothing; `None` is for ever.
    pub(super) silence: Option<Duration>,
}

impl<'a> Urgent<'a> {
    /// Reads and answers until the destination's last word, or an error.
    pub(super) fn run(mut self, all_sent: &dyn Fn() -> bool) -> Result<(), Error> {
        let mut heard = Instant::now();
        loop {
            let limit = self.silence.map(|limit| match all_sent() {
                // The last pages are being placed: nothing more can be asked of who does that.
                true => limit.max(LAST_WORD),
                false => limit,
            });
            let wait = if self.ends_with_mark { LOOK } else { FOREVER };
            let wait = limit.map_or(wait, |limit| wait.min(limit));
            let answer = self.answers.next(&mut self.input, Instant::now() + wait)?;
            if answer.is_some() || !self.said.is_asked() {
                heard = Instant::now();
            } else if let Some(limit) = limit.filter(|limit| heard.elapsed() >= *limit) {
                return Err(Error::Silent { channel: "return path", limit });
            }
            match answer {
                Some(Answer::Pong(value)) => self.said.pong(value),
                Some(Answer::Request { block, start, len }) => self.request(block, start, len)?,
                Some(Answer::Bitmap { block, received }) => self.bitmap(block, &received)?,
                Some(Answer::Resumed) => return Err(self.answers.wrong("RESUME_ACK comes twice")),
                Some(Answer::Colo(message)) => {
                    return Err(self.answers.wrong(&format!("{message:?} in postcopy")));
                }
                Some(Answer::Shut(value)) => {
                    self.said.shut(value);
                    return self.out.map_or(Ok(()), |out| out.into_channel().finish());
                }
                Some(Answer::End) => return Err(Error::PeerGone),
                None if self.ends_with_mark && all_sent() => self.end_channel()?,
                None => {}
            }
        }
    }

    /// In a recovery: what the destination has of a block.
    fn bitmap(&mut self, block: BlockIndex, received: &[u64]) -> Result<(), Error> {
        let told = match &mut self.exchange {
            Some(exchange) => exchange.bitmap(self.map, block, received),
            None => Err("a bitmap, which has no meaning at this time"),
        };
        if told.map_err(|problem| self.answers.wrong(problem))? {
            self.exchange = None;
            self.said.told();
        }
        Ok(())
    }

    fn end_channel(&mut self) -> Result<(), Error> {
        self.ends_with_mark = false;
        let Some(out) = &mut self.out else { return Ok(()) };
        encode_end_of_section(out.words());
        out.flush()
    }

    fn request(&mut self, block: Option<Name>, start: BlockOffset, len: u32) -> Result<(), Error> {
        let read = Instant::now();
        let (block, first, count) = self.check(block, start, len)?;
        self.last_block = Some(block);
        self.wanted.asked();
        for number in first..first + count {
            add(&self.report.counters.postcopy_requests, 1);
            self.answer(HostPage { block, number }, read)?;
        }
        Ok(())
    }

    /// Which host pages are asked for; the peer may have asked for anything.
    fn check(
        &self,
        block: Option<Name>,
        start: BlockOffset,
        len: u32,
    ) -> Result<(BlockIndex, u64, u64), Error> {
        let wrong = |problem: String| {
            Error::Refused(format!(
                "return path channel, before byte {}: {problem}",
                self.answers.offset()
            ))
        };
        let index = match &block {
            Some(name) => self
                .pages
                .ram()
                .find(name.as_str().unwrap_or_default())
                .map(|(index, _)| index)
                .ok_or_else(|| {
                    wrong(format!("a request for a page of block {name}, which does not exist"))
                })?,
            None => {
                self.last_block.ok_or_else(|| wrong("the first request names no block".into()))?
            }
        };
        let block = self.pages.ram().block(index);
        let (unit, start, len) = (self.map.unit(index).bytes() as u64, start.0, u64::from(len));
        if len == 0 || !len.is_multiple_of(unit) || !start.is_multiple_of(unit) {
            return Err(wrong(format!(
                "a request for {len} bytes from {start} of block {}, which has pages of {unit}",
                block.name()
            )));
        }
        if start.checked_add(len).is_none_or(|end| end > block.len()) {
            return Err(wrong(format!(
                "a request for {len} bytes from {start} of block {}, which has {}",
                block.name(),
                block.len()
            )));
        }
        Ok((index, start / unit, len / unit))
    }

    fn answer(&mut self, page: HostPage, read: Instant) -> Result<(), Error> {
        let unit = self.map.unit(page.block);
        let first = TargetPage(page.target_pages(unit).start);
        if let Some(exchange) = &self.exchange {
            exchange.asked(self.map, page);
        }
        let Some(out) = &mut self.out else {
            if self.map.is_pending(page.block, first) {
                self.wanted.queue(page);
            } else {
                self.report.already_sent();
            }
            return Ok(());
        };
        let claim = match self.map.claim(page) {
            Asked::Claimed(claim) => claim,
            // Either it has gone already, or its owner was told that it is waited for.
            Asked::AlreadySent | Asked::UnderWay => {
                self.report.already_sent();
                return Ok(());
            }
        };
        let before = out.bytes();
        self.wanted.urgent_begins();
        let sent = send_claim(&mut self.pages, claim, out);
        self.wanted.urgent_ends(out.bytes() - before);
        sent?;
        if let Some(exchange) = &mut self.exchange {
            exchange.went(page);
        }
        self.report.answered(read.elapsed());
        self.wanted.follow(page.block, TargetPage(page.target_pages(unit).end));
        Ok(())
    }
}

/// Sends all of a claim.
pub(super) fn send_claim<'a>(
    pages: &mut Pages<'a>,
    claim: whimbrel_ram::Claim<'a>,
    out: &mut Out,
) -> Result<(), Error> {
    pages.gather_claim(claim, out, BATCH_MAX)?;
    loop {
        out.flush()?;
        pages.sent();
        if !pages.has_begun_one() {
            return Ok(());
        }
        pages.gather_open(out, BATCH_MAX)?;
    }
}
