//! The page map against a simple model: which pages are due, and who holds what.
#![expect(unsafe_code, reason = "lends plain memory to RAM blocks of any host page size")]

use std::alloc::{Layout, alloc_zeroed};
use std::collections::BTreeSet;
use std::ptr::NonNull;

use proptest::prelude::*;
use whimbrel_ram::dirty::DirtyBits;
use whimbrel_ram::{
    Asked, BlockIndex, Claim, GuestRam, HostPage, PageMap, PageSize, RamBlock, Sweep, TargetPage,
};

type Page = (BlockIndex, u64);

fn block(name: &str, pages: u64, host_page: PageSize) -> RamBlock {
    let len = usize::try_from(pages).expect("small") * 4096;
    let layout = Layout::from_size_align(len, host_page.bytes()).expect("a power of two");
    // SAFETY: the layout is not empty.
    let memory = NonNull::new(unsafe { alloc_zeroed(layout) }).expect("memory");
    // SAFETY: the memory is aligned to the host page and never freed.
    unsafe { RamBlock::external(name, 0, memory, len, host_page) }.expect("a good length")
}

/// A block of target pages that ends in the middle of a word, and one of larger host pages.
fn ram(host_page: PageSize, host_pages: u64) -> GuestRam {
    GuestRam::new(vec![
        block("small", 150, PageSize::SIZE_4K),
        block("large", host_pages * host_page.target_pages(), host_page),
    ])
}

fn dirty(ram: &GuestRam, pages: impl IntoIterator<Item = Page>) -> DirtyBits {
    let mut bits = DirtyBits::none(ram);
    for (block, page) in pages {
        bits.insert(block, TargetPage(page), 1);
    }
    bits
}

fn all_pages(ram: &GuestRam) -> Vec<Page> {
    ram.blocks().flat_map(|(index, b)| (0..b.target_pages()).map(move |p| (index, p))).collect()
}

/// Everything a turn of a sweep gives.
fn drain(map: &PageMap) -> Vec<Page> {
    let mut sweep = map.sweep();
    let mut pages = Vec::new();
    while let Some(mut claim) = map.claim_next(&mut sweep) {
        while let Some(page) = claim.next_page() {
            pages.push((claim.block(), page.0));
        }
        claim.spend();
    }
    pages
}

#[derive(Clone, Debug)]
enum Op {
    Mark(usize, usize),
    Fill,
    Sweep { which: usize, batch: u32 },
    Request(usize),
    Take { which: usize, pages: usize },
    Spend(usize),
    Drop(usize),
    Widen,
}

fn op() -> impl Strategy<Value = Op> {
    let any = any::<prop::sample::Index>().prop_map(|index| index.index(1 << 20));
    prop_oneof![
        6 => (any.clone(), 1..90usize).prop_map(|(first, count)| Op::Mark(first, count)),
        1 => Just(Op::Fill),
        6 => (0..2usize, 1..=64u32).prop_map(|(which, batch)| Op::Sweep { which, batch }),
        6 => any.clone().prop_map(Op::Request),
        6 => (any.clone(), 1..700usize).prop_map(|(which, pages)| Op::Take { which, pages }),
        4 => any.clone().prop_map(Op::Spend),
        2 => any.prop_map(Op::Drop),
        1 => Just(Op::Widen),
    ]
}

/// A claim together with what it gave.
struct Held<'m> {
    claim: Claim<'m>,
    /// What a claim on target pages took off the map.
    batch: BTreeSet<Page>,
    taken: Vec<Page>,
}

struct Model<'m> {
    ram: &'m GuestRam,
    map: &'m PageMap,
    pages: Vec<Page>,
    /// Marked and not taken since: these must be sent.
    due: BTreeSet<Page>,
    /// Taken since it was marked, but marked while a claim held it: it may come again.
    maybe: BTreeSet<Page>,
    sweeps: [Sweep; 2],
    held: Vec<Held<'m>>,
}

impl<'m> Model<'m> {
    fn host_page(&self, (block, page): Page) -> HostPage {
        self.ram.host_page(block, TargetPage(page).offset()).expect("inside")
    }

    fn is_large(page: Page) -> bool {
        page.0 == BlockIndex(1)
    }

    fn owner_of(&self, page: Page) -> Option<usize> {
        let owns =
            |held: &Held<'_>| held.claim.block() == page.0 && held.claim.span().contains(&page.1);
        self.held.iter().position(owns).filter(|_| Self::is_large(page))
    }

