//! The main channel: a migration from its header to its end, a recovery, or a kept VM.

use std::io::Write;

use whimbrel_wire::{
    BlockIndex, BlockList, ColoMessage, Configuration, Decoded, MainDecoder, MainOptions,
    RamRecord, SectionId,
};

use super::command;
use super::description;
use super::device_state;
use super::feed::{self, Fault};
use super::kept_block::Bitmap;
use super::pages::PageList;
use super::report::{Block, Entry, Report, Section};
use super::source::Source;

/// Largest package, and device state of a checkpoint, that is looked into; it is held whole.
const PACKAGE_MAX: u64 = 64 << 20;

/// Follows one main channel and notes what it holds.
pub(super) struct MainChannel<'r, W> {
    source: &'r mut Source,
    report: &'r mut Report,
    pages: &'r mut PageList<W>,
    /// Whether the fields of the devices are wanted.
    fields: bool,
    decoder: MainDecoder,
    last: Last,
    /// The RAM section that is being read.
    open: Option<Section>,
    /// A word of COLO has come: more of them may follow the end.
    colo: bool,
    /// Where the device state at the end begins, while it is collected.
    state_at: Option<u64>,
}

/// What came right before, as far as it can go on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Last {
    Part,
    Command,
    Other,
}

impl<'r, W: Write> MainChannel<'r, W> {
    /// For a channel that begins with the header, or for the one of a recovery; and whether the
    /// fields of the devices are wanted.
    pub(super) fn new(
        source: &'r mut Source,
        report: &'r mut Report,
        pages: &'r mut PageList<W>,
        (recovery, fields): (bool, bool),
    ) -> MainChannel<'r, W> {
        let options = MainOptions { target_page: None, colo: true, ..MainOptions::default() };
        let decoder = if recovery {
            MainDecoder::learning_recovery(options)
        } else {
            MainDecoder::new(options)
        };
        let (last, state_at) = (Last::Other, None);
        MainChannel {
            source,
            report,
            pages,
            fields,
            decoder,
            last,
            open: None,
            colo: false,
            state_at,
        }
    }

    /// Reads the channel to its end.
    pub(super) fn read(mut self) -> Result<(), Fault> {
        let outcome = self.read_messages();
        self.report.target_page_size = self.decoder.target_page().size();
        self.report.bytes = self.decoder.offset();
        // RAM that a cut-off recording had begun is shown too.
        if let Some(section) = self.open.take() {
            self.close_section(section);
        }
        self.name_learned_blocks();
        match outcome {
            Ok(()) => self.close(),
            Err(fault) => {
                Self::note_cut_state(self.report, self.state_at);
                Err(fault)
            }
        }
    }

    /// QEMU's device state is told apart only when all of it has come: of less than that, the
    /// place and the length are all there is to show.
    fn note_cut_state(report: &mut Report, begins: Option<u64>) {
        let Some(begins) = begins else { return };
        let mut entry = Entry::new("device state that cannot be told apart", begins);
        entry.bytes = Some(report.bytes - begins);
        report.message(entry, false);
    }

    fn read_messages(&mut self) -> Result<(), Fault> {
        loop {
            let complete = self.decoder.is_complete();
            match feed::next(self.source, &mut self.decoder) {
                Ok(Some((at, message))) => self.message(at, message)?,
                Ok(None) => return Ok(()),
                // Behind the end of a migration without COLO nothing may come at all.
                Err(fault) => match self.source.pending().first() {
                    Some(found) if complete && !self.colo => {
                        return Err(Fault::trailing(self.decoder.offset(), *found));
                    }
                    Some(_) | None => return Err(fault),
                },
            }
        }
    }

    /// The recording has no more bytes.
    fn close(self) -> Result<(), Fault> {
        let MainChannel { source, report, decoder, colo, state_at, .. } = self;
        let (at, own_end) = (decoder.offset(), decoder.is_complete());
        let state = match (source.pending().first(), own_end && !colo) {
            (Some(found), true) => return Err(Fault::trailing(at, *found)),
            _ => decoder.close(source.pending()).inspect_err(|_| {
                Self::note_cut_state(report, state_at);
            })?,
        };
        if let Some(state) = state {
            let eof = device_state::note(report, &state, state_at.unwrap_or(at), None);
            report.message(Entry::new("EOF", eof), false);
        }
        report.complete = true;
        Ok(())
    }

    fn message(&mut self, at: u64, message: Decoded) -> Result<(), Fault> {
        let last = std::mem::replace(&mut self.last, Last::Other);
        match message {
            Decoded::NeedMore(_) | Decoded::Header(_) => {}
            Decoded::Configuration(configuration) => self.configuration(&configuration),
            Decoded::Command(command) => {
                self.report.command(command::entry(&command, at), last == Last::Command);
                self.last = Last::Command;
            }
            Decoded::SectionStart(header) => {
                let mut section = Section::ram("start", header.id.0, at);
                section.instance_id = Some(header.instance_id);
                section.version_id = Some(header.version_id);
                self.open = Some(section);
            }
            Decoded::MappedBlock { block, .. } => self.mapped_block(block)?,
            Decoded::RamSetup(blocks) => self.announced(&blocks),
            Decoded::SectionPart(id) => self.part(id, at, last),
            Decoded::SectionEnd(id) => self.open = Some(Section::ram("end", id.0, at)),
            Decoded::Ram(record) => self.record(at, record)?,
            Decoded::Footer(_) => {
                if let Some(section) = self.open.take() {
                    let part = section.kind == "part";
                    self.close_section(section);
                    self.last = if part { Last::Part } else { Last::Other };
                }
            }
            Decoded::PackageFollows { len } => self.package(at, len)?,
            Decoded::DeviceStateBegins => self.state_at = Some(at),
            Decoded::DeviceSection(section) => {
                let bytes = section.payload.len() as u64;
                self.report.section(Section::device(&section.header, bytes, at));
            }
            Decoded::DeviceState(state) => {
                let begins = self.state_at.take().unwrap_or(at);
                let eof = device_state::note(self.report, &state, begins, None);
                self.report.message(Entry::new("EOF", eof), false);
                if let Some(json) = &state.vmdesc {
                    let at = self.decoder.offset() - json.len() as u64;
                    description::note(self.report, json, at, self.fields)?;
                }
            }
            Decoded::Eof => self.report.message(Entry::new("EOF", at), false),
            Decoded::VmDescription(json) => {
                let at = self.decoder.offset() - json.len() as u64;
                description::note(self.report, &json, at, self.fields)?;
            }
            Decoded::Colo(message) => self.colo_word(at, message),
            Decoded::CheckpointFollows { len } => self.checkpoint(at, len)?,
        }
        Ok(())
    }

    fn configuration(&mut self, configuration: &Configuration) {
        self.report.machine = Some(configuration.machine.to_string());
        self.report.capabilities =
            configuration.capabilities.iter().map(ToString::to_string).collect();
        self.report.uuid = configuration.uuid.as_ref().map(super::uuid_text);
        self.report.mapped_ram = configuration.has(whimbrel_wire::header::capability::MAPPED_RAM);
    }

    /// Counts the pages of a kept block by its bitmap, and leaves the pages out.
    fn mapped_block(&mut self, index: BlockIndex) -> Result<(), Fault> {
        let blocks = self.decoder.blocks_so_far();
        let info = blocks.get(index).expect("the block just announced").clone();
        let places = info.mapped_ram.expect("a block of a mapped-ram file has its places");
        let mut block = Block::announced(&info);
        let mut bitmap = Bitmap::new(&info, places, self.decoder.target_page());
        let to_bitmap = places.bitmap_offset - self.decoder.offset();
        let what = "the bitmap of a RAM block";
        feed::skip_some(self.source, &mut self.decoder, to_bitmap, what)?;
        let pages = &mut *self.pages;
        let len = bitmap.len();
        let outcome = feed::take(self.source, &mut self.decoder, len, what, |piece| {
            bitmap.piece(piece, pages);
        });
        if let Some(places) = &mut block.mapped_ram {
            places.present = bitmap.present;
        }
        self.report.blocks.push(block);
        outcome?;
        bitmap.check()?;
        feed::skip(self.source, &mut self.decoder, "the pages of a RAM block")
    }

    fn announced(&mut self, blocks: &BlockList) {
        if !self.report.mapped_ram {
            self.report.blocks = blocks.iter().map(|(_, info)| Block::announced(info)).collect();
        }
    }

    /// A part of RAM goes on with the part before if nothing came between them.
    fn part(&mut self, id: SectionId, at: u64, last: Last) {
        let before = self
            .report
            .sections
            .pop_if(|section| last == Last::Part && section.kind == "part" && section.id == id.0);
        self.open = Some(match before {
            Some(mut section) => {
                section.count += 1;
                section
            }
            None => Section::ram("part", id.0, at),
        });
    }

    fn close_section(&mut self, mut section: Section) {
        section.bytes = self.decoder.offset() - section.offset;
        self.report.section(section);
    }

    fn record(&mut self, at: u64, record: RamRecord) -> Result<(), Fault> {
        self.report.ram.count(record);
        if let Some(pages) = self.open.as_mut().and_then(|section| section.ram.as_mut()) {
            pages.count(record);
        }
        super::records::note(self.report, self.pages, self.decoder.blocks(), record, {
            (at, self.decoder.target_page())
        });
        feed::skip(self.source, &mut self.decoder, "the rest of a page")
    }

    /// The blocks of a recovery are known only once their records have named them.
    fn name_learned_blocks(&mut self) {
        super::records::name_blocks(self.report, self.decoder.blocks());
    }

    fn package(&mut self, at: u64, len: u32) -> Result<(), Fault> {
        let mut entry = Entry::new("PACKAGED", at);
        entry.bytes = Some(len.into());
        self.report.command(entry, false);
        let base = self.decoder.offset();
        let Some(bytes) = self.whole("the rest of the package")? else { return Ok(()) };
        let package = whimbrel_wire::Package::decode(&bytes, base, self.decoder.delimiting())?;
        device_state::note_package(self.report, &package, base);
        Ok(())
    }

    fn checkpoint(&mut self, at: u64, len: u64) -> Result<(), Fault> {
        let mut entry = Entry::new("VMSTATE_SIZE", at);
        entry.bytes = Some(len);
        self.report.message(entry, false);
        let base = self.decoder.offset();
        let Some(bytes) = self.whole("the rest of the checkpoint")? else { return Ok(()) };
        let delimiting = self.decoder.delimiting();
        let state = whimbrel_wire::package::decode_checkpoint(&bytes, base, delimiting)?;
        device_state::note(self.report, &state, base, Some("checkpoint"));
        Ok(())
    }

    /// All that follows the last message, unless it is too much to hold.
    fn whole(&mut self, what: &'static str) -> Result<Option<Vec<u8>>, Fault> {
        let len = self.decoder.payload_left();
        if len > PACKAGE_MAX {
            feed::skip(self.source, &mut self.decoder, what)?;
            return Ok(None);
        }
        let mut bytes = Vec::new();
        feed::take(self.source, &mut self.decoder, len, what, |piece| {
            bytes.extend_from_slice(piece);
        })?;
        Ok(Some(bytes))
    }

    fn colo_word(&mut self, at: u64, message: ColoMessage) {
        self.colo = true;
        self.report.message(command::colo_entry(message, at), false);
    }
}
