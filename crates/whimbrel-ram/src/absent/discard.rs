//! Taking pages out of memory.
#![expect(unsafe_code, reason = "takes pages of guest memory back")]

use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::process;

use crate::backing::Backing;
use crate::kernel_copy::PIECES_MAX;
use crate::{RamBlock, TARGET_PAGE};

/// Takes pages out of memory, so that the next touch of them is told of. Those of shared memory in
/// small pages stay in the page cache, which nobody trusts: to take them out there costs many times
/// as much, while the guest stands still.
pub(super) fn discard(block: &RamBlock, runs: &[Range<u64>]) -> io::Result<()> {
    let huge = block.host_page_size() > TARGET_PAGE;
    let each = |advice| runs.iter().try_for_each(|run| advise(block, run, advice));
    match block.backing() {
        Backing::Shared { .. } if huge => each(libc::MADV_REMOVE),
        // Shared or not, only the VMM knows: the kernel refuses the one where it is the other.
        Backing::External(_) if huge => {
            each(libc::MADV_REMOVE).or_else(|_| each(libc::MADV_DONTNEED))
        }
        _ => discard_many(block, runs).or_else(|_| each(libc::MADV_DONTNEED)),
    }
}

/// Takes runs of pages out of memory, many with one call: there may be hundreds of thousands. Linux
/// 6.13 or later.
fn discard_many(block: &RamBlock, runs: &[Range<u64>]) -> io::Result<()> {
    // SAFETY: takes numbers, gives a new file descriptor.
    let process = unsafe { libc::syscall(libc::SYS_pidfd_open, process::id(), 0) };
    let process = libc::c_int::try_from(process).ok().filter(|&fd| fd >= 0);
    let process = process.ok_or_else(io::Error::last_os_error)?;
    // SAFETY: the kernel has just given it to us alone.
    let process = unsafe { OwnedFd::from_raw_fd(process) };
    let mut pieces = Vec::with_capacity(PIECES_MAX);
    for runs in runs.chunks(PIECES_MAX) {
        pieces.clear();
        let mut len = 0;
        for run in runs {
            let (address, bytes) = place(block, run)?;
            pieces.push(libc::iovec { iov_base: address, iov_len: bytes });
            len += bytes;
        }
        // SAFETY: `place` checked that every piece is in the block's mapping, where no Rust
        // reference points; what is taken out of it is what its owner no longer needs.
        let done = unsafe {
            libc::syscall(
                libc::SYS_process_madvise,
                process.as_raw_fd(),
                pieces.as_ptr(),
                pieces.len(),
                libc::MADV_DONTNEED,
                0,
            )
        };
        if usize::try_from(done) != Ok(len) {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

/// The address and the length in bytes of a run of pages.
fn place(block: &RamBlock, pages: &Range<u64>) -> io::Result<(*mut libc::c_void, usize)> {
    let page = TARGET_PAGE.bytes() as u64;
    let len = usize::try_from((pages.end - pages.start) * page).map_err(io::Error::other)?;
    let address = block.range(pages.start * page, len).map_err(io::Error::other)?;
    Ok((address.as_ptr().cast(), len))
}

fn advise(block: &RamBlock, pages: &Range<u64>, advice: libc::c_int) -> io::Result<()> {
    let (address, len) = place(block, pages)?;
    // SAFETY: as in `discard_many`; advice on huge folios changes no content.
    let result = unsafe { libc::madvise(address, len, advice) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Asks for huge folios, as every block of ours in 4 KiB pages does when it is made, or for none.
pub(super) fn advise_huge_pages(block: &RamBlock, wanted: bool) {
    let ours = !matches!(block.backing(), Backing::External(_));
    if ours && block.host_page_size() == TARGET_PAGE {
        let advice = if wanted { libc::MADV_HUGEPAGE } else { libc::MADV_NOHUGEPAGE };
        // A kernel without huge folios refuses, and that is as well.
        let _ = advise(block, &(0..block.target_pages()), advice);
    }
}
