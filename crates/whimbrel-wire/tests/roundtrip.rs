//! Whatever is written is read back the same, in pieces of any size; and arbitrary bytes are
//! refused, never worse.
#![expect(clippy::unwrap_used, reason = "helpers of tests fail like tests")]

mod support;

use std::sync::Arc;

use proptest::collection::vec;
use proptest::option;
use proptest::prelude::*;
use support::{
    Decode, Item, PAGE, Pieces, drive, encode_main, encode_multifd, encode_record, encode_return,
};
use whimbrel_wire::multifd::{DevicePacketHeader, packet_flag};
use whimbrel_wire::{
    BlockInfo, BlockList, BlockOffset, ColoMessage, Command, Configuration, Decoded, Delimiting,
    DeviceSection, DeviceState, DeviceTail, DiscardRange, FileHeader, MainDecoder, MainOptions,
    MappedRamHeader, MultifdDecoded, MultifdDecoder, MultifdInit, Name, Package, PacketHeader,
    PageSizes, RamDiscard, RamRecord, RecordDecoder, RecordEncoder, RecordFormat, ReturnDecoded,
    ReturnDecoder, ReturnMessage, SectionHeader, SectionId, TargetPage, VmDescription, vmdesc,
    xbzrle,
};

fn names() -> impl Strategy<Value = Name> {
    let any = vec(any::<u8>(), 1..=255).prop_map(|bytes| Name::new(bytes).unwrap());
    prop_oneof![4 => "[a-z0-9:./@-]{1,20}".prop_map(|text| Name::new(text).unwrap()), 1 => any]
}

fn text_names() -> impl Strategy<Value = Name> {
    "[a-z0-9:./@ \"\\\\-]{1,20}".prop_map(|text| Name::new(text).unwrap())
}

fn pieces() -> impl Strategy<Value = Pieces> {
    prop_oneof![
        (1_usize..40).prop_map(Pieces::Of),
        any::<u64>().prop_map(|seed| Pieces::Random(seed | 1)),
    ]
}

/// A list of blocks; with page sizes if a postcopy was announced.
fn block_lists(page_sizes: bool) -> impl Strategy<Value = Arc<BlockList>> {
    let size = if page_sizes { option::of(12_u32..31).boxed() } else { Just(None).boxed() };
    vec((names(), 1_u64..5000, size), 1..20).prop_map(|blocks| {
        let mut list: Vec<BlockInfo> = Vec::new();
        for (name, pages, size) in blocks {
            if list.iter().all(|block| block.name != name) {
                let mut block = BlockInfo::new(name, pages << 12);
                block.page_size = size.map(|bits| 1 << bits);
                list.push(block);
            }
        }
        Arc::new(BlockList::new(list).unwrap())
    })
}

/// A record, as choices that are made real with a list of blocks.
fn records() -> impl Strategy<Value = Vec<(u8, usize, u64, usize)>> {
    vec((0_u8..4, any::<usize>(), any::<u64>(), 0_usize..=4096), 0..40)
}

static ZEROS: [u8; 4096] = [0x6b; 4096];

fn real_records(
    blocks: &BlockList,
    choices: &[(u8, usize, u64, usize)],
    format: RecordFormat,
) -> Vec<Item<'static, RamRecord>> {
    let real = |&(kind, block, page, len): &(u8, usize, u64, usize)| {
        let (index, info) = blocks.iter().nth(block % blocks.len()).unwrap();
        let offset = BlockOffset((page % (info.used_length >> 12)) << 12);
        let precopy = format == RecordFormat::Precopy;
        let message = match kind {
            0 => RamRecord::Zero { block: index, offset },
            1 if precopy => RamRecord::XbzrleFollows { block: index, offset, len },
            2 if precopy => RamRecord::MultifdFlush,
            _ => RamRecord::PageFollows { block: index, offset, len: 4096 },
        };
        let payload = match message {
            RamRecord::XbzrleFollows { len, .. } | RamRecord::PageFollows { len, .. } => len,
            _ => 0,
        };
        Item { message, payload: &ZEROS[..payload], named: false, offset: 0 }
    };
    choices.iter().map(real).collect()
}

