//! Memory of pages that the host may not have.

pub(crate) use crate::reserve::HugePages;
use whimbrel_ram::{PageSize, RamBlock, Sharing};

/// Where the guest sees them.
const GUEST_ADDRESS: u64 = 1 << 24;

pub(crate) fn memfd(name: &str, pages: u64, page: PageSize, sharing: Sharing) -> Option<RamBlock> {
    let len = pages * page.bytes() as u64;
    match RamBlock::memfd(name, GUEST_ADDRESS, len, page, sharing) {
        Ok(block) => Some(block),
        Err(error) => {
            eprintln!("skipped: {error}");
            None
        }
    }
}
