//! The zero-page test against a plain read of the same memory, in turns: how near is it to the
//! speed of the memory itself?
//!
//! `cargo run --release -p whimbrel-ram --example zero_scan -- [MIB] [ROUNDS]`
#![expect(unsafe_code, reason = "reads the block's memory directly, for comparison")]

use std::error::Error;
use std::hint::black_box;
use std::time::Instant;

use whimbrel_ram::{RamBlock, TargetPage, zero};

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1);
    let mut number = |default: u64| arguments.next().map_or(Ok(default), |text| text.parse());
    let bytes = number(1024)? << 20;
    let rounds = number(7)?;
    let block = RamBlock::anonymous("ram", 0, bytes)?;
    block.populate(0, bytes)?;

    let (mut scans, mut reads) = (Vec::new(), Vec::new());
    for _ in 0..rounds {
        scans.push(rate(bytes, || {
            assert!((0..block.target_pages()).all(|page| block.is_zero(TargetPage(page))));
        }));
        reads.push(rate(bytes, || {
            assert_eq!(black_box(sum(&block)), 0);
        }));
    }
    let (scan, read) = (median(&mut scans), median(&mut reads));
    println!(
        "{{\"zero-scan-gbps\": {scan:.2}, \"read-gbps\": {read:.2}, \"ratio\": {:.3}, \
         \"memory-bytes\": {bytes}, \"rounds\": {rounds}, \"instructions\": \"{}\"}}",
        scan / read,
        zero::implementation()
    );
    Ok(())
}

/// Reads all of it, with the widest loads this processor has: the memory's own speed.
fn sum(block: &RamBlock) -> u64 {
    let words = block.host_address().cast::<u64>().as_ptr();
    let count = usize::try_from(block.len() / 8).expect("a length of mapped memory");
    // SAFETY: the whole block, page aligned, and nobody writes to it.
    let words = unsafe { std::slice::from_raw_parts(words, count) };
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx512f") {
        // SAFETY: just detected.
        return unsafe { or_avx512(words) };
    } else if is_x86_feature_detected!("avx2") {
        // SAFETY: just detected.
        return unsafe { or_avx2(words) };
    }
    or(words)
}

/// Eight independent chains, so that no load waits for the one before.
#[inline(always)]
fn or(words: &[u64]) -> u64 {
    let mut sums = [0_u64; 64];
    let (chunks, rest) = words.as_chunks::<64>();
    for chunk in chunks {
        sums.iter_mut().zip(chunk).for_each(|(sum, word)| *sum |= word);
    }
    sums.iter().chain(rest).fold(0, |sum, word| sum | word)
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
fn or_avx512(words: &[u64]) -> u64 {
    or(words)
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn or_avx2(words: &[u64]) -> u64 {
    or(words)
}

fn rate(bytes: u64, work: impl FnOnce()) -> f64 {
    let start = Instant::now();
    work();
    #[expect(clippy::cast_precision_loss, reason = "a rate, not a count")]
    let gigabytes = bytes as f64 / 1e9;
    gigabytes / start.elapsed().as_secs_f64()
}

fn median(rates: &mut [f64]) -> f64 {
    rates.sort_by(f64::total_cmp);
    rates[rates.len() / 2]
}
