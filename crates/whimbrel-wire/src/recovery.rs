//! What two whimbrels say to each other beyond QEMU's protocol when a broken migration goes on.
//!
//! Each connection of a recovery begins with a [`Hello`] of the source. On the main connection the
//! destination answers with a [`Welcome`], and the source proves with a [`Proof`] that it is here
//! now. Then the connection goes on as a recovery between QEMUs does, but that nothing has to be
//! asked for: requests and bitmaps follow the welcome, pages follow the proof. All three have fixed
//! lengths, so whoever has proved nothing is read no further than that.
//!
//! What the proofs are made of is not the wire's business; they are 32 bytes here.

use alloc::vec::Vec;
use core::fmt;

/// Bytes of a proof: those of an HMAC-SHA256.
pub const PROOF_LEN: usize = 32;

/// Bytes of a number that is used once.
pub const NONCE_LEN: usize = 16;

/// What makes a migration itself: sent once, on its first main channel, before the guest is given
/// away (command `WHIMBREL_IDENTITY`).
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Identity {
    /// Its name: not a secret.
    pub id: [u8; 16],
    /// What nobody else knows.
    pub secret: [u8; 32],
    /// On the main channel something comes at least so often, in ms, from now on; 0 is no promise.
    pub beat_ms: u32,
}

impl Identity {
    /// Bytes on the wire.
    pub const LEN: usize = 16 + 32 + 4;

    pub(crate) fn encode(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.id);
        out.extend_from_slice(&self.secret);
        out.extend_from_slice(&self.beat_ms.to_be_bytes());
    }

    pub(crate) fn parse(bytes: &[u8; Self::LEN]) -> Identity {
        let mut fields = Fields(bytes);
        let (id, secret) = (fields.take(), fields.take());
        Identity { id, secret, beat_ms: u32::from_be_bytes(fields.take()) }
    }
}

/// Without the secret.
impl fmt::Debug for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Identity({:032x})", u128::from_be_bytes(self.id))
    }
}

/// The channels of a recovery.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum HelloKind {
    /// The main channel, with the return path.
    Main,
    /// That of pages that were asked for.
    Urgent,
    /// A multifd channel, by its number.
    Multifd(u8),
}

impl HelloKind {
    const fn bytes(self) -> [u8; 2] {
        match self {
            Self::Main => [0, 0],
            Self::Urgent => [1, 0],
            Self::Multifd(number) => [2, number],
        }
    }

    const fn of(bytes: [u8; 2]) -> Option<Self> {
        match bytes {
            [0, 0] => Some(Self::Main),
            [1, 0] => Some(Self::Urgent),
            [2, number] => Some(Self::Multifd(number)),
            _ => None,
        }
    }
}

/// The first bytes of every connection of a recovery: which migration, and which try.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Hello {
    /// What the connection is for.
    pub kind: HelloKind,
    /// The migration's name.
    pub id: [u8; 16],
    /// Counts the source's tries, from 1.
    pub attempt: u32,
    /// Of the source, the same on all connections of one try.
    pub nonce: [u8; NONCE_LEN],
    /// Over all of the above and, but on the main channel, the destination's nonce.
    pub proof: [u8; PROOF_LEN],
}

impl Hello {
    /// How it begins.
    pub const MAGIC: [u8; 4] = *b"WhR1";

    /// Bytes on the wire.
    pub const LEN: usize = 4 + 2 + 16 + 4 + NONCE_LEN + PROOF_LEN;

    /// Appends it.
    pub fn encode(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&Self::MAGIC);
        out.extend_from_slice(&self.kind.bytes());
        out.extend_from_slice(&self.id);
        out.extend_from_slice(&self.attempt.to_be_bytes());
        out.extend_from_slice(&self.nonce);
        out.extend_from_slice(&self.proof);
    }

    /// Reads it; `None` when this is something else.
    #[must_use]
    pub fn parse(bytes: &[u8; Self::LEN]) -> Option<Self> {
        let mut fields = Fields(bytes);
        if fields.take::<4>() != Self::MAGIC {
            return None;
        }
        let kind = HelloKind::of(fields.take())?;
        let (id, attempt) = (fields.take(), u32::from_be_bytes(fields.take()));
        Some(Self { kind, id, attempt, nonce: fields.take(), proof: fields.take() })
    }
}

