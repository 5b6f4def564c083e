//! Both sides of a recovery against each other, on simulated connections and a simulated clock.
//!
//! The machines are the real ones: [`SourceExchange`](super::exchange::SourceExchange),
//! [`DestinationExchange`](super::exchange::DestinationExchange), [`Proofs`](super::proofs::Proofs),
//! [`Retry`](crate::plan::Retry), the page map, the map of received pages and all codecs. What
//! drives them in production are threads, with sockets between; here it is a thin driver that does
//! one step of one thread at a time, in an order that a seed decides, as it decides which faults
//! befall the link, and when. After every step it is looked whether
//!
//! - two guests run,
//! - a page comes twice, torn, on two channels, or in another version than that of the hand-over,
//! - a page goes out that the destination has or that is on its way: what is sent again is what a
//!   cut has lost, and nothing else,
//! - a stranger is told anything, or an impostor more than a hello;
//!
//! and at the end whether every page is there, no vCPU waits, and it all took no longer than it
//! may once the link is up.
//!
//! A failure prints its seed: `WHIMBREL_SEED=… cargo test -p whimbrel --lib simulation` replays
//! it. `WHIMBREL_SCHEDULES` says how many schedules each test runs (10,000).

mod destination;
mod dice;
mod door;
mod faults;
mod heard;
mod net;
mod shape;
mod source;
mod world;

use std::env;
use std::thread;

use shape::Shape;
use world::{Summary, World};

/// Prints the seed of a schedule that has failed.
struct Seed(u64);

impl Drop for Seed {
    fn drop(&mut self) {
        if thread::panicking() {
            eprintln!("WHIMBREL_SEED={} replays it", self.0);
        }
    }
}

fn number(variable: &str) -> Option<u64> {
    let text = env::var(variable).ok()?;
    Some(text.parse().unwrap_or_else(|_| panic!("{variable} is a number, not {text}")))
}

fn run(qemu: bool) -> Summary {
    let shape = Shape::new();
    let seeds = match number("WHIMBREL_SEED") {
        Some(seed) => seed..seed + 1,
        None => 0..number("WHIMBREL_SCHEDULES").unwrap_or(10_000),
    };
    let mut sum = Summary::default();
    for seed in seeds {
        let _seed = Seed(seed);
        let map = shape.map();
        sum.add(&World::new(seed, qemu, &shape, &map).run());
    }
    println!("{sum:?}");
    sum
}

/// Whether so many schedules are expected to show everything there is.
fn are_many(sum: &Summary) -> bool {
    sum.schedules >= 1000
}

#[test]
fn two_whimbrels_come_through_whatever_befalls_the_link() {
    let sum = run(false);
    assert_eq!(sum.stranded, 0, "nobody is given up");
    if are_many(&sum) {
        assert!(sum.kept > 0 && sum.sessions > sum.schedules / 4, "{sum:?}");
        assert!(sum.lost > 0 && sum.refused > 0, "{sum:?}");
    }
}

#[test]
fn the_words_of_a_qemu_bring_every_page_too() {
    let sum = run(true);
    if are_many(&sum) {
        assert!(sum.kept > 0 && sum.stranded > 0, "{sum:?}");
        assert!(sum.sessions > sum.schedules / 4 && sum.lost > 0, "{sum:?}");
    }
}
