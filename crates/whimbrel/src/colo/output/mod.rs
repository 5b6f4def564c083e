//! What a guest and its copy send to the world.

#![cfg_attr(not(test), expect(dead_code, reason = "the part that moves packets is being written"))]

pub(crate) mod compare;
mod connections;
mod conversation;
pub(crate) mod flow;
#[cfg(test)]
mod packets;
mod series;
mod stream;

#[cfg(test)]
mod tests;
