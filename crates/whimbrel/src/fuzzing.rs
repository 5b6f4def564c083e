//! Ways in for the fuzz targets: no part of the API.

use std::sync::{Mutex, PoisonError};

use whimbrel_ram::AbsentRam;
use whimbrel_wire::multifd::Compression;

use crate::packing::{self, PACKET_PAGES, UnpackError};

/// Unpacks the packets of a multifd channel.
#[derive(Debug, Default)]
pub struct Unpacker(packing::Unpacker);

impl Unpacker {
    /// The most pages that a packet has.
    pub const PAGES: usize = PACKET_PAGES;

    /// The pages of a packet of `count` pages.
    ///
    /// # Errors
    /// When its data do not give them.
    pub fn unpack(
        &mut self,
        method: Compression,
        data: &[u8],
        count: usize,
    ) -> Result<Vec<u8>, UnpackError> {
        self.0.unpack(method, data, count).map(<[u8]>::to_vec)
    }
}

/// What watches over RAM that a destination was left without.
static LEFT: Mutex<Vec<AbsentRam>> = Mutex::new(Vec::new());

/// Whoever touches pages that never came waits until the process ends, or [`let_go`] is called.
pub(crate) fn keep(absent: AbsentRam) {
    LEFT.lock().unwrap_or_else(PoisonError::into_inner).push(absent);
}

/// Ends the watch over RAM that never came: a process that is fuzzed has thousands of destinations,
/// and none of their guests is one.
pub fn let_go() {
    let left = std::mem::take(&mut *LEFT.lock().unwrap_or_else(PoisonError::into_inner));
    drop(left);
}