    fn mark(&mut self, pages: &[Page]) {
        let fresh = pages.iter().filter(|p| !self.map.is_pending(p.0, TargetPage(p.1))).count();
        let new = self.map.mark(&dirty(self.ram, pages.iter().copied()));
        assert_eq!(new, fresh as u64);
        self.due.extend(pages);
    }

    /// What is on the map of the block whose claims are batches.
    fn pending_small(&self) -> BTreeSet<Page> {
        let on_map = |p: &&Page| !Self::is_large(**p) && self.map.is_pending(p.0, TargetPage(p.1));
        self.pages.iter().filter(on_map).copied().collect()
    }

    fn hold(&mut self, before: &BTreeSet<Page>, claim: Claim<'m>) {
        let first = (claim.block(), claim.span().start);
        assert_eq!(self.owner_of(first), None, "a host page has one owner");
        assert!(claim.remaining() > 0, "no claim is empty");
        assert!(claim.span().end <= self.ram.block(claim.block()).target_pages());
        let batch = before - &self.pending_small();
        assert!(Self::is_large(first) || claim.remaining() == batch.len() as u64);
        self.held.push(Held { claim, batch, taken: Vec::new() });
    }

    fn request(&mut self, page: Page) {
        let owner = self.owner_of(page);
        let before = self.pending_small();
        match self.map.claim(self.host_page(page)) {
            Asked::Claimed(claim) => {
                assert_eq!(claim.is_urgent(), Self::is_large(page));
                self.hold(&before, claim);
            }
            Asked::UnderWay => {
                let owner = owner.expect("only an owner is told");
                assert!(self.held[owner].claim.is_urgent());
            }
            Asked::AlreadySent => {
                assert_eq!(owner, None);
                assert!(!self.map.is_pending(page.0, TargetPage(page.1)));
            }
        }
    }

    fn take(&mut self, which: usize, pages: usize) {
        let Some(which) = which.checked_rem(self.held.len()) else { return };
        let held = &mut self.held[which];
        for _ in 0..pages {
            let before = held.claim.remaining();
            let Some(page) = held.claim.next_page() else {
                assert_eq!(before, 0);
                return;
            };
            assert_eq!(held.claim.remaining(), before - 1);
            let page = (held.claim.block(), page.0);
            assert!(held.claim.span().contains(&page.1));
            assert!(held.taken.last().is_none_or(|last| *last < page), "ascending, once each");
            let was_due = self.due.remove(&page);
            let known = if Self::is_large(page) {
                was_due | self.maybe.remove(&page)
            } else {
                held.batch.remove(&page)
            };
            assert!(known, "{page:?} was never marked");
            if self.map.is_pending(page.0, TargetPage(page.1)) {
                self.maybe.insert(page);
            }
            held.taken.push(page);
        }
    }

    fn end(&mut self, which: usize, spend: bool) {
        let Some(which) = which.checked_rem(self.held.len()) else { return };
        let Held { claim, batch, taken } = self.held.swap_remove(which);
        self.maybe.extend(batch);
        if spend {
            claim.spend();
        } else {
            drop(claim);
            self.due.extend(taken);
        }
    }

    fn apply(&mut self, op: &Op) {
        match *op {
            Op::Mark(first, count) => {
                let first = first % self.pages.len();
                let end = self.pages.len().min(first + count);
                let pages = self.pages[first..end].to_vec();
                self.mark(&pages);
            }
            Op::Fill => {
                self.map.fill();
                self.due.extend(&self.pages);
            }
            Op::Sweep { which, batch } => {
                let before = self.pending_small();
                self.sweeps[which].set_batch(batch);
                if let Some(claim) = self.map.claim_next(&mut self.sweeps[which]) {
                    assert!(
                        claim.block() == BlockIndex(1) || claim.remaining() <= u64::from(batch)
                    );
                    self.hold(&before, claim);
                }
            }
            Op::Request(page) => self.request(self.pages[page % self.pages.len()]),
            Op::Take { which, pages } => self.take(which, pages),
            Op::Spend(which) => self.end(which, true),
            Op::Drop(which) => self.end(which, false),
            Op::Widen => self.widen(),
        }
    }

