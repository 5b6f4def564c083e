//! What guest memory is made of, and making it.
#![expect(unsafe_code, reason = "owns the mappings of guest RAM")]

use std::any::Any;
use std::fmt;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd};
use std::ptr::{self, NonNull};

use crate::page::{PageSize, TARGET_PAGE};
use crate::{BlockError, RamBlock};

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
    /// A private (copy on write) mapping of a file or memfd, from `offset` bytes on: a kept VM,
    /// or huge pages of our own.
    PrivateFile {
        /// The file.
        file: File,
        /// Where the block begins in it, in bytes.
        offset: u64,
    },
    /// Memory the VMM mapped and keeps mapped itself.
    External(Owner),
}

/// What keeps [`Backing::External`] memory mapped, if the block has been given it.
pub struct Owner(Option<Box<dyn Any + Send + Sync>>);

impl fmt::Debug for Owner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.0.is_some() { "held" } else { "elsewhere" })
    }
}

/// Whether others that map a memfd see what is written to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sharing {
    /// They do.
    Shared,
    /// What is written stays in this process.
    Private,
}

/// Memory that is unmapped when the value ends, unless it is the VMM's.
#[derive(Debug)]
pub(crate) struct Mapping {
    pub(crate) address: NonNull<u8>,
    pub(crate) len: usize,
    pub(crate) backing: Backing,
}

// SAFETY: plain memory that lives as long as the value; concurrent access to it goes through
// copies that allow it, which is what "guest memory" means.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl RamBlock {
    /// Private anonymous memory of `len` bytes at `guest_address`, all zero. Not populated:
    /// the first touch of each page takes it from the host. Huge folios are asked for.
    pub fn anonymous(name: &str, guest_address: u64, len: u64) -> Result<RamBlock, BlockError> {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        RamBlock::map(name, guest_address, len, TARGET_PAGE, flags, Backing::Anonymous)
    }

    /// A memfd of `len` bytes in pages of `host_page`, all zero: 4 KiB, or a size of which the
    /// host has huge pages reserved. Not populated; huge pages are reserved for all of it.
    pub fn memfd(
        name: &str,
        guest_address: u64,
        len: u64,
        host_page: PageSize,
        sharing: Sharing,
    ) -> Result<RamBlock, BlockError> {
        check(name, len, host_page)?;
        let file = create_memfd(len, host_page).map_err(|source| BlockError::Map {
            name: name.into(),
            len,
            page: host_page,
            source,
        })?;
        let (flags, backing) = match sharing {
            Sharing::Shared => (libc::MAP_SHARED, Backing::Shared { file, offset: 0 }),
            Sharing::Private => (libc::MAP_PRIVATE, Backing::PrivateFile { file, offset: 0 }),
        };
        RamBlock::map(name, guest_address, len, host_page, flags, backing)
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
        let backing = Backing::Shared { file, offset };
        RamBlock::map(name, guest_address, len, host_page, libc::MAP_SHARED, backing)
    }

    /// A private mapping of `file` from byte `offset` on: what is written stays here.
    pub fn private_file(
        name: &str,
        guest_address: u64,
        len: u64,
        file: File,
        offset: u64,
    ) -> Result<RamBlock, BlockError> {
        let backing = Backing::PrivateFile { file, offset };
        RamBlock::map(name, guest_address, len, TARGET_PAGE, libc::MAP_PRIVATE, backing)
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
        // SAFETY: by the caller's promise.
        unsafe { RamBlock::borrow_mapping(name, guest_address, address, len, host_page, None) }
    }

    /// As [`external`](RamBlock::external), for memory that stays mapped as long as `owner`
    /// lives, which the block keeps.
    ///
    /// # Safety
    /// As for `external`, as long as `owner` lives.
    pub unsafe fn external_owned(
        name: &str,
        guest_address: u64,
        address: NonNull<u8>,
        len: usize,
        host_page: PageSize,
        owner: impl Any + Send + Sync,
    ) -> Result<RamBlock, BlockError> {
        let owner: Option<Box<dyn Any + Send + Sync>> = Some(Box::new(owner));
        // SAFETY: by the caller's promise, which holds as long as the owner, which the block keeps.
        unsafe { RamBlock::borrow_mapping(name, guest_address, address, len, host_page, owner) }
    }

    /// # Safety
    /// As for `external`.
    unsafe fn borrow_mapping(
        name: &str,
        guest_address: u64,
        address: NonNull<u8>,
        len: usize,
        host_page: PageSize,
        owner: Option<Box<dyn Any + Send + Sync>>,
    ) -> Result<RamBlock, BlockError> {
        check(name, len as u64, host_page)?;
        assert!(
            address.as_ptr().addr().is_multiple_of(host_page.bytes()),
            "RAM block {name} is aligned to its host page"
        );
        let mapping = Mapping { address, len, backing: Backing::External(Owner(owner)) };
        Ok(RamBlock { name: name.into(), guest_address, host_page, mapping })
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
        let mapping = Mapping::new(len, host_page, flags, backing).map_err(|source| {
            BlockError::Map { name: name.into(), len, page: host_page, source }
        })?;
        Ok(RamBlock { name: name.into(), guest_address, host_page, mapping })
    }

    /// Takes pages from the host for `len` bytes from `offset` on, ahead of their first touch;
    /// what they hold stays. Both are rounded to whole host pages by the caller.
    ///
    /// A first touch later costs a fault for each page and, in a guest of a cloud, a page of the
    /// host below: another thread that runs ahead of what arrives hides both. Safe while others
    /// read and write the range. Linux 5.14 or later.
    pub fn populate(&self, offset: u64, len: u64) -> Result<(), BlockError> {
        let error = |source| BlockError::Populate {
            name: self.name().into(),
            offset,
            len,
            page: self.host_page,
            source,
        };
        let bytes = usize::try_from(len).map_err(|_| error(too_big()))?;
        let address = self.range(offset, bytes)?.as_ptr().cast();
        loop {
            // SAFETY: `range` checked that it is in our mapping; the advice changes no content.
            if unsafe { libc::madvise(address, bytes, libc::MADV_POPULATE_WRITE) } == 0 {
                return Ok(());
            }
            let source = io::Error::last_os_error();
            if source.kind() != io::ErrorKind::Interrupted {
                return Err(error(source));
            }
        }
    }
}

