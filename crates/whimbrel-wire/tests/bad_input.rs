//! Each way to break the protocol is refused at its place, in words that say what was expected.
#![expect(clippy::unwrap_used, reason = "helpers of tests fail like tests")]

use whimbrel_wire::{
    BlockInfo, BlockList, Command, Configuration, Decoded, DeviceSection, DiscardRange, Error,
    ErrorKind, FileHeader, MainDecoder, MainOptions, Name, Package, PageSizes, RamDiscard,
    ReturnDecoder, SectionHeader, SectionId, TargetPage, encode_end_of_section, encode_eof,
};

const RAM: SectionId = SectionId(2);

fn name(text: &str) -> Name {
    Name::new(text).unwrap()
}

/// Builds a stream and reads it.
#[derive(Clone, Default)]
struct Stream(Vec<u8>);

impl Stream {
    /// Header and a QEMU's configuration.
    fn new() -> Self {
        Self::of_machine("pc-q35-10.0")
    }

    fn of_machine(machine: &str) -> Self {
        let mut stream = Self::default();
        FileHeader.encode(&mut stream.0);
        Configuration::new(name(machine)).encode(&mut stream.0);
        stream
    }

    /// The same and the start of RAM: two blocks, of 8 and 2 pages.
    fn with_ram() -> Self {
        Self::new().ram()
    }

    fn ram(self) -> Self {
        self.start(&ram_header()).list(&two_blocks()).eos().footer(RAM)
    }

    fn postcopy() -> Self {
        Self::new().command(&Command::OpenReturnPath).command(&advise()).ram()
    }

    fn with(mut self, write: impl FnOnce(&mut Vec<u8>)) -> Self {
        write(&mut self.0);
        self
    }

    fn bytes(self, bytes: &[u8]) -> Self {
        self.with(|out| out.extend_from_slice(bytes))
    }

    fn start(self, header: &SectionHeader) -> Self {
        self.with(|out| header.encode_start(out))
    }

    fn list(self, list: &BlockList) -> Self {
        self.with(|out| list.encode(out))
    }

    fn eos(self) -> Self {
        self.with(encode_end_of_section)
    }

    fn footer(self, id: SectionId) -> Self {
        self.with(|out| id.encode_footer(out))
    }

    fn part(self) -> Self {
        self.with(|out| RAM.encode_part(out))
    }

    fn end(self) -> Self {
        self.with(|out| RAM.encode_end(out)).eos().footer(RAM)
    }

    fn command(self, command: &Command) -> Self {
        self.with(|out| command.encode(out))
    }

    fn word(self, word: u64) -> Self {
        self.bytes(&word.to_be_bytes())
    }

    /// A record word that names its block.
    fn named(self, word: u64, block: &str) -> Self {
        self.word(word).with(|out| name(block).encode(out))
    }

    /// Reads the stream up to an error.
    fn read(&self) -> Result<MainDecoder, Error> {
        self.read_with(MainOptions::default())
    }

    fn read_with(&self, options: MainOptions) -> Result<MainDecoder, Error> {
        let mut decoder = MainDecoder::new(options);
        let mut rest = self.0.as_slice();
        loop {
            let (taken, decoded) = decoder.decode(rest)?;
            rest = &rest[taken..];
            if matches!(decoded, Decoded::NeedMore(_)) {
                return Ok(decoder);
            }
            let payload = usize::try_from(decoder.payload_left()).unwrap().min(rest.len());
            decoder.payload_taken(payload as u64);
            rest = &rest[payload..];
            if decoder.payload_left() > 0 {
                return Ok(decoder);
            }
        }
    }

    /// The error in what was appended last: `at` bytes behind `before`.
    #[track_caller]
    fn fails(self, before: &Self, at: usize, text: &str) {
        let error = self.read().map(|_| ()).expect_err("the stream is bad");
        let offset = before.0.len() + at;
        assert_eq!(error.to_string(), format!("byte {offset}: {text}"));
    }
}

fn ram_header() -> SectionHeader {
    SectionHeader { id: RAM, name: name("ram"), instance_id: 0, version_id: 4 }
}

fn two_blocks() -> BlockList {
    let block = |text, pages: u64| BlockInfo::new(name(text), pages << 12);
    BlockList::new([block("pc.ram", 8), block("pc.bios", 2)]).unwrap()
}

fn advise() -> Command {
    Command::PostcopyAdvise(Some(PageSizes { host_summary: 4096, target: 4096 }))
}

