//! What was found in a recording: the one object that `--json` prints, and that the text shows.
//!
//! A recording may be of any length, so lists have a bound; what comes later is counted.

use serde::Serialize;
use whimbrel_wire::{BlockInfo, Name, RamRecord, SectionHeader};

use super::feed::Fault;

/// Most entries of a list that are kept.
const ENTRIES_MAX: usize = 1 << 16;

/// All that was found.
#[derive(Debug, Default, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(super) struct Report {
    pub(super) file: String,
    pub(super) kind: &'static str,
    /// RAM has fixed places: a kept VM.
    pub(super) mapped_ram: bool,
    pub(super) machine: Option<String>,
    /// The guest's page size in bytes.
    pub(super) target_page_size: u64,
    pub(super) capabilities: Vec<String>,
    pub(super) uuid: Option<String>,
    /// The number of a multifd channel.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) channel: Option<u8>,
    pub(super) blocks: Vec<Block>,
    pub(super) sections: Vec<Section>,
    pub(super) commands: Vec<Entry>,
    /// Messages of the return path and words of COLO.
    pub(super) messages: Vec<Entry>,
    pub(super) ram: Ram,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) multifd: Option<Multifd>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) vm_description: Option<Description>,
    /// Entries that did not fit the lists.
    pub(super) left_out: u64,
    /// Bytes that were understood.
    pub(super) bytes: u64,
    /// Whether the recording ends where it may.
    pub(super) complete: bool,
    pub(super) error: Option<Fault>,
}

/// A RAM block.
#[derive(Debug, Default, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(super) struct Block {
    pub(super) name: String,
    /// Unknown where the list of blocks is on another channel.
    pub(super) length: Option<u64>,
    pub(super) page_size: Option<u64>,
    pub(super) address: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) mapped_ram: Option<Places>,
    #[serde(flatten)]
    pub(super) pages: Pages,
    /// Faults of the destination in this block.
    #[serde(skip_serializing_if = "is_zero")]
    pub(super) requests: u64,
    /// Bytes that the faults asked for.
    #[serde(skip_serializing_if = "is_zero")]
    pub(super) requested_bytes: u64,
}

/// Where a block is in the file of a kept VM.
#[derive(Debug, Clone, Copy, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(super) struct Places {
    pub(super) bitmap_offset: u64,
    pub(super) pages_offset: u64,
    /// Pages that are not zero.
    pub(super) present: u64,
}

/// Pages by how they were sent; a page sent twice counts twice.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub(super) struct Pages {
    pub(super) normal: u64,
    pub(super) duplicate: u64,
    pub(super) xbzrle: u64,
}

/// RAM of the whole recording, in QMP's names where it has them.
#[derive(Debug, Clone, Copy, Default, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(super) struct Ram {
    #[serde(flatten)]
    pub(super) pages: Pages,
    pub(super) normal_bytes: u64,
    pub(super) xbzrle_bytes: u64,
    pub(super) end_of_section: u64,
    pub(super) multifd_flush: u64,
}

/// A section, or several parts of RAM in a row.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(super) struct Section {
    #[serde(rename = "type")]
    pub(super) kind: &'static str,
    pub(super) name: String,
    pub(super) id: u32,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) instance_id: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) version_id: Option<u32>,
    /// Where its mark is; of the first if there are several.
    pub(super) offset: u64,
    /// From the mark to the end of the footer for RAM, of the payload for a device.
    pub(super) bytes: u64,
    pub(super) count: u64,
    /// `package` or `checkpoint`, if it stands in one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) inside: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) ram: Option<Pages>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) fields: Option<Vec<super::description::Field>>,
}

/// A command or message, or several alike in a row.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(super) struct Entry {
    pub(super) name: &'static str,
    /// Where the first of them begins.
    pub(super) offset: u64,
    pub(super) count: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) value: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) block: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) ranges: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) bytes: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) pages: Option<u64>,
    /// `package`, if it stands in one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) inside: Option<&'static str>,
}

/// What a multifd channel carried.
#[derive(Debug, Default, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(super) struct Multifd {
    pub(super) packets: u64,
    pub(super) syncs: u64,
    /// Bytes of page data as they are on the wire.
    pub(super) data_bytes: u64,
    /// Packets with page data, by the method of their compression.
    pub(super) methods: std::collections::BTreeMap<String, u64>,
    pub(super) device_packets: u64,
    pub(super) device_bytes: u64,
}

/// The description of the device state.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(super) struct Description {
    pub(super) bytes: u64,
    pub(super) devices: u64,
}

fn is_zero(value: &u64) -> bool {
    *value == 0
}

impl Pages {
    pub(super) fn is_empty(&self) -> bool {
        *self == Pages::default()
    }

