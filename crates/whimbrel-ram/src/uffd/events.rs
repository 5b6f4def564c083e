//! Reading what the kernel tells of: one call, many faults.

use std::io;
use std::os::fd::AsRawFd;

use super::Userfaultfd;

const UFFD_EVENT_PAGEFAULT: u8 = 0x12;
const UFFD_PAGEFAULT_FLAG_WRITE: u64 = 1 << 0;
const UFFD_PAGEFAULT_FLAG_WP: u64 = 1 << 1;

/// How many faults one call gives at most.
const EVENTS: usize = 128;

/// `struct uffd_msg` of a page fault.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct UffdMsg {
    event: u8,
    reserved: [u8; 7],
    flags: u64,
    address: u64,
    thread: u32,
    padding: u32,
}

/// A thread that waits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Event {
    pub(crate) address: u64,
    /// Its id, 0 where the kernel does not tell.
    pub(crate) thread: u32,
    pub(crate) write: bool,
    /// It waits to write to a protected page, not for one that is missing.
    pub(crate) protected: bool,
}

/// What one call of the kernel gave.
pub(crate) struct Events {
    messages: [UffdMsg; EVENTS],
    count: usize,
}

impl Events {
    /// The page faults among them.
    pub(crate) fn iter(&self) -> impl Iterator<Item = Event> {
        let faults = self.messages[..self.count].iter();
        faults.filter(|message| message.event == UFFD_EVENT_PAGEFAULT).map(|message| Event {
            address: message.address,
            thread: message.thread,
            write: message.flags & UFFD_PAGEFAULT_FLAG_WRITE != 0,
            protected: message.flags & UFFD_PAGEFAULT_FLAG_WP != 0,
        })
    }

    /// Whether there may be more to be read at once.
    pub(crate) fn is_full(&self) -> bool {
        self.count == EVENTS
    }
}

impl Userfaultfd {
    /// Takes the faults that wait to be read, without waiting for any.
    pub(crate) fn read(&self) -> io::Result<Events> {
        let mut events = Events { messages: [UffdMsg::default(); EVENTS], count: 0 };
        let into = events.messages.as_mut_ptr();
        let len = size_of_val(&events.messages);
        loop {
            // SAFETY: the kernel writes whole messages into the array, `len` bytes at most; any
            // bytes are a valid message.
            let got = unsafe { libc::read(self.fd.as_raw_fd(), into.cast(), len) };
            if let Ok(got) = usize::try_from(got) {
                events.count = got / size_of::<UffdMsg>();
                return Ok(events);
            }
            let error = io::Error::last_os_error();
            match error.kind() {
                io::ErrorKind::WouldBlock => return Ok(events),
                io::ErrorKind::Interrupted => {}
                _ => return Err(error),
            }
        }
    }
}