fn package() -> Stream {
    Stream::default()
        .command(&Command::PostcopyListen)
        .command(&Command::Ping(3))
        .command(&Command::PostcopyRun)
}

#[test]
fn header() {
    Stream::default().bytes(b"QEVN\0\0\0\x03").fails(
        &Stream::default(),
        0,
        "expected the magic 0x5145564d (\"QEVM\"), found 0x5145564e",
    );
    Stream::default().bytes(b"QEVM\0\0\0\x02").fails(
        &Stream::default(),
        4,
        "expected stream format version 3, found version 2",
    );
}

#[test]
fn newer_versions() {
    let newer = SectionHeader { version_id: 5, ..ram_header() };
    let before = Stream::new();
    before.clone().start(&newer).fails(
        &before,
        0,
        "expected section \"ram\" version 4, found version 5",
    );
}

#[test]
fn configuration() {
    let header = Stream::default().with(|out| FileHeader.encode(out));
    header.clone().bytes(&[7, 0, 0, 1, 0]).fails(
        &header,
        1,
        "expected a machine type's name of 1 to 255 bytes, found 0x100",
    );
    let subsection = |text: &str| {
        Stream::new().bytes(&[5]).with(|out| name(text).encode(out)).bytes(&[0, 0, 0, 1])
    };
    let order = "expected a configuration subsection (target-page-bits, capabilities, uuid, in \
                 this order), found";
    // A configuration is one message: its errors come before anything of it is consumed, and
    // still name their place.
    subsection("configuration/other").fails(
        &Stream::new(),
        0,
        &format!("{order} \"configuration/other\""),
    );
    let uuid = subsection("configuration/uuid").bytes(&[1; 16]);
    let doubled = uuid.clone().bytes(&subsection("configuration/uuid").0[Stream::new().0.len()..]);
    doubled.fails(&uuid, 0, &format!("{order} \"configuration/uuid\""));
    let newer = Stream::new().bytes(&[5]).with(|out| name("configuration/uuid").encode(out));
    newer.clone().bytes(&[0, 0, 0, 2]).fails(
        &newer,
        0,
        "expected configuration subsection version 1, found version 2",
    );
    let bits = subsection("configuration/target-page-bits");
    bits.clone().bytes(&[0, 0, 0, 9]).fails(&bits, 0, "expected 10 to 20 page bits, found 0x9");
    let list = subsection("configuration/capabilities");
    list.clone().bytes(&[0xff; 4]).fails(
        &list,
        0,
        "number of capabilities: 4294967295 is more than the 64 allowed",
    );
}

#[test]
fn other_page_size() {
    let mut stream = Stream::default().with(|out| FileHeader.encode(out));
    let mut configuration = Configuration::new(name("virt-10.0"));
    configuration.target_page = TargetPage::from_bits(16);
    configuration.encode(&mut stream.0);
    encode_eof(&mut stream.0);
    let error = stream.read().unwrap_err();
    assert_eq!(error.kind, ErrorKind::TargetPage { expected: 4096, found: 65536 });
    let any = MainOptions { target_page: None, ..MainOptions::default() };
    let error = stream.read_with(any).unwrap_err();
    assert!(matches!(error.kind, ErrorKind::Unexpected { .. }), "only EOF is wrong: {error}");
}

#[test]
fn unknown_sections() {
    let before = Stream::new();
    let vfio = SectionHeader { name: name("0000:00:03.0/vfio"), ..ram_header() };
    before.clone().start(&vfio).fails(
        &before,
        0,
        "expected section \"ram\", found the unknown iterable section \"0000:00:03.0/vfio\"",
    );
    before.clone().bytes(&[0x55]).fails(
        &before,
        0,
        "expected a section, a command or the end of the stream, found 0x55",
    );
    let before = Stream::with_ram();
    before.clone().with(|out| SectionId(9).encode_part(out)).fails(
        &before,
        0,
        "section 9 was never started",
    );
}

#[test]
fn order_of_sections() {
    let before = Stream::with_ram();
    before.clone().start(&ram_header()).fails(&before, 0, "section 2 starts \"ram\" a second time");
    before.clone().with(encode_eof).fails(
        &before,
        0,
        "expected the end of section \"ram\" before that of the stream, found 0x0",
    );
    let full = DeviceSection { header: ram_header(), payload: vec![0] };
    before.clone().with(|out| full.encode(out)).fails(
        &before,
        0,
        "section 2 brings device state while RAM is not complete, or outside its package",
    );
    let ended = Stream::with_ram().end();
    ended.clone().part().fails(&ended, 0, "section 2 goes on after its end");
    let early = Stream::new();
    early.clone().part().fails(&early, 0, "section 2 was never started");
}

