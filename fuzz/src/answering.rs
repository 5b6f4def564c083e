//! What a destination answers, as values: the return path as a source sees it.

use whimbrel_wire::return_path::{encode_bitmap_end, encode_bitmap_size};
use whimbrel_wire::{BlockOffset, Name, ReturnMessage};

use crate::choices::language;
use crate::telling::{BLOCKS, name};

const PAGE: u64 = 4096;

language! {
    /// What a destination answers or does, and what happens at the source meanwhile. A choice is
    /// taken modulo the number of choices.
    pub(crate) enum Answered {
        Pong { what: u8 },
        Shut { value: u8 },
        /// A request for pages of a block.
        Request { block: u8, page: u16, len: u8 },
        /// One of the block before.
        RequestMore { page: u16, len: u8 },
        /// The pages that have arrived.
        Bitmap { block: u8, size: u8, fill: u8 },
        ResumeAck { value: u8 },
        SwitchoverAck {},
        Raw { bytes: Vec<u8> },
        /// Changes a byte of what is answered next.
        Damage { at: u8, value: u8 },
        /// Leaves out the end of what is answered next.
        Cut { count: u8 },
        /// Nothing more is answered.
        Close {},
        /// Ends the urgent channel.
        CloseUrgent {},
        /// Reads on until the source has said something of this kind.
        Await { what: u8 },
        /// The source is told to go over to postcopy.
        StartPostcopy {},
        /// The guest writes pages.
        Write { page: u16, count: u8, fill: u8 },
        /// From here on PINGs are not answered, or are again, by what a destination can do.
        Manners { pongs: u8 },
        /// `migrate-pause`.
        Pause {},
        Yank {},
        /// Goes away at once.
        Leave {},
        /// Breaks all connections; the source may come back.
        Break {},
        /// The answer to a source that has come back, if it is a whimbrel.
        Welcome { wrong: u8 },
        /// The source is told to come back.
        Resume {},
    }
}

/// What is sent for it, if it is a message.
pub(crate) fn encode(op: &Answered, out: &mut Vec<u8>) {
    match op {
        Answered::Pong { what } => ReturnMessage::Pong(pong(*what)).encode(out),
        Answered::Shut { value } => ReturnMessage::Shut((*value).into()).encode(out),
        Answered::Request { block, page, len } => {
            let (start, len) = (start(*page), length(*len));
            ReturnMessage::RequestPagesOf { block: block_name(*block), start, len }.encode(out);
        }
        Answered::RequestMore { page, len } => {
            ReturnMessage::RequestPages { start: start(*page), len: length(*len) }.encode(out);
        }
        Answered::Bitmap { block, size, fill } => bitmap(*block, *size, *fill, out),
        Answered::ResumeAck { value } => ReturnMessage::ResumeAck((*value).into()).encode(out),
        Answered::SwitchoverAck {} => ReturnMessage::SwitchoverAck.encode(out),
        Answered::Raw { bytes } => out.extend(bytes),
        Answered::Damage { .. }
        | Answered::Cut { .. }
        | Answered::Close {}
        | Answered::CloseUrgent {}
        | Answered::Await { .. }
        | Answered::StartPostcopy {}
        | Answered::Write { .. }
        | Answered::Manners { .. }
        | Answered::Pause {}
        | Answered::Yank {}
        | Answered::Leave {}
        | Answered::Break {}
        | Answered::Welcome { .. }
        | Answered::Resume {} => {}
    }
}

fn block_name(choice: u8) -> Name {
    match choice % 8 {
        0..=3 => name(BLOCKS[0].0),
        4 | 5 => name(BLOCKS[1].0),
        6 => name("pc.ram"),
        _ => name(&"n".repeat(255)),
    }
}

/// Mostly inside the largest block, at times between pages or far outside.
fn start(page: u16) -> BlockOffset {
    match page {
        0..=0xeff => BlockOffset(u64::from(page) * PAGE),
        0xf00..=0xfff => BlockOffset(u64::MAX - u64::from(page)),
        _ => BlockOffset(u64::from(page)),
    }
}

fn length(choice: u8) -> u32 {
    match choice {
        0..=0x7f => (u32::from(choice) + 1) << 12,
        0x80..=0xbf => u32::from(choice),
        0xc0..=0xdf => 2 << 20,
        0xe0..=0xef => 8 << 20,
        _ => u32::MAX << 12,
    }
}

fn pong(what: u8) -> u32 {
    match what % 16 {
        0 => 1,
        1 => 0x5748_000f,
        // What a whimbrel answers.
        2 => 0x5749_0000,
        3 => 0x5749_000f,
        4 => 0x5749_ffff,
        5 => 0x5749_0000 | u32::from(what >> 4),
        6 => 0x5041_524b,
        7 => 3,
        8 => 0x42,
        9 => 0x4c4f_4144,
        _ => what.into(),
    }
}

