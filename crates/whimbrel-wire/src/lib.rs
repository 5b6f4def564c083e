//! QEMU's migration protocol as values: bytes in, messages out, and back.
//!
//! This crate is the `wire` step of the road of a page. It does no I/O, holds no page bytes,
//! knows no guest memory and no clock: the same code runs in production, in a test and under a
//! fuzzer. Every byte it is given is taken for hostile: a decoder never panics on input, never
//! makes room because a length field says so, and names the place of what it refuses.
//!
//! | module or type | part of the protocol |
//! |---|---|
//! | [`MainDecoder`] | the main channel, from its header to its end |
//! | [`RecordDecoder`], [`RecordEncoder`] | RAM records, also alone on the urgent channel |
//! | [`Command`], [`SectionHeader`], [`Configuration`], [`BlockList`] | the messages of the main channel |
//! | [`Package`], [`DeviceTail`], [`DeviceState`] | device state, in postcopy and in precopy |
//! | [`ReturnDecoder`], [`ReturnMessage`] | the return path |
//! | [`xbzrle`], [`mapped_ram`], [`page_bitmap`], [`vmdesc`] | formats inside |
//! | [`recovery`] | what two whimbrels say beyond it when a broken migration goes on |
//! | [`multifd`], [`ColoMessage`], [`ChannelKind`] | the other channels, and telling them apart |
//!
//! All decoders work alike: `decode(input)` looks at the bytes not yet consumed and returns how
//! many it consumed and what they were, or that it needs more. Bytes of pages and other bulk are
//! the caller's: it takes them off the channel where it wants them, and says so.
#![no_std]
#![forbid(unsafe_code)]
#![deny(clippy::indexing_slicing, clippy::wildcard_enum_match_arm)]

extern crate alloc;

mod blocks;
mod channel_kind;
mod colo;
mod command;
mod cursor;
mod cut;
mod decoded;
pub mod device;
mod device_tail;
mod error;
pub mod header;
mod main_stream;
pub mod mapped_ram;
pub mod multifd;
mod name;
mod order;
pub mod package;
mod page;
pub mod page_bitmap;
mod record;
pub mod recovery;
pub mod return_path;
mod section;
mod section_collector;
pub mod vmdesc;
pub mod xbzrle;

pub use blocks::{BLOCKS_MAX, BlockIndex, BlockInfo, BlockList};
pub use channel_kind::ChannelKind;
pub use colo::ColoMessage;
pub use command::{Command, DiscardRange, PageSizes, RamDiscard};
pub use decoded::{Decoded, MainOptions};
pub use device::{DeviceSection, DeviceState};
pub use device_tail::DeviceTail;
pub use error::{Error, ErrorKind};
pub use header::{Configuration, FileHeader};
pub use main_stream::{MainDecoder, RAM_SECTION, RAM_VERSION};
pub use mapped_ram::MappedRamHeader;
pub use multifd::{MultifdDecoded, MultifdDecoder, MultifdInit, PacketHeader};
pub use name::{BlockName, Name, NameLength};
pub use package::{Delimiting, Package};
pub use page::{BlockOffset, TargetPage};
pub use record::{
    RamRecord, RecordDecoded, RecordDecoder, RecordEncoder, RecordFormat, continued_page_word,
    encode_end_of_section, encode_multifd_flush,
};
pub use return_path::{ReturnDecoded, ReturnDecoder, ReturnMessage};
pub use section::{SectionHeader, SectionId, encode_eof};
pub use vmdesc::{VmDescription, encode_vm_description};

/// Most bytes that a decoder of the main channel needs at a time to recognise a message.
pub const HEADER_MAX: usize = 4096;
