//! What a source says, as values: the main channel, two multifd channels and the urgent one.
//!
//! Everything is encoded as whimbrel-wire does it, in whatever order the input has it; then bytes
//! are damaged, cut off, or stand for themselves, so that deep states are reached and left in a
//! wrong way.

use std::sync::Arc;

use whimbrel_wire::header::capability;
use whimbrel_wire::multifd::packet_flag;
use whimbrel_wire::recovery::{HelloKind, Identity};
use whimbrel_wire::{
    BlockIndex, BlockInfo, BlockList, BlockOffset, Command, Configuration, DeviceSection,
    DiscardRange, FileHeader, MappedRamHeader, MultifdInit, Name, Package, PacketHeader, PageSizes,
    RAM_SECTION, RAM_VERSION, RamDiscard, RecordEncoder, SectionHeader, SectionId, TargetPage,
    encode_end_of_section, encode_eof, encode_multifd_flush, encode_vm_description, page_bitmap,
    vmdesc,
};

use crate::choices::{Choices, language, read_all};

const PAGE: u64 = 4096;
const RAM: SectionId = SectionId(0x7fff_ffff);

/// The machine that is expected.
pub(crate) const MACHINE: &str = "whimbrel-fuzz-1";
/// Its RAM: names and pages.
pub(crate) const BLOCKS: [(&str, u64); 2] = [("vm.ram", 2048), ("vm.firmware", 16)];
/// Its one device.
pub(crate) const DEVICE: &str = "toucher";

/// The main channel, two multifd channels, the urgent one.
pub(crate) const CHANNELS: usize = 4;
pub(crate) const URGENT: usize = 3;

language! {
    /// What a source says or does. A choice is taken modulo the number of choices.
    pub(crate) enum Said {
        /// Header and configuration.
        Header { variant: u8 },
        ReturnPath {},
        Ping { what: u8 },
        Advise { variant: u8 },
        /// The `ram` section's start, and the block list.
        Setup { variant: u8 },
        Part {},
        /// The `ram` section's last part.
        End {},
        EndSection {},
        Page { block: u8, page: u16, fill: u8 },
        Zeros { block: u8, page: u16, count: u16 },
        Delta { block: u8, page: u16, delta: Vec<u8> },
        Flush {},
        /// All devices of the machine.
        Devices { variant: u8 },
        Device { what: u8, data: Vec<u8> },
        Package { variant: u8 },
        Discard { block: u8, page: u16, count: u16 },
        Eof {},
        Description { variant: u8 },
        Command { what: u8, value: u32 },
        /// What follows is said on this channel.
        Channel { number: u8 },
        /// The first message of a multifd channel.
        Init { number: u8, uuid: u8 },
        /// A multifd packet.
        Packet { block: u8, page: u16, normal: u8, zero: u8, method: u8, fill: u8 },
        /// The end of a multifd round.
        Sync {},
        Raw { bytes: Vec<u8> },
        /// Changes a byte of what was said last.
        Damage { back: u16, value: u8 },
        /// Takes back the last bytes of what was said last.
        Cut { count: u16 },
        /// Ends this channel.
        Close {},
        /// Waits until the other side has taken everything.
        Settle {},
        /// Every page of every block but one, as zeros.
        AllZero { but: u16 },
        /// The block list of a mapped-ram file, with bitmaps and pages.
        Mapped { variant: u8, fill: u8 },
        /// Connects the urgent channel, or one more.
        Connect {},
        /// What makes the migration itself, for a recovery.
        Identity { beat: u8 },
        /// Breaks all connections, and comes back: what follows is said on a new main channel.
        Again {},
        /// The first words of this channel in a recovery between whimbrels.
        Hello { attempt: u8, kind: u8 },
        /// The proof, when the other side has answered the hello.
        Prove { wrong: u8 },
        /// `migrate-recover` at the destination.
        Recover {},
    }
}

/// What a source does.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Step {
    Send(usize, Vec<u8>),
    Close(usize),
    Settle,
    Connect,
    Again,
    /// On a channel, of a try, as what it is.
    Hello(usize, u8, HelloKind),
    /// With a bit changed, if it is wrong.
    Prove(bool),
    Recover,
}

