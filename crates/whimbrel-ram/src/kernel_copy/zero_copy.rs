//! Sending without a copy (`MSG_ZEROCOPY`): the kernel pins the pages and reads them when it sends
//! them, which may be long after the call has returned, and says on the socket's error queue when
//! it no longer needs them.
//!
//! Whoever sends so must not change what was sent before the kernel is done with it, unless it does
//! not matter which of the two versions arrives: guest memory that the guest writes meanwhile is in
//! the dirty log again, but a header must stay as it is. Memory that is unmapped meanwhile does no
//! harm: the pages stay pinned.
//!
//! While something lies in the error queue every `poll` of the socket returns at once with
//! `POLLERR`: call [`InFlight::reap`] before each wait.
#![expect(unsafe_code, reason = "socket options, flags and control messages that nothing wraps")]

use std::io;
use std::mem::{MaybeUninit, size_of};
use std::os::fd::{AsRawFd, BorrowedFd};

use super::Gather;

/// `ee_code` of a notice about bytes that were copied after all (`linux/errqueue.h`).
const COPIED_AFTER_ALL: u8 = 1;
/// `ee_origin` of notices about sending without a copy.
const FROM_ZERO_COPY: u8 = 5;
/// Room for the control messages of one notice: `IP_RECVERR` with an address behind it, which is
/// below 64 bytes in both families. In words, for their alignment.
const CONTROL_WORDS: usize = 16;

/// What the kernel still has to read of what was sent over one socket. Every call has a number of
/// its own; a notice says which numbers are done.
#[derive(Debug, Default)]
pub struct InFlight {
    /// Calls whose pages the kernel still has.
    calls: u32,
    done: Done,
}

/// How the calls that are done were sent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Done {
    /// Without a copy.
    pub without_copy: u64,
    /// Copied after all: over loopback always, and where the network card cannot gather.
    pub copied: u64,
}

impl InFlight {
    /// Lets `socket` send without copies. Refused where the kernel or the kind of socket cannot.
    pub fn on(socket: BorrowedFd<'_>) -> io::Result<InFlight> {
        let yes: libc::c_int = 1;
        let len = libc::socklen_t::try_from(size_of::<libc::c_int>()).expect("four bytes");
        // SAFETY: the option's value is `yes`, of this length, read during the call only.
        let result = unsafe {
            libc::setsockopt(
                socket.as_raw_fd(),
                libc::SOL_SOCKET,
                libc::SO_ZEROCOPY,
                (&raw const yes).cast(),
                len,
            )
        };
        if result == 0 { Ok(InFlight::default()) } else { Err(io::Error::last_os_error()) }
    }

    /// Whether the kernel is done with all that was sent.
    pub fn is_empty(&self) -> bool {
        self.calls == 0
    }

    /// How the calls that are done were sent.
    pub fn done(&self) -> Done {
        self.done
    }

    /// Takes in all notices that have come; never waits for more. To wait for the next, poll the
    /// socket for nothing: `POLLERR` is always reported.
    pub fn reap(&mut self, socket: BorrowedFd<'_>) -> io::Result<()> {
        while self.calls > 0 {
            let Some(notice) = Notice::read(socket)? else { return Ok(()) };
            // The kernel counts modulo 2^32, and never has that many under way.
            let calls = notice.last.wrapping_sub(notice.first).wrapping_add(1);
            if calls == 0 || calls > self.calls {
                return Err(io::Error::other("the kernel is done with more than was sent"));
            }
            self.calls -= calls;
            match notice.copied {
                true => self.done.copied += u64::from(calls),
                false => self.done.without_copy += u64::from(calls),
            }
        }
        Ok(())
    }
}

impl Gather<'_> {
    /// One `sendmsg` of as much as it takes, without a copy; gives the bytes that went, which the
    /// kernel may read until `in_flight` says that it is done. `None` when the kernel has pinned as
    /// many pages as it may (`RLIMIT_MEMLOCK`, `optmem_max`): [`reap`](InFlight::reap), or send
    /// this with a copy.
    pub fn send_zero_copy(
        &mut self,
        socket: BorrowedFd<'_>,
        in_flight: &mut InFlight,
    ) -> io::Result<Option<usize>> {
        match self.send_with(socket, libc::MSG_ZEROCOPY) {
            Ok(bytes) => {
                // A call that sends nothing gets no number.
                in_flight.calls += u32::from(bytes > 0);
                Ok(Some(bytes))
            }
            Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => Ok(None),
            Err(error) => Err(error),
        }
    }
}

