//! A way between two hosts, with as many connections as they make, that fails at a byte of one.

#![allow(
    dead_code,
    clippy::allow_attributes,
    reason = "each test binary uses the part it needs of what they share"
)]

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{Builder, JoinHandle, sleep};
use std::time::Duration;

use whimbrel::Address;
use whimbrel_wire::{Command, Decoded, MainDecoder, MainOptions};

/// Where the way fails: after so many bytes ...
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    /// ... of the main channel.
    Main(u64),
    /// ... of the main channel, from the command before the package on.
    Package(u64),
    /// ... of the main channel, from RUN's last byte on.
    Rest(u64),
    /// ... of a multifd channel, the first of which connects behind the main one.
    Multifd(u8, u64),
    /// ... of the urgent channel.
    Urgent(u64),
    /// ... of the return path.
    Answers(u64),
}

/// How it fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Failure {
    /// All connections end, behind what was forwarded.
    All,
    /// One ends.
    One,
    /// Nothing moves any more, and nobody is told.
    Freeze,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Cut {
    pub place: Place,
    pub failure: Failure,
}

/// What has been forwarded, or is about to be.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Seen {
    /// All of RUN.
    pub run: bool,
    /// The way has failed as asked.
    pub cut: bool,
}

/// What a connection is: sources connect in this order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Main,
    Multifd(u8),
    Urgent,
}

#[derive(Debug)]
struct Shared {
    cut: Cut,
    /// How many multifd channels there are.
    channels: u8,
    seen: Mutex<Seen>,
    ends: Mutex<Vec<[TcpStream; 2]>>,
    frozen: AtomicBool,
    stop: AtomicBool,
}

/// Dropping it closes all connections and joins its threads.
pub(crate) struct Ways {
    pub address: Address,
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl Ways {
    /// A way to `upstream`, for a migration with so many multifd channels.
    pub(crate) fn start(upstream: &Address, channels: u8, cut: Cut) -> Ways {
        let Address::Tcp { host, port } = upstream else { panic!("{upstream} is not TCP") };
        let upstream = (host.clone(), *port);
        let listener = TcpListener::bind(("127.0.0.1", 0)).expect("a port");
        listener.set_nonblocking(true).expect("non-blocking");
        let port = listener.local_addr().expect("its address").port();
        let shared = Arc::new(Shared {
            cut,
            channels,
            seen: Mutex::default(),
            ends: Mutex::default(),
            frozen: AtomicBool::new(false),
            stop: AtomicBool::new(false),
        });
        let inner = shared.clone();
        let work = move || inner.accept(&listener, &upstream);
        let thread = Builder::new().name("proxy".into()).spawn(work).expect("a thread");
        let address = Address::Tcp { host: "127.0.0.1".into(), port };
        Ways { address, shared, thread: Some(thread) }
    }

    pub(crate) fn seen(&self) -> Seen {
        *self.shared.seen.lock().expect("no panic in the proxy")
    }
}

impl Drop for Ways {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        if let Some(thread) = self.thread.take() {
            thread.join().expect("no panic in the proxy");
        }
    }
}

