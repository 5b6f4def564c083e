//! Bytes that have been received and are not decoded yet.

use whimbrel_ram::kernel_copy::Scatter;

use crate::channel::Channel;
use crate::error::Error;

/// What one system call reads goes behind what is held; it is taken from the front.
#[derive(Debug)]
pub(super) struct Buffer {
    bytes: Box<[u8]>,
    start: usize,
    end: usize,
}

impl Buffer {
    /// Holds nothing, and `len` bytes at most.
    pub(super) fn new(len: usize) -> Buffer {
        Buffer { bytes: vec![0; len].into_boxed_slice(), start: 0, end: 0 }
    }

    /// What is held.
    pub(super) fn held(&self) -> &[u8] {
        &self.bytes[self.start..self.end]
    }

    /// How many bytes are held.
    pub(super) fn len(&self) -> usize {
        self.end - self.start
    }

    pub(super) fn is_empty(&self) -> bool {
        self.start == self.end
    }

    /// Takes the first `len` bytes of what is held.
    pub(super) fn take(&mut self, len: usize) -> &[u8] {
        assert!(len <= self.len(), "{len} bytes of {}", self.len());
        let from = self.start;
        self.start += len;
        &self.bytes[from..self.start]
    }

    /// Holds nothing but a copy of `bytes`.
    pub(super) fn set(&mut self, bytes: &[u8]) {
        (self.start, self.end) = (0, bytes.len());
        self.bytes[..bytes.len()].copy_from_slice(bytes);
    }

    /// Reads once; gives how many bytes came, 0 at the end of the stream.
    pub(super) fn fill(&mut self, channel: &mut Channel) -> Result<usize, Error> {
        self.filled_by(|pieces| channel.receive(pieces).map(Some)).map(Option::unwrap_or_default)
    }

    /// Reads once what is there; 0 at the end of the stream, `None` when nothing is.
    pub(super) fn try_fill(&mut self, channel: &mut Channel) -> Result<Option<usize>, Error> {
        self.filled_by(|pieces| channel.try_receive(pieces))
    }

    fn filled_by(
        &mut self,
        receive: impl FnOnce(&mut Scatter<'_>) -> Result<Option<usize>, Error>,
    ) -> Result<Option<usize>, Error> {
        self.bytes.copy_within(self.start..self.end, 0);
        (self.start, self.end) = (0, self.end - self.start);
        let mut room = Scatter::new();
        room.push_buffer(&mut self.bytes[self.end..]);
        let got = receive(&mut room)?;
        drop(room);
        self.end += got.unwrap_or(0);
        Ok(got)
    }
}