/// All that an input says.
pub(crate) fn steps(from: &mut Choices<'_>) -> Vec<Step> {
    let mut teller = Teller::new();
    for op in read_all(from) {
        teller.say(op);
        if teller.bytes > TOLD_MAX {
            break;
        }
    }
    teller.steps
}

/// Most bytes that one input becomes.
const TOLD_MAX: usize = 4 << 20;

struct Teller {
    steps: Vec<Step>,
    channel: usize,
    blocks: Arc<BlockList>,
    /// Of the main channel and the urgent one.
    records: [RecordEncoder; 2],
    /// Devices that were said, for a description of them.
    sections: Vec<DeviceSection>,
    own_machine: bool,
    section: u32,
    /// Bytes of the main channel.
    position: u64,
    bytes: usize,
}

pub(crate) fn name(text: &str) -> Name {
    Name::new(text).expect("a short name")
}

/// The right blocks.
pub(crate) fn blocks() -> Arc<BlockList> {
    let infos = BLOCKS.map(|(text, pages)| BlockInfo::new(name(text), pages * PAGE));
    Arc::new(BlockList::new(infos).expect("two blocks"))
}

impl Teller {
    fn new() -> Teller {
        let blocks = blocks();
        Teller {
            steps: Vec::new(),
            channel: 0,
            records: [RecordEncoder::new(blocks.clone()), RecordEncoder::new(blocks.clone())],
            blocks,
            sections: Vec::new(),
            own_machine: true,
            section: 2,
            position: 0,
            bytes: 0,
        }
    }

    /// Says what `write` writes, as one step.
    fn send(&mut self, write: impl FnOnce(&mut Vec<u8>)) {
        let mut bytes = Vec::new();
        write(&mut bytes);
        self.bytes += bytes.len();
        if self.channel == 0 {
            self.position += bytes.len() as u64;
        }
        self.steps.push(Step::Send(self.channel, bytes));
    }

    fn command(&mut self, command: &Command) {
        self.send(|out| command.encode(out));
    }

