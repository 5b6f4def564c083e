//! RAM blocks: named, mapped pieces of guest memory, and access to them.
#![expect(unsafe_code, reason = "copies to and from the mappings of guest RAM")]

use std::fmt;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::ptr::{self, NonNull};

use crate::backing::{Backing, Mapping, hint};
use crate::copy;
use crate::page::{PageSize, TARGET_PAGE};
use crate::uffd::Span;

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
    #[error("RAM block {name}: cannot map {len} bytes of {page} pages: {source}{}", hint(*page, *len))]
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
    /// The kernel could not provide the pages in advance.
    #[error("RAM block {name}: cannot populate {len} bytes at {offset:#x}: {source}{}", hint(*page, *len))]
    Populate {
        /// The block.
        name: String,
        /// Where the range begins in the block.
        offset: u64,
        /// In bytes.
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

/// A named piece of guest memory, mapped as long as this value lives.
///
/// The guest writes to it while we read: every access is a volatile copy, or one of the
/// processor's or the kernel's that the compiler cannot see.
pub struct RamBlock {
    pub(crate) name: Box<str>,
    pub(crate) guest_address: u64,
    pub(crate) host_page: PageSize,
    pub(crate) mapping: Mapping,
}

impl RamBlock {
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
        self.mapping.len as u64
    }

    /// Never true: a block has at least one page.
    pub fn is_empty(&self) -> bool {
        self.mapping.len == 0
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
        &self.mapping.backing
    }

    /// The file behind the block, when it is shared.
    pub fn shared_fd(&self) -> Option<BorrowedFd<'_>> {
        match &self.mapping.backing {
            Backing::Shared { file, .. } => Some(file.as_fd()),
            Backing::Anonymous | Backing::PrivateFile { .. } | Backing::External(_) => None,
        }
    }

    /// Where the block is mapped in this process: for handing to KVM or the kernel, not for
    /// dereferencing.
    pub fn host_address(&self) -> NonNull<u8> {
        self.mapping.address
    }

    /// The addresses of the block, for the kernel.
    pub(crate) fn span(&self) -> Span {
        let start = self.mapping.address.as_ptr().expose_provenance() as u64;
        Span { start, len: self.len() }
    }

    /// The address of `offset`, after checking that `len` bytes from there are inside.
    pub fn range(&self, offset: u64, len: usize) -> Result<NonNull<u8>, BlockError> {
        match usize::try_from(offset)
            .ok()
            .filter(|&at| at.checked_add(len).is_some_and(|end| end <= self.mapping.len))
        {
            // SAFETY: `at + len` is inside the mapping, as just checked.
            Some(at) => Ok(unsafe { self.mapping.address.add(at) }),
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
        unsafe { copy::copy(from.as_ptr(), out.as_mut_ptr(), out.len()) };
        Ok(())
    }

    /// Copies `bytes` into the block at `offset`.
    pub fn write(&self, offset: u64, bytes: &[u8]) -> Result<(), BlockError> {
        let to = self.range(offset, bytes.len())?;
        // SAFETY: as in `read`, the other way round.
        unsafe { copy::copy(bytes.as_ptr(), to.as_ptr(), bytes.len()) };
        Ok(())
    }

    /// Copies `len` bytes from `offset` on of `other`, which is another block, to the same place here.
    ///
    /// # Panics
    /// When it is the same block.
    pub fn copy_from(&self, other: &RamBlock, offset: u64, len: usize) -> Result<(), BlockError> {
        let (from, to) = (other.range(offset, len)?, self.range(offset, len)?);
        assert!(from != to, "a block is not copied to itself");
        // SAFETY: `range` checked both; two mappings do not overlap. Racing stores tear bytes.
        unsafe { copy::copy(from.as_ptr(), to.as_ptr(), len) };
        Ok(())
    }

    /// Makes `len` bytes from `offset` on zero.
    pub fn write_zeros(&self, offset: u64, len: usize) -> Result<(), BlockError> {
        let to = self.range(offset, len)?;
        // SAFETY: `range` checked the destination.
        unsafe { copy::zero(to.as_ptr(), len) };
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

impl fmt::Debug for RamBlock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RamBlock")
            .field("name", &self.name)
            .field("guest_address", &self.guest_address)
            .field("len", &self.len())
            .field("host_page", &self.host_page)
            .finish_non_exhaustive()
    }
}
