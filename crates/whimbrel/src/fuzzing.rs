//! Ways in for the fuzz targets: no part of the API.

use std::sync::{Mutex, PoisonError};

use whimbrel_ram::AbsentRam;
use whimbrel_wire::multifd::Compression;
use whimbrel_wire::recovery::{Hello, HelloKind, Identity, NONCE_LEN, Proof, Welcome};

use crate::packing::{self, PACKET_PAGES, UnpackError};
use crate::recovery::proofs::{Attempt, Proofs};

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

/// One side of a recovery, who knows what makes the migration itself: makes the words that nobody
/// else can, for the other side to be fuzzed behind them.
#[derive(Clone, Debug)]
pub struct Knowing {
    proofs: Proofs,
    attempt: Attempt,
}

impl Knowing {
    /// Of the migration with this identity.
    pub fn new(identity: Identity) -> Knowing {
        let attempt = Attempt { number: 0, source: [0; NONCE_LEN], destination: [0; NONCE_LEN] };
        Knowing { proofs: Proofs::of(identity), attempt }
    }

    /// A source's first words in its try `number`.
    pub fn hello(&mut self, number: u32) -> Hello {
        self.attempt = Attempt { number, source: [7; NONCE_LEN], destination: [0; NONCE_LEN] };
        self.proofs.hello(number, self.attempt.source)
    }

    /// A source's second words, when a destination has answered these; nonsense where that was.
    pub fn proof(&mut self, welcome: &[u8; Welcome::LEN]) -> Proof {
        if let Some(welcome) = Welcome::parse(welcome) {
            self.attempt.destination = welcome.nonce;
        }
        self.proofs.proof(&self.attempt)
    }

    /// A source's first words on another channel of the same try.
    pub fn beside(&self, kind: HelloKind) -> Hello {
        self.proofs.beside(&self.attempt, kind)
    }

    /// A destination's answer to such a hello.
    pub fn welcome(&self, hello: &Hello) -> Welcome {
        let (number, source) = (hello.attempt, hello.nonce);
        self.proofs.welcome(&Attempt { number, source, destination: [9; NONCE_LEN] })
    }
}
