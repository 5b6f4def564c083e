//! That the other side is of the same migration: identifier, secret, and what proves them.
//!
//! The secret goes over the wire once, on the first main channel, before the guest does. After that
//! each side only proves that it knows it: by an HMAC-SHA256 over everything said so far, with a
//! number of its own and, from the second message on, one of the other side's. So a recorded
//! recovery opens nothing, neither here nor for another try.

use std::sync::Arc;

use aws_lc_rs::hmac;
use rustix::rand::{GetRandomFlags, getrandom};
use whimbrel_wire::recovery::{Hello, HelloKind, Identity, NONCE_LEN, PROOF_LEN, Proof, Welcome};

use crate::error::Error;

/// A number that is used once.
pub(crate) type Nonce = [u8; NONCE_LEN];

/// What one try of a recovery is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Attempt {
    pub(crate) number: u32,
    /// The source's number.
    pub(crate) source: Nonce,
    /// The destination's.
    pub(crate) destination: Nonce,
}

/// Makes proofs and checks them.
#[derive(Clone, Debug)]
pub(crate) struct Proofs {
    identity: Identity,
    key: Arc<hmac::Key>,
}

/// Bytes that nobody can guess. The kernel's own: a library's generator gathers what it begins with when
/// it is first asked, and a destination asks first when its link is back and its guest waits. That was
/// 100 ms and more of a first recovery.
pub(crate) fn random<const N: usize>() -> Result<[u8; N], Error> {
    let mut bytes = [0; N];
    let mut filled = 0;
    while filled < N {
        let asked = || getrandom(&mut bytes[filled..], GetRandomFlags::empty());
        filled += rustix::io::retry_on_intr(asked)
            .map_err(|error| Error::system("asking the kernel for random bytes")(error.into()))?;
    }
    Ok(bytes)
}

/// What makes a migration that begins now itself.
pub(crate) fn new_identity(beat_ms: u32) -> Result<Identity, Error> {
    Ok(Identity { id: random()?, secret: random()?, beat_ms })
}

impl Proofs {
    pub(crate) fn of(identity: Identity) -> Proofs {
        let key = Arc::new(hmac::Key::new(hmac::HMAC_SHA256, &identity.secret));
        Proofs { identity, key }
    }

    fn context(&self, label: &str, parts: &[&[u8]]) -> hmac::Context {
        let mut context = hmac::Context::with_key(&self.key);
        // The labels end in a byte that is in none of them, the parts have fixed lengths.
        context.update(label.as_bytes());
        context.update(&[0]);
        context.update(&self.identity.id);
        parts.iter().for_each(|part| context.update(part));
        context
    }

    fn make(&self, label: &str, parts: &[&[u8]]) -> [u8; PROOF_LEN] {
        let mut proof = [0; PROOF_LEN];
        proof.copy_from_slice(self.context(label, parts).sign().as_ref());
        proof
    }

    fn is_right(&self, label: &str, parts: &[&[u8]], proof: &[u8; PROOF_LEN]) -> bool {
        let made = self.make(label, parts);
        aws_lc_rs::constant_time::verify_slices_are_equal(&made, proof).is_ok()
    }

    /// The source's first word on its new main channel.
    pub(crate) fn hello(&self, number: u32, source: Nonce) -> Hello {
        let proof = self.make("hello", &[&number.to_be_bytes(), &source]);
        let (kind, id) = (HelloKind::Main, self.identity.id);
        Hello { kind, id, attempt: number, nonce: source, proof }
    }

    /// Whether it comes from the source of this migration: now, or some time ago.
    pub(crate) fn admits(&self, hello: &Hello) -> bool {
        hello.kind == HelloKind::Main
            && hello.id == self.identity.id
            && self.is_right("hello", &[&hello.attempt.to_be_bytes(), &hello.nonce], &hello.proof)
    }

    /// The answer to it.
    pub(crate) fn welcome(&self, attempt: &Attempt) -> Welcome {
        let proof = self.make("welcome", &attempt.parts());
        Welcome { nonce: attempt.destination, proof }
    }

    /// Whether the answer comes from the destination of this migration, now; gives what both know
    /// of the try then.
    pub(crate) fn welcomed(
        &self,
        number: u32,
        source: Nonce,
        welcome: &Welcome,
    ) -> Option<Attempt> {
        let attempt = Attempt { number, source, destination: welcome.nonce };
        self.is_right("welcome", &attempt.parts(), &welcome.proof).then_some(attempt)
    }

