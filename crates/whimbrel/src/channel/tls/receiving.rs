//! The way in of a session: one system call reads many records, each is opened where it lies, just
//! before it is copied to where it belongs.

use std::io;
use std::ops::Range;
use std::os::fd::BorrowedFd;

use rustls::{AlertDescription, ContentType};
use whimbrel_ram::kernel_copy::Scatter;

use super::post_handshake::{Messages, Said};
use super::record::{Key, RECORD_MAX, Wrong, record_len};

/// What is read at once where little comes.
const BUFFER_MIN: usize = 2 * RECORD_MAX;

/// What is read at once where much comes.
const BUFFER_MAX: usize = 16 * RECORD_MAX;

/// Records in a row in which nothing of the application's comes.
const IDLE_MAX: u32 = 64;

/// One direction of a session.
#[derive(Debug)]
pub(super) struct Receiving {
    key: Key,
    buffer: Vec<u8>,
    /// Opened, and not taken yet.
    plain: Range<usize>,
    /// As it came, not opened yet; behind `plain`.
    sealed: Range<usize>,
    messages: Messages,
    idle: u32,
    ended: bool,
}

/// What the next record held.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Opened {
    /// Bytes of the application's.
    Data,
    /// Nothing that concerns anybody but this.
    Nothing,
    /// The peer goes on with a new key, and with `answer` wants the same of us.
    NewKey {
        /// Whether our direction gets a new key, too.
        answer: bool,
    },
    /// More has to come first.
    NeedMore,
    /// The peer has said that nothing more comes.
    Ended,
}

/// Why nothing more can be received.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::channel) enum Broken {
    /// A record is wrong.
    Record(Wrong),
    /// The peer gave up, and said why.
    Alert(AlertDescription),
    /// The peer says what has no meaning after a handshake.
    Message(&'static str),
}

impl Receiving {
    /// From a handshake, behind which `come` has come already.
    pub(super) fn new(key: Key, come: &[u8]) -> Receiving {
        let mut buffer = vec![0; BUFFER_MIN.max(come.len())];
        buffer[..come.len()].copy_from_slice(come);
        Receiving {
            key,
            buffer,
            plain: 0..0,
            sealed: 0..come.len(),
            messages: Messages::default(),
            idle: 0,
            ended: false,
        }
    }

    /// From here on records are opened with `key`.
    pub(super) fn set_key(&mut self, key: Key) {
        self.key = key;
    }

    /// Bytes that are there to be taken.
    pub(super) fn plain(&self) -> &[u8] {
        &self.buffer[self.plain.clone()]
    }

    /// Moves bytes that are there into `pieces`; gives how many.
    pub(super) fn take(&mut self, pieces: &mut Scatter<'_>) -> usize {
        let taken = pieces.copy_from(&self.buffer[self.plain.clone()]);
        self.plain.start += taken;
        taken
    }

    /// Opens the next record, in front of which what is there stays.
    pub(super) fn open_next(&mut self) -> Result<Opened, Broken> {
        if self.ended {
            return Ok(Opened::Ended);
        }
        let sealed = &self.buffer[self.sealed.clone()];
        let len = match record_len(sealed).map_err(Broken::Record)? {
            Some(len) if len <= sealed.len() => len,
            Some(_) | None => return Ok(Opened::NeedMore),
        };
        let at = self.sealed.start;
        let record = &mut self.buffer[at..at + len];
        let (kind, content) = self.key.open(record).map_err(Broken::Record)?;
        self.sealed.start += len;
        let content = at + content.start..at + content.end;
        self.idle += 1;
        if self.idle > IDLE_MAX {
            return Err(Broken::Message("records without end, and nothing in them"));
        }
        if kind != ContentType::ApplicationData {
            return self.message(kind, content);
        }
        if content.is_empty() {
            return Ok(Opened::Nothing);
        }
        self.idle = 0;
        self.join(content);
        Ok(Opened::Data)
    }

    /// Puts what is there, which lies somewhere before it, right in front of `content`.
    fn join(&mut self, content: Range<usize>) {
        let start = content.start - self.plain.len();
        self.buffer.copy_within(self.plain.clone(), start);
        self.plain = start..content.end;
    }

    fn message(&mut self, kind: ContentType, content: Range<usize>) -> Result<Opened, Broken> {
        match self.messages.take(kind, &self.buffer[content])? {
            Said::Nothing => Ok(Opened::Nothing),
            Said::Ended => {
                self.ended = true;
                Ok(Opened::Ended)
            }
            Said::NewKey { answer } => Ok(Opened::NewKey { answer }),
        }
    }

    /// One `read`, behind what has come; 0 where the connection ends.
    pub(super) fn read(&mut self, fd: BorrowedFd<'_>) -> io::Result<usize> {
        // What is there is what a peek left, what is sealed less than a record: there is room.
        let (plain, sealed) = (self.plain.len(), self.sealed.len());
        self.buffer.copy_within(self.plain.clone(), 0);
        self.buffer.copy_within(self.sealed.clone(), plain);
        (self.plain, self.sealed) = (0..plain, plain..plain + sealed);
        let mut pieces = Scatter::new();
        pieces.push_buffer(&mut self.buffer[self.sealed.end..]);
        let bytes = pieces.read(fd)?;
        let full = pieces.bytes_left() == 0;
        drop(pieces);
        self.sealed.end += bytes;
        if full && self.buffer.len() < BUFFER_MAX {
            self.buffer.resize(BUFFER_MAX, 0);
        }
        Ok(bytes)
    }
}
