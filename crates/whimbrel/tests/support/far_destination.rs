//! A destination that does what a test tells it to: a socket, and no manners.

#![allow(
    dead_code,
    clippy::allow_attributes,
    reason = "each test binary uses the part it needs of what they share"
)]

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::time::Duration;

use whimbrel::Address;
use whimbrel_wire::{
    BlockList, BlockOffset, Command, Decoded, MainDecoder, MainOptions, Name, RamRecord,
    RecordDecoded, RecordDecoder, RecordFormat, ReturnMessage, TargetPage,
};

/// What two whimbrels agree on, as a PONG: nothing.
pub(crate) const AGREED: u32 = 0x5749_0000;
/// The package is loaded, and that is said, before RUN has come.
pub(crate) const RUN_APART: u32 = 2;
/// Multifd channels go on behind the guest.
pub(crate) const MULTIFD_GOES_ON: u32 = 4;
const QUESTION: u32 = 0x5748_0000;

const PAGE: usize = 4096;

/// A page of a block, by the block's name and the page's offset.
pub(crate) type Place = (String, u64);

/// Pages, with how often each came and its last content.
#[derive(Debug, Default)]
pub(crate) struct Came(pub BTreeMap<Place, (u32, Vec<u8>)>);

impl Came {
    fn page(&mut self, blocks: &BlockList, record: RamRecord, content: Vec<u8>) {
        let (RamRecord::PageFollows { block, offset, .. } | RamRecord::Zero { block, offset }) =
            record
        else {
            return;
        };
        let name = blocks.get(block).expect("announced").name.to_string();
        let entry = self.0.entry((name, offset.0)).or_default();
        entry.0 += 1;
        entry.1 = content;
    }
}

pub(crate) struct FarDestination {
    listener: TcpListener,
    pub address: Address,
}

/// The main channel and its way back.
pub(crate) struct Main {
    pub stream: TcpStream,
    decoder: MainDecoder,
    held: Vec<u8>,
    /// What it answers to a whimbrel's question; `None` is an echo, as QEMU's.
    pub agreed: Option<u32>,
    pub came: Came,
    /// Marks at which the multifd channels end a round, so far.
    pub marks: usize,
}

impl FarDestination {
    pub(crate) fn listen() -> FarDestination {
        let listener = TcpListener::bind(("127.0.0.1", 0)).expect("a port");
        let port = listener.local_addr().expect("its address").port();
        FarDestination { listener, address: Address::Tcp { host: "127.0.0.1".into(), port } }
    }

    pub(crate) fn accept(&self) -> TcpStream {
        let stream = self.listener.accept().expect("a source").0;
        // Nothing in these tests takes longer.
        stream.set_read_timeout(Some(Duration::from_secs(30))).expect("a timeout");
        stream
    }

    pub(crate) fn main(&self, agreed: Option<u32>) -> Main {
        let decoder = MainDecoder::new(MainOptions::default());
        let (stream, held) = (self.accept(), Vec::new());
        Main { stream, decoder, held, agreed, came: Came::default(), marks: 0 }
    }
}

impl Main {
    /// Reads once; false at the end.
    fn fill(&mut self) -> bool {
        let mut buffer = [0; 64 << 10];
        let bytes = self.stream.read(&mut buffer).expect("the source goes on");
        self.held.extend_from_slice(&buffer[..bytes]);
        bytes > 0
    }

    /// Reads what has come and answers what is asked in it: for a stream with a short time limit,
    /// which may have ended.
    pub(crate) fn answer_what_is_there(&mut self) {
        let mut buffer = [0; 4096];
        if let Ok(bytes) = self.stream.read(&mut buffer) {
            self.held.extend_from_slice(&buffer[..bytes]);
        }
        while let Ok((used, decoded)) = self.decoder.decode(&self.held) {
            self.held.drain(..used);
            match decoded {
                Decoded::Command(Command::Ping(value)) => {
                    // A source that has gone takes no answer.
                    let _ = self.say(&ReturnMessage::Pong(value));
                }
                Decoded::Ram(RamRecord::MultifdFlush) => self.marks += 1,
                Decoded::NeedMore(_) if used == 0 => return,
                _ => {}
            }
        }
    }

    fn take(&mut self, len: usize) -> Vec<u8> {
        while self.held.len() < len {
            assert!(self.fill(), "the source ends where {len} bytes have to come");
        }
        self.held.drain(..len).collect()
    }