impl Mapping {
    fn new(
        len: u64,
        host_page: PageSize,
        flags: libc::c_int,
        backing: Backing,
    ) -> io::Result<Mapping> {
        let len = usize::try_from(len).map_err(|_| too_big())?;
        let (fd, offset) = match &backing {
            Backing::Shared { file, offset } | Backing::PrivateFile { file, offset } => {
                (file.as_raw_fd(), *offset)
            }
            Backing::Anonymous | Backing::External(_) => (-1, 0),
        };
        let offset = libc::off_t::try_from(offset).map_err(|_| too_big())?;
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        let huge = host_page > TARGET_PAGE;
        // Huge pages that are not reserved now would kill us at their first touch.
        let flags = if huge { flags } else { flags | libc::MAP_NORESERVE };
        // SAFETY: a fresh mapping at an address of the kernel's choice; no memory of ours is touched.
        let address = unsafe { libc::mmap(ptr::null_mut(), len, protection, flags, fd, offset) };
        if address == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        if !huge {
            // Huge folios make both the first touch and the copies cheaper; a refusal costs only that.
            // SAFETY: advice on the mapping just made; it changes no content.
            unsafe { libc::madvise(address, len, libc::MADV_HUGEPAGE) };
        }
        let address = NonNull::new(address.cast::<u8>()).expect("mmap never gives address zero");
        Ok(Mapping { address, len, backing })
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        if !matches!(self.backing, Backing::External(_)) {
            // SAFETY: the mapping is ours, made in `new`, and nobody holds a pointer into it past our life.
            unsafe { libc::munmap(self.address.as_ptr().cast(), self.len) };
        }
    }
}

