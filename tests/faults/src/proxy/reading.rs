//! Reading along in the main channel: where something begins, and what is a page of the guest's.

use std::collections::VecDeque;
use std::ops::Range;

use whimbrel_wire::{
    Command, Decoded, MainDecoder, MainOptions, RamRecord, ReturnDecoded, ReturnDecoder,
    ReturnMessage, TargetPage,
};

use crate::phase::Phase;
use crate::plan::Mark;

/// The PING behind the last device, whose PONG lets a source give its guest up.
const PING_LOADED: u32 = 0x4c4f_4144;
/// Bytes of a page.
const PAGE: u64 = 4096;
/// RUN, as bytes: the last of a package.
const RUN_BYTES: u64 = 5;

/// Marks and where they are: bytes from the channel's beginning.
pub(super) type Marks = Vec<(Mark, u64)>;

/// What the source says.
#[derive(Debug)]
pub(super) struct Forth {
    /// Nothing more can be read: TLS, a recovery, or bytes that were changed.
    decoder: Option<MainDecoder>,
    held: Vec<u8>,
    /// Bytes of a page, delta or package that are still to come.
    payload: u64,
    /// Where `held` begins.
    at: u64,
    pub(super) marks: Marks,
    /// Pages, and where they lie.
    pages: VecDeque<Range<u64>>,
}

impl Forth {
    pub(super) fn new(readable: bool) -> Forth {
        let decoder = readable.then(|| MainDecoder::new(MainOptions::default()));
        let (marks, pages) = (Vec::new(), VecDeque::new());
        Forth { decoder, held: Vec::new(), payload: 0, at: 0, marks, pages }
    }

    pub(super) fn can_read(&self) -> bool {
        self.decoder.is_some()
    }

    /// Nothing that comes from here on is read.
    pub(super) fn close(&mut self) {
        self.decoder = None;
        self.held = Vec::new();
    }

    /// Where the page ends in which the byte at `at` lies; `None` where it is none.
    pub(super) fn page_end(&mut self, at: u64) -> Option<u64> {
        while self.pages.front().is_some_and(|page| page.end <= at) {
            self.pages.pop_front();
        }
        self.pages.front().filter(|page| page.contains(&at)).map(|page| page.end)
    }

    pub(super) fn take(&mut self, bytes: &[u8]) {
        if self.decoder.is_some() {
            self.held.extend_from_slice(bytes);
            while self.step() {}
        }
    }

    fn mark(&mut self, mark: Mark, at: u64) {
        if self.marks.iter().all(|(known, _)| *known != mark) {
            self.marks.push((mark, at));
        }
    }

    /// Reads one thing; false when there is too little for it.
    fn step(&mut self) -> bool {
        let Some(decoder) = &mut self.decoder else { return false };
        if self.held.is_empty() {
            return false;
        }
        if self.payload > 0 {
            let here = self.payload.min(self.held.len() as u64);
            decoder.payload_taken(here);
            self.payload -= here;
            self.drop_held(here);
            return true;
        }
        let start = self.at;
        let Ok((used, decoded)) = decoder.decode(&self.held) else {
            self.close();
            return false;
        };
        self.drop_held(used as u64);
        match decoded {
            Decoded::NeedMore(_) => return used > 0,
            Decoded::SectionPart(_) => self.mark(Mark::Ram, start),
            Decoded::SectionEnd(_) => self.mark(Mark::LastRam, start),
            Decoded::DeviceSection(_) => self.mark(Mark::Devices, start),
            Decoded::Command(Command::Ping(PING_LOADED)) => self.mark(Mark::PingLoaded, start),
            Decoded::Command(Command::PostcopyAdvise(_)) => self.mark(Mark::Advise, start),
            Decoded::Eof => self.mark(Mark::Eof, start),
            Decoded::PackageFollows { len } => {
                self.payload = u64::from(len);
                let end = self.at + self.payload;
                self.mark(Mark::Package, start);
                self.mark(Mark::Run, end.saturating_sub(RUN_BYTES));
                self.mark(Mark::Rest, end);
            }
            Decoded::Ram(record) => self.record(&record),
            _ => {}
        }
        true
    }

    fn record(&mut self, record: &RamRecord) {
        self.payload = match record {
            RamRecord::PageFollows { .. } => PAGE,
            RamRecord::XbzrleFollows { len, .. } => *len as u64,
            RamRecord::Zero { .. } | RamRecord::EndOfSection | RamRecord::MultifdFlush => return,
        };
        self.pages.push_back(self.at..self.at + self.payload);
    }

    fn drop_held(&mut self, bytes: u64) {
        let count = usize::try_from(bytes).expect("no more than there is");
        self.held.drain(..count);
        self.at += bytes;
    }
}

/// What the destination says.
#[derive(Debug)]
pub(super) struct Back {
    decoder: Option<ReturnDecoder>,
    held: Vec<u8>,
    at: u64,
    pub(super) marks: Marks,
}

impl Back {
    pub(super) fn new(readable: bool) -> Back {
        let decoder = readable.then(|| ReturnDecoder::new(TargetPage::FOUR_KIB));
        Back { decoder, held: Vec::new(), at: 0, marks: Vec::new() }
    }

    pub(super) fn close(&mut self) {
        self.decoder = None;
        self.held = Vec::new();
    }

    pub(super) fn take(&mut self, bytes: &[u8]) {
        let Some(decoder) = &mut self.decoder else { return };
        self.held.extend_from_slice(bytes);
        loop {
            let start = self.at;
            let Ok((used, decoded)) = decoder.decode(&self.held) else {
                self.decoder = None;
                return;
            };
            self.held.drain(..used);
            self.at += used as u64;
            let mark = match decoded {
                ReturnDecoded::NeedMore(_) => break,
                ReturnDecoded::Message(ReturnMessage::Pong(PING_LOADED)) => Mark::PongLoaded,
                ReturnDecoded::Message(
                    ReturnMessage::RequestPages { .. } | ReturnMessage::RequestPagesOf { .. },
                ) => Mark::Request,
                ReturnDecoded::Message(ReturnMessage::Shut(_)) => Mark::Shut,
                _ => continue,
            };
            if self.marks.iter().all(|(known, _)| *known != mark) {
                self.marks.push((mark, start));
            }
        }
    }
}

/// How far it has come when so many bytes went forth and back.
pub(super) fn phase(forth: &Marks, back: &Marks, passed: [u64; 2]) -> Phase {
    let of = |mark| match mark {
        Mark::Ram | Mark::Advise => Phase::Ram,
        Mark::LastRam | Mark::Devices | Mark::PingLoaded | Mark::Package | Mark::PongLoaded => {
            Phase::Switchover
        }
        Mark::Eof => Phase::HandOver,
        Mark::Run | Mark::Rest | Mark::Request => Phase::Postcopy,
        Mark::Shut => Phase::After,
    };
    let reached = |marks: &Marks, passed: u64| {
        marks.iter().filter(|(_, at)| *at < passed).map(|(mark, _)| of(*mark)).max()
    };
    reached(forth, passed[0]).max(reached(back, passed[1])).unwrap_or_default()
}
