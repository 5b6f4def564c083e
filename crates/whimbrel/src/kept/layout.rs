//! Where everything is in a kept VM's file.

use whimbrel_ram::{BlockIndex, GuestRam};
use whimbrel_wire::{
    BlockInfo, Configuration, FileHeader, MappedRamHeader, TargetPage, encode_end_of_section,
};

use crate::error::Error;
use crate::source::setup::{RAM_SECTION, block_list, name, ram_section};

/// A piece of the stream between the pages, and its place in the file.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Words {
    pub(crate) at: u64,
    pub(crate) bytes: Vec<u8>,
}

/// The places of a guest's blocks.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Layout {
    /// What precedes each block's bitmap.
    words: Vec<Words>,
    headers: Vec<MappedRamHeader>,
    /// Behind the pages of the last block.
    end: u64,
}

impl Layout {
    /// For a guest with these blocks. `early` are encoded sections that come before RAM.
    pub(crate) fn plan(
        configuration: &Configuration,
        early: &[u8],
        ram: &GuestRam,
    ) -> Result<Layout, Error> {
        let mut bytes = Vec::new();
        FileHeader.encode(&mut bytes);
        configuration.encode(&mut bytes);
        bytes.extend_from_slice(early);
        ram_section()?.encode_start(&mut bytes);
        block_list(ram)?.encode_total(&mut bytes);
        let mut layout = Layout { words: Vec::new(), headers: Vec::new(), end: 0 };
        for (_, block) in ram.blocks() {
            let mut info = BlockInfo::new(name(block.name())?, block.len());
            let record_len = 1 + block.name().len() as u64 + 8;
            let header_at = layout.end + bytes.len() as u64 + record_len;
            let header = MappedRamHeader::place(header_at, block.len(), TargetPage::FOUR_KIB);
            let header = header.ok_or_else(|| {
                Error::Refused(format!("RAM block {} is too long for a file", block.name()))
            })?;
            info.mapped_ram = Some(header);
            info.encode(&mut bytes);
            layout.words.push(Words { at: layout.end, bytes: std::mem::take(&mut bytes) });
            layout.headers.push(header);
            layout.end = header.end(block.len());
        }
        Ok(layout)
    }

    pub(crate) fn header(&self, block: BlockIndex) -> &MappedRamHeader {
        &self.headers[block.index()]
    }

    /// Whether the pages are where the other one has them.
    pub(crate) fn has_pages_of(&self, other: &Layout) -> bool {
        let places = |layout: &Layout| -> Vec<u64> {
            layout.headers.iter().map(|header| header.pages_offset).collect()
        };
        places(self) == places(other)
    }

    /// The stream around the pages; `devices` are encoded sections with the end of it.
    pub(crate) fn into_words(mut self, devices: &[u8]) -> Vec<Words> {
        let mut bytes = Vec::new();
        encode_end_of_section(&mut bytes);
        RAM_SECTION.encode_footer(&mut bytes);
        RAM_SECTION.encode_end(&mut bytes);
        encode_end_of_section(&mut bytes);
        RAM_SECTION.encode_footer(&mut bytes);
        bytes.extend_from_slice(devices);
        self.words.push(Words { at: self.end, bytes });
        self.words
    }
}
