//! A source that says what a test tells it to: a socket, and no manners.

#![allow(
    dead_code,
    clippy::allow_attributes,
    reason = "each test binary uses the part it needs of what they share"
)]

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::time::Duration;

use rustix::net::{AddressFamily, SocketType, socket, sockopt};
use whimbrel::{Address, Vm};
use whimbrel_vm::{Config, ReferenceVm};
use whimbrel_wire::{
    BlockIndex, BlockInfo, BlockList, BlockOffset, Command, Configuration, DeviceSection,
    DiscardRange, FileHeader, Name, Package, PageSizes, RAM_SECTION, RAM_VERSION, RamDiscard,
    RecordEncoder, ReturnDecoded, ReturnDecoder, ReturnMessage, SectionHeader, SectionId,
    TargetPage, encode_end_of_section, encode_eof, encode_multifd_flush, encode_vm_description,
};

/// The question of a whimbrel that can load a package before its RUN.
pub(crate) const ASKS_RUN_APART: u32 = 0x5748_0002;

const RAM: SectionId = SectionId(0x7fff_ffff);
const PAGE: usize = 4096;

pub(crate) fn name(text: &str) -> Name {
    Name::new(text).expect("a name")
}

/// A VM whose memory and devices are sent, in whatever way.
pub(crate) struct FarSource {
    pub main: TcpStream,
    address: Address,
    /// What will be sent next.
    pub words: Vec<u8>,
    pub model: Arc<ReferenceVm>,
    pub blocks: Arc<BlockList>,
    pub records: RecordEncoder,
    answers: ReturnDecoder,
    held: Vec<u8>,
}

fn connect(address: &Address) -> TcpStream {
    let Address::Tcp { host, port } = address else { panic!("{address} is not TCP") };
    let socket = socket(AddressFamily::INET, SocketType::STREAM, None).expect("a socket");
    // Small, and so before it connects: what is not read soon fills it.
    sockopt::set_socket_recv_buffer_size(&socket, 16 << 10).expect("a small buffer");
    let there: SocketAddr = format!("{host}:{port}").parse().expect("an address");
    rustix::net::connect(&socket, &there).expect("it listens");
    let stream = TcpStream::from(socket);
    stream.set_read_timeout(Some(Duration::from_secs(30))).expect("a timeout");
    stream
}

/// A record of a page, with its content.
pub(crate) fn page(
    records: &mut RecordEncoder,
    vm: &ReferenceVm,
    block: &str,
    page: u64,
) -> Vec<u8> {
    let place = records.blocks().find(block.as_bytes()).expect("announced");
    let mut bytes = Vec::new();
    records.page_header(place, BlockOffset(page * PAGE as u64), &mut bytes);
    let (_, block) = vm.ram().find(block).expect("a block");
    let mut content = [0; PAGE];
    block.read(page * PAGE as u64, &mut content).expect("inside");
    bytes.extend_from_slice(&content);
    bytes
}

impl FarSource {
    /// Connects, and says nothing yet.
    pub(crate) fn connect(address: &Address, config: &Config) -> FarSource {
        let model = ReferenceVm::new(config.clone()).expect("a VM");
        let infos = model.ram().blocks().map(|(_, block)| {
            let size = block.host_page_size().bytes() as u64;
            let mut info = BlockInfo::new(name(block.name()), block.len());
            info.page_size = (size != PAGE as u64).then_some(size);
            info
        });
        let blocks = Arc::new(BlockList::new(infos).expect("blocks"));
        FarSource {
            main: connect(address),
            address: address.clone(),
            words: Vec::new(),
            model,
            records: RecordEncoder::new(blocks.clone()),
            blocks,
            answers: ReturnDecoder::new(TargetPage::FOUR_KIB),
            held: Vec::new(),
        }
    }

    /// Sends what was gathered. The destination may have gone.
    pub(crate) fn send(&mut self) {
        let words = std::mem::take(&mut self.words);
        let _ = self.main.write_all(&words);
    }