    /// What the source says next; `None` at the end of its stream. PINGs are answered, and pages
    /// kept.
    pub(crate) fn next(&mut self) -> Option<Decoded> {
        loop {
            let (used, decoded) = self.decoder.decode(&self.held).expect("our own source's");
            self.held.drain(..used);
            match &decoded {
                Decoded::NeedMore(_) if used > 0 && !self.held.is_empty() => {}
                Decoded::NeedMore(_) => {
                    if !self.fill() {
                        return None;
                    }
                }
                Decoded::Ram(record @ RamRecord::PageFollows { .. }) => {
                    let content = self.take(PAGE);
                    self.decoder.payload_taken(PAGE as u64);
                    self.came.page(&self.decoder.blocks().clone(), *record, content);
                    return Some(decoded);
                }
                Decoded::Ram(record @ RamRecord::Zero { .. }) => {
                    self.came.page(&self.decoder.blocks().clone(), *record, vec![0; PAGE]);
                    return Some(decoded);
                }
                Decoded::Command(Command::Ping(value)) => {
                    let agreed = self.agreed.filter(|_| value & 0xffff_0000 == QUESTION);
                    // A source that has gone takes no answer.
                    let _ = self.say(&ReturnMessage::Pong(agreed.unwrap_or(*value)));
                    return Some(decoded);
                }
                Decoded::Ram(RamRecord::MultifdFlush) => {
                    self.marks += 1;
                    return Some(decoded);
                }
                _ => return Some(decoded),
            }
        }
    }

    /// Reads on up to `found`.
    pub(crate) fn until(&mut self, what: &str, found: impl Fn(&Decoded) -> bool) {
        while let Some(decoded) = self.next() {
            if found(&decoded) {
                return;
            }
        }
        panic!("the source ends without {what}");
    }

    /// Reads on up to the package, and all of it but RUN; does not answer what is asked there.
    pub(crate) fn package_without_run(&mut self) {
        let mut len = 0;
        while len == 0 {
            if let Decoded::PackageFollows { len: bytes } = self.next().expect("a package comes") {
                len = bytes as usize;
            }
        }
        self.take(len - 5);
    }

    /// RUN, as the end of the package.
    pub(crate) fn run(&mut self) {
        let mut run = Vec::new();
        Command::PostcopyRun.encode(&mut run);
        assert_eq!(self.take(run.len()), run);
        // All of the package has been taken.
        let len = self.decoder.payload_left();
        self.decoder.payload_taken(len);
    }

    /// Takes the guest: everything up to RUN.
    pub(crate) fn guest(&mut self) {
        self.package_without_run();
        for ping in [3, 0x42] {
            self.say(&ReturnMessage::Pong(ping)).expect("the source listens");
        }
        self.run();
    }

    pub(crate) fn say(&mut self, message: &ReturnMessage) -> std::io::Result<()> {
        let mut bytes = Vec::new();
        message.encode(&mut bytes);
        self.stream.write_all(&bytes)
    }

    /// Asks for `len` bytes from `start`.
    pub(crate) fn ask(&mut self, block: Option<&str>, start: u64, len: u32) {
        let start = BlockOffset(start);
        let message = match block {
            Some(name) => ReturnMessage::RequestPagesOf {
                block: Name::new(name).expect("a name"),
                start,
                len,
            },
            None => ReturnMessage::RequestPages { start, len },
        };
        self.say(&message).expect("the source listens");
    }

    /// The blocks announced.
    pub(crate) fn blocks(&self) -> Arc<BlockList> {
        self.decoder.blocks().clone()
    }
}

/// Reads all of an urgent channel.
pub(crate) fn drain_urgent(mut stream: TcpStream, blocks: Arc<BlockList>) -> Came {
    let format = RecordFormat::Postcopy;
    let mut decoder = RecordDecoder::new(blocks.clone(), TargetPage::FOUR_KIB, format);
    let (mut held, mut came) = (Vec::new(), Came::default());
    let mut buffer = vec![0; 64 << 10];
    loop {
        let (used, decoded) = decoder.decode(&held).expect("our own source's");
        held.drain(..used);
        let len = match decoded {
            RecordDecoded::Record(RamRecord::PageFollows { .. }) => PAGE,
            RecordDecoded::Record(_) => 0,
            RecordDecoded::NeedMore(_) => {
                // A source that broke the connection is as much at its end.
                let bytes = stream.read(&mut buffer).unwrap_or(0);
                if bytes == 0 {
                    return came;
                }
                held.extend_from_slice(&buffer[..bytes]);
                continue;
            }
        };
        while held.len() < len {
            let bytes = stream.read(&mut buffer).unwrap_or(0);
            if bytes == 0 {
                return came;
            }
            held.extend_from_slice(&buffer[..bytes]);
        }
        let content: Vec<u8> = held.drain(..len).collect();
        if len > 0 {
            decoder.payload_taken(len);
        }
        if let RecordDecoded::Record(record) = decoded {
            let content = if len > 0 { content } else { vec![0; PAGE] };
            came.page(&blocks, record, content);
        }
    }
}