/// The kernel is done with these calls.
struct Notice {
    first: u32,
    last: u32,
    copied: bool,
}

impl Notice {
    /// The next one on the error queue that is about sending without a copy.
    fn read(socket: BorrowedFd<'_>) -> io::Result<Option<Notice>> {
        loop {
            let mut control = [0_u64; CONTROL_WORDS];
            // SAFETY: all zero bytes are a valid msghdr: null pointers with zero lengths.
            let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
            message.msg_control = control.as_mut_ptr().cast();
            message.msg_controllen = size_of_val(&control);
            let flags = libc::MSG_ERRQUEUE | libc::MSG_DONTWAIT;
            // SAFETY: the message names `control`, of this length, and nothing else to be filled.
            let got = unsafe { libc::recvmsg(socket.as_raw_fd(), &raw mut message, flags) };
            if got < 0 {
                let error = io::Error::last_os_error();
                match error.kind() {
                    io::ErrorKind::WouldBlock => return Ok(None),
                    io::ErrorKind::Interrupted => continue,
                    _ => return Err(error),
                }
            }
            if let Some(notice) = Notice::of(&message) {
                return Ok(Some(notice));
            }
        }
    }

    /// The notice in a message's first control message, if it is one.
    fn of(message: &libc::msghdr) -> Option<Notice> {
        // SAFETY: the kernel has filled the control buffer, which outlives the call.
        let header = unsafe { libc::CMSG_FIRSTHDR(message) };
        if header.is_null() {
            return None;
        }
        // SAFETY: not null, so a whole header lies in the buffer, aligned as it is.
        let libc::cmsghdr { cmsg_len, cmsg_level, cmsg_type, .. } = unsafe { header.read() };
        let is_error = matches!(
            (cmsg_level, cmsg_type),
            (libc::SOL_IP, libc::IP_RECVERR) | (libc::SOL_IPV6, libc::IPV6_RECVERR)
        );
        let mut error = MaybeUninit::<libc::sock_extended_err>::uninit();
        let len = u32::try_from(size_of_val(&error)).expect("some bytes");
        // SAFETY: pure arithmetic.
        let needed = unsafe { libc::CMSG_LEN(len) };
        if !is_error || cmsg_len < needed as usize {
            return None;
        }
        // SAFETY: `header` is in the buffer; only an address is computed.
        let data = unsafe { libc::CMSG_DATA(header) };
        // SAFETY: `cmsg_len` says that so many bytes follow the header; the copy needs no alignment.
        unsafe { data.copy_to_nonoverlapping(error.as_mut_ptr().cast(), size_of_val(&error)) };
        // SAFETY: all of it was just written, and any bytes are valid.
        let error = unsafe { error.assume_init() };
        (error.ee_errno == 0 && error.ee_origin == FROM_ZERO_COPY).then_some(Notice {
            first: error.ee_info,
            last: error.ee_data,
            copied: error.ee_code & COPIED_AFTER_ALL != 0,
        })
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read as _, Write as _};
    use std::net::{TcpListener, TcpStream};
    use std::os::fd::AsFd as _;
    use std::os::unix::net::UnixStream;
    use std::time::{Duration, Instant};

    use super::*;
    use crate::RamBlock;