fn bitmap(block: u8, size: u8, fill: u8, out: &mut Vec<u8>) {
    let block = block_name(block);
    let pages = BLOCKS.iter().find(|(text, _)| block == **text).map_or(64, |(_, pages)| *pages);
    let right = pages.div_ceil(64) * 8;
    let bytes = match size % 8 {
        0..=3 => right,
        4 => right + 8,
        5 => right - 8,
        6 => 0,
        _ => u64::from(size) << 40,
    };
    ReturnMessage::RecvBitmap(block).encode(out);
    encode_bitmap_size(bytes, out);
    out.extend(vec![fill; usize::try_from(bytes.min(512)).expect("short")]);
    encode_bitmap_end(out);
}

/// Whole conversations, from which a fuzzer begins: a name, the first bytes of an input, which are
/// the source's settings, and the operations.
pub(crate) fn conversations() -> Vec<(&'static str, u8, Vec<Answered>)> {
    use crate::source::set;
    let agrees = |pongs| Answered::Manners { pongs };
    let precopy = vec![
        agrees(0x0f),
        Answered::Write { page: 4, count: 9, fill: 3 },
        Answered::Await { what: 3 },
        Answered::Shut { value: 0 },
    ];
    let refuses =
        vec![Answered::Await { what: 1 }, Answered::Shut { value: 1 }, Answered::Close {}];
    let postcopy = |pongs| {
        vec![
            agrees(pongs),
            Answered::StartPostcopy {},
            Answered::Write { page: 4, count: 9, fill: 3 },
            Answered::Await { what: 4 },
            Answered::Pong { what: 7 },
            Answered::Pong { what: 8 },
            Answered::Await { what: 2 },
            Answered::Request { block: 0, page: 7, len: 0 },
            Answered::RequestMore { page: 9, len: 3 },
            Answered::Request { block: 4, page: 1, len: 0 },
            Answered::Await { what: 3 },
            Answered::Shut { value: 0 },
        ]
    };
    let cut = vec![
        agrees(0x02),
        Answered::StartPostcopy {},
        Answered::Await { what: 4 },
        Answered::Pong { what: 7 },
        Answered::Pong { what: 8 },
        Answered::Await { what: 2 },
        Answered::Request { block: 0, page: 7, len: 0 },
        Answered::Leave {},
    ];
    let wrong = vec![
        agrees(0x02),
        Answered::StartPostcopy {},
        Answered::Await { what: 4 },
        Answered::Pong { what: 7 },
        Answered::Pong { what: 8 },
        Answered::Await { what: 2 },
        Answered::Request { block: 6, page: 7, len: 0 },
        Answered::Bitmap { block: 0, size: 0, fill: 0 },
    ];
    let gone = |pongs| {
        vec![
            agrees(pongs),
            Answered::StartPostcopy {},
            Answered::Await { what: 4 },
            Answered::Pong { what: 7 },
            Answered::Pong { what: 8 },
            Answered::Await { what: 2 },
            Answered::Request { block: 0, page: 7, len: 0 },
            Answered::Break {},
        ]
    };
    let bitmaps = vec![
        Answered::Bitmap { block: 0, size: 0, fill: 0xf0 },
        Answered::Bitmap { block: 4, size: 9, fill: 0 },
    ];
    let end = vec![Answered::Await { what: 3 }, Answered::Shut { value: 0 }];
    let welcome =
        vec![Answered::Welcome { wrong: 0 }, Answered::Request { block: 0, page: 9, len: 0 }];
    let recovery = [gone(0x12), welcome, bitmaps.clone(), end.clone()].concat();
    let acknowledged = vec![Answered::Await { what: 0 }, Answered::ResumeAck { value: 1 }];
    let by_itself = [gone(0x80), bitmaps.clone(), acknowledged.clone(), end.clone()].concat();
    let recovery_qemu =
        [gone(0x80), vec![Answered::Resume {}], bitmaps, acknowledged, end].concat();
    vec![
        ("recovery", set::POSTCOPY | set::PREEMPT, recovery),
        ("recovery-qemu", set::POSTCOPY, recovery_qemu),
        ("recovery-qemu-by-itself", set::POSTCOPY | set::RECOVERS, by_itself),
        ("precopy", set::RETURN_PATH, precopy.clone()),
        ("no-return-path", 0, vec![Answered::Await { what: 3 }]),
        ("xbzrle", set::RETURN_PATH | set::XBZRLE, precopy.clone()),
        ("multifd", set::RETURN_PATH | set::MULTIFD, precopy),
        ("refuses", set::RETURN_PATH, refuses),
        ("postcopy", set::POSTCOPY, postcopy(0x02)),
        ("postcopy-to-qemu", set::POSTCOPY, postcopy(0x80)),
        ("preempt", set::POSTCOPY | set::PREEMPT, postcopy(0x0b)),
        ("multifd-goes-on", set::POSTCOPY | set::MULTIFD, postcopy(0x0f)),
        ("cut", set::POSTCOPY | set::PREEMPT, cut),
        ("wrong", set::POSTCOPY, wrong),
    ]
}
