//! What the main channel says: the messages of a [`MainDecoder`](crate::MainDecoder), and its
//! options.

use alloc::boxed::Box;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::num::NonZeroUsize;

use crate::device::{DeviceSection, DeviceState};
use crate::{
    BlockIndex, BlockList, ColoMessage, Command, Configuration, FileHeader, RamRecord,
    SectionHeader, SectionId, TargetPage,
};

/// What a [`MainDecoder`](crate::MainDecoder) expects and how much it is ready to hold.
#[derive(Debug, Clone)]
pub struct MainOptions {
    /// The guest's page size; a stream that says otherwise is refused. `None` takes what the
    /// stream says, and 4 KiB when it says nothing.
    pub target_page: Option<TargetPage>,
    /// Where the stream begins in its file: positions inside a mapped-ram file count from there.
    pub start_offset: u64,
    /// Most bytes of QEMU's device state that are held, and of one section of whimbrel's own.
    pub device_state_max: usize,
    /// Largest package that is taken, in bytes.
    pub package_max: u32,
    /// Whether COLO's words may follow the precopy stream.
    pub colo: bool,
}

impl Default for MainOptions {
    fn default() -> Self {
        Self {
            target_page: Some(TargetPage::FOUR_KIB),
            start_offset: 0,
            device_state_max: 64 << 20,
            package_max: 1 << 30,
            colo: false,
        }
    }
}

/// What [`MainDecoder::decode`](crate::MainDecoder::decode) found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Decoded {
    /// Come back when the input has at least so many bytes; never above [`HEADER_MAX`](crate::HEADER_MAX).
    NeedMore(NonZeroUsize),
    /// Magic and version.
    Header(FileHeader),
    /// What machine is coming.
    Configuration(Configuration),
    /// A command. For [`Command::Packaged`] see [`Decoded::PackageFollows`].
    Command(Command),
    /// The `ram` section starts; its block list is next.
    SectionStart(SectionHeader),
    /// A block of a mapped-ram file: `skip` bytes follow (bitmap, hole and pages), which are
    /// the caller's, before the next message.
    MappedBlock {
        /// Which block; [`MainDecoder::blocks_so_far`](crate::MainDecoder::blocks_so_far) has its places.
        block: BlockIndex,
        /// Bytes from here to the next message.
        skip: u64,
    },
    /// The block list is complete.
    RamSetup(Arc<BlockList>),
    /// More RAM follows.
    SectionPart(SectionId),
    /// The last RAM of this phase follows.
    SectionEnd(SectionId),
    /// A RAM record; the bytes of a page or delta that follow it are the caller's.
    Ram(RamRecord),
    /// A section is complete.
    Footer(SectionId),
    /// A package of so many bytes follows, which are the caller's: see [`crate::Package`].
    PackageFollows {
        /// Its length.
        len: u32,
    },
    /// RAM is complete, and QEMU's device state begins. It is collected until its end;
    /// [`Decoded::DeviceState`] is the next message.
    DeviceStateBegins,
    /// One FULL section: an early one, or any of whimbrel's own machines.
    DeviceSection(DeviceSection),
    /// All device state of a QEMU, with EOF and its description.
    DeviceState(Box<DeviceState>),
    /// The mark behind the last section.
    Eof,
    /// The JSON text that describes the device sections that came before.
    VmDescription(Vec<u8>),
    /// A word of COLO.
    Colo(ColoMessage),
    /// The device state of a checkpoint of so many bytes follows, which are the caller's: see
    /// [`crate::package::decode_checkpoint`].
    CheckpointFollows {
        /// Its length.
        len: u64,
    },
}
