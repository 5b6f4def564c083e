//! What the guest's memory holds: a file, the same bytes for every contender.

use std::fs::File;
use std::io::{BufWriter, Write as _};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use clap::ValueEnum;

use crate::bench::contender::Memory;

const PAGE_BYTES: usize = 4096;

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum Content {
    /// Bytes that nothing compresses
    Random,
    /// A quarter of the pages random, a quarter text, half records of numbers and pointers
    Mixed,
}

impl Content {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Random => "random",
            Self::Mixed => "mixed",
        }
    }

    /// Writes as much as the memory holds into a file of this folder.
    pub(super) fn write(self, folder: &Path, memory: Memory) -> Result<PathBuf> {
        let path = folder.join(format!("content-{}", self.name()));
        let mut file = BufWriter::with_capacity(
            1 << 20,
            File::create(&path).with_context(|| path.display().to_string())?,
        );
        let mut dice = Dice(0x9e37_79b9_7f4a_7c15);
        let mut page = Vec::with_capacity(PAGE_BYTES + WORD_BYTES_MAX);
        for number in 0..memory.bytes() / PAGE_BYTES as u64 {
            page.clear();
            self.page(number, &mut dice, &mut page);
            file.write_all(&page[..PAGE_BYTES]).with_context(|| path.display().to_string())?;
        }
        file.flush()?;
        Ok(path)
    }

    fn page(self, number: u64, dice: &mut Dice, page: &mut Vec<u8>) {
        let kind = match self {
            Self::Random => 0,
            Self::Mixed => number % 4,
        };
        while page.len() < PAGE_BYTES {
            match kind {
                0 => page.extend(dice.roll().to_le_bytes()),
                1 => {
                    page.extend(WORDS[dice.below(WORDS.len())].as_bytes());
                    page.push(b' ');
                }
                _ => page.extend(record(dice)),
            }
        }
    }
}

/// As a kernel's or a program's structures are: two pointers into the same region, small numbers,
/// flags, and what is not used.
fn record(dice: &mut Dice) -> impl Iterator<Item = u8> {
    const REGION: u64 = 0xffff_8881_0000_0000;
    let pointer = |roll: u64| REGION | (roll & 0x0fff_ffc0);
    let (one, other) = (dice.roll(), dice.roll());
    let words = [
        pointer(one),
        pointer(other),
        one >> 56,
        u64::from(other >> 63 == 0),
        0,
        (other >> 40) & 0xffff,
        0,
        0,
    ];
    words.into_iter().flat_map(u64::to_le_bytes)
}

/// The longest of [`WORDS`] with a blank, or a record: what may stick out of a page.
const WORD_BYTES_MAX: usize = 64;

const WORDS: [&str; 32] = [
    "the",
    "of",
    "page",
    "memory",
    "a",
    "guest",
    "is",
    "to",
    "and",
    "channel",
    "packet",
    "in",
    "migration",
    "source",
    "destination",
    "that",
    "link",
    "it",
    "for",
    "compressed",
    "was",
    "with",
    "not",
    "by",
    "be",
    "thread",
    "buffer",
    "level",
    "from",
    "which",
    "receiver",
    "sent",
];

/// A reproducible sequence (xorshift64).
struct Dice(u64);

impl Dice {
    fn roll(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, end: usize) -> usize {
        usize::try_from(self.roll() >> 33).expect("31 bits") % end
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_are_whole_and_of_their_kinds() {
        let folder = std::env::temp_dir();
        let memory = Memory::parse("1M").unwrap();
        for content in [Content::Random, Content::Mixed] {
            let path = content.write(&folder, memory).unwrap();
            let bytes = std::fs::read(&path).unwrap();
            std::fs::remove_file(path).unwrap();
            assert_eq!(bytes.len(), 1 << 20);
            let zeros = bytes.iter().filter(|byte| **byte == 0).count();
            match content {
                Content::Random => assert!(zeros < 1 << 13, "{zeros}"),
                Content::Mixed => {
                    assert!(zeros > 1 << 17, "{zeros}");
                    let text = &bytes[PAGE_BYTES..2 * PAGE_BYTES];
                    assert!(text.iter().all(|byte| *byte == b' ' || byte.is_ascii_lowercase()));
                }
            }
            let pages = bytes.chunks(PAGE_BYTES).collect::<std::collections::HashSet<_>>();
            assert_eq!(pages.len(), 256, "every page is another");
        }
    }
}
