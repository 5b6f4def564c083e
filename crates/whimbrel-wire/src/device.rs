//! Device state: FULL sections, whose payloads only the devices understand.
//!
//! Nothing in the stream says how long a FULL section is. QEMU's are delimited from outside
//! ([`crate::DeviceTail`], [`crate::Package`]); whimbrel's own machines, whose type begins with
//! `whimbrel-`, begin each payload with its length, so that a section can be loaded as soon as
//! it has arrived. That length is an ordinary field of the payload: a description of the state
//! made by [`crate::vmdesc::describe`] lets every other tool delimit it too.

use alloc::vec::Vec;

use crate::cursor::Cursor;
use crate::section::encode_eof;
use crate::vmdesc::encode_vm_description;
use crate::{Command, ErrorKind, SectionHeader};

/// One FULL section.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceSection {
    /// Which device, and the version of its payload.
    pub header: SectionHeader,
    /// The device's state, including the length that whimbrel's own sections begin with.
    pub payload: Vec<u8>,
}

/// Bytes of the length that whimbrel's own payloads begin with.
pub(crate) const OWN_LENGTH: usize = 4;

impl DeviceSection {
    /// Makes a section of whimbrel's own kind, whose payload is the length of `data` and `data`.
    ///
    /// # Panics
    /// When `data` is longer than a length of 32 bits can say.
    #[must_use]
    pub fn with_own_length(header: SectionHeader, data: &[u8]) -> Self {
        let len = u32::try_from(data.len()).expect("device state of less than 4 GiB");
        let mut payload = Vec::with_capacity(OWN_LENGTH + data.len());
        payload.extend_from_slice(&len.to_be_bytes());
        payload.extend_from_slice(data);
        Self { header, payload }
    }

    /// The data of a section of whimbrel's own kind.
    ///
    /// # Errors
    /// When the length it begins with is not that of the rest of its payload.
    pub fn own_data(&self) -> Result<&[u8], ErrorKind> {
        let mut cursor = Cursor::new(&self.payload);
        match cursor.be32() {
            Ok(len) if u64::from(len) == cursor.rest().len() as u64 => Ok(cursor.rest()),
            Ok(_) | Err(_) => Err(ErrorKind::DeviceSection {
                name: self.header.name.clone(),
                problem: "its length is not that of its payload",
            }),
        }
    }

    /// Appends SECTION_FULL, the payload and the footer.
    pub fn encode(&self, out: &mut Vec<u8>) {
        self.header.encode_full(out);
        out.extend_from_slice(&self.payload);
        self.header.id.encode_footer(out);
    }
}

/// All of a machine's device state: what stands in a precopy stream after the guest's RAM.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct DeviceState {
    /// The sections, in an order that loading must keep.
    pub sections: Vec<DeviceSection>,
    /// Commands among the sections, with the number of sections before each.
    pub commands: Vec<(usize, Command)>,
    /// The JSON text that describes the sections.
    pub vmdesc: Option<Vec<u8>>,
}

impl DeviceState {
    /// Appends sections and commands, EOF, and the description if there is one.
    pub fn encode(&self, out: &mut Vec<u8>) {
        let mut commands = self.commands.iter().peekable();
        for (place, section) in self.sections.iter().enumerate() {
            while let Some((_, command)) = commands.next_if(|(before, _)| *before <= place) {
                command.encode(out);
            }
            section.encode(out);
        }
        commands.for_each(|(_, command)| command.encode(out));
        encode_eof(out);
        if let Some(json) = &self.vmdesc {
            encode_vm_description(json, out);
        }
    }
}