    fn say(&mut self, op: Said) {
        match op {
            Said::Header { variant } => self.header(variant),
            Said::ReturnPath {} => self.command(&Command::OpenReturnPath),
            Said::Ping { what } => self.command(&Command::Ping(ping(what))),
            Said::Advise { variant } => self.advise(variant),
            Said::Setup { variant } => self.setup(variant),
            Said::Part {} => self.send(|out| RAM.encode_part(out)),
            Said::End {} => self.send(|out| RAM.encode_end(out)),
            Said::EndSection {} => self.send(|out| {
                encode_end_of_section(out);
                RAM.encode_footer(out);
            }),
            Said::Page { block, page, fill } => {
                let (block, offset) = self.place(block, page);
                self.record(|records, out| {
                    records.page_header(block, offset, out);
                    out.extend(content(fill));
                });
            }
            Said::Zeros { block, page, count } => {
                let block = self.block(block);
                self.record(|records, out| {
                    for page in (page..=u16::MAX).take(count.into()) {
                        records.zero_page(block, BlockOffset(u64::from(page) * PAGE), out);
                    }
                });
            }
            Said::Delta { block, page, delta } => {
                let (block, offset) = self.place(block, page);
                let len = u16::try_from(delta.len()).expect("an operand is no longer");
                self.record(|records, out| {
                    records.xbzrle_header(block, offset, len, out);
                    out.extend(&delta);
                });
            }
            Said::Flush {} => self.send(encode_multifd_flush),
            Said::Devices { variant } => {
                for section in self.devices(variant) {
                    self.send(|out| section.encode(out));
                    self.sections.push(section);
                }
            }
            Said::Device { what, data } => {
                let section = self.device(what, &data);
                self.send(|out| section.encode(out));
                self.sections.push(section);
            }
            Said::Package { variant } => self.package(variant),
            Said::Discard { block, page, count } => {
                let start = BlockOffset(u64::from(page) * PAGE);
                let ranges = vec![DiscardRange { start, length: u64::from(count) * PAGE }];
                let block = self.block(block);
                let block = self.blocks.get(block).expect("of this list").name.clone();
                self.command(&Command::RamDiscard(RamDiscard { block, ranges }));
            }
            Said::Eof {} => self.send(encode_eof),
            Said::Description { variant } => {
                let json = match variant % 3 {
                    0 => vmdesc::describe(PAGE, &self.sections),
                    1 => b"{}".to_vec(),
                    _ => b"{\"page_size\": 4096, \"devices\": []}".to_vec(),
                };
                self.send(|out| encode_vm_description(&json, out));
            }
            Said::Command { what, value } => self.command(&other_command(what, value)),
            Said::Channel { number } => self.channel = usize::from(number) % CHANNELS,
            Said::Init { number, uuid } => {
                self.send(|out| MultifdInit { uuid: [uuid; 16], channel: number }.encode(out));
            }
            Said::Packet { block, page, normal, zero, method, fill } => {
                self.packet(block, page, (normal, zero), (method, fill));
            }
            Said::Sync {} => {
                self.send(|out| PacketHeader::sync(1, TargetPage::FOUR_KIB).encode(out));
            }
            Said::Raw { bytes } => self.send(|out| out.extend(&bytes)),
            Said::Damage { back, value } => {
                if let Some(Step::Send(_, bytes)) = self.steps.last_mut()
                    && let Some(at) = bytes.len().checked_sub(usize::from(back) + 1)
                {
                    bytes[at] = value;
                }
            }
            Said::Cut { count } => {
                if let Some(Step::Send(_, bytes)) = self.steps.last_mut() {
                    bytes.truncate(bytes.len().saturating_sub(count.into()));
                }
            }
            Said::Close {} => self.steps.push(Step::Close(self.channel)),
            Said::Settle {} => self.steps.push(Step::Settle),
            Said::AllZero { but } => {
                let blocks = self.blocks.clone();
                self.record(|records, out| {
                    for (index, info) in blocks.iter() {
                        for page in (0..info.used_length / PAGE).take(4096) {
                            if index.get() > 0 || page != u64::from(but) {
                                records.zero_page(index, BlockOffset(page * PAGE), out);
                            }
                        }
                    }
                });
            }
            Said::Mapped { variant, fill } => self.mapped(variant, fill),
            Said::Connect {} => self.steps.push(Step::Connect),
            Said::Identity { beat } => self.command(&Command::Identity(identity(beat))),
            Said::Again {} => {
                self.channel = 0;
                self.records.iter_mut().for_each(RecordEncoder::forget_last_block);
                self.steps.push(Step::Again);
            }
            Said::Hello { attempt, kind } => {
                let kind = match (kind % 4, self.channel) {
                    (0, 0) | (1, _) => HelloKind::Main,
                    (0, URGENT) | (2, _) => HelloKind::Urgent,
                    (0, channel) => HelloKind::Multifd(u8::try_from(channel - 1).expect("few")),
                    _ => HelloKind::Multifd(kind >> 2),
                };
                self.steps.push(Step::Hello(self.channel, attempt, kind));
            }
            Said::Prove { wrong } => self.steps.push(Step::Prove(wrong & 1 != 0)),
            Said::Recover {} => self.steps.push(Step::Recover),
        }
    }

    fn header(&mut self, variant: u8) {
        let machine = match variant & 3 {
            0 | 1 => MACHINE,
            2 => "pc-q35-10.0",
            _ => "whimbrel-other-1",
        };
        self.own_machine = variant & 3 != 2;
        let mut configuration = Configuration::new(name(machine));
        if variant & 4 != 0 {
            configuration.uuid = Some([variant >> 6; 16]);
        }
        if variant & 8 != 0 {
            configuration.capabilities.push(name(capability::MAPPED_RAM));
        }
        if variant & 16 != 0 {
            configuration.capabilities.push(name(capability::IGNORE_SHARED));
        }
        if variant & 32 != 0 {
            configuration.target_page = TargetPage::from_bits(12);
        }
        self.send(|out| {
            FileHeader.encode(out);
            configuration.encode(out);
        });
    }

    fn advise(&mut self, variant: u8) {
        let sizes = match variant % 4 {
            0 | 1 => Some(PageSizes { host_summary: PAGE, target: PAGE }),
            2 => None,
            _ => Some(PageSizes { host_summary: PAGE | 2 << 20, target: PAGE }),
        };
        self.command(&Command::PostcopyAdvise(sizes));
    }

