//! Memory that this machine, a guest itself, has not got from its host yet.

use anyhow::{Context as _, Result};
use whimbrel_ram::{PageSize, RamBlock, Sharing};

/// Touches so much memory and frees it at once. Where this machine is a guest itself, memory that
/// is free for some seconds goes back to the host, and its next first touch costs ten times as
/// much: whoever happens to pay that would be measured for it.
/// Half of it in huge folios and half in single pages, since either is taken from lists of its own.
pub(crate) fn take(bytes: u64) -> Result<()> {
    let half = bytes / 2;
    let folios = RamBlock::anonymous("folios", 0, half)?;
    folios.populate(0, half)?;
    std::hint::black_box(vec![1_u8; usize::try_from(half).unwrap_or(usize::MAX)]);
    Ok(())
}

/// The same with as much of it as this machine can spare.
pub(crate) fn take_what_there_is(bytes: u64) -> Result<()> {
    take(bytes.min(available()? / 10 * 8))
}

fn available() -> Result<u64> {
    let text = std::fs::read_to_string("/proc/meminfo")?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"));
    let kib = line.and_then(|line| line.trim().strip_suffix("kB"));
    let kib: u64 = kib.context("/proc/meminfo: no MemAvailable in kB")?.trim().parse()?;
    Ok(kib << 10)
}

/// The same with huge pages that the kernel keeps for those who ask.
pub(crate) fn take_huge(bytes: u64) -> Result<()> {
    let pages = RamBlock::memfd("huge pages", 0, bytes, PageSize::SIZE_2M, Sharing::Shared)?;
    Ok(pages.populate(0, bytes)?)
}