fn create_memfd(len: u64, page: PageSize) -> io::Result<File> {
    let mut flags = libc::MFD_CLOEXEC;
    if page > TARGET_PAGE {
        flags |= libc::MFD_HUGETLB | (page.bytes().trailing_zeros() << libc::MFD_HUGE_SHIFT);
    }
    // SAFETY: a constant name; gives a new file descriptor.
    let fd = unsafe { libc::memfd_create(c"guest-ram".as_ptr(), flags) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just given it to us alone.
    let file = unsafe { File::from_raw_fd(fd) };
    file.set_len(len)?;
    Ok(file)
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

fn too_big() -> io::Error {
    io::Error::from(io::ErrorKind::OutOfMemory)
}

/// What to do about a lack of huge pages, for the end of an error's text.
pub(crate) fn hint(page: PageSize, len: u64) -> String {
    if page <= TARGET_PAGE {
        return String::new();
    }
    let kilobytes = page.bytes() / 1024;
    let needed = len.div_ceil(page.bytes() as u64);
    format!(
        " (needs {needed} free huge pages: if the host supports their size, raise \
         /sys/kernel/mm/hugepages/hugepages-{kilobytes}kB/nr_hugepages)"
    )
}

#[cfg(test)]
mod tests {
    use super::Sharing;
    use crate::{BlockError, PageSize, RamBlock, TargetPage};

    #[test]
    fn a_shared_memfd_is_seen_by_others_and_a_private_one_is_not() {
        for (sharing, seen) in [(Sharing::Shared, 0x5a), (Sharing::Private, 0)] {
            let block = RamBlock::memfd("a", 0, 8192, PageSize::SIZE_4K, sharing).unwrap();
            let file = match block.backing() {
                super::Backing::Shared { file, .. } | super::Backing::PrivateFile { file, .. } => {
                    file
                }
                other => panic!("{other:?}"),
            };
            let file = file.try_clone().unwrap();
            let other = RamBlock::shared_file("b", 0, 4096, PageSize::SIZE_4K, file, 4096).unwrap();
            block.write(4096 + 7, &[0x5a]).unwrap();
            let mut byte = [0xff];
            other.read(7, &mut byte).unwrap();
            assert_eq!(byte, [seen]);
        }
    }

    #[test]
    fn huge_pages_where_the_host_has_them() {
        for page in [PageSize::SIZE_2M, PageSize::SIZE_1G] {
            let len = page.bytes() as u64;
            match RamBlock::memfd("ram", 0, len, page, Sharing::Shared) {
                Ok(block) => {
                    assert!(block.host_address().addr().get().is_multiple_of(page.bytes()));
                    block.write(len - 1, &[7]).unwrap();
                    assert!(block.is_zero(TargetPage(0)));
                    assert!(!block.is_zero(TargetPage(block.target_pages() - 1)));
                }
                Err(error) => eprintln!("skipped: {error}"),
            }
        }
    }

    #[test]
    fn missing_huge_pages_are_an_error_that_says_what_to_do() {
        // 64 TiB of them is more than any machine that runs this has.
        let error = RamBlock::memfd("ram", 0, 1 << 46, PageSize::SIZE_2M, Sharing::Shared);
        let text = error.unwrap_err().to_string();
        assert!(text.contains("hugepages-2048kB/nr_hugepages"), "{text}");
        assert!(text.contains("33554432 free huge pages"), "{text}");
    }

    #[test]
    fn populating_keeps_what_is_there() {
        let block = RamBlock::anonymous("ram", 0, 1 << 20).unwrap();
        block.write(5000, b"kept").unwrap();
        block.populate(0, 1 << 20).unwrap();
        let mut bytes = [0; 4];
        block.read(5000, &mut bytes).unwrap();
        assert_eq!(&bytes, b"kept");
        assert!(matches!(block.populate(4096, 1 << 20), Err(BlockError::Outside { .. })));
    }

    #[test]
    fn names_and_lengths_are_checked() {
        let name = "n".repeat(256);
        assert!(matches!(RamBlock::anonymous(&name, 0, 4096), Err(BlockError::Name(256))));
        assert!(matches!(RamBlock::anonymous("", 0, 4096), Err(BlockError::Name(0))));
        assert!(matches!(RamBlock::anonymous("ram", 0, 0), Err(BlockError::Length { .. })));
        assert!(matches!(RamBlock::anonymous("ram", 0, 4097), Err(BlockError::Length { .. })));
    }
}
