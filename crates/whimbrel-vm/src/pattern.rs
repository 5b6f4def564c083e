//! What a page of the working set holds: its number, how often it has been updated, a checksum,
//! and a payload that follows from these. Half a page of one update and half of another, a page
//! of an update ago, or a page in another's place do not pass.
//!
//! The payload is a linear congruential sequence: the guest makes a word of it with three
//! instructions, and no compressor finds a shorter way to say it.

use whimbrel_ram::TARGET_PAGE;

/// Bytes in a page of the working set.
pub(crate) const PAGE_BYTES: u64 = TARGET_PAGE.bytes() as u64;
/// 64-bit words in it.
pub(crate) const WORDS: usize = TARGET_PAGE.bytes() / 8;
/// The page's number in the working set.
const NUMBER: usize = 0;
/// How often it has been updated.
const COUNT: usize = 1;
/// The sum of the payload's words.
const CHECKSUM: usize = 2;
/// The workload's seed.
const SEED: usize = 3;
/// The first word of payload.
const PAYLOAD: usize = 4;

/// The constants of the sequence. The guest has them from `vm.firmware`, so that a firmware that
/// was not carried along shows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Constants {
    pub(crate) multiplier: u64,
    pub(crate) increment: u64,
}

impl Constants {
    /// Knuth's for MMIX.
    pub(crate) const MMIX: Constants =
        Constants { multiplier: 6_364_136_223_846_793_005, increment: 1_442_695_040_888_963_407 };

    /// The next value of the sequence, which also chooses pages.
    pub(crate) fn next(self, value: u64) -> u64 {
        value.wrapping_mul(self.multiplier).wrapping_add(self.increment)
    }

    /// Where the payload of a page begins.
    fn first(self, seed: u64, page: u64, count: u64) -> u64 {
        let mixed = page.wrapping_mul(self.multiplier).wrapping_add(seed)
            ^ count.wrapping_mul(self.increment);
        (mixed ^ (mixed >> 32)).wrapping_mul(self.multiplier)
    }
}

/// A page of the working set, copied out of guest memory or about to be copied into it.
#[derive(Clone)]
pub(crate) struct Page(pub(crate) [u8; TARGET_PAGE.bytes()]);

impl Page {
    pub(crate) fn zeroed() -> Page {
        Page([0; TARGET_PAGE.bytes()])
    }

    fn word(&self, at: usize) -> u64 {
        let bytes = &self.0[at * 8..at * 8 + 8];
        u64::from_le_bytes(bytes.try_into().expect("eight bytes"))
    }

    fn set_word(&mut self, at: usize, value: u64) {
        self.0[at * 8..at * 8 + 8].copy_from_slice(&value.to_le_bytes());
    }

    /// Makes this page `number` after its `count`-th update.
    pub(crate) fn write(&mut self, constants: Constants, seed: u64, number: u64, count: u64) {
        let mut value = constants.first(seed, number, count);
        let mut sum = 0u64;
        for at in PAYLOAD..WORDS {
            value = constants.next(value);
            sum = sum.wrapping_add(value);
            self.set_word(at, value);
        }
        self.set_word(NUMBER, number);
        self.set_word(COUNT, count);
        self.set_word(CHECKSUM, sum);
        self.set_word(SEED, seed);
    }

    /// Whether this is page `number` after its `count`-th update, as far as the guest looks at
    /// each visit.
    pub(crate) fn check(&self, seed: u64, number: u64, count: u64) -> Result<(), Mismatch> {
        expect(MismatchKind::Number, number, self.word(NUMBER))?;
        expect(MismatchKind::Count, count, self.word(COUNT))?;
        expect(MismatchKind::Seed, seed, self.word(SEED))?;
        let sum = (PAYLOAD..WORDS).fold(0u64, |sum, at| sum.wrapping_add(self.word(at)));
        expect(MismatchKind::Checksum, self.word(CHECKSUM), sum)
    }

    /// As [`check`](Page::check), and every word of the payload for itself.
    pub(crate) fn check_all(
        &self,
        constants: Constants,
        seed: u64,
        number: u64,
        count: u64,
    ) -> Result<(), Mismatch> {
        self.check(seed, number, count)?;
        let mut value = constants.first(seed, number, count);
        for at in PAYLOAD..WORDS {
            value = constants.next(value);
            expect(MismatchKind::Payload, value, self.word(at))?;
        }
        Ok(())
    }
}

