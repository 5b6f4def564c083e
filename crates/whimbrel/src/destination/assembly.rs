//! Records of one channel, put together to what is placed at once: whole host pages, and runs of
//! small ones.

use std::time::Instant;

use whimbrel_ram::{BlockIndex, HostPage, TARGET_PAGE};

use super::arriving::{Arriving, Via};
use crate::error::Error;

const PAGE: usize = TARGET_PAGE.bytes();

/// Small pages that follow each other are placed together, so many at most.
const RUN_MAX: usize = 64;

/// The staging place of one channel.
#[derive(Debug)]
pub(super) struct Assembly<'a> {
    arriving: &'a Arriving<'a>,
    via: Via,
    held: Held,
    /// Content of what is held.
    bytes: Vec<u8>,
    /// Which parts of the host page that is held have come, one bit each.
    parts: Vec<u64>,
}

/// What has come and is not placed yet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Held {
    Nothing,
    /// Pages that follow each other, each of which can be placed by itself.
    Run {
        block: BlockIndex,
        start: u64,
        len: u64,
        zero: bool,
        read: Instant,
    },
    /// A part of a host page.
    Part {
        page: HostPage,
        start: u64,
        pages: u64,
        zero: bool,
        read: Instant,
    },
}

impl<'a> Assembly<'a> {
    pub(super) fn new(arriving: &'a Arriving<'a>, via: Via) -> Assembly<'a> {
        Assembly { arriving, via, held: Held::Nothing, bytes: Vec::new(), parts: Vec::new() }
    }

    /// A target page has come.
    pub(super) fn page(
        &mut self,
        block: BlockIndex,
        offset: u64,
        content: &[u8],
        read: Instant,
    ) -> Result<(), Error> {
        assert_eq!(content.len(), PAGE, "a whole page");
        self.take(block, offset, Some(content), read)
    }

    /// A target page of zeros has come.
    pub(super) fn zero(
        &mut self,
        block: BlockIndex,
        offset: u64,
        read: Instant,
    ) -> Result<(), Error> {
        self.take(block, offset, None, read)
    }

    fn take(
        &mut self,
        block: BlockIndex,
        offset: u64,
        content: Option<&[u8]>,
        read: Instant,
    ) -> Result<(), Error> {
        let unit = self.arriving.absent.unit(block);
        if unit == TARGET_PAGE {
            return self.take_small(block, offset, content, read);
        }
        let page = HostPage { block, number: offset / unit.bytes() as u64 };
        let start = page.number * unit.bytes() as u64;
        let Held::Part { page: begun, pages, zero, read, .. } = self.begin(page, start, read)?
        else {
            unreachable!("begun just now");
        };
        if begun != page {
            return Err(self.incomplete(begun, pages));
        }
        let at = usize::try_from(offset - start).expect("inside a page");
        let (word, bit) = (at / PAGE / 64, 1 << (at / PAGE % 64));
        if self.parts[word] & bit != 0 {
            return Err(self.wrong(page, &format!("part {} comes twice", at / PAGE)));
        }
        self.parts[word] |= bit;
        self.bytes.resize(unit.bytes(), 0);
        match content {
            Some(content) => self.bytes[at..at + PAGE].copy_from_slice(content),
            None => self.bytes[at..at + PAGE].fill(0),
        }
        let (pages, zero) = (pages + 1, zero && content.is_none());
        if pages < unit.target_pages() {
            self.held = Held::Part { page, start, pages, zero, read };
            return Ok(());
        }
        self.held = Held::Nothing;
        self.arriving.begun(self.via, None)?;
        match zero {
            true => self.arriving.place_zeros(block, start, unit.bytes() as u64, read),
            false => self.arriving.place(block, start, &self.bytes, read),
        }
    }

    /// The host page that is being put together: a new one, unless there is one.
    fn begin(&mut self, page: HostPage, start: u64, read: Instant) -> Result<Held, Error> {
        if !matches!(self.held, Held::Part { .. }) {
            self.place_run()?;
            self.arriving.begun(self.via, Some(page))?;
            let parts = self.arriving.absent.unit(page.block).target_pages();
            self.parts.clear();
            self.parts.resize(usize::try_from(parts.div_ceil(64)).expect("a page"), 0);
            self.held = Held::Part { page, start, pages: 0, zero: true, read };
        }
        Ok(self.held)
    }

    fn take_small(
        &mut self,
        block: BlockIndex,
        offset: u64,
        content: Option<&[u8]>,
        read: Instant,
    ) -> Result<(), Error> {
        let page = PAGE as u64;
        match &mut self.held {
            Held::Run { block: same, start, len, zero, .. }
                if *same == block
                    && *start + *len == offset
                    && *zero == content.is_none()
                    && (*zero || *len < RUN_MAX as u64 * page) =>
            {
                *len += page;
            }
            Held::Nothing | Held::Run { .. } => {
                self.place_run()?;
                self.bytes.clear();
                let zero = content.is_none();
                self.held = Held::Run { block, start: offset, len: page, zero, read };
            }
            Held::Part { page, pages, .. } => {
                let (page, pages) = (*page, *pages);
                return Err(self.incomplete(page, pages));
            }
        }
        if let Some(content) = content {
            self.bytes.extend_from_slice(content);
        }
        Ok(())
    }

    /// Places what can be placed: before anything is waited for.
    pub(super) fn place_run(&mut self) -> Result<(), Error> {
        let Held::Run { block, start, len, zero, read } = self.held else { return Ok(()) };
        self.held = Held::Nothing;
        match zero {
            true => self.arriving.place_zeros(block, start, len, read),
            false => self.arriving.place(block, start, &self.bytes, read),
        }
    }

    /// The channel has ended: nothing may be left.
    pub(super) fn finish(&mut self) -> Result<(), Error> {
        self.place_run()?;
        match self.held {
            Held::Part { page, pages, .. } => Err(self.incomplete(page, pages)),
            Held::Nothing | Held::Run { .. } => Ok(()),
        }
    }

    fn incomplete(&self, page: HostPage, pages: u64) -> Error {
        let parts = self.arriving.absent.unit(page.block).target_pages();
        let problem = format!("only {pages} of {parts} parts have come, and then something else");
        self.wrong(page, &problem)
    }

    fn wrong(&self, page: HostPage, problem: &str) -> Error {
        let block = self.arriving.absent.ram().block(page.block).name();
        let (via, number) = (self.via.name(), page.number);
        Error::Refused(format!("{via} channel: of host page {number} of block {block} {problem}"))
    }
}
