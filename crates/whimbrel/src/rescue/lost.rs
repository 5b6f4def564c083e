//! Pages that are nowhere any more.
//!
//! Whoever touches one is killed (SIGBUS), and a guest takes a machine check: nothing else would keep
//! it from taking zeros for what it had written. A kept VM tells of them in a device section, which
//! a VMM that does not know it refuses.

use std::ops::Range;

use whimbrel_ram::{AbsentRam, GuestRam};

use crate::error::Error;
use crate::kept::disk::bytes;
use crate::vm::DeviceState;

/// The section's name.
pub(crate) const NAME: &str = "whimbrel-lost-pages";
const VERSION: u32 = 1;

/// Why nothing is done without pages that are lost.
pub(super) fn refusal(pages: u64) -> Error {
    Error::Refused(format!(
        "{pages} pages of RAM are in neither part: they are lost, unless there is another part that \
         has them; to go on without them, and have the guest take a machine check where it touches \
         one, give them up (--lost poison)"
    ))
}

/// Gives up everything that is still missing; gives how many pages that were.
pub(super) fn give_up_missing(absent: &AbsentRam) -> Result<u64, Error> {
    let mut lost = 0;
    for (index, block) in absent.ram().blocks() {
        while let Some(run) = absent.received().first_missing(index, 0..block.target_pages()) {
            absent
                .poison(index, bytes(run.start), bytes(run.end - run.start))
                .map_err(Error::system("giving up lost pages"))?;
            lost += run.end - run.start;
        }
    }
    Ok(lost)
}

/// The section that tells of lost pages: runs of them, by the block's name.
pub(super) fn section(lost: &[(String, Range<u64>)]) -> DeviceState {
    let count = u32::try_from(lost.len()).expect("at most one for every other page of RAM");
    let mut bytes = count.to_be_bytes().to_vec();
    for (name, pages) in lost {
        bytes.push(u8::try_from(name.len()).expect("names have at most 255 bytes"));
        bytes.extend_from_slice(name.as_bytes());
        bytes.extend_from_slice(&pages.start.to_be_bytes());
        bytes.extend_from_slice(&pages.end.to_be_bytes());
    }
    DeviceState { name: NAME.into(), instance_id: 0, version_id: VERSION, bytes }
}

/// Takes the section out of what a migration has brought, and gives up the pages of `ram` that it
/// names; gives how many.
pub(crate) fn poison_as_told(devices: &mut Vec<DeviceState>, ram: &GuestRam) -> Result<u64, Error> {
    let Some(at) = devices.iter().position(|device| device.name == NAME) else { return Ok(0) };
    let section = devices.remove(at);
    if section.version_id != VERSION {
        return Err(Error::Mismatch {
            what: format!("device section {NAME}"),
            source_has: format!("version {}", section.version_id),
            here: format!("version {VERSION}"),
        });
    }
    let wrong = |what: &str| Error::Refused(format!("device section {NAME}: {what}"));
    let (runs, mut pages) = (read(&section.bytes).ok_or_else(|| wrong("it is damaged"))?, 0);
    for (name, run) in runs {
        let found = ram
            .find(name)
            .filter(|(_, block)| run.start < run.end && run.end <= block.target_pages());
        let Some((_, block)) = found else {
            return Err(wrong(&format!("there are no pages {run:?} of a block {name:?} here")));
        };
        block.lose(run.clone()).map_err(Error::system("giving up lost pages"))?;
        pages += run.end - run.start;
    }
    Ok(pages)
}

fn read(bytes: &[u8]) -> Option<Vec<(&str, Range<u64>)>> {
    let (count, mut rest) = bytes.split_first_chunk::<4>()?;
    let mut runs = Vec::new();
    for _ in 0..u32::from_be_bytes(*count) {
        let (&len, after) = rest.split_first()?;
        let (name, after) = after.split_at_checked(usize::from(len))?;
        let (start, after) = after.split_first_chunk()?;
        let (end, after) = after.split_first_chunk()?;
        let run = u64::from_be_bytes(*start)..u64::from_be_bytes(*end);
        runs.push((std::str::from_utf8(name).ok()?, run));
        rest = after;
    }
    rest.is_empty().then_some(runs)
}

#[cfg(test)]
mod tests {
    use whimbrel_ram::RamBlock;

    use super::*;

    fn ram() -> GuestRam {
        GuestRam::new(vec![RamBlock::anonymous("ram", 0, 8 * 4096).unwrap()])
    }

    #[test]
    fn what_is_told_is_read() {
        let lost = [("a".to_owned(), 3..5), ("bc".to_owned(), 0..u64::MAX)];
        let section = section(&lost);
        assert_eq!(section.name, NAME);
        assert_eq!(read(&section.bytes).unwrap(), [("a", 3..5), ("bc", 0..u64::MAX)]);
        for len in 0..section.bytes.len() {
            assert_eq!(read(&section.bytes[..len]), None, "{len} bytes");
        }
        let ram = ram();
        assert_eq!(poison_as_told(&mut Vec::new(), &ram).unwrap(), 0);
    }

    #[test]
    fn pages_that_are_not_here_are_refused() {
        for (name, run, text) in [
            ("other", 0..1, "a block \"other\""),
            ("ram", 7..9, "no pages 7..9"),
            ("ram", 3..3, "no pages 3..3"),
            ("ram", 5..u64::MAX, "no pages 5.."),
        ] {
            let mut devices = vec![section(&[(name.to_owned(), run)])];
            let error = poison_as_told(&mut devices, &ram()).unwrap_err().to_string();
            assert!(error.contains(text), "{error}");
        }
        let newer = DeviceState { version_id: 2, ..section(&[]) };
        let error = poison_as_told(&mut vec![newer], &ram()).unwrap_err().to_string();
        assert!(error.contains("version 2"), "{error}");
        let torn = DeviceState { bytes: vec![0, 0, 0, 1], ..section(&[]) };
        assert!(poison_as_told(&mut vec![torn], &ram()).is_err());
    }
}