    /// The block list in one of its variants; what is said of blocks from then on is of these.
    fn choose_blocks(&mut self, variant: u8) {
        let mut infos =
            BLOCKS.map(|(text, pages)| BlockInfo::new(name(text), pages * PAGE)).to_vec();
        match variant % 8 {
            0..=2 => {}
            3 => infos.truncate(1),
            4 => infos.reverse(),
            5 => infos[0].used_length += PAGE,
            6 => infos[0].page_size = Some(2 << 20),
            _ => infos.push(BlockInfo::new(name("vm.more"), 2 * PAGE)),
        }
        self.blocks = Arc::new(BlockList::new(infos).expect("few blocks"));
        self.records = [0, 1].map(|_| RecordEncoder::new(self.blocks.clone()));
    }

    fn ram_start(out: &mut Vec<u8>) {
        let header = SectionHeader {
            id: RAM,
            name: name(RAM_SECTION),
            instance_id: 0,
            version_id: RAM_VERSION,
        };
        header.encode_start(out);
    }

    fn setup(&mut self, variant: u8) {
        self.choose_blocks(variant);
        let blocks = self.blocks.clone();
        self.send(|out| {
            Self::ram_start(out);
            blocks.encode(out);
            if variant & 0x80 != 0 {
                encode_multifd_flush(out);
            }
            if variant & 0x40 == 0 {
                encode_end_of_section(out);
                RAM.encode_footer(out);
            }
        });
    }

    /// A kept VM's RAM: small blocks, so that a file is no longer than it has to be.
    fn mapped(&mut self, variant: u8, fill: u8) {
        let small = [("vm.ram", 24u64), ("vm.firmware", 2)];
        let total: u64 = small.iter().map(|(_, pages)| pages * PAGE).sum();
        let base = self.position;
        self.send(|out| {
            Self::ram_start(out);
            out.extend((total | 4).to_be_bytes());
            for (text, pages) in small {
                let mut info = BlockInfo::new(name(text), pages * PAGE);
                let mut plain = Vec::new();
                info.encode(&mut plain);
                let header_at = base + (out.len() + plain.len()) as u64;
                let bitmap_offset = header_at + MappedRamHeader::LEN;
                let bitmap_len = page_bitmap::bitmap_len(pages * PAGE, TargetPage::FOUR_KIB);
                let pages_offset = match variant & 1 {
                    0 => (bitmap_offset + bitmap_len).next_multiple_of(PAGE),
                    _ => (bitmap_offset + bitmap_len).next_multiple_of(1 << 20),
                };
                info.mapped_ram =
                    Some(MappedRamHeader { page_size: PAGE, bitmap_offset, pages_offset });
                info.encode(out);
                let mut bitmap = vec![0; usize::try_from(bitmap_len).expect("short")];
                for page in 0..pages {
                    let there = match variant >> 1 & 3 {
                        0 => true,
                        1 => page % 3 == 0,
                        2 => page + 1 == pages,
                        _ => false,
                    };
                    page_bitmap::set(&mut bitmap, page, there);
                }
                out.extend(&bitmap);
                out.resize(usize::try_from(pages_offset - base).expect("short"), 0);
                for _ in 0..pages {
                    out.extend(content(fill));
                }
            }
            encode_end_of_section(out);
            RAM.encode_footer(out);
        });
    }

    fn block(&self, choice: u8) -> BlockIndex {
        let count = self.blocks.len();
        let (index, _) =
            self.blocks.iter().nth(usize::from(choice) % count).expect("below their number");
        index
    }

    fn place(&self, block: u8, page: u16) -> (BlockIndex, BlockOffset) {
        (self.block(block), BlockOffset(u64::from(page) * PAGE))
    }

    fn record(&mut self, write: impl FnOnce(&mut RecordEncoder, &mut Vec<u8>)) {
        let mut bytes = Vec::new();
        let which = usize::from(self.channel == URGENT);
        write(&mut self.records[which], &mut bytes);
        self.send(|out| *out = bytes);
    }

    fn section_of(&mut self, text: &str, version_id: u32, data: &[u8]) -> DeviceSection {
        let id = SectionId(self.section);
        self.section += 1;
        let header = SectionHeader { id, name: name(text), instance_id: 0, version_id };
        match self.own_machine {
            true => DeviceSection::with_own_length(header, data),
            false => DeviceSection { header, payload: data.to_vec() },
        }
    }

