//! Sizes and places of guest pages as the protocol counts them.

use core::fmt;

/// The guest page size that is the unit of the protocol: 4 KiB on x86.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TargetPage(u32);

impl TargetPage {
    /// 4 KiB.
    pub const FOUR_KIB: Self = Self(12);

    /// The fewest bits: the flags of a RAM record word need ten.
    const BITS_MIN: u32 = 10;
    const BITS_MAX: u32 = 20;

    /// A page of `1 << bits` bytes; `None` unless 10 to 20 bits.
    #[must_use]
    pub const fn from_bits(bits: u32) -> Option<Self> {
        match bits {
            Self::BITS_MIN..=Self::BITS_MAX => Some(Self(bits)),
            _ => None,
        }
    }

    /// The logarithm of the size.
    #[must_use]
    pub const fn bits(self) -> u32 {
        self.0
    }

    /// The size in bytes.
    #[must_use]
    pub const fn size(self) -> u64 {
        1 << self.0
    }

    /// The low bits of a word, which hold flags.
    pub(crate) const fn mask(self) -> u64 {
        self.size() - 1
    }

    /// Whether a length or offset is a multiple of the page.
    #[must_use]
    pub const fn divides(self, bytes: u64) -> bool {
        bytes & self.mask() == 0
    }
}

impl Default for TargetPage {
    fn default() -> Self {
        Self::FOUR_KIB
    }
}

/// Bytes from the start of a RAM block.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct BlockOffset(pub u64);

impl fmt::Display for BlockOffset {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}
