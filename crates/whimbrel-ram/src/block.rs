//! RAM blocks: named, mapped pieces of guest memory.
#![expect(unsafe_code, reason = "owns the mappings of guest RAM and copies to and from them")]

use std::fmt;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::ptr::{self, NonNull};
use std::sync::Arc;

use crate::page::{BlockIndex, HostPage, PageSize, TARGET_PAGE};

/// What a block's memory is made of.
#[derive(Debug)]
pub enum Backing {
    /// Private anonymous memory.
    Anonymous,
    /// A shared mapping of a file or memfd (hugetlb or not), from `offset` bytes on.
    Shared {
        /// The file.
        file: File,
        /// Where the block begins in it, in bytes.
        offset: u64,
    },
    /// A private (copy on write) mapping of a file, from `offset` bytes on: a kept VM.
    PrivateFile {
        /// The file.
        file: File,
        /// Where the block begins in it, in bytes.
        offset: u64,
    },
    /// Memory the VMM mapped and keeps mapped itself.
    External,
}

/// Why a block could not be made or reached.
#[derive(Debug, thiserror::Error)]
pub enum BlockError {
    /// The name is empty or longer than the protocol's 255 bytes.
    #[error("a RAM block's name has 1 to 255 bytes, not {0}")]
    Name(usize),
    /// The length is zero or no multiple of the page size.
    #[error("RAM block {name}: {len} bytes is not a multiple of its page size {page}")]
    Length {
        /// The block.
        name: String,
        /// As asked for.
        len: u64,
        /// The page size it must be a multiple of.
        page: PageSize,
    },
    /// The kernel refused the memory.
    #[error("RAM block {name}: cannot map {len} bytes of {page} pages: {source}{}", hint(page))]
    Map {
        /// The block.
        name: String,
        /// As asked for.
        len: u64,
        /// Of the backing.
        page: PageSize,
        /// What the kernel said.
        source: io::Error,
    },
    /// Bytes outside the block were named.
    #[error("RAM block {name}: {len} bytes at {offset:#x} are outside its {block_len:#x} bytes")]
    Outside {
        /// The block.
        name: String,
        /// Where the access began.
        offset: u64,
        /// How long it was.
        len: u64,
        /// The block's length.
        block_len: u64,
    },
}

fn hint(page: &PageSize) -> &'static str {
    if *page > TARGET_PAGE {
        " (are enough huge pages reserved? see /sys/kernel/mm/hugepages)"
    } else {
        ""
    }
}

/// A named piece of guest memory, mapped as long as this value lives.
///
/// The guest writes to it while we read: every access is a volatile or kernel copy.
pub struct RamBlock {
    name: Box<str>,
    guest_address: u64,
    len: usize,
    host_page: PageSize,
    address: NonNull<u8>,
    backing: Backing,
}

// SAFETY: the mapping is plain memory that lives as long as the value; concurrent access to it
// goes through volatile or kernel copies, which is what "guest memory" means.
unsafe impl Send for RamBlock {}
// SAFETY: as above.
unsafe impl Sync for RamBlock {}

impl RamBlock {
    /// Private anonymous memory of `len` bytes at `guest_address`, all zero. Not populated:
    /// the first touch of each page takes it from the host. Huge folios are asked for.
    pub fn anonymous(name: &str, guest_address: u64, len: u64) -> Result<RamBlock, BlockError> {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        RamBlock::map(name, guest_address, len, TARGET_PAGE, flags, Backing::Anonymous)
    }

    /// A mapping of `file` from byte `offset` on, shared with whoever else maps it. `host_page`
    /// is the file's page size (that of its hugetlb file system, else 4 KiB).
    pub fn shared_file(
        name: &str,
        guest_address: u64,
        len: u64,
        host_page: PageSize,
        file: File,
        offset: u64,
    ) -> Result<RamBlock, BlockError> {
        let flags = libc::MAP_SHARED | libc::MAP_NORESERVE;
        let backing = Backing::Shared { file, offset };
        RamBlock::map(name, guest_address, len, host_page, flags, backing)
    }

    /// A private mapping of `file` from byte `offset` on: what is written stays here.
    pub fn private_file(
        name: &str,
        guest_address: u64,
        len: u64,
        file: File,
        offset: u64,
    ) -> Result<RamBlock, BlockError> {
        let flags = libc::MAP_PRIVATE | libc::MAP_NORESERVE;
        let backing = Backing::PrivateFile { file, offset };
        RamBlock::map(name, guest_address, len, TARGET_PAGE, flags, backing)
    }

