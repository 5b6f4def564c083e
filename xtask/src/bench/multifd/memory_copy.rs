//! How fast memory is copied to memory here, on so many threads at once: below a link's limit there
//! is this one.

use std::hint::black_box;
use std::thread;
use std::time::Instant;

use anyhow::Result;
use serde_json::{Map, Value, json};
use whimbrel_ram::RamBlock;

use crate::bench::sample::Spread;

/// What each thread copies: far more than any cache holds.
const BYTES: u64 = 256 << 20;
const PIECE_BYTES: usize = 512 << 10;
const ROUNDS: usize = 5;

/// Billions of bytes per second, all threads together, the median of some rounds.
pub(super) fn rates(threads: &[u8]) -> Result<Value> {
    let mut rates = Map::new();
    for &threads in threads {
        let threads = threads.max(1);
        let blocks = (0..threads)
            .map(|_| {
                let block = RamBlock::anonymous("memory", 0, BYTES)?;
                block.populate(0, BYTES)?;
                Ok((block, vec![1_u8; usize::try_from(BYTES)?]))
            })
            .collect::<Result<Vec<_>>>()?;
        let mut blocks = blocks;
        let rounds = (0..ROUNDS).map(|_| {
            let begun = Instant::now();
            thread::scope(|scope| {
                for (block, buffer) in &mut blocks {
                    scope.spawn(move || {
                        for (piece, offset) in
                            buffer.chunks_mut(PIECE_BYTES).zip((0..).step_by(PIECE_BYTES))
                        {
                            block.read(offset, piece).expect("as long as the block");
                        }
                        black_box(&buffer);
                    });
                }
            });
            let bytes = u32::from(threads) * u32::try_from(BYTES >> 20).expect("some MiB");
            f64::from(bytes) * f64::from(1 << 20) / 1e9 / begun.elapsed().as_secs_f64()
        });
        rates.insert(threads.to_string(), json!(Spread::of(rounds).map(Spread::json)));
    }
    Ok(Value::Object(rates))
}