    /// Counts a record; others than pages are not.
    pub(super) fn count(&mut self, record: RamRecord) {
        match record {
            RamRecord::Zero { .. } => self.duplicate += 1,
            RamRecord::PageFollows { .. } => self.normal += 1,
            RamRecord::XbzrleFollows { .. } => self.xbzrle += 1,
            RamRecord::EndOfSection | RamRecord::MultifdFlush => {}
        }
    }

    pub(super) fn add(&mut self, other: Pages) {
        self.normal += other.normal;
        self.duplicate += other.duplicate;
        self.xbzrle += other.xbzrle;
    }
}

impl Ram {
    pub(super) fn count(&mut self, record: RamRecord) {
        self.pages.count(record);
        match record {
            RamRecord::PageFollows { len, .. } => self.normal_bytes += len as u64,
            RamRecord::XbzrleFollows { len, .. } => self.xbzrle_bytes += len as u64,
            RamRecord::EndOfSection => self.end_of_section += 1,
            RamRecord::MultifdFlush => self.multifd_flush += 1,
            RamRecord::Zero { .. } => {}
        }
    }
}

impl Block {
    /// A block of which only the name is known.
    pub(super) fn named(name: &Name) -> Block {
        Block { name: name.to_string(), ..Block::default() }
    }

    /// A block as the setup announces it.
    pub(super) fn announced(info: &BlockInfo) -> Block {
        Block {
            length: Some(info.used_length),
            page_size: info.page_size,
            address: info.guest_address,
            mapped_ram: info.mapped_ram.map(|header| Places {
                bitmap_offset: header.bitmap_offset,
                pages_offset: header.pages_offset,
                present: 0,
            }),
            ..Block::named(&info.name)
        }
    }
}

impl Section {
    /// A section of RAM that begins at `offset`.
    pub(super) fn ram(kind: &'static str, id: u32, offset: u64) -> Section {
        Section {
            kind,
            name: whimbrel_wire::RAM_SECTION.to_owned(),
            id,
            instance_id: None,
            version_id: None,
            offset,
            bytes: 0,
            count: 1,
            inside: None,
            ram: Some(Pages::default()),
            fields: None,
        }
    }

    /// A device's section of so many bytes of payload.
    pub(super) fn device(header: &SectionHeader, bytes: u64, offset: u64) -> Section {
        Section {
            kind: "full",
            name: header.name.to_string(),
            id: header.id.0,
            instance_id: Some(header.instance_id),
            version_id: Some(header.version_id),
            bytes,
            ram: None,
            ..Section::ram("full", header.id.0, offset)
        }
    }
}

impl Entry {
    pub(super) fn new(name: &'static str, offset: u64) -> Entry {
        Entry { name, offset, count: 1, ..Entry::default() }
    }

    /// Takes in another of the same name and block that comes right behind.
    fn absorb(&mut self, next: &Entry) -> bool {
        let alike = self.name == next.name
            && self.block == next.block
            && self.value == next.value
            && self.inside == next.inside;
        if !alike {
            return false;
        }
        let add = |to: &mut Option<u64>, more: Option<u64>| {
            if let (Some(to), Some(more)) = (to, more) {
                *to = to.saturating_add(more);
            }
        };
        add(&mut self.ranges, next.ranges);
        add(&mut self.bytes, next.bytes);
        add(&mut self.pages, next.pages);
        self.count += next.count;
        true
    }
}

impl Report {
    /// Adds a section.
    pub(super) fn section(&mut self, section: Section) {
        if self.sections.len() < ENTRIES_MAX {
            self.sections.push(section);
        } else {
            self.left_out += 1;
        }
    }

    /// Adds a command; `again` if the one before it came right before.
    pub(super) fn command(&mut self, command: Entry, again: bool) {
        self.left_out += add(&mut self.commands, command, again);
    }

    /// Adds a message; `again` if the one before it came right before.
    pub(super) fn message(&mut self, message: Entry, again: bool) {
        self.left_out += add(&mut self.messages, message, again);
    }

    /// The block with a name, which is new if the list of blocks is on another channel. Beyond
    /// the number of blocks that the protocol is believed to have, the last one stands for all.
    pub(super) fn block_named(&mut self, name: &Name) -> &mut Block {
        let text = name.to_string();
        let place = match self.blocks.iter().position(|block| block.name == text) {
            Some(place) => place,
            None if self.blocks.len() < whimbrel_wire::BLOCKS_MAX => {
                self.blocks.push(Block::named(name));
                self.blocks.len() - 1
            }
            None => self.blocks.len() - 1,
        };
        &mut self.blocks[place]
    }
}

/// Returns how many entries were left out.
fn add(list: &mut Vec<Entry>, entry: Entry, again: bool) -> u64 {
    if again && list.last_mut().is_some_and(|last| last.absorb(&entry)) {
        return 0;
    }
    if list.len() == ENTRIES_MAX {
        return 1;
    }
    list.push(entry);
    0
}
