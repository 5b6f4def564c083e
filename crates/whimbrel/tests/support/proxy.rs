//! A link that fails on demand: it forwards a migration, reads along to know in what phase it is,
//! and breaks at the byte asked for.

use std::fmt;
use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::thread::{Builder, JoinHandle};
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use whimbrel::Address;
use whimbrel_wire::{
    Command, Decoded, MainDecoder, MainOptions, RamRecord, ReturnDecoded, ReturnDecoder,
    ReturnMessage, TargetPage,
};

/// The PING behind the last device, whose PONG lets the source give up its right.
const PING_LOADED: u32 = 0x4c4f_4144;

/// Where in a migration a byte lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Phase {
    /// Header, configuration, return path, block list.
    Setup,
    /// RAM, for the first time.
    FirstPass,
    /// RAM, again.
    LaterPass,
    /// The last RAM.
    End,
    /// Device sections.
    Devices,
    /// The PING behind them.
    Ping,
    /// The end mark.
    Eof,
    /// The description behind it.
    Description,
    /// The way back: the first PONG.
    Answers,
    /// The way back: the PONG that says that all is loaded.
    PongLoaded,
    /// The way back: the last word.
    Shut,
}

impl Phase {
    pub(crate) const ALL: [Phase; 11] = [
        Phase::Setup,
        Phase::FirstPass,
        Phase::LaterPass,
        Phase::End,
        Phase::Devices,
        Phase::Ping,
        Phase::Eof,
        Phase::Description,
        Phase::Answers,
        Phase::PongLoaded,
        Phase::Shut,
    ];

    fn is_back(self) -> bool {
        self >= Phase::Answers
    }
}

/// How the link fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Failure {
    /// Both ends see a reset, and what is in flight is lost (on Unix sockets: they see the end).
    Reset,
    /// Both ends see the end of the stream, behind what was in flight.
    Close,
    /// The receiver of the cut direction sees its end; the other direction goes on.
    HalfClose,
    /// Nothing moves any more, and nobody is told.
    Freeze,
}

/// Where and how the link fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Cut {
    /// Not before this phase, in whose direction ...
    pub phase: Phase,
    /// ... so many bytes are forwarded from the phase's beginning on.
    pub bytes: u64,
    pub failure: Failure,
}

impl fmt::Display for Cut {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} {} bytes into {:?}", self.failure, self.bytes, self.phase)
    }
}

/// What has been forwarded completely, and so may have arrived.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Seen {
    pub pong_loaded: bool,
    pub eof: bool,
    pub shut: bool,
    /// The link has failed as asked.
    pub cut: bool,
}

/// A forwarding link. Dropping it closes both ends, joins its thread and frees its address.
pub(crate) struct Proxy {
    pub address: Address,
    seen: Arc<Mutex<Seen>>,
    stop: Arc<rustix::fd::OwnedFd>,
    thread: Option<JoinHandle<()>>,
    socket: Option<PathBuf>,
}

impl Proxy {
    /// Listens on TCP, or on `socket`, for the one connection that it forwards to `upstream`.
    pub(crate) fn start(upstream: Address, socket: Option<PathBuf>, cut: Option<Cut>) -> Proxy {
        let seen = Arc::new(Mutex::new(Seen::default()));
        let stop = Arc::new(eventfd(0, EventfdFlags::CLOEXEC).expect("an eventfd"));
        let (listener, address) = match &socket {
            None => {
                let listener = TcpListener::bind(("127.0.0.1", 0)).expect("a port");
                let port = listener.local_addr().expect("its address").port();
                (Listening::Tcp(listener), Address::Tcp { host: "127.0.0.1".into(), port })
            }
            Some(path) => {
                let listener = UnixListener::bind(path).expect("the proxy's socket");
                (Listening::Unix(listener), Address::Unix(path.clone()))
            }
        };
        let link = Link { seen: seen.clone(), stop: stop.clone(), cut };
        let work = move || link.run(listener, &upstream);
        let thread = Builder::new().name("proxy".into()).spawn(work).expect("a thread");
        Proxy { address, seen, stop, thread: Some(thread), socket }
    }

    pub(crate) fn seen(&self) -> Seen {
        *self.seen.lock().expect("no panic in the proxy")
    }

    /// Ends the link, and says all that it has seen: what has passed is noted after it has.
    pub(crate) fn end(self) -> Seen {
        let seen = self.seen.clone();
        drop(self);
        *seen.lock().expect("no panic in the proxy")
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        rustix::io::write(&*self.stop, &1u64.to_ne_bytes()).expect("an eventfd takes 1");
        let thread = self.thread.take().expect("joined once");
        let ended = thread.join();
        if let Some(path) = &self.socket {
            std::fs::remove_file(path).expect("the proxy's own socket");
        }
        assert!(ended.is_ok() || std::thread::panicking(), "the proxy panicked");
    }
}

