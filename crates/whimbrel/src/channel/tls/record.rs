//! The records of one direction: sealed and opened where they lie, with the keys that rustls has
//! agreed on.
//!
//! rustls's own record layer takes a copy and an allocation a record, and has one state for both
//! directions; here a record is one pass over bytes that are in the cache, and the directions have
//! nothing in common. Nonces, lengths and what is authenticated are as in RFC 8446, 5.2, and RFC
//! 5246, 6.2.3.3 (RFC 5288, RFC 7905).

use std::ops::Range;

use aws_lc_rs::aead::{
    AES_128_GCM, AES_256_GCM, Aad, Algorithm, CHACHA20_POLY1305, LessSafeKey, Nonce, UnboundKey,
};
use rustls::crypto::cipher::{AeadKey, Iv, NONCE_LEN, Nonce as Counted};
use rustls::{ConnectionTrafficSecrets, ContentType, ProtocolVersion, SupportedCipherSuite};

/// Type, version and length, before every record.
pub(super) const HEADER: usize = 5;

/// The most bytes of the application's in a record.
pub(super) const PLAIN_MAX: usize = 1 << 14;

/// A tag of GCM or Poly1305.
const TAG: usize = 16;

/// What AES-GCM of TLS 1.2 has in front of a record's content.
const EXPLICIT_NONCE: usize = 8;

/// The most that protection adds to a record: RFC 8446 allows as much for padding, and no suite
/// here comes near it.
const EXPANSION_MAX: usize = 256;

/// The longest record, its header included.
pub(super) const RECORD_MAX: usize = HEADER + PLAIN_MAX + EXPANSION_MAX;

/// What is wrong with a record that came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::channel) enum Wrong {
    /// Its header is none of TLS.
    Header([u8; HEADER]),
    /// It says that it is longer than any record may be.
    Length(usize),
    /// It is not protected, where every record has to be.
    Unprotected,
    /// Somebody has changed it, or it is not from the peer, or not in its place.
    Forged,
    /// More of it than a record may hold, or nothing but padding.
    Content,
    /// The key has been used for as many records as there are numbers.
    Exhausted,
}

/// How records of a connection look.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Shape {
    /// TLS 1.3: the type is inside.
    Tls13,
    /// TLS 1.2 with AES-GCM: a part of the nonce is in the record.
    Tls12Gcm,
    /// TLS 1.2 with ChaCha20-Poly1305.
    Tls12Chacha,
}

/// The key of one direction, and how often it has been used.
pub(super) struct Key {
    shape: Shape,
    key: LessSafeKey,
    iv: Iv,
    sequence: u64,
    /// The last record to be sealed with it.
    limit: u64,
}

impl std::fmt::Debug for Key {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Key")
            .field("shape", &self.shape)
            .field("sequence", &self.sequence)
            .finish_non_exhaustive()
    }
}

impl Key {
    /// The key for what `secrets` are of, to be used from record `sequence` on.
    pub(super) fn new(
        version: ProtocolVersion,
        suite: SupportedCipherSuite,
        (sequence, secrets): (u64, ConnectionTrafficSecrets),
    ) -> Result<Key, rustls::Error> {
        let (algorithm, key, iv): (&Algorithm, AeadKey, Iv) = match secrets {
            ConnectionTrafficSecrets::Aes128Gcm { key, iv } => (&AES_128_GCM, key, iv),
            ConnectionTrafficSecrets::Aes256Gcm { key, iv } => (&AES_256_GCM, key, iv),
            ConnectionTrafficSecrets::Chacha20Poly1305 { key, iv } => (&CHACHA20_POLY1305, key, iv),
            _ => return Err(rustls::Error::General("a cipher that is not known here".into())),
        };
        let key = UnboundKey::new(algorithm, key.as_ref())
            .map_err(|_| rustls::Error::General("a key of the wrong length".into()))?;
        let shape = match version {
            ProtocolVersion::TLSv1_3 => Shape::Tls13,
            ProtocolVersion::TLSv1_2 if *algorithm == CHACHA20_POLY1305 => Shape::Tls12Chacha,
            ProtocolVersion::TLSv1_2 => Shape::Tls12Gcm,
            _ => return Err(rustls::Error::General("a version that is not known here".into())),
        };
        let limit = match suite {
            SupportedCipherSuite::Tls12(suite) => suite.common.confidentiality_limit,
            SupportedCipherSuite::Tls13(suite) => suite.common.confidentiality_limit,
        };
        Ok(Key { shape, key: LessSafeKey::new(key), iv, sequence, limit: limit.min(u64::MAX - 1) })
    }

    /// Where a record's content begins in it.
    pub(super) fn prefix(&self) -> usize {
        match self.shape {
            Shape::Tls13 | Shape::Tls12Chacha => HEADER,
            Shape::Tls12Gcm => HEADER + EXPLICIT_NONCE,
        }
    }

    /// How many records may still be sealed.
    pub(super) fn left(&self) -> u64 {
        self.limit.saturating_sub(self.sequence)
    }