#[test]
fn footers() {
    let before = Stream::new().start(&ram_header()).list(&two_blocks()).eos();
    before.clone().footer(SectionId(3)).fails(
        &before,
        0,
        "expected the footer of section 2, found 0x7e00000003",
    );
    before.clone().bytes(&[2, 0, 0, 0, 2]).fails(
        &before,
        0,
        "expected the footer of section 2, found 0x200000002",
    );
}

#[test]
fn commands() {
    let before = Stream::new();
    before.clone().bytes(&[8, 0, 0, 0, 0]).fails(
        &before,
        1,
        "expected a command of 1 to 11, found 0",
    );
    before.clone().bytes(&[8, 0, 12, 0, 0]).fails(
        &before,
        1,
        "expected a command of 1 to 11, found 12",
    );
    before.clone().bytes(&[8, 0, 2, 0, 5]).fails(
        &before,
        3,
        "command PING: expected a payload of 4 bytes, found 5 bytes",
    );
    before.clone().bytes(&[8, 0, 3, 0, 8]).fails(
        &before,
        3,
        "command POSTCOPY_ADVISE: expected a payload of 16 or 0 bytes, found 8 bytes",
    );
    before.clone().bytes(&[8, 0, 6, 0, 19]).fails(
        &before,
        3,
        "command POSTCOPY_RAM_DISCARD: expected a payload of 20 bytes or more, found 19 bytes",
    );
    before.clone().bytes(&[8, 0, 6, 0xff, 0xff]).fails(
        &before,
        3,
        "bytes of a command's payload: 65535 is more than the 4091 allowed",
    );
    before.clone().bytes(&[8, 0, 10, 0, 4, 9, 1, 1, 1]).fails(
        &before,
        3,
        "command RECV_BITMAP: expected a payload of as many bytes as its fields have, found 4 bytes",
    );
}

#[test]
fn order_of_commands() {
    let wrong = |before: Stream, command: &Command, state: &str| {
        let text = format!("expected no {} here: {state}", command.name());
        before.clone().command(command).fails(&before, 0, &text);
    };
    let discard = Command::RamDiscard(RamDiscard {
        block: name("pc.ram"),
        ranges: vec![DiscardRange { start: whimbrel_wire::BlockOffset(0), length: 4096 }],
    });
    let package = Command::Packaged { len: 23 };
    let ping = Command::Ping(1);
    wrong(Stream::new(), &ping, "the return path was not opened before");
    wrong(Stream::postcopy(), &advise(), "it comes once, before RAM");
    wrong(Stream::with_ram(), &advise(), "it comes once, before RAM");
    wrong(Stream::with_ram(), &discard, "no postcopy of RAM was announced before");
    wrong(Stream::with_ram(), &package, "no postcopy was announced before");
    wrong(Stream::postcopy(), &Command::PostcopyListen, "it stands in a package only");
    wrong(Stream::postcopy(), &Command::PostcopyRun, "it stands in a package only");
    wrong(Stream::postcopy(), &Command::PostcopyResume, "it ends a recovery, once");
    let recv = Command::RecvBitmap(name("pc.ram"));
    wrong(Stream::postcopy(), &recv, "it is asked for in a recovery only");
    let running = Stream::postcopy().command(&discard).command(&Command::Packaged { len: 19 });
    let running = running.bytes(&self::package().0);
    assert!(running.read().is_ok());
    wrong(running.clone(), &Command::PostcopyRun, "the guest was started already");
    wrong(running.clone(), &package, "it comes once");
    wrong(running.clone(), &discard, "the guest runs on what would be discarded");
    let switch = Command::SwitchoverStart;
    wrong(running.clone(), &switch, "the guest was switched over already");
    wrong(running, &Command::EnableColo, "it comes before RAM, without postcopy");
}

#[test]
fn packages() {
    let read =
        |stream: &Stream| Package::decode(&stream.0, 100, whimbrel_wire::Delimiting::Footers);
    assert_eq!(read(&package()).unwrap().pings, [3]);
    let second = package().command(&Command::PostcopyRun);
    let error = read(&second).unwrap_err();
    assert_eq!(error.to_string(), "byte 119: device state: it cannot be cut into sections");
    let mut cut = package();
    cut.0.pop();
    assert!(matches!(read(&cut).unwrap_err().kind, ErrorKind::Truncated { .. }));
    let unannounced = Stream::default().command(&Command::PostcopyRun);
    assert!(read(&unannounced).is_err());
    let large = Stream::postcopy();
    large.clone().command(&Command::Packaged { len: u32::MAX }).fails(
        &large,
        5,
        "bytes of a package (1 at least): 4294967295 is more than the 1073741824 allowed",
    );
}

