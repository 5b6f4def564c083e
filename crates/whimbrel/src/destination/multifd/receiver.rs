//! One multifd channel at the destination: packets become pages.

use whimbrel_ram::{BlockIndex, RamBlock, TARGET_PAGE};
use whimbrel_wire::multifd::Compression;
use whimbrel_wire::{BlockOffset, PacketHeader};

use super::input::PacketInput;
use super::rounds::Rounds;
use super::target::Target;
use crate::error::Error;

const PAGE: usize = TARGET_PAGE.bytes();

/// The thread's own.
#[derive(Debug)]
pub(super) struct Receiver<'a> {
    input: PacketInput,
    target: &'a Target,
    rounds: &'a Rounds,
}

impl<'a> Receiver<'a> {
    pub(super) fn new(input: PacketInput, target: &'a Target, rounds: &'a Rounds) -> Receiver<'a> {
        Receiver { input, target, rounds }
    }

    /// Takes in what comes. Gives how many bytes there were when the source closed the channel, or
    /// it was no longer needed.
    pub(super) fn run(&mut self) -> Result<u64, Error> {
        while let Some(header) = self.input.next()? {
            // A QEMU before 9.0 sends pages and the end of a round in one packet.
            self.take(&header)?;
            if header.is_sync() && !self.rounds.wait_for_next() {
                break;
            }
        }
        Ok(self.input.offset())
    }

    /// The channel, with what has been read of it.
    pub(super) fn into_input(self) -> PacketInput {
        self.input
    }

    fn take(&mut self, header: &PacketHeader) -> Result<(), Error> {
        let Some((index, block)) = self.check(header)? else { return Ok(()) };
        if header.normal_pages > 0 {
            self.target.expect(index, header.normal());
            match header.compression() {
                Compression::None => self.input.take_pages(block, header.normal())?,
                _ => self.unpack(header, block)?,
            }
            self.target.has_placed(index, header.normal());
        }
        header.zero().try_for_each(|offset| self.target.place_zero(index, offset))?;
        self.target.count(header.zero().len());
        Ok(())
    }

    fn unpack(&mut self, header: &PacketHeader, block: &RamBlock) -> Result<(), Error> {
        let pages = self.input.unpack(header)?;
        for (BlockOffset(offset), page) in header.normal().zip(pages.chunks_exact(PAGE)) {
            block.write(offset, page)?;
        }
        Ok(())
    }

    /// The block of a packet that has pages, all of which lie inside it.
    fn check(&self, header: &PacketHeader) -> Result<Option<(BlockIndex, &'a RamBlock)>, Error> {
        self.input.block_of(header, &self.target.ram)
    }
}
