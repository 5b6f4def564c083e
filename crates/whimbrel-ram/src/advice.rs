//! What the kernel is told of memory that is read once: have it there, and take it back.
#![expect(unsafe_code, reason = "gives the kernel advice on guest memory")]

use std::io;
use std::ops::Range;

use crate::RamBlock;

impl RamBlock {
    /// Has the bytes of `range` in memory and mapped, as reading each of them would; but where a
    /// file behind them cannot be read, or has become too short, it is this call that fails: a
    /// read would be answered with a signal. Safe while others read and write the range. Linux
    /// 5.14 or later.
    ///
    /// # Errors
    /// What the kernel says; `EFAULT` of a file that has none of these bytes.
    ///
    /// # Panics
    /// When the range is not in the block, or does not begin with a host page.
    pub fn read_in(&self, range: Range<u64>) -> io::Result<()> {
        self.advise(range, libc::MADV_POPULATE_READ)
    }

    /// Gives the memory of `range` back to the kernel. What a private block held there is lost:
    /// it reads as zeros, or as what its file has there.
    ///
    /// # Errors
    /// What the kernel says.
    ///
    /// # Panics
    /// When the range is not in the block, or does not begin with a host page.
    pub fn give_back(&self, range: Range<u64>) -> io::Result<()> {
        self.advise(range, libc::MADV_DONTNEED)
    }

    fn advise(&self, range: Range<u64>, advice: libc::c_int) -> io::Result<()> {
        let page = self.host_page_size().bytes() as u64;
        assert!(range.start.is_multiple_of(page), "{range:?} begins with a page");
        let len = usize::try_from(range.end - range.start).expect("RAM fits in memory");
        let address = self.range(range.start, len).expect("a range of the block");
        loop {
            // SAFETY: `range` checked that it is in our mapping, to which no Rust reference
            // points; private memory that is given back stays mapped, and its owner lets it go.
            if unsafe { libc::madvise(address.as_ptr().cast(), len, advice) } == 0 {
                return Ok(());
            }
            let error = io::Error::last_os_error();
            if error.kind() != io::ErrorKind::Interrupted {
                return Err(error);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use crate::{Backing, PageSize, RamBlock, Sharing, TargetPage};

    #[test]
    fn what_is_given_back_is_zero_and_its_neighbours_stay() {
        let block = RamBlock::anonymous("ram", 0, 16384).expect("16 KiB");
        block.write(0, &[1; 16384]).expect("inside");
        block.give_back(4096..12288).expect("ours");
        let zero: Vec<bool> = (0..4).map(|page| block.is_zero(TargetPage(page))).collect();
        assert_eq!(zero, [false, true, true, false]);
        block.read_in(0..16384).expect("memory");
        assert_eq!(block.load_u64(0).expect("inside"), 0x0101_0101_0101_0101);
    }

    #[test]
    fn a_file_that_has_become_too_short_is_an_error_and_no_signal() {
        let memfd = RamBlock::memfd("file", 0, 16384, PageSize::SIZE_4K, Sharing::Shared);
        let memfd = memfd.expect("16 KiB");
        let Backing::Shared { file, .. } = memfd.backing() else { panic!("{:?}", memfd.backing()) };
        let mut file = file.try_clone().expect("a descriptor");
        file.write_all(&[3; 16384]).expect("memory");
        let block = file.try_clone().expect("a descriptor");
        let block = RamBlock::private_file("ram", 0, 16384, block, 0).expect("mapped");
        block.read_in(0..16384).expect("all of it is there");
        file.set_len(8192).expect("ours");
        block.read_in(0..8192).expect("that much is there");
        let error = block.read_in(4096..16384).expect_err("cut off");
        assert_eq!(error.raw_os_error(), Some(libc::EFAULT));
        assert_eq!(block.load_u64(4096).expect("inside"), 0x0303_0303_0303_0303);
    }
}