#[test]
fn block_lists() {
    let start = || Stream::new().start(&ram_header());
    start().word(0x8008).fails(
        &start(),
        0,
        "expected the RAM block list, found a RAM record with flags 0x8",
    );
    let first = start().word(0x8004).bytes(b"\x06pc.ram");
    first.clone().word(0x9000).fails(
        &first,
        0,
        "expected RAM blocks of 32768 bytes in total, found 36864 with \"pc.ram\"",
    );
    first.clone().word(!0xfff).fails(
        &first,
        0,
        "expected RAM blocks of 32768 bytes in total, found 18446744073709547520 with \"pc.ram\"",
    );
    first.clone().word(0x123).fails(
        &first,
        0,
        "RAM block \"pc.ram\": expected a length of whole pages, found 0x123",
    );
    let second = first.word(0x4000);
    second.clone().bytes(b"\x06pc.ram").word(0x4000).fails(
        &second,
        0,
        "expected a new RAM block, found \"pc.ram\" a second time",
    );
    second.clone().bytes(b"\0").fails(&second, 0, "expected a name of 1 to 255 bytes, found 0x0");
    let mut many = start().word(0x1000_0004);
    let list: Vec<u8> = (0..=4096_u32)
        .flat_map(|number| [&[4], number.to_be_bytes().as_slice(), &[0; 8]].concat())
        .collect();
    many = many.bytes(&list);
    let error = many.read().unwrap_err();
    assert_eq!(error.kind, ErrorKind::TooLarge { what: "RAM blocks", found: 4097, limit: 4096 });
}

#[test]
fn page_sizes_of_blocks() {
    let start = Stream::new()
        .command(&advise())
        .start(&ram_header())
        .word(0x20_0004)
        .bytes(b"\x06pc.ram")
        .word(0x20_0000);
    let decoder = start.clone().word(0x20_0000).eos().footer(RAM).part().read().unwrap();
    let blocks = decoder.blocks();
    let (_, block) = blocks.iter().next().unwrap();
    assert_eq!(block.page_size, Some(0x20_0000));
    let decoder = start.clone().eos().footer(RAM).part().read().unwrap();
    assert_eq!(decoder.blocks().iter().next().unwrap().1.page_size, None);
    start.clone().word(1 << 50).fails(
        &start,
        0,
        "RAM block \"pc.ram\": expected a page size of at most 1 TiB, found 0x4000000000000",
    );
    // A word that is neither a page size nor a legal record.
    start.clone().word(0x3000).fails(
        &start,
        0,
        "expected one record type, found a RAM record with flags 0x0",
    );
}

#[test]
fn records() {
    let part = Stream::with_ram().part();
    let bad = |word: u64, text: &str| part.clone().named(word, "pc.ram").fails(&part, 0, text);
    let flags =
        |flags: u64| format!("expected one record type, found a RAM record with flags {flags:#x}");
    for wrong in [0x000, 0x001, 0x00a, 0x048, 0x004, 0x080, 0x100, 0x030, 0x220, 0x400] {
        bad(wrong, &flags(wrong));
    }
    bad(0x1010, "expected no offset in a word without a page, found 0x1000");
    bad(
        0x0028,
        "expected a block name, found a record that continues a block although none was named",
    );
    bad(0x8008, "expected an offset inside RAM block \"pc.ram\" of 0x8000 bytes, found 0x8000");
    part.clone().named(8, "pc.vga").fails(
        &part,
        8,
        "expected the name of an announced RAM block, found \"pc.vga\"",
    );
    let named = part.clone().named(2, "pc.bios").bytes(&[0]);
    named.clone().word(0x2022).bytes(&[0]).fails(
        &named,
        0,
        "expected an offset inside RAM block \"pc.bios\" of 0x2000 bytes, found 0x2000",
    );
    named.clone().word(0x1022).bytes(&[7]).fails(
        &named,
        8,
        "expected the zero byte of a zero page, found 0x7",
    );
    named.clone().word(0x1060).bytes(&[2, 0, 0]).fails(
        &named,
        8,
        "expected the XBZRLE mark 0x1, found 0x2",
    );
    named.clone().word(0x1060).bytes(&[1, 0x10, 1]).fails(
        &named,
        9,
        "bytes of an XBZRLE delta: 4097 is more than the 4096 allowed",
    );
}

