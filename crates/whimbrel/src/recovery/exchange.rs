//! What the two sides of a recovery say to each other, before pages move again: decided here, said
//! and heard elsewhere, so that it is tested without a thread or a connection.
//!
//! With a QEMU the source asks for the bitmap of each block, the destination answers, the source
//! resumes, and the destination acknowledges and asks again for what its guest waits for. Between
//! whimbrels nothing is asked: behind the proofs the destination says at once what its guest waits
//! for, then which pages it has; and the source answers requests from then on.

use std::collections::HashSet;

use whimbrel_ram::{BlockIndex, GuestRam, HostPage, PageMap, TARGET_PAGE};
use whimbrel_wire::recovery::{Hello, Proof, Welcome};
use whimbrel_wire::{Command, ReturnMessage};

use super::proofs::{Attempt, Nonce, Proofs};
use crate::error::Error;
use crate::source::setup::name;

/// The source's side.
#[derive(Debug)]
pub(crate) struct SourceExchange {
    /// Of which blocks the destination has said what it has.
    told: Box<[bool]>,
    /// What was sent before that was known.
    early: HashSet<HostPage>,
    step: SourceStep,
}

#[derive(Debug)]
enum SourceStep {
    /// The hello has been said.
    Hello { proofs: Proofs, number: u32, nonce: Nonce },
    /// The destination says what it has.
    Bitmaps { is_qemu: bool },
    /// POSTCOPY_RESUME has been said.
    Resumed,
    /// Pages move.
    Over,
}

impl SourceExchange {
    /// With a whimbrel, in the try `number`; gives what to say first.
    pub(crate) fn with_whimbrel(
        proofs: Proofs,
        number: u32,
        nonce: Nonce,
        ram: &GuestRam,
    ) -> (SourceExchange, Vec<u8>) {
        let mut words = Vec::new();
        proofs.hello(number, nonce).encode(&mut words);
        (SourceExchange::new(SourceStep::Hello { proofs, number, nonce }, ram), words)
    }

    /// With a QEMU; gives what to say first.
    pub(crate) fn with_qemu(ram: &GuestRam) -> Result<(SourceExchange, Vec<u8>), Error> {
        let mut words = Vec::new();
        for (_, block) in ram.blocks() {
            Command::RecvBitmap(name(block.name())?).encode(&mut words);
        }
        Ok((SourceExchange::new(SourceStep::Bitmaps { is_qemu: true }, ram), words))
    }

    fn new(step: SourceStep, ram: &GuestRam) -> SourceExchange {
        let told = vec![false; ram.block_count()].into_boxed_slice();
        SourceExchange { told, early: HashSet::new(), step }
    }

    /// The destination has answered the hello. If it is the right one, gives what the other channels
    /// begin with, and what to say next: then pages may go.
    pub(crate) fn welcome(&mut self, welcome: &Welcome) -> Option<(Attempt, Vec<u8>)> {
        let SourceStep::Hello { proofs, number, nonce } = &self.step else { return None };
        let attempt = proofs.welcomed(*number, *nonce, welcome)?;
        let mut words = Vec::new();
        proofs.proof(&attempt).encode(&mut words);
        Command::PostcopyResume.encode(&mut words);
        self.step = SourceStep::Bitmaps { is_qemu: false };
        Some((attempt, words))
    }

    /// The destination waits for a page: it has not got it, whatever the map says.
    pub(crate) fn asked(&self, map: &PageMap, page: HostPage) {
        if !self.is_over() && !self.early.contains(&page) {
            map.mark_run(page.block, page.target_pages(map.unit(page.block)));
        }
    }

    /// A page that it waits for has been sent.
    pub(crate) fn went(&mut self, page: HostPage) {
        if !self.is_over() {
            self.early.insert(page);
        }
    }

