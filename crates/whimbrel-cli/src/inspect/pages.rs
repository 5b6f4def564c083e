//! `--pages`: every page of a recording, as runs of neighbours, written as they are found.

use std::io::{self, Write};

use serde_json::json;
use whimbrel_wire::{BlockOffset, Name};

/// Where the pages go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Format {
    /// Nowhere: they are only counted.
    Quiet,
    /// A line each.
    Text,
    /// Elements of a JSON array.
    Json,
}

/// Joins pages to runs and writes them.
pub(super) struct PageList<W> {
    out: W,
    format: Format,
    run: Option<Run>,
    written: u64,
    failed: Option<io::Error>,
}

impl<W> std::fmt::Debug for PageList<W> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PageList").field("run", &self.run).finish_non_exhaustive()
    }
}

/// Pages of one block and kind that follow each other.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Run {
    kind: &'static str,
    block: Name,
    start: u64,
    len: u64,
    /// Position in the stream of the first.
    at: u64,
}

impl<W: Write> PageList<W> {
    pub(super) fn new(out: W, format: Format) -> PageList<W> {
        PageList { out, format, run: None, written: 0, failed: None }
    }

    pub(super) fn is_quiet(&self) -> bool {
        self.format == Format::Quiet
    }

    /// Adds bytes of a block that stand at `at` of the stream.
    pub(super) fn add(
        &mut self,
        kind: &'static str,
        (block, start, len): (&Name, BlockOffset, u64),
        at: u64,
    ) {
        if self.is_quiet() {
            return;
        }
        if let Some(run) = &mut self.run
            && run.kind == kind
            && run.start.checked_add(run.len) == Some(start.0)
            && run.block == *block
        {
            run.len = run.len.saturating_add(len);
            return;
        }
        self.flush();
        self.run = Some(Run { kind, block: block.clone(), start: start.0, len, at });
    }

    fn flush(&mut self) {
        let Some(run) = self.run.take() else { return };
        if self.failed.is_none()
            && let Err(error) = self.write(&run)
        {
            self.failed = Some(error);
        }
    }

    fn write(&mut self, run: &Run) -> io::Result<()> {
        let Run { kind, block, start, len, at } = run;
        match self.format {
            Format::Quiet => {}
            Format::Text => {
                let end = start.saturating_add(*len);
                writeln!(self.out, "{at:#012x}  {kind:9}  {start:#x}..{end:#x}  {block}")?;
            }
            Format::Json => {
                let comma = if self.written == 0 { "" } else { "," };
                let run = json!({
                    "kind": kind, "block": block.to_string(), "start": start, "bytes": len,
                    "offset": at,
                });
                write!(self.out, "{comma}{run}")?;
            }
        }
        self.written += 1;
        Ok(())
    }

    /// Writes the last run and gives back where they went.
    pub(super) fn finish(mut self) -> io::Result<W> {
        self.flush();
        match self.failed {
            Some(error) => Err(error),
            None => Ok(self.out),
        }
    }
}
