//! Guests that check themselves and say so on their serial port.

use std::ops::Range;
use std::path::Path;

use anyhow::Result;

mod boot_sector;
mod cpio;
mod linux;

pub use boot_sector::BootSector;
pub use linux::Linux;

use crate::console::{Report, reports};

/// A guest: how QEMU starts it, and what must be true of what it says.
pub trait Guest: std::fmt::Debug {
    /// The arguments of QEMU that make this machine, but for its memory, the same on every side of a migration.
    /// Files it boots from are made in `folder`.
    ///
    /// # Errors
    /// A file cannot be written, or is not there.
    fn arguments(&self, folder: &Path) -> Result<Vec<String>>;

    /// Its memory, in MiB.
    fn mebibytes(&self) -> u32;

    /// How many lines the guest has said when it is well under way.
    fn settled_lines(&self) -> usize;

    /// The addresses it writes when it is well under way; `None` where nobody can say.
    fn written(&self) -> Option<Vec<Range<u32>>>;

    /// Checks what the guest said before and after a move.
    ///
    /// # Errors
    /// What shows that it did not go on where it stopped, or that its memory changed.
    fn check_continues(&self, before: &str, after: &str) -> Result<()>;
}

/// The reports of both sides, where each has some.
fn both_sides(before: &str, after: &str) -> Result<(Vec<Report>, Vec<Report>)> {
    let (before, after) = (reports(before), reports(after));
    anyhow::ensure!(!before.is_empty(), "the guest said nothing before the move");
    anyhow::ensure!(!after.is_empty(), "the guest said nothing after the move");
    Ok((before, after))
}
