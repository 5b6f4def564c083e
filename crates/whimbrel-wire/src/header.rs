//! The start of a main stream: magic, version, and what kind of machine is coming.

use alloc::vec::Vec;

use crate::cursor::{Cursor, Stop, bad};
use crate::section::mark;
use crate::{ErrorKind, Name, TargetPage};

/// `QEVM`, the first four bytes of every main stream.
pub const FILE_MAGIC: u32 = 0x5145_564d;

/// The one version of the stream format in use.
pub const FILE_VERSION: u32 = 3;

/// The first eight bytes of a main stream: [`FILE_MAGIC`] and [`FILE_VERSION`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct FileHeader;

impl FileHeader {
    /// Appends magic and version.
    pub fn encode(self, out: &mut Vec<u8>) {
        out.extend_from_slice(&FILE_MAGIC.to_be_bytes());
        out.extend_from_slice(&FILE_VERSION.to_be_bytes());
    }

    pub(crate) fn parse(cursor: &mut Cursor<'_>) -> Result<Self, Stop> {
        let at = cursor.at();
        let magic = cursor.be32()?;
        if magic != FILE_MAGIC {
            let expected = "the magic 0x5145564d (\"QEVM\")";
            return bad(at, ErrorKind::Unexpected { expected, found: magic.into() });
        }
        let at = cursor.at();
        let found = cursor.be32()?;
        if found != FILE_VERSION {
            let what = "stream format";
            return bad(at, ErrorKind::Version { what, expected: FILE_VERSION, found });
        }
        Ok(Self)
    }
}

/// The name of a machine type or capability set that must be equal on both sides.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Configuration {
    /// The full, versioned name of the machine type: `pc-q35-10.0`.
    pub machine: Name,
    /// Page size of the guest, present when it is not the smallest its CPU can have.
    pub target_page: Option<TargetPage>,
    /// Those capabilities of the sender that change the stream and must be equal on both sides:
    /// `mapped-ram`, `x-ignore-shared`. When there are none, nothing is sent.
    pub capabilities: Vec<Name>,
    /// The VM's UUID, present under the capability `validate-uuid`.
    pub uuid: Option<[u8; 16]>,
}

/// Names that a configuration may list in [`Configuration::capabilities`].
pub mod capability {
    /// RAM has fixed places in the file.
    pub const MAPPED_RAM: &str = "mapped-ram";
    /// Shared blocks are not sent.
    pub const IGNORE_SHARED: &str = "x-ignore-shared";
}

const TARGET_PAGE_BITS: &str = "configuration/target-page-bits";
const CAPABILITIES: &str = "configuration/capabilities";
const UUID: &str = "configuration/uuid";
const SUBSECTION_VERSION: u32 = 1;

/// Most capabilities a configuration can list here; QEMU knows two.
const CAPABILITIES_MAX: u32 = 64;

impl Configuration {
    /// A configuration of nothing but a machine type.
    #[must_use]
    pub const fn new(machine: Name) -> Self {
        Self { machine, target_page: None, capabilities: Vec::new(), uuid: None }
    }

    /// Whether the sender has this capability on.
    #[must_use]
    pub fn has(&self, capability: &str) -> bool {
        self.capabilities.iter().any(|name| *name == capability)
    }

    /// Whether the machine is one of whimbrel's own, whose device sections carry their length
    /// (see [`crate::device`]).
    #[must_use]
    pub fn is_whimbrel(&self) -> bool {
        self.machine.as_bytes().starts_with(b"whimbrel-")
    }

