//! A part of a VM: what it is of, and what is missing.

use std::io::{self, Write};

use serde_json::{Value, json};
use whimbrel::rescue::Part;

/// Writes what a part says of itself; with `pages` the runs of pages that are missing too.
pub(super) fn write(part: &Part, pages: bool, out: &mut impl Write) -> io::Result<()> {
    let what = match part.has_devices() {
        true => "had",
        false => "had for memory",
    };
    let (file, side) = (part.path().display(), part.side().name());
    writeln!(out, "{file}: a part of a VM: what the {side} {what}")?;
    writeln!(out, "  machine        {}", part.machine())?;
    if let Some(id) = part.migration() {
        writeln!(out, "  migration      {}", super::uuid_text(&id))?;
    }
    writeln!(out, "  RAM            {} bytes", part.ram_bytes())?;
    match part.missing_pages() {
        0 => writeln!(out, "  missing        nothing")?,
        1 => writeln!(out, "  missing        1 page is missing")?,
        count => writeln!(out, "  missing        {count} pages are missing")?,
    }
    writeln!(out, "\nRAM blocks ({})", part.blocks().count())?;
    let width = part.blocks().map(|block| block.name.len()).max().unwrap_or(0).max(4);
    writeln!(out, "  {:width$}  {:>12}  missing pages", "name", "length")?;
    for block in part.blocks() {
        let length = format!("{:#x}", block.bytes);
        writeln!(out, "  {:width$}  {length:>12}  {}", block.name, block.missing_pages)?;
    }
    if pages {
        writeln!(out, "\nmissing pages")?;
        for (place, block) in part.blocks().enumerate() {
            for run in part.missing_runs(place) {
                writeln!(out, "  {:width$}  {}..{}", block.name, run.start, run.end)?;
            }
        }
    }
    Ok(())
}

/// The same as one JSON object.
pub(super) fn json(part: &Part, pages: bool) -> Value {
    let block = |(place, block): (usize, whimbrel::rescue::PartBlock<'_>)| {
        let mut object = json!({
            "name": block.name,
            "bytes": block.bytes,
            "missing-pages": block.missing_pages,
        });
        if pages {
            let runs = part.missing_runs(place).map(|run| json!([run.start, run.end]));
            object["missing"] = runs.collect();
        }
        object
    };
    json!({
        "file": part.path().display().to_string(),
        "kind": "part",
        "side": part.side().name(),
        "machine": part.machine(),
        "migration": part.migration().map(|id| super::uuid_text(&id)),
        "has-devices": part.has_devices(),
        "ram-bytes": part.ram_bytes(),
        "missing-pages": part.missing_pages(),
        "blocks": part.blocks().enumerate().map(block).collect::<Vec<Value>>(),
    })
}