fn commands() -> impl Strategy<Value = Command> {
    let range = (0_u64..1 << 40, 1_u64..1 << 40)
        .prop_map(|(start, length)| DiscardRange { start: BlockOffset(start), length });
    prop_oneof![
        Just(Command::OpenReturnPath),
        any::<u32>().prop_map(Command::Ping),
        option::of((any::<u64>(), any::<u64>())).prop_map(|sizes| Command::PostcopyAdvise(
            sizes.map(|(host_summary, target)| PageSizes { host_summary, target })
        )),
        Just(Command::PostcopyListen),
        Just(Command::PostcopyRun),
        (names(), vec(range, 1..=RamDiscard::RANGES_MAX))
            .prop_map(|(block, ranges)| Command::RamDiscard(RamDiscard { block, ranges })),
        Just(Command::EnableColo),
        Just(Command::PostcopyResume),
        names().prop_map(Command::RecvBitmap),
        Just(Command::SwitchoverStart),
        any::<([u8; 16], [u8; 32], u32)>().prop_map(|(id, secret, beat_ms)| {
            Command::Identity(whimbrel_wire::recovery::Identity { id, secret, beat_ms })
        }),
    ]
}

fn configurations(machine: &'static str) -> impl Strategy<Value = Configuration> {
    let page = option::of(10_u32..=20).prop_map(|bits| bits.and_then(TargetPage::from_bits));
    let capabilities = vec(text_names(), 0..4);
    (page, capabilities, option::of(any::<[u8; 16]>())).prop_map(
        move |(target_page, capabilities, uuid)| Configuration {
            machine: Name::new(machine).unwrap(),
            target_page,
            capabilities,
            uuid,
        },
    )
}

/// Device sections with numbers of their own.
fn sections(names: impl Strategy<Value = Name>) -> impl Strategy<Value = Vec<DeviceSection>> {
    vec((names, any::<u32>(), vec(any::<u8>(), 0..200)), 0..8).prop_map(|sections| {
        let mut list: Vec<DeviceSection> = Vec::new();
        for (number, (name, version_id, data)) in sections.into_iter().enumerate() {
            let number = u32::try_from(number).unwrap();
            let header = SectionHeader {
                id: SectionId(100 + number),
                name,
                instance_id: number,
                version_id,
            };
            list.push(DeviceSection::with_own_length(header, &data));
        }
        list
    })
}

/// What a main stream says, as messages: header, RAM, and a machine of whimbrel's own.
fn whimbrel_stream(
    configuration: Configuration,
    blocks: &Arc<BlockList>,
    rounds: &[Vec<Item<'static, RamRecord>>],
    sections: Vec<DeviceSection>,
    describe: bool,
) -> Vec<Item<'static, Decoded>> {
    let id = SectionId(3);
    let header =
        SectionHeader { id, name: Name::new("ram").unwrap(), instance_id: 0, version_id: 4 };
    let mut messages = vec![
        Decoded::Header(FileHeader),
        Decoded::Configuration(configuration),
        Decoded::Command(Command::OpenReturnPath),
        Decoded::Command(Command::Ping(1)),
        Decoded::SectionStart(header),
        Decoded::RamSetup(Arc::clone(blocks)),
        Decoded::Ram(RamRecord::EndOfSection),
        Decoded::Footer(id),
    ];
    let plain = |message| Item { message, payload: &[] as &'static [u8], named: false, offset: 0 };
    let mut items: Vec<_> = messages.drain(..).map(plain).collect();
    for (number, round) in rounds.iter().enumerate() {
        let last = number + 1 == rounds.len();
        items.push(plain(if last { Decoded::SectionEnd(id) } else { Decoded::SectionPart(id) }));
        items.extend(round.iter().map(|item| Item {
            message: Decoded::Ram(item.message),
            payload: item.payload,
            named: false,
            offset: 0,
        }));
        items.push(plain(Decoded::Ram(RamRecord::EndOfSection)));
        items.push(plain(Decoded::Footer(id)));
    }
    let json = vmdesc::describe(4096, &sections);
    items.extend(sections.into_iter().map(|section| plain(Decoded::DeviceSection(section))));
    items.push(plain(Decoded::Command(Command::Ping(9))));
    items.push(plain(Decoded::Eof));
    if describe {
        items.push(plain(Decoded::VmDescription(json)));
    }
    items
}

/// Only messages and payloads: where they stood is not compared.
fn contents<'a, M: Clone>(items: &[Item<'a, M>]) -> Vec<(M, &'a [u8])> {
    items.iter().map(|item| (item.message.clone(), item.payload)).collect()
}