    /// Appends the configuration mark, the machine name and the subsections.
    pub fn encode(&self, out: &mut Vec<u8>) {
        out.push(mark::CONFIGURATION);
        out.extend_from_slice(&u32::from(self.machine.length_byte()).to_be_bytes());
        out.extend_from_slice(self.machine.as_bytes());
        if let Some(page) = self.target_page {
            encode_subsection(TARGET_PAGE_BITS, out);
            out.extend_from_slice(&page.bits().to_be_bytes());
        }
        if !self.capabilities.is_empty() {
            encode_subsection(CAPABILITIES, out);
            let count = u32::try_from(self.capabilities.len()).unwrap_or(u32::MAX);
            out.extend_from_slice(&count.to_be_bytes());
            self.capabilities.iter().for_each(|name| name.encode(out));
        }
        if let Some(uuid) = &self.uuid {
            encode_subsection(UUID, out);
            out.extend_from_slice(uuid);
        }
    }

    /// Reads from the configuration mark to the first byte that begins no subsection, which
    /// stays unread.
    pub(crate) fn parse(cursor: &mut Cursor<'_>) -> Result<Self, Stop> {
        cursor.mark(mark::CONFIGURATION, "the configuration mark 0x7")?;
        let at = cursor.at();
        let len = cursor.be32()?;
        let too_long = ErrorKind::Unexpected {
            expected: "a machine type's name of 1 to 255 bytes",
            found: len.into(),
        };
        let name = match usize::try_from(len) {
            Ok(len) if len <= Name::MAX => cursor.bytes(len)?,
            Ok(_) | Err(_) => return bad(at, too_long),
        };
        let Ok(machine) = Name::new(name) else { return bad(at, too_long) };
        let mut configuration = Self::new(machine);
        let mut seen = 0;
        while cursor.peek()? == mark::SUBSECTION {
            configuration.parse_subsection(cursor, &mut seen)?;
        }
        Ok(configuration)
    }

    /// `seen` is the place in the order of the last subsection read.
    fn parse_subsection(&mut self, cursor: &mut Cursor<'_>, seen: &mut u8) -> Result<(), Stop> {
        let at = cursor.at();
        cursor.u8()?;
        let name = cursor.name()?;
        let place = match name.as_str() {
            Some(TARGET_PAGE_BITS) => 1,
            Some(CAPABILITIES) => 2,
            Some(UUID) => 3,
            Some(_) | None => 0,
        };
        if place <= *seen {
            return bad(at, ErrorKind::Subsection { name });
        }
        *seen = place;
        let at = cursor.at();
        let found = cursor.be32()?;
        if found != SUBSECTION_VERSION {
            let (what, expected) = ("configuration subsection", SUBSECTION_VERSION);
            return bad(at, ErrorKind::Version { what, expected, found });
        }
        match place {
            1 => self.target_page = Some(parse_page_bits(cursor)?),
            2 => self.capabilities = parse_capabilities(cursor)?,
            _ => self.uuid = Some(*cursor.array()?),
        }
        Ok(())
    }
}

fn encode_subsection(name: &str, out: &mut Vec<u8>) {
    out.push(mark::SUBSECTION);
    out.push(u8::try_from(name.len()).unwrap_or(u8::MAX));
    out.extend_from_slice(name.as_bytes());
    out.extend_from_slice(&SUBSECTION_VERSION.to_be_bytes());
}

fn parse_page_bits(cursor: &mut Cursor<'_>) -> Result<TargetPage, Stop> {
    let at = cursor.at();
    let bits = cursor.be32()?;
    TargetPage::from_bits(bits).ok_or(Stop::Bad {
        at,
        kind: ErrorKind::Unexpected { expected: "10 to 20 page bits", found: bits.into() },
    })
}

fn parse_capabilities(cursor: &mut Cursor<'_>) -> Result<Vec<Name>, Stop> {
    let at = cursor.at();
    let count = cursor.be32()?;
    if count == 0 {
        let expected = "at least one capability";
        return bad(at, ErrorKind::Unexpected { expected, found: 0 });
    }
    if count > CAPABILITIES_MAX {
        let what = "number of capabilities";
        let limit = CAPABILITIES_MAX.into();
        return bad(at, ErrorKind::TooLarge { what, found: count.into(), limit });
    }
    (0..count).map(|_| cursor.name()).collect()
}
