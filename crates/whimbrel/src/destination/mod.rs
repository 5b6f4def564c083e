//! Wire → guest RAM: the destination of a migration.
//!
//! [`input`] is the road of the pages on this side, [`incoming`] goes through the stream, [`live`]
//! is a VM that waits for it. What keeps a VM instead of running it is in [`crate::kept`].

pub(crate) mod incoming;
mod input;
pub(crate) mod live;
