//! Every interleaving of the page map's atomics, at the smallest scale that shows them.
//!
//! `RUSTFLAGS="--cfg loom" cargo test -p whimbrel-ram --test loom --release`
#![cfg(loom)]
#![expect(unsafe_code, reason = "lends plain memory to RAM blocks of any host page size")]

use std::ptr::NonNull;

use loom::sync::Arc;
use loom::thread;
use whimbrel_ram::dirty::DirtyBits;
use whimbrel_ram::{
    Asked, BlockIndex, Claim, GuestRam, HostPage, PageMap, PageSize, RamBlock, TargetPage,
};

const BLOCK: BlockIndex = BlockIndex(0);
const FIRST: HostPage = HostPage { block: BLOCK, number: 0 };

#[repr(align(65536))]
struct Memory([u8; 4 * 65536]);
static MEMORY: Memory = Memory([0; 4 * 65536]);

/// A block of `pages` target pages in host pages of `per_host` each. The map never touches the
/// memory itself.
fn ram(pages: usize, per_host: usize) -> GuestRam {
    let memory = NonNull::from(&MEMORY.0).cast::<u8>();
    let host_page = PageSize::new(per_host * 4096).expect("a power of two");
    // SAFETY: aligned and long enough, static, and never accessed through the block.
    let block = unsafe { RamBlock::external("ram", 0, memory, pages * 4096, host_page) };
    GuestRam::new(vec![block.expect("a good length")])
}

fn bits(ram: &GuestRam, page: u64) -> DirtyBits {
    let mut bits = DirtyBits::none(ram);
    bits.insert(BLOCK, TargetPage(page), 1);
    bits
}

/// Takes all pages of a claim, and spends it.
fn send(mut claim: Claim<'_>) -> Vec<u64> {
    let pages = std::iter::from_fn(|| claim.next_page()).map(|page| page.0).collect();
    claim.spend();
    pages
}

/// One turn of a sweep.
fn sweep(map: &PageMap, batch: u32) -> Vec<u64> {
    let mut sweep = map.sweep();
    sweep.set_batch(batch);
    std::iter::from_fn(|| map.claim_next(&mut sweep)).flat_map(send).collect()
}

fn request(map: &PageMap, page: HostPage) -> Vec<u64> {
    match map.claim(page) {
        Asked::Claimed(claim) => send(claim),
        Asked::AlreadySent | Asked::UnderWay => Vec::new(),
    }
}

fn model(ram: &GuestRam, test: impl Fn(GuestRam, Arc<PageMap>) + Sync + Send + 'static) {
    let ram = ram.clone();
    let mut builder = loom::model::Builder::new();
    // Nearly all bugs show with two preemptions; without a bound three threads take minutes.
    builder.preemption_bound = Some(3);
    builder.check(move || test(ram.clone(), Arc::new(PageMap::new(&ram))));
}

#[test]
fn two_sweeps_and_a_request_send_each_page_once() {
    model(&ram(2, 1), |_, map| {
        map.fill();
        let other = thread::spawn({
            let map = map.clone();
            move || sweep(&map, 1)
        });
        let urgent = thread::spawn({
            let map = map.clone();
            move || request(&map, HostPage { block: BLOCK, number: 1 })
        });
        let mut sent = sweep(&map, 1);
        sent.extend(other.join().unwrap());
        sent.extend(urgent.join().unwrap());
        sent.sort_unstable();
        assert_eq!(sent, [0, 1]);
        assert_eq!(map.pending(), 0);
    });
}

/// The guest's write is `content`; the dirty log says so to `mark` afterwards. Whatever the order,
/// the last version that is sent is the last one written.
#[test]
fn a_page_written_while_it_is_sent_is_sent_again() {
    use loom::sync::atomic::{AtomicU64, Ordering::Relaxed};
    for per_host in [1, 2] {
        model(&ram(2, per_host), |ram, map| {
            map.fill();
            let content = Arc::new(AtomicU64::new(1));
            let writer = thread::spawn({
                let (map, content) = (map.clone(), content.clone());
                move || {
                    content.store(2, Relaxed);
                    map.mark(&bits(&ram, 0));
                }
            });
            let mut last_sent = 0;
            let mut turn = || {
                let mut sweep = map.sweep();
                while let Some(mut claim) = map.claim_next(&mut sweep) {
                    while let Some(page) = claim.next_page() {
                        if page == TargetPage(0) {
                            last_sent = content.load(Relaxed);
                        }
                    }
                    claim.spend();
                }
            };
            turn();
            writer.join().unwrap();
            turn();
            assert_eq!(last_sent, 2);
            assert_eq!(map.pending(), 0);
        });
    }
}

#[test]
fn a_dropped_claim_puts_its_pages_back() {
    for per_host in [1, 2] {
        model(&ram(2, per_host), |ram, map| {
            map.fill();
            let failing = thread::spawn({
                let map = map.clone();
                move || {
                    if let Some(mut claim) = map.claim_next(&mut map.sweep()) {
                        claim.next_page();
                    }
                }
            });
            let marker = thread::spawn({
                let map = map.clone();
                move || {
                    map.mark(&bits(&ram, 1));
                }
            });
            let mut sent = sweep(&map, 64);
            failing.join().unwrap();
            marker.join().unwrap();
            sent.extend(sweep(&map, 64));
            sent.sort_unstable();
            sent.dedup();
            assert_eq!(sent, [0, 1]);
            assert_eq!(map.pending(), 0);
        });
    }
}

