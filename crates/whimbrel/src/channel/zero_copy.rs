//! Sending guest memory without a copy, and waiting until the kernel is done with it.

use std::os::fd::AsFd;

use rustix::event::PollFlags;
use whimbrel_ram::kernel_copy::{Gather, InFlight};

use super::{Channel, Kind};
use crate::error::Error;
use crate::worker::Woken;

/// What the kernel still has of what a channel sent without a copy.
#[derive(Debug)]
pub(crate) struct ZeroCopy {
    in_flight: InFlight,
    copied_before: u64,
}

impl ZeroCopy {
    /// Lets `channel` send without copies.
    pub(crate) fn on(channel: &Channel) -> Result<ZeroCopy, Error> {
        let refused = |why: String| {
            Error::Refused(format!(
                "{} channel: capability zero-copy-send is on, and {why}: switch it off, or use \
                 tcp: without tls-creds",
                channel.name()
            ))
        };
        if !matches!(channel.kind, Kind::Socket) {
            return Err(refused("this transport copies what it sends".into()));
        }
        let in_flight = InFlight::on(channel.as_fd()).map_err(|error| {
            refused(format!("this connection cannot send without a copy: {error}"))
        })?;
        Ok(ZeroCopy { in_flight, copied_before: 0 })
    }

    /// Sends all of `pieces`, guest memory that may change meanwhile without harm.
    pub(crate) fn send(
        &mut self,
        channel: &mut Channel,
        pieces: &mut Gather<'_>,
    ) -> Result<(), Error> {
        while pieces.bytes_left() > 0 {
            channel.check(channel.bytes_out)?;
            match pieces.send_zero_copy(channel.as_fd(), &mut self.in_flight) {
                Ok(Some(bytes)) => channel.bytes_out += bytes as u64,
                // The kernel has pinned all it may.
                Ok(None) if self.in_flight.is_empty() => channel.send(pieces)?,
                Ok(None) => self.wait_for_notice(channel)?,
                Err(error) => {
                    // Or the wait would end at once, for what lies in the error queue.
                    self.reap(channel)?;
                    channel.wait_after(error, PollFlags::OUT, channel.bytes_out)?;
                }
            }
        }
        self.reap(channel)
    }

    /// Waits until the kernel is done with everything. Says whether it has copied something after
    /// all since the last time.
    pub(crate) fn settle(&mut self, channel: &Channel) -> Result<bool, Error> {
        self.reap(channel)?;
        while !self.in_flight.is_empty() {
            self.wait_for_notice(channel)?;
        }
        let copied = self.in_flight.done().copied;
        Ok(std::mem::replace(&mut self.copied_before, copied) != copied)
    }

    fn wait_for_notice(&mut self, channel: &Channel) -> Result<(), Error> {
        // `POLLERR` is always reported.
        match channel.wait(PollFlags::empty(), None) {
            Ok(Woken::Cancelled) => Err(Error::Cancelled),
            Ok(Woken::Ready | Woken::TimedOut) => {
                channel.check(channel.bytes_out)?;
                self.reap(channel)
            }
            Err(error) => Err(channel.error(error, channel.bytes_out)),
        }
    }

    fn reap(&mut self, channel: &Channel) -> Result<(), Error> {
        self.in_flight
            .reap(channel.as_fd())
            .map_err(|error| channel.error(error, channel.bytes_out))
    }
}