    fn widen(&mut self) {
        self.held.iter_mut().for_each(|held| while held.claim.next_page().is_some() {});
        // Dropped, not spent: all that was just taken is on the map again.
        while !self.held.is_empty() {
            self.end(0, false);
        }
        self.map.widen_to_host_pages();
        for &page in &self.pages {
            let size = self.ram.block(page.0).host_page_size();
            let mut host = self.host_page(page).target_pages(size);
            let set = self.map.is_pending(page.0, TargetPage(page.1));
            assert!(host.all(|p| self.map.is_pending(page.0, TargetPage(p)) == set));
            if set {
                self.due.insert(page);
            }
        }
    }

    /// No claim is held any more: what is on the map is what the model says, and comes out once.
    fn settle(mut self) {
        while !self.held.is_empty() {
            self.end(0, false);
        }
        let on_map = |p: &&Page| self.map.is_pending(p.0, TargetPage(p.1));
        let pending: Vec<Page> = self.pages.iter().filter(on_map).copied().collect();
        assert_eq!(self.map.pending(), pending.len() as u64);
        assert!(self.due.iter().all(|p| pending.contains(p)), "a page that is due was lost");
        assert!(pending.iter().all(|p| self.due.contains(p) || self.maybe.contains(p)));
        assert_eq!(drain(self.map), pending, "in order, each once");
        assert_eq!(self.map.pending(), 0);
    }
}

fn run(host_page: PageSize, host_pages: u64, ops: &[Op]) {
    let ram = ram(host_page, host_pages);
    let map = PageMap::new(&ram);
    let mut model = Model {
        ram: &ram,
        map: &map,
        pages: all_pages(&ram),
        due: BTreeSet::new(),
        maybe: BTreeSet::new(),
        sweeps: [map.sweep(), map.sweep()],
        held: Vec::new(),
    };
    ops.iter().for_each(|op| model.apply(op));
    model.settle();
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: if cfg!(miri) { 2 } else { 128 },
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    #[test]
    fn agrees_with_the_model_16k(ops in prop::collection::vec(op(), 1..80)) {
        run(PageSize::new(16 << 10).unwrap(), 37, &ops);
    }

    #[test]
    fn agrees_with_the_model_2m(ops in prop::collection::vec(op(), 1..80)) {
        run(PageSize::SIZE_2M, 2, &ops);
    }

    #[test]
    fn runs_are_what_was_marked(marked in prop::collection::vec((0..150u64, 0..90u64), 0..12)) {
        let ram = ram(PageSize::SIZE_2M, 1);
        let map = PageMap::new(&ram);
        let mut pages = BTreeSet::new();
        for (start, len) in marked {
            let run = start..(start + len).min(150);
            let new = run.clone().filter(|page| pages.insert(*page)).count();
            prop_assert_eq!(map.mark_run(BlockIndex(0), run), new as u64);
        }
        let runs: Vec<_> = map.runs(BlockIndex(0)).collect();
        prop_assert!(runs.windows(2).all(|pair| pair[0].end < pair[1].start), "as long as can be");
        prop_assert!(runs.iter().all(|run| !run.is_empty()));
        prop_assert_eq!(runs.into_iter().flatten().collect::<BTreeSet<_>>(), pages);
        prop_assert_eq!(map.runs(BlockIndex(1)).next(), None);
    }
}

#[test]
#[should_panic(expected = "outside its block")]
fn a_run_that_leaves_its_block_is_refused() {
    PageMap::new(&ram(PageSize::SIZE_2M, 1)).mark_run(BlockIndex(0), 149..151);
}

/// Where a destination places huge pages in small pieces, any target page may go out by itself.
#[test]
fn the_unit_is_what_is_not_split() {
    let ram = ram(PageSize::SIZE_2M, 2);
    let (small, large) = (BlockIndex(0), BlockIndex(1));
    let map = PageMap::with_units(&ram, |_| PageSize::SIZE_4K);
    map.fill();
    assert_eq!(map.unit(large), PageSize::SIZE_4K);
    let Asked::Claimed(mut claim) = map.claim(HostPage { block: large, number: 700 }) else {
        panic!("it is on the map")
    };
    assert_eq!(claim.next_page(), Some(TargetPage(700)));
    assert_eq!(claim.next_page(), None);
    claim.spend();
    assert_eq!(map.pending(), 150 + 1024 - 1);
    assert_eq!(map.widen_to_host_pages(), 0, "nothing is due because of its neighbours");

    let map = PageMap::with_units(&ram, |block| match block {
        BlockIndex(0) => PageSize::SIZE_4K,
        _ => PageSize::new(16 << 10).unwrap(),
    });
    assert_eq!((map.unit(small), map.unit(large).bytes()), (PageSize::SIZE_4K, 16 << 10));
    map.mark_run(large, 5..6);
    assert_eq!(map.widen_to_host_pages(), 3);
    assert_eq!(drain(&map), [4, 5, 6, 7].map(|page| (large, page)));
}

