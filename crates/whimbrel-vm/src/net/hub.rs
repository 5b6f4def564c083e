//! A network of VMs that are plugged in by stream sockets, and a client among them.

use std::fmt;
use std::io;
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{Builder, JoinHandle};
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, eventfd};

use super::attachment::Waits;
use super::{Client, ClientError, read_frame, write_frame};

/// A VM that takes no frames for so long is unplugged.
const STUCK: Duration = Duration::from_millis(200);
/// How often it is looked whether the time is up.
const LOOK: Duration = Duration::from_millis(10);

/// A hub: what is sent on it comes to every VM, and what they send to whoever has the hub.
pub struct Hub {
    begun: Instant,
    frames: Receiver<Vec<u8>>,
    ports: Ports,
    ends: Arc<OwnedFd>,
    accepting: Option<JoinHandle<()>>,
}

type Ports = Arc<Mutex<Vec<Port>>>;

/// A VM's end.
#[derive(Debug)]
struct Port {
    stream: UnixStream,
    reading: JoinHandle<()>,
}

impl Hub {
    /// A hub that VMs are plugged into by `unix:PATH`.
    pub fn bind(path: &Path) -> io::Result<Hub> {
        let listener = UnixListener::bind(path)?;
        let ends = Arc::new(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?);
        let (ports, waits) = (Ports::default(), Waits(Arc::clone(&ends)));
        let (sender, frames) = mpsc::channel();
        let accepting = {
            let ports = Arc::clone(&ports);
            Builder::new().name("net/hub".into()).spawn(move || {
                while waits.wait(&listener) {
                    // A VM that cannot be taken in finds its connection closed.
                    if let Ok(port) =
                        listener.accept().and_then(|(stream, _)| Port::open(stream, sender.clone()))
                    {
                        lock(&ports).push(port);
                    }
                }
            })?
        };
        Ok(Hub { begun: Instant::now(), frames, ports, ends, accepting: Some(accepting) })
    }

    /// Sends a frame to every VM.
    pub fn send(&self, frame: &[u8]) {
        // Where it cannot be sent nobody is any more.
        let gone: Vec<Port> = {
            let mut ports = lock(&self.ports);
            let gone = |port: &mut Port| write_frame(&port.stream, frame).is_err();
            ports.extract_if(.., gone).collect()
        };
        gone.into_iter().for_each(Port::close);
    }

    /// The next frame that a VM has sent, if one comes within `limit`.
    pub fn next(&self, limit: Duration) -> Option<Vec<u8>> {
        self.frames.recv_timeout(limit).ok()
    }

    /// The time as a [`Client`] on this hub is told it.
    pub fn now(&self) -> Duration {
        self.begun.elapsed()
    }

    /// Has `client` talk to the guest until `done` says so, for `limit` at most; says whether it did.
    pub fn serve(
        &self,
        client: &mut Client,
        limit: Duration,
        mut done: impl FnMut(&Client) -> bool,
    ) -> Result<bool, ClientError> {
        let until = self.now() + limit;
        loop {
            client.poll(self.now())?.iter().for_each(|frame| self.send(frame));
            if done(client) {
                return Ok(true);
            }
            let now = self.now();
            if now >= until {
                return Ok(false);
            }
            let wait = client.wait(now).unwrap_or(LOOK).min(LOOK).min(until - now);
            let mut frame = self.next(wait);
            while let Some(next) = frame {
                client.receive(next);
                frame = self.frames.try_recv().ok();
            }
        }
    }
}

impl Port {
    fn open(stream: UnixStream, to: Sender<Vec<u8>>) -> io::Result<Port> {
        stream.set_write_timeout(Some(STUCK))?;
        let from = stream.try_clone()?;
        let reading = Builder::new().name("net/port".into()).spawn(move || {
            while let Ok(Some(frame)) = read_frame(&from) {
                if to.send(frame).is_err() {
                    return; // The hub is going.
                }
            }
        })?;
        Ok(Port { stream, reading })
    }

    fn close(self) {
        // Gone already is as good.
        let _ = self.stream.shutdown(Shutdown::Both);
        let _panicked = self.reading.join();
    }
}

impl Drop for Hub {
    fn drop(&mut self) {
        let _ = rustix::io::write(&*self.ends, &1u64.to_ne_bytes());
        if let Some(accepting) = self.accepting.take() {
            let _panicked = accepting.join();
        }
        std::mem::take(&mut *lock(&self.ports)).into_iter().for_each(Port::close);
    }
}

fn lock(ports: &Ports) -> MutexGuard<'_, Vec<Port>> {
    // Whole after every statement.
    ports.lock().unwrap_or_else(PoisonError::into_inner)
}

impl fmt::Debug for Hub {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Hub").field("ports", &lock(&self.ports).len()).finish_non_exhaustive()
    }
}