#[test]
fn records_of_a_postcopy() {
    let running = Stream::postcopy().command(&Command::Packaged { len: 19 }).bytes(&package().0);
    let part = running.part();
    for flags in [0x200_u64, 0x40] {
        part.clone().named(flags, "pc.ram").fails(
            &part,
            0,
            &format!(
                "expected a zero page, a page or the end of the section, found a RAM record with \
                 flags {flags:#x}"
            ),
        );
    }
}

#[test]
fn trailing_bytes() {
    let ended = Stream::with_ram().end().with(encode_eof);
    ended.clone().bytes(&[3]).fails(
        &ended,
        0,
        "expected the end of the stream, found the byte 0x03",
    );
}

#[test]
fn truncated_streams_name_what_is_missing() {
    let whole = Stream::with_ram().end().with(encode_eof);
    for len in 0..whole.0.len() {
        let cut = Stream(whole.0[..len].to_vec());
        let mut decoder = MainDecoder::new(MainOptions::default());
        let mut at = 0;
        loop {
            let (taken, decoded) = decoder.decode(&cut.0[at..]).unwrap();
            at += taken;
            if matches!(decoded, Decoded::NeedMore(_)) {
                break;
            }
        }
        let error = decoder.close(&cut.0[at..]).unwrap_err();
        assert_eq!(error.offset, len as u64);
        assert!(matches!(error.kind, ErrorKind::Truncated { .. }), "{len}: {error}");
    }
    assert!(whole.read().unwrap().is_complete());
}

#[test]
fn own_sections() {
    let before = Stream::of_machine("whimbrel-1").ram().end();
    let header =
        SectionHeader { id: SectionId(7), name: name("cpu"), instance_id: 1, version_id: 1 };
    let section = DeviceSection::with_own_length(header.clone(), b"state");
    let good = before.clone().with(|out| section.encode(out)).with(encode_eof);
    assert!(good.read().unwrap().is_complete());
    assert_eq!(section.own_data(), Ok(b"state".as_slice()));
    let doubled = before.clone().with(|out| section.encode(out));
    doubled.clone().with(|out| section.encode(out)).fails(
        &doubled,
        0,
        "section 7 has a number that another section has",
    );
    let huge = before.clone().with(|out| header.encode_full(out));
    let error = huge.clone().bytes(&[0xff; 4]).read().unwrap_err();
    assert_eq!(error.offset, huge.0.len() as u64);
    assert!(matches!(error.kind, ErrorKind::TooLarge { .. }), "{error}");
    let short = huge.clone().bytes(&[0, 0, 0, 1, 9, 0x7e, 0, 0, 0, 8]);
    short.fails(&huge, 5, "expected the footer of section 7, found 0x7e00000008");
}

#[test]
fn mapped_ram_places() {
    let mut configured = Stream::default().with(|out| FileHeader.encode(out));
    let mut configuration = Configuration::new(name("pc-q35-10.0"));
    configuration.capabilities.push(name("mapped-ram"));
    configuration.encode(&mut configured.0);
    let entry = configured.start(&ram_header()).word(0x8004).bytes(b"\x06pc.ram").word(0x8000);
    let place = |version: u32, page: u64, bitmap: u64, pages: u64| {
        entry.clone().bytes(&version.to_be_bytes()).word(page).word(bitmap).word(pages)
    };
    let fails = |stream: Stream, at, text: &str| stream.fails(&entry, at, text);
    fails(place(2, 4096, 200, 1 << 20), 0, "expected mapped-ram version 1, found version 2");
    let field = |text: &str| format!("RAM block \"pc.ram\": expected {text}");
    fails(place(1, 8192, 200, 1 << 20), 4, &field("the guest's page size, found 0x2000"));
    fails(place(1, 4096, 10, 1 << 20), 12, &field("a bitmap after the header, found 0xa"));
    let outside = "pages after the bitmap, inside the file, found";
    fails(place(1, 4096, 4096, 4096), 20, &field(&format!("{outside} 0x1000")));
    fails(place(1, 4096, 200, !0xfff), 20, &field(&format!("{outside} 0xfffffffffffff000")));
    fails(
        place(1, 4096, 200, 0x1800),
        20,
        &field("pages at a multiple of the page size, found 0x1800"),
    );
    let placed = place(1, 4096, 4096, 0x10_0000);
    let left = 0x10_8000 - placed.0.len() as u64;
    let decoder = placed.read().unwrap();
    assert_eq!(decoder.payload_left(), left);
}