    /// Memory that a VMM has mapped itself.
    ///
    /// # Safety
    /// `address..address+len` is mapped readable and writable, aligned to `host_page`, and stays
    /// so until the value is dropped; no Rust reference to it lives meanwhile.
    pub unsafe fn external(
        name: &str,
        guest_address: u64,
        address: NonNull<u8>,
        len: usize,
        host_page: PageSize,
    ) -> Result<RamBlock, BlockError> {
        check(name, len as u64, host_page)?;
        assert!(
            address.as_ptr().addr().is_multiple_of(host_page.bytes()),
            "RAM block {name} is aligned to its host page"
        );
        let backing = Backing::External;
        Ok(RamBlock { name: name.into(), guest_address, len, host_page, address, backing })
    }

    fn map(
        name: &str,
        guest_address: u64,
        len: u64,
        host_page: PageSize,
        flags: libc::c_int,
        backing: Backing,
    ) -> Result<RamBlock, BlockError> {
        check(name, len, host_page)?;
        let error = |source| BlockError::Map { name: name.into(), len, page: host_page, source };
        let too_big = || io::Error::from(io::ErrorKind::OutOfMemory);
        let bytes = usize::try_from(len).map_err(|_| error(too_big()))?;
        let (fd, offset) = match &backing {
            Backing::Shared { file, offset } | Backing::PrivateFile { file, offset } => {
                (file.as_raw_fd(), *offset)
            }
            Backing::Anonymous | Backing::External => (-1, 0),
        };
        let offset = libc::off_t::try_from(offset).map_err(|_| error(too_big()))?;
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a fresh mapping at an address of the kernel's choice; no memory of ours is touched.
        let address = unsafe { libc::mmap(ptr::null_mut(), bytes, protection, flags, fd, offset) };
        if address == libc::MAP_FAILED {
            return Err(error(io::Error::last_os_error()));
        }
        let address = NonNull::new(address.cast::<u8>()).expect("mmap never gives address zero");
        if matches!(backing, Backing::Anonymous) {
            // Huge folios make both the first touch and the copies cheaper; a refusal costs only that.
            // SAFETY: advice on the mapping just made; it changes no content.
            unsafe { libc::madvise(address.as_ptr().cast(), bytes, libc::MADV_HUGEPAGE) };
        }
        Ok(RamBlock { name: name.into(), guest_address, len: bytes, host_page, address, backing })
    }

    /// The block's name on the wire (`idstr`), 1 to 255 bytes.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Where the guest sees the block's first byte.
    pub fn guest_address(&self) -> u64 {
        self.guest_address
    }

    /// In bytes (the protocol's `used_length`).
    pub fn len(&self) -> u64 {
        self.len as u64
    }

    /// Never true: a block has at least one page.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// How many target pages it holds.
    pub fn target_pages(&self) -> u64 {
        self.len() / TARGET_PAGE.bytes() as u64
    }

    /// The page size of the backing.
    pub fn host_page_size(&self) -> PageSize {
        self.host_page
    }

    /// What the memory is made of.
    pub fn backing(&self) -> &Backing {
        &self.backing
    }

    /// The file behind the block, when it is shared.
    pub fn shared_fd(&self) -> Option<BorrowedFd<'_>> {
        match &self.backing {
            Backing::Shared { file, .. } => Some(file.as_fd()),
            Backing::Anonymous | Backing::PrivateFile { .. } | Backing::External => None,
        }
    }

    /// Where the block is mapped in this process: for handing to KVM or the kernel, not for
    /// dereferencing.
    pub fn host_address(&self) -> NonNull<u8> {
        self.address
    }

    /// The address of `offset`, after checking that `len` bytes from there are inside.
    pub fn range(&self, offset: u64, len: usize) -> Result<NonNull<u8>, BlockError> {
        match usize::try_from(offset)
            .ok()
            .filter(|&at| at.checked_add(len).is_some_and(|end| end <= self.len))
        {
            // SAFETY: `at + len` is inside the mapping, as just checked.
            Some(at) => Ok(unsafe { self.address.add(at) }),
            None => Err(BlockError::Outside {
                name: self.name.to_string(),
                offset,
                len: len as u64,
                block_len: self.len(),
            }),
        }
    }

    /// Copies from the block at `offset` into `out`. The guest may write meanwhile: the copy can
    /// be torn, which the dirty log then knows.
    pub fn read(&self, offset: u64, out: &mut [u8]) -> Result<(), BlockError> {
        let from = self.range(offset, out.len())?;
        // SAFETY: `range` checked the source; `out` is ours alone and cannot overlap a mapping
        // that is never lent out as a reference. A racing guest store tears bytes, no more.
        unsafe { ptr::copy_nonoverlapping(from.as_ptr(), out.as_mut_ptr(), out.len()) };
        Ok(())
    }

    /// Copies `bytes` into the block at `offset`.
    pub fn write(&self, offset: u64, bytes: &[u8]) -> Result<(), BlockError> {
        let to = self.range(offset, bytes.len())?;
        // SAFETY: as in `read`, the other way round.
        unsafe { ptr::copy_nonoverlapping(bytes.as_ptr(), to.as_ptr(), bytes.len()) };
        Ok(())
    }

    /// Makes `len` bytes from `offset` on zero.
    pub fn write_zeros(&self, offset: u64, len: usize) -> Result<(), BlockError> {
        let to = self.range(offset, len)?;
        // SAFETY: `range` checked the destination.
        unsafe { ptr::write_bytes(to.as_ptr(), 0, len) };
        Ok(())
    }

    /// One aligned 64-bit load, as a vCPU would do it.
    ///
    /// # Panics
    /// When `offset` is not aligned to 8.
    pub fn load_u64(&self, offset: u64) -> Result<u64, BlockError> {
        assert!(offset.is_multiple_of(8), "an aligned access");
        let from = self.range(offset, 8)?;
        // SAFETY: inside the mapping and aligned, since blocks are page aligned.
        Ok(unsafe { ptr::read_volatile(from.as_ptr().cast::<u64>()) })
    }

    /// One aligned 64-bit store, as a vCPU would do it.
    ///
    /// # Panics
    /// When `offset` is not aligned to 8.
    pub fn store_u64(&self, offset: u64, value: u64) -> Result<(), BlockError> {
        assert!(offset.is_multiple_of(8), "an aligned access");
        let to = self.range(offset, 8)?;
        // SAFETY: inside the mapping and aligned, since blocks are page aligned.
        unsafe { ptr::write_volatile(to.as_ptr().cast::<u64>(), value) };
        Ok(())
    }
}

