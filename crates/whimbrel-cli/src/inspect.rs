//! `whimbrel inspect`: show what a recorded stream or a kept VM holds, and what is wrong with it.
//!
//! A reader per kind of channel follows the codec's decoder and fills a [`report`], which is
//! shown as text or as JSON. What a damaged recording holds before the damage is shown too.

mod command;
mod description;
mod device_state;
mod feed;
mod kept_block;
mod main_channel;
mod multifd;
mod pages;
mod part;
mod records;
mod report;
mod return_path;
mod source;
mod text;

use std::io::{self, BufWriter, Write};
use std::path::PathBuf;

use clap::{Args, ValueEnum};
use whimbrel::rescue::Part;
use whimbrel_wire::{ChannelKind, TargetPage};

use crate::failure::Failure;
use feed::Fault;
use main_channel::MainChannel;
use pages::{Format, PageList};
use report::Report;
use source::Source;

/// Show what a recorded stream, a kept VM or a part of one holds, and what is wrong with it.
#[derive(Debug, Args)]
pub(crate) struct Inspect {
    /// A recorded stream or a kept VM, also compressed with zstd; '-' is the standard input
    file: PathBuf,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
    /// What the file holds
    #[arg(long = "as", value_name = "KIND", value_enum, default_value_t = Kind::Auto)]
    kind: Kind,
    /// List the pages too
    #[arg(long)]
    pages: bool,
    /// List the fields of the devices too, where the stream describes them
    #[arg(long)]
    devices: bool,
}

/// What a recording is of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Kind {
    /// Tell by the first bytes
    Auto,
    /// The main channel of a migration, or a kept VM
    Main,
    /// The main channel after a recovery
    Recovery,
    /// A multifd channel
    Multifd,
    /// The urgent channel of a postcopy
    Preempt,
    /// What the destination answered
    ReturnPath,
}

impl Kind {
    fn name(self) -> &'static str {
        match self {
            Kind::Auto => "auto",
            Kind::Main => "main",
            Kind::Recovery => "recovery",
            Kind::Multifd => "multifd",
            Kind::Preempt => "preempt",
            Kind::ReturnPath => "return-path",
        }
    }

    /// What a recording that begins like this is of.
    fn of(first: &[u8]) -> Option<Kind> {
        match ChannelKind::of(*first.first_chunk()?)? {
            ChannelKind::Main => Some(Kind::Main),
            ChannelKind::Multifd => Some(Kind::Multifd),
            ChannelKind::RecoveringMain => Some(Kind::Recovery),
            ChannelKind::Preempt if return_path::begins_like_one(first) => Some(Kind::ReturnPath),
            ChannelKind::Preempt => Some(Kind::Preempt),
        }
    }
}

impl Inspect {
    pub(crate) fn run(self) -> Result<(), Failure> {
        if self.kind == Kind::Auto && Part::is_one(&self.file) {
            return self.show_part(&Part::open(&self.file)?);
        }
        let mut source = Source::open(&self.file)?;
        let kind = match self.kind {
            Kind::Auto => self.detect(&mut source)?,
            told => told,
        };
        let out = BufWriter::new(io::stdout().lock());
        match self.show(&mut source, kind, out) {
            Ok(None) => Ok(()),
            Ok(Some(fault)) => Err(self.failure(&fault)),
            // Whoever read the output has seen enough.
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
            Err(error) => Err(Failure::new(format!("the output cannot be written: {error}"))),
        }
    }

    fn show_part(&self, opened: &Part) -> Result<(), Failure> {
        let mut out = BufWriter::new(io::stdout().lock());
        let shown = match self.json {
            true => writeln!(out, "{}", part::json(opened, self.pages)),
            false => part::write(opened, self.pages, &mut out),
        };
        match shown.and_then(|()| out.flush()) {
            Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
                Err(Failure::new(format!("the output cannot be written: {error}")))
            }
            _ => Ok(()),
        }
    }

    fn failure(&self, what: &dyn std::fmt::Display) -> Failure {
        Failure::new(format!("{}: {what}", self.file.display()))
    }

    /// Tells the kind by the first bytes.
    fn detect(&self, source: &mut Source) -> Result<Kind, Failure> {
        while source.pending().len() < ChannelKind::BYTES {
            if !source.fill().map_err(|error| self.failure(&error))? {
                let at = source.pending().len() as u64;
                let expected = "the first 4 bytes of a channel";
                return Err(self.failure(&Fault::truncated(at, expected)));
            }
        }
        let first = &source.pending()[..ChannelKind::BYTES];
        Kind::of(first).ok_or_else(|| {
            self.failure(&format!(
                "byte 0: expected the start of a migration stream or of a kept VM, found {first:02x?}: \
                 this is neither"
            ))
        })
    }

    /// Reads and shows everything; returns what is wrong with the recording.
    fn show(
        &self,
        source: &mut Source,
        kind: Kind,
        mut out: impl Write,
    ) -> io::Result<Option<Fault>> {
        let format = match (self.pages, self.json) {
            (false, _) => Format::Quiet,
            (true, false) => Format::Text,
            (true, true) => Format::Json,
        };
        match format {
            Format::Quiet => {}
            Format::Text => writeln!(out, "offset        kind       range  block")?,
            Format::Json => write!(out, "{{\"pages\":[")?,
        }
        let mut pages = PageList::new(out, format);
        let mut report = self.report(kind);
        report.error = self.read(source, kind, &mut report, &mut pages).err();
        if let Some(fault) = report.error.as_mut().filter(|_| report.bytes == 0) {
            fault.message.push_str(": is this a migration stream or a kept VM?");
        }
        let mut out = pages.finish()?;
        match (self.json, format) {
            (true, Format::Json) => {
                // The list of pages, which may be of any length, is already written.
                let rest = serde_json::to_string(&report)?;
                writeln!(out, "],{}", &rest[1..])?;
            }
            (true, _) => {
                serde_json::to_writer(&mut out, &report)?;
                writeln!(out)?;
            }
            (false, Format::Text) => {
                writeln!(out)?;
                text::write(&report, &mut out)?;
            }
            // Nothing was understood: the error says all there is.
            (false, _) if report.bytes == 0 && report.error.is_some() => {}
            (false, _) => text::write(&report, &mut out)?,
        }
        out.flush()?;
        Ok(report.error)
    }

    fn report(&self, kind: Kind) -> Report {
        Report {
            file: self.file.display().to_string(),
            kind: kind.name(),
            target_page_size: TargetPage::FOUR_KIB.size(),
            ..Report::default()
        }
    }

    fn read<W: Write>(
        &self,
        source: &mut Source,
        kind: Kind,
        report: &mut Report,
        pages: &mut PageList<W>,
    ) -> Result<(), Fault> {
        let page = TargetPage::FOUR_KIB;
        match kind {
            Kind::Auto | Kind::Main | Kind::Recovery => {
                let recovery = kind == Kind::Recovery;
                MainChannel::new(source, report, pages, (recovery, self.devices)).read()
            }
            Kind::Multifd => multifd::read(source, report, pages, page),
            Kind::Preempt => records::read(source, report, pages, page),
            Kind::ReturnPath => return_path::read(source, report, pages, page),
        }
    }
}

/// A UUID as people write it.
fn uuid_text(uuid: &[u8; 16]) -> String {
    let mut text = String::with_capacity(36);
    for (place, byte) in uuid.iter().enumerate() {
        if matches!(place, 4 | 6 | 8 | 10) {
            text.push('-');
        }
        text.push_str(&format!("{byte:02x}"));
    }
    text
}
