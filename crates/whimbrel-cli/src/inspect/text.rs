//! The report for people: what it is, its blocks, what the stream says in its order, totals.

use std::io::{self, Write};

use super::report::{Block, Entry, Multifd, Pages, Report, Section};

/// Writes a report.
pub(super) fn write(report: &Report, out: &mut impl Write) -> io::Result<()> {
    writeln!(out, "{}: {}", report.file, title(report))?;
    head(report, out)?;
    blocks(report, out)?;
    timeline(report, out)?;
    totals(report, out)
}

fn title(report: &Report) -> &'static str {
    match report.kind {
        "main" if report.mapped_ram => "a kept VM (mapped-ram)",
        "main" => "main channel of a migration",
        "recovery" => "main channel after a recovery",
        "multifd" => "multifd channel",
        "preempt" => "urgent channel of a postcopy",
        _ => "return path",
    }
}

fn head(report: &Report, out: &mut impl Write) -> io::Result<()> {
    if let Some(machine) = &report.machine {
        writeln!(out, "  machine        {machine}")?;
    }
    if let Some(channel) = report.channel {
        writeln!(out, "  channel        {channel}")?;
    }
    if !report.capabilities.is_empty() {
        writeln!(out, "  capabilities   {}", report.capabilities.join(", "))?;
    }
    if let Some(uuid) = &report.uuid {
        writeln!(out, "  uuid           {uuid}")?;
    }
    writeln!(out, "  guest's page   {}", size(report.target_page_size))
}

fn blocks(report: &Report, out: &mut impl Write) -> io::Result<()> {
    if report.blocks.is_empty() {
        return Ok(());
    }
    writeln!(out, "\nRAM blocks ({})", report.blocks.len())?;
    let name_width = width(report.blocks.iter().map(|block| block.name.as_str()), "name");
    write!(out, "  {:name_width$}  {:>12}  {:>9}", "name", "length", "page size")?;
    let address = report.blocks.iter().any(|block| block.address.is_some());
    if address {
        write!(out, "  {:>14}", "address")?;
    }
    writeln!(out, "  pages")?;
    for block in &report.blocks {
        let length = block.length.map_or_else(|| "?".to_owned(), |length| format!("{length:#x}"));
        let page = block.page_size.map_or_else(|| "-".to_owned(), size);
        write!(out, "  {:name_width$}  {length:>12}  {page:>9}", block.name)?;
        if address {
            let address = block.address.map_or_else(|| "-".to_owned(), |at| format!("{at:#x}"));
            write!(out, "  {address:>14}")?;
        }
        writeln!(out, "  {}", pages_of(block, report))?;
    }
    Ok(())
}

/// What came of a block, or was asked for.
fn pages_of(block: &Block, report: &Report) -> String {
    if let Some(places) = &block.mapped_ram {
        let all = block.length.unwrap_or(0) / report.target_page_size;
        return format!(
            "{} of {all} present, at {:#x}, bitmap at {:#x}",
            places.present, places.pages_offset, places.bitmap_offset
        );
    }
    if block.requests > 0 {
        return format!("{}, {}", plural(block.requests, "request"), size(block.requested_bytes));
    }
    pages(block.pages)
}

/// Sections, commands and messages, which stand in lists of their own, in the order of the
/// stream.
fn timeline(report: &Report, out: &mut impl Write) -> io::Result<()> {
    let names = report.sections.iter().filter(|section| section.kind == "full");
    let name_width = width(names.map(|section| section.name.as_str()), "");
    let mut lines: Vec<(u64, String)> = Vec::new();
    for section in &report.sections {
        lines.push((section.offset, section_line(section, name_width)));
    }
    for entry in report.commands.iter().chain(&report.messages) {
        lines.push((entry.offset, entry_line(entry)));
    }
    lines.sort_by_key(|(offset, _)| *offset);
    if !lines.is_empty() {
        writeln!(out, "\nstream")?;
    }
    for (offset, line) in lines {
        writeln!(out, "  {offset:#012x}  {line}")?;
    }
    if report.left_out > 0 {
        writeln!(out, "  … and {} more, which the totals count", report.left_out)?;
    }
    Ok(())
}

fn section_line(section: &Section, name_width: usize) -> String {
    let Section { name, id, bytes, count, .. } = section;
    if let Some(ram) = section.ram {
        let times = if *count > 1 { format!(" x{count}") } else { String::new() };
        let kind = section.kind;
        let pages = match kind {
            "start" if ram.is_empty() => "the list of RAM blocks".to_owned(),
            _ => pages(ram),
        };
        return format!("section {name}: {kind}{times}, id {id}, {}: {}", size(*bytes), pages);
    }
    let (instance, version) = (section.instance_id.unwrap_or(0), section.version_id.unwrap_or(0));
    let indent = if section.inside.is_some() { "  " } else { "" };
    let mut line = format!(
        "{indent}device {name:name_width$}  instance {instance}, version {version}, {}",
        plural(*bytes, "byte")
    );
    for field in section.fields.iter().flatten() {
        let times = field.array_len.map_or_else(String::new, |len| format!(" x{len}"));
        let (name, kind) = (field.name.escape_debug(), field.kind.escape_debug());
        line.push_str(&format!(
            "\n                    {name}: {kind}, {} bytes{times}",
            field.size
        ));
    }
    line
}

