//! Puts the guest into a fresh VM's memory.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt as _;
use std::path::Path;

use whimbrel_ram::{BlockError, GuestRam, RamBlock};

use crate::config::Fill;
use crate::error::Error;
use crate::layout::{CONSTANTS, FIRMWARE, Layout, MAGIC, PICKS, RAM, RAM_ADDRESS, cpu_page};
use crate::pattern::{Constants, PAGE_BYTES, Page};
use crate::workload::WorkloadKind;

/// Pages after the working set have numbers from here on, so that no page of it looks like one.
const FILL_NUMBERS: u64 = 1 << 40;

/// How much of a file is copied into the memory at a time.
const PIECE_BYTES: u64 = 1 << 20;

/// Writes everything but what the accelerator itself needs (code, page tables).
pub(crate) fn build(ram: &GuestRam, layout: &Layout, fill: &Fill) -> Result<(), Error> {
    let block = ram.block(RAM);
    let firmware = ram.block(FIRMWARE);
    firmware.store_u64(CONSTANTS, Constants::MMIX.multiplier)?;
    firmware.store_u64(CONSTANTS + 8, Constants::MMIX.increment)?;
    block.store_u64(0, MAGIC)?;
    for cpu in 0..layout.vcpus {
        write_orders(block, layout, cpu)?;
    }
    if layout.workload.kind == WorkloadKind::Zipf {
        block.write(layout.picks, &zipf_picks(layout))?;
    }
    let seed = layout.workload.seed;
    let mut page = Page::zeroed();
    for number in 0..layout.pages {
        page.write(Constants::MMIX, seed, number, 0);
        block.write(layout.page_offset(number), &page.0)?;
    }
    match fill {
        Fill::Zero => {}
        Fill::Random => {
            for offset in layout.rest().step_by(page.0.len()) {
                page.write(Constants::MMIX, seed, FILL_NUMBERS + offset / PAGE_BYTES, 0);
                block.write(offset, &page.0)?;
            }
        }
        Fill::File(path) => fill_from(path, block, layout.rest())?,
    }
    Ok(())
}

/// Copies what lies in the file at the same place, or at the same place of its repetition.
fn fill_from(path: &Path, block: &RamBlock, rest: Range<u64>) -> Result<(), Error> {
    let error = |source| Error::Fill { path: path.to_owned(), source };
    let file = File::open(path).map_err(error)?;
    let file_len = file.metadata().map_err(error)?.len();
    if file_len == 0 {
        return Err(error(io::Error::new(io::ErrorKind::UnexpectedEof, "it is empty")));
    }
    let mut piece = Vec::new();
    let mut offset = rest.start;
    while offset < rest.end {
        let at = offset % file_len;
        let len = PIECE_BYTES.min(rest.end - offset).min(file_len - at);
        piece.resize(usize::try_from(len).expect("at most a piece"), 0);
        file.read_exact_at(&mut piece, at).map_err(error)?;
        block.write(offset, &piece)?;
        offset += len;
    }
    Ok(())
}

fn write_orders(block: &RamBlock, layout: &Layout, cpu: u32) -> Result<(), BlockError> {
    let base = layout.cpu_page(cpu);
    let vcpus = u64::from(layout.vcpus);
    let words = [
        (0, MAGIC),
        (cpu_page::ID, u64::from(cpu)),
        (cpu_page::VCPUS, vcpus),
        (cpu_page::KIND, layout.workload.kind.code()),
        (cpu_page::SEED, layout.workload.seed),
        (cpu_page::OWNED, layout.owned(cpu)),
        (cpu_page::HOT, layout.hot(cpu)),
        (cpu_page::FIRST, RAM_ADDRESS + layout.page_offset(layout.page(cpu, 0))),
        (cpu_page::STRIDE, vcpus * PAGE_BYTES),
        (cpu_page::TABLE, RAM_ADDRESS + layout.table(cpu)),
        (cpu_page::PICKS, RAM_ADDRESS + layout.picks),
        (cpu_page::HEADER, RAM_ADDRESS),
        (cpu_page::SSE_IN, first_choice(layout, cpu)),
        (cpu_page::SSE_IN + 8, MAGIC ^ u64::from(cpu)),
    ];
    words.into_iter().try_for_each(|(word, value)| block.store_u64(base + word, value))
}

/// Where a vCPU's sequence of page choices begins.
pub(crate) fn first_choice(layout: &Layout, cpu: u32) -> u64 {
    let seed = layout.workload.seed ^ (u64::from(cpu) + 1).rotate_left(32);
    Constants::MMIX.next(Constants::MMIX.next(seed))
}

/// The table a zipf workload draws from: each entry the index of a page among its vCPU's, the
/// k-th most popular of them in a share of the entries that is proportional to 1/k.
fn zipf_picks(layout: &Layout) -> Vec<u8> {
    // The vCPU with the highest number has the fewest pages: what is below holds for all.
    let pages = layout.owned(layout.vcpus - 1);
    // Popularity is strewn over the working set by a full-period step through the pages.
    let step = (1..).map(|k| pages * 5 / 8 + k).find(|&s| gcd(s, pages) == 1).expect("pages + 1");
    let total: f64 = (1..=pages).map(|k| 1.0 / k as f64).sum();
    let mut picks = Vec::new();
    let (mut rank, mut reached) = (0u64, 1.0);
    for at in 0..PICKS {
        // The rank at which the sum of weights passes the middle of this entry's share.
        let wanted = (at as f64 + 0.5) / PICKS as f64 * total;
        while reached < wanted && rank + 1 < pages {
            rank += 1;
            reached += 1.0 / (rank + 1) as f64;
        }
        let index = u128::from(rank) * u128::from(step) % u128::from(pages);
        picks.extend(u32::try_from(index).expect("at most 2^26 pages").to_le_bytes());
    }
    picks
}

fn gcd(a: u64, b: u64) -> u64 {
    if b == 0 { a } else { gcd(b, a % b) }
}