enum Listening {
    Tcp(TcpListener),
    Unix(UnixListener),
}

enum End {
    Tcp(TcpStream),
    Unix(UnixStream),
}

impl End {
    fn fd(&self) -> BorrowedFd<'_> {
        match self {
            End::Tcp(stream) => stream.as_fd(),
            End::Unix(stream) => stream.as_fd(),
        }
    }

    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        match self {
            End::Tcp(stream) => stream.read(buffer),
            End::Unix(stream) => stream.read(buffer),
        }
    }

    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        match self {
            End::Tcp(stream) => stream.write(bytes),
            End::Unix(stream) => stream.write(bytes),
        }
    }

    fn shutdown(&self, how: Shutdown) {
        // An end that has gone is as good.
        let _ = match self {
            End::Tcp(stream) => stream.shutdown(how),
            End::Unix(stream) => stream.shutdown(how),
        };
    }

    /// What is in flight to this end is dropped when it is closed, and it is told so.
    fn reset_on_close(&self) {
        if let End::Tcp(stream) = self {
            rustix::net::sockopt::set_socket_linger(stream, Some(Duration::ZERO)).expect("linger");
        }
    }
}

/// The proxy's thread.
struct Link {
    seen: Arc<Mutex<Seen>>,
    stop: Arc<rustix::fd::OwnedFd>,
    cut: Option<Cut>,
}

/// The thread is told to end.
struct Stopped;

impl Link {
    fn run(self, listener: Listening, upstream: &Address) {
        let Ok([source, destination]) = self.connect(listener, upstream) else { return };
        // Stopped in the middle of it: both ends are closed, which is what was asked for.
        let _stopped = self.forward(source, destination);
    }

    fn connect(&self, listener: Listening, upstream: &Address) -> Result<[End; 2], Stopped> {
        let fd = match &listener {
            Listening::Tcp(listener) => listener.as_fd(),
            Listening::Unix(listener) => listener.as_fd(),
        };
        self.wait([(fd, PollFlags::IN)])?;
        let source = match &listener {
            Listening::Tcp(listener) => End::Tcp(listener.accept().expect("a source").0),
            Listening::Unix(listener) => End::Unix(listener.accept().expect("a source").0),
        };
        let destination = match upstream {
            Address::Tcp { host, port } => {
                End::Tcp(TcpStream::connect((host.as_str(), *port)).expect("a destination"))
            }
            Address::Unix(path) => End::Unix(UnixStream::connect(path).expect("a destination")),
            other => panic!("the proxy cannot forward to {other}"),
        };
        for end in [&source, &destination] {
            rustix::io::ioctl_fionbio(end.fd(), true).expect("non-blocking");
        }
        Ok([source, destination])
    }

