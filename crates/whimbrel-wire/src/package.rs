//! The package of a postcopy: the device state in one piece, between LISTEN and RUN.

use alloc::vec::Vec;

use crate::cut::{Delimit, Ending, Item, cut};
use crate::device::DeviceSection;
use crate::{Command, Error, ErrorKind};

/// The PING that precedes RUN in every package.
pub const PACKAGE_PING: u32 = 3;

/// The PING by which sources from 10.2 on learn that the package was loaded.
pub const PACKAGE_LOADED_PING: u32 = 0x42;

/// What follows [`Command::Packaged`].
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Package {
    /// The device state.
    pub sections: Vec<DeviceSection>,
    /// Values of the PINGs after it, in their order.
    pub pings: Vec<u32>,
}

/// How a package's device sections are told apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Delimiting {
    /// By their footers: QEMU's.
    Footers,
    /// By the length each payload begins with: whimbrel's own.
    OwnLength,
}

impl Package {
    /// Appends LISTEN, the sections, the PINGs and RUN.
    pub fn encode(&self, out: &mut Vec<u8>) {
        Command::PostcopyListen.encode(out);
        self.sections.iter().for_each(|section| section.encode(out));
        self.pings.iter().for_each(|value| Command::Ping(*value).encode(out));
        Command::PostcopyRun.encode(out);
    }

    /// Takes a whole package apart; `base` is where it stands in the stream.
    ///
    /// # Errors
    /// When it is not LISTEN, sections, PINGs and RUN, and nothing more.
    pub fn decode(bytes: &[u8], base: u64, delimiting: Delimiting) -> Result<Self, Error> {
        let delimit = match delimiting {
            Delimiting::Footers => Delimit::Footer,
            Delimiting::OwnLength => Delimit::OwnLength,
        };
        let mut items = cut(bytes, base, delimit, Ending::Run)?.into_iter();
        let wrong = |problem| Error::new(base, ErrorKind::DeviceState { problem });
        if items.next() != Some(Item::Command(Command::PostcopyListen)) {
            return Err(wrong("expected a package that begins with POSTCOPY_LISTEN"));
        }
        let mut package = Self::default();
        for item in items {
            match item {
                Item::Section(section) if package.pings.is_empty() => {
                    package.sections.push(section);
                }
                Item::Section(_) => {
                    return Err(wrong("expected no section after the package's PINGs"));
                }
                Item::Command(Command::Ping(value)) => package.pings.push(value),
                // `cut` has seen to it that RUN is the last item and comes once.
                Item::Command(Command::PostcopyRun) => {}
                Item::Command(command) => {
                    let state = "a package holds LISTEN, PING and RUN";
                    let command = command.name();
                    return Err(Error::new(base, ErrorKind::CommandOrder { command, state }));
                }
            }
        }
        Ok(package)
    }
}

/// Takes the device state of a COLO checkpoint apart: sections and EOF, and nothing more.
///
/// # Errors
/// When it is anything else.
pub fn decode_checkpoint(
    bytes: &[u8],
    base: u64,
    delimiting: Delimiting,
) -> Result<crate::DeviceState, Error> {
    let delimit = match delimiting {
        Delimiting::Footers => Delimit::Footer,
        Delimiting::OwnLength => Delimit::OwnLength,
    };
    Ok(crate::device_tail::state_of(cut(bytes, base, delimit, Ending::Eof)?, None))
}
