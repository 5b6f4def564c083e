//! What a peer says beside the application's bytes, once the handshake is over: alerts, new keys,
//! tickets.

use rustls::{AlertDescription, ContentType, HandshakeType};

use super::receiving::Broken;

/// Handshake messages after the handshake that are longer than this are none: the longest is a
/// ticket.
const MESSAGE_MAX: usize = 128 << 10;

/// Type and length, before every handshake message.
const HEADER: usize = 4;

/// What a message was about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Said {
    /// Nothing that has to be acted on.
    Nothing,
    /// `close_notify`: nothing more comes.
    Ended,
    /// `KeyUpdate`.
    NewKey { answer: bool },
}

/// Messages as they come, in parts or several in a record.
#[derive(Debug, Default)]
pub(super) struct Messages {
    /// The first part of a handshake message whose rest has not come.
    begun: Vec<u8>,
}

impl Messages {
    /// The content of a record that is not the application's.
    pub(super) fn take(&mut self, kind: ContentType, content: &[u8]) -> Result<Said, Broken> {
        match kind {
            ContentType::Alert => alert(content),
            ContentType::Handshake => self.handshake(content),
            _ => Err(Broken::Message("a record of a type that has no place here")),
        }
    }

    fn handshake(&mut self, content: &[u8]) -> Result<Said, Broken> {
        self.begun.extend_from_slice(content);
        let mut said = Said::Nothing;
        let mut done = 0;
        while let Some(&[kind, a, b, c]) = self.begun[done..].first_chunk::<HEADER>() {
            let len = usize::try_from(u32::from_be_bytes([0, a, b, c])).unwrap_or(usize::MAX);
            if len > MESSAGE_MAX {
                return Err(Broken::Message("a handshake message that is too long"));
            }
            let Some(body) = self.begun[done + HEADER..].get(..len) else { break };
            done += HEADER + len;
            said = match (HandshakeType::from(kind), body) {
                // Nothing is resumed here: a session is as long as its migration.
                (HandshakeType::NewSessionTicket, _) => said,
                // To negotiate again is what TLS 1.2 leaves to us to ignore.
                (HandshakeType::HelloRequest, []) => said,
                (HandshakeType::KeyUpdate, &[answer @ (0 | 1)]) if done == self.begun.len() => {
                    Said::NewKey { answer: answer == 1 }
                }
                _ => return Err(Broken::Message("a handshake message that has no place here")),
            };
        }
        self.begun.drain(..done);
        Ok(said)
    }
}

fn alert(content: &[u8]) -> Result<Said, Broken> {
    const WARNING: u8 = 1;
    let &[level, description] = content else {
        return Err(Broken::Message("an alert that is none"));
    };
    match AlertDescription::from(description) {
        AlertDescription::CloseNotify => Ok(Said::Ended),
        // What it gives up is followed by close_notify.
        AlertDescription::UserCanceled => Ok(Said::Nothing),
        AlertDescription::NoRenegotiation if level == WARNING => Ok(Said::Nothing),
        other => Err(Broken::Alert(other)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_may_come_in_parts_and_together() {
        let mut messages = Messages::default();
        let ticket = [&[4, 0, 1, 44][..], &[7; 300]].concat();
        let both = [&ticket[..], &[24, 0, 0, 1, 1]].concat();
        for byte in &both[..both.len() - 1] {
            assert_eq!(messages.take(ContentType::Handshake, &[*byte]), Ok(Said::Nothing));
        }
        assert_eq!(messages.take(ContentType::Handshake, &[1]), Ok(Said::NewKey { answer: true }));
        assert_eq!(messages.take(ContentType::Handshake, &both), Ok(Said::NewKey { answer: true }));
        assert!(messages.begun.is_empty());
    }

    #[test]
    fn what_has_no_meaning_is_refused() {
        let cases: [(ContentType, &[u8]); 8] = [
            (ContentType::Handshake, &[24, 0, 0, 1, 2]),
            (ContentType::Handshake, &[24, 0, 0, 1, 0, 4]), // a new key ends its record
            (ContentType::Handshake, &[1, 0, 0, 0]),        // another client hello
            (ContentType::Handshake, &[13, 0, 0, 0]),       // a certificate request
            (ContentType::Handshake, &[4, 255, 255, 255]),
            (ContentType::Alert, &[2]),
            (ContentType::ChangeCipherSpec, &[1]),
            (ContentType::Heartbeat, &[1, 0, 0]),
        ];
        for (kind, content) in cases {
            let result = Messages::default().take(kind, content);
            assert!(matches!(result, Err(Broken::Message(_))), "{kind:?} {content:?}: {result:?}");
        }
    }

    #[test]
    fn alerts_end_a_session_or_break_it() {
        let take = |level, kind| Messages::default().take(ContentType::Alert, &[level, kind]);
        assert_eq!(take(1, 0), Ok(Said::Ended));
        assert_eq!(take(1, 90), Ok(Said::Nothing));
        assert_eq!(take(1, 100), Ok(Said::Nothing));
        assert_eq!(take(2, 42), Err(Broken::Alert(AlertDescription::BadCertificate)));
    }
}
