//! Ways in for the fuzz targets: no part of the API.

use whimbrel_wire::multifd::Compression;

use crate::packing::{self, PACKET_PAGES, UnpackError};

/// Unpacks the packets of a multifd channel.
#[derive(Debug, Default)]
pub struct Unpacker(packing::Unpacker);

impl Unpacker {
    /// The most pages that a packet has.
    pub const PAGES: usize = PACKET_PAGES;

    /// The pages of a packet of `count` pages.
    ///
    /// # Errors
    /// When its data do not give them.
    pub fn unpack(
        &mut self,
        method: Compression,
        data: &[u8],
        count: usize,
    ) -> Result<Vec<u8>, UnpackError> {
        self.0.unpack(method, data, count).map(<[u8]>::to_vec)
    }
}
