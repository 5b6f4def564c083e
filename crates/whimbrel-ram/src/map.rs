//! The page map: what is still to be sent, and who may send it.
//!
//! One atomic bit per target page says "still to be sent". Taking a bit off the map is an atomic
//! operation, so of all threads that want a page exactly one gets it, as a [`Claim`].
//!
//! A host page larger than a target page has an owner besides: whoever claims it holds the whole
//! of it, and takes its bits off one by one while it sends. Bits may be set again meanwhile (the
//! guest runs and writes); who asks for the page is told that it is under way, and its owner is
//! told that somebody waits.

use std::ops::Range;

use crate::claim::{Asked, Claim};
use crate::dirty::DirtyBits;
use crate::sync::{AtomicU8, AtomicU64, Ordering};
use crate::words::{count, mask, position, words};
use crate::{BlockIndex, GuestRam, HostPage, PageSize, TARGET_PAGE, TargetPage};

/// Somebody holds a claim on the host page.
const OWNED: u8 = 1;
/// Somebody waits for the host page.
const URGENT: u8 = 2;

/// One bit per target page of a guest's RAM: still to be sent.
///
/// Shared by all threads that send. What the bits guard is read after its bit was taken
/// (acquire) and marked after it was written (release).
#[derive(Debug)]
pub struct PageMap {
    blocks: Box<[BlockMap]>,
    /// Wraps below zero for a moment when a page is claimed between its bit and its count.
    pending: AtomicU64,
}

#[derive(Debug)]
struct BlockMap {
    pages: u64,
    /// Target pages in a host page.
    per_host: u64,
    to_send: Box<[AtomicU64]>,
    /// Only where a host page is larger than a target page.
    hosts: Option<HostPages>,
}

#[derive(Debug)]
struct HostPages {
    /// [`OWNED`] and [`URGENT`], one a host page.
    owners: Box<[AtomicU8]>,
    /// What the owners have taken off the map and not spent yet, to be put back if need be.
    taken: Box<[AtomicU64]>,
}

/// Where a sender stands in its walk over all pages, from the first block's first page to the
/// last block's last: one turn. Several senders each have their own.
#[derive(Clone, Debug)]
pub struct Sweep {
    block: usize,
    page: u64,
    batch: u32,
}

impl Sweep {
    /// Goes on from a page: what follows a page that somebody waited for is likely to be wanted
    /// next. The turn that has begun ends as before, at the end of the last block.
    pub fn go_on_from(&mut self, block: BlockIndex, page: TargetPage) {
        self.block = block.index();
        self.page = page.0;
    }

    /// From the start, claiming up to 64 neighbours at once where host pages are target pages.
    fn new() -> Sweep {
        Sweep { block: 0, page: 0, batch: u64::BITS }
    }

    /// Claims at most `pages` neighbours at once (1 to 64). What is claimed cannot be had by a
    /// request any more: few pages where somebody may be waiting, many where nobody does.
    ///
    /// # Panics
    /// When `pages` is not 1 to 64.
    pub fn set_batch(&mut self, pages: u32) {
        assert!((1..=u64::BITS).contains(&pages), "a batch has 1 to 64 pages, not {pages}");
        self.batch = pages;
    }
}

impl PageMap {
    /// The map of `ram`; nothing is to be sent.
    pub fn new(ram: &GuestRam) -> PageMap {
        PageMap::with_units(ram, |block| ram.block(block).host_page_size())
    }

    /// The map of `ram` where what must not be split over two channels, its "host page", is
    /// `unit` in each block: what the destination places at once. Nothing is to be sent.
    ///
    /// # Panics
    /// When a block is no multiple of its unit.
    pub fn with_units(ram: &GuestRam, unit: impl Fn(BlockIndex) -> PageSize) -> PageMap {
        let block_map = |(index, block): (BlockIndex, &crate::RamBlock)| {
            let per_host = unit(index).target_pages();
            assert!(
                block.target_pages().is_multiple_of(per_host),
                "block {} is a multiple of its unit",
                block.name()
            );
            BlockMap::new(block.target_pages(), per_host)
        };
        PageMap { blocks: ram.blocks().map(block_map).collect(), pending: AtomicU64::new(0) }
    }

