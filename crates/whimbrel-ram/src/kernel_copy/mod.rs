//! Guest memory to and from file descriptors, by the kernel's own copies.
//!
//! One call moves many pages together with the bytes between them (record words, headers), so
//! that the cost of a system call is shared by hundreds of pages and no page is copied twice.
#![expect(unsafe_code, reason = "hands addresses of guest memory to the kernel")]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use crate::copy::copy;
use crate::{BlockError, RamBlock};

mod zero_copy;

pub use zero_copy::{Done, InFlight};

/// The most pieces the kernel takes in one call (`IOV_MAX`).
pub const PIECES_MAX: usize = 1024;

/// A list of pieces of guest memory and of our own buffers, for one call after another until all
/// of it has moved. Borrowing what it names keeps that alive: `'a`.
#[derive(Debug, Default)]
pub struct Pieces<'a> {
    pieces: Vec<libc::iovec>,
    done: usize,
    bytes_left: usize,
    borrowed: std::marker::PhantomData<&'a [u8]>,
}

// SAFETY: the addresses are of memory borrowed for `'a` (plain bytes or guest memory), which any
// thread may read.
unsafe impl Send for Pieces<'_> {}

impl<'a> Pieces<'a> {
    /// Appends bytes of ours.
    pub fn push_bytes(&mut self, bytes: &'a [u8]) {
        self.push(bytes.as_ptr().cast_mut(), bytes.len());
    }

    /// Appends `len` bytes of a block from `offset` on.
    pub fn push_guest(
        &mut self,
        block: &'a RamBlock,
        offset: u64,
        len: usize,
    ) -> Result<(), BlockError> {
        let address = block.range(offset, len)?;
        self.push(address.as_ptr(), len);
        Ok(())
    }

    fn push(&mut self, address: *mut u8, len: usize) {
        if len == 0 {
            return;
        }
        self.bytes_left += len;
        if let Some(last) = self.pieces[self.done..].last_mut()
            && last.iov_base.cast::<u8>().wrapping_add(last.iov_len) == address
        {
            last.iov_len += len;
            return;
        }
        self.pieces.push(libc::iovec { iov_base: address.cast(), iov_len: len });
    }

    /// How many bytes have not moved yet.
    pub fn bytes_left(&self) -> usize {
        self.bytes_left
    }

    /// How many separate pieces have not moved yet.
    pub fn pieces_left(&self) -> usize {
        self.pieces.len() - self.done
    }

    /// Forgets `bytes` that have moved.
    fn advance(&mut self, mut bytes: usize) {
        self.bytes_left -= bytes;
        while bytes > 0 {
            let piece = &mut self.pieces[self.done];
            if bytes < piece.iov_len {
                piece.iov_base = piece.iov_base.cast::<u8>().wrapping_add(bytes).cast();
                piece.iov_len -= bytes;
                return;
            }
            bytes -= piece.iov_len;
            self.done += 1;
        }
    }

    fn next_call(&self) -> &[libc::iovec] {
        let rest = &self.pieces[self.done..];
        &rest[..rest.len().min(PIECES_MAX)]
    }

    /// What the next call moves, as the kernel wants it: where the pieces are, and how many.
    fn next_vector(&self) -> (*const libc::iovec, libc::c_int) {
        let pieces = self.next_call();
        (pieces.as_ptr(), libc::c_int::try_from(pieces.len()).expect("at most PIECES_MAX"))
    }

    /// What a call has said: an error, or how many bytes it has moved.
    fn moved(&mut self, result: isize) -> io::Result<usize> {
        let moved = usize::try_from(result).map_err(|_| io::Error::last_os_error())?;
        self.advance(moved);
        Ok(moved)
    }
}

/// Pieces to be read out of memory.
#[derive(Debug, Default)]
pub struct Gather<'a>(Pieces<'a>);

impl<'a> std::ops::Deref for Gather<'a> {
    type Target = Pieces<'a>;
    fn deref(&self) -> &Pieces<'a> {
        &self.0
    }
}

impl<'a> std::ops::DerefMut for Gather<'a> {
    fn deref_mut(&mut self) -> &mut Pieces<'a> {
        &mut self.0
    }
}

