//! Compression `auto`: how hard each packet is packed, decided for all channels together.
//!
//! They share the link and the processors, so what one of them does slows the others down, and
//! only together do they tell what is best. [`Effort`] decides; here is what it is told.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::packer::Peer;
use super::zstd::Compressor;
use crate::plan::{Effort, Gone};

/// The levels of zstd that are tried, from the least effort on; behind not to compress at all.
const LEVELS: [i32; 4] = [-3, 1, 3, 7];

/// Where it begins: with none. On a fast link any effort would cost a good part of a whole
/// migration before it is known how fast the link is; a slow one only takes in what its sockets
/// hold, a few MiB for each channel.
const BEGIN: usize = 0;

/// A channel that has had nothing to send for longer is not slow.
const IDLE: Duration = Duration::from_millis(5);

/// What the channels of a migration have in common.
#[derive(Clone, Debug)]
pub(super) struct Auto(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    /// The other side takes any method in any packet.
    takes_any: AtomicBool,
    began: Instant,
    effort: Mutex<Effort>,
}

impl Shared {
    fn effort(&self) -> MutexGuard<'_, Effort> {
        // Numbers, none of which can be wrong enough to matter.
        self.effort.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Auto {
    pub(super) fn new() -> Auto {
        Auto(Arc::new(Shared {
            takes_any: AtomicBool::new(false),
            began: Instant::now(),
            effort: Mutex::new(Effort::new(LEVELS.len() + 1, BEGIN)),
        }))
    }

    pub(super) fn set_peer(&self, peer: Peer) {
        self.0.takes_any.store(peer == Peer::Whimbrel, Ordering::Relaxed);
    }

    pub(super) fn peer(&self) -> Peer {
        match self.0.takes_any.load(Ordering::Relaxed) {
            true => Peer::Whimbrel,
            false => Peer::Stock,
        }
    }

    /// One channel more.
    pub(super) fn join(&self) -> Member {
        self.0.effort().join();
        let compressor = Compressor::of_frames(LEVELS[0]);
        Member { shared: self.0.clone(), compressor, rung: BEGIN, packet: None, before: None }
    }
}

/// One channel.
#[derive(Debug)]
pub(super) struct Member {
    shared: Arc<Shared>,
    compressor: Compressor,
    rung: usize,
    /// The packet under way.
    packet: Option<Packet>,
    /// When the one before had been sent.
    before: Option<Instant>,
}

#[derive(Debug)]
struct Packet {
    began: Instant,
    pages: usize,
    wire: usize,
}

impl Member {
    /// Begins a packet: what to compress its pages with, if that is to be done.
    pub(super) fn begin(&mut self) -> Option<&mut Compressor> {
        self.rung = self.shared.effort().rung();
        self.packet = Some(Packet { began: Instant::now(), pages: 0, wire: 0 });
        let level = LEVELS.get(self.rung.checked_sub(1)?)?;
        self.compressor.set_level(*level);
        Some(&mut self.compressor)
    }

    /// So much has become so much.
    pub(super) fn packed(&mut self, pages: usize, wire: usize) {
        if let Some(packet) = &mut self.packet {
            (packet.pages, packet.wire) = (pages, wire);
        }
    }

    /// The packet has been sent.
    pub(super) fn sent(&mut self) {
        let Some(packet) = self.packet.take() else { return };
        let now = Instant::now();
        let before = self.before.replace(now).filter(|before| packet.began - *before < IDLE);
        let took = now - before.unwrap_or(packet.began);
        let (pages, wire) = (packet.pages as u64, packet.wire as u64);
        let gone = Gone { rung: self.rung, pages, wire, took };
        self.shared.effort().gone(gone, now - self.shared.began);
    }
}
