//! QMP as it is on the wire: our server and our client over real sockets, and a stock QEMU beside
//! them where there is one.
#![expect(clippy::unwrap_used, reason = "in a test's helper too, a panic is the failure")]

mod client;
mod clients;
mod engine;
mod fake;
mod peers;
mod protocol;
mod qemu;
mod raw;
mod refusals;
