//! Wire → guest RAM: the destination of a migration.
//!
//! [`input`], [`ahead`] and [`placing`] are the road of a page on this side, [`incoming`] goes
//! through the stream, [`live`] is a VM that waits for it. What keeps a VM instead of running it is in [`crate::kept`].

mod ahead;
pub(crate) mod incoming;
mod input;
pub(crate) mod live;
mod placing;
mod populate;