    /// Every page is to be sent.
    pub fn fill(&self) {
        for (block, map) in (0u16..).map(BlockIndex).zip(&self.blocks) {
            for word in 0..map.to_send.len() {
                self.add(block, word, map.valid(word));
            }
        }
    }

    /// Adds dirty pages; gives how many of them were not on the map already.
    pub fn mark(&self, dirty: &DirtyBits) -> u64 {
        let mut new = 0;
        for (block, map) in (0u16..).map(BlockIndex).zip(&self.blocks) {
            for (word, bits) in dirty.words(block).iter().enumerate() {
                new += self.add(block, word, bits & map.valid(word));
            }
        }
        new
    }

    /// How many target pages are still on the map; what a claim has taken off is not counted.
    ///
    /// A counter, read at no cost: exact when no other thread is changing the map, off by what
    /// is changing at this moment otherwise.
    pub fn pending(&self) -> u64 {
        let count = self.pending.load(Ordering::Relaxed);
        if count > u64::MAX / 2 { 0 } else { count }
    }

    /// Whether a target page is still on the map.
    pub fn is_pending(&self, block: BlockIndex, page: TargetPage) -> bool {
        let map = self.block(block);
        assert!(page.0 < map.pages, "{page:?} is outside its block");
        let (word, bit) = position(page.0);
        map.to_send[word].load(Ordering::Acquire) & bit != 0
    }

    /// Makes every host page of which a part is still to be sent one that is to be sent whole;
    /// gives how many target pages that added. For the start of postcopy, where the destination
    /// can only place whole host pages.
    ///
    /// # Panics
    /// When a claim on a host page is still held: it would be split.
    pub fn widen_to_host_pages(&self) -> u64 {
        let mut new = 0;
        for (block, map) in (0u16..).map(BlockIndex).zip(&self.blocks) {
            let Some(hosts) = &map.hosts else { continue };
            for (number, owner) in (0u64..).zip(&hosts.owners) {
                let owned = owner.load(Ordering::Acquire) & OWNED != 0;
                assert!(!owned, "host page {number} of {block:?} is still held by a claim");
                let page = HostPage { block, number };
                if self.any_pending(page) {
                    for word in words(map.host_range(number)) {
                        new += self.add(block, word, map.host_mask(number, word));
                    }
                }
            }
        }
        new
    }

    /// The runs of pages of a block that are still to be sent, in ascending order. What other
    /// threads claim or mark meanwhile may be in it or not.
    pub fn runs(&self, block: BlockIndex) -> impl Iterator<Item = Range<u64>> {
        let map = self.block(block);
        let mut from = 0;
        std::iter::from_fn(move || {
            let start = map.next_set(from)?;
            from = map.next_clear(start);
            Some(start..from)
        })
    }

    /// Every page of a run is to be sent; gives how many were not on the map already.
    ///
    /// # Panics
    /// When the run is not inside the block.
    pub fn mark_run(&self, block: BlockIndex, run: Range<u64>) -> u64 {
        assert!(run.end <= self.block(block).pages, "{run:?} is outside its block");
        words(run.clone()).map(|word| self.add(block, word, mask(&run, word))).sum()
    }

    /// No page of a run is to be sent any more.
    ///
    /// # Panics
    /// When the run is not inside the block.
    pub fn unmark_run(&self, block: BlockIndex, run: Range<u64>) {
        assert!(run.end <= self.block(block).pages, "{run:?} is outside its block");
        words(run.clone()).for_each(|word| {
            self.take(block, word, mask(&run, word));
        });
    }

    /// The destination has said which pages of a block it has (64 a word, the lowest in the lowest
    /// bit): the others are to be sent, and only they. For a recovery, while nobody holds a claim on
    /// a page of the block.
    ///
    /// # Panics
    /// When there are fewer or more words than the block has.
    pub fn mark_missing(&self, block: BlockIndex, received: &[u64]) {
        let map = self.block(block);
        assert_eq!(received.len(), map.to_send.len(), "a bit for each page");
        for (word, received) in received.iter().enumerate() {
            let missing = !received & map.valid(word);
            self.take(block, word, !missing);
            self.add(block, word, missing);
        }
    }

    /// What is not split in this block.
    pub fn unit(&self, block: BlockIndex) -> PageSize {
        let pages = usize::try_from(self.block(block).per_host).expect("a page fits in memory");
        PageSize::new(pages * TARGET_PAGE.bytes()).expect("units are page sizes")
    }

