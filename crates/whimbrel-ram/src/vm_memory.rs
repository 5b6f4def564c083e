//! RAM blocks from the memory of VMMs that use vm-memory.
#![expect(unsafe_code, reason = "takes over the addresses of vm-memory's mappings")]

use std::io;
use std::ptr::NonNull;

use vm_memory::bitmap::Bitmap;
use vm_memory::{
    Address, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap,
};

use crate::{BlockError, GuestRam, PageSize, RamBlock};

impl RamBlock {
    /// A block on the mapping of a region, which stays mapped as long as the block lives.
    /// `host_page` is the page size of its backing, which vm-memory does not know.
    ///
    /// # Panics
    /// When the mapping is not aligned to `host_page`.
    pub fn from_region<B>(
        name: &str,
        region: &GuestRegionMmap<B>,
        host_page: PageSize,
    ) -> Result<RamBlock, BlockError>
    where
        B: Bitmap + Send + Sync + 'static,
    {
        let mapping = region.get_mmap();
        let access = libc::PROT_READ | libc::PROT_WRITE;
        if mapping.prot() & access != access {
            let text = "the region is not mapped readable and writable";
            return Err(BlockError::Map {
                name: name.into(),
                len: mapping.size() as u64,
                page: host_page,
                source: io::Error::new(io::ErrorKind::PermissionDenied, text),
            });
        }
        let address = NonNull::new(mapping.as_ptr()).expect("a mapping is not at address zero");
        let (start, len) = (region.start_addr().raw_value(), mapping.size());
        // SAFETY: vm-memory keeps `as_ptr..+size` mapped, with the protection just checked, as
        // long as the mapping lives, and the block keeps its `Arc`. It lends no references to
        // guest memory but for volatile access.
        unsafe { RamBlock::external_owned(name, start, address, len, host_page, mapping) }
    }
}

impl GuestRam {
    /// A block for each region, in order, under the name that `name` gives to the region at an
    /// address.
    pub fn from_memory<B>(
        memory: &GuestMemoryMmap<B>,
        host_page: PageSize,
        mut name: impl FnMut(GuestAddress) -> String,
    ) -> Result<GuestRam, BlockError>
    where
        B: Bitmap + Send + Sync + 'static,
    {
        let block = |region: &GuestRegionMmap<B>| {
            RamBlock::from_region(&name(region.start_addr()), region, host_page)
        };
        Ok(GuestRam::new(memory.iter().map(block).collect::<Result<_, _>>()?))
    }
}

#[cfg(test)]
mod tests {
    use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

    use crate::{GuestRam, PageSize};

    #[test]
    fn both_see_the_same_memory_and_the_block_keeps_it() {
        let ranges = [(GuestAddress(0), 1 << 20), (GuestAddress(1 << 32), 2 << 20)];
        let memory: GuestMemoryMmap = GuestMemoryMmap::from_ranges(&ranges).unwrap();
        let name = |at: GuestAddress| format!("ram@{:#x}", at.0);
        let ram = GuestRam::from_memory(&memory, PageSize::SIZE_4K, name).unwrap();
        assert_eq!(ram.total_bytes(), 3 << 20);
        let (_, high) = ram.find("ram@0x100000000").unwrap();
        assert_eq!(high.guest_address(), 1 << 32);
        memory.write_obj(0x1234_5678_9abc_def0_u64, GuestAddress((1 << 32) + 4096)).unwrap();
        assert_eq!(high.load_u64(4096).unwrap(), 0x1234_5678_9abc_def0);
        high.store_u64(8, 77).unwrap();
        assert_eq!(memory.read_obj::<u64>(GuestAddress((1 << 32) + 8)).unwrap(), 77);
        drop(memory);
        assert_eq!(high.load_u64(8).unwrap(), 77);
    }
}