    pub(crate) fn command(&mut self, command: &Command) -> &mut FarSource {
        command.encode(&mut self.words);
        self
    }

    /// Header and configuration.
    pub(crate) fn header(&mut self) -> &mut FarSource {
        FileHeader.encode(&mut self.words);
        Configuration::new(name(&self.model.machine())).encode(&mut self.words);
        self
    }

    pub(crate) fn return_path(&mut self) -> &mut FarSource {
        self.command(&Command::OpenReturnPath).command(&Command::Ping(1))
    }

    pub(crate) fn advise(&mut self) -> &mut FarSource {
        let sizes = self.model.ram().blocks().map(|(_, block)| block.host_page_size().bytes());
        let host_summary = sizes.fold(0, |all, one| all | one as u64);
        self.command(&Command::PostcopyAdvise(Some(PageSizes { host_summary, target: 4096 })))
    }

    /// RAM's block list.
    pub(crate) fn setup(&mut self) -> &mut FarSource {
        SectionHeader { id: RAM, name: name(RAM_SECTION), instance_id: 0, version_id: RAM_VERSION }
            .encode_start(&mut self.words);
        self.blocks.encode(&mut self.words);
        self.end_section()
    }

    /// The same, ended by a mark of multifd.
    pub(crate) fn setup_flushed(&mut self) -> &mut FarSource {
        SectionHeader { id: RAM, name: name(RAM_SECTION), instance_id: 0, version_id: RAM_VERSION }
            .encode_start(&mut self.words);
        self.blocks.encode(&mut self.words);
        self.flush().end_section()
    }

    /// A mark of multifd, inside a section.
    pub(crate) fn flush(&mut self) -> &mut FarSource {
        encode_multifd_flush(&mut self.words);
        self
    }

    /// All of it, as a source does.
    pub(crate) fn begin(&mut self) -> &mut FarSource {
        self.header().return_path().advise().setup()
    }

    pub(crate) fn part(&mut self) -> &mut FarSource {
        RAM.encode_part(&mut self.words);
        self
    }

    pub(crate) fn end_section(&mut self) -> &mut FarSource {
        encode_end_of_section(&mut self.words);
        RAM.encode_footer(&mut self.words);
        self
    }

    /// A page, inside a part.
    pub(crate) fn page(&mut self, block: &str, number: u64) -> &mut FarSource {
        let bytes = page(&mut self.records, &self.model, block, number);
        self.words.extend_from_slice(&bytes);
        self
    }

    /// A page that names its block, for a channel that has carried no other.
    pub(crate) fn named_page(&self, block: &str, number: u64) -> Vec<u8> {
        page(&mut RecordEncoder::new(self.blocks.clone()), &self.model, block, number)
    }

    /// A page of something else than its content.
    pub(crate) fn other_page(&mut self, block: &str, number: u64, fill: u8) -> &mut FarSource {
        let at = self.words.len();
        self.page(block, number);
        let content = self.words.len() - PAGE;
        assert!(content > at);
        self.words[content..].fill(fill);
        self
    }

    /// Every page of a block but those left out.
    pub(crate) fn pages(&mut self, block: &str, but: &[u64]) -> &mut FarSource {
        let (_, ram) = self.model.ram().find(block).expect("a block");
        for number in (0..ram.target_pages()).filter(|number| !but.contains(number)) {
            self.page(block, number);
        }
        self
    }

    /// Every page of every block but these of the first.
    pub(crate) fn all_pages(&mut self, but: &[u64]) -> &mut FarSource {
        self.part().pages("vm.ram", but).pages("vm.firmware", &[]).end_section()
    }

    pub(crate) fn discard(&mut self, block: &str, start: u64, length: u64) -> &mut FarSource {
        let ranges = vec![DiscardRange { start: BlockOffset(start), length }];
        self.command(&Command::RamDiscard(RamDiscard { block: name(block), ranges }))
    }

