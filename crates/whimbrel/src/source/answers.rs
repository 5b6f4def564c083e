//! The return path: what the destination says, read as it comes.

use std::time::{Duration, Instant};

use whimbrel_wire::{BlockOffset, Name, ReturnDecoded, ReturnDecoder, ReturnMessage, TargetPage};

use crate::channel::Channel;
use crate::error::Error;
use crate::hello::Features;

/// How long one wait for an answer lasts before it is begun again; only cancellation and the
/// connection's end bound the whole.
const LOOK: Duration = Duration::from_secs(3600);

/// The return path.
#[derive(Debug)]
pub(crate) struct Answers {
    decoder: ReturnDecoder,
    buffer: Box<[u8; 4096]>,
    start: usize,
    end: usize,
    pongs: u64,
    agreed: Option<Features>,
}

/// What the destination says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Answer {
    /// The answer to a PING.
    Pong(u32),
    /// The guest waits for these bytes, in postcopy.
    Request {
        /// The block; `None` for that of the request before.
        block: Option<Name>,
        /// Where they begin.
        start: BlockOffset,
        /// How many.
        len: u32,
    },
    /// The last word: 0 is success.
    Shut(u32),
    /// The destination closed its direction.
    End,
}

impl Answers {
    pub(crate) fn new() -> Answers {
        Answers {
            decoder: ReturnDecoder::new(TargetPage::FOUR_KIB),
            buffer: Box::new([0; 4096]),
            start: 0,
            end: 0,
            pongs: 0,
            agreed: None,
        }
    }

    /// What was agreed on with a destination that is a whimbrel, as far as it has answered.
    pub(crate) fn agreed(&self) -> Features {
        self.agreed.unwrap_or_default()
    }

    /// How many bytes of the return path have been understood.
    pub(crate) fn offset(&self) -> u64 {
        self.decoder.offset()
    }

    /// Takes what has come already: nothing, PONGs, or the reason why there is no going on.
    pub(crate) fn check(&mut self, channel: &mut Channel) -> Result<(), Error> {
        while let Some(answer) = self.next(channel, Instant::now())? {
            self.only_pong(answer)?;
        }
        Ok(())
    }

    /// Waits until the destination has answered `count` PINGs since the stream began.
    pub(crate) fn wait_for_pongs(
        &mut self,
        channel: &mut Channel,
        count: u64,
    ) -> Result<(), Error> {
        while self.pongs < count {
            if let Some(answer) = self.next(channel, Instant::now() + LOOK)? {
                self.only_pong(answer)?;
            }
        }
        Ok(())
    }

    /// The same for `time` at most; says whether they were answered.
    pub(crate) fn pongs_within(
        &mut self,
        channel: &mut Channel,
        count: u64,
        time: Duration,
    ) -> Result<bool, Error> {
        let deadline = Instant::now() + time;
        while self.pongs < count {
            match self.next(channel, deadline)? {
                Some(answer) => self.only_pong(answer)?,
                None => return Ok(false),
            }
        }
        Ok(true)
    }

    /// Waits for the answer to the PING of `value`.
    pub(crate) fn wait_for_pong(&mut self, channel: &mut Channel, value: u32) -> Result<(), Error> {
        loop {
            match self.next(channel, Instant::now() + LOOK)? {
                Some(Answer::Pong(found)) if found == value => return Ok(()),
                Some(answer) => self.only_pong(answer)?,
                None => {}
            }
        }
    }

    /// Waits for SHUT and gives its value.
    pub(crate) fn wait_for_shut(&mut self, channel: &mut Channel) -> Result<u32, Error> {
        loop {
            if let Some(value) = self.shut_within(channel, LOOK)? {
                return Ok(value);
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
                Some(answer) => self.only_pong(answer)?,
                None => return Ok(None),
            }
        }
    }

    /// Waits until `deadline` for what the destination says next.
    pub(crate) fn next(
        &mut self,
        channel: &mut Channel,
        deadline: Instant,
    ) -> Result<Option<Answer>, Error> {
        loop {
            let (used, decoded) = self
                .decoder
                .decode(&self.buffer[self.start..self.end])
                .map_err(|source| Error::Protocol { channel: "return path", source })?;
            self.start += used;
            match decoded {
                ReturnDecoded::NeedMore(_) => {}
                ReturnDecoded::Message(message) => return self.message(message).map(Some),
                ReturnDecoded::BitmapFollows { .. }
                | ReturnDecoded::BitmapEnd
                | ReturnDecoded::Colo(_) => return Err(self.meaningless("a bitmap or checkpoint")),
            }
            self.buffer.copy_within(self.start..self.end, 0);
            self.end -= self.start;
            self.start = 0;
            match channel.receive_until(&mut self.buffer[self.end..], deadline)? {
                Some(0) => return Ok(Some(Answer::End)),
                Some(bytes) => self.end += bytes,
                None => return Ok(None),
            }
        }
    }

    fn message(&mut self, message: ReturnMessage) -> Result<Answer, Error> {
        match message {
            ReturnMessage::Pong(value) => {
                self.pongs += 1;
                self.agreed = self.agreed.or(Features::agreed_by(value));
                Ok(Answer::Pong(value))
            }
            ReturnMessage::Shut(value) => Ok(Answer::Shut(value)),
            ReturnMessage::RequestPagesOf { block, start, len } => {
                Ok(Answer::Request { block: Some(block), start, len })
            }
            ReturnMessage::RequestPages { start, len } => {
                Ok(Answer::Request { block: None, start, len })
            }
            other @ (ReturnMessage::RecvBitmap(_)
            | ReturnMessage::ResumeAck(_)
            | ReturnMessage::SwitchoverAck) => Err(self.meaningless(&format!("{other:?}"))),
        }
    }

    fn only_pong(&self, answer: Answer) -> Result<(), Error> {
        match answer {
            Answer::Pong(_) => Ok(()),
            Answer::Shut(0) | Answer::End => Err(Error::PeerGone),
            Answer::Shut(_) => Err(Error::PeerFailed),
            Answer::Request { .. } => Err(self.meaningless("a request for pages")),
        }
    }

    fn meaningless(&self, what: &str) -> Error {
        Error::Refused(format!(
            "return path channel, before byte {}: {what} has no meaning at this time",
            self.decoder.offset()
        ))
    }
}
