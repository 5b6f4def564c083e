//! The main channel, on its way out: words of the protocol and pages between them, gathered from
//! where they lie and sent with one system call for hundreds of pages.

use std::sync::Arc;

use whimbrel_ram::kernel_copy::{Gather, PIECES_MAX};
use whimbrel_ram::{BlockIndex, GuestRam, TARGET_PAGE, TargetPage};
use whimbrel_wire::{BlockList, BlockOffset, RecordEncoder};

use crate::channel::Channel;
use crate::error::Error;

/// Pages in one system call: each has its record word before it, so two pieces.
const PAGES_MAX: usize = PIECES_MAX / 2 - 1;

/// What is gathered for the next call, and the channel it goes to.
#[derive(Debug)]
pub(crate) struct Out {
    channel: Channel,
    ram: GuestRam,
    records: RecordEncoder,
    /// The blocks' places in the announced list, by their place in RAM.
    places: Vec<whimbrel_wire::BlockIndex>,
    /// All bytes that are not guest memory.
    words: Vec<u8>,
    pages: Vec<Page>,
}

/// A page of guest memory, after the first `words_before` bytes of the words.
#[derive(Clone, Copy, Debug)]
struct Page {
    words_before: usize,
    block: BlockIndex,
    page: TargetPage,
}

impl Out {
    pub(crate) fn new(channel: Channel, ram: GuestRam, blocks: Arc<BlockList>) -> Out {
        let places = blocks.iter().map(|(place, _)| place).collect();
        let records = RecordEncoder::new(blocks);
        let pages = Vec::with_capacity(PAGES_MAX);
        Out { channel, ram, records, places, words: Vec::new(), pages }
    }

    /// Where to append what is not a page.
    pub(crate) fn words(&mut self) -> &mut Vec<u8> {
        &mut self.words
    }

    pub(crate) fn channel(&mut self) -> &mut Channel {
        &mut self.channel
    }

    pub(crate) fn into_channel(self) -> Channel {
        self.channel
    }

    /// The next page names its block: the destination's memory of the last one is gone.
    pub(crate) fn name_blocks_again(&mut self) {
        self.records.forget_last_block();
    }

    /// The announced blocks.
    pub(crate) fn blocks(&self) -> &Arc<BlockList> {
        self.records.blocks()
    }

    /// Bytes sent and bytes gathered so far.
    pub(crate) fn bytes(&self) -> u64 {
        self.channel.bytes_out() + self.gathered() as u64
    }

    /// Bytes gathered and not sent yet.
    pub(crate) fn gathered(&self) -> usize {
        self.words.len() + self.pages.len() * TARGET_PAGE.bytes()
    }

    /// Whether the next page needs a [`flush`](Out::flush) first.
    pub(crate) fn is_full(&self) -> bool {
        self.pages.len() == PAGES_MAX
    }

    /// Appends a page that is all zero.
    pub(crate) fn push_zero(&mut self, block: BlockIndex, page: TargetPage) {
        let (index, offset) = self.place(block, page);
        self.records.zero_page(index, offset, &mut self.words);
    }

    /// Appends a page with its content, which is read when it is flushed.
    pub(crate) fn push_page(&mut self, block: BlockIndex, page: TargetPage) {
        assert!(!self.is_full(), "flushed before it is too much for one call");
        let (index, offset) = self.place(block, page);
        self.records.page_header(index, offset, &mut self.words);
        self.pages.push(Page { words_before: self.words.len(), block, page });
    }

    /// Appends a page from a copy of its content.
    pub(crate) fn push_copy(&mut self, block: BlockIndex, page: TargetPage, content: &[u8]) {
        assert_eq!(content.len(), TARGET_PAGE.bytes(), "a whole page");
        let (index, offset) = self.place(block, page);
        self.records.page_header(index, offset, &mut self.words);
        self.words.extend_from_slice(content);
    }

    /// Appends what changed in a page.
    pub(crate) fn push_delta(&mut self, block: BlockIndex, page: TargetPage, delta: &[u8]) {
        let (index, offset) = self.place(block, page);
        let len = u16::try_from(delta.len()).expect("shorter than a page");
        self.records.xbzrle_header(index, offset, len, &mut self.words);
        self.words.extend_from_slice(delta);
    }

    fn place(
        &self,
        block: BlockIndex,
        page: TargetPage,
    ) -> (whimbrel_wire::BlockIndex, BlockOffset) {
        (self.places[block.index()], BlockOffset(page.offset()))
    }

    /// Sends what was gathered.
    pub(crate) fn flush(&mut self) -> Result<(), Error> {
        let mut pieces = Gather::new();
        let mut from = 0;
        for page in &self.pages {
            pieces.push_bytes(&self.words[from..page.words_before]);
            let block = self.ram.block(page.block);
            pieces.push_guest(block, page.page.offset(), TARGET_PAGE.bytes())?;
            from = page.words_before;
        }
        pieces.push_bytes(&self.words[from..]);
        self.channel.send(&mut pieces)?;
        drop(pieces);
        self.words.clear();
        self.pages.clear();
        Ok(())
    }
}