    fn connection() -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let sender = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        (sender, listener.accept().unwrap().0)
    }

    fn reap_all(in_flight: &mut InFlight, socket: BorrowedFd<'_>) {
        let begun = Instant::now();
        while !in_flight.is_empty() {
            in_flight.reap(socket).unwrap();
            assert!(begun.elapsed() < Duration::from_secs(30), "no notice of {in_flight:?}");
        }
    }

    #[test]
    fn everything_arrives_and_every_call_is_done_once() {
        const PAGES: u64 = 512;
        let block = RamBlock::anonymous("ram", 0, PAGES * 4096).unwrap();
        for page in 0..PAGES {
            block.store_u64(page * 4096 + page * 8, page + 1).unwrap();
        }
        let mut whole = vec![0; usize::try_from(block.len()).unwrap()];
        block.read(0, &mut whole).unwrap();
        let expected: Vec<u8> = whole.chunks(4096).rev().flatten().copied().collect();

        let (sender, mut receiver) = connection();
        let receiving = std::thread::Builder::new().spawn(move || {
            let mut got = Vec::new();
            receiver.read_to_end(&mut got).map(|_| got)
        });
        let mut in_flight = InFlight::on(sender.as_fd()).unwrap();
        let mut pieces = Gather::new();
        // Backwards, so that no two pages are one piece.
        for page in (0..PAGES).rev() {
            pieces.push_guest(&block, page * 4096, 4096).unwrap();
        }
        let mut calls = 0;
        while pieces.bytes_left() > 0 {
            match pieces.send_zero_copy(sender.as_fd(), &mut in_flight).unwrap() {
                Some(bytes) => calls += u64::from(bytes > 0),
                // A user may be allowed few pinned pages, or none.
                None if in_flight.is_empty() => drop(pieces.send(sender.as_fd(), false).unwrap()),
                None => in_flight.reap(sender.as_fd()).unwrap(),
            }
        }
        reap_all(&mut in_flight, sender.as_fd());
        let Done { without_copy, copied } = in_flight.done();
        assert_eq!(without_copy + copied, calls);
        // Over loopback there is nobody to hand the pages to.
        assert_eq!(without_copy, 0);
        drop(sender);
        assert!(receiving.unwrap().join().unwrap().unwrap() == expected);
    }

    #[test]
    fn nothing_is_done_before_the_receiver_has_it() {
        let (sender, mut receiver) = connection();
        let mut in_flight = InFlight::on(sender.as_fd()).unwrap();
        sender.set_nonblocking(true).unwrap();
        let block = RamBlock::anonymous("ram", 0, 64 << 10).unwrap();
        // Until both buffers are full, or no more pages may be pinned.
        let mut sent = 0;
        loop {
            let mut pieces = Gather::new();
            pieces.push_guest(&block, 0, 64 << 10).unwrap();
            match pieces.send_zero_copy(sender.as_fd(), &mut in_flight) {
                Ok(Some(bytes)) => sent += bytes,
                Ok(None) => break,
                Err(error) => {
                    assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
                    break;
                }
            }
        }
        assert!(sent > 0, "not one page may be pinned (ulimit -l)");
        in_flight.reap(sender.as_fd()).unwrap();
        assert!(!in_flight.is_empty(), "what lies in our buffer is still to be read");
        let mut got = vec![1; sent];
        receiver.read_exact(&mut got).unwrap();
        assert!(got.iter().all(|byte| *byte == 0));
        reap_all(&mut in_flight, sender.as_fd());
    }

    #[test]
    fn a_broken_connection_is_said_and_ends_what_was_under_way() {
        let (sender, receiver) = connection();
        let mut in_flight = InFlight::on(sender.as_fd()).unwrap();
        let block = RamBlock::anonymous("ram", 0, 64 << 10).unwrap();
        let mut pieces = Gather::new();
        pieces.push_guest(&block, 0, 64 << 10).unwrap();
        pieces.send_zero_copy(sender.as_fd(), &mut in_flight).unwrap();
        // Unread data makes the close a reset, which frees what the sender still has.
        drop(receiver);
        reap_all(&mut in_flight, sender.as_fd());
        let mut pieces = Gather::new();
        pieces.push_guest(&block, 0, 64 << 10).unwrap();
        let error = loop {
            match pieces.send_zero_copy(sender.as_fd(), &mut in_flight) {
                Ok(_) => {}
                Err(error) => break error,
            }
        };
        assert!(
            [io::ErrorKind::ConnectionReset, io::ErrorKind::BrokenPipe].contains(&error.kind()),
            "{error}"
        );
    }

    #[test]
    fn a_socket_that_cannot_says_so() {
        let (unix, _other) = UnixStream::pair().unwrap();
        let error = InFlight::on(unix.as_fd()).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EOPNOTSUPP), "{error}");
    }

    #[test]
    fn other_notices_are_passed_over() {
        let (mut sender, mut receiver) = connection();
        let mut in_flight = InFlight::on(sender.as_fd()).unwrap();
        sender.write_all(b"with a copy").unwrap();
        in_flight.reap(sender.as_fd()).unwrap();
        assert!(in_flight.is_empty());
        let mut got = [0; 11];
        receiver.read_exact(&mut got).unwrap();
        assert_eq!(&got, b"with a copy");
    }
}