fn expect(kind: MismatchKind, expected: u64, found: u64) -> Result<(), Mismatch> {
    if expected == found { Ok(()) } else { Err(Mismatch { kind, expected, found }) }
}

/// What differs from what the guest remembers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Mismatch {
    pub(crate) kind: MismatchKind,
    pub(crate) expected: u64,
    pub(crate) found: u64,
}

/// Which part of what the guest remembers does not hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum MismatchKind {
    /// Another page lies here.
    Number,
    /// The page is of another update than the guest's table says: stale, when it is less.
    Count,
    /// The page is of another workload.
    Seed,
    /// The payload does not add up: torn or corrupt.
    Checksum,
    /// A word of the payload is wrong although they add up (only the full check sees it).
    Payload,
    /// The vCPU's registers and its counters in memory are of different moments.
    Updates,
    /// A floating point register lost its value.
    Register,
    /// What lies here is lost for ever: never found by the guest, who is stopped there.
    Lost,
}

impl MismatchKind {
    const ALL: [MismatchKind; 8] = [
        MismatchKind::Number,
        MismatchKind::Count,
        MismatchKind::Seed,
        MismatchKind::Checksum,
        MismatchKind::Payload,
        MismatchKind::Updates,
        MismatchKind::Register,
        MismatchKind::Lost,
    ];

    /// As the guest writes it: from 1 on, in the order of the variants.
    pub(crate) fn code(self) -> u64 {
        match self {
            MismatchKind::Number => 1,
            MismatchKind::Count => 2,
            MismatchKind::Seed => 3,
            MismatchKind::Checksum => 4,
            MismatchKind::Payload => 5,
            MismatchKind::Updates => 6,
            MismatchKind::Register => 7,
            MismatchKind::Lost => 8,
        }
    }

    pub(crate) fn from_code(code: u64) -> Option<MismatchKind> {
        MismatchKind::ALL.into_iter().find(|kind| kind.code() == code)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn page(number: u64, count: u64) -> Page {
        let mut page = Page::zeroed();
        page.write(Constants::MMIX, 9, number, count);
        page
    }

    fn kind(page: &Page) -> Option<MismatchKind> {
        page.check_all(Constants::MMIX, 9, 3, 5).err().map(|mismatch| mismatch.kind)
    }

    #[test]
    fn a_page_passes_its_own_check_only() {
        assert_eq!(kind(&page(3, 5)), None);
        assert_eq!(kind(&page(4, 5)), Some(MismatchKind::Number));
        assert_eq!(kind(&page(3, 4)), Some(MismatchKind::Count));
        assert_eq!(kind(&Page::zeroed()), Some(MismatchKind::Number));
    }

    #[test]
    fn every_single_torn_line_shows() {
        // A tear between two updates, at each cache line, either way round.
        for at in (64..4096).step_by(64) {
            let mut torn = page(3, 5);
            torn.0[at..].copy_from_slice(&page(3, 4).0[at..]);
            assert_eq!(kind(&torn), Some(MismatchKind::Checksum), "at {at}");
            let mut torn = page(3, 5);
            torn.0[32..at].copy_from_slice(&page(3, 4).0[32..at]);
            assert_eq!(kind(&torn), Some(MismatchKind::Checksum), "at {at}");
        }
    }

    #[test]
    fn words_that_change_places_show_in_the_full_check() {
        let mut swapped = page(3, 5);
        let (a, b) = (swapped.word(100), swapped.word(200));
        swapped.set_word(100, b);
        swapped.set_word(200, a);
        assert_eq!(swapped.check(9, 3, 5), Ok(()));
        assert_eq!(kind(&swapped), Some(MismatchKind::Payload));
    }

    #[test]
    fn payloads_of_neighbours_have_no_word_in_common() {
        let words = |page: Page| (PAYLOAD..WORDS).map(move |at| page.word(at));
        let mut all: Vec<u64> =
            [page(3, 5), page(3, 6), page(4, 5)].into_iter().flat_map(words).collect();
        let count = all.len();
        all.sort_unstable();
        all.dedup();
        assert_eq!(all.len(), count);
    }
}