    /// Global state and the one device, which touches pages: in loading those before the zero, and
    /// as the guest those behind it.
    fn devices(&mut self, variant: u8) -> Vec<DeviceSection> {
        let mut state = vec![0; 104];
        state[3] = 8;
        let word: &[u8] = if variant & 1 == 0 { b"running" } else { b"paused" };
        state[4..4 + word.len()].copy_from_slice(word);
        let touched: &[u8] = match variant >> 1 & 7 {
            0 => &[],
            1 => &[0, 5],
            2 => &[5, 0],
            3 => &[1, 2, 0, 3, 4, 200, 255],
            4 => &[0, 1, 2, 3, 4, 5, 6, 7, 8],
            5 => &[0, 255],
            6 => &[255, 255],
            _ => &[0, 9, 9, 9],
        };
        vec![self.section_of("globalstate", 1, &state), self.section_of(DEVICE, 1, touched)]
    }

    fn device(&mut self, what: u8, data: &[u8]) -> DeviceSection {
        let text = ["globalstate", DEVICE, "cpu", "x"][usize::from(what % 4)];
        self.section_of(text, u32::from(what >> 4), data)
    }

    fn package(&mut self, variant: u8) {
        let sections = self.devices(variant & 0xf);
        let pings = match variant >> 4 & 3 {
            0 => vec![3, 0x42],
            1 => vec![3],
            2 => Vec::new(),
            _ => vec![0x42; 300],
        };
        let mut bytes = Vec::new();
        Package { sections, pings }.encode(&mut bytes);
        let mut len = u32::try_from(bytes.len()).expect("short");
        match variant >> 6 {
            0 | 1 => {}
            // RUN comes apart.
            2 => bytes.truncate(bytes.len() - 5),
            _ => len -= 5,
        }
        self.send(|out| {
            Command::Packaged { len }.encode(out);
            out.extend(&bytes);
        });
    }

    fn packet(&mut self, block: u8, page: u16, (normal, zero): (u8, u8), (method, fill): (u8, u8)) {
        let (normal, zero) = (u16::from(normal % 129), u16::from(zero % 129));
        let zero = zero.min(128 - normal);
        let offset = |page: u16| BlockOffset(u64::from(page) * PAGE);
        let offsets: Vec<BlockOffset> =
            (page..=u16::MAX).take((normal + zero).into()).map(offset).collect();
        let (normal, zero) = offsets.split_at(offsets.len().min(normal.into()));
        let block = self.block(block);
        let block = self.blocks.get(block).expect("of this list").name.clone();
        let pages: Vec<u8> = normal.iter().flat_map(|_| content(fill)).collect();
        let (flags, data) = match method % 4 {
            0 | 1 => (0, pages),
            2 => {
                let packed = zstd::bulk::compress(&pages, 1).expect("it can be packed");
                (packet_flag::ZSTD, packed)
            }
            _ => (packet_flag::ZLIB, pages),
        };
        let flags = flags | if method & 0x80 != 0 { packet_flag::SYNC } else { 0 };
        let len = u32::try_from(data.len()).expect("a packet");
        let header = PacketHeader::pages(
            &block,
            (normal.iter().copied(), zero.iter().copied()),
            (flags, len, 7),
            TargetPage::FOUR_KIB,
        );
        self.send(|out| {
            header.encode(out);
            if !normal.is_empty() {
                out.extend(&data);
            }
        });
    }
}

/// A page. With fill 0 it is a zero page that is sent as one with content.
fn content(fill: u8) -> [u8; 4096] {
    let mut page = [fill; 4096];
    page[4095] = fill & 0x7f;
    page
}

fn ping(what: u8) -> u32 {
    match what % 16 {
        0 => 1,
        // A whimbrel asks who is there, and whether all channels have been parked.
        1 => 0x5748_ffff,
        2 => 0x5748_0000,
        3 => 0x5748_0002,
        4 => 0x5748_001f,
        5 => 0x5041_524b,
        6 => 3,
        7 => 0x42,
        8 => 0x4c4f_4144,
        9 => 0x5748_0000 | u32::from(what >> 4),
        _ => what.into(),
    }
}

