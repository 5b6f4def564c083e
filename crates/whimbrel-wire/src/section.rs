//! Sections: the marks that divide a stream, the header that names a section, its footer.

use alloc::vec::Vec;
use core::fmt;

use crate::cursor::{Cursor, Stop};
use crate::{ErrorKind, Name};

/// The bytes that the top level of a stream can begin with.
pub(crate) mod mark {
    pub(crate) const EOF: u8 = 0x00;
    pub(crate) const START: u8 = 0x01;
    pub(crate) const PART: u8 = 0x02;
    pub(crate) const END: u8 = 0x03;
    pub(crate) const FULL: u8 = 0x04;
    pub(crate) const SUBSECTION: u8 = 0x05;
    pub(crate) const VM_DESCRIPTION: u8 = 0x06;
    pub(crate) const CONFIGURATION: u8 = 0x07;
    pub(crate) const COMMAND: u8 = 0x08;
    pub(crate) const FOOTER: u8 = 0x7e;
}

/// Bytes of a footer: its mark and a section id.
pub(crate) const FOOTER_LEN: usize = 5;

/// The byte after which a stream has nothing more but a description of its devices.
pub fn encode_eof(out: &mut Vec<u8>) {
    out.push(mark::EOF);
}

/// A section's number, private to one run of one source.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SectionId(pub u32);

impl fmt::Display for SectionId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

impl SectionId {
    /// Appends SECTION_PART: more of a section that was started.
    pub fn encode_part(self, out: &mut Vec<u8>) {
        self.encode_marked(mark::PART, out);
    }

    /// Appends SECTION_END: the last of a section that was started.
    pub fn encode_end(self, out: &mut Vec<u8>) {
        self.encode_marked(mark::END, out);
    }

    /// Appends the footer that closes every START, PART, END and FULL.
    pub fn encode_footer(self, out: &mut Vec<u8>) {
        self.encode_marked(mark::FOOTER, out);
    }

    fn encode_marked(self, mark: u8, out: &mut Vec<u8>) {
        out.push(mark);
        out.extend_from_slice(&self.0.to_be_bytes());
    }

    /// The five bytes of this section's footer.
    pub(crate) const fn footer(self) -> [u8; FOOTER_LEN] {
        let [a, b, c, d] = self.0.to_be_bytes();
        [mark::FOOTER, a, b, c, d]
    }

    pub(crate) fn parse_footer(self, cursor: &mut Cursor<'_>) -> Result<(), Stop> {
        let at = cursor.at();
        let found = cursor.array::<FOOTER_LEN>()?;
        if *found == self.footer() {
            return Ok(());
        }
        let found = found.iter().fold(0, |value, byte| value << 8 | u64::from(*byte));
        Err(Stop::Bad { at, kind: ErrorKind::Footer { expected: self, found } })
    }
}

/// The header of SECTION_START and SECTION_FULL, which binds a number to a name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SectionHeader {
    /// The number by which PART, END and the footer refer to this section.
    pub id: SectionId,
    /// Which device or handler: `ram`, `timer`, `0000:00:1f.2/ich9_ahci`.
    pub name: Name,
    /// Which of several with that name.
    pub instance_id: u32,
    /// Version of the payload's format.
    pub version_id: u32,
}

impl SectionHeader {
    /// Appends SECTION_START with this header.
    pub fn encode_start(&self, out: &mut Vec<u8>) {
        self.encode_marked(mark::START, out);
    }

    /// Appends SECTION_FULL with this header.
    pub fn encode_full(&self, out: &mut Vec<u8>) {
        self.encode_marked(mark::FULL, out);
    }

    fn encode_marked(&self, mark: u8, out: &mut Vec<u8>) {
        self.id.encode_marked(mark, out);
        self.name.encode(out);
        out.extend_from_slice(&self.instance_id.to_be_bytes());
        out.extend_from_slice(&self.version_id.to_be_bytes());
    }

    /// Reads what follows the mark.
    pub(crate) fn parse(cursor: &mut Cursor<'_>) -> Result<Self, Stop> {
        Ok(Self {
            id: SectionId(cursor.be32()?),
            name: cursor.name()?,
            instance_id: cursor.be32()?,
            version_id: cursor.be32()?,
        })
    }
}