    /// The devices, as they come in a package.
    pub(crate) fn sections(&self) -> Vec<DeviceSection> {
        let mut running = vec![0; 104];
        running[3] = 8;
        running[4..11].copy_from_slice(b"running");
        let mut sections = vec![section(1, "globalstate", 0, 1, &running)];
        for (id, device) in (2..).zip(self.model.save().expect("it stands still")) {
            let (instance, version) = (device.instance_id, device.version_id);
            sections.push(section(id, &device.name, instance, version, &device.bytes));
        }
        sections
    }

    /// The bytes of a package, RUN included.
    pub(crate) fn package(&self) -> Vec<u8> {
        let package = Package { sections: self.sections(), pings: vec![3, 0x42] };
        let mut bytes = Vec::new();
        package.encode(&mut bytes);
        bytes
    }

    /// `bytes` as a package.
    pub(crate) fn packaged(&mut self, bytes: &[u8]) -> &mut FarSource {
        let len = u32::try_from(bytes.len()).expect("short");
        self.command(&Command::Packaged { len });
        self.words.extend_from_slice(bytes);
        self
    }

    /// Everything up to RUN: `vm.ram` is missing, all but the first page.
    pub(crate) fn guest(&mut self) -> &mut FarSource {
        self.begin().part().page("vm.ram", 0).end_section();
        self.packaged(&self.package())
    }

    /// RAM's end.
    pub(crate) fn end_of_ram(&mut self) -> &mut FarSource {
        RAM.encode_end(&mut self.words);
        self.end_section()
    }

    /// RAM's end, and the stream's.
    pub(crate) fn eof(&mut self) -> &mut FarSource {
        self.end_of_ram();
        encode_eof(&mut self.words);
        self
    }

    /// RAM's end, ended by a mark of multifd, and everything behind it but the end of the stream.
    pub(crate) fn devices(&mut self) -> &mut FarSource {
        RAM.encode_end(&mut self.words);
        self.flush().end_section();
        self.sections().iter().for_each(|section| section.encode(&mut self.words));
        self
    }

    /// The end of the stream.
    pub(crate) fn stream_end(&mut self) -> &mut FarSource {
        encode_eof(&mut self.words);
        encode_vm_description(b"{}", &mut self.words);
        self
    }

    /// One more connection, that says nothing yet.
    pub(crate) fn connection(&self) -> TcpStream {
        connect(&self.address)
    }

    /// The channel for urgent pages.
    pub(crate) fn urgent(&self) -> TcpStream {
        connect(&self.address)
    }

    /// What the destination says next; `None` when it has closed.
    pub(crate) fn answer(&mut self) -> Option<ReturnMessage> {
        loop {
            let (used, decoded) = self.answers.decode(&self.held).expect("our own destination's");
            self.held.drain(..used);
            match decoded {
                ReturnDecoded::Message(message) => return Some(message),
                ReturnDecoded::NeedMore(_) => {
                    let mut buffer = [0; 4096];
                    match self.main.read(&mut buffer) {
                        Ok(bytes @ 1..) => self.held.extend_from_slice(&buffer[..bytes]),
                        // A connection that is reset has ended as well.
                        _ => return None,
                    }
                }
                other => panic!("{other:?}"),
            }
        }
    }

    /// Reads answers up to `wanted`, or the end.
    pub(crate) fn hears(&mut self, wanted: &ReturnMessage) -> bool {
        while let Some(message) = self.answer() {
            if message == *wanted {
                return true;
            }
        }
        false
    }

    pub(crate) fn block(&self, name: &str) -> BlockIndex {
        self.blocks.find(name.as_bytes()).expect("announced")
    }
}

fn section(id: u32, device: &str, instance_id: u32, version_id: u32, data: &[u8]) -> DeviceSection {
    let header = SectionHeader { id: SectionId(id), name: name(device), instance_id, version_id };
    DeviceSection::with_own_length(header, data)
}
