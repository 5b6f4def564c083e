//! The thread that reads which pages the guest touches, and asks for them. It alone writes to the
//! return path; and it lives as long as pages are missing, whatever becomes of the connections.

use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use whimbrel_ram::{BlockIndex, Fault, TargetPage};
use whimbrel_wire::return_path::{encode_bitmap_end, encode_bitmap_size};
use whimbrel_wire::{BlockOffset, Name, ReturnMessage};

use super::arriving::Arriving;
use super::asked::{ASK_AGAIN, Request};
use super::outbox::Outbox;
use crate::channel::Channel;
use crate::error::Error;
use crate::recovery::exchange::{Say, bitmap_words};
use crate::source::setup::name;
use crate::worker::{Cancel, Woken};

/// What is gathered for one write, about.
const WRITE: usize = 64 << 10;

/// The thread's own.
pub(super) struct Asking<'a> {
    arriving: &'a Arriving<'a>,
    outbox: &'a Outbox,
    /// Ends its waits.
    stop: Cancel,
    /// Set when nothing more is to be asked for.
    done: Cancel,
    /// The return path, while there is one.
    line: Option<Channel>,
    /// Whether the source at its other end is to be asked for pages already.
    asks: bool,
    /// The block named last on it.
    last: Option<BlockIndex>,
    /// What is to be written.
    bytes: Vec<u8>,
    /// Requests that have to be asked, or asked again.
    requests: Vec<Request>,
}

impl<'a> Asking<'a> {
    pub(super) fn new(
        arriving: &'a Arriving<'a>,
        outbox: &'a Outbox,
        stop: Cancel,
        done: Cancel,
    ) -> Asking<'a> {
        let (line, last) = (None, None);
        let (bytes, requests) = (Vec::new(), Vec::new());
        Asking { arriving, outbox, stop, done, line, asks: false, last, bytes, requests }
    }

    /// Asks until `done` is set. `broken` is told of a return path that cannot be written to.
    pub(super) fn run(mut self, broken: &dyn Fn(Error)) -> Result<(), Error> {
        let mut faults = Vec::new();
        let mut look_at: Option<Instant> = None;
        loop {
            self.arriving
                .absent
                .read_faults(&mut faults)
                .map_err(Error::system("reading page faults"))?;
            let now = Instant::now();
            for fault in faults.drain(..) {
                let request = self.fault(&fault, now)?;
                self.requests.extend(request.filter(|_| self.asks));
            }
            if self.asks && look_at.is_some_and(|at| now >= at) {
                let (again, next) = self.arriving.asked.overdue(now);
                self.requests.extend(again);
                look_at = next.map(|next| now + next);
            }
            match self.write() {
                Ok(true) => {
                    look_at.get_or_insert(now + ASK_AGAIN);
                }
                Ok(false) => {}
                Err(error) => {
                    self.hang_up();
                    broken(error);
                }
            }
            if self.done.is_set() {
                return Ok(());
            }
            let wait = look_at.filter(|_| self.asks);
            let wait = wait.map_or(Duration::MAX, |at| at.saturating_duration_since(now));
            let woken = self
                .stop
                .wait_any(
                    &[self.arriving.absent.as_fd(), self.outbox.as_fd(), self.done.as_fd()],
                    wait,
                )
                .map_err(Error::system("waiting for page faults"))?;
            if woken == Woken::Cancelled {
                return Err(Error::Cancelled);
            }
        }
    }

    /// Writes what there is to be written; says whether something was asked for.
    fn write(&mut self) -> Result<bool, Error> {
        let news = self.outbox.take();
        if let Some(line) = news.line {
            self.hang_up();
            self.line = line;
        }
        if self.line.is_none() {
            return Ok(false);
        }
        // The oldest wait first.
        let mut asked = self.ask()?;
        for say in news.say {
            match say {
                Say::Words(words) => self.bytes.extend_from_slice(&words),
                Say::Bitmap(block) => self.say_bitmap(block)?,
                Say::Requests => {
                    self.asks = true;
                    self.requests = self.arriving.asked.unanswered();
                    asked |= self.ask()?;
                }
            }
            if self.bytes.len() >= WRITE {
                asked |= self.flush()?;
            }
        }
        Ok(self.flush()? || asked)
    }

    /// Appends the requests to what is to be written, and says so if there are any.
    fn ask(&mut self) -> Result<bool, Error> {
        for at in 0..self.requests.len() {
            self.encode(self.requests[at])?;
        }
        match self.requests.is_empty() {
            true => Ok(false),
            false => self.flush(),
        }
    }

    /// Writes; says whether there were requests in it.
    fn flush(&mut self) -> Result<bool, Error> {
        let Some(line) = &mut self.line else { return Ok(false) };
        if !self.bytes.is_empty() {
            line.send_bytes(&self.bytes)?;
            self.bytes.clear();
        }
        let asked = !self.requests.is_empty();
        if asked {
            self.arriving.asked.written(&self.requests);
            self.requests.clear();
        }
        Ok(asked)
    }

    /// The return path is gone, or another one.
    fn hang_up(&mut self) {
        (self.line, self.asks, self.last) = (None, false, None);
        self.bytes.clear();
        self.requests.clear();
    }

    fn say_bitmap(&mut self, block: BlockIndex) -> Result<(), Error> {
        let absent = self.arriving.absent;
        ReturnMessage::RecvBitmap(name(absent.ram().block(block).name())?).encode(&mut self.bytes);
        let words = bitmap_words(absent.ram(), block);
        encode_bitmap_size(words as u64 * 8, &mut self.bytes);
        self.bytes.reserve(words * 8);
        for word in absent.received().words(block) {
            self.bytes.extend_from_slice(&word.to_le_bytes());
        }
        encode_bitmap_end(&mut self.bytes);
        Ok(())
    }

    /// What has to be asked for because of a fault.
    fn fault(&self, fault: &Fault, now: Instant) -> Result<Option<Request>, Error> {
        let received = self.arriving.absent.received();
        let page = TargetPage::containing(fault.offset);
        let settle =
            || self.arriving.absent.settle(fault).map_err(Error::system("settling a page fault"));
        if received.contains(fault.block, page) {
            settle()?;
            return Ok(None);
        }
        let request = self.arriving.asked.note(fault, now);
        if received.contains(fault.block, page) {
            self.arriving.asked.forget(fault);
            settle()?;
            return Ok(None);
        }
        Ok(request)
    }

    fn encode(&mut self, request: Request) -> Result<(), Error> {
        let start = BlockOffset(request.start);
        let unit = self.arriving.asked.unit(request.block).bytes();
        let len = u32::try_from(unit).expect("a page is smaller than 4 GiB");
        let message = match self.last.replace(request.block) {
            Some(last) if last == request.block => ReturnMessage::RequestPages { start, len },
            _ => {
                let block: Name = name(self.arriving.absent.ram().block(request.block).name())?;
                ReturnMessage::RequestPagesOf { block, start, len }
            }
        };
        message.encode(&mut self.bytes);
        Ok(())
    }
}