#[test]
fn return_path() {
    let fails = |bytes: &[u8], text: &str| {
        let mut decoder = ReturnDecoder::new(TargetPage::FOUR_KIB);
        let mut rest = bytes;
        let error = loop {
            match decoder.decode(rest) {
                Ok((0, decoded)) => panic!("expected an error, found {decoded:?}"),
                Ok((taken, _)) => rest = &rest[taken..],
                Err(error) => break error,
            }
        };
        assert_eq!(error.to_string(), text);
    };
    fails(&[0, 8, 0, 0], "byte 0: expected a return path message of 1 to 7, found 0x8");
    fails(&[0, 1, 0, 5], "byte 2: expected 4 bytes of payload, found 0x5");
    fails(&[0, 3, 2, 1], "byte 2: expected 14 to 268 bytes of payload, found 0x201");
    let request = [[0, 4, 0, 12].as_slice(), &[0; 8], &[0, 0, 16, 0]].concat();
    fails(
        &request,
        "byte 0: expected a block name, found a record that continues a block although none was \
         named",
    );
    let named = |start: u64, len: u32| {
        [[0, 3, 0, 15].as_slice(), &start.to_be_bytes(), &len.to_be_bytes(), b"\x02ab"].concat()
    };
    fails(&named(1, 4096), "byte 4: expected a request from the start of a page, found 0x1");
    fails(&named(0, 0), "byte 12: expected a request of whole pages, found 0x0");
    fails(&named(0, 100), "byte 12: expected a request of whole pages, found 0x64");
    let mut longer = named(0, 4096);
    longer[3] = 16;
    longer.push(0);
    fails(&longer, "byte 2: expected a payload as long as its fields, found 0x10");
    fails(&[0, 6, 0, 4, 0, 0, 0, 2], "byte 4: expected RESUME_ACK of 1, found 0x2");
    fails(
        &[0, 1, 0, 4, 0, 0, 0, 0, 9],
        "byte 8: expected the end of the stream, found the byte 0x09",
    );
    let bitmap = [0, 5, 0, 2, 1, b'm'];
    fails(
        &[bitmap.as_slice(), &[0, 0, 0, 0, 0, 0, 0, 7]].concat(),
        "byte 6: expected the size of a bitmap in whole 64-bit words, found 0x7",
    );
    fails(
        &[bitmap.as_slice(), &[0xff, 0, 0, 0, 0, 0, 0, 0]].concat(),
        "byte 6: bytes of a bitmap: 18374686479671623680 is more than the 2147483648 allowed",
    );
}

#[test]
fn recovery_needs_a_postcopy() {
    assert!(Stream::with_ram().read().unwrap().reconnected().is_err());
    let running = Stream::postcopy().command(&Command::Packaged { len: 19 }).bytes(&package().0);
    let mut decoder = running.read().unwrap().reconnected().unwrap();
    let mut early = Vec::new();
    RAM.encode_part(&mut early);
    let error = decoder.decode(&early).unwrap_err();
    assert_eq!(error.to_string(), "byte 0: section 2 comes before POSTCOPY_RESUME");
}

#[test]
fn words_of_colo() {
    let read = |words: &[u32]| {
        let mut stream = Stream::with_ram().end().with(encode_eof);
        words.iter().for_each(|word| stream.0.extend_from_slice(&word.to_be_bytes()));
        let before = stream.0.len() as u64;
        let error = stream.read_with(MainOptions { colo: true, ..MainOptions::default() });
        error.map(|_| ()).map_err(|error| (before - error.offset, error.kind.to_string()))
    };
    assert_eq!(read(&[1, 3]), Ok(()));
    let wrong = |text: &str| Err((4, text.to_owned()));
    assert_eq!(read(&[9]), wrong("expected a COLO message of 0 to 6, found 0x9"));
    assert_eq!(read(&[5]), wrong("expected CHECKPOINT_REQUEST (1), found 0x5"));
    assert_eq!(read(&[1, 1]), wrong("expected VMSTATE_SEND (3), found 0x1"));
    // A checkpoint is RAM's end and the end mark: nothing else.
    let part = Stream::with_ram().end().with(encode_eof).word(1 << 32 | 3).part();
    let error = part.read_with(MainOptions { colo: true, ..MainOptions::default() }).unwrap_err();
    assert_eq!(error.kind.to_string(), "section 2 is not part of a checkpoint");
}