proptest! {
    #[test]
    fn main_streams(
        configuration in configurations("whimbrel-test"),
        blocks in block_lists(false),
        rounds in vec(records(), 1..4),
        sections in sections(text_names()),
        describe: bool,
        pieces in pieces(),
    ) {
        let mut configuration = configuration;
        configuration.target_page = None;
        configuration.capabilities.retain(|name| *name != "mapped-ram" && *name != "x-ignore-shared");
        let rounds: Vec<_> = rounds
            .iter()
            .map(|round| real_records(&blocks, round, RecordFormat::Precopy))
            .collect();
        let items = whimbrel_stream(configuration, &blocks, &rounds, sections, describe);
        let bytes = encode_main(&items, &blocks, None, Delimiting::OwnLength);
        let mut decoder = MainDecoder::new(MainOptions::default());
        let driven = drive(&mut decoder, &bytes, pieces).unwrap();
        prop_assert_eq!(contents(&driven.items), contents(&items));
        prop_assert_eq!(decoder.delimiting(), Delimiting::OwnLength);
        prop_assert_eq!(decoder.close(driven.rest), Ok(None));
    }

    #[test]
    fn a_byte_changed_in_a_main_stream(
        blocks in block_lists(false),
        records in records(),
        sections in sections(text_names()),
        place: prop::sample::Index,
        change in 1_u8..,
        cut: bool,
    ) {
        let configuration = Configuration::new(Name::new("whimbrel-test").unwrap());
        let rounds = [real_records(&blocks, &records, RecordFormat::Precopy)];
        let items = whimbrel_stream(configuration, &blocks, &rounds, sections, true);
        let mut bytes = encode_main(&items, &blocks, None, Delimiting::OwnLength);
        let place = place.index(bytes.len());
        if cut {
            bytes.truncate(place);
        } else {
            bytes[place] ^= change;
        }
        let outcome = |pieces| {
            let mut decoder = MainDecoder::new(MainOptions::default());
            match drive(&mut decoder, &bytes, pieces) {
                Ok(driven) => {
                    let contents = contents(&driven.items);
                    (Some(contents), decoder.close(driven.rest).err())
                }
                Err(error) => (None, Some(error)),
            }
        };
        let whole = outcome(Pieces::Of(usize::MAX / 2));
        if cut {
            prop_assert!(whole.0.is_some(), "what is cut was right up to there: {:?}", whole.1);
        }
        prop_assert_eq!(whole, outcome(Pieces::Of(1)));
    }

    #[test]
    fn configuration_subsections(configuration in configurations("virt-10.0"), pieces in pieces()) {
        let mut bytes = Vec::new();
        FileHeader.encode(&mut bytes);
        configuration.encode(&mut bytes);
        bytes.push(8);
        let options = MainOptions { target_page: None, ..MainOptions::default() };
        let mut decoder = MainDecoder::new(options);
        let driven = drive(&mut decoder, &bytes, pieces).unwrap();
        prop_assert_eq!(&driven.items[1].message, &Decoded::Configuration(configuration.clone()));
        prop_assert_eq!(decoder.target_page(), configuration.target_page.unwrap_or_default());
    }

    #[test]
    fn block_lists_with_page_sizes(blocks in block_lists(true), pieces in pieces()) {
        let id = SectionId(1);
        let name = Name::new("ram").unwrap();
        let header = SectionHeader { id, name, instance_id: 0, version_id: 4 };
        let sizes = PageSizes { host_summary: 4096, target: 4096 };
        let mut bytes = Vec::new();
        FileHeader.encode(&mut bytes);
        Configuration::new(Name::new("pc").unwrap()).encode(&mut bytes);
        Command::PostcopyAdvise(Some(sizes)).encode(&mut bytes);
        header.encode_start(&mut bytes);
        blocks.encode(&mut bytes);
        whimbrel_wire::encode_end_of_section(&mut bytes);
        let mut decoder = MainDecoder::new(MainOptions::default());
        let driven = drive(&mut decoder, &bytes, pieces).unwrap();
        prop_assert!(driven.rest.is_empty());
        prop_assert_eq!(decoder.blocks(), &blocks);
        let last = driven.items.last().unwrap();
        prop_assert_eq!(&last.message, &Decoded::Ram(RamRecord::EndOfSection));
    }

    #[test]
    fn mapped_ram_files(pages in vec(1_u64..600, 1..5), pieces in pieces()) {
        let id = SectionId(1);
        let header =
            SectionHeader { id, name: Name::new("ram").unwrap(), instance_id: 0, version_id: 4 };
        let mut configuration = Configuration::new(Name::new("pc").unwrap());
        configuration.capabilities.push(Name::new("mapped-ram").unwrap());
        let mut bytes = Vec::new();
        FileHeader.encode(&mut bytes);
        configuration.encode(&mut bytes);
        header.encode_start(&mut bytes);
        let total: u64 = pages.iter().sum();
        bytes.extend_from_slice(&(total << 12 | 4).to_be_bytes());
        let mut expected = Vec::new();
        for (number, pages) in pages.iter().enumerate() {
            let name = Name::new(format!("block{number}")).unwrap();
            let mut block = BlockInfo::new(name, pages << 12);
            block.encode(&mut bytes);
            let place = MappedRamHeader::place(bytes.len() as u64, pages << 12, PAGE).unwrap();
            place.encode(&mut bytes);
            prop_assert_eq!(place.bitmap_offset, bytes.len() as u64);
            block.mapped_ram = Some(place);
            bytes.resize(usize::try_from(place.end(pages << 12)).unwrap(), 0);
            expected.push(block);
        }
        whimbrel_wire::encode_end_of_section(&mut bytes);
        let mut decoder = MainDecoder::new(MainOptions::default());
        let driven = drive(&mut decoder, &bytes, pieces).unwrap();
        prop_assert!(driven.rest.is_empty());
        let found: Vec<_> = decoder.blocks().iter().map(|(_, block)| block.clone()).collect();
        prop_assert_eq!(found, expected);
    }

    #[test]
    fn commands_alone(list in vec(commands(), 1..10), pieces in pieces()) {
        // Any order is only legal where the order is not followed: in a package, at worst.
        for command in list {
            let mut bytes = Vec::new();
            command.encode(&mut bytes);
            let mut decoder = MainDecoder::learning_recovery(MainOptions::default());
            match drive(&mut decoder, &bytes, pieces) {
                Ok(driven) => {
                    let only = driven.items.iter().map(|item| item.message.clone());
                    prop_assert_eq!(only.collect::<Vec<_>>(), [Decoded::Command(command)]);
                }
                Err(error) => prop_assert!(
                    matches!(error.kind, whimbrel_wire::ErrorKind::CommandOrder { .. }),
                    "{}", error
                ),
            }
        }
    }

    #[test]
    fn bare_records(
        blocks in block_lists(false),
        choices in records(),
        postcopy: bool,
        pieces in pieces(),
    ) {
        let format = if postcopy { RecordFormat::Postcopy } else { RecordFormat::Precopy };
        let items = real_records(&blocks, &choices, format);
        let mut encoder = RecordEncoder::new(Arc::clone(&blocks));
        let mut bytes = Vec::new();
        items.iter().for_each(|item| encode_record(item, &mut encoder, &mut bytes));
        let mut decoder = RecordDecoder::new(blocks, PAGE, format);
        let driven = drive(&mut decoder, &bytes, pieces).unwrap();
        prop_assert!(driven.rest.is_empty());
        prop_assert_eq!(contents(&driven.items), contents(&items));
    }

    #[test]
    fn opaque_device_state(
        sections in sections(text_names()),
        commands in vec(any::<u32>(), 0..3),
        pieces in pieces(),
        trailing in vec(any::<u8>(), 0..20),
    ) {
        let mut state = DeviceState { sections, ..DeviceState::default() };
        let count = state.sections.len();
        state.commands = commands.iter().map(|value| (count, Command::Ping(*value))).collect();
        state.vmdesc = Some(vmdesc::describe(4096, &state.sections));
        let mut bytes = Vec::new();
        state.encode(&mut bytes);
        let end = bytes.len();
        bytes.extend_from_slice(&trailing);
        prop_assume!(count > 0);
        let mut tail = DeviceTail::new(0, 1 << 20);
        let (mut at, mut found, mut pieces) = (0, None, pieces);
        while found.is_none() {
            prop_assert!(at < bytes.len());
            let piece = &bytes[at..bytes.len().min(at + pieces.draw())];
            let (taken, state) = tail.feed(piece).unwrap();
            at += taken;
            found = state;
        }
        prop_assert_eq!(at, end);
        prop_assert_eq!(found, Some(state));
    }

    #[test]
    fn packages(sections in sections(text_names()), pings in vec(any::<u32>(), 0..3)) {
        let package = Package { sections, pings };
        let mut bytes = Vec::new();
        package.encode(&mut bytes);
        prop_assert_eq!(Package::decode(&bytes, 0, Delimiting::OwnLength).unwrap(), package);
    }

    #[test]
    fn descriptions_give_the_length_of_each_section(sections in sections(text_names())) {
        let description = VmDescription::parse(&vmdesc::describe(4096, &sections)).unwrap();
        prop_assert_eq!(description.len(), sections.len());
        for section in &sections {
            let len = description.payload_len(&section.header.name, section.header.instance_id);
            prop_assert_eq!(len, Some(section.payload.len() as u64));
        }
    }

    #[test]
    fn return_paths(choices in vec((0_u8..8, names(), any::<u32>()), 0..20), pieces in pieces()) {
        let mut items = Vec::new();
        let mut named = false;
        let mut push = |message, payload: &'static [u8]| {
            items.push(Item { message, payload, named: false, offset: 0 });
        };
        for (kind, block, value) in choices {
            let start = BlockOffset(u64::from(value) << 12);
            let len = (value % 512 + 1) << 12;
            push(ReturnDecoded::Message(match kind {
                0 => ReturnMessage::Pong(value),
                1 => ReturnMessage::SwitchoverAck,
                2 => ReturnMessage::ResumeAck(1),
                3 if named => ReturnMessage::RequestPages { start, len },
                4 => {
                    push(ReturnDecoded::Message(ReturnMessage::RecvBitmap(block)), &[]);
                    let words = usize::try_from(value % 100 + 1).unwrap();
                    let len = words as u64 * 8;
                    push(ReturnDecoded::BitmapFollows { len }, &ZEROS[..words * 8]);
                    push(ReturnDecoded::BitmapEnd, &[]);
                    continue;
                }
                _ => {
                    named = true;
                    ReturnMessage::RequestPagesOf { block, start, len }
                }
            }), &[]);
        }
        push(ReturnDecoded::Message(ReturnMessage::Shut(0)), &[]);
        push(ReturnDecoded::Colo(ColoMessage::CheckpointReady), &[]);
        push(ReturnDecoded::Colo(ColoMessage::VmstateSize(77)), &[]);
        let bytes = encode_return(&items);
        let mut decoder = ReturnDecoder::with_colo(PAGE);
        let driven = drive(&mut decoder, &bytes, pieces).unwrap();
        prop_assert_eq!(contents(&driven.items), contents(&items));
    }

    #[test]
    fn multifd_channels(
        uuid: [u8; 16],
        channel: u8,
        packets in vec((text_names(), vec(any::<u32>(), 0..128), 0_u8..4, any::<u64>()), 0..6),
        pieces in pieces(),
    ) {
        static DATA: [u8; 512 << 10] = [7; 512 << 10];
        let plain = |message| Item { message, payload: &DATA[..0], named: false, offset: 0 };
        let mut items = vec![plain(MultifdDecoded::Init(MultifdInit { uuid, channel }))];
        for (block, pages, kind, number) in packets {
            let offsets: Vec<_> =
                pages.iter().map(|page| BlockOffset(u64::from(*page) << 12)).collect();
            let (normal, zero) = offsets.split_at(offsets.len() / 2);
            let len = match kind {
                0 => normal.len() * 4096,
                _ => normal.len() * 100,
            };
            let flags = if kind == 0 { 0 } else { packet_flag::ZSTD };
            let short = u32::try_from(len).unwrap();
            let item = match kind {
                0 | 1 => MultifdDecoded::Packet(Box::new(PacketHeader::pages(
                    &block,
                    (normal.iter().copied(), zero.iter().copied()),
                    (flags, short, number),
                    PAGE,
                ))),
                2 => MultifdDecoded::Packet(Box::new(PacketHeader::sync(number, PAGE))),
                _ => MultifdDecoded::Device(DevicePacketHeader {
                    name: block,
                    instance_id: 3,
                    len: short + 1,
                }),
            };
            let len = match kind {
                0 | 1 => len,
                2 => 0,
                _ => len + 1,
            };
            items.push(Item { payload: &DATA[..len], ..plain(item) });
        }
        let bytes = encode_multifd(&items);
        let mut decoder = MultifdDecoder::new(PAGE);
        let driven = drive(&mut decoder, &bytes, pieces).unwrap();
        prop_assert!(contents(&driven.items) == contents(&items));
    }

    #[test]
    fn deltas(old in vec(any::<u8>(), 4096), runs in vec((any::<prop::sample::Index>(), 1_usize..300, any::<u8>()), 0..30)) {
        let mut new = old.clone();
        for (place, len, value) in runs {
            let place = place.index(new.len());
            let end = new.len().min(place + len);
            new[place..end].fill(value);
        }
        let mut delta = vec![1, 2, 3];
        match xbzrle::encode(&old, &new, &mut delta) {
            xbzrle::Delta::Unchanged => prop_assert_eq!(&old, &new),
            xbzrle::Delta::TooLong => prop_assert!(delta.len() == 3),
            xbzrle::Delta::Encoded(len) => {
                prop_assert!(len == delta.len() - 3 && len < 4096);
                let mut page = old;
                xbzrle::decode(&delta[3..], &mut page).unwrap();
                prop_assert_eq!(page, new);
            }
        }
    }

    #[test]
    fn arbitrary_bytes(bytes in vec(any::<u8>(), 0..600), format in 0_usize..3) {
        let format = [RecordFormat::Precopy, RecordFormat::Postcopy, RecordFormat::MappedRam][format];
        let headed = [b"QEVM\0\0\0\x03\x07\0\0\0\x02pc".as_slice(), &bytes].concat();
        same_in_pieces(|| MainDecoder::new(MainOptions::default()), &bytes);
        same_in_pieces(|| MainDecoder::new(MainOptions::default()), &headed);
        same_in_pieces(|| MainDecoder::learning_recovery(MainOptions::default()), &bytes);
        same_in_pieces(|| RecordDecoder::learning(PAGE, format), &bytes);
        same_in_pieces(|| ReturnDecoder::with_colo(PAGE), &bytes);
        same_in_pieces(|| MultifdDecoder::new(PAGE), &bytes);
        let _ = xbzrle::decode(&bytes, &mut [0; 256]);
        let _ = VmDescription::parse(&bytes);
        let _ = Package::decode(&bytes, 0, Delimiting::Footers);
        let mut tail = DeviceTail::new(0, 100);
        if tail.feed(&bytes).is_ok() {
            let _ = tail.finish_at_close();
        }
    }
}

fn same_in_pieces<D: Decode>(new: impl Fn() -> D, bytes: &[u8])
where
    D::Message: PartialEq + Clone,
{
    let whole = drive(&mut new(), bytes, Pieces::Of(usize::MAX / 2));
    let single = drive(&mut new(), bytes, Pieces::Of(1));
    match (whole, single) {
        (Ok(whole), Ok(single)) => assert!(contents(&whole.items) == contents(&single.items)),
        (Err(whole), Err(single)) => assert_eq!(whole, single),
        (whole, single) => panic!("{:?} but {:?}", whole.err(), single.err()),
    }
}