    /// Waits until something is ready, or for the thread's end; says which of `fds` are.
    fn wait<const N: usize>(
        &self,
        fds: [(BorrowedFd<'_>, PollFlags); N],
    ) -> Result<[bool; N], Stopped> {
        let mut all = vec![PollFd::from_borrowed_fd(self.stop.as_fd(), PollFlags::IN)];
        all.extend(fds.iter().map(|&(fd, what)| PollFd::from_borrowed_fd(fd, what)));
        loop {
            match poll(&mut all, None::<&Timespec>) {
                Ok(_) => break,
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => panic!("poll: {error}"),
            }
        }
        if !all[0].revents().is_empty() {
            return Err(Stopped);
        }
        Ok(std::array::from_fn(|at| !all[1 + at].revents().is_empty()))
    }

    fn forward(&self, mut source: End, mut destination: End) -> Result<(), Stopped> {
        let mut forth = Reader::new(MainDecoder::new(MainOptions::default()));
        let mut back = BackReader::default();
        let (mut forth_open, mut back_open) = (true, true);
        let mut buffer = vec![0; 64 << 10];
        while forth_open || back_open {
            // A direction that has ended is not listened to, or its end would be told again and
            // again: its other end stands in for it.
            let from = if forth_open { &source } else { &destination };
            let back_from = if back_open { &destination } else { &source };
            let [from_source, from_destination] =
                self.wait([(from.fd(), PollFlags::IN), (back_from.fd(), PollFlags::IN)])?;
            if forth_open && from_source {
                let bytes = source.read(&mut buffer).unwrap_or(0);
                let cut = forth.take(&buffer[..bytes], self.cut);
                let pass = cut.unwrap_or(bytes);
                self.pass(&buffer[..pass], &mut destination, &mut back_open)?;
                self.note(|seen| seen.eof |= forth.passed_eof(bytes - pass));
                if cut.is_some() {
                    return self.fail(source, destination, false);
                }
                if bytes == 0 {
                    forth_open = false;
                    destination.shutdown(Shutdown::Write);
                }
            }
            if back_open && from_destination {
                let bytes = destination.read(&mut buffer).unwrap_or(0);
                let cut = back.take(&buffer[..bytes], self.cut);
                let pass = cut.unwrap_or(bytes);
                self.pass(&buffer[..pass], &mut source, &mut forth_open)?;
                self.note(|seen| {
                    seen.pong_loaded |= back.passed(back.pong_end, bytes - pass);
                    seen.shut |= back.passed(back.shut_end, bytes - pass);
                });
                if cut.is_some() {
                    return self.fail(source, destination, true);
                }
                if bytes == 0 {
                    back_open = false;
                    source.shutdown(Shutdown::Write);
                }
            }
        }
        Ok(())
    }

    /// Hands bytes on. An end that has gone takes none: nothing more comes from there either.
    fn pass(&self, mut bytes: &[u8], to: &mut End, open: &mut bool) -> Result<(), Stopped> {
        while !bytes.is_empty() {
            match to.write(bytes) {
                Ok(count) => bytes = &bytes[count..],
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    self.wait([(to.fd(), PollFlags::OUT)])?;
                }
                Err(_) => {
                    *open = false;
                    return Ok(());
                }
            }
        }
        Ok(())
    }

    fn note(&self, change: impl FnOnce(&mut Seen)) {
        change(&mut self.seen.lock().expect("no panic in the test"));
    }

    fn fail(&self, source: End, destination: End, back: bool) -> Result<(), Stopped> {
        let cut = self.cut.expect("it fails as asked");
        match cut.failure {
            Failure::Reset => {
                source.reset_on_close();
                destination.reset_on_close();
                drop((source, destination));
                self.note(|seen| seen.cut = true);
                Ok(())
            }
            Failure::Close => {
                drop_gently(source);
                drop_gently(destination);
                self.note(|seen| seen.cut = true);
                Ok(())
            }
            Failure::Freeze => {
                self.note(|seen| seen.cut = true);
                self.wait([]).map(|[]| ())
            }
            Failure::HalfClose => {
                let (mut from, mut to) =
                    if back { (destination, source) } else { (source, destination) };
                to.shutdown(Shutdown::Write);
                self.note(|seen| seen.cut = true);
                self.other_direction(&mut from, &mut to)
            }
        }
    }

    /// One direction is cut; the other goes on, from `to` back to `from`.
    fn other_direction(&self, from: &mut End, to: &mut End) -> Result<(), Stopped> {
        let mut buffer = [0; 4096];
        let mut open = true;
        while open {
            self.wait([(to.fd(), PollFlags::IN)])?;
            let bytes = to.read(&mut buffer).unwrap_or(0);
            self.pass(&buffer[..bytes], from, &mut open)?;
            open &= bytes > 0;
        }
        from.shutdown(Shutdown::Both);
        Ok(())
    }
}

/// Closes so that the other side sees the end, not a reset, although it may still be sending.
fn drop_gently(mut end: End) {
    end.shutdown(Shutdown::Write);
    let mut rest = [0; 4096];
    let until = Instant::now() + Duration::from_millis(50);
    while Instant::now() < until {
        match end.read(&mut rest) {
            Ok(0) => break,
            Ok(_) => {}
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                std::thread::sleep(Duration::from_millis(1));
            }
            Err(_) => break,
        }
    }
}

/// Reads along what the source says.
struct Reader {
    decoder: MainDecoder,
    held: Vec<u8>,
    /// Bytes of a page or delta that are still to come, and are nothing to read.
    payload: u64,
    /// Where the bytes begin that the reader has not looked at, in the stream.
    at: u64,
    /// All bytes that have come.
    total: u64,
    /// Where each phase begins, as far as it has come to that.
    begins: Vec<(Phase, u64)>,
    highest: Option<(usize, u64)>,
    eof_end: Option<u64>,
    /// Past what it can read, which is where nothing is to be cut by phase.
    blind: bool,
}

impl Reader {
    fn new(decoder: MainDecoder) -> Reader {
        Reader {
            decoder,
            held: Vec::new(),
            payload: 0,
            at: 0,
            total: 0,
            begins: vec![(Phase::Setup, 0)],
            highest: None,
            eof_end: None,
            blind: false,
        }
    }

    fn enter(&mut self, phase: Phase, at: u64) {
        if self.begins.iter().all(|(known, _)| *known < phase) {
            self.begins.push((phase, at));
        }
    }

