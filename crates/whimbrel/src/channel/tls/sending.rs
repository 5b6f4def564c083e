//! The way out of a session: guest memory is copied once, into a buffer of records, and sealed
//! there while it is in the cache.

use std::collections::VecDeque;
use std::io;
use std::os::fd::BorrowedFd;

use rustls::ContentType;
use whimbrel_ram::kernel_copy::Gather;

use super::record::{Key, PLAIN_MAX, RECORD_MAX};

/// Records in one system call: what they hold fits into the second-level cache, next to what the
/// kernel makes of it.
const RECORDS_MAX: usize = 16;

/// One direction of a session.
#[derive(Debug)]
pub(super) struct Sending {
    key: Key,
    /// Sealed records that are not sent yet lie in `start..end`.
    buffer: Vec<u8>,
    start: usize,
    end: usize,
    records: VecDeque<Sealed>,
}

/// A record in the buffer.
#[derive(Clone, Copy, Debug)]
struct Sealed {
    /// Where it ends.
    end: usize,
    /// Bytes of the application's in it.
    plain: usize,
}

impl Sending {
    pub(super) fn new(key: Key) -> Sending {
        Sending { key, buffer: Vec::new(), start: 0, end: 0, records: VecDeque::new() }
    }

    /// How many records may still be sealed with its key.
    pub(super) fn records_left(&self) -> u64 {
        self.key.left()
    }

    /// From here on records are sealed with `key`.
    pub(super) fn set_key(&mut self, key: Key) {
        self.key = key;
    }

    /// Whether everything that was sealed has been sent.
    pub(super) fn is_sent(&self) -> bool {
        self.start == self.end
    }

    /// Seals what comes next of `pieces`, as much as one system call is worth.
    pub(super) fn seal(&mut self, pieces: &mut Gather<'_>) {
        let records = pieces.bytes_left().div_ceil(PLAIN_MAX).min(RECORDS_MAX);
        let left = usize::try_from(self.key.left()).unwrap_or(usize::MAX);
        for _ in 0..records.min(left) {
            self.seal_one(ContentType::ApplicationData, |room| pieces.copy_to(room));
        }
    }

    /// Seals a message of the protocol's own.
    pub(super) fn seal_message(&mut self, kind: ContentType, message: &[u8]) {
        self.seal_one(kind, |room| {
            room[..message.len()].copy_from_slice(message);
            message.len()
        });
    }

    fn seal_one(&mut self, kind: ContentType, fill: impl FnOnce(&mut [u8]) -> usize) {
        if self.is_sent() {
            (self.start, self.end) = (0, 0);
        }
        if self.buffer.len() < self.end + RECORD_MAX {
            self.buffer.resize(self.end + RECORD_MAX, 0);
        }
        let record = &mut self.buffer[self.end..self.end + RECORD_MAX];
        let content = self.key.prefix();
        let plain = fill(&mut record[content..content + PLAIN_MAX]);
        self.end += self.key.seal(kind, record, plain);
        let plain = if kind == ContentType::ApplicationData { plain } else { 0 };
        self.records.push_back(Sealed { end: self.end, plain });
    }

    /// One `sendmsg` of what was sealed. Gives how many bytes of the application's are in records
    /// that have gone out as a whole by it: of the others the peer can read nothing.
    pub(super) fn send(&mut self, socket: BorrowedFd<'_>, apart: bool) -> io::Result<usize> {
        let mut pieces = Gather::new();
        pieces.push_bytes(&self.buffer[self.start..self.end]);
        self.start += pieces.send(socket, apart)?;
        let mut plain = 0;
        while let Some(record) = self.records.front()
            && record.end <= self.start
        {
            plain += record.plain;
            self.records.pop_front();
        }
        Ok(plain)
    }
}
