//! The return path: what the destination says, read as it comes.

use std::time::{Duration, Instant};

use whimbrel_ram::{BlockIndex, GuestRam};
use whimbrel_wire::{
    BlockOffset, ColoMessage, Name, ReturnDecoded, ReturnDecoder, ReturnMessage, TargetPage,
};

use crate::channel::Channel;
use crate::error::Error;
use crate::hello::Features;
use crate::recovery::exchange::bitmap_words;

/// How long one wait for an answer lasts before it is begun again; only cancellation and the
/// connection's end bound the whole.
const LOOK: Duration = Duration::from_secs(3600);

/// A destination may need so long to load its devices, before it answers.
pub(super) const LOADING: Duration = Duration::from_secs(10);

/// The return path.
#[derive(Debug)]
pub(crate) struct Answers {
    decoder: ReturnDecoder,
    buffer: Box<[u8; 4096]>,
    start: usize,
    end: usize,
    pongs: u64,
    agreed: Option<Features>,
    /// In a recovery: of what bitmaps may come.
    recovering: Option<GuestRam>,
    bitmap: Option<Bitmap>,
    /// How long an answer is waited for.
    patience: Duration,
}

/// A bitmap that is coming.
#[derive(Debug)]
struct Bitmap {
    block: BlockIndex,
    /// As many bytes as have come; as many as the block needs, at most.
    bytes: Vec<u8>,
    left: usize,
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
    /// In a recovery, which pages of a block have come: 64 a word, the lowest in the lowest bit.
    Bitmap {
        /// The block.
        block: BlockIndex,
        /// A bit for each page.
        received: Vec<u64>,
    },
    /// The recovery is over, as far as a QEMU is concerned.
    Resumed,
    /// The last word: 0 is success.
    Shut(u32),
    /// A word of COLO, which goes on behind that.
    Colo(ColoMessage),
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
            recovering: None,
            bitmap: None,
            patience: LOOK,
        }
    }

    /// An answer that does not come within `silence`, but not before [`LOADING`], comes no more;
    /// `None` is to wait for ever.
    pub(crate) fn wait_no_longer_than(&mut self, silence: Option<Duration>) {
        self.patience = silence.map_or(LOOK, |silence| silence.max(LOADING));
    }

    /// COLO's words follow SHUT. Before anything has come.
    pub(crate) fn with_colo(self) -> Answers {
        Answers { decoder: ReturnDecoder::with_colo(TargetPage::FOUR_KIB), ..self }
    }

    fn silent(&self) -> Result<(), Error> {
        match self.patience < LOOK {
            true => Err(Error::Silent { channel: "return path", limit: self.patience }),
            false => Ok(()),
        }
    }

    /// On the connection that takes the place of a broken one: the destination says what it has of
    /// `ram`. What had been agreed on still is.
    pub(crate) fn recovering(agreed: Features, ram: GuestRam) -> Answers {
        Answers { agreed: Some(agreed), recovering: Some(ram), ..Answers::new() }
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
            match self.next(channel, Instant::now() + self.patience)? {
                Some(answer) => self.only_pong(answer)?,
                None => self.silent()?,
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
            match self.next(channel, Instant::now() + self.patience)? {
                Some(Answer::Pong(found)) if found == value => return Ok(()),
                Some(answer) => self.only_pong(answer)?,
                None => self.silent()?,
            }
        }
    }

    /// Waits for SHUT and gives its value.
    pub(crate) fn wait_for_shut(&mut self, channel: &mut Channel) -> Result<u32, Error> {
        loop {
            match self.shut_within(channel, self.patience)? {
                Some(value) => return Ok(value),
                None => self.silent()?,
            }
        }
    }

    /// Waits for one of COLO's words, for `limit` at most.
    pub(crate) fn wait_for_colo(
        &mut self,
        channel: &mut Channel,
        message: ColoMessage,
        limit: Duration,
    ) -> Result<(), Error> {
        match self.next(channel, Instant::now() + limit)? {
            Some(Answer::Colo(found)) if found == message => Ok(()),
            Some(Answer::Colo(found)) => {
                Err(self.wrong(&format!("expected {message:?}, found {found:?}")))
            }
            Some(Answer::End) => Err(Error::PeerGone),
            Some(_) => Err(self.meaningless("another answer")),
            None => Err(Error::Silent { channel: "return path", limit }),
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
            self.collect();
            if self.decoder.payload_left() == 0 {
                let (used, decoded) = self
                    .decoder
                    .decode(&self.buffer[self.start..self.end])
                    .map_err(|source| Error::Protocol { channel: "return path", source })?;
                self.start += used;
                match decoded {
                    ReturnDecoded::NeedMore(_) => {}
                    ReturnDecoded::Message(ReturnMessage::RecvBitmap(block)) => {
                        self.begin_bitmap(&block)?;
                        continue;
                    }
                    ReturnDecoded::Message(message) => return self.message(message).map(Some),
                    ReturnDecoded::BitmapFollows { len } => {
                        self.check_bitmap(len)?;
                        continue;
                    }
                    ReturnDecoded::BitmapEnd => return self.end_bitmap().map(Some),
                    ReturnDecoded::Colo(message) => return Ok(Some(Answer::Colo(message))),
                }
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
            ReturnMessage::ResumeAck(_) if self.recovering.is_some() => Ok(Answer::Resumed),
            other @ (ReturnMessage::RecvBitmap(_)
            | ReturnMessage::ResumeAck(_)
            | ReturnMessage::SwitchoverAck) => Err(self.meaningless(&format!("{other:?}"))),
        }
    }

    /// The bitmap of a block is next.
    fn begin_bitmap(&mut self, name: &Name) -> Result<(), Error> {
        let Some(ram) = &self.recovering else { return Err(self.meaningless("a bitmap")) };
        let Some((block, _)) = ram.find(name.as_str().unwrap_or_default()) else {
            return Err(self.wrong(&format!("a bitmap of block {name}, which does not exist")));
        };
        let left = bitmap_words(ram, block) * 8;
        self.bitmap = Some(Bitmap { block, bytes: Vec::new(), left });
        Ok(())
    }

    /// It has `len` bytes: as many as the block needs, or it is of another block.
    fn check_bitmap(&self, len: u64) -> Result<(), Error> {
        match (&self.bitmap, &self.recovering) {
            (Some(bitmap), _) if bitmap.left as u64 == len => Ok(()),
            (Some(bitmap), Some(ram)) => Err(self.wrong(&format!(
                "a bitmap of {len} bytes, and block {} needs {}",
                ram.block(bitmap.block).name(),
                bitmap.left
            ))),
            _ => Err(self.meaningless("a bitmap")),
        }
    }

    /// Takes what has come of a bitmap.
    fn collect(&mut self) {
        let Some(bitmap) = &mut self.bitmap else { return };
        if self.decoder.payload_left() == 0 {
            return;
        }
        let here = (self.end - self.start).min(bitmap.left);
        bitmap.bytes.extend_from_slice(&self.buffer[self.start..self.start + here]);
        bitmap.left -= here;
        self.start += here;
        self.decoder.payload_taken(here as u64);
    }

    fn end_bitmap(&mut self) -> Result<Answer, Error> {
        let Some(Bitmap { block, bytes, .. }) = self.bitmap.take() else {
            return Err(self.meaningless("the end of a bitmap"));
        };
        let (words, _) = bytes.as_chunks();
        Ok(Answer::Bitmap {
            block,
            received: words.iter().map(|w| u64::from_le_bytes(*w)).collect(),
        })
    }

    fn only_pong(&self, answer: Answer) -> Result<(), Error> {
        match answer {
            Answer::Pong(_) => Ok(()),
            Answer::Shut(0) | Answer::End => Err(Error::PeerGone),
            Answer::Shut(_) => Err(Error::PeerFailed),
            Answer::Request { .. } => Err(self.meaningless("a request for pages")),
            Answer::Bitmap { .. } => Err(self.meaningless("a bitmap")),
            Answer::Resumed => Err(self.meaningless("RESUME_ACK")),
            Answer::Colo(message) => Err(self.meaningless(&format!("{message:?}"))),
        }
    }

    fn meaningless(&self, what: &str) -> Error {
        self.wrong(&format!("{what} has no meaning at this time"))
    }

    /// An error in what has been understood last.
    pub(crate) fn wrong(&self, problem: &str) -> Error {
        Error::Refused(format!(
            "return path channel, before byte {}: {problem}",
            self.decoder.offset()
        ))
    }
}
