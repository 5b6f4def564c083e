//! What the page map costs: a turn over an empty map, and claiming, on one thread and on two.
//!
//! `cargo run --release -p whimbrel-ram --example page_map -- [MIB] [ROUNDS]`

use std::error::Error;
use std::time::{Duration, Instant};

use whimbrel_ram::dirty::DirtyBits;
use whimbrel_ram::{GuestRam, PageMap, PageSize, RamBlock, Sharing, TargetPage};

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1);
    let mut number = |default: u64| arguments.next().map_or(Ok(default), |text| text.parse());
    let bytes = number(16 << 10)? << 20;
    let rounds = number(7)?;
    // Memory is never touched, so it costs nothing.
    let ram = GuestRam::new(vec![RamBlock::anonymous("ram", 0, bytes)?]);
    let map = PageMap::new(&ram);
    let pages = bytes / 4096;

    let empty = median(rounds, || sweep(&map));
    let full = median(rounds, || {
        map.fill();
        timed(|| assert_eq!(sweep_pages(&map), pages))
    });
    let two = median(rounds, || {
        map.fill();
        timed(|| {
            std::thread::scope(|scope| {
                let other = scope.spawn(|| sweep_pages(&map));
                let here = sweep_pages(&map);
                assert_eq!(here + other.join().expect("no panic"), pages);
            });
        })
    });
    let mut sparse = DirtyBits::none(&ram);
    for page in (0..pages).step_by(97) {
        sparse.insert(whimbrel_ram::BlockIndex(0), TargetPage(page), 1);
    }
    let single = median(rounds, || {
        map.mark(&sparse);
        timed(|| assert_eq!(sweep_pages(&map), sparse.count()))
    });
    println!(
        "{{\"pages\": {pages}, \"empty-turn-ns-per-page\": {:.4}, \"claim-ns-per-page\": {:.2}, \
         \"two-threads-ns-per-page\": {:.2}, \"sparse-ns-per-claim\": {:.2}{}}}",
        per(empty, pages),
        per(full, pages),
        per(two, pages),
        per(single, sparse.count()),
        huge(rounds)?
    );
    Ok(())
}

/// The same for 2 MiB host pages, where the host has any.
fn huge(rounds: u64) -> Result<String, Box<dyn Error>> {
    let Ok(block) = RamBlock::memfd("huge", 0, 32 << 20, PageSize::SIZE_2M, Sharing::Shared) else {
        return Ok(String::new());
    };
    let pages = block.target_pages();
    let map = PageMap::new(&GuestRam::new(vec![block]));
    let turns = 200;
    let full = median(rounds, || {
        (0..turns)
            .map(|_| {
                map.fill();
                timed(|| assert_eq!(sweep_pages(&map), pages))
            })
            .sum()
    });
    Ok(format!(", \"huge-claim-ns-per-page\": {:.2}", per(full, turns * pages)))
}

fn sweep(map: &PageMap) -> Duration {
    timed(|| assert_eq!(sweep_pages(map), 0))
}

/// Takes and spends all that a turn gives.
fn sweep_pages(map: &PageMap) -> u64 {
    let (mut sweep, mut pages) = (map.sweep(), 0);
    while let Some(mut claim) = map.claim_next(&mut sweep) {
        while claim.next_page().is_some() {
            pages += 1;
        }
        claim.spend();
    }
    pages
}

fn timed(work: impl FnOnce()) -> Duration {
    let start = Instant::now();
    work();
    start.elapsed()
}

fn median(rounds: u64, mut work: impl FnMut() -> Duration) -> Duration {
    let mut times: Vec<Duration> = (0..rounds).map(|_| work()).collect();
    times.sort();
    times[times.len() / 2]
}

#[expect(clippy::cast_precision_loss, reason = "a rate, not a count")]
fn per(time: Duration, count: u64) -> f64 {
    time.as_nanos() as f64 / count as f64
}
