//! The guest's memory from outside: what it lies in, and what it holds.

use std::fmt::Display;
use std::fs;
use std::ops::Range;
use std::path::Path;

use anyhow::{Context as _, Result, ensure};

/// What a guest's memory lies in.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Backing {
    /// Pages of 4 KiB.
    #[default]
    Ordinary,
    /// Huge pages of 2 MiB, of the host's pool ([`HugePages`]).
    Huge,
    /// A file, which outlives the process.
    File,
}

impl Backing {
    /// QEMU's arguments; `file` is what the memory lies in, if it is to lie in one. The block is called as it is without them, so that a guest can move from
    /// one kind into the other.
    #[must_use]
    pub fn arguments(self, mebibytes: u32, file: &Path) -> Vec<String> {
        let mut arguments = vec!["-m".to_owned(), mebibytes.to_string()];
        let backend = match self {
            Self::Ordinary => None,
            Self::Huge => Some("memory-backend-memfd,hugetlb=on,hugetlbsize=2M".to_owned()),
            Self::File => Some(format!("memory-backend-file,share=on,mem-path={}", file.display())),
        };
        if let Some(backend) = backend {
            let backend = format!("{backend},id={BLOCK},size={mebibytes}M");
            let machine = format!("memory-backend={BLOCK}");
            arguments.extend(["-object".to_owned(), backend, "-machine".to_owned(), machine]);
        }
        arguments
    }
}

/// The block that is the guest's memory.
pub const BLOCK: &str = "pc.ram";

/// Where the host's pages of 2 MiB are counted, and how many nobody uses.
const POOL: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages";
const FREE: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages";

/// Free huge pages: what the host's pool was given for them is taken away at the end.
#[derive(Debug)]
pub struct HugePages {
    given: u64,
}

impl HugePages {
    /// Sees to it that so many are free.
    ///
    /// # Errors
    /// The host has no pool, not so many pages, or gives it more only for others.
    pub fn reserve(wanted: u64) -> Result<Self> {
        let held = Self { given: wanted.saturating_sub(count(FREE)?) };
        if held.given > 0 {
            set(count(POOL)? + held.given)?;
        }
        let free = count(FREE)?;
        ensure!(free >= wanted, "only {free} of {wanted} pages of 2 MiB are to be had");
        Ok(held)
    }
}

impl Drop for HugePages {
    fn drop(&mut self) {
        // Others may have changed the pool meanwhile: what is theirs stays.
        if let Ok(now) = count(POOL) {
            let _ = set(now.saturating_sub(self.given));
        }
    }
}

fn count(file: &str) -> Result<u64> {
    let text = fs::read_to_string(file).context(file.to_owned())?;
    text.trim().parse().with_context(|| format!("{file}: {text:?}"))
}

fn set(pages: u64) -> Result<()> {
    fs::write(POOL, pages.to_string()).context(POOL)
}

/// A guest's memory as it was at one moment, from the guest's address 0 on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Memory(Vec<u8>);

/// Between these the addresses of a PC are no memory of its own.
const HOLE: Range<usize> = 0xa_0000..0x10_0000;
const PAGE: usize = 4096;

impl Memory {
    /// What a QEMU has saved of it.
    ///
    /// # Errors
    /// It has not.
    pub fn read(path: &Path) -> Result<Self> {
        Ok(Self(fs::read(path).with_context(|| path.display().to_string())?))
    }

    /// That `later` is the same, but for the addresses that the guest writes.
    ///
    /// # Errors
    /// Which pages are not.
    pub fn check_same(&self, later: &Self, written: &[Range<u32>]) -> Result<()> {
        ensure!(self.0.len() == later.0.len(), "{} bytes, then {}", self.0.len(), later.0.len());
        let ours: Vec<Range<usize>> = written
            .iter()
            .map(|range| Ok(range.start.try_into()?..range.end.try_into()?))
            .collect::<Result<_>>()?;
        let pages = self.0.chunks(PAGE).zip(later.0.chunks(PAGE)).enumerate();
        let changed: Vec<usize> = pages
            .map(|(number, pages)| (number * PAGE, pages))
            .filter(|(at, _)| !HOLE.contains(at) && !ours.iter().any(|range| range.contains(at)))
            .filter(|(_, (before, after))| before != after)
            .map(|(at, _)| at)
            .collect();
        let list = |pages: &[usize]| {
            pages.iter().map(|at| format!("{at:#x}")).collect::<Vec<_>>().join(", ")
        };
        let first: &dyn Display = &list(&changed[..changed.len().min(8)]);
        ensure!(changed.is_empty(), "{} pages are not as they were: {first}", changed.len());
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_changed_page_is_found_unless_it_is_the_guests_or_no_memory() {
        let before = Memory(vec![0; 2 << 20]);
        let changed = |at: usize| {
            let mut after = before.clone();
            after.0[at] = 1;
            before.check_same(&after, &[0x7000..0x8000, 0..0])
        };
        for at in [0, 0x6fff, 0x8000, 0x9_ffff, 0x10_0000, (2 << 20) - 1] {
            let error = changed(at).unwrap_err().to_string();
            assert!(error.starts_with("1 pages"), "{error}");
        }
        for at in [0x7000, 0x7fff, 0xa_0000, 0xf_ffff] {
            changed(at).unwrap();
        }
    }
}