    /// A walk over the whole map.
    pub fn sweep(&self) -> Sweep {
        Sweep::new()
    }

    /// Claims what comes next in `sweep`; `None` at the end of a turn, after which the next call
    /// begins a new one. Host pages that another thread holds are passed over.
    pub fn claim_next(&self, sweep: &mut Sweep) -> Option<Claim<'_>> {
        while let Some(map) = self.blocks.get(sweep.block) {
            let block = BlockIndex(u16::try_from(sweep.block).expect("at most 65,535 blocks"));
            let claim = match &map.hosts {
                None => self.next_batch(block, sweep),
                Some(_) => self.next_host_page(block, sweep),
            };
            if claim.is_some() {
                return claim;
            }
            sweep.block += 1;
            sweep.page = 0;
        }
        sweep.block = 0;
        None
    }

    /// Claims the very page that a request names.
    ///
    /// # Panics
    /// When the page is outside its block: requests are checked first
    /// ([`GuestRam::host_page`]).
    pub fn claim(&self, page: HostPage) -> Asked<'_> {
        let map = self.block(page.block);
        assert!(map.host_range(page.number).end <= map.pages, "{page:?} is outside its block");
        if map.hosts.is_some() {
            return self.own(page, URGENT);
        }
        let (word, bit) = position(page.number);
        match self.take(page.block, word, bit) {
            0 => Asked::AlreadySent,
            bits => Asked::Claimed(Claim::of_batch(self, page.block, word, bits)),
        }
    }

    fn next_batch(&self, block: BlockIndex, sweep: &mut Sweep) -> Option<Claim<'_>> {
        let map = self.block(block);
        while let Some(first) = map.next_set(sweep.page) {
            let (word, bit) = position(first);
            // `batch` pages from the first set one on, cut off at the end of the word.
            let span = u64::MAX >> (u64::BITS - sweep.batch);
            let bits = self.take(block, word, span << bit.trailing_zeros());
            sweep.page = (first + u64::from(sweep.batch)).min((first / 64 + 1) * 64);
            if bits != 0 {
                return Some(Claim::of_batch(self, block, word, bits));
            }
        }
        None
    }

    fn next_host_page(&self, block: BlockIndex, sweep: &mut Sweep) -> Option<Claim<'_>> {
        let map = self.block(block);
        while let Some(first) = map.next_set(sweep.page) {
            let number = first / map.per_host;
            sweep.page = (number + 1) * map.per_host;
            if let Asked::Claimed(claim) = self.own(HostPage { block, number }, 0) {
                return Some(claim);
            }
        }
        None
    }

    /// Becomes the owner of a host page, or tells its owner of `urgent`.
    fn own(&self, page: HostPage, urgent: u8) -> Asked<'_> {
        let owner = self.owner(page);
        if owner.fetch_or(OWNED | urgent, Ordering::AcqRel) & OWNED != 0 {
            return Asked::UnderWay;
        }
        match Claim::of_host_page(self, page) {
            Some(claim) => Asked::Claimed(claim),
            None => {
                self.release(page, true);
                Asked::AlreadySent
            }
        }
    }

    /// The end of an ownership. A page that was `finished` has nobody waiting for it any more;
    /// otherwise whoever claims it next is told.
    pub(crate) fn release(&self, page: HostPage, finished: bool) {
        let over = if finished { OWNED | URGENT } else { OWNED };
        self.owner(page).fetch_and(!over, Ordering::Release);
    }

    pub(crate) fn is_urgent(&self, page: HostPage) -> bool {
        self.owner(page).load(Ordering::Acquire) & URGENT != 0
    }

    /// Takes what is set of `mask` off the map.
    pub(crate) fn take(&self, block: BlockIndex, word: usize, mask: u64) -> u64 {
        let bits = self.block(block).to_send[word].fetch_and(!mask, Ordering::AcqRel) & mask;
        if bits != 0 {
            self.pending.fetch_sub(count(bits), Ordering::Relaxed);
        }
        bits
    }

    /// Puts `bits` on the map; gives how many were not there.
    pub(crate) fn add(&self, block: BlockIndex, word: usize, bits: u64) -> u64 {
        if bits == 0 {
            return 0;
        }
        // Also where all of them seem to be set: whoever takes them off must see what was written
        // before this.
        let before = self.block(block).to_send[word].fetch_or(bits, Ordering::AcqRel);
        let new = count(bits & !before);
        self.pending.fetch_add(new, Ordering::Relaxed);
        new
    }

    /// Remembers what the owner of a host page has taken, until it is spent or put back.
    pub(crate) fn remember(&self, block: BlockIndex, word: usize, bits: u64) {
        self.hosts(block).taken[word].fetch_or(bits, Ordering::Relaxed);
    }

    /// Forgets what the owner of `page` has taken, and gives it.
    pub(crate) fn forget(&self, page: HostPage, word: usize) -> u64 {
        let mask = self.host_mask(page, word);
        self.hosts(page.block).taken[word].fetch_and(!mask, Ordering::Relaxed) & mask
    }

    /// How many pages of a host page are set from `word` on.
    pub(crate) fn pending_from(&self, page: HostPage, word: usize) -> u64 {
        let map = self.block(page.block);
        let set = |word: usize| {
            map.to_send[word].load(Ordering::Relaxed) & map.host_mask(page.number, word)
        };
        (word..self.host_words(page).end).map(|word| count(set(word))).sum()
    }

    fn any_pending(&self, page: HostPage) -> bool {
        self.pending_from(page, self.host_words(page).start) != 0
    }

    pub(crate) fn host_words(&self, page: HostPage) -> Range<usize> {
        words(self.host_range(page))
    }

    pub(crate) fn host_mask(&self, page: HostPage, word: usize) -> u64 {
        self.block(page.block).host_mask(page.number, word)
    }

    pub(crate) fn host_range(&self, page: HostPage) -> Range<u64> {
        self.block(page.block).host_range(page.number)
    }

    pub(crate) fn pages(&self, block: BlockIndex) -> u64 {
        self.block(block).pages
    }

    fn owner(&self, page: HostPage) -> &AtomicU8 {
        let number = usize::try_from(page.number).expect("RAM fits in memory");
        &self.hosts(page.block).owners[number]
    }

    fn hosts(&self, block: BlockIndex) -> &HostPages {
        self.block(block).hosts.as_ref().expect("only host pages larger than a target page")
    }

    fn block(&self, block: BlockIndex) -> &BlockMap {
        &self.blocks[block.index()]
    }
}

