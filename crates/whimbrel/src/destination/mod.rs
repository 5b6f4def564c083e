//! Wire → guest RAM: the destination of a migration.
//!
//! [`input`], [`ahead`] and [`placing`] are the road of a page on this side, [`incoming`] goes
//! through the stream, [`live`] is a VM that waits for it. From the package of a postcopy on,
//! [`postcopy`] goes on with threads beside it: [`fault`] and [`asked`] ask for pages, [`urgent`]
//! takes them in, [`rest`] what comes on multifd channels, [`restore`] makes huge pages of small
//! ones; [`assembly`] and [`arriving`] are the road of a page then. One set of connections is a
//! [`session`]; when it breaks, [`door`] lets the source in again and [`recover`] tells it what is
//! here; [`farewell`] is how it ends. What keeps a VM instead of running it is in [`crate::kept`].

mod ahead;
mod arriving;
mod asked;
mod assembly;
mod blocktime;
mod buffer;
mod door;
mod farewell;
mod fault;
mod held;
pub(crate) mod incoming;
mod input;
pub(crate) mod live;
mod multifd;
mod outbox;
mod placing;
mod populate;
pub(crate) mod postcopy;
pub(crate) mod recover;
mod rest;
mod restore;
mod session;
mod urgent;

pub(crate) use door::Back;
