//! What can be wrong with a packet's data.

/// The data of a multifd packet do not give its pages.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum UnpackError {
    /// They are not what the packet's flags call them.
    #[error(
        "expected {expected} bytes of pages in {method}, found what cannot be decoded: {reason}"
    )]
    Corrupt {
        /// What the packet's pages are together.
        expected: usize,
        /// The method the packet names.
        method: &'static str,
        /// What the decoder says.
        reason: &'static str,
    },
    /// They end too early.
    #[error("expected {expected} bytes of pages in {method}, found {found}")]
    Short {
        /// What the packet's pages are together.
        expected: usize,
        /// The method the packet names.
        method: &'static str,
        /// How many there were.
        found: usize,
    },
    /// They give more than the packet's pages: as a bomb would.
    #[error("expected {expected} bytes of pages in {method}, found more")]
    Long {
        /// What the packet's pages are together.
        expected: usize,
        /// The method the packet names.
        method: &'static str,
    },
    /// The packet names a method that is not known here.
    #[error("expected pages packed by none, zlib or zstd, found method {found:#x}")]
    Method {
        /// The bits of the flags.
        found: u32,
    },
}
