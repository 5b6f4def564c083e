//! A zstd frame of blocks that are stored, not compressed: what a receiver that insists on zstd
//! gets of pages that do not compress. They go from guest memory as they are, with a few bytes
//! between.

use super::PACKET_BYTES;

/// Bytes of a block at most, by zstd's format.
pub(super) const BLOCK_MAX: usize = 128 << 10;

/// Blocks of a packet at most.
const BLOCKS_MAX: usize = PACKET_BYTES / BLOCK_MAX;

const MAGIC: u32 = 0xfd2f_b528;

/// One segment, its length in four bytes, no checksum, no dictionary.
const DESCRIPTOR: u8 = 0xa0;

const FRAME_HEADER: usize = 9;
const BLOCK_HEADER: usize = 3;

/// The bytes of a frame that are not the pages'.
#[derive(Debug, Default)]
pub(super) struct Stored {
    frame: [u8; FRAME_HEADER],
    blocks: [[u8; BLOCK_HEADER]; BLOCKS_MAX],
}

impl Stored {
    /// Makes the headers for `len` bytes; gives the length of the whole frame.
    pub(super) fn set(&mut self, len: usize) -> usize {
        let field = |len: usize| u32::try_from(len).expect("at most a packet's").to_le_bytes();
        self.frame[..4].copy_from_slice(&MAGIC.to_le_bytes());
        self.frame[4] = DESCRIPTOR;
        self.frame[5..].copy_from_slice(&field(len));
        let blocks = len.div_ceil(BLOCK_MAX);
        let mut left = len;
        for header in &mut self.blocks[..blocks] {
            let size = left.min(BLOCK_MAX);
            left -= size;
            let is_last = usize::from(left == 0);
            header.copy_from_slice(&field(size << 3 | is_last)[..BLOCK_HEADER]);
        }
        FRAME_HEADER + blocks * BLOCK_HEADER + len
    }

    pub(super) fn frame_header(&self) -> &[u8] {
        &self.frame
    }

    /// What goes before each [`BLOCK_MAX`] bytes, and before the rest.
    pub(super) fn block_headers(&self) -> impl Iterator<Item = &[u8]> {
        self.blocks.iter().map(|header| &header[..])
    }
}
