//! How the pages of multifd packets are packed, and unpacked.
//!
//! A packet carries up to [`PACKET_PAGES`] pages of one block, by one of three methods, which its
//! flags name: the bytes as they are, a part of the channel's zlib stream, or zstd. At the source
//! each channel has a [`Packer`], at the destination an [`Unpacker`]; neither knows of sockets or
//! headers. [`Packing`] is what the packers of one migration have in common.
//!
//! ```text
//! let mut packer = packing.packer();                     // one for each source/send-N
//! let packed = packer.pack(block, &pages)?;              // for each packet
//! .. a header with packed.flags() and packed.len() ..
//! gather.push_bytes(&header);
//! packed.gather(&mut gather)?;
//! .. send all of it ..
//! drop(gather);
//! packer.sent();                                         // the data have left, or are in the socket
//! ```

mod auto;
mod error;
mod packer;
mod stored;
mod unpacker;
mod zlib;
mod zstd;

pub use error::UnpackError;
pub(crate) use packer::{Packer, Packing, Peer};
pub(crate) use unpacker::Unpacker;

use whimbrel_ram::TARGET_PAGE;

/// Bytes of a page.
const PAGE: usize = TARGET_PAGE.bytes();

/// The most pages of a packet: 512 KiB of them.
pub(crate) const PACKET_PAGES: usize = (512 << 10) / PAGE;

/// Bytes of the pages of a full packet.
const PACKET_BYTES: usize = PACKET_PAGES * PAGE;

#[cfg(test)]
mod tests;
