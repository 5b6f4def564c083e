//! The VM's memory: enough of it, of the pages asked for.

use std::fs;
use std::path::{Path, PathBuf};

use whimbrel_ram::{GuestRam, PageSize, RamBlock, Sharing};

use crate::config::Config;
use crate::error::{Error, Size};
use crate::layout::{FIRMWARE_ADDRESS, FIRMWARE_BYTES, FIRMWARE_NAME, RAM_ADDRESS, RAM_NAME};

/// Maps the VM's blocks.
pub(crate) fn map(config: &Config) -> Result<GuestRam, Error> {
    check(config)?;
    let Config { memory, page_size, shared, .. } = *config;
    let block = |name, address, len, page| {
        // Huge pages are a file's in any case: only so can postcopy fill them in small pieces.
        if shared || page > PageSize::SIZE_4K {
            RamBlock::memfd(name, address, len, page, Sharing::Shared)
        } else {
            RamBlock::anonymous(name, address, len)
        }
    };
    let memory = block(RAM_NAME, RAM_ADDRESS, memory, page_size)?;
    let firmware = block(FIRMWARE_NAME, FIRMWARE_ADDRESS, FIRMWARE_BYTES, PageSize::SIZE_4K)?;
    let ram = GuestRam::new(vec![memory, firmware]);
    if config.prefault {
        for (_, block) in ram.blocks() {
            block.populate(0, block.len())?;
        }
    }
    Ok(ram)
}

/// Whether the host can give so much: a clear word now instead of a kill later.
fn check(config: &Config) -> Result<(), Error> {
    let Config { memory: bytes, page_size: page, .. } = *config;
    if bytes == 0 || !bytes.is_multiple_of(page.bytes() as u64) {
        let problem = format!("not a multiple of the page size {page}");
        return Err(Error::Memory { bytes, problem });
    }
    if page == PageSize::SIZE_4K {
        // Without /proc we cannot know better.
        let available = Size(mem_available().unwrap_or(u64::MAX));
        if bytes > available.0 {
            return Err(Error::TooLittleMemory { asked: Size(bytes), available });
        }
        return Ok(());
    }
    let folder = huge_pages(page);
    let free = read_number(&folder.join("free_hugepages")).unwrap_or(0);
    let available = Size(free.saturating_mul(page.bytes() as u64));
    if bytes > available.0 {
        let knob = folder.join("nr_hugepages");
        return Err(Error::TooFewHugePages { asked: Size(bytes), available, page, knob });
    }
    Ok(())
}

fn huge_pages(page: PageSize) -> PathBuf {
    format!("/sys/kernel/mm/hugepages/hugepages-{}kB", page.bytes() >> 10).into()
}

fn read_number(path: &Path) -> Option<u64> {
    fs::read_to_string(path).ok()?.trim().parse().ok()
}

fn mem_available() -> Option<u64> {
    let text = fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib << 10)
}