fn entry_line(entry: &Entry) -> String {
    let indent = if entry.inside.is_some() { "  " } else { "" };
    let mut line = format!("{indent}{}", entry.name);
    if entry.count > 1 {
        line.push_str(&format!(" x{}", entry.count));
    }
    if let Some(value) = entry.value {
        line.push_str(&match entry.name {
            "POSTCOPY_ADVISE" => format!(" page sizes {value:#x}"),
            _ => format!(" {value}"),
        });
    }
    if let Some(block) = &entry.block {
        line.push_str(&format!(" {block}"));
    }
    let details = [
        entry.ranges.map(|ranges| plural(ranges, "range")),
        entry.pages.map(|pages| plural(pages, "page")),
        entry.bytes.map(size),
    ];
    let details: Vec<String> = details.into_iter().flatten().collect();
    if !details.is_empty() {
        line.push_str(&format!(": {}", details.join(", ")));
    }
    line
}

fn totals(report: &Report, out: &mut impl Write) -> io::Result<()> {
    writeln!(out, "\ntotals")?;
    let ram = &report.ram;
    if !ram.pages.is_empty() {
        writeln!(out, "  RAM            {}", pages(ram.pages))?;
    }
    let present = report.blocks.iter().filter_map(|block| block.mapped_ram.as_ref());
    let present: u64 = present.map(|places| places.present).sum();
    if report.mapped_ram {
        let bytes = present.saturating_mul(report.target_page_size);
        writeln!(out, "  RAM            {} present, {}", plural(present, "page"), size(bytes))?;
    }
    if ram.multifd_flush > 0 {
        writeln!(out, "  multifd flush  {}", ram.multifd_flush)?;
    }
    if let Some(multifd) = &report.multifd {
        packets(multifd, out)?;
    }
    let devices = report.sections.iter().filter(|section| section.kind == "full");
    let (count, bytes) =
        devices.fold((0_u64, 0_u64), |(count, bytes), section| (count + 1, bytes + section.bytes));
    if count > 0 {
        writeln!(out, "  devices        {}, {}", plural(count, "section"), size(bytes))?;
    }
    if let Some(description) = &report.vm_description {
        let devices = plural(description.devices, "device");
        writeln!(out, "  description    {devices}, {} of JSON", size(description.bytes))?;
    }
    let requests: u64 = report.blocks.iter().map(|block| block.requests).sum();
    if requests > 0 {
        writeln!(out, "  faults         {}", plural(requests, "request"))?;
    }
    let end = if report.complete { "" } else { ", and not to its end" };
    writeln!(out, "  read           {} bytes{end}", report.bytes)
}

fn packets(multifd: &Multifd, out: &mut impl Write) -> io::Result<()> {
    let Multifd { packets, syncs, data_bytes, .. } = multifd;
    writeln!(
        out,
        "  packets        {packets}, of these {syncs} with SYNC, {} of data",
        size(*data_bytes)
    )?;
    for (method, count) in &multifd.methods {
        writeln!(out, "  compression    {method}: {}", plural(*count, "packet"))?;
    }
    if multifd.device_packets > 0 {
        let count = plural(multifd.device_packets, "packet");
        writeln!(out, "  device state   {count}, {}", size(multifd.device_bytes))?;
    }
    Ok(())
}

fn pages(pages: Pages) -> String {
    let Pages { normal, duplicate, xbzrle } = pages;
    if pages.is_empty() {
        return "no pages".to_owned();
    }
    let delta = if xbzrle > 0 { format!(", {xbzrle} xbzrle") } else { String::new() };
    format!("{normal} normal, {duplicate} zero{delta}")
}

fn plural(count: u64, what: &str) -> String {
    if count == 1 { format!("1 {what}") } else { format!("{count} {what}s") }
}

/// A number of bytes, rounded for people if it is large.
fn size(bytes: u64) -> String {
    const UNITS: [(u32, &str); 4] = [(40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")];
    for (bits, unit) in UNITS {
        let one = 1_u64 << bits;
        if bytes >= one {
            let (whole, rest) = (bytes / one, bytes % one);
            let tenths = rest.saturating_mul(10) / one;
            return if tenths == 0 {
                format!("{whole} {unit}")
            } else {
                format!("{whole}.{tenths} {unit}")
            };
        }
    }
    plural(bytes, "byte")
}

fn width<'t>(texts: impl Iterator<Item = &'t str>, heading: &str) -> usize {
    texts.map(|text| text.chars().count()).max().unwrap_or(0).max(heading.len()).min(48)
}
