//! The thread that reads which pages the guest touches, and asks for them. It alone writes to the
//! return path.

use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use whimbrel_ram::{Fault, TargetPage};
use whimbrel_wire::{BlockOffset, Name, ReturnMessage};

use super::arriving::Arriving;
use super::asked::{ASK_AGAIN, Request};
use super::outbox::Outbox;
use crate::channel::Channel;
use crate::error::Error;
use crate::source::setup::name;
use crate::worker::{Cancel, Woken};

/// The thread's own.
pub(super) struct Asking<'a> {
    pub(super) arriving: &'a Arriving<'a>,
    pub(super) outbox: &'a Outbox,
    /// The return path.
    pub(super) output: Channel,
    /// Ends its waits.
    pub(super) stop: Cancel,
    /// Set when nothing more is to be asked for.
    pub(super) done: Cancel,
    /// The block named last on the return path.
    pub(super) last: Option<whimbrel_ram::BlockIndex>,
}

impl Asking<'_> {
    /// Asks until `done` is set.
    pub(super) fn run(mut self) -> Result<(), Error> {
        let (mut faults, mut bytes, mut requests) = (Vec::new(), Vec::new(), Vec::new());
        let mut look_at: Option<Instant> = None;
        loop {
            self.arriving
                .absent
                .read_faults(&mut faults)
                .map_err(Error::system("reading page faults"))?;
            let now = Instant::now();
            for fault in faults.drain(..) {
                requests.extend(self.fault(&fault, now)?);
            }
            if look_at.is_some_and(|at| now >= at) {
                let (again, next) = self.arriving.asked.overdue(now);
                requests.extend(again);
                look_at = next.map(|next| now + next);
            }
            for request in &requests {
                self.encode(*request, &mut bytes)?;
            }
            self.outbox.take(&mut bytes);
            if !bytes.is_empty() {
                self.output.send_bytes(&bytes)?;
                bytes.clear();
                if !requests.is_empty() {
                    self.arriving.asked.written(&requests);
                    requests.clear();
                    look_at.get_or_insert(now + ASK_AGAIN);
                }
            }
            if self.done.is_set() {
                return Ok(());
            }
            let wait = look_at.map_or(Duration::MAX, |at| at.saturating_duration_since(now));
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

    fn encode(&mut self, request: Request, bytes: &mut Vec<u8>) -> Result<(), Error> {
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
        message.encode(bytes);
        Ok(())
    }
}