    /// Takes bytes in; gives how many of them to forward if the cut is among them.
    fn take(&mut self, bytes: &[u8], cut: Option<Cut>) -> Option<usize> {
        let before = self.total;
        self.total += bytes.len() as u64;
        self.held.extend_from_slice(bytes);
        while self.step() {}
        cut_at(&self.begins, before, self.total, cut.filter(|cut| !cut.phase.is_back()))
    }

    fn passed_eof(&self, kept_back: usize) -> bool {
        self.eof_end.is_some_and(|end| end <= self.total - kept_back as u64)
    }

    /// Reads one thing; false when there is too little for it.
    fn step(&mut self) -> bool {
        if self.blind || self.held.is_empty() {
            self.held.clear();
            return false;
        }
        if self.payload > 0 {
            let here = self.held.len().min(usize::try_from(self.payload).expect("a page"));
            self.held.drain(..here);
            self.at += here as u64;
            self.payload -= here as u64;
            self.decoder.payload_taken(here as u64);
            return true;
        }
        let start = self.at;
        let Ok((used, decoded)) = self.decoder.decode(&self.held) else {
            self.blind = true;
            return false;
        };
        self.held.drain(..used);
        self.at += used as u64;
        match decoded {
            Decoded::NeedMore(_) => return used > 0,
            Decoded::SectionPart(_) => self.enter(Phase::FirstPass, start),
            Decoded::SectionEnd(_) => self.enter(Phase::End, start),
            Decoded::DeviceSection(_) => self.enter(Phase::Devices, start),
            Decoded::Command(Command::Ping(PING_LOADED)) => self.enter(Phase::Ping, start),
            Decoded::Eof => {
                self.enter(Phase::Eof, start);
                self.enter(Phase::Description, self.at);
                self.eof_end = Some(self.at);
            }
            Decoded::Ram(record) => self.record(record, start),
            _ => {}
        }
        true
    }

    fn record(&mut self, record: RamRecord, start: u64) {
        let place = match record {
            RamRecord::PageFollows { block, offset, .. } => {
                self.payload = 4096;
                (block.get(), offset.0)
            }
            RamRecord::XbzrleFollows { block, offset, len } => {
                self.payload = len as u64;
                (block.get(), offset.0)
            }
            RamRecord::Zero { block, offset } => (block.get(), offset.0),
            RamRecord::EndOfSection | RamRecord::MultifdFlush => return,
        };
        if self.highest.is_some_and(|highest| place <= highest) {
            self.enter(Phase::LaterPass, start);
        } else {
            self.highest = Some(place);
        }
    }
}

/// Reads along what the destination says.
struct BackReader {
    decoder: ReturnDecoder,
    held: Vec<u8>,
    at: u64,
    total: u64,
    begins: Vec<(Phase, u64)>,
    pong_end: Option<u64>,
    shut_end: Option<u64>,
}

impl Default for BackReader {
    fn default() -> BackReader {
        BackReader {
            decoder: ReturnDecoder::new(TargetPage::FOUR_KIB),
            held: Vec::new(),
            at: 0,
            total: 0,
            begins: vec![(Phase::Answers, 0)],
            pong_end: None,
            shut_end: None,
        }
    }
}

impl BackReader {
    fn take(&mut self, bytes: &[u8], cut: Option<Cut>) -> Option<usize> {
        let before = self.total;
        self.total += bytes.len() as u64;
        self.held.extend_from_slice(bytes);
        loop {
            let start = self.at;
            let (used, decoded) = self.decoder.decode(&self.held).expect("our own destination's");
            self.held.drain(..used);
            self.at += used as u64;
            match decoded {
                ReturnDecoded::Message(ReturnMessage::Pong(PING_LOADED)) => {
                    self.begins.push((Phase::PongLoaded, start));
                    self.pong_end = Some(self.at);
                }
                ReturnDecoded::Message(ReturnMessage::Shut(_)) => {
                    self.begins.push((Phase::Shut, start));
                    self.shut_end = Some(self.at);
                }
                ReturnDecoded::NeedMore(_) => break,
                _ => {}
            }
        }
        cut_at(&self.begins, before, self.total, cut.filter(|cut| cut.phase.is_back()))
    }

    fn passed(&self, end: Option<u64>, kept_back: usize) -> bool {
        end.is_some_and(|end| end <= self.total - kept_back as u64)
    }
}

/// How many of the bytes `from..to` of a direction are forwarded before `cut`, if it is reached.
/// The cut is so far into its phase, or where a later one shows that there was none.
fn cut_at(begins: &[(Phase, u64)], from: u64, to: u64, cut: Option<Cut>) -> Option<usize> {
    let cut = cut?;
    let (_, begin) = begins.iter().find(|(phase, _)| *phase >= cut.phase)?;
    let at = (begin + cut.bytes).max(from);
    (at < to).then(|| usize::try_from(at - from).expect("within a buffer"))
}