#[test]
fn a_host_page_has_one_owner() {
    use loom::sync::atomic::{AtomicBool, Ordering::Relaxed};
    model(&ram(4, 2), |_, map| {
        map.fill();
        let held = Arc::new([AtomicBool::new(false), AtomicBool::new(false)]);
        let sender = |map: Arc<PageMap>, held: Arc<[AtomicBool; 2]>, first: bool| {
            move || {
                let mut sweep = map.sweep();
                let mut sent = Vec::new();
                let mut hold = |claim: Claim<'_>| {
                    let number = usize::try_from(claim.span().start / 2).unwrap();
                    assert!(!held[number].swap(true, Relaxed), "two owners");
                    let mut claim = claim;
                    sent.extend(std::iter::from_fn(|| claim.next_page()));
                    held[number].store(false, Relaxed);
                    claim.spend();
                };
                if first && let Asked::Claimed(claim) = map.claim(FIRST) {
                    hold(claim);
                }
                while let Some(claim) = map.claim_next(&mut sweep) {
                    hold(claim);
                }
                sent
            }
        };
        let other = thread::spawn(sender(map.clone(), held.clone(), true));
        let mut sent = sender(map.clone(), held, false)();
        sent.extend(other.join().unwrap());
        sent.sort_unstable();
        assert_eq!(sent, [0, 1, 2, 3].map(TargetPage), "each page once");
    });
}

/// A request that finds its page under way is known to the owner before the page is finished, or
/// the page is finished, or whoever owns it next knows.
#[test]
fn an_urgent_request_is_never_lost() {
    for fails in [false, true] {
        model(&ram(2, 2), move |_, map| {
            map.fill();
            let background = thread::spawn({
                let map = map.clone();
                move || {
                    let Some(mut claim) = map.claim_next(&mut map.sweep()) else { return };
                    if fails {
                        claim.next_page();
                        drop(claim);
                    } else {
                        send(claim);
                    }
                }
            });
            let asked = map.claim(FIRST);
            let under_way = matches!(asked, Asked::UnderWay);
            if let Asked::Claimed(claim) = asked {
                assert!(claim.is_urgent());
                send(claim);
            }
            background.join().unwrap();
            match map.claim_next(&mut map.sweep()) {
                Some(claim) => {
                    assert!(fails && under_way, "it was sent by the one or the other");
                    assert!(claim.is_urgent(), "the request was forgotten");
                }
                None => assert!(!(fails && under_way)),
            }
        });
    }
}

/// Postcopy: the background sweeps, two urgent channels answer requests, one of them two in a row.
/// What is on the map goes out once and what is not goes out never; no host page goes out on two
/// channels; and who is told that a page is under way can rely on its owner to know that somebody
/// waits.
#[test]
fn background_and_urgent_channels_send_each_host_page_once_and_whole() {
    use loom::sync::atomic::{AtomicBool, Ordering::Acquire, Ordering::Release};
    const SECOND: HostPage = HostPage { block: BLOCK, number: 1 };
    model(&ram(4, 2), |ram, map| {
        // Page 2 has been sent before.
        for page in [0, 1, 3] {
            map.mark(&bits(&ram, page));
        }
        let told = Arc::new([AtomicBool::new(false), AtomicBool::new(false)]);
        let background = thread::spawn({
            let (map, told) = (map.clone(), told.clone());
            move || {
                let (mut sweep, mut sent) = (map.sweep(), Vec::new());
                while let Some(mut claim) = map.claim_next(&mut sweep) {
                    let host = usize::try_from(claim.span().start / 2).unwrap();
                    while let Some(page) = claim.next_page() {
                        sent.push(page.0);
                        let waiting = told[host].load(Acquire);
                        assert!(!waiting || claim.is_urgent(), "the request was lost");
                    }
                    claim.spend();
                }
                sent
            }
        });
        let ask = |map: Arc<PageMap>, told: Arc<[AtomicBool; 2]>, pages: &'static [HostPage]| {
            move || {
                let mut sent = Vec::new();
                for page in pages {
                    match map.claim(*page) {
                        Asked::Claimed(claim) => {
                            assert!(claim.is_urgent());
                            sent.extend(send(claim));
                        }
                        Asked::UnderWay => {
                            told[usize::try_from(page.number).unwrap()].store(true, Release);
                        }
                        Asked::AlreadySent => {
                            let mut pages = page.number * 2..page.number * 2 + 2;
                            assert!(pages.all(|page| !map.is_pending(BLOCK, TargetPage(page))));
                        }
                    }
                }
                sent
            }
        };
        let other = thread::spawn(ask(map.clone(), told.clone(), &[FIRST]));
        let urgent = ask(map.clone(), told, &[SECOND, FIRST])();
        let channels = [urgent, other.join().unwrap(), background.join().unwrap()];
        let mut sent: Vec<u64> = channels.iter().flatten().copied().collect();
        sent.sort_unstable();
        assert_eq!(sent, [0, 1, 3], "once what was on the map, the other never");
        for channel in &channels {
            assert_eq!(channel.contains(&0), channel.contains(&1), "split over two channels");
        }
        assert_eq!(map.pending(), 0);
    });
}