    /// Seals the `len` bytes of content that lie behind the [`prefix`](Key::prefix) in `record`;
    /// gives the length of the whole.
    ///
    /// # Panics
    /// Without a number left ([`left`](Key::left)), or room for the rest in `record`.
    pub(super) fn seal(&mut self, kind: ContentType, record: &mut [u8], len: usize) -> usize {
        assert!(self.left() > 0 && len <= PLAIN_MAX, "asked before");
        let nonce = Counted::new(&self.iv, self.sequence).0;
        let content = self.prefix();
        let (outer, text, end) = match self.shape {
            Shape::Tls13 => {
                record[content + len] = kind.into();
                (ContentType::ApplicationData, content..content + len + 1, content + len + 1 + TAG)
            }
            Shape::Tls12Gcm => {
                record[HEADER..content].copy_from_slice(&nonce[NONCE_LEN - EXPLICIT_NONCE..]);
                (kind, content..content + len, content + len + TAG)
            }
            Shape::Tls12Chacha => (kind, content..content + len, content + len + TAG),
        };
        let header = header(outer, end - HEADER);
        record[..HEADER].copy_from_slice(&header);
        let (additional, len_of) = self.additional(header, len);
        let nonce = Nonce::assume_unique_for_key(nonce);
        let tag = self
            .key
            .seal_in_place_separate_tag(
                nonce,
                Aad::from(&additional[..len_of]),
                &mut record[text.clone()],
            )
            .expect("a record is far shorter than what a key can seal");
        record[text.end..end].copy_from_slice(tag.as_ref());
        self.sequence += 1;
        end
    }

    /// Opens a whole record; gives its type, and where its content lies.
    pub(super) fn open(&mut self, record: &mut [u8]) -> Result<(ContentType, Range<usize>), Wrong> {
        if self.sequence == u64::MAX {
            return Err(Wrong::Exhausted);
        }
        let content = self.prefix();
        let header: [u8; HEADER] = record[..HEADER].try_into().expect("as long as it is");
        let kind = ContentType::from(header[0]);
        if self.shape == Shape::Tls13 && kind != ContentType::ApplicationData {
            return Err(Wrong::Unprotected);
        }
        let Some(len) = record.len().checked_sub(content + TAG) else {
            return Err(Wrong::Forged);
        };
        let mut nonce = Counted::new(&self.iv, self.sequence).0;
        if self.shape == Shape::Tls12Gcm {
            // The peer's choice. The sequence number is what the tag vouches for.
            nonce[NONCE_LEN - EXPLICIT_NONCE..].copy_from_slice(&record[HEADER..content]);
        }
        let (additional, len_of) = self.additional(header, len);
        let nonce = Nonce::assume_unique_for_key(nonce);
        self.key
            .open_in_place(nonce, Aad::from(&additional[..len_of]), &mut record[content..])
            .map_err(|_| Wrong::Forged)?;
        self.sequence += 1;
        let (kind, len) = match self.shape {
            Shape::Tls12Gcm | Shape::Tls12Chacha => (kind, len),
            Shape::Tls13 => {
                let text = &record[content..content + len];
                // Padding is zeros, and the type before it is none.
                let at = text.iter().rposition(|&byte| byte != 0).ok_or(Wrong::Content)?;
                (ContentType::from(text[at]), at)
            }
        };
        match len > PLAIN_MAX {
            true => Err(Wrong::Content),
            false => Ok((kind, content..content + len)),
        }
    }

    /// What is authenticated beside the content, and how long it is.
    fn additional(&self, header: [u8; HEADER], len: usize) -> ([u8; 13], usize) {
        let mut bytes = [0; 13];
        if self.shape == Shape::Tls13 {
            bytes[..HEADER].copy_from_slice(&header);
            return (bytes, HEADER);
        }
        bytes[..8].copy_from_slice(&self.sequence.to_be_bytes());
        bytes[8..11].copy_from_slice(&header[..3]);
        bytes[11..].copy_from_slice(&len_bytes(len));
        (bytes, 13)
    }
}

fn header(kind: ContentType, len: usize) -> [u8; HEADER] {
    // The version is that of TLS 1.2 in 1.3, too.
    let [version, minor] = u16::from(ProtocolVersion::TLSv1_2).to_be_bytes();
    let [high, low] = len_bytes(len);
    [kind.into(), version, minor, high, low]
}

fn len_bytes(len: usize) -> [u8; 2] {
    u16::try_from(len).expect("a record is shorter than 64 KiB").to_be_bytes()
}

/// How long the record is that `bytes` begin with, its header included; `None` when the header is
/// not there yet.
pub(super) fn record_len(bytes: &[u8]) -> Result<Option<usize>, Wrong> {
    let Some(header) = bytes.first_chunk::<HEADER>() else { return Ok(None) };
    let [kind, major, _, high, low] = *header;
    // ChangeCipherSpec, alert, handshake, application data; every version of TLS has 3 here.
    if !(20..=23).contains(&kind) || major != 3 {
        return Err(Wrong::Header(*header));
    }
    let len = usize::from(u16::from_be_bytes([high, low]));
    match len <= PLAIN_MAX + EXPANSION_MAX {
        true => Ok(Some(HEADER + len)),
        false => Err(Wrong::Length(len)),
    }
}