fn other_command(what: u8, value: u32) -> Command {
    match what % 7 {
        0 => Command::PostcopyListen,
        1 => Command::PostcopyRun,
        2 => Command::EnableColo,
        3 => Command::PostcopyResume,
        4 => Command::RecvBitmap(name(BLOCKS[usize::from(what >> 4) % 2].0)),
        5 => Command::SwitchoverStart,
        _ => Command::Packaged { len: value },
    }
}

/// What makes every migration of an input itself.
pub(crate) fn identity(beat: u8) -> Identity {
    Identity { id: [3; 16], secret: [4; 32], beat_ms: beat.into() }
}

/// Whole migrations, from which a fuzzer begins: a name and the operations.
pub(crate) fn migrations() -> Vec<(&'static str, Vec<Said>)> {
    let begin = |postcopy: bool, setup: u8| {
        let mut ops = vec![
            Said::Header { variant: 0 },
            Said::ReturnPath {},
            Said::Ping { what: 0 },
            Said::Ping { what: 4 },
        ];
        ops.extend(postcopy.then_some(Said::Advise { variant: 0 }));
        ops.push(Said::Setup { variant: setup });
        ops
    };
    let whole_end = || {
        vec![
            Said::End {},
            Said::AllZero { but: u16::MAX },
            Said::EndSection {},
            Said::Devices { variant: 6 },
            Said::Ping { what: 8 },
            Said::Settle {},
            Said::Eof {},
            Said::Description { variant: 0 },
        ]
    };
    let pages = |fill| {
        vec![
            Said::Part {},
            Said::Page { block: 0, page: 3, fill },
            Said::Page { block: 0, page: 4, fill },
            Said::Page { block: 1, page: 0, fill },
            Said::Zeros { block: 0, page: 5, count: 3 },
            Said::EndSection {},
        ]
    };
    let precopy = [begin(false, 0), pages(7), pages(8), whole_end()].concat();
    let deltas = vec![
        Said::Part {},
        Said::Page { block: 0, page: 1, fill: 9 },
        Said::Delta { block: 0, page: 1, delta: vec![3, 1, 7] },
        Said::EndSection {},
    ];
    let deltas = [begin(false, 0), deltas, whole_end()].concat();
    let guest_first = |variant, more: Vec<Said>, end: bool| {
        let mut ops = [
            begin(true, 0),
            pages(7),
            vec![Said::Discard { block: 0, page: 4, count: 9 }, Said::Package { variant }],
            vec![Said::Settle {}],
            more,
        ]
        .concat();
        if end {
            ops.extend([
                Said::End {},
                Said::AllZero { but: u16::MAX },
                Said::EndSection {},
                Said::Eof {},
            ]);
        }
        ops
    };
    let on_urgent = vec![
        Said::Channel { number: 3 },
        Said::Connect {},
        Said::Page { block: 0, page: 5, fill: 1 },
        Said::Settle {},
        Said::Zeros { block: 0, page: 9, count: 1 },
        Said::Raw { bytes: vec![0, 0, 0, 0, 0, 0, 0, 0x10] },
        Said::Channel { number: 0 },
    ];
    let apart = vec![Said::Settle {}, Said::Command { what: 1, value: 0 }, Said::Settle {}];
    let packet =
        |page, normal, zero, method| Said::Packet { block: 0, page, normal, zero, method, fill: 5 };
    let channels = |method| {
        let mut ops = Vec::new();
        for number in 0..2u8 {
            ops.extend([
                Said::Channel { number: number + 1 },
                Said::Init { number, uuid: 0 },
                Said::Sync {},
                packet(u16::from(number) * 200, 20, 50, method),
                Said::Sync {},
                packet(u16::from(number) * 200 + 100, 3, 0, method),
                Said::Sync {},
            ]);
        }
        ops.push(Said::Channel { number: 0 });
        ops
    };
    let flushed = || {
        vec![
            Said::Part {},
            Said::Flush {},
            Said::EndSection {},
            Said::End {},
            Said::Flush {},
            Said::EndSection {},
        ]
    };
    let devices = || {
        vec![
            Said::Devices { variant: 6 },
            Said::Ping { what: 8 },
            Said::Settle {},
            Said::Eof {},
            Said::Description { variant: 0 },
        ]
    };
    let multifd = |method| [channels(method), begin(false, 0x80), flushed(), devices()].concat();
    let goes_on = [
        channels(0),
        begin(true, 0x80),
        vec![Said::Part {}, Said::Flush {}, Said::EndSection {}, Said::Ping { what: 5 }],
        vec![Said::Package { variant: 4 }, Said::Settle {}, Said::Channel { number: 1 }],
        vec![packet(0, 20, 50, 0), Said::Channel { number: 0 }],
        vec![Said::End {}, Said::AllZero { but: 7 }, Said::EndSection {}],
        vec![Said::Channel { number: 2 }, packet(7, 1, 0, 0)],
        vec![Said::Channel { number: 0 }, Said::Eof {}],
    ]
    .concat();
    let file = |variant| {
        vec![
            Said::Header { variant: 8 },
            Said::Mapped { variant, fill: 3 },
            Said::End {},
            Said::EndSection {},
            Said::Devices { variant: 0 },
            Said::Eof {},
            Said::Description { variant: 0 },
        ]
    };
    let qemu = vec![
        Said::Header { variant: 2 },
        Said::Setup { variant: 7 },
        Said::End {},
        Said::Page { block: 0, page: 3, fill: 1 },
        Said::EndSection {},
        Said::Device { what: 0x12, data: vec![1, 2, 3, 4] },
        Said::Device { what: 0x13, data: vec![9] },
        Said::Eof {},
        Said::Raw {
            bytes: described(
                r#"{"page_size": 4096, "devices": [
                {"name": "cpu", "instance_id": 0, "fields": [{"name": "a", "size": 4}]},
                {"name": "x", "instance_id": 0, "fields": [{"name": "a", "size": 1}]}]}"#,
            ),
        },
    ];
    let missing = |more: Vec<Said>| {
        let rest = vec![
            Said::Part {},
            Said::Page { block: 0, page: 9, fill: 6 },
            Said::EndSection {},
            Said::End {},
            Said::AllZero { but: u16::MAX },
            Said::EndSection {},
            Said::Eof {},
        ];
        let mut ops = begin(true, 0);
        ops.push(Said::Identity { beat: 0 });
        // The urgent channel is there before the link breaks, where there is one.
        ops.extend([Said::Package { variant: 0 }, Said::Connect {}, Said::Settle {}]);
        ops.push(Said::Again {});
        ops.extend(more);
        ops.extend(rest);
        ops
    };
    let whimbrel_again = vec![
        Said::Hello { attempt: 1, kind: 0 },
        Said::Prove { wrong: 0 },
        Said::Command { what: 3, value: 0 },
        Said::Channel { number: 3 },
        Said::Hello { attempt: 1, kind: 0 },
        Said::Page { block: 0, page: 5, fill: 1 },
        Said::Channel { number: 0 },
        Said::Settle {},
    ];
    let qemu_asks = vec![
        Said::Command { what: 4, value: 0 },
        Said::Command { what: 0x12, value: 0 },
        Said::Settle {},
        Said::Command { what: 3, value: 0 },
        Said::Settle {},
    ];
    let mut qemu_again = missing([vec![Said::Recover {}], qemu_asks].concat());
    // Without it nothing can be proved.
    qemu_again.retain(|op| !matches!(op, Said::Identity { .. }));
    vec![
        ("recovery", missing(whimbrel_again)),
        ("recovery-qemu", qemu_again),
        ("precopy", precopy),
        ("deltas", deltas),
        ("postcopy", guest_first(4, Vec::new(), true)),
        ("loading", guest_first(0x86, apart.clone(), true)),
        ("preempt", guest_first(4, on_urgent.clone(), true)),
        ("cut", guest_first(8, on_urgent, false)),
        ("run-apart", guest_first(0x84, apart, true)),
        ("multifd", multifd(0)),
        ("multifd-zstd", multifd(2)),
        ("multifd-goes-on", goes_on),
        ("file", file(0)),
        ("file-aligned", file(3)),
        ("file-sparse", file(4)),
        ("qemu", qemu),
    ]
}

fn described(json: &str) -> Vec<u8> {
    let mut bytes = Vec::new();
    encode_vm_description(json.as_bytes(), &mut bytes);
    bytes
}