impl Gather<'_> {
    /// An empty list.
    pub fn new() -> Self {
        Gather::default()
    }

    /// One `sendmsg` of as much as it takes; gives the bytes that went. Never raises SIGPIPE. With
    /// `apart`, what is sent next is not joined to its last segment (`MSG_EOR`).
    pub fn send(&mut self, socket: BorrowedFd<'_>, apart: bool) -> io::Result<usize> {
        self.send_with(socket, if apart { libc::MSG_EOR } else { 0 })
    }

    fn send_with(&mut self, socket: BorrowedFd<'_>, flags: libc::c_int) -> io::Result<usize> {
        let pieces = self.0.next_call();
        // SAFETY: all zero bytes are a valid msghdr: null pointers with zero lengths.
        let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
        message.msg_iov = pieces.as_ptr().cast_mut();
        message.msg_iovlen = pieces.len();
        let flags = libc::MSG_NOSIGNAL | flags;
        // SAFETY: the message names `pieces`, whose memory is borrowed for as long as `self`; the
        // kernel only reads it, and pins what it reads later.
        let sent = unsafe { libc::sendmsg(socket.as_raw_fd(), &raw const message, flags) };
        self.0.moved(sent)
    }

    /// One `writev`, for what is no socket.
    pub fn write(&mut self, file: BorrowedFd<'_>) -> io::Result<usize> {
        let (pieces, count) = self.0.next_vector();
        // SAFETY: as in `send`.
        let written = unsafe { libc::writev(file.as_raw_fd(), pieces, count) };
        self.0.moved(written)
    }

    /// Copies what is next into `buffer`, for what has to see the bytes before the kernel does;
    /// gives how many there were, or fitted. Guest memory may be written meanwhile: the copy holds
    /// one version of each byte, and nobody looks at the original again.
    pub fn copy_to(&mut self, buffer: &mut [u8]) -> usize {
        let mut done = 0;
        while done < buffer.len() && self.0.bytes_left > 0 {
            let piece = self.0.pieces[self.0.done];
            let to = &mut buffer[done..];
            let len = piece.iov_len.min(to.len());
            // SAFETY: `piece` is memory borrowed for as long as `self`, of which at least `len` bytes
            // are left; `to` is borrowed mutably, so that they cannot overlap.
            unsafe { copy(piece.iov_base.cast_const().cast(), to.as_mut_ptr(), len) };
            self.0.advance(len);
            done += len;
        }
        done
    }

    /// One `pwritev`, at byte `at` of a file that can be sought; others may use it meanwhile.
    pub fn write_at(&mut self, file: BorrowedFd<'_>, at: u64) -> io::Result<usize> {
        let at = libc::off_t::try_from(at).map_err(|_| io::ErrorKind::FileTooLarge)?;
        let (pieces, count) = self.0.next_vector();
        // SAFETY: as in `send`.
        let written = unsafe { libc::pwritev(file.as_raw_fd(), pieces, count, at) };
        self.0.moved(written)
    }
}

/// Pieces to be filled.
#[derive(Debug, Default)]
pub struct Scatter<'a>(Pieces<'a>);