    /// The destination has these pages of a block, and no others. Says whether it has told all.
    pub(crate) fn bitmap(
        &mut self,
        map: &PageMap,
        block: BlockIndex,
        received: &[u64],
    ) -> Result<bool, &'static str> {
        let SourceStep::Bitmaps { is_qemu } = self.step else {
            return Err("a bitmap, which has no meaning at this time");
        };
        if std::mem::replace(&mut self.told[block.index()], true) {
            return Err("the bitmap of a block comes twice");
        }
        map.mark_missing(block, received);
        for page in self.early.iter().filter(|page| page.block == block) {
            map.unmark_run(block, page.target_pages(map.unit(block)));
        }
        let all = self.told.iter().all(|told| *told);
        if all {
            map.widen_to_host_pages();
            self.early.clear();
            if !is_qemu {
                self.step = SourceStep::Over;
            }
        }
        Ok(all)
    }

    /// A QEMU has told what it has, and all channels are there: gives what to say next.
    pub(crate) fn resume(&mut self) -> Vec<u8> {
        let mut words = Vec::new();
        Command::PostcopyResume.encode(&mut words);
        self.step = SourceStep::Resumed;
        words
    }

    /// The QEMU has heard it: pages may go.
    pub(crate) fn acknowledged(&mut self) -> Result<(), &'static str> {
        match self.step {
            SourceStep::Resumed => {
                self.step = SourceStep::Over;
                Ok(())
            }
            _ => Err("RESUME_ACK, and nothing was resumed"),
        }
    }

    /// Whether everything has been said.
    pub(crate) fn is_over(&self) -> bool {
        matches!(self.step, SourceStep::Over)
    }
}

/// What a destination says on the return path.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Say {
    /// These bytes.
    Words(Vec<u8>),
    /// Which pages of a block it has.
    Bitmap(BlockIndex),
    /// All that its guest waits for; from then on whatever it comes to wait for.
    Requests,
}

/// The destination's side.
#[derive(Debug)]
pub(crate) struct DestinationExchange {
    step: DestinationStep,
}

#[derive(Debug)]
enum DestinationStep {
    /// The source has still to prove that it is here now.
    Unproved { proofs: Proofs, attempt: Attempt },
    /// A QEMU asks what is here.
    Asking,
    /// Pages move.
    Over,
}

impl DestinationExchange {
    /// With a whimbrel whose hello has been admitted; gives what to say, all of it.
    pub(crate) fn with_whimbrel(
        proofs: Proofs,
        hello: &Hello,
        nonce: Nonce,
        ram: &GuestRam,
    ) -> (DestinationExchange, Vec<Say>) {
        let attempt = Attempt { number: hello.attempt, source: hello.nonce, destination: nonce };
        let mut words = Vec::new();
        proofs.welcome(&attempt).encode(&mut words);
        let mut say = vec![Say::Words(words), Say::Requests];
        say.extend(ram.blocks().map(|(block, _)| Say::Bitmap(block)));
        (DestinationExchange { step: DestinationStep::Unproved { proofs, attempt } }, say)
    }

    /// With a QEMU.
    pub(crate) fn with_qemu() -> DestinationExchange {
        DestinationExchange { step: DestinationStep::Asking }
    }

    /// The source has proved, or not, that it is here.
    pub(crate) fn proof(&mut self, proof: &Proof) -> Result<(), &'static str> {
        match &self.step {
            DestinationStep::Unproved { proofs, attempt } if proofs.is_proved(attempt, proof) => {
                self.step = DestinationStep::Over;
                Ok(())
            }
            _ => Err("it has not proved that it is the source of this migration"),
        }
    }

    /// A QEMU's command; gives what to say to it.
    pub(crate) fn command(
        &mut self,
        command: &Command,
        ram: &GuestRam,
    ) -> Result<Vec<Say>, String> {
        match (command, &self.step) {
            (Command::RecvBitmap(block), DestinationStep::Asking) => {
                let found = ram.find(block.as_str().unwrap_or_default());
                let (index, _) = found.ok_or_else(|| {
                    format!("the bitmap of block {block} is asked for, which does not exist")
                })?;
                Ok(vec![Say::Bitmap(index)])
            }
            (Command::PostcopyResume, DestinationStep::Asking) => {
                self.step = DestinationStep::Over;
                let mut words = Vec::new();
                ReturnMessage::ResumeAck(1).encode(&mut words);
                Ok(vec![Say::Words(words), Say::Requests])
            }
            (other, _) => Err(format!("{} has no meaning at this time", other.name())),
        }
    }

    /// Whether everything has been said: pages may come.
    pub(crate) fn is_over(&self) -> bool {
        matches!(self.step, DestinationStep::Over)
    }
}

/// How many words the bitmap of a block has.
pub(crate) fn bitmap_words(ram: &GuestRam, block: BlockIndex) -> usize {
    let pages = ram.block(block).len() / TARGET_PAGE.bytes() as u64;
    usize::try_from(pages.div_ceil(64)).expect("RAM fits in memory")
}
