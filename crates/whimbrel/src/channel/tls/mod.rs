//! TLS 1.2 and 1.3 on a channel: rustls agrees on keys and verifies who is who, the records are
//! sealed and opened here.
//!
//! [`credentials`] come from a directory laid out as QEMU's; a [`handshake`] goes in steps, and
//! turns a channel into a secret one; then a [`session`] has its two directions, [`sending`] and
//! [`receiving`], which make and take apart [`record`]s. Who is let in is for [`authorization`] to
//! say, by the [`distinguished_name`] in the certificate.
//!
//! There is no way from here to plain bytes: a channel for which there are credentials is secret,
//! or it is none. Pre-shared keys and anonymous sessions rustls does not have.

mod authorization;
mod credentials;
mod distinguished_name;
mod handshake;
mod identity;
mod post_handshake;
mod receiving;
mod record;
mod sending;
mod session;
mod unverified;
mod words;

pub use authorization::{Authorization, Format, Policy};
pub(crate) use credentials::{TlsClient, TlsServer};
pub use credentials::{TlsCredentials, TlsEndpoint, TlsOptions};
pub(super) use handshake::{Handshake, Progress};
pub(super) use session::{Fault, Sent, Session};

/// Whether the first bytes that came are those of a peer that speaks TLS: a record of a handshake.
pub(crate) fn is_spoken_by(first: &[u8]) -> bool {
    matches!(first, [22, 3, 0..=4, ..])
}

/// What a peer says when it speaks TLS and we do not.
pub(crate) const UNEXPECTED: &str =
    "the peer speaks TLS; set tls-creds here, too, or on neither side";

/// What is wrong, in words.
pub(super) fn explain(fault: &Fault) -> String {
    words::of_fault(fault)
}

#[cfg(test)]
#[path = "../../../tests/support/pki.rs"]
mod pki;
#[cfg(test)]
mod tests;