/// The destination's answer to the [`Hello`] of a main channel, the first bytes of its return path.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Welcome {
    /// Of the destination.
    pub nonce: [u8; NONCE_LEN],
    /// Over everything in the hello and this nonce.
    pub proof: [u8; PROOF_LEN],
}

impl Welcome {
    /// How it begins.
    pub const MAGIC: [u8; 4] = *b"WhW1";

    /// Bytes on the wire.
    pub const LEN: usize = 4 + NONCE_LEN + PROOF_LEN;

    /// Appends it.
    pub fn encode(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&Self::MAGIC);
        out.extend_from_slice(&self.nonce);
        out.extend_from_slice(&self.proof);
    }

    /// Reads it; `None` when this is something else.
    #[must_use]
    pub fn parse(bytes: &[u8; Self::LEN]) -> Option<Self> {
        let mut fields = Fields(bytes);
        (fields.take::<4>() == Self::MAGIC)
            .then(|| Self { nonce: fields.take(), proof: fields.take() })
    }
}

/// The source's answer to the [`Welcome`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Proof(pub [u8; PROOF_LEN]);

impl Proof {
    /// How it begins.
    pub const MAGIC: [u8; 4] = *b"WhP1";

    /// Bytes on the wire.
    pub const LEN: usize = 4 + PROOF_LEN;

    /// Appends it.
    pub fn encode(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&Self::MAGIC);
        out.extend_from_slice(&self.0);
    }

    /// Reads it; `None` when this is something else.
    #[must_use]
    pub fn parse(bytes: &[u8; Self::LEN]) -> Option<Self> {
        let mut fields = Fields(bytes);
        (fields.take::<4>() == Self::MAGIC).then(|| Self(fields.take()))
    }
}

/// The source's very last bytes on a main channel: the destination's SHUT has come. Without them a
/// destination that has everything does not know that its source knows.
pub const FAREWELL: [u8; 4] = *b"WhB1";

/// Fields of fixed lengths, one after the other, all of which are there.
struct Fields<'b>(&'b [u8]);

impl Fields<'_> {
    fn take<const N: usize>(&mut self) -> [u8; N] {
        let (field, rest) = self.0.split_first_chunk().expect("the lengths add up");
        self.0 = rest;
        *field
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_said_is_heard() {
        for kind in [HelloKind::Main, HelloKind::Urgent, HelloKind::Multifd(7)] {
            let hello = Hello {
                kind,
                id: [1; 16],
                attempt: 0x0203_0405,
                nonce: [6; NONCE_LEN],
                proof: [7; PROOF_LEN],
            };
            let mut bytes = Vec::new();
            hello.encode(&mut bytes);
            assert_eq!(Hello::parse(bytes.first_chunk().unwrap()), Some(hello));
            assert_eq!(bytes.len(), Hello::LEN);
            *bytes.get_mut(4).unwrap() = 3;
            assert_eq!(Hello::parse(bytes.first_chunk().unwrap()), None, "no such channel");
        }
        let welcome = Welcome { nonce: [1; NONCE_LEN], proof: [2; PROOF_LEN] };
        let mut bytes = Vec::new();
        welcome.encode(&mut bytes);
        assert_eq!(Welcome::parse(bytes.first_chunk().unwrap()), Some(welcome));
        assert_eq!(bytes.len(), Welcome::LEN);
        bytes.clear();
        Proof([9; PROOF_LEN]).encode(&mut bytes);
        assert_eq!(Proof::parse(bytes.first_chunk().unwrap()), Some(Proof([9; PROOF_LEN])));
        assert_eq!(bytes.len(), Proof::LEN);
        *bytes.first_mut().unwrap() ^= 1;
        assert_eq!(Proof::parse(bytes.first_chunk().unwrap()), None);
    }

    #[test]
    fn an_identity_does_not_show_its_secret() {
        let identity = Identity { id: [1; 16], secret: [0xab; 32], beat_ms: 0x0102_0304 };
        assert_eq!(alloc::format!("{identity:?}"), "Identity(01010101010101010101010101010101)");
        let mut bytes = Vec::new();
        identity.encode(&mut bytes);
        assert_eq!(Identity::parse(bytes.first_chunk().unwrap()), identity);
    }
}