#[test]
#[should_panic(expected = "multiple of its unit")]
fn a_unit_that_does_not_fit_is_refused() {
    let _ = PageMap::with_units(&ram(PageSize::SIZE_2M, 1), |_| PageSize::SIZE_2M);
}

/// A sweep that follows a request leaves what it jumps over for its next turn.
#[test]
fn a_sweep_goes_on_from_where_it_is_sent() {
    let ram = ram(PageSize::SIZE_2M, 2);
    let (small, large) = (BlockIndex(0), BlockIndex(1));
    let map = PageMap::new(&ram);
    map.fill();
    let mut sweep = map.sweep();
    sweep.set_batch(1);
    let mut next = |jump: Option<(BlockIndex, u64)>| {
        if let Some((block, page)) = jump {
            sweep.go_on_from(block, TargetPage(page));
        }
        let mut claim = map.claim_next(&mut sweep)?;
        let first = (claim.block(), claim.next_page().expect("no claim is empty").0);
        while claim.next_page().is_some() {}
        claim.spend();
        Some(first)
    };
    assert_eq!(next(None), Some((small, 0)));
    assert_eq!(next(Some((small, 100))), Some((small, 100)));
    assert_eq!(next(None), Some((small, 101)));
    assert_eq!(next(Some((large, 600))), Some((large, 512)), "whole host pages");
    assert_eq!(next(Some((small, 149))), Some((small, 149)));
    assert_eq!(next(None), Some((large, 0)));
    assert_eq!(next(None), None, "the end of the turn");
    assert_eq!(next(None), Some((small, 1)), "what was jumped over");
    let rest = drain(&map);
    assert_eq!(rest.len(), 150 - 5, "and nothing twice");
}

#[test]
fn a_full_map_comes_out_in_order_once() {
    let ram = ram(PageSize::SIZE_2M, 2);
    let map = PageMap::new(&ram);
    assert_eq!(drain(&map), []);
    map.fill();
    map.fill();
    assert_eq!(map.pending(), 150 + 1024);
    assert_eq!(drain(&map), all_pages(&ram));
    assert_eq!(map.pending(), 0);
}

#[test]
fn a_request_between_two_pages_of_a_sweep_is_not_sent_twice() {
    let ram = ram(PageSize::SIZE_2M, 1);
    let map = PageMap::new(&ram);
    map.fill();
    let asked = ram.host_page(BlockIndex(0), 100 * 4096).unwrap();
    let Asked::Claimed(mut claim) = map.claim(asked) else { panic!("it is on the map") };
    assert_eq!(claim.next_page(), Some(TargetPage(100)));
    assert_eq!(claim.next_page(), None);
    claim.spend();
    assert!(matches!(map.claim(asked), Asked::AlreadySent));
    assert!(!drain(&map).contains(&(BlockIndex(0), 100)));
}

#[test]
fn urgency_outlives_a_claim_that_was_dropped() {
    let ram = ram(PageSize::SIZE_2M, 1);
    let map = PageMap::new(&ram);
    map.fill();
    let page = HostPage { block: BlockIndex(1), number: 0 };
    let mut sweep = map.sweep();
    let mut next_large = || loop {
        let claim = map.claim_next(&mut sweep)?;
        if claim.block() == page.block {
            return Some(claim);
        }
        claim.spend();
    };
    let claim = next_large().unwrap();
    assert!(!claim.is_urgent());
    assert!(matches!(map.claim(page), Asked::UnderWay));
    assert!(claim.is_urgent());
    drop(claim);
    assert!(next_large().is_none(), "the end of the turn");
    let mut claim = next_large().unwrap();
    assert!(claim.is_urgent(), "whoever goes on with the page knows that somebody waits");
    while claim.next_page().is_some() {}
    claim.spend();
    map.fill();
    assert!(!next_large().or_else(next_large).unwrap().is_urgent(), "it was answered");
}
