//! A recorded stream, taken apart at its seams, so that it can be damaged in known places.

use std::fs;
use std::ops::Range;
use std::path::Path;

use whimbrel_wire::{Decoded, MainDecoder, MainOptions, RamRecord};

use crate::process::{VmProcess, folder};

/// A VM whose stream is short: 64 pages that are not zero.
pub(crate) const TINY: [&str; 3] =
    ["--accel=native", "--memory=8M", "--workload=uniform,rate=1000,working-set=256k"];

/// What lies at some bytes of a stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum What {
    Header,
    Configuration,
    RamStart,
    BlockList,
    RamPart,
    RamEnd,
    /// A record word, and with it the page.
    Page,
    Zero,
    Footer,
    Device,
    Eof,
    Description,
    Other,
}

/// A whole stream and what lies where in it.
#[derive(Clone, Debug)]
pub(crate) struct Stream {
    pub(crate) bytes: Vec<u8>,
    pieces: Vec<(What, Range<usize>)>,
}

impl Stream {
    /// Records the migration of a small VM.
    pub(crate) fn record() -> Stream {
        let folder = folder();
        let path = folder.path().join("stream");
        let mut vm = VmProcess::source(&TINY);
        vm.qmp.migrate(&format!("file:{}", path.display())).expect("it starts");
        vm.reaches("completed", "recording a stream");
        Stream::read(&path)
    }

    pub(crate) fn read(path: &Path) -> Stream {
        let bytes = fs::read(path).expect("a stream");
        let mut decoder = MainDecoder::new(MainOptions::default());
        let mut pieces = Vec::new();
        let (mut at, mut start) = (0, 0);
        while at < bytes.len() {
            let (used, decoded) = decoder.decode(&bytes[at..]).expect("a good stream");
            at += used;
            let what = match decoded {
                Decoded::NeedMore(_) => {
                    assert!(used > 0, "a whole stream");
                    continue;
                }
                Decoded::Header(_) => What::Header,
                Decoded::Configuration(_) => What::Configuration,
                Decoded::SectionStart(_) => What::RamStart,
                Decoded::RamSetup(_) => What::BlockList,
                Decoded::SectionPart(_) => What::RamPart,
                Decoded::SectionEnd(_) => What::RamEnd,
                Decoded::Ram(RamRecord::PageFollows { .. }) => {
                    at += 4096;
                    decoder.payload_taken(4096);
                    What::Page
                }
                Decoded::Ram(RamRecord::Zero { .. }) => What::Zero,
                Decoded::Footer(_) => What::Footer,
                Decoded::DeviceSection(_) => What::Device,
                Decoded::Eof => What::Eof,
                Decoded::VmDescription(_) => What::Description,
                _ => What::Other,
            };
            pieces.push((what, start..at));
            start = at;
        }
        Stream { bytes, pieces }
    }

    /// Where the first of these lies.
    pub(crate) fn first(&self, what: What) -> Range<usize> {
        self.all(what).next().unwrap_or_else(|| panic!("no {what:?} in {:?}", self.pieces))
    }

    /// Where all of these lie.
    pub(crate) fn all(&self, what: What) -> impl Iterator<Item = Range<usize>> {
        self.pieces.iter().filter(move |(found, _)| *found == what).map(|(_, at)| at.clone())
    }

    /// The bytes with those at `at` exchanged for `by`.
    pub(crate) fn with(&self, at: Range<usize>, by: &[u8]) -> Vec<u8> {
        let mut bytes = self.bytes.clone();
        bytes.splice(at, by.iter().copied());
        bytes
    }

    /// The bytes with `by` over those from `at` on.
    pub(crate) fn over(&self, at: usize, by: &[u8]) -> Vec<u8> {
        self.with(at..at + by.len(), by)
    }
}
