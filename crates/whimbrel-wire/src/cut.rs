//! Cutting a complete run of FULL sections and commands at its seams.
//!
//! A section's end is taken from the description of the state, from the payload's own length,
//! or is searched: it is where the section's footer stands and all that follows can be cut too.

use alloc::vec::Vec;

use crate::cursor::{Cursor, Stop, bad};
use crate::device::{DeviceSection, OWN_LENGTH};
use crate::section::{FOOTER_LEN, mark};
use crate::vmdesc::VmDescription;
use crate::{Command, Error, ErrorKind, SectionHeader, SectionId};

/// How the length of a section is found.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Delimit<'a> {
    /// By searching its footer.
    Footer,
    /// From the description; by its footer if it is not described.
    Described(&'a VmDescription),
    /// From the length its payload begins with.
    OwnLength,
}

/// What a run ends with, as its very last bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Ending {
    /// The EOF byte.
    Eof,
    /// The RUN command.
    Run,
}

#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Item {
    Section(DeviceSection),
    Command(Command),
}

/// How many times the length of the run may be searched through, so that bytes made to look
/// like footers cannot cost more than that.
const PASSES_MAX: usize = 4;

/// An item found, as places in the run.
enum Place {
    Command(Command),
    /// A section; `retry` is where to look for a later footer if the rest cannot be cut.
    Section {
        header: SectionHeader,
        payload: usize,
        end: usize,
        retry: bool,
    },
}

/// Cuts all of `bytes`, which stand at `base` of the stream.
///
/// # Errors
/// Where the first cut that got furthest failed.
pub(crate) fn cut(
    bytes: &[u8],
    base: u64,
    delimit: Delimit<'_>,
    ending: Ending,
) -> Result<Vec<Item>, Error> {
    let budget = bytes.len().saturating_mul(PASSES_MAX).saturating_add(1 << 16);
    let mut cutter = Cutter { bytes, delimit, ending, places: Vec::new(), budget, deepest: None };
    match cutter.run() {
        Ok(()) => Ok(cutter.into_items()),
        Err(stop) => Err(stop.into_error(base, "the rest of the device state")),
    }
}

struct Cutter<'a> {
    bytes: &'a [u8],
    delimit: Delimit<'a>,
    ending: Ending,
    places: Vec<Place>,
    budget: usize,
    /// The failure furthest into the run: the one worth telling.
    deepest: Option<(usize, Stop)>,
}

enum Step {
    Next(usize),
    Done,
}

impl<'a> Cutter<'a> {
    fn run(&mut self) -> Result<(), Stop> {
        let mut at = 0;
        loop {
            match self.step(at) {
                Ok(Step::Done) => return Ok(()),
                Ok(Step::Next(next)) => at = next,
                Err(stop) => {
                    if self.deepest.as_ref().is_none_or(|(deepest, _)| *deepest < at) {
                        self.deepest = Some((at, stop));
                    }
                    at = self.back_track()?;
                }
            }
        }
    }

    /// Reads the item at `at`.
    fn step(&mut self, at: usize) -> Result<Step, Stop> {
        let mut cursor = self.cursor(at)?;
        match cursor.u8()? {
            mark::EOF if self.ending == Ending::Eof && cursor.is_empty() => Ok(Step::Done),
            mark::COMMAND => {
                let command = Command::parse(&mut cursor)?;
                let next = cursor.at();
                let run = command == Command::PostcopyRun;
                self.places.push(Place::Command(command));
                match self.ending {
                    Ending::Run if run && cursor.is_empty() => Ok(Step::Done),
                    Ending::Run if run => bad(next, DEAD_END),
                    Ending::Run | Ending::Eof => Ok(Step::Next(next)),
                }
            }
            mark::FULL => {
                let header = SectionHeader::parse(&mut cursor)?;
                if header.name.as_bytes().iter().any(u8::is_ascii_control) {
                    return bad(at, DEAD_END);
                }
                self.section(header, &cursor).map(Step::Next)
            }
            found => {
                let expected = "a device section, a command or the end of the device state";
                bad(at, ErrorKind::Unexpected { expected, found: found.into() })
            }
        }
    }

