//! Guest RAM for live migration: the two ends of the road of a page.
//!
//! ```text
//! guest RAM ─ claim ─ encode ─ channel ═══ wire ═══ channel ─ decode ─ place ─ guest RAM
//!     ^^^^^^^^^^^^^^                                                   ^^^^^^^^^^^^^^^^^
//! ```
//!
//! Guest memory is written by vCPUs while this crate reads it. It is therefore never lent out as
//! a `&[u8]`: it is touched through copies that the compiler cannot see through
//! ([`RamBlock::read`], [`RamBlock::write`]) or by the kernel ([`kernel_copy`]), and only here.
//!
//! | to | there is |
//! |---|---|
//! | have memory | [`RamBlock`] on any [`Backing`], all of them as [`GuestRam`] |
//! | know what to send | [`PageMap`], filled once and marked from a [`dirty::DirtyLog`] |
//! | send a page exactly once | a [`Claim`] on it, from a [`Sweep`] or by name |
//! | send less | [`RamBlock::is_zero`] |
//! | run while pages are still arriving | [`AbsentRam`], and what has [`Received`] |
//! | take in a checkpoint as a whole or not at all | [`RamCache`] |
//! | compare two sides | [`GuestRam::digest`] |
#![cfg_attr(docsrs, feature(doc_cfg))]

mod absent;
mod advice;
mod backing;
mod bitmap;
mod block;
mod cache;
mod claim;
mod copy;
mod digest;
mod guest_ram;
mod map;
mod page;
mod pagemap;
mod received;
#[cfg(test)]
#[path = "../tests/absent/reserve.rs"]
mod reserve;
mod sync;
mod touched;
mod uffd;
#[cfg(feature = "vm-memory")]
mod vm_memory;
mod words;

pub mod dirty;
pub mod kernel_copy;
pub mod zero;

pub use absent::{AbsentRam, Fault, Split};
pub use backing::{Backing, Owner, Sharing};
pub use block::{BlockError, RamBlock};
pub use cache::RamCache;
pub use claim::{Asked, Claim};
pub use digest::BlockDigest;
pub use guest_ram::GuestRam;
pub use map::{PageMap, Sweep};
pub use page::{BlockIndex, HostPage, PageSize, TARGET_PAGE, TargetPage};
pub use received::Received;
