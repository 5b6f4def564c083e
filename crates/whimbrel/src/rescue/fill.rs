//! Filling a paused destination with what the other part has: its guest goes on without having
//! been stopped.

use std::ops::Range;

use whimbrel_ram::{AbsentRam, BlockIndex, Fault, RamBlock, TargetPage};

use super::answering::{answer, take};
use super::missing::Missing;
use super::part::Part;
use super::{Lost, lost};
use crate::error::Error;
use crate::kept::disk::{bytes, runs};

/// How many pages are placed at a time, at most, before it is looked who waits: 1 MiB, well under a
/// millisecond.
const PAGES: u64 = 256;

/// What came of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Filled {
    /// Pages of 4 KiB that were missing, and have been taken from the other part.
    pub pages: u64,
    /// Pages that are lost, and have been given up.
    pub lost_pages: u64,
}

/// Fills `absent`, RAM of a machine of type `machine`, from `part`, if there is one. Pages that are
/// missing then are refused, before anything is done, or given up.
pub(crate) fn fill(
    absent: &AbsentRam,
    machine: &str,
    part: Option<&Part>,
    lost: Lost,
) -> Result<Filled, Error> {
    let filling = match part {
        Some(part) => {
            part.check_is_of(machine, absent.ram())?;
            Some(Filling::new(absent, part))
        }
        None => None,
    };
    let nowhere = filling.as_ref().map_or(absent.received().missing(), Filling::nowhere);
    if nowhere > 0 && lost == Lost::Refuse {
        return Err(lost::refusal(nowhere));
    }
    let pages = filling.map_or(Ok(0), |filling| filling.run())?;
    let lost_pages = lost::give_up_missing(absent)?;
    Ok(Filled { pages, lost_pages })
}

struct Filling<'a> {
    absent: &'a AbsentRam,
    part: &'a Part,
    /// The place of each block in the part, if it has it.
    places: Vec<Option<usize>>,
}

impl<'a> Filling<'a> {
    fn new(absent: &'a AbsentRam, part: &'a Part) -> Filling<'a> {
        let places = absent.ram().blocks().map(|(_, block)| part.place_of(block.name())).collect();
        Filling { absent, part, places }
    }

    /// How many pages are missing in both.
    fn nowhere(&self) -> u64 {
        let missing = Missing::of(self.absent.received(), self.absent.ram());
        let in_both = |(index, block): (BlockIndex, &RamBlock)| {
            let unit = self.absent.unit(index).target_pages();
            let has =
                |page: &u64| missing.has(index.index(), *page) && !self.has_unit(index, *page);
            (0..block.target_pages())
                .step_by(usize::try_from(unit).expect("small"))
                .filter(has)
                .count() as u64
                * unit
        };
        self.absent.ram().blocks().map(in_both).sum()
    }

    /// Whether the part has all of the piece of RAM that `page` begins.
    fn has_unit(&self, index: BlockIndex, page: u64) -> bool {
        let unit = self.absent.unit(index).target_pages();
        self.places[index.index()]
            .is_some_and(|place| (page..page + unit).all(|page| !self.part.is_missing(place, page)))
    }

    fn run(&self) -> Result<u64, Error> {
        let (mut filled, mut faults) = (0, Vec::new());
        let mut buffer = Vec::new();
        for (index, block) in self.absent.ram().blocks() {
            let unit = self.absent.unit(index).target_pages();
            let mut from = 0;
            while from < block.target_pages() {
                take(self.absent, &mut faults)?;
                for fault in faults.drain(..) {
                    filled += self.answer(&fault, &mut buffer)?;
                }
                let most = PAGES.max(unit);
                let missing =
                    self.absent.received().first_missing(index, from..block.target_pages());
                let Some(run) = missing else { break };
                let run = run.start..run.end.min(run.start + most);
                filled += self.place(index, run.clone(), &mut buffer)?;
                from = run.end;
            }
        }
        // Whoever waits for what is there is woken; the watch ends after this.
        take(self.absent, &mut faults)?;
        for fault in faults.drain(..) {
            self.answer(&fault, &mut buffer)?;
        }
        Ok(filled)
    }

    fn answer(&self, fault: &Fault, buffer: &mut Vec<u8>) -> Result<u64, Error> {
        if answer(self.absent, fault)? {
            return Ok(0);
        }
        let page = TargetPage::containing(fault.offset).0;
        self.place(fault.block, page..page + self.absent.unit(fault.block).target_pages(), buffer)
    }

    /// Places a run of missing pages, whole units, as far as the part has them; gives how many are
    /// new.
    fn place(
        &self,
        index: BlockIndex,
        pages: Range<u64>,
        buffer: &mut Vec<u8>,
    ) -> Result<u64, Error> {
        let Some(place) = self.places[index.index()] else { return Ok(0) };
        let unit = self.absent.unit(index).target_pages();
        let mut placed = 0;
        let has = |number: u64| self.has_unit(index, number * unit);
        for run in runs(pages.start / unit..pages.end / unit, u64::MAX, has) {
            let run = run.start * unit..run.end * unit;
            let len = usize::try_from(bytes(run.end - run.start)).expect("in memory");
            buffer.resize(len, 0);
            self.part.read(place, run.clone(), buffer)?;
            placed += self
                .absent
                .place(index, bytes(run.start), buffer)
                .map_err(Error::system("placing pages"))?;
        }
        Ok(placed)
    }
}
