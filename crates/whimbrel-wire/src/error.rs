//! What can be wrong with the bytes a peer sent, and where.

use alloc::string::String;

use crate::{Name, SectionId};

/// Something in a stream that the protocol does not allow.
///
/// A decoder that returned an error has lost its place: it must not be used again.
/// The channel is not named here, because the codec does not know it; whoever owns the
/// connection puts its name in front.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("byte {offset}: {kind}")]
pub struct Error {
    /// Position in the stream of the first byte of what is wrong, counted from the first byte
    /// of the connection (or of the file).
    pub offset: u64,
    /// What was expected and what was found.
    pub kind: ErrorKind,
}

impl Error {
    /// Puts a place to a cause.
    #[must_use]
    pub const fn new(offset: u64, kind: ErrorKind) -> Self {
        Self { offset, kind }
    }
}

/// The ways in which bytes can break the protocol.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ErrorKind {
    /// A fixed value is not there.
    #[error("expected {expected}, found {found:#x}")]
    Unexpected {
        /// What the protocol has in this place.
        expected: &'static str,
        /// The value that was read instead.
        found: u64,
    },
    /// A number is above what this side is ready to take.
    #[error("{what}: {found} is more than the {limit} allowed")]
    TooLarge {
        /// Which number, with its unit.
        what: &'static str,
        /// Its value.
        found: u64,
        /// The largest value allowed.
        limit: u64,
    },
    /// The stream ended in the middle of something.
    #[error("the stream ends here, expected {expected}")]
    Truncated {
        /// What was still to come.
        expected: &'static str,
    },
    /// More bytes came after the last message.
    #[error("expected the end of the stream, found the byte {found:#04x}")]
    Trailing {
        /// The first byte too many.
        found: u8,
    },
    /// A stream of a version that this side does not speak.
    #[error("expected {what} version {expected}, found version {found}")]
    Version {
        /// What has a version.
        what: &'static str,
        /// The version this side speaks.
        expected: u32,
        /// The version of the sender.
        found: u32,
    },
    /// A configuration subsection that is unknown, doubled or out of order.
    #[error(
        "expected a configuration subsection (target-page-bits, capabilities, uuid, in this \
         order), found \"{name}\""
    )]
    Subsection {
        /// Its name.
        name: Name,
    },
    /// The sender's guest has another page size.
    #[error("expected a target page of {expected} bytes, found {found}")]
    TargetPage {
        /// The page size of this side.
        expected: u64,
        /// The page size of the sender.
        found: u64,
    },
    /// A section that carries data while the guest runs, and that only its own device could read.
    #[error("expected section \"ram\", found the unknown iterable section \"{name}\"")]
    UnknownSection {
        /// Its name.
        name: Name,
    },
    /// A section that is not where it may be.
    #[error("section {id} {problem}")]
    SectionOrder {
        /// The section's number in this stream.
        id: SectionId,
        /// What is wrong about it.
        problem: &'static str,
    },
    /// The footer after a section is missing or names another section.
    #[error("expected the footer of section {expected}, found {found:#x}")]
    Footer {
        /// The section just read.
        expected: SectionId,
        /// The five bytes that stand where the footer should be.
        found: u64,
    },
    /// A command number that the protocol does not have.
    #[error("expected a command of 1 to 11, found {found}")]
    UnknownCommand {
        /// The number.
        found: u16,
    },
    /// A command whose payload has the wrong length.
    #[error("command {command}: expected a payload of {expected}, found {found} bytes")]
    CommandLength {
        /// QEMU's name of the command.
        command: &'static str,
        /// The length or lengths the protocol allows.
        expected: &'static str,
        /// The length announced.
        found: u16,
    },
    /// A command that is legal, but not now.
    #[error("expected no {command} here: {state}")]
    CommandOrder {
        /// QEMU's name of the command.
        command: &'static str,
        /// Why not.
        state: &'static str,
    },
    /// A record word with no type, several types, or a type that is not legal here.
    #[error("expected {expected}, found a RAM record with flags {flags:#x}")]
    RecordFlags {
        /// What may stand here.
        expected: &'static str,
        /// The low bits of the word.
        flags: u64,
    },
    /// A record says "same block as before" and there was none before.
    #[error("expected a block name, found a record that continues a block although none was named")]
    NoBlock,
    /// A block that was not announced in the setup.
    #[error("expected the name of an announced RAM block, found \"{name}\"")]
    UnknownBlock {
        /// The name.
        name: Name,
    },
    /// A block announced twice.
    #[error("expected a new RAM block, found \"{name}\" a second time")]
    DuplicateBlock {
        /// The name.
        name: Name,
    },
    /// The lengths of the blocks do not add up to the total announced.
    #[error("expected RAM blocks of {expected} bytes in total, found {found} with \"{name}\"")]
    BlockTotal {
        /// The announced total.
        expected: u64,
        /// The sum so far.
        found: u64,
        /// The block that went past the total.
        name: Name,
    },
    /// A length, page size or position of a block that cannot be.
    #[error("RAM block \"{name}\": expected {expected}, found {found:#x}")]
    BlockField {
        /// The block.
        name: Name,
        /// What the field must be.
        expected: &'static str,
        /// What it is.
        found: u64,
    },
    /// A page outside its block.
    #[error(
        "expected an offset inside RAM block \"{name}\" of {length:#x} bytes, found {offset:#x}"
    )]
    PageOutside {
        /// The block.
        name: Name,
        /// The offset of the page in the block.
        offset: u64,
        /// The block's used length.
        length: u64,
    },
    /// The device state cannot be cut into its sections.
    #[error("device state: {problem}")]
    DeviceState {
        /// What does not fit.
        problem: &'static str,
    },
    /// One device section does not fit its description or its footer.
    #[error("device section \"{name}\": {problem}")]
    DeviceSection {
        /// The section's name.
        name: Name,
        /// What does not fit.
        problem: &'static str,
    },
    /// The description of the device state is not what the protocol says.
    #[error("description of the device state: {problem}")]
    VmDescription {
        /// What is wrong with it.
        problem: String,
    },
}
