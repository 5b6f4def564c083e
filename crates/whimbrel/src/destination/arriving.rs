//! RAM that is still arriving while its guest runs: where pages of every channel are placed.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use whimbrel_ram::{AbsentRam, BlockIndex, HostPage, TARGET_PAGE, TargetPage};

use super::asked::Asked;
use crate::channel::name;
use crate::error::Error;
use crate::worker::Cancel;

const PAGE: u64 = TARGET_PAGE.bytes() as u64;

/// The channels on which pages come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Via {
    Main,
    Urgent,
    /// A multifd channel.
    Multifd(u8),
}

impl Via {
    /// How many there can be at most with so many multifd channels.
    fn count(multifd: usize) -> usize {
        2 + multifd
    }

    fn index(self) -> usize {
        match self {
            Via::Main => 0,
            Via::Urgent => 1,
            Via::Multifd(number) => 2 + usize::from(number),
        }
    }

    pub(super) fn name(self) -> &'static str {
        match self {
            Via::Main => "main",
            Via::Urgent => "urgent",
            Via::Multifd(number) => name::multifd(number),
        }
    }
}

/// The RAM, and who waits for it.
#[derive(Debug)]
pub(super) struct Arriving<'a> {
    pub(super) absent: &'a AbsentRam,
    pub(super) asked: &'a Asked,
    /// The stream's blocks, by their place in its list.
    blocks: Vec<BlockIndex>,
    /// Set when every page has come.
    complete: Cancel,
    /// Per channel, the host page that has come in part: its block and number, and 1.
    begun: Box<[AtomicU64]>,
}

impl<'a> Arriving<'a> {
    pub(super) fn new(
        absent: &'a AbsentRam,
        asked: &'a Asked,
        blocks: Vec<BlockIndex>,
        complete: Cancel,
        multifd: usize,
    ) -> Arriving<'a> {
        let begun = (0..Via::count(multifd)).map(|_| AtomicU64::new(0)).collect();
        let arriving = Arriving { absent, asked, blocks, complete, begun };
        arriving.look_whether_complete();
        arriving
    }

    /// A block of the stream.
    pub(super) fn block(&self, place: whimbrel_wire::BlockIndex) -> BlockIndex {
        self.blocks[place.get()]
    }

    /// Whether every page has come.
    pub(super) fn is_complete(&self) -> bool {
        self.absent.received().missing() == 0
    }

    /// Set when every page has come.
    pub(super) fn complete(&self) -> &Cancel {
        &self.complete
    }

    /// Other channels have taken the places of all: what had been begun on those is begun anew.
    pub(super) fn forget_begun(&self) {
        self.begun.iter().for_each(|begun| begun.store(0, Ordering::SeqCst));
    }

    fn look_whether_complete(&self) {
        if self.is_complete() {
            self.complete.set();
        }
    }

    /// Places whole units. `read` is when their first byte was read.
    pub(super) fn place(
        &self,
        block: BlockIndex,
        offset: u64,
        bytes: &[u8],
        read: Instant,
    ) -> Result<(), Error> {
        let new =
            self.absent.place(block, offset, bytes).map_err(Error::system("placing pages"))?;
        self.placed(block, offset, bytes.len() as u64, new, read);
        Ok(())
    }

    /// Places whole units of zeros.
    pub(super) fn place_zeros(
        &self,
        block: BlockIndex,
        offset: u64,
        len: u64,
        read: Instant,
    ) -> Result<(), Error> {
        let new =
            self.absent.place_zeros(block, offset, len).map_err(Error::system("placing pages"))?;
        self.placed(block, offset, len, new, read);
        Ok(())
    }

    fn placed(&self, block: BlockIndex, offset: u64, len: u64, new: u64, read: Instant) {
        let first = TargetPage::containing(offset).0;
        self.asked.placed(block, first..first + len / PAGE, new, read);
        if new > 0 {
            self.look_whether_complete();
        }
    }

    /// A channel has begun a host page, or (`None`) finished it.
    pub(super) fn begun(&self, via: Via, page: Option<HostPage>) -> Result<(), Error> {
        let key = page.map_or(0, |page| u64::from(page.block.0) << 48 | (page.number + 1));
        self.begun[via.index()].store(key, Ordering::SeqCst);
        let others = self.begun.iter().enumerate().filter(|(index, _)| *index != via.index());
        if let Some(page) = page
            && others.into_iter().any(|(_, begun)| begun.load(Ordering::SeqCst) == key)
        {
            return Err(Error::Refused(format!(
                "{} channel: parts of host page {} of block {} come on two channels",
                via.name(),
                page.number,
                self.absent.ram().block(page.block).name()
            )));
        }
        Ok(())
    }
}
