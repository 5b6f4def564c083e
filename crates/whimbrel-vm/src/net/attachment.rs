//! The VM's device plugged into the host.

use std::fs::File;
use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{Builder, JoinHandle};

use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};

use super::{FRAME_MAX, NetPlug, tap};
use crate::error::Error;

/// A way to the host's network; unplugged when it is dropped.
#[derive(Debug)]
pub struct Attachment {
    sender: Sender,
    ends: Arc<OwnedFd>,
    thread: Option<JoinHandle<()>>,
}

/// Where frames go.
#[derive(Clone, Debug)]
enum Sender {
    Tap(Arc<File>),
    Stream(Arc<Mutex<Queue>>),
}

/// A stream, and what of a frame it has not taken yet.
#[derive(Debug)]
struct Queue {
    stream: UnixStream,
    rest: Vec<u8>,
}

/// Frames that come this close together are kept until the stream takes them.
const QUEUE_MAX: usize = 256 << 10;

impl Attachment {
    /// Plugs it in; `receive` gets every frame that comes, from a thread of its own.
    pub fn plug(
        plug: &NetPlug,
        receive: impl FnMut(Vec<u8>) + Send + 'static,
    ) -> Result<Attachment, Error> {
        let failed = |source| Error::Network { plug: plug.to_string(), source };
        let ends = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK);
        let ends = Arc::new(ends.map_err(|error| failed(error.into()))?);
        let waits = Waits(Arc::clone(&ends));
        let builder = Builder::new().name("net/receive".into());
        let (sender, thread) = match plug {
            NetPlug::Tap(name) => {
                let file = Arc::new(tap::open(name).map_err(failed)?);
                rustix::io::ioctl_fionbio(&*file, true).map_err(|error| failed(error.into()))?;
                let from = Arc::clone(&file);
                let work = move || from_tap(&from, &waits, receive);
                (Sender::Tap(file), builder.spawn(work))
            }
            NetPlug::Unix(path) => {
                let stream = UnixStream::connect(path).map_err(failed)?;
                let from = stream.try_clone().map_err(failed)?;
                stream.set_nonblocking(true).map_err(failed)?;
                let work = move || from_stream(from, &waits, receive);
                let queue = Arc::new(Mutex::new(Queue { stream, rest: Vec::new() }));
                (Sender::Stream(queue), builder.spawn(work))
            }
        };
        Ok(Attachment { sender, ends, thread: Some(thread.map_err(failed)?) })
    }

    /// What sends frames, for as long as it is plugged in; what the host does not take at once is
    /// dropped.
    pub fn sender(&self) -> impl Fn(&[u8]) + Send + Sync + 'static {
        let sender = self.sender.clone();
        move |frame| match &sender {
            // It takes a frame, or it does not.
            Sender::Tap(file) => drop((&**file).write(frame)),
            Sender::Stream(queue) => {
                queue.lock().unwrap_or_else(PoisonError::into_inner).send(frame);
            }
        }
    }
}

impl Drop for Attachment {
    fn drop(&mut self) {
        // A counter that is full is as readable.
        let _ = rustix::io::write(&*self.ends, &1u64.to_ne_bytes());
        if let Some(thread) = self.thread.take() {
            let _panicked = thread.join();
        }
    }
}

impl Queue {
    fn send(&mut self, frame: &[u8]) {
        if self.rest.len() < QUEUE_MAX {
            self.rest.extend(length(frame));
            self.rest.extend(frame);
        }
        while !self.rest.is_empty() {
            match self.stream.write(&self.rest) {
                Ok(taken) => drop(self.rest.drain(..taken)),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => return,
                // Nobody is there any more.
                Err(_) => return self.rest.clear(),
            }
        }
    }
}

fn length(frame: &[u8]) -> [u8; 4] {
    u32::try_from(frame.len()).unwrap_or(u32::MAX).to_be_bytes()
}

/// Writes a frame to a stream, behind its length.
pub fn write_frame(mut to: impl Write, frame: &[u8]) -> io::Result<()> {
    to.write_all(&[&length(frame)[..], frame].concat())
}

/// Reads a frame from a stream; `None` at its end. One longer than any frame is an error: what
/// follows it cannot be told.
pub fn read_frame(mut from: impl Read) -> io::Result<Option<Vec<u8>>> {
    let mut length = [0; 4];
    match from.read_exact(&mut length) {
        Err(error) if error.kind() == ErrorKind::UnexpectedEof => return Ok(None),
        result => result?,
    }
    let length = u32::from_be_bytes(length) as usize;
    if length > FRAME_MAX {
        let what = format!("a frame of {length} bytes, and {FRAME_MAX} at most");
        return Err(io::Error::new(ErrorKind::InvalidData, what));
    }
    let mut frame = vec![0; length];
    from.read_exact(&mut frame)?;
    Ok(Some(frame))
}

/// What a receiving thread waits for beside frames.
pub(super) struct Waits(pub(super) Arc<OwnedFd>);

impl Waits {
    /// Waits until there is something to read; false when it is to end.
    pub(super) fn wait(&self, from: impl AsFd) -> bool {
        loop {
            let mut fds = [
                PollFd::from_borrowed_fd(from.as_fd(), PollFlags::IN),
                PollFd::from_borrowed_fd(self.0.as_fd(), PollFlags::IN),
            ];
            match poll(&mut fds, None) {
                Ok(_) => return fds[1].revents().is_empty(),
                Err(rustix::io::Errno::INTR) => {}
                Err(_) => return false,
            }
        }
    }
}

fn from_tap(tap: &File, waits: &Waits, mut receive: impl FnMut(Vec<u8>)) {
    let mut buffer = [0; 64 << 10];
    while waits.wait(tap) {
        match (&*tap).read(&mut buffer) {
            Ok(len) => receive(buffer[..len].to_vec()),
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
            Err(_) => return,
        }
    }
}

/// `stream` shares its flags with the sender's end, which does not block.
fn from_stream(stream: UnixStream, waits: &Waits, mut receive: impl FnMut(Vec<u8>)) {
    let mut come = Vec::new();
    let mut buffer = [0; 16 << 10];
    while waits.wait(&stream) {
        match (&stream).read(&mut buffer) {
            Ok(0) => return,
            Ok(len) => come.extend(&buffer[..len]),
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
            Err(_) => return,
        }
        loop {
            let mut rest = &come[..];
            match read_frame(&mut rest) {
                Ok(Some(frame)) => {
                    let taken = come.len() - rest.len();
                    come.drain(..taken);
                    receive(frame);
                }
                Ok(None) => break,
                Err(error) if error.kind() == ErrorKind::UnexpectedEof => break,
                // No frame can be told from the next any more.
                Err(_) => return,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_are_told_apart() {
        let mut bytes = Vec::new();
        write_frame(&mut bytes, &[1; 60]).unwrap();
        write_frame(&mut bytes, &[2; FRAME_MAX]).unwrap();
        let mut rest = &bytes[..];
        assert_eq!(read_frame(&mut rest).unwrap(), Some(vec![1; 60]));
        assert_eq!(read_frame(&mut rest).unwrap(), Some(vec![2; FRAME_MAX]));
        assert_eq!(read_frame(&mut rest).unwrap(), None);
        let error = read_frame(&[0xff; 8][..]).unwrap_err().to_string();
        assert_eq!(error, "a frame of 4294967295 bytes, and 1514 at most");
    }
}
