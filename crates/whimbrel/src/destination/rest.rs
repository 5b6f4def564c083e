//! The thread of a multifd channel in postcopy: packets that nobody asked for, placed page by page
//! in RAM whose guest runs already.

use std::time::Instant;

use whimbrel_ram::{BlockIndex, TARGET_PAGE};
use whimbrel_wire::{BlockOffset, PacketHeader};

use super::arriving::{Arriving, Via};
use super::assembly::Assembly;
use super::multifd::PacketInput;
use crate::error::Error;

const PAGE: usize = TARGET_PAGE.bytes();

/// Takes in what comes on multifd channel `number` until its source closes it.
pub(super) fn run(
    mut input: PacketInput,
    number: u8,
    arriving: &Arriving<'_>,
) -> Result<(), Error> {
    let via = Via::Multifd(number);
    let mut assembly = Assembly::new(arriving, via);
    while let Some(header) = input.next()? {
        let read = Instant::now();
        let Some((index, _)) = input.block_of(&header, arriving.absent.ram())? else { continue };
        let pages = if header.normal_pages > 0 { input.unpack(&header)? } else { &[] };
        if arriving.absent.unit(index) == TARGET_PAGE {
            place(arriving, index, &header, pages, read)?;
        } else {
            for (BlockOffset(offset), page) in header.normal().zip(pages.chunks_exact(PAGE)) {
                assembly.page(index, offset, page, read)?;
            }
            header.zero().try_for_each(|offset| assembly.zero(index, offset.0, read))?;
        }
    }
    assembly.finish()?;
    match arriving.is_complete() {
        true => Ok(()),
        false => {
            let (offset, expected) = (input.offset(), "the rest of the pages".into());
            Err(Error::Ended { channel: via.name(), offset, expected })
        }
    }
}

/// Places pages that can be placed each by itself: those that follow each other at once.
fn place(
    arriving: &Arriving<'_>,
    index: BlockIndex,
    header: &PacketHeader,
    mut pages: &[u8],
    read: Instant,
) -> Result<(), Error> {
    for (start, len) in runs(header.normal()) {
        let (here, behind) = pages.split_at(len);
        arriving.place(index, start, here, read)?;
        pages = behind;
    }
    for (start, len) in runs(header.zero()) {
        arriving.place_zeros(index, start, len as u64, read)?;
    }
    Ok(())
}

/// Pages that follow each other: where each row of them begins, and its length in bytes.
fn runs(offsets: impl Iterator<Item = BlockOffset>) -> impl Iterator<Item = (u64, usize)> {
    let mut offsets = offsets.map(|offset| offset.0).peekable();
    std::iter::from_fn(move || {
        let start = offsets.next()?;
        let mut len = PAGE;
        while offsets.next_if_eq(&(start + len as u64)).is_some() {
            len += PAGE;
        }
        Some((start, len))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_that_follow_each_other_are_one_run() {
        let of = |pages: &[u64]| -> Vec<(u64, usize)> {
            runs(pages.iter().map(|page| BlockOffset(page * PAGE as u64)))
                .map(|(start, len)| (start / PAGE as u64, len / PAGE))
                .collect()
        };
        assert_eq!(of(&[]), []);
        assert_eq!(of(&[3]), [(3, 1)]);
        assert_eq!(of(&[3, 4, 5, 9, 8, 9]), [(3, 3), (9, 1), (8, 2)]);
    }
}
