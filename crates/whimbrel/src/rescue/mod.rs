//! The last resort: one side of a postcopy is gone for good.
//!
//! Then neither side has the whole guest, and no recovery will bring the rest. The destination has
//! the devices and the pages that had come; the source, or the file in which its RAM lay, has the
//! rest in the version in which the guest left it, which is the newest there is. So two parts make a
//! whole: either the destination, which still lives, is [filled](crate::Migrator::fill) with what the
//! other part has, and its guest just goes on; or both are kept in files ([`Part`]), which are
//! [joined](join) to a kept VM that can be restored anywhere.
//!
//! | | what it has | how it is kept |
//! |---|---|---|
//! | a paused destination | devices, and the pages that had come | [`Migrator::rescue`](crate::Migrator::rescue) |
//! | a paused source | all of RAM and devices, as of the hand-over | the same |
//! | a source that was killed | its RAM, if it lay in a file ([`describe`]) | as it is |
//!
//! A page that neither has is lost: it can be given up, so that whoever touches it takes a machine
//! check and not zeros ([`Lost::Poison`]).

mod answering;
mod fill;
mod guest;
mod join;
mod keep;
mod lost;
mod memory_file;
mod missing;
mod orders;
pub(crate) mod part;
mod record;
#[cfg(test)]
mod tests;

pub use fill::Filled;
pub use join::{How, Joined, join, roll_back};
pub use keep::KeptPart;
pub use memory_file::describe;
pub use part::{Part, PartBlock};

pub(crate) use guest::{fill_destination, keep_destination, keep_source};
pub(crate) use keep::write_part;
pub(crate) use lost::{NAME as LOST_PAGES, poison_as_told};
pub(crate) use missing::Missing;
pub(crate) use orders::{Orders, not_paused};

/// Which side of a migration.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// Where the guest came from.
    Source,
    /// Where it went to.
    Destination,
}

impl Side {
    /// `source` or `destination`.
    pub fn name(self) -> &'static str {
        match self {
            Side::Source => "source",
            Side::Destination => "destination",
        }
    }
}

/// What becomes of pages that are nowhere.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Lost {
    /// Nothing is done without them.
    #[default]
    Refuse,
    /// They are given up: whoever touches one is killed, a guest takes a machine check.
    Poison,
}

fn hex(bytes: &[u8; 16]) -> String {
    format!("{:032x}", u128::from_be_bytes(*bytes))
}

fn parse_hex(text: &str) -> Option<[u8; 16]> {
    let digits = text.len() == 32 && text.bytes().all(|byte| byte.is_ascii_hexdigit());
    let number = digits.then(|| u128::from_str_radix(text, 16).ok()).flatten()?;
    Some(number.to_be_bytes())
}
