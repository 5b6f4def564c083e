//! A checkpoint that is complete is copied to where the guest's memory is, by several threads.

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::thread;

use whimbrel_ram::dirty::DirtyBits;
use whimbrel_ram::{GuestRam, RamCache};

use crate::error::Error;
use crate::worker::{Role, scoped};

/// Threads beside the one that asks, at most.
const FLUSHERS_MAX: u8 = 4;

/// Copies what is marked in `cache`, or in `written`, to `ram`; gives how many pages that were.
pub(crate) fn flush(cache: &RamCache, ram: &GuestRam, written: &DirtyBits) -> Result<u64, Error> {
    let (next, copied) = (AtomicUsize::new(0), AtomicU64::new(0));
    let work = || -> Result<(), Error> {
        loop {
            let part = next.fetch_add(1, Ordering::Relaxed);
            if part >= cache.parts() {
                return Ok(());
            }
            copied.fetch_add(cache.flush_part(part, ram, written)?, Ordering::Relaxed);
        }
    };
    let beside = thread::available_parallelism().map_or(1, usize::from).min(cache.parts()) - 1;
    thread::scope(|scope| {
        let others: Vec<_> = (0..FLUSHERS_MAX.min(u8::try_from(beside).unwrap_or(FLUSHERS_MAX)))
            .map_while(|number| scoped(scope, Role::DestinationFlush(number), work).ok())
            .collect();
        let own = work();
        let joined = others.into_iter().map(|other| other.join().unwrap_or(Err(Error::Cancelled)));
        joined.fold(own, |all, one| all.and(one))
    })?;
    Ok(copied.load(Ordering::Relaxed))
}
