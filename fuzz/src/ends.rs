//! The other end of the engine's connections: sockets that are written and read without waiting.

use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread::sleep;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::sockopt;

/// A limit for waits, in ms. Tests of what an input leads to have more time, whatever else the
/// machine has to do: there it is not to be reached.
pub(crate) const fn patience(ms: u64) -> Duration {
    Duration::from_millis(if cfg!(test) { 30_000 } else { ms })
}

/// How long the engine may take before it is taken to read no more.
const PATIENCE: Duration = patience(10);

/// How long what it has read last may take to have its effect.
const MOMENT: Duration = Duration::from_micros(if cfg!(test) { 10_000 } else { 300 });

/// One connection.
#[derive(Debug)]
pub(crate) struct End {
    stream: UnixStream,
    /// Nothing goes out any more.
    closed: bool,
    /// What has come and was not taken.
    pub(crate) came: Vec<u8>,
    /// Nothing comes any more.
    pub(crate) ended: bool,
}

impl End {
    pub(crate) fn new(stream: UnixStream) -> End {
        stream.set_nonblocking(true).expect("a socket");
        End { stream, closed: false, came: Vec::new(), ended: false }
    }

    /// Connects; `None` where nobody listens any more.
    pub(crate) fn connect(path: &Path) -> Option<End> {
        UnixStream::connect(path).ok().map(End::new)
    }

    /// Sends what is taken.
    pub(crate) fn send(&mut self, mut bytes: &[u8]) {
        let start = Instant::now();
        while !self.closed && !bytes.is_empty() {
            match self.stream.write(bytes) {
                Ok(sent) => bytes = &bytes[sent..],
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    self.receive();
                    self.wait(PollFlags::OUT | PollFlags::IN);
                    if start.elapsed() > PATIENCE {
                        return self.close();
                    }
                }
                Err(_) => self.closed = true,
            }
        }
    }

    pub(crate) fn close(&mut self) {
        self.closed = true;
        // It may have gone.
        let _ = self.stream.shutdown(Shutdown::Write);
    }

    /// Takes in what has come; says whether anything has.
    pub(crate) fn receive(&mut self) -> bool {
        let before = self.came.len();
        let mut buffer = [0; 16 << 10];
        while !self.ended {
            match (&self.stream).read(&mut buffer) {
                Ok(0) => self.ended = true,
                Ok(bytes) => self.came.extend(&buffer[..bytes]),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(_) => self.ended = true,
            }
        }
        self.came.len() > before
    }

    pub(crate) fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }

    /// Reads to the end, for `limit` at most; says whether that has come.
    pub(crate) fn read_to_end(&mut self, limit: Duration) -> bool {
        let start = Instant::now();
        while !self.ended && start.elapsed() < limit {
            self.wait(PollFlags::IN);
            self.receive();
        }
        self.ended
    }

    fn wait(&self, what: PollFlags) {
        let mut fds = [PollFd::from_borrowed_fd(self.stream.as_fd(), what)];
        // Whatever it was that woke us, the next call tells.
        let _ = poll(&mut fds, Some(&timespec(PATIENCE)));
    }

    /// Waits until the other side has taken next to all that was sent.
    pub(crate) fn settle(&mut self) {
        self.receive();
        if !self.closed {
            // A socket can be written to while a quarter of its buffer is taken: of the smallest
            // there is, that is next to nothing.
            let usual = sockopt::socket_send_buffer_size(&self.stream).unwrap_or(1 << 17);
            let _ = sockopt::set_socket_send_buffer_size(&self.stream, 0);
            self.wait(PollFlags::OUT);
            let _ = sockopt::set_socket_send_buffer_size(&self.stream, usual / 2);
        }
        sleep(MOMENT);
        self.receive();
    }
}

/// Waits until `done`, for `time` at most; says whether it was.
pub(crate) fn within(time: Duration, mut done: impl FnMut() -> bool) -> bool {
    let start = Instant::now();
    loop {
        if done() {
            return true;
        }
        if start.elapsed() > time {
            return false;
        }
        sleep(MOMENT);
    }
}

pub(crate) fn timespec(time: Duration) -> Timespec {
    Timespec {
        tv_sec: i64::try_from(time.as_secs()).expect("short"),
        tv_nsec: time.subsec_nanos().into(),
    }
}
