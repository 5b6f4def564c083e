//! What is between the two ends, by what the kernel says of their sockets.
//!
//! The source has written what was acknowledged and what is still in its queue; the destination has
//! read what came and is not in its queue. The rest is in flight: in the source's socket, on the link
//! and in every queue of it, or in the destination's socket.

use std::collections::HashMap;
use std::process::Command;

use anyhow::{Context as _, Result, ensure};

use crate::bench::network::{End, Network};

/// A page and its record.
const PAGE_BYTES: u64 = 4096 + 8;
/// Fewer bytes than this are words between pages: a PING, a section's header.
const PART_OF_A_PAGE: u64 = 512;

/// A connection, as one of its ends sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Connection {
    local: String,
    peer: String,
    /// Came, and was not read.
    unread: u64,
    /// Was written, and not acknowledged.
    queued: u64,
    acked: u64,
    received: u64,
}

/// What the source wrote and the destination read, for each connection by the source's address.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Written(HashMap<String, u64>);

/// The connections of one end. In a namespace of the bench there are no others.
pub(super) fn connections(network: &Network, end: End) -> Result<Vec<Connection>> {
    let text = ss(network, end, &["-tinOH"])?;
    text.lines().filter_map(parse).collect()
}

/// Has both ends of every connection find it reset, silently: as a host does that has restarted.
pub(super) fn reset(network: &Network) -> Result<()> {
    for end in [End::Source, End::Destination] {
        ss(network, end, &["-KtnOH", "state", "connected", "exclude", "syn-sent"])?;
    }
    Ok(())
}

fn ss(network: &Network, end: End, arguments: &[&str]) -> Result<String> {
    let mut command = Command::new("ss");
    command.args(arguments);
    let output = network.at(end, &command).output().context("ss (iproute2)")?;
    let complaint = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "ss {}: {}", arguments.join(" "), complaint.trim());
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// `None` for what has no pages in it: a listening socket, an attempt, one that its owner has closed.
fn parse(line: &str) -> Option<Result<Connection>> {
    let mut fields = line.split_whitespace();
    let state = fields.next()?;
    if !["ESTAB", "CLOSE-WAIT"].contains(&state) {
        return None;
    }
    let mut whole = || -> Option<Connection> {
        let (unread, queued) = (fields.next()?.parse().ok()?, fields.next()?.parse().ok()?);
        let (local, peer) = (fields.next()?.to_owned(), fields.next()?.to_owned());
        // What is 0 is not told.
        let told = |name: &str| {
            let value = fields.clone().find_map(|field| field.strip_prefix(name));
            value.map_or(Some(0), |value| value.parse().ok())
        };
        let (acked, received) = (told("bytes_acked:")?, told("bytes_received:")?);
        Some(Connection { local, peer, unread, queued, acked, received })
    };
    Some(whole().with_context(|| format!("ss says {line:?}")))
}

impl Written {
    /// What the source has written by now.
    pub(super) fn by(source: &[Connection]) -> Self {
        // The one that connects has its first sign acknowledged, which is no byte.
        let of = |it: &Connection| (it.local.clone(), it.acked.saturating_sub(1) + it.queued);
        Self(source.iter().map(of).collect())
    }

    /// The later figures of connections that are told of again.
    pub(super) fn update(&mut self, later: Self) {
        for (local, bytes) in later.0 {
            if let Some(known) = self.0.get_mut(&local) {
                *known = bytes.max(*known);
            }
        }
    }

    /// How many pages of it the destination had not read. A page of which a part is in flight, is.
    pub(super) fn pages_beyond(&self, destination: &[Connection]) -> u64 {
        let pages = self.0.iter().map(|(local, written)| {
            let end = destination.iter().find(|end| end.peer == *local);
            let read = end.map_or(0, |end| end.received.saturating_sub(end.unread));
            match written.saturating_sub(read) {
                ..PART_OF_A_PAGE => 0,
                bytes => bytes.div_ceil(PAGE_BYTES),
            }
        });
        pages.sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SOURCE: &str = "ESTAB 0 9000 192.0.2.1:41390 192.0.2.5:5000 cubic wscale:10,10 rto:204 \
                          rtt:0.037/0.02 bytes_sent:10000 bytes_acked:5001 segs_out:9";
    const DESTINATION: &str =
        "ESTAB 700 0 192.0.2.5:5000 192.0.2.1:41390 cubic bytes_received:6000";

    fn parsed(line: &str) -> Connection {
        parse(line).unwrap().unwrap()
    }

    #[test]
    fn what_is_in_flight_is_what_was_written_and_not_read() {
        let (source, destination) = (parsed(SOURCE), parsed(DESTINATION));
        let written = Written::by(&[source]);
        assert_eq!(written.0["192.0.2.1:41390"], 14_000);
        // 14000 - (6000 - 700) bytes: two pages and a part of one.
        assert_eq!(written.pages_beyond(&[destination]), 3);
        // A connection that the destination does not know.
        assert_eq!(written.pages_beyond(&[]), 4);
    }

    #[test]
    fn words_between_pages_are_none() {
        let mut idle = parsed(SOURCE);
        (idle.queued, idle.acked) = (0, 6310);
        assert_eq!(Written::by(&[idle]).pages_beyond(&[parsed(DESTINATION)]), 1);
        let mut idle = parsed(SOURCE);
        (idle.queued, idle.acked) = (0, 5401);
        assert_eq!(Written::by(&[idle]).pages_beyond(&[parsed(DESTINATION)]), 0);
    }

    #[test]
    fn what_is_written_after_a_cut_is_added_to_the_connections_of_the_cut() {
        let mut written = Written::by(&[parsed(SOURCE)]);
        let mut later = parsed(SOURCE);
        later.queued = 20_000;
        let mut other = later.clone();
        other.local = "192.0.2.1:1".into();
        written.update(Written::by(&[later, other]));
        written.update(Written::by(&[parsed(SOURCE)]));
        assert_eq!(written.0.len(), 1);
        assert_eq!(written.0["192.0.2.1:41390"], 25_000);
    }

    #[test]
    fn only_connections_are_read() {
        assert!(parse("LISTEN 0 128 192.0.2.5:5000 0.0.0.0:* cubic").is_none());
        assert!(parse("FIN-WAIT-1 0 9 192.0.2.1:5 192.0.2.5:5000").is_none());
        assert!(parse("SYN-SENT 0 1 192.0.2.1:5 192.0.2.5:5000").is_none());
        assert!(parse("").is_none());
        assert!(parse("ESTAB much").unwrap().is_err());
    }
}
