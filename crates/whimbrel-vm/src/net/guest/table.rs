//! The guest's connections, as they lie in its RAM.

use super::connection::{self, Connection};
use super::frames::{Peer, Segment};
use crate::net::NetConfig;

/// How many connections there can be at a time.
pub(super) const CONNECTIONS: usize = 8;

const HEADER: usize = 32;
/// How many bytes of RAM it takes.
pub(super) const BYTES: usize = HEADER + CONNECTIONS * connection::BYTES;

/// All of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Table {
    pub(super) config: NetConfig,
    /// How many there ever were: sequence numbers begin with it.
    opened: u64,
    pub(super) connections: [Connection; CONNECTIONS],
}

impl Table {
    pub(super) fn new(config: NetConfig) -> Table {
        Table { config, opened: 0, connections: Default::default() }
    }

    pub(super) fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(BYTES);
        bytes.extend(self.opened.to_le_bytes());
        bytes.extend(self.config.mac);
        bytes.extend(self.config.ip);
        bytes.resize(HEADER, 0);
        self.connections.iter().for_each(|connection| connection.write(&mut bytes));
        bytes
    }

    pub(super) fn from_bytes(bytes: &[u8; BYTES]) -> Table {
        let (header, rest) = bytes.split_at(HEADER);
        let mut connections = <[Connection; CONNECTIONS]>::default();
        for (connection, bytes) in connections.iter_mut().zip(rest.chunks(connection::BYTES)) {
            *connection = Connection::read(bytes);
        }
        let array = |from: usize| header[from..][..8].try_into().expect("8 bytes of the header");
        let [mac @ .., _, _]: [u8; 8] = array(8);
        let [ip @ .., _, _, _, _]: [u8; 8] = array(14);
        Table { config: NetConfig { mac, ip }, opened: u64::from_le_bytes(array(0)), connections }
    }

    /// The connection that a segment belongs to, or begins.
    pub(super) fn find_or_open(
        &mut self,
        peer: &Peer,
        segment: &Segment<'_>,
    ) -> Option<&mut Connection> {
        let known = |one: &Connection| one.is_open() && one.peer().is_same(peer);
        let at = match self.connections.iter().position(known) {
            Some(at) => at,
            None if segment.begins() => {
                let at = self.connections.iter().position(|one| !one.is_open())?;
                self.opened += 1;
                // The same wherever the guest runs, and no two alike in a row.
                let first = crate::net::chain(self.opened, u64::from(segment.seq));
                let first = u32::try_from(first >> 32).expect("32 bits");
                self.connections[at] = Connection::open(*peer, first, segment);
                at
            }
            None => return None,
        };
        Some(&mut self.connections[at])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read() {
        let mut table = Table::new(NetConfig { mac: [2, 0, 0, 0, 0, 9], ip: [10, 1, 2, 3] });
        table.opened = 77;
        let bytes: [u8; BYTES] = table.to_bytes().try_into().unwrap();
        assert_eq!(Table::from_bytes(&bytes), table);
        // Whatever lies there is a table: a guest's RAM comes from a network.
        let odd = Table::from_bytes(&[0xff; BYTES]);
        let again: [u8; BYTES] = odd.to_bytes().try_into().unwrap();
        assert_eq!(Table::from_bytes(&again), odd);
    }
}
