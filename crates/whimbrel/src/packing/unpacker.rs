//! The receiving side: the data of a packet to pages.

use whimbrel_wire::multifd::Compression;

use super::zlib::Inflate;
use super::zstd::Decompressor;
use super::{PACKET_PAGES, PAGE, UnpackError};

/// Unpacks what comes on one channel, in the order in which it comes.
///
/// Memory is bounded: a packet's pages and, for a frame that goes over packets, its window.
#[derive(Debug, Default)]
pub(crate) struct Unpacker {
    zlib: Option<Inflate>,
    zstd: Option<Decompressor>,
    pages: Vec<u8>,
}

impl Unpacker {
    /// At the beginning of a channel.
    pub(crate) fn new() -> Unpacker {
        Unpacker::default()
    }

    /// Decodes the `data` of a packet of `count` pages, by the method that its flags name, and
    /// gives the pages one behind the other. After an error the channel cannot go on.
    ///
    /// Pages that are not compressed are better read to where they belong.
    ///
    /// # Panics
    /// When there are more pages than a packet can carry.
    pub(crate) fn unpack<'p>(
        &'p mut self,
        method: Compression,
        data: &'p [u8],
        count: usize,
    ) -> Result<&'p [u8], UnpackError> {
        assert!(count <= PACKET_PAGES, "the pages of one packet");
        let expected = count * PAGE;
        // One byte more shows that there is more than was announced.
        self.pages.resize(PACKET_PAGES * PAGE + 1, 0);
        let out = &mut self.pages[..];
        match method {
            Compression::None => {
                return match data.len() {
                    found if found == expected => Ok(data),
                    found if found < expected => {
                        Err(UnpackError::Short { expected, method: "none", found })
                    }
                    _ => Err(UnpackError::Long { expected, method: "none" }),
                };
            }
            Compression::Zlib => {
                self.zlib.get_or_insert_with(Inflate::new).unpack(data, expected, out)?;
            }
            Compression::Zstd => {
                self.zstd.get_or_insert_with(Decompressor::new).unpack(data, expected, out)?;
            }
            Compression::Other(found) => return Err(UnpackError::Method { found }),
        }
        Ok(&out[..expected])
    }
}
