//! The connections of a guest and its copy: which of them is idle, which is waited for, and what
//! all of them take of memory.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::time::Duration;

use super::compare::Unlike;
use super::conversation::Conversation;
use super::flow::{Flow, Packet, Said, Segment};
use super::series::Series;

/// Connections by their flows, as many as `most`.
#[derive(Debug)]
pub(super) struct Connections {
    all: HashMap<Flow, Connection>,
    most: usize,
    /// Those in which nothing is waited for, by when they were last heard of.
    idle: BTreeMap<u64, Flow>,
    /// Those in which the copy waits for the guest, by since when.
    ahead: BTreeSet<(Duration, Flow)>,
    heard: u64,
    cost: usize,
}

#[derive(Debug)]
struct Connection {
    talk: Talk,
    /// What the lists above have of it.
    idle: Option<u64>,
    ahead: Option<Duration>,
    cost: usize,
}

#[derive(Debug)]
enum Talk {
    Tcp(Conversation),
    Datagrams(Series),
}

/// What came of a packet of the guest's.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Heard {
    /// It leaves when the copy says the same, if it has not left.
    Taken,
    /// It can only wait for a checkpoint.
    Untaken,
    /// Likewise, and so must everything: there are too many connections that wait.
    TooMany,
}

impl Connections {
    pub(super) fn new(most: usize) -> Connections {
        Connections {
            all: HashMap::new(),
            most,
            idle: BTreeMap::new(),
            ahead: BTreeSet::new(),
            heard: 0,
            cost: 0,
        }
    }

    pub(super) fn most(&self) -> usize {
        self.most
    }

    /// The guest has sent packet `id`; puts down which packets may leave.
    pub(super) fn guest(
        &mut self,
        now: Duration,
        id: u64,
        packet: &Packet<'_>,
        leaving: &mut Vec<u64>,
    ) -> Result<Heard, Unlike> {
        let Some(connection) = self.of(packet) else { return Ok(Heard::TooMany) };
        let taken = match (&mut connection.talk, &packet.said) {
            (Talk::Tcp(talk), Said::Segment(segment)) => {
                let taken = talk.guest(now, id, segment);
                talk.leave(leaving);
                taken
            }
            (Talk::Datagrams(talk), Said::Datagram(said)) => talk.guest(id, said, leaving),
            _ => unreachable!("a flow is of one protocol"),
        };
        self.settle(packet.flow);
        taken.map(|taken| if taken { Heard::Taken } else { Heard::Untaken })
    }

    /// The copy has sent a packet; puts down which of the guest's may leave. False when there are
    /// too many connections.
    pub(super) fn copy(
        &mut self,
        now: Duration,
        packet: &Packet<'_>,
        leaving: &mut Vec<u64>,
    ) -> Result<bool, Unlike> {
        let Some(connection) = self.of(packet) else { return Ok(false) };
        let heard = match (&mut connection.talk, &packet.said) {
            (Talk::Tcp(talk), Said::Segment(segment)) => {
                let heard = talk.copy(now, segment);
                talk.leave(leaving);
                heard
            }
            (Talk::Datagrams(talk), Said::Datagram(said)) => talk.copy(now, said, leaving),
            _ => unreachable!("a flow is of one protocol"),
        };
        self.settle(packet.flow);
        heard.map(|()| true)
    }

    /// Whether the packet says only what was compared before.
    pub(super) fn is_repeated(&self, packet: &Packet<'_>) -> bool {
        match (self.all.get(&packet.flow).map(|connection| &connection.talk), &packet.said) {
            (Some(Talk::Tcp(talk)), Said::Segment(segment)) => talk.is_repeated(segment),
            _ => false,
        }
    }

    /// The copy is where the guest is.
    pub(super) fn restart(&mut self) {
        let mut flows: Vec<_> = self.all.iter().map(|(flow, known)| (known.idle, *flow)).collect();
        // Those that were idle stay in their order, before those that were not: the latter are the last
        // to be forgotten.
        flows.sort_unstable_by_key(|&(idle, _)| idle.unwrap_or(u64::MAX));
        for connection in self.all.values_mut() {
            match &mut connection.talk {
                Talk::Tcp(talk) => talk.restart(),
                Talk::Datagrams(talk) => *talk = Series::default(),
            }
        }
        for (_, flow) in flows {
            self.settle(flow);
        }
    }

    /// After a restart: what the guest had said before it without being compared.
    pub(super) fn pass(&mut self, flow: Flow, segment: &Segment<'_>) {
        let packet = Packet { flow, said: Said::Segment(*segment) };
        if let Some(Connection { talk: Talk::Tcp(talk), .. }) = self.of(&packet) {
            talk.pass(segment);
            self.settle(flow);
        }
    }

    /// Since when the copy has waited for the guest, where it has waited longest.
    pub(super) fn ahead(&self) -> Option<(Duration, Flow)> {
        self.ahead.first().copied()
    }

    /// What all take of memory, about.
    pub(super) fn cost(&self) -> usize {
        self.cost
    }

    /// The packet's connection, a new one if there is none. `None` when there are too many of which
    /// nothing may be forgotten.
    fn of(&mut self, packet: &Packet<'_>) -> Option<&mut Connection> {
        if !self.all.contains_key(&packet.flow) && self.all.len() >= self.most {
            let (_, flow) = self.idle.pop_first()?;
            if let Some(forgotten) = self.all.remove(&flow) {
                self.cost -= forgotten.cost;
            }
        }
        Some(self.all.entry(packet.flow).or_insert_with(|| Connection {
            talk: match packet.said {
                Said::Segment(_) => Talk::Tcp(Conversation::default()),
                Said::Datagram(_) => Talk::Datagrams(Series::default()),
            },
            idle: None,
            ahead: None,
            cost: 0,
        }))
    }

    /// Brings the lists up to date with a connection that was heard of.
    fn settle(&mut self, flow: Flow) {
        let Some(connection) = self.all.get_mut(&flow) else { return };
        let (is_settled, ahead, cost) = match &connection.talk {
            Talk::Tcp(talk) => (talk.is_settled(), talk.ahead(), talk.cost()),
            Talk::Datagrams(talk) => (talk.is_settled(), talk.ahead(), talk.cost()),
        };
        self.cost = self.cost - connection.cost + cost;
        connection.cost = cost;
        if let Some(heard) = connection.idle.take() {
            self.idle.remove(&heard);
        }
        if is_settled {
            self.heard += 1;
            self.idle.insert(self.heard, flow);
            connection.idle = Some(self.heard);
        }
        if connection.ahead != ahead {
            if let Some(since) = connection.ahead {
                self.ahead.remove(&(since, flow));
            }
            if let Some(since) = ahead {
                self.ahead.insert((since, flow));
            }
            connection.ahead = ahead;
        }
    }
}
