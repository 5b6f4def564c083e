//! Policy `buffer`: a packet leaves when the checkpoint after it is complete.

use std::collections::VecDeque;

/// Most bytes that are held: what comes then is dropped, as a full queue of any network does, and
/// its sender sends it again.
const HELD_MAX: usize = 64 << 20;

/// Packets that are held, in the order in which the guest sent them.
#[derive(Debug, Default)]
pub(super) struct Buffer {
    held: VecDeque<Vec<u8>>,
    bytes: usize,
    /// How many have been let go.
    gone: u64,
}

impl Buffer {
    /// Holds it, if there is room.
    pub(super) fn hold(&mut self, packet: Vec<u8>) -> bool {
        if self.bytes + packet.len() > HELD_MAX {
            return false;
        }
        self.bytes += packet.len();
        self.held.push_back(packet);
        true
    }

    /// How many packets there were so far.
    pub(super) fn count(&self) -> u64 {
        self.gone + self.held.len() as u64
    }

    /// Those that were among the first `count`.
    pub(super) fn release(&mut self, count: u64) -> impl Iterator<Item = Vec<u8>> + '_ {
        let first = usize::try_from(count.saturating_sub(self.gone)).unwrap_or(usize::MAX);
        let first = first.min(self.held.len());
        self.gone += first as u64;
        self.bytes -= self.held.range(..first).map(Vec::len).sum::<usize>();
        self.held.drain(..first)
    }

    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn release(buffer: &mut Buffer, count: u64) -> Vec<Vec<u8>> {
        buffer.release(count).collect()
    }

    #[test]
    fn a_packet_leaves_with_the_checkpoint_after_it() {
        let mut buffer = Buffer::default();
        assert!(buffer.hold(vec![1]) && buffer.hold(vec![2, 2]));
        let first = buffer.count();
        assert!(buffer.hold(vec![3, 3, 3]));
        let second = buffer.count();
        assert_eq!(buffer.bytes(), 6);
        assert_eq!(release(&mut buffer, first), [vec![1], vec![2, 2]]);
        assert_eq!(release(&mut buffer, first), [[0; 0]; 0], "once");
        assert_eq!(buffer.bytes(), 3);
        assert_eq!(release(&mut buffer, second), [vec![3, 3, 3]]);
        assert_eq!((buffer.bytes(), buffer.count()), (0, 3));
    }

    #[test]
    fn no_more_is_held_than_there_is_room_for() {
        let mut buffer = Buffer::default();
        let held = (0..65).filter(|_| buffer.hold(vec![0; 1 << 20])).count();
        assert_eq!((buffer.bytes(), held), (HELD_MAX, 64));
        let all = buffer.count();
        assert_eq!(buffer.release(all).count(), 64);
        assert!(buffer.hold(vec![1]));
    }
}