    /// Finds the end of the section whose payload is next.
    fn section(&mut self, header: SectionHeader, at: &Cursor<'_>) -> Result<usize, Stop> {
        let payload = at.at();
        let known = match self.delimit {
            Delimit::Footer => None,
            Delimit::Described(description) => {
                description.payload_len(&header.name, header.instance_id)
            }
            Delimit::OwnLength => {
                let len = at.clone().be32()?;
                Some(u64::from(len) + OWN_LENGTH as u64)
            }
        };
        let (end, retry) = match known {
            Some(len) => (self.known_end(&header, payload, len)?, false),
            None => (self.search(&header, payload, payload)?, true),
        };
        self.places.push(Place::Section { header, payload, end, retry });
        Ok(end + FOOTER_LEN)
    }

    fn known_end(&self, header: &SectionHeader, payload: usize, len: u64) -> Result<usize, Stop> {
        let problem = |problem| ErrorKind::DeviceSection { name: header.name.clone(), problem };
        let end = usize::try_from(len).ok().and_then(|len| payload.checked_add(len));
        let Some(end) = end.filter(|end| *end <= self.bytes.len()) else {
            return bad(payload, problem("it is longer than the device state"));
        };
        if !self.tail(end).starts_with(&header.id.footer()) {
            return bad(end, problem("expected its footer after the length described"));
        }
        Ok(end)
    }

    /// Searches the footer of a section from `from` on.
    fn search(
        &mut self,
        header: &SectionHeader,
        payload: usize,
        from: usize,
    ) -> Result<usize, Stop> {
        let tail = self.tail(from);
        match find_footer(tail, header.id) {
            Some(place) if place <= self.budget => {
                self.budget -= place;
                Ok(from + place)
            }
            Some(_) => bad(payload, TOO_MANY_FOOTERS),
            None => {
                self.budget = self.budget.saturating_sub(tail.len());
                let (name, problem) = (header.name.clone(), "expected its footer");
                bad(payload, ErrorKind::DeviceSection { name, problem })
            }
        }
    }

    /// Goes back to the last section whose end was searched and takes its next footer.
    fn back_track(&mut self) -> Result<usize, Stop> {
        while let Some(place) = self.places.pop() {
            let Place::Section { header, payload, end, retry: true } = place else { continue };
            if self.budget == 0 {
                return bad(payload, TOO_MANY_FOOTERS);
            }
            if let Ok(end) = self.search(&header, payload, end + 1) {
                self.places.push(Place::Section { header, payload, end, retry: true });
                return Ok(end + FOOTER_LEN);
            }
        }
        match self.deepest.take() {
            Some((_, stop)) => Err(stop),
            None => bad(0, DEAD_END),
        }
    }

    fn tail(&self, from: usize) -> &'a [u8] {
        self.bytes.get(from..).unwrap_or_default()
    }

    fn cursor(&self, at: usize) -> Result<Cursor<'a>, Stop> {
        let mut cursor = Cursor::new(self.bytes);
        cursor.bytes(at)?;
        Ok(cursor)
    }

    fn into_items(self) -> Vec<Item> {
        let bytes = self.bytes;
        let item = |place| match place {
            Place::Command(command) => Item::Command(command),
            Place::Section { header, payload, end, .. } => {
                let payload = bytes.get(payload..end).unwrap_or_default().to_vec();
                Item::Section(DeviceSection { header, payload })
            }
        };
        self.places.into_iter().map(item).collect()
    }
}

const DEAD_END: ErrorKind = ErrorKind::DeviceState { problem: "it cannot be cut into sections" };
const TOO_MANY_FOOTERS: ErrorKind =
    ErrorKind::DeviceState { problem: "too much of it looks like the footers of sections" };

/// The place of the first footer of a section.
pub(crate) fn find_footer(bytes: &[u8], id: SectionId) -> Option<usize> {
    let footer = id.footer();
    let mut from = 0;
    loop {
        let tail = bytes.get(from..)?;
        let place = tail.iter().position(|byte| *byte == mark::FOOTER)?;
        if tail.get(place..).is_some_and(|found| found.starts_with(&footer)) {
            return Some(from + place);
        }
        from += place + 1;
    }
}
