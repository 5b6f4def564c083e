//! A link that stops in the middle of a device section, until it is told to go on.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{Builder, JoinHandle};
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use whimbrel_wire::{Decoded, MainDecoder, MainOptions};

/// What begins a main channel; others carry no devices.
const MAGIC: &[u8] = b"QEVM";
/// So far behind the first bytes of a section is its middle.
const INTO: usize = 24;
/// Whimbrel's own sections are each told when complete: of those so many pass.
const WHOLE: u32 = 2;

/// The link. Dropped, it is cut.
#[derive(Debug)]
pub(super) struct Link {
    pub(super) address: SocketAddr,
    stalled: Receiver<()>,
    go_on: Sender<()>,
    ending: Arc<AtomicBool>,
    streams: Arc<Mutex<Vec<TcpStream>>>,
    threads: Arc<Mutex<Vec<JoinHandle<()>>>>,
    acceptor: Option<JoinHandle<()>>,
}

impl Link {
    /// Forwards whatever connects to `upstream`.
    pub(super) fn to(upstream: SocketAddr) -> Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let address = listener.local_addr()?;
        let (tell, stalled) = channel();
        let (go_on, told) = channel();
        let ending = Arc::new(AtomicBool::new(false));
        let streams = Arc::new(Mutex::new(Vec::new()));
        let threads = Arc::new(Mutex::new(Vec::new()));
        let accept = {
            let (ending, streams, threads) = (ending.clone(), streams.clone(), threads.clone());
            let told = Arc::new(Mutex::new(told));
            move || {
                while let Ok((near, _)) = listener.accept() {
                    if ending.load(Ordering::Acquire) {
                        return;
                    }
                    let Ok(far) = TcpStream::connect(upstream) else { return };
                    let stall = Stall { tell: tell.clone(), told: told.clone() };
                    forward(&near, &far, stall, &streams, &threads);
                }
            }
        };
        let acceptor = Some(Builder::new().name("link/accept".into()).spawn(accept)?);
        Ok(Self { address, stalled, go_on, ending, streams, threads, acceptor })
    }

    /// Waits until it has stopped.
    pub(super) fn wait_for_stall(&self, limit: Duration) -> Result<()> {
        self.stalled.recv_timeout(limit).context("no device section has passed by")
    }

    /// Has it go on.
    pub(super) fn go_on(&self) -> Result<()> {
        self.go_on.send(()).context("the link is gone")
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        self.ending.store(true, Ordering::Release);
        // Wakes who accepts; whoever is stopped, hears that nobody tells it to go on.
        let _ = TcpStream::connect(self.address);
        let _ = self.go_on.send(());
        for stream in lock(&self.streams).drain(..) {
            // Closed already is as good.
            let _ = stream.shutdown(Shutdown::Both);
        }
        let acceptor = self.acceptor.take().into_iter();
        for thread in acceptor.chain(lock(&self.threads).drain(..)) {
            // Its panic has been printed.
            let _ = thread.join();
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// How a forwarding thread says that it has stopped, and hears that it is to go on.
struct Stall {
    tell: Sender<()>,
    told: Arc<Mutex<Receiver<()>>>,
}

fn forward(
    near: &TcpStream,
    far: &TcpStream,
    stall: Stall,
    streams: &Mutex<Vec<TcpStream>>,
    threads: &Mutex<Vec<JoinHandle<()>>>,
) {
    let all = || Some((near.try_clone().ok()?, far.try_clone().ok()?));
    let (Some(there), Some(back), Some(kept)) = (all(), all(), all()) else { return };
    for stream in [near, far] {
        // Only a delay, where it cannot be had.
        let _ = stream.set_nodelay(true);
    }
    lock(streams).extend([kept.0, kept.1]);
    let spawn = |name: &str, work: Box<dyn FnOnce() + Send>| {
        if let Ok(thread) = Builder::new().name(name.into()).spawn(work) {
            lock(threads).push(thread);
        }
    };
    spawn(
        "link/there",
        Box::new(move || {
            let (mut from, mut to) = there;
            // A side that breaks off has its reasons, and says them.
            let _ = with_stall(&mut from, &mut to, &stall);
            let _ = to.shutdown(Shutdown::Write);
        }),
    );
    spawn(
        "link/back",
        Box::new(move || {
            let (mut to, mut from) = back;
            let _ = std::io::copy(&mut from, &mut to);
            let _ = to.shutdown(Shutdown::Write);
        }),
    );
}

/// Forwards, and stops once where a device section is.
fn with_stall(from: &mut impl Read, to: &mut impl Write, stall: &Stall) -> Result<()> {
    let mut watch = None;
    let mut buffer = vec![0; 256 << 10];
    let mut first = true;
    loop {
        let bytes = match from.read(&mut buffer)? {
            0 => return Ok(()),
            bytes => bytes,
        };
        let mut rest = &buffer[..bytes];
        if std::mem::take(&mut first) && rest.starts_with(MAGIC) {
            watch = Some(Watch::new());
        }
        if let Some(place) = watch.as_mut().and_then(|watch| watch.look(rest).transpose()) {
            let (before, behind) = rest.split_at(place?.min(rest.len()));
            to.write_all(before)?;
            rest = behind;
            watch = None;
            stall.tell.send(())?;
            if lock(&stall.told).recv().is_err() {
                bail!("the link is cut");
            }
        }
        to.write_all(rest)?;
    }
}

/// Reads along, to know what passes.
struct Watch {
    decoder: MainDecoder,
    /// What was not understood yet.
    held: Vec<u8>,
    whole: u32,
}

impl Watch {
    fn new() -> Self {
        Self { decoder: MainDecoder::new(MainOptions::default()), held: Vec::new(), whole: 0 }
    }

    /// Looks at what follows; gives where in it the middle of a device section is.
    fn look(&mut self, bytes: &[u8]) -> Result<Option<usize>> {
        let before = self.held.len();
        self.held.extend_from_slice(bytes);
        let mut at = 0;
        loop {
            let rest = &self.held[at..];
            let payload = self.decoder.payload_left().min(rest.len() as u64);
            if payload > 0 {
                self.decoder.payload_taken(payload);
                at += usize::try_from(payload)?;
                continue;
            }
            if self.decoder.payload_left() > 0 {
                break;
            }
            let (used, decoded) = self.decoder.decode(rest)?;
            at += used;
            match decoded {
                Decoded::NeedMore(_) if used == 0 || at == self.held.len() => break,
                Decoded::DeviceStateBegins => return Ok(Some((at + INTO).saturating_sub(before))),
                Decoded::DeviceSection(_) => {
                    self.whole += 1;
                    if self.whole == WHOLE {
                        return Ok(Some((at + INTO).saturating_sub(before)));
                    }
                }
                _ => {}
            }
        }
        self.held.drain(..at);
        Ok(None)
    }
}

#[cfg(test)]
mod tests {
    use whimbrel_wire::{
        Command, Configuration, DeviceSection, FileHeader, Name, SectionHeader, SectionId,
    };

    use super::*;

    fn stream() -> (Vec<u8>, usize) {
        let mut bytes = Vec::new();
        FileHeader.encode(&mut bytes);
        Configuration::new(Name::new("whimbrel-vm-1").unwrap()).encode(&mut bytes);
        Command::OpenReturnPath.encode(&mut bytes);
        let mut second = 0;
        for id in 1..=3 {
            let name = Name::new("disk").unwrap();
            let header = SectionHeader { id: SectionId(id), name, instance_id: id, version_id: 1 };
            DeviceSection::with_own_length(header, &[7; 100]).encode(&mut bytes);
            if id == 2 {
                second = bytes.len();
            }
        }
        (bytes, second)
    }

    #[test]
    fn it_stops_in_the_middle_of_a_section_however_the_bytes_come() {
        let (bytes, second) = stream();
        for piece in [1, 7, 50, 1000] {
            let mut watch = Watch::new();
            let mut passed = 0;
            let place = bytes.chunks(piece).find_map(|chunk| {
                let found = watch.look(chunk).unwrap();
                let place = found.map(|place| passed + place);
                passed += chunk.len();
                place
            });
            let place = place.unwrap_or_else(|| panic!("pieces of {piece}: nothing was seen"));
            assert!(place >= second, "{piece}: {place} is before {second}");
            assert!(place <= second + INTO, "{piece}: {place} is behind {second}");
        }
    }

    #[test]
    fn everything_arrives_in_the_end() {
        let there = TcpListener::bind("127.0.0.1:0").unwrap();
        let link = Link::to(there.local_addr().unwrap()).unwrap();
        let mut near = TcpStream::connect(link.address).unwrap();
        let (mut far, _) = there.accept().unwrap();
        let (bytes, second) = stream();
        near.write_all(&bytes).unwrap();
        near.shutdown(Shutdown::Write).unwrap();
        link.wait_for_stall(Duration::from_secs(10)).unwrap();
        let mut came = vec![0; second];
        far.read_exact(&mut came).unwrap();
        far.set_read_timeout(Some(Duration::from_millis(50))).unwrap();
        let mut more = vec![0; bytes.len()];
        let some = far.read(&mut more).unwrap();
        assert!(some <= INTO, "{some} bytes passed");
        assert!(far.read(&mut more).is_err(), "it goes on untold");
        link.go_on().unwrap();
        far.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        let mut rest = Vec::new();
        far.read_to_end(&mut rest).unwrap();
        assert_eq!(second + some + rest.len(), bytes.len());
    }
}
