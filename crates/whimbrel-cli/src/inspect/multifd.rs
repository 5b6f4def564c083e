//! A multifd channel: packets of pages.

use std::io::Write;

use whimbrel_wire::multifd::Compression;
use whimbrel_wire::{MultifdDecoded, MultifdDecoder, PacketHeader, TargetPage};

use super::feed::{self, Fault};
use super::pages::PageList;
use super::report::{Multifd, Pages, Report};
use super::source::Source;

/// Reads a multifd channel to its end.
pub(super) fn read<W: Write>(
    source: &mut Source,
    report: &mut Report,
    pages: &mut PageList<W>,
    page: TargetPage,
) -> Result<(), Fault> {
    let mut decoder = MultifdDecoder::new(page);
    let mut multifd = Multifd::default();
    let outcome = read_packets(source, (report, &mut multifd), pages, (&mut decoder, page));
    report.bytes = decoder.offset();
    report.multifd = Some(multifd);
    outcome
}

fn read_packets<W: Write>(
    source: &mut Source,
    (report, multifd): (&mut Report, &mut Multifd),
    pages: &mut PageList<W>,
    (decoder, page): (&mut MultifdDecoder, TargetPage),
) -> Result<(), Fault> {
    while let Some((at, message)) = feed::next(source, decoder)? {
        match message {
            MultifdDecoded::NeedMore(_) => {}
            MultifdDecoded::Init(init) => {
                report.channel = Some(init.channel);
                let set = init.uuid.iter().any(|byte| *byte != 0);
                report.uuid = set.then(|| super::uuid_text(&init.uuid));
            }
            MultifdDecoded::Packet(packet) => {
                note(&packet, (report, multifd), pages, (at, page));
            }
            MultifdDecoded::Device(packet) => {
                multifd.packets += 1;
                multifd.device_packets += 1;
                multifd.device_bytes += u64::from(packet.len);
            }
        }
        feed::skip(source, decoder, "the rest of a packet's data")?;
    }
    if !source.pending().is_empty() {
        let end = decoder.offset() + source.pending().len() as u64;
        return Err(Fault::truncated(end, "the rest of a packet"));
    }
    report.complete = true;
    Ok(())
}

fn note<W: Write>(
    packet: &PacketHeader,
    (report, multifd): (&mut Report, &mut Multifd),
    pages: &mut PageList<W>,
    (at, page): (u64, TargetPage),
) {
    multifd.packets += 1;
    multifd.syncs += u64::from(packet.is_sync());
    multifd.data_bytes += u64::from(packet.data_len());
    if packet.normal_pages > 0 {
        let method = match packet.compression() {
            Compression::None => "none".to_owned(),
            Compression::Zlib => "zlib".to_owned(),
            Compression::Zstd => "zstd".to_owned(),
            Compression::Other(flag) => format!("method {flag:#x}"),
        };
        *multifd.methods.entry(method).or_default() += 1;
    }
    let Some(block) = packet.block() else { return };
    let counts = Pages {
        normal: packet.normal().len() as u64,
        duplicate: packet.zero().len() as u64,
        xbzrle: 0,
    };
    report.ram.pages.add(counts);
    report.ram.normal_bytes += counts.normal * page.size();
    report.block_named(&block).pages.add(counts);
    packet.normal().for_each(|offset| pages.add("normal", (&block, offset, page.size()), at));
    packet.zero().for_each(|offset| pages.add("duplicate", (&block, offset, page.size()), at));
}
