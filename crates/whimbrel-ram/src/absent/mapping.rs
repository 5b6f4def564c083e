//! Mapping parts of a block anew, and its file a second time.
#![expect(unsafe_code, reason = "maps guest memory anew")]

use std::io;
use std::os::fd::AsRawFd;
use std::ptr::{self, NonNull};

use crate::backing::Backing;
use crate::uffd::{Span, Userfaultfd};
use crate::{PageSize, RamBlock};

/// Puts ordinary memory in the place of a part of a block.
pub(super) fn map_small(block: &RamBlock, offset: u64, len: u64) -> io::Result<()> {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    // SAFETY: the caller has taken the pages out of the block; there is nothing to be lost.
    let (address, len) = unsafe { map_over(block, offset, len, flags, -1, 0) }?;
    // SAFETY: advice on the mapping just made. Huge folios would be placed in pieces all the same.
    unsafe { libc::madvise(address, len, libc::MADV_NOHUGEPAGE) };
    Ok(())
}

/// Puts the block's file back in its place.
pub(super) fn map_file(block: &RamBlock, offset: u64, len: u64) -> io::Result<()> {
    let Backing::Shared { file, offset: start } = block.backing() else {
        unreachable!("only such blocks are split")
    };
    let at = libc::off_t::try_from(start + offset).map_err(io::Error::other)?;
    // SAFETY: the file holds what the small pages do: they were copied, and not written since.
    unsafe { map_over(block, offset, len, libc::MAP_SHARED, file.as_raw_fd(), at) }?;
    Ok(())
}

/// # Safety
/// What the guest needs of the memory that is there now is in what takes its place.
unsafe fn map_over(
    block: &RamBlock,
    offset: u64,
    len: u64,
    flags: libc::c_int,
    fd: libc::c_int,
    at: libc::off_t,
) -> io::Result<(*mut libc::c_void, usize)> {
    let len = usize::try_from(len).expect("RAM fits in memory");
    let address = block.range(offset, len).map_err(io::Error::other)?.as_ptr().cast();
    let protection = libc::PROT_READ | libc::PROT_WRITE;
    let flags = flags | libc::MAP_FIXED;
    // SAFETY: inside the block's mapping, as `range` checked, which it owns and where no Rust
    // reference points; its content is the caller's promise.
    let mapped = unsafe { libc::mmap(address, len, protection, flags, fd, at) };
    if mapped == libc::MAP_FAILED { Err(io::Error::last_os_error()) } else { Ok((mapped, len)) }
}

/// The file of a block, mapped where the guest does not see it; pages are placed there as they are
/// in the block itself.
#[derive(Debug)]
pub(super) struct SecondMapping {
    address: NonNull<u8>,
    len: usize,
}

// SAFETY: plain memory that lives as long as the value, and which only the kernel touches.
unsafe impl Send for SecondMapping {}
// SAFETY: as above.
unsafe impl Sync for SecondMapping {}

impl SecondMapping {
    pub(super) fn new(block: &RamBlock) -> io::Result<SecondMapping> {
        let Backing::Shared { file, offset } = block.backing() else {
            unreachable!("only such blocks are split")
        };
        let len = usize::try_from(block.len()).expect("RAM fits in memory");
        let offset = libc::off_t::try_from(*offset).map_err(io::Error::other)?;
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        let (flags, fd) = (libc::MAP_SHARED, file.as_raw_fd());
        // SAFETY: a fresh mapping at an address of the kernel's choice.
        let address = unsafe { libc::mmap(ptr::null_mut(), len, protection, flags, fd, offset) };
        if address == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let address = NonNull::new(address.cast()).expect("mmap never gives address zero");
        Ok(SecondMapping { address, len })
    }

    pub(super) fn span(&self) -> Span {
        Span { start: self.address.as_ptr().expose_provenance() as u64, len: self.len as u64 }
    }

    /// Makes the huge page at `offset`, which is not there, a copy of a range as long as it. Placing
    /// it spares the kernel the zeros that a first touch would fill it with.
    pub(super) fn fill(&self, uffd: &Userfaultfd, offset: u64, from: Span) -> io::Result<()> {
        loop {
            match uffd.copy(self.span().start + offset, from) {
                (0, Ok(())) => {}
                (_, result) => return result,
            }
        }
    }

    /// Takes the huge page at `offset` out of the file: what it holds is not the guest's.
    pub(super) fn empty(&self, offset: u64, page: PageSize) -> io::Result<()> {
        let at = usize::try_from(offset).map_err(io::Error::other)?;
        assert!(at + page.bytes() <= self.len, "inside the block");
        let address = self.address.as_ptr().wrapping_add(at).cast();
        // SAFETY: inside the mapping, as just checked, where no reference points.
        let result = unsafe { libc::madvise(address, page.bytes(), libc::MADV_REMOVE) };
        if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }
}

impl Drop for SecondMapping {
    fn drop(&mut self) {
        // SAFETY: made in `new`, and nobody holds a pointer into it past our life.
        unsafe { libc::munmap(self.address.as_ptr().cast(), self.len) };
    }
}
