//! RAM records: those of a main channel, and those of an urgent channel on their own.

use std::io::Write;

use whimbrel_wire::{BlockList, BlockOffset, RamRecord, RecordDecoder, RecordFormat, TargetPage};

use super::feed::{self, Fault};
use super::pages::PageList;
use super::report::{Block, Entry, Report};
use super::source::Source;

/// Reads an urgent channel to its end.
pub(super) fn read<W: Write>(
    source: &mut Source,
    report: &mut Report,
    pages: &mut PageList<W>,
    page: TargetPage,
) -> Result<(), Fault> {
    let mut decoder = RecordDecoder::learning(page, RecordFormat::Postcopy);
    let outcome = read_records(source, report, pages, (&mut decoder, page));
    report.bytes = decoder.offset();
    name_blocks(report, decoder.blocks());
    outcome
}

fn read_records<W: Write>(
    source: &mut Source,
    report: &mut Report,
    pages: &mut PageList<W>,
    (decoder, page): (&mut RecordDecoder, TargetPage),
) -> Result<(), Fault> {
    let mut ended = false;
    while let Some((at, record)) = feed::next(source, decoder)? {
        if ended {
            let expected = "the end of the urgent channel after its end mark, found another record";
            return Err(Fault { offset: at, message: format!("expected {expected}") });
        }
        report.ram.count(record);
        note(report, pages, decoder.blocks(), record, (at, page));
        if record == RamRecord::EndOfSection {
            report.message(Entry::new("EOS", at), false);
            ended = true;
        }
        feed::skip(source, decoder, "the rest of a page")?;
    }
    if !source.pending().is_empty() {
        let end = decoder.offset() + source.pending().len() as u64;
        return Err(Fault::truncated(end, "the rest of a RAM record"));
    }
    report.complete = true;
    Ok(())
}

/// Counts a record in its block.
pub(super) fn note<W: Write>(
    report: &mut Report,
    pages: &mut PageList<W>,
    blocks: &BlockList,
    record: RamRecord,
    (at, page): (u64, TargetPage),
) {
    let (kind, index, offset): (_, _, BlockOffset) = match record {
        RamRecord::Zero { block, offset } => ("duplicate", block, offset),
        RamRecord::PageFollows { block, offset, .. } => ("normal", block, offset),
        RamRecord::XbzrleFollows { block, offset, .. } => ("xbzrle", block, offset),
        RamRecord::EndOfSection | RamRecord::MultifdFlush => return,
    };
    let place = index.get();
    if place >= report.blocks.len() {
        report.blocks.resize_with(place + 1, Block::default);
    }
    report.blocks[place].pages.count(record);
    if let Some(info) = blocks.get(index) {
        pages.add(kind, (&info.name, offset, page.size()), at);
    }
}

/// Gives the blocks that records have named their names.
pub(super) fn name_blocks(report: &mut Report, blocks: &BlockList) {
    for (block, (_, info)) in report.blocks.iter_mut().zip(blocks.iter()) {
        if block.name.is_empty() {
            block.name = info.name.to_string();
        }
    }
}
