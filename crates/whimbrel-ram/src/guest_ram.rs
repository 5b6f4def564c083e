//! All RAM blocks of a guest.

use std::sync::Arc;

use crate::{BlockError, BlockIndex, HostPage, RamBlock};

/// All of a guest's RAM blocks, in the order in which they are announced. Cheap to clone.
#[derive(Clone, Debug)]
pub struct GuestRam {
    blocks: Arc<[RamBlock]>,
}

impl GuestRam {
    /// The blocks, in order.
    ///
    /// # Panics
    /// With more than 65,535 blocks, or two of one name.
    pub fn new(blocks: Vec<RamBlock>) -> GuestRam {
        assert!(blocks.len() <= usize::from(u16::MAX), "at most 65,535 RAM blocks");
        for (at, block) in blocks.iter().enumerate() {
            let twice = blocks[..at].iter().any(|other| other.name() == block.name());
            assert!(!twice, "RAM block names are unique, {} is there twice", block.name());
        }
        GuestRam { blocks: blocks.into() }
    }

    /// How many blocks there are.
    pub fn block_count(&self) -> usize {
        self.blocks.len()
    }

    /// One block.
    ///
    /// # Panics
    /// When the index is not of this RAM.
    pub fn block(&self, index: BlockIndex) -> &RamBlock {
        &self.blocks[index.index()]
    }

    /// The blocks with their indices, in order.
    pub fn blocks(&self) -> impl Iterator<Item = (BlockIndex, &RamBlock)> {
        (0u16..).map(BlockIndex).zip(self.blocks.iter())
    }

    /// The block of that name.
    pub fn find(&self, name: &str) -> Option<(BlockIndex, &RamBlock)> {
        self.blocks().find(|(_, block)| block.name() == name)
    }

    /// The host page that holds byte `offset` of a block: what a request for it names.
    ///
    /// # Panics
    /// When the index is not of this RAM.
    pub fn host_page(&self, block: BlockIndex, offset: u64) -> Result<HostPage, BlockError> {
        self.block(block).range(offset, 1)?;
        let size = self.block(block).host_page_size().bytes() as u64;
        Ok(HostPage { block, number: offset / size })
    }

    /// The length of all blocks together, in bytes.
    pub fn total_bytes(&self) -> u64 {
        self.blocks.iter().map(RamBlock::len).sum()
    }
}