impl Shared {
    fn accept(self: &Arc<Self>, listener: &TcpListener, upstream: &(String, u16)) {
        let mut pumps = Vec::new();
        while !self.stop.load(Ordering::SeqCst) {
            let source = match listener.accept() {
                Ok((source, _)) => source,
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    sleep(Duration::from_millis(1));
                    continue;
                }
                Err(error) => panic!("accept: {error}"),
            };
            source.set_nonblocking(false).expect("blocking");
            // A destination that has failed already listens no more.
            let Ok(there) = TcpStream::connect((upstream.0.as_str(), upstream.1)) else { continue };
            let clone = |stream: &TcpStream| stream.try_clone().expect("a descriptor");
            let mut ends = self.ends.lock().expect("no panic in the proxy");
            let kind = match u8::try_from(ends.len()).expect("few connections") {
                0 => Kind::Main,
                number if number <= self.channels => Kind::Multifd(number - 1),
                _ => Kind::Urgent,
            };
            ends.push([clone(&source), clone(&there)]);
            drop(ends);
            let forth = (clone(&source), clone(&there));
            let (me, you) = (self.clone(), self.clone());
            let pump = |work: Box<dyn FnOnce() + Send>| {
                Builder::new().name("proxy".into()).spawn(work).expect("a thread")
            };
            pumps.push(pump(Box::new(move || me.pump(forth.0, forth.1, kind, true))));
            pumps.push(pump(Box::new(move || you.pump(there, source, kind, false))));
        }
        self.end_all();
        pumps.into_iter().for_each(|pump| pump.join().expect("no panic in the proxy"));
        self.ends.lock().expect("no panic in the proxy").clear();
    }

    fn end_all(&self) {
        for end in self.ends.lock().expect("no panic in the proxy").iter().flatten() {
            // Ended already is as good.
            let _ = end.shutdown(Shutdown::Both);
        }
    }

    fn pump(&self, mut from: TcpStream, mut to: TcpStream, kind: Kind, forth: bool) {
        let mut reader = (kind == Kind::Main && forth).then(Reader::default);
        let (mut total, mut buffer) = (0u64, vec![0; 16 << 10]);
        loop {
            let bytes = from.read(&mut buffer).unwrap_or(0);
            if self.frozen.load(Ordering::SeqCst) {
                return;
            }
            if bytes == 0 {
                let _ = to.shutdown(Shutdown::Write);
                return;
            }
            if let Some(reader) = &mut reader {
                reader.take(&buffer[..bytes]);
            }
            let run = reader.as_ref().and_then(|reader| reader.run_end);
            let package = reader.as_ref().and_then(|reader| reader.package_start);
            let at = match (self.cut.place, kind, forth) {
                (Place::Multifd(number, at), Kind::Multifd(this), true) if number == this => {
                    Some(at)
                }
                (Place::Main(at), Kind::Main, true)
                | (Place::Urgent(at), Kind::Urgent, true)
                | (Place::Answers(at), Kind::Main, false) => Some(at),
                (Place::Package(at), Kind::Main, true) => package.map(|start| start + at),
                (Place::Rest(at), Kind::Main, true) => run.map(|end| end + at),
                _ => None,
            };
            let left = at.map(|at| at.saturating_sub(total));
            let cut = left.filter(|left| *left < bytes as u64);
            let pass = cut.map_or(bytes, |left| usize::try_from(left).expect("in a buffer"));
            let whole = run.is_some_and(|end| end <= total + pass as u64);
            self.note(|seen| seen.run |= whole);
            let passed = to.write_all(&buffer[..pass]).is_ok();
            total += pass as u64;
            if cut.is_some() {
                self.fail(&from, &to);
                return;
            }
            if !passed {
                let _ = from.shutdown(Shutdown::Both);
                return;
            }
        }
    }

    fn note(&self, change: impl FnOnce(&mut Seen)) {
        change(&mut self.seen.lock().expect("no panic in the proxy"));
    }

    fn fail(&self, from: &TcpStream, to: &TcpStream) {
        match self.cut.failure {
            Failure::All => self.end_all(),
            Failure::One => {
                let _ = (from.shutdown(Shutdown::Both), to.shutdown(Shutdown::Both));
            }
            Failure::Freeze => self.frozen.store(true, Ordering::SeqCst),
        }
        self.note(|seen| seen.cut = true);
    }
}

/// Reads along what the source says, up to the package.
struct Reader {
    decoder: MainDecoder,
    held: Vec<u8>,
    at: u64,
    package_start: Option<u64>,
    run_end: Option<u64>,
}

impl Default for Reader {
    fn default() -> Reader {
        let decoder = MainDecoder::new(MainOptions::default());
        Reader { decoder, held: Vec::new(), at: 0, package_start: None, run_end: None }
    }
}

impl Reader {
    fn take(&mut self, bytes: &[u8]) {
        if self.run_end.is_some() {
            return;
        }
        self.held.extend_from_slice(bytes);
        while self.run_end.is_none() {
            let payload = usize::try_from(self.decoder.payload_left()).expect("a page");
            if payload > self.held.len() {
                return;
            }
            self.held.drain(..payload);
            self.at += payload as u64;
            if payload > 0 {
                self.decoder.payload_taken(payload as u64);
            }
            let start = self.at;
            let (used, decoded) = self.decoder.decode(&self.held).expect("our own source's");
            self.held.drain(..used);
            self.at += used as u64;
            match decoded {
                Decoded::NeedMore(_) if used == 0 || self.held.is_empty() => return,
                Decoded::Command(Command::RamDiscard(_)) => {
                    self.package_start.get_or_insert(start);
                }
                Decoded::PackageFollows { len } => self.run_end = Some(self.at + u64::from(len)),
                _ => {}
            }
        }
    }
}