impl BlockMap {
    fn new(pages: u64, per_host: u64) -> BlockMap {
        let zeros = || (0..words(0..pages).len()).map(|_| AtomicU64::new(0)).collect();
        let hosts = (per_host > 1).then(|| HostPages {
            owners: (0..pages / per_host).map(|_| AtomicU8::new(0)).collect(),
            taken: zeros(),
        });
        BlockMap { pages, per_host, to_send: zeros(), hosts }
    }

    /// The first page from `page` on that is set.
    fn next_set(&self, page: u64) -> Option<u64> {
        let from = usize::try_from(page / 64).expect("RAM fits in memory");
        let mut mask = u64::MAX << (page % 64);
        for (word, bits) in self.to_send.iter().enumerate().skip(from) {
            let bits = bits.load(Ordering::Relaxed) & mask;
            if bits != 0 {
                return Some(word as u64 * 64 + u64::from(bits.trailing_zeros()));
            }
            mask = u64::MAX;
        }
        None
    }

    /// The first page from `page` on that is not set, or the end of the block.
    fn next_clear(&self, page: u64) -> u64 {
        let from = usize::try_from(page / 64).expect("RAM fits in memory");
        let mut mask = u64::MAX << (page % 64);
        for (word, bits) in self.to_send.iter().enumerate().skip(from) {
            let bits = !bits.load(Ordering::Relaxed) & mask;
            if bits != 0 {
                return (word as u64 * 64 + u64::from(bits.trailing_zeros())).min(self.pages);
            }
            mask = u64::MAX;
        }
        self.pages
    }

    /// The bits of a word that stand for pages.
    fn valid(&self, word: usize) -> u64 {
        mask(&(0..self.pages), word)
    }

    fn host_range(&self, number: u64) -> Range<u64> {
        let start = number.saturating_mul(self.per_host);
        start..start.saturating_add(self.per_host)
    }

    fn host_mask(&self, number: u64, word: usize) -> u64 {
        mask(&self.host_range(number), word)
    }
}