    /// The source's second word: it is here now.
    pub(crate) fn proof(&self, attempt: &Attempt) -> Proof {
        Proof(self.make("proof", &attempt.parts()))
    }

    /// Whether it is.
    pub(crate) fn is_proved(&self, attempt: &Attempt, proof: &Proof) -> bool {
        self.is_right("proof", &attempt.parts(), &proof.0)
    }

    /// The first word on another channel of the same try.
    pub(crate) fn beside(&self, attempt: &Attempt, kind: HelloKind) -> Hello {
        let proof = self.make(&label(kind), &attempt.parts());
        let (id, number, nonce) = (self.identity.id, attempt.number, attempt.source);
        Hello { kind, id, attempt: number, nonce, proof }
    }

    /// Whether a channel is of this try.
    pub(crate) fn admits_beside(&self, attempt: &Attempt, hello: &Hello) -> bool {
        hello.kind != HelloKind::Main
            && (hello.id, hello.attempt, hello.nonce)
                == (self.identity.id, attempt.number, attempt.source)
            && self.is_right(&label(hello.kind), &attempt.parts(), &hello.proof)
    }
}

/// What lets other channels of one try in.
#[derive(Clone, Debug)]
pub(crate) struct Ticket {
    proofs: Proofs,
    attempt: Attempt,
}

impl Ticket {
    pub(crate) fn new(proofs: &Proofs, attempt: Attempt) -> Ticket {
        Ticket { proofs: proofs.clone(), attempt }
    }

    /// The first bytes of a channel.
    pub(crate) fn words(&self, kind: HelloKind) -> Vec<u8> {
        let mut words = Vec::new();
        self.proofs.beside(&self.attempt, kind).encode(&mut words);
        words
    }

    /// Whether a channel is of this try.
    pub(crate) fn admits(&self, hello: &Hello) -> bool {
        self.proofs.admits_beside(&self.attempt, hello)
    }
}

impl Attempt {
    fn parts(&self) -> [&[u8]; 2] {
        // The source's number is new in every try, and the try's number is bound to it by the hello.
        [&self.source, &self.destination]
    }
}

fn label(kind: HelloKind) -> String {
    match kind {
        HelloKind::Main => "main".into(),
        HelloKind::Urgent => "urgent".into(),
        HelloKind::Multifd(number) => format!("multifd {number}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn random_bytes_differ_and_fill_all_there_is() {
        let [one, other] = [(); 2].map(|()| random::<300>().unwrap());
        assert_ne!(one, other);
        assert_ne!(one[256..], [0; 44], "the kernel may give 256 at a time");
    }

    #[test]
    fn only_who_knows_the_secret_gets_through_and_only_now() {
        let identity = new_identity(0).unwrap();
        let (source, destination) = (Proofs::of(identity), Proofs::of(identity));
        let theirs: Nonce = random().unwrap();
        let hello = source.hello(3, theirs);
        assert!(destination.admits(&hello));
        let attempt = Attempt { number: 3, source: theirs, destination: random().unwrap() };
        let welcome = destination.welcome(&attempt);
        assert_eq!(source.welcomed(3, theirs, &welcome), Some(attempt));
        let proof = source.proof(&attempt);
        assert!(destination.is_proved(&attempt, &proof));
        for kind in [HelloKind::Urgent, HelloKind::Multifd(0), HelloKind::Multifd(9)] {
            assert!(destination.admits_beside(&attempt, &source.beside(&attempt, kind)));
        }

        // Of the same name, and with another secret.
        let other = Proofs::of(Identity { secret: [1; 32], ..identity });
        assert!(!other.admits(&hello) && !destination.admits(&other.hello(3, theirs)));
        assert_eq!(source.welcomed(3, theirs, &other.welcome(&attempt)), None);
        assert!(!destination.is_proved(&attempt, &other.proof(&attempt)));
        // Recorded in another try.
        let later = Attempt { destination: random().unwrap(), ..attempt };
        assert!(!destination.is_proved(&later, &proof));
        let beside = source.beside(&attempt, HelloKind::Urgent);
        assert!(!destination.admits_beside(&later, &beside));
        assert_eq!(source.welcomed(3, random().unwrap(), &welcome), None);
        // Changed on the way.
        assert!(!destination.admits(&Hello { attempt: 4, ..hello }));
        assert!(!destination.admits(&Hello { id: [0; 16], ..hello }));
        let moved = Hello { kind: HelloKind::Multifd(0), ..beside };
        assert!(!destination.admits_beside(&attempt, &moved));
        assert!(!destination.admits(&Hello { kind: HelloKind::Main, ..beside }));
    }
}
