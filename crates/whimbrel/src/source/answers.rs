//! The return path, as a precopy source needs it: PONG and SHUT.

use std::time::{Duration, Instant};

use whimbrel_wire::{ReturnDecoded, ReturnDecoder, ReturnMessage, TargetPage};

use crate::channel::Channel;
use crate::error::Error;

/// How long one wait for an answer lasts before it is begun again; only cancellation and the
/// connection's end bound the whole.
const LOOK: Duration = Duration::from_secs(3600);

/// What the destination says, read as it comes.
#[derive(Debug)]
pub(crate) struct Answers {
    decoder: ReturnDecoder,
    buffer: [u8; 1024],
    held: usize,
}

/// An answer that matters in precopy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Answer {
    /// The answer to a PING.
    Pong(u32),
    /// The last word: 0 is success.
    Shut(u32),
    /// The destination closed its direction.
    End,
}

impl Answers {
    pub(crate) fn new() -> Answers {
        Answers { decoder: ReturnDecoder::new(TargetPage::FOUR_KIB), buffer: [0; 1024], held: 0 }
    }

    /// Takes what has come already: nothing, PONGs, or the reason why there is no going on.
    pub(crate) fn check(&mut self, channel: &mut Channel) -> Result<(), Error> {
        while let Some(answer) = self.next(channel, Instant::now())? {
            fail_on_end(answer)?;
        }
        Ok(())
    }

    /// Waits for the answer to the PING of `value`.
    pub(crate) fn wait_for_pong(&mut self, channel: &mut Channel, value: u32) -> Result<(), Error> {
        loop {
            match self.next(channel, Instant::now() + LOOK)? {
                Some(Answer::Pong(found)) if found == value => return Ok(()),
                Some(answer) => fail_on_end(answer)?,
                None => {}
            }
        }
    }

    /// Waits for SHUT and gives its value.
    pub(crate) fn wait_for_shut(&mut self, channel: &mut Channel) -> Result<u32, Error> {
        loop {
            match self.next(channel, Instant::now() + LOOK)? {
                Some(Answer::Shut(value)) => return Ok(value),
                Some(Answer::End) => return Err(Error::PeerGone),
                Some(Answer::Pong(_)) | None => {}
            }
        }
    }

    /// Waits for SHUT for `time` at most.
    pub(crate) fn shut_within(
        &mut self,
        channel: &mut Channel,
        time: Duration,
    ) -> Result<Option<u32>, Error> {
        let deadline = Instant::now() + time;
        loop {
            match self.next(channel, deadline)? {
                Some(Answer::Shut(value)) => return Ok(Some(value)),
                Some(Answer::End) => return Err(Error::PeerGone),
                Some(Answer::Pong(_)) => {}
                None => return Ok(None),
            }
        }
    }

    fn next(&mut self, channel: &mut Channel, deadline: Instant) -> Result<Option<Answer>, Error> {
        loop {
            let input = &self.buffer[..self.held];
            let (used, decoded) = self
                .decoder
                .decode(input)
                .map_err(|source| Error::Protocol { channel: "return path", source })?;
            self.buffer.copy_within(used..self.held, 0);
            self.held -= used;
            match decoded {
                ReturnDecoded::NeedMore(_) => {}
                ReturnDecoded::Message(ReturnMessage::Pong(value)) => {
                    return Ok(Some(Answer::Pong(value)));
                }
                ReturnDecoded::Message(ReturnMessage::Shut(value)) => {
                    return Ok(Some(Answer::Shut(value)));
                }
                ReturnDecoded::Message(other) => {
                    return Err(Error::Refused(format!(
                        "return path channel: {other:?} has no meaning in precopy"
                    )));
                }
                ReturnDecoded::BitmapFollows { .. }
                | ReturnDecoded::BitmapEnd
                | ReturnDecoded::Colo(_) => {
                    return Err(Error::Refused(
                        "return path channel: a bitmap or a checkpoint has no meaning in precopy"
                            .into(),
                    ));
                }
            }
            match channel.receive_until(&mut self.buffer[self.held..], deadline)? {
                Some(0) => return Ok(Some(Answer::End)),
                Some(bytes) => self.held += bytes,
                None => return Ok(None),
            }
        }
    }
}

fn fail_on_end(answer: Answer) -> Result<(), Error> {
    match answer {
        Answer::Pong(_) => Ok(()),
        Answer::Shut(0) | Answer::End => Err(Error::PeerGone),
        Answer::Shut(_) => Err(Error::PeerFailed),
    }
}
