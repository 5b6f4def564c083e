//! What the native guest does with the frames that come: its driver and its service.

mod connection;
mod frames;
mod table;

use std::time::{Duration, Instant};

use whimbrel::VmError;
use whimbrel_ram::{BlockError, GuestRam, RamBlock, TARGET_PAGE};

use self::connection::Connection;
use self::frames::Heard;
use self::table::{CONNECTIONS, Table};
use super::{NetConfig, Nic};
use crate::dirty::Marks;
use crate::gate::Gate;
use crate::guarded::{self, Ended};
use crate::layout::{NET, RAM};
use crate::machine::machine_check;

/// What the guest's network takes of its RAM.
pub(crate) const NET_BYTES: u64 = 3 * TARGET_PAGE.bytes() as u64;
const _: () = assert!(table::BYTES as u64 <= NET_BYTES);

/// How long what was sent may stay unacknowledged before it is sent again.
const SEND_AGAIN: Duration = Duration::from_millis(200);
/// How often, until the other side is taken for gone.
const TRIES: u32 = 300;

/// Puts a network that nobody has used into a fresh guest's RAM.
pub(crate) fn install(block: &RamBlock, config: NetConfig) -> Result<(), BlockError> {
    block.write(NET, &Table::new(config).to_bytes())
}

/// The guest's driver: runs on a thread of its own, as a vCPU does.
pub(crate) struct Driver<'v> {
    pub(crate) ram: &'v GuestRam,
    pub(crate) marks: &'v Marks,
    pub(crate) nic: &'v Nic,
}

/// When something of a connection is sent again. Not part of the guest: it begins anew wherever
/// that goes.
#[derive(Clone, Copy, Debug)]
struct Timer {
    unacknowledged: u32,
    since: Instant,
    tries: u32,
}

impl Driver<'_> {
    /// Takes in frames until the guest is recalled.
    pub(crate) fn run(&self, gate: &Gate) -> Result<(), VmError> {
        let mut timers = [None; CONNECTIONS];
        let mut due = Some(Instant::now());
        while !gate.recalled() {
            let frame = self.nic.next();
            if frame.is_none() && due.is_none_or(|due| due > Instant::now()) {
                gate.doze(due);
                continue;
            }
            let mut table = match self.load() {
                Ok(table) => table,
                Err(ended) => {
                    frame.into_iter().for_each(|frame| self.nic.put_back(frame));
                    return match ended {
                        Ended::Kicked => Ok(()),
                        Ended::Lost => Err(machine_check(self.ram, RAM, NET)),
                    };
                }
            };
            let before = table.clone();
            let mut out = Vec::new();
            match frame {
                Some(frame) => take_in(&mut table, &frame, &mut out),
                None => send_again(&mut table, &mut timers, &mut out),
            }
            due = set(&mut timers, &table);
            if table != before {
                self.store(&table);
            }
            // What was said is in the guest's memory before anybody hears it.
            out.into_iter().for_each(|frame| self.nic.send(frame));
        }
        Ok(())
    }

    fn load(&self) -> Result<Table, Ended> {
        let mut bytes = [0; table::BYTES];
        guarded::read(self.ram.block(RAM), NET, &mut bytes)?;
        Ok(Table::from_bytes(&bytes))
    }

    fn store(&self, table: &Table) {
        let bytes = table.to_bytes();
        self.ram.block(RAM).write(NET, &bytes).expect("inside the memory, as laid out");
        self.marks.written(RAM, NET, bytes.len() as u64);
    }
}

fn take_in(table: &mut Table, frame: &[u8], out: &mut Vec<Vec<u8>>) {
    let config = table.config;
    match frames::parse(frame, config) {
        Heard::Nothing => {}
        Heard::Answer(answer) => out.push(answer),
        Heard::Segment(peer, segment) => {
            let Some(connection) = table.find_or_open(&peer, &segment) else {
                out.extend(frames::refusal(config, &peer, &segment));
                return;
            };
            let mut says = connection.receive(&segment);
            connection.send(&mut says);
            out.extend(says.into_iter().map(|say| frames::segment(config, &peer, &say)));
        }
    }
}

fn send_again(table: &mut Table, timers: &mut [Option<Timer>], out: &mut Vec<Vec<u8>>) {
    let config = table.config;
    for (connection, timer) in table.connections.iter_mut().zip(timers) {
        let Some(timer) = timer.as_mut().filter(|timer| timer.since.elapsed() >= SEND_AGAIN) else {
            continue;
        };
        (timer.since, timer.tries) = (Instant::now(), timer.tries + 1);
        if timer.tries > TRIES {
            *connection = Connection::default();
            continue;
        }
        let (peer, mut says) = (connection.peer(), Vec::new());
        connection.send_again(&mut says);
        out.extend(says.into_iter().map(|say| frames::segment(config, &peer, &say)));
    }
}

/// Starts the timers of what is unacknowledged; gives when the first is due.
fn set(timers: &mut [Option<Timer>], table: &Table) -> Option<Instant> {
    for (timer, connection) in timers.iter_mut().zip(&table.connections) {
        *timer = connection.unacknowledged().map(|unacknowledged| match *timer {
            Some(timer) if timer.unacknowledged == unacknowledged => timer,
            _ => Timer { unacknowledged, since: Instant::now(), tries: 0 },
        });
    }
    timers.iter().flatten().map(|timer| timer.since + SEND_AGAIN).min()
}
