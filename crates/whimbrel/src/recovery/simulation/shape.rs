//! What all schedules are about: some RAM, what is in it, and how its stream begins.

use std::sync::Arc;

use whimbrel_ram::{BlockIndex, GuestRam, PageMap, PageSize, RamBlock, TARGET_PAGE};
use whimbrel_wire::recovery::Identity;
use whimbrel_wire::{
    BlockInfo, BlockList, Command, Configuration, Decoded, FileHeader, MainDecoder, MainOptions,
    Package, PageSizes, encode_end_of_section,
};

use crate::source::setup::{RAM_SECTION, name, ram_section};

pub(super) const PAGE: usize = TARGET_PAGE.bytes();

/// Target pages of each block, and how many of them are one unit.
const BLOCKS: [(&str, u64, u64); 3] = [("ram", 34, 1), ("huge", 16, 4), ("rom", 3, 1)];

/// The same for every schedule, and expensive to make.
#[derive(Debug)]
pub(super) struct Shape {
    pub(super) ram: GuestRam,
    pub(super) blocks: Arc<BlockList>,
    /// What each page holds at the hand-over; `None` is zeros.
    pub(super) content: Vec<Option<Box<[u8]>>>,
    /// The stream up to RUN.
    stream: Vec<u8>,
    pub(super) run: Vec<u8>,
    pub(super) identity: Identity,
}

impl Shape {
    pub(super) fn new() -> Shape {
        let blocks = BLOCKS.iter().zip(0u64..).map(|((name, pages, _), place)| {
            RamBlock::anonymous(name, place << 32, pages * PAGE as u64).expect("some memory")
        });
        let ram = GuestRam::new(blocks.collect());
        let infos = BLOCKS.iter().map(|(block, pages, unit)| {
            let mut info = BlockInfo::new(name(block).expect("a name"), pages * PAGE as u64);
            info.page_size = (*unit > 1).then_some(unit * PAGE as u64);
            info
        });
        let blocks = Arc::new(BlockList::new(infos).expect("different names"));
        let pages = BLOCKS.iter().map(|(_, pages, _)| pages).sum::<u64>();
        let content = (0..pages).map(|page| {
            let word = (page + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15).to_le_bytes();
            (page % 5 != 3).then(|| word.repeat(PAGE / 8).into_boxed_slice())
        });
        let identity = Identity { id: [7; 16], secret: [9; 32], beat_ms: 0 };
        let (stream, run) = stream(&blocks, identity);
        let content = content.collect();
        Shape { ram, blocks, content, stream, run, identity }
    }

    /// How much of a block is never split.
    pub(super) fn unit(&self, block: BlockIndex) -> PageSize {
        let pages = usize::try_from(BLOCKS[block.index()].2).expect("few");
        PageSize::new(pages * PAGE).expect("a power of two")
    }

    pub(super) fn map(&self) -> PageMap {
        PageMap::with_units(&self.ram, |block| self.unit(block))
    }

    /// The place of a page among all pages.
    pub(super) fn place(&self, block: BlockIndex, page: u64) -> usize {
        let before = BLOCKS[..block.index()].iter().map(|(_, pages, _)| pages).sum::<u64>();
        usize::try_from(before + page).expect("few")
    }

    pub(super) fn pages(&self) -> usize {
        self.content.len()
    }

    /// The page in this place among all pages.
    pub(super) fn page(&self, place: usize) -> (BlockIndex, u64) {
        let mut page = place as u64;
        for ((_, pages, _), block) in BLOCKS.iter().zip(0u16..) {
            if page < *pages {
                return (BlockIndex(block), page);
            }
            page -= pages;
        }
        unreachable!("{place} is no page");
    }

    /// A block as the stream numbers it.
    pub(super) fn on_the_wire(&self, block: BlockIndex) -> whimbrel_wire::BlockIndex {
        let (place, _) = self.blocks.iter().nth(block.index()).expect("a block");
        place
    }

    /// The destination's decoder when only RUN is missing.
    pub(super) fn decoder(&self) -> MainDecoder {
        let mut decoder = MainDecoder::new(MainOptions::default());
        let mut at = 0;
        loop {
            let (used, decoded) = decoder.decode(&self.stream[at..]).expect("a good stream");
            at += used;
            match decoded {
                Decoded::PackageFollows { .. } => {
                    decoder.payload_taken((self.stream.len() - at) as u64);
                    return decoder;
                }
                Decoded::NeedMore(_) if at == self.stream.len() => panic!("no package"),
                _ => {}
            }
        }
    }
}

/// All that is said before RUN, and RUN.
fn stream(blocks: &BlockList, identity: Identity) -> (Vec<u8>, Vec<u8>) {
    let mut words = Vec::new();
    FileHeader.encode(&mut words);
    Configuration::new(name("simulated").expect("a name")).encode(&mut words);
    Command::OpenReturnPath.encode(&mut words);
    let sizes = PageSizes { host_summary: 5 * PAGE as u64, target: PAGE as u64 };
    Command::PostcopyAdvise(Some(sizes)).encode(&mut words);
    ram_section().expect("a section").encode_start(&mut words);
    blocks.encode(&mut words);
    encode_end_of_section(&mut words);
    RAM_SECTION.encode_footer(&mut words);
    Command::Identity(identity).encode(&mut words);
    let (mut package, mut run) = (Vec::new(), Vec::new());
    Package::default().encode(&mut package);
    Command::PostcopyRun.encode(&mut run);
    Command::Packaged { len: u32::try_from(package.len()).expect("short") }.encode(&mut words);
    words.extend_from_slice(&package[..package.len() - run.len()]);
    (words, run)
}
