//! Which whimbrel is let in by its first words, while a guest's RAM is arriving.

use whimbrel_wire::recovery::{Hello, HelloKind};

use super::proofs::{Proofs, Ticket};

/// Who may come: the source in a later try, and further channels of the one that goes on.
#[derive(Clone, Debug, Default)]
pub(crate) struct Admission {
    /// The last try that was let in.
    attempt: u32,
    /// What lets further channels in.
    ticket: Option<Ticket>,
}

impl Admission {
    /// Only tries after `attempt` are let in.
    pub(crate) fn after(attempt: u32) -> Admission {
        Admission { attempt, ticket: None }
    }

    /// The last try that was let in.
    pub(crate) fn attempt(&self) -> u32 {
        self.attempt
    }

    /// What a connection that begins with `first` is, once it has said enough; or why it is nobody
    /// who is waited for.
    pub(crate) fn judge(
        &self,
        proofs: &Proofs,
        first: &[u8],
    ) -> Result<Option<Hello>, &'static str> {
        let begun = first.len().min(Hello::MAGIC.len());
        if first[..begun] != Hello::MAGIC[..begun] {
            return Err("it does not begin as a recovery of a whimbrel does");
        }
        let Some(first) = first.first_chunk() else { return Ok(None) };
        let hello = Hello::parse(first).ok_or("its first words mean nothing")?;
        let admits = match hello.kind {
            HelloKind::Main => proofs.admits(&hello) && hello.attempt > self.attempt,
            _ => self.ticket.as_ref().is_some_and(|ticket| ticket.admits(&hello)),
        };
        match admits {
            true => Ok(Some(hello)),
            false => Err("it is of another migration, or of an earlier try"),
        }
    }

    /// The source is back, in this try: what was of an earlier one is let in no more.
    pub(crate) fn begin(&mut self, attempt: u32) {
        *self = Admission::after(attempt);
    }

    /// Channels with this ticket are let in.
    pub(crate) fn admit(&mut self, ticket: Ticket) {
        self.ticket = Some(ticket);
    }

    /// No further channels are.
    pub(crate) fn close(&mut self) {
        self.ticket = None;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::recovery::proofs::{Attempt, new_identity};

    #[test]
    fn a_later_try_is_let_in_and_the_channels_of_that_one_alone() {
        let proofs = Proofs::of(new_identity(0).unwrap());
        let mut admission = Admission::after(2);
        let words = |number| {
            let mut words = Vec::new();
            proofs.hello(number, [1; 16]).encode(&mut words);
            words
        };
        let later = words(3);
        for part in 0..later.len() {
            assert_eq!(admission.judge(&proofs, &later[..part]), Ok(None), "{part} bytes");
        }
        assert!(matches!(admission.judge(&proofs, &later), Ok(Some(_))));
        assert!(admission.judge(&proofs, &words(2)).is_err(), "an earlier try");
        assert!(admission.judge(&proofs, b"QEVM").is_err());

        admission.begin(3);
        assert_eq!(admission.attempt(), 3);
        assert!(admission.judge(&proofs, &later).is_err(), "once more");
        let attempt = Attempt { number: 3, source: [1; 16], destination: [2; 16] };
        let ticket = Ticket::new(&proofs, attempt);
        let urgent = ticket.words(HelloKind::Urgent);
        assert!(admission.judge(&proofs, &urgent).is_err(), "before it is admitted");
        admission.admit(ticket);
        assert!(matches!(admission.judge(&proofs, &urgent), Ok(Some(_))));
        admission.close();
        assert!(admission.judge(&proofs, &urgent).is_err(), "after that");
    }
}
