//! Datagrams of one flow, compared one by one in their order.

use std::collections::VecDeque;
use std::time::Duration;

use super::compare::Unlike;

/// About what a datagram takes beside its bytes.
const DATAGRAM: usize = 64;

/// One of the two queues is empty: what both have is compared at once.
#[derive(Debug, Default)]
pub(super) struct Series {
    /// What the guest has said alone, by the packets' numbers.
    guest: VecDeque<(u64, Vec<u8>)>,
    /// What the copy has said alone.
    copy: VecDeque<(Duration, Vec<u8>)>,
    bytes: usize,
    /// Nothing leaves, and nothing is heard, until a checkpoint has made the two one again.
    differs: bool,
}

impl Series {
    /// The guest has sent a packet. True when it was taken in; false when the two differ already.
    pub(super) fn guest(
        &mut self,
        id: u64,
        said: &[u8],
        leaving: &mut Vec<u64>,
    ) -> Result<bool, Unlike> {
        if self.differs {
            return Ok(false);
        }
        match self.copy.pop_front() {
            None => {
                self.bytes += said.len();
                self.guest.push_back((id, said.to_vec()));
            }
            Some((_, copy)) => {
                self.bytes -= copy.len();
                self.compare(said, &copy)?;
                leaving.push(id);
            }
        }
        Ok(true)
    }

    /// The copy has sent a packet.
    pub(super) fn copy(
        &mut self,
        now: Duration,
        said: &[u8],
        leaving: &mut Vec<u64>,
    ) -> Result<(), Unlike> {
        if self.differs {
            return Ok(());
        }
        match self.guest.pop_front() {
            None => {
                self.bytes += said.len();
                self.copy.push_back((now, said.to_vec()));
            }
            Some((id, guest)) => {
                self.bytes -= guest.len();
                self.compare(&guest, said)?;
                leaving.push(id);
            }
        }
        Ok(())
    }

    fn compare(&mut self, guest: &[u8], copy: &[u8]) -> Result<(), Unlike> {
        self.differs = guest != copy;
        if self.differs { Err(Unlike::Datagram) } else { Ok(()) }
    }

    /// Whether nothing is waited for, so that it can be forgotten.
    pub(super) fn is_settled(&self) -> bool {
        self.guest.is_empty() && self.copy.is_empty() && !self.differs
    }

    /// Since when the copy has waited for the guest to say what it has said.
    pub(super) fn ahead(&self) -> Option<Duration> {
        self.copy.front().map(|&(since, _)| since)
    }

    /// What it takes of memory, about.
    pub(super) fn cost(&self) -> usize {
        self.bytes + (self.guest.len() + self.copy.len()) * DATAGRAM
    }
}
