//! Measures how fast page records are written and read, the pages themselves left out, and
//! prints one JSON object: the cost of the protocol per page, as the rate of 4 KiB pages it
//! would allow if nothing else took time.
//!
//! Run it optimised: `cargo run --release --example rates`.

use std::hint::black_box;
use std::sync::Arc;
use std::time::Instant;

use whimbrel_wire::{
    BlockInfo, BlockList, BlockOffset, Command, Configuration, Decoded, FileHeader, MainDecoder,
    MainOptions, Name, NameLength, RamRecord, RecordEncoder, SectionHeader, SectionId, TargetPage,
    encode_end_of_section, xbzrle,
};

const PAGES: u64 = 1 << 20;
const RUNS: usize = 7;
/// Of this many pages one is zero.
const ZERO_EVERY: u64 = 8;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let blocks = Arc::new(blocks()?);
    let mut stream = Vec::new();
    let encode = best(|| {
        stream.clear();
        encode_pages(&blocks, &mut stream);
    });
    let preamble = preamble(&blocks)?;
    let mut found = 0;
    let decode = best(|| found = decode_pages(&preamble, &stream));
    assert_eq!(found, PAGES, "every record is read");
    let xbzrle = best_xbzrle();
    let gbps = |seconds: f64| PAGES as f64 * 4096.0 / seconds / 1e9;
    println!(
        "{{\"encode-gbps\": {:.1}, \"decode-gbps\": {:.1}, \"records-per-second\": {:.0}, \
         \"encode-ns-per-record\": {:.1}, \"decode-ns-per-record\": {:.1}, \
         \"xbzrle-encode-gbps\": {xbzrle:.2}}}",
        gbps(encode),
        gbps(decode),
        PAGES as f64 / decode,
        encode * 1e9 / PAGES as f64,
        decode * 1e9 / PAGES as f64,
    );
    Ok(())
}

fn blocks() -> Result<BlockList, Box<dyn std::error::Error>> {
    Ok(BlockList::new([
        BlockInfo::new(Name::new("pc.ram")?, PAGES << 12),
        BlockInfo::new(Name::new("pc.bios")?, 0x1_0000),
    ])?)
}

/// The stream up to where records begin.
fn preamble(blocks: &BlockList) -> Result<Vec<u8>, NameLength> {
    let mut out = Vec::new();
    let id = SectionId(1);
    FileHeader.encode(&mut out);
    Configuration::new(Name::new("pc-q35-10.0")?).encode(&mut out);
    Command::OpenReturnPath.encode(&mut out);
    SectionHeader { id, name: Name::new("ram")?, instance_id: 0, version_id: 4 }
        .encode_start(&mut out);
    blocks.encode(&mut out);
    encode_end_of_section(&mut out);
    id.encode_footer(&mut out);
    id.encode_part(&mut out);
    Ok(out)
}

fn encode_pages(blocks: &Arc<BlockList>, out: &mut Vec<u8>) {
    let mut encoder = RecordEncoder::new(Arc::clone(blocks));
    let Some(block) = blocks.find(b"pc.ram") else { return };
    for page in 0..PAGES {
        let offset = BlockOffset(page << 12);
        if page % ZERO_EVERY == 0 {
            encoder.zero_page(block, offset, out);
        } else {
            encoder.page_header(black_box(block), offset, out);
        }
    }
}

/// Reads all records as a caller does: it takes each page's bytes elsewhere.
fn decode_pages(preamble: &[u8], stream: &[u8]) -> u64 {
    let mut decoder = MainDecoder::new(MainOptions::default());
    let mut records = 0;
    for mut rest in [preamble, stream] {
        loop {
            let (taken, decoded) = decoder.decode(rest).expect("our own stream");
            rest = rest.get(taken..).unwrap_or_default();
            match decoded {
                Decoded::Ram(RamRecord::PageFollows { len, .. }) => {
                    decoder.payload_taken(len as u64);
                    records += 1;
                }
                Decoded::Ram(RamRecord::Zero { .. }) => records += 1,
                Decoded::NeedMore(_) => break,
                _ => {}
            }
        }
    }
    records
}

/// Pages in which one word in 16 has changed, in GB of pages per second.
fn best_xbzrle() -> f64 {
    const ROUNDS: usize = 2000;
    let page = usize::try_from(TargetPage::FOUR_KIB.size()).unwrap_or(4096);
    let old: Vec<u8> = (0..=250).cycle().take(page).collect();
    let mut new = old.clone();
    new.iter_mut().step_by(128).for_each(|byte| *byte ^= 0xff);
    let mut out = Vec::with_capacity(page);
    let seconds = best(|| {
        for _ in 0..ROUNDS {
            out.clear();
            black_box(xbzrle::encode(black_box(&old), black_box(&new), &mut out));
        }
    });
    (ROUNDS * page) as f64 / seconds / 1e9
}

/// The shortest of a few runs, in seconds.
fn best(mut run: impl FnMut()) -> f64 {
    (0..RUNS).fold(f64::INFINITY, |best, _| {
        let start = Instant::now();
        run();
        best.min(start.elapsed().as_secs_f64())
    })
}
