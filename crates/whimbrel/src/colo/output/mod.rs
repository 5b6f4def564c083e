//! What a guest that is kept in step says to the world, and when it may.
//!
//! A takeover goes back to the last checkpoint. Nobody notices, as long as nothing has left the host
//! that the secondary does not know of: so what the primary's guest says is held until a checkpoint
//! with it is complete ([`buffer`]), or until the copy at the secondary has said the same.

mod buffer;

use std::collections::VecDeque;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use self::buffer::Buffer;
use crate::settings::ColoOutput;

/// Where a VMM sends its guest's packets.
pub trait Outlet: Send + Sync {
    /// Sends a packet to the world. Called from the thread that sends the guest's packets and from
    /// the migration's, one packet after the other; what it cannot send at once it drops, as any
    /// network does.
    fn release(&self, packet: &[u8]);

    /// At a secondary: its copy has said this. With policy [`ColoOutput::Compare`] it is brought to
    /// the primary's VMM, which gives it to [`Output::copy_said`], in order and with the same `epoch`;
    /// otherwise nobody wants it.
    fn copy_said(&self, epoch: u64, packet: &[u8]) {
        let _ = (epoch, packet);
    }
}

/// The way out for a guest's packets: what a VMM gives to it leaves by its [`Outlet`], at once where
/// the VM is not kept in step with another, and else when it may. Made by
/// [`Migrator::set_outlet`](crate::Migrator::set_outlet).
#[derive(Clone)]
pub struct Output(Arc<Shared>);

struct Shared {
    outlet: Box<dyn Outlet>,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    part: Part,
    /// What leaves next.
    ready: VecDeque<Ready>,
    /// A thread is about it.
    leaving: bool,
    released: u64,
}

/// What becomes of a packet.
#[derive(Debug, Default)]
enum Part {
    /// It leaves.
    #[default]
    Open,
    /// The guest is a copy, which has loaded so many checkpoints: it does not.
    Copy { epoch: u64 },
    /// The guest is a primary's: it leaves when a checkpoint with it is complete.
    Buffer(Buffer),
}

#[derive(Debug)]
enum Ready {
    World(Vec<u8>),
    Primary { epoch: u64, packet: Vec<u8> },
}

/// How far a guest's packets had come when it stood still for a checkpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Boundary(u64);

impl Output {
    pub(crate) fn new(outlet: impl Outlet + 'static) -> Output {
        Output(Arc::new(Shared { outlet: Box::new(outlet), state: Mutex::default() }))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Whole after every statement.
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The guest has sent this packet: an Ethernet frame, as it is to leave.
    pub fn send(&self, packet: Vec<u8>) {
        {
            let mut state = self.lock();
            let State { part, ready, .. } = &mut *state;
            match part {
                Part::Open => ready.push_back(Ready::World(packet)),
                Part::Copy { epoch } => ready.push_back(Ready::Primary { epoch: *epoch, packet }),
                Part::Buffer(buffer) => buffer.hold(packet),
            }
        }
        self.let_go();
    }

    /// How many packets have left so far, and how many bytes are held.
    pub fn stats(&self) -> OutputStats {
        let state = self.lock();
        let (held_bytes, dropped) = match &state.part {
            Part::Buffer(buffer) => (buffer.bytes(), buffer.dropped()),
            Part::Open | Part::Copy { .. } => (0, 0),
        };
        OutputStats { released: state.released, held_bytes, dropped }
    }

    /// Whether the guest is a copy of a primary's: what comes from the world is for the primary.
    pub fn is_copys(&self) -> bool {
        matches!(self.lock().part, Part::Copy { .. })
    }

    /// The guest is a primary's from here on. It stands still.
    fn becomes_primarys(&self, policy: ColoOutput) {
        self.lock().part = match policy {
            ColoOutput::None => Part::Open,
            ColoOutput::Buffer => Part::Buffer(Buffer::default()),
        };
    }

    /// The guest is a copy from here on, which has loaded so many checkpoints. It stands still.
    fn becomes_copys(&self, epoch: u64) {
        self.lock().part = Part::Copy { epoch };
    }

    /// The guest stands still for a checkpoint.
    fn boundary(&self) -> Boundary {
        match &self.lock().part {
            Part::Buffer(buffer) => Boundary(buffer.count()),
            Part::Open | Part::Copy { .. } => Boundary(0),
        }
    }

    /// The checkpoint for which it stood still then is at the secondary.
    fn is_complete(&self, boundary: Boundary) {
        {
            let mut state = self.lock();
            let State { part, ready, .. } = &mut *state;
            match part {
                Part::Buffer(buffer) => {
                    ready.extend(buffer.release(boundary.0).map(Ready::World));
                }
                Part::Open | Part::Copy { .. } => {}
            }
        }
        self.let_go();
    }

    /// The guest is kept in step no more, and nobody's copy: all that is held may leave.
    fn opens(&self) {
        {
            let mut state = self.lock();
            let State { part, ready, .. } = &mut *state;
            if let Part::Buffer(mut buffer) = std::mem::take(part) {
                let all = buffer.count();
                ready.extend(buffer.release(all).map(Ready::World));
            }
        }
        self.let_go();
    }

    /// Has everything leave that may, one after the other, whoever else wants that too. No lock is
    /// held meanwhile.
    fn let_go(&self) {
        if std::mem::replace(&mut self.lock().leaving, true) {
            return; // Whoever does so finds it.
        }
        loop {
            let next = {
                let mut state = self.lock();
                let next = state.ready.pop_front();
                match &next {
                    Some(Ready::World(_)) => state.released += 1,
                    Some(Ready::Primary { .. }) => {}
                    None => state.leaving = false,
                }
                next
            };
            match next {
                Some(Ready::World(packet)) => self.0.outlet.release(&packet),
                Some(Ready::Primary { epoch, packet }) => self.0.outlet.copy_said(epoch, &packet),
                None => return,
            }
        }
    }
}

impl fmt::Debug for Output {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Output").field(&self.stats()).finish()
    }
}

/// What became of a guest's packets.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct OutputStats {
    /// Packets that have left.
    pub released: u64,
    /// Bytes of packets that are held.
    pub held_bytes: usize,
    /// Packets that were dropped because too many were held: since COLO began, with policy
    /// [`ColoOutput::Buffer`].
    pub dropped: u64,
}

/// The way out of a VM, if its VMM has told of one.
#[derive(Clone, Debug, Default)]
pub(crate) struct MaybeOutput(pub(crate) Option<Output>);

impl MaybeOutput {
    pub(crate) fn becomes_primarys(&self, policy: ColoOutput) {
        self.0.iter().for_each(|output| output.becomes_primarys(policy));
    }

    pub(crate) fn becomes_copys(&self, epoch: u64) {
        self.0.iter().for_each(|output| output.becomes_copys(epoch));
    }

    pub(crate) fn boundary(&self) -> Boundary {
        self.0.as_ref().map_or(Boundary(0), Output::boundary)
    }

    pub(crate) fn is_complete(&self, boundary: Boundary) {
        self.0.iter().for_each(|output| output.is_complete(boundary));
    }

    pub(crate) fn opens(&self) {
        self.0.iter().for_each(Output::opens);
    }
}
