//! The main channel, on its way in: protocol words are decoded from a buffer, the content of
//! pages goes from there, or straight from the channel, into guest memory.

use std::os::fd::{AsFd, BorrowedFd};

use whimbrel_ram::kernel_copy::Scatter;
use whimbrel_ram::{RamBlock, TARGET_PAGE};
use whimbrel_wire::{Decoded, DeviceState, MainDecoder, MainOptions};

use super::buffer::Buffer;
use crate::channel::{Channel, tls};
use crate::error::Error;

const PAGE: usize = TARGET_PAGE.bytes();

/// What one system call reads. Small enough to be in the second-level cache when it is copied on.
pub(super) const BUFFER: usize = 512 << 10;

/// A channel being decoded.
#[derive(Debug)]
pub(crate) struct Input {
    channel: Channel,
    decoder: MainDecoder,
    buffer: Buffer,
}

impl Input {
    pub(crate) fn new(channel: Channel, decoder: MainDecoder) -> Input {
        Input { channel, decoder, buffer: Buffer::new(BUFFER) }
    }

    /// `channel` takes the place of a broken one, in a recovery.
    pub(super) fn reconnect(&mut self, channel: Channel) -> Result<(), Error> {
        let fresh = MainDecoder::new(MainOptions::default());
        let decoder = std::mem::replace(&mut self.decoder, fresh).reconnected();
        self.decoder = decoder
            .map_err(|kind| Error::Refused(format!("main channel, in a recovery: {kind}")))?;
        self.channel = channel;
        self.buffer.set(&[]);
        Ok(())
    }

    pub(crate) fn channel(&mut self) -> &mut Channel {
        &mut self.channel
    }

    pub(crate) fn into_channel(self) -> Channel {
        self.channel
    }

    pub(crate) fn decoder(&self) -> &MainDecoder {
        &self.decoder
    }

    /// The next message; `None` where the stream ends. `answer` is called with a PING that has to
    /// be answered before the stream goes on.
    pub(crate) fn next(
        &mut self,
        mut answer: impl FnMut(&mut Channel, u32) -> Result<(), Error>,
    ) -> Result<Option<Decoded>, Error> {
        loop {
            let (used, decoded) =
                self.decoder.decode(self.buffer.held()).map_err(|source| self.wrong(source))?;
            self.buffer.take(used);
            let Decoded::NeedMore(_) = decoded else { return Ok(Some(decoded)) };
            // The decoder may have taken the first part of something, and not have seen the rest.
            if used > 0 && !self.buffer.is_empty() {
                continue;
            }
            if let Some(ping) = self.decoder.waiting_ping() {
                answer(&mut self.channel, ping)?;
            }
            if self.buffer.fill(&mut self.channel)? == 0 {
                return Ok(None);
            }
        }
    }

    /// What was received means nothing.
    fn wrong(&self, source: whimbrel_wire::Error) -> Error {
        match self.decoder.offset() == 0 && tls::is_spoken_by(self.buffer.held()) {
            true => Error::Tls { channel: self.channel.name(), reason: tls::UNEXPECTED.into() },
            false => Error::Protocol { channel: self.channel.name(), source },
        }
    }

    /// The stream has ended: gives the devices of a QEMU that describes none, if that is how it
    /// may end.
    pub(crate) fn close(&mut self) -> Result<Option<DeviceState>, Error> {
        let decoder =
            std::mem::replace(&mut self.decoder, MainDecoder::new(MainOptions::default()));
        decoder
            .close(self.buffer.held())
            .map_err(|source| Error::Protocol { channel: self.channel.name(), source })
    }

    /// The stream ended where something more had to come.
    pub(crate) fn ended(&self, expected: impl Into<String>) -> Error {
        let offset = self.decoder.offset() + self.buffer.len() as u64;
        Error::Ended { channel: self.channel.name(), offset, expected: expected.into() }
    }

    /// Takes the page that follows into `block` at `offset`.
    pub(crate) fn take_page(&mut self, block: &RamBlock, offset: u64) -> Result<(), Error> {
        let here = self.buffer.len().min(PAGE);
        block.write(offset, self.buffer.take(here))?;
        self.rest_of_page(block, offset, here)
    }