fn check(name: &str, len: u64, page: PageSize) -> Result<(), BlockError> {
    if name.is_empty() || name.len() > 255 {
        return Err(BlockError::Name(name.len()));
    }
    if len == 0 || !len.is_multiple_of(page.bytes() as u64) {
        return Err(BlockError::Length { name: name.into(), len, page });
    }
    Ok(())
}

impl Drop for RamBlock {
    fn drop(&mut self) {
        if !matches!(self.backing, Backing::External) {
            // SAFETY: the mapping is ours, made in `map`, and nobody holds a pointer into it past our life.
            unsafe { libc::munmap(self.address.as_ptr().cast(), self.len) };
        }
    }
}

impl fmt::Debug for RamBlock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RamBlock")
            .field("name", &self.name)
            .field("guest_address", &self.guest_address)
            .field("len", &self.len)
            .field("host_page", &self.host_page)
            .finish_non_exhaustive()
    }
}

/// All of a guest's RAM blocks, in the order in which they are announced. Cheap to clone.
#[derive(Clone, Debug)]
pub struct GuestRam {
    blocks: Arc<[RamBlock]>,
}

impl GuestRam {
    /// The blocks, in order.
    ///
    /// # Panics
    /// With more than 65,535 blocks, or two of one name.
    pub fn new(blocks: Vec<RamBlock>) -> GuestRam {
        assert!(blocks.len() <= usize::from(u16::MAX), "at most 65,535 RAM blocks");
        for (at, block) in blocks.iter().enumerate() {
            let twice = blocks[..at].iter().any(|other| other.name == block.name);
            assert!(!twice, "RAM block names are unique, {} is there twice", block.name);
        }
        GuestRam { blocks: blocks.into() }
    }

    /// How many blocks there are.
    pub fn block_count(&self) -> usize {
        self.blocks.len()
    }

    /// One block.
    ///
    /// # Panics
    /// When the index is not of this RAM.
    pub fn block(&self, index: BlockIndex) -> &RamBlock {
        &self.blocks[index.index()]
    }

    /// The blocks with their indices, in order.
    pub fn blocks(&self) -> impl Iterator<Item = (BlockIndex, &RamBlock)> {
        (0u16..).map(BlockIndex).zip(self.blocks.iter())
    }

    /// The block of that name.
    pub fn find(&self, name: &str) -> Option<(BlockIndex, &RamBlock)> {
        self.blocks().find(|(_, block)| block.name() == name)
    }

    /// The host page that holds byte `offset` of a block: what a request for it names.
    ///
    /// # Panics
    /// When the index is not of this RAM.
    pub fn host_page(&self, block: BlockIndex, offset: u64) -> Result<HostPage, BlockError> {
        self.block(block).range(offset, 1)?;
        let size = self.block(block).host_page_size().bytes() as u64;
        Ok(HostPage { block, number: offset / size })
    }

    /// The length of all blocks together, in bytes.
    pub fn total_bytes(&self) -> u64 {
        self.blocks.iter().map(RamBlock::len).sum()
    }
}