impl<'a> Scatter<'a> {
    /// An empty list.
    pub fn new() -> Scatter<'a> {
        Scatter::default()
    }

    /// Appends a buffer of ours.
    pub fn push_buffer(&mut self, buffer: &'a mut [u8]) {
        self.0.push(buffer.as_mut_ptr(), buffer.len());
    }

    /// Appends `len` bytes of a block from `offset` on.
    pub fn push_guest(
        &mut self,
        block: &'a RamBlock,
        offset: u64,
        len: usize,
    ) -> Result<(), BlockError> {
        self.0.push_guest(block, offset, len)
    }

    /// How many bytes are still to be filled.
    pub fn bytes_left(&self) -> usize {
        self.0.bytes_left()
    }

    /// How many separate pieces are still to be filled.
    pub fn pieces_left(&self) -> usize {
        self.0.pieces_left()
    }

    /// Fills what is next from `bytes`; gives how many were taken.
    pub fn copy_from(&mut self, bytes: &[u8]) -> usize {
        let mut done = 0;
        while done < bytes.len() && self.0.bytes_left > 0 {
            let piece = self.0.pieces[self.0.done];
            let from = &bytes[done..];
            let len = piece.iov_len.min(from.len());
            // SAFETY: `piece` is a buffer borrowed mutably, or guest memory inside its block, for as
            // long as `self`, and at least `len` bytes of it are left; `from` is another borrow, so
            // that they cannot overlap.
            unsafe { copy(from.as_ptr(), piece.iov_base.cast(), len) };
            self.0.advance(len);
            done += len;
        }
        done
    }

    /// One `readv`; gives the bytes that came, 0 at the end of the stream.
    pub fn read(&mut self, fd: BorrowedFd<'_>) -> io::Result<usize> {
        let (pieces, count) = self.0.next_vector();
        // SAFETY: every piece is a buffer borrowed mutably, or guest memory inside its block, for
        // as long as `self`; the kernel writes nowhere else.
        let got = unsafe { libc::readv(fd.as_raw_fd(), pieces, count) };
        self.0.moved(got)
    }

    /// One `preadv`, from byte `at` of a file that can be sought; others may use it meanwhile.
    pub fn read_at(&mut self, file: BorrowedFd<'_>, at: u64) -> io::Result<usize> {
        let at = libc::off_t::try_from(at).map_err(|_| io::ErrorKind::FileTooLarge)?;
        let (pieces, count) = self.0.next_vector();
        // SAFETY: as in `read`.
        let got = unsafe { libc::preadv(file.as_raw_fd(), pieces, count, at) };
        self.0.moved(got)
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::fd::AsFd;

    use super::{Gather, Scatter};
    use crate::{Backing, PageSize, RamBlock, Sharing};

    /// A file of 16 KiB that is gone with the test.
    fn file() -> File {
        let block = RamBlock::memfd("file", 0, 16384, PageSize::SIZE_4K, Sharing::Shared);
        let block = block.expect("16 KiB");
        let Backing::Shared { file, .. } = block.backing() else { panic!("{:?}", block.backing()) };
        file.try_clone().expect("a descriptor")
    }

    #[test]
    fn what_is_written_at_a_place_is_read_from_there_and_nothing_else_is_touched() {
        let (file, block) = (file(), RamBlock::anonymous("ram", 0, 16384).expect("16 KiB"));
        block.write(4096, &[7; 4096]).expect("inside");
        block.write(12288, &[9; 4096]).expect("inside");
        let mut pieces = Gather::new();
        pieces.push_guest(&block, 4096, 4096).expect("inside");
        pieces.push_guest(&block, 12288, 4096).expect("inside");
        assert_eq!(pieces.write_at(file.as_fd(), 4096).expect("room"), 8192);
        assert_eq!((pieces.bytes_left(), pieces.pieces_left()), (0, 0));

        let (mut before, mut both, mut after) = ([1; 4096], [0; 8192], [1; 8192]);
        for (at, bytes) in [(0, &mut before[..]), (4096, &mut both), (12288, &mut after)] {
            let len = bytes.len();
            let mut pieces = Scatter::new();
            pieces.push_buffer(bytes);
            // The last one reaches beyond the end of the file.
            let expected = len.min(16384 - at);
            assert_eq!(pieces.read_at(file.as_fd(), at as u64).expect("reads"), expected);
            assert_eq!(pieces.bytes_left(), len - expected);
        }
        assert!(before == [0; 4096] && both[..4096] == [7; 4096] && both[4096..] == [9; 4096]);
        assert!(after[..4096] == [0; 4096] && after[4096..] == [1; 4096]);
        assert!(Gather::new().write_at(file.as_fd(), u64::MAX).is_err(), "no such place");
    }

    fn block() -> RamBlock {
        RamBlock::anonymous("ram", 0, 2 * 4096).unwrap()
    }

    #[test]
    fn bytes_are_copied_in_order_whatever_the_pieces() {
        let block = block();
        let content: Vec<u8> = (0..8192u32).map(|at| (at % 251) as u8).collect();
        block.write(0, &content).unwrap();
        let mut pieces = Gather::new();
        pieces.push_bytes(b"head");
        pieces.push_guest(&block, 100, 5000).unwrap();
        pieces.push_bytes(b"tail");
        let expected = [b"head", &content[100..5100], b"tail"].concat();
        let mut copied = Vec::new();
        let mut buffer = [0; 777];
        while pieces.bytes_left() > 0 {
            let got = pieces.copy_to(&mut buffer);
            copied.extend_from_slice(&buffer[..got]);
        }
        assert_eq!(copied, expected);
        assert_eq!(pieces.copy_to(&mut buffer), 0);

        let other = self::block();
        let (mut head, mut tail) = ([0; 4], [0; 4]);
        let mut places = Scatter::new();
        places.push_buffer(&mut head);
        places.push_guest(&other, 200, 5000).unwrap();
        places.push_buffer(&mut tail);
        let mut from = &*expected;
        while places.bytes_left() > 0 {
            let taken = places.copy_from(&from[..from.len().min(1000)]);
            from = &from[taken..];
        }
        assert_eq!(places.copy_from(b"more"), 0);
        drop(places);
        let mut found = vec![0; 5000];
        other.read(200, &mut found).unwrap();
        assert_eq!((&head, &*found, &tail), (b"head", &content[100..5100], b"tail"));
    }
}