    /// The first `here` bytes of the page that follows are in `block` at `offset`: the others come
    /// straight from the channel.
    pub(super) fn rest_of_page(
        &mut self,
        block: &RamBlock,
        offset: u64,
        here: usize,
    ) -> Result<(), Error> {
        let mut got = here;
        while got < PAGE {
            let mut pieces = Scatter::new();
            pieces.push_guest(block, offset + got as u64, PAGE - got)?;
            match self.channel.receive(&mut pieces)? {
                0 => return Err(self.ended(format!("{} bytes more of a page", PAGE - got))),
                bytes => got += bytes,
            }
        }
        self.decoder.payload_taken(PAGE as u64);
        Ok(())
    }

    /// What is held, when it is less than `bytes`.
    pub(super) fn held_below(&self, bytes: usize) -> Option<&[u8]> {
        Some(self.buffer.held()).filter(|held| held.len() < bytes)
    }

    /// What was held has been copied elsewhere.
    pub(super) fn forget_held(&mut self) {
        self.buffer.set(&[]);
    }

    /// Bytes that were received elsewhere are the next to be decoded; nothing is held.
    pub(super) fn put_back(&mut self, bytes: &[u8]) {
        assert!(self.buffer.is_empty(), "nothing else is held");
        self.buffer.set(bytes);
    }

    /// One `read` into other places than the buffer.
    pub(super) fn receive(&mut self, pieces: &mut Scatter<'_>) -> Result<usize, Error> {
        self.channel.receive(pieces)
    }

    /// Decodes a message that was received elsewhere, and is `expected`.
    pub(super) fn decode_expected(
        &mut self,
        bytes: &[u8],
        expected: impl FnOnce(&Decoded) -> bool,
    ) -> Result<(), Error> {
        let (used, decoded) = self
            .decoder
            .decode(bytes)
            .map_err(|source| Error::Protocol { channel: self.channel.name(), source })?;
        assert!(used == bytes.len() && expected(&decoded), "compared before, and now {decoded:?}");
        Ok(())
    }

    /// Reads until so many bytes are held, and calls `wait` whenever there is nothing to be read, to
    /// return when there may be; false at the end of the stream.
    pub(super) fn hold(
        &mut self,
        bytes: usize,
        mut wait: impl FnMut(BorrowedFd<'_>) -> Result<(), Error>,
    ) -> Result<bool, Error> {
        while !self.holds(bytes) {
            match self.buffer.try_fill(&mut self.channel)? {
                Some(0) => return Ok(false),
                Some(_) => {}
                None => wait(self.channel.as_fd())?,
            }
        }
        Ok(true)
    }

    /// Whether so many bytes are held.
    pub(super) fn holds(&self, bytes: usize) -> bool {
        self.buffer.len() >= bytes
    }

    /// Takes `len` bytes that follow, when all of them are held.
    pub(super) fn take_held(&mut self, len: usize) -> Option<&[u8]> {
        if !self.holds(len) {
            return None;
        }
        self.decoder.payload_taken(len as u64);
        Some(self.buffer.take(len))
    }

    /// Takes bytes that follow, of `what`, until `out` is full.
    pub(crate) fn take_bytes(&mut self, out: &mut [u8], what: &str) -> Result<(), Error> {
        let mut done = 0;
        while done < out.len() {
            done += self.take_some(&mut out[done..], what)?;
        }
        self.decoder.payload_taken(out.len() as u64);
        Ok(())
    }

    /// Takes `len` bytes that follow, of `what`. Memory is taken for them as they come.
    pub(super) fn take_many(&mut self, len: usize, what: &str) -> Result<Vec<u8>, Error> {
        const AT_ONCE: usize = 1 << 20;
        let mut bytes = Vec::new();
        while bytes.len() < len {
            let done = bytes.len();
            bytes.resize(len.min(done + AT_ONCE), 0);
            let got = self.take_some(&mut bytes[done..], what)?;
            bytes.truncate(done + got);
        }
        self.decoder.payload_taken(len as u64);
        Ok(bytes)
    }

    fn take_some(&mut self, out: &mut [u8], what: &str) -> Result<usize, Error> {
        if self.buffer.is_empty() && self.buffer.fill(&mut self.channel)? == 0 {
            return Err(self.ended(format!("{} bytes more of {what}", out.len())));
        }
        let here = self.buffer.len().min(out.len());
        out[..here].copy_from_slice(self.buffer.take(here));
        Ok(here)
    }
}
