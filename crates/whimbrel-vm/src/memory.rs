//! The VM's memory: enough of it, of the pages asked for.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use whimbrel_ram::{GuestRam, PageSize, RamBlock, Sharing};

use crate::config::Config;
use crate::error::{Error, Size};
use crate::layout::{FIRMWARE_ADDRESS, FIRMWARE_BYTES, FIRMWARE_NAME, RAM_ADDRESS, RAM_NAME};

/// Maps the VM's blocks.
pub(crate) fn map(config: &Config) -> Result<GuestRam, Error> {
    check(config)?;
    let Config { memory, page_size, shared, .. } = *config;
    if let Some(path) = &config.memory_path {
        return in_file(config, path);
    }
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
    made(config, memory, firmware)
}

fn made(config: &Config, memory: RamBlock, firmware: RamBlock) -> Result<GuestRam, Error> {
    let ram = GuestRam::new(vec![memory, firmware]);
    if config.prefault {
        for (_, block) in ram.blocks() {
            block.populate(0, block.len())?;
        }
    }
    Ok(ram)
}

/// Maps the blocks from a file, one behind the other.
fn in_file(config: &Config, path: &Path) -> Result<GuestRam, Error> {
    let error = |source| Error::MemoryFile { path: path.to_owned(), source };
    if config.page_size > PageSize::SIZE_4K {
        let text = "huge pages are a memfd's: take 4k pages for memory in a file";
        return Err(error(io::Error::new(io::ErrorKind::Unsupported, text)));
    }
    // Another guest's memory may be all that is left of it.
    let file = File::options().read(true).write(true).create_new(true).mode(0o600).open(path);
    let file = file.map_err(error)?;
    // Held until the process ends, however it does: nobody takes the memory for that of a dead one.
    file.try_lock().map_err(|locked| error(locked.into()))?;
    file.set_len(config.memory + FIRMWARE_BYTES).map_err(error)?;
    let block = |name, address, len, offset| -> Result<RamBlock, Error> {
        let file = file.try_clone().map_err(error)?;
        Ok(RamBlock::shared_file(name, address, len, PageSize::SIZE_4K, file, offset)?)
    };
    let memory = block(RAM_NAME, RAM_ADDRESS, config.memory, 0)?;
    let firmware = block(FIRMWARE_NAME, FIRMWARE_ADDRESS, FIRMWARE_BYTES, config.memory)?;
    made(config, memory, firmware)
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
