//! What a guest that is kept in step says to the world, and when it may.
//!
//! A takeover goes back to the last checkpoint. Nobody notices, as long as nothing has left the host
//! that the secondary does not know of: so what the primary's guest says is held until a checkpoint
//! with it is complete ([`buffer`]), or until the copy at the secondary has said the same
//! ([`compare`]).

mod buffer;
mod compare;
mod connections;
mod conversation;
mod flow;
#[cfg(test)]
mod packets;
mod series;
mod stream;

#[cfg(test)]
mod tests;

use std::collections::VecDeque;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use self::buffer::Buffer;
use self::compare::Comparer;
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
    begun: Instant,
    state: Mutex<State>,
}

/// Asks for a checkpoint.
pub(crate) type Wake = Arc<dyn Fn() + Send + Sync>;

/// Most bytes that wait to be compared: what the guest says then is dropped, as a full queue of any
/// network does, and its sender sends it again.
const COMPARED_MAX: usize = 128 << 20;

/// Most packets of a copy that has been brought further than is known here.
const EARLY_MAX: usize = 4096;

#[derive(Debug, Default)]
struct State {
    part: Part,
    /// What leaves next.
    ready: VecDeque<Ready>,
    /// A thread is about it.
    leaving: bool,
    released: u64,
    dropped: u64,
    differences: u64,
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
    /// The guest is a primary's: it leaves when the copy has said the same.
    Compare(Box<Compare>),
}

struct Compare {
    comparer: Comparer,
    /// How many checkpoints are complete.
    epoch: u64,
    /// What a copy has said that has been brought one further.
    early: VecDeque<Vec<u8>>,
    /// A difference has been told of since the last checkpoint.
    differs: bool,
    wake: Wake,
}

impl fmt::Debug for Compare {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Compare").field("epoch", &self.epoch).finish_non_exhaustive()
    }
}

#[derive(Debug)]
enum Ready {
    World(Vec<u8>),
    Primary { epoch: u64, packet: Vec<u8> },
}

/// How far a guest's packets had come when it stood still for a checkpoint.
#[derive(Debug)]
pub(crate) enum Boundary {
    Open,
    Buffer(u64),
    Compare(compare::Boundary),
}

impl Output {
    pub(crate) fn new(outlet: impl Outlet + 'static) -> Output {
        let (outlet, begun) = (Box::new(outlet), Instant::now());
        Output(Arc::new(Shared { outlet, begun, state: Mutex::default() }))
    }

    fn now(&self) -> Duration {
        self.0.begun.elapsed()
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Whole after every statement.
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The guest has sent this packet: an Ethernet frame, as it is to leave.
    pub fn send(&self, packet: Vec<u8>) {
        let now = self.now();
        let wake = {
            let mut state = self.lock();
            let State { part, ready, dropped, .. } = &mut *state;
            match part {
                Part::Open => ready.push_back(Ready::World(packet)),
                Part::Copy { epoch } => ready.push_back(Ready::Primary { epoch: *epoch, packet }),
                Part::Buffer(buffer) => *dropped += u64::from(!buffer.hold(packet)),
                Part::Compare(compare) => match compare.comparer.held_bytes() < COMPARED_MAX {
                    true => compare.comparer.primary(now, packet),
                    false => *dropped += 1,
                },
            }
            state.compared(now)
        };
        wake.into_iter().for_each(|wake| wake());
        self.let_go();
    }

    /// At a primary, the copy at the secondary has sent this packet, after so many checkpoints: what
    /// [`Outlet::copy_said`] was given there. Ignored where nothing is compared.
    pub fn copy_said(&self, epoch: u64, packet: &[u8]) {
        let now = self.now();
        let wake = {
            let mut state = self.lock();
            if let Part::Compare(compare) = &mut state.part {
                match epoch.checked_sub(compare.epoch) {
                    Some(0) => compare.comparer.copy(now, packet),
                    // The copy has heard of the checkpoint's end before this side has.
                    Some(1) if compare.early.len() < EARLY_MAX => {
                        compare.early.push_back(packet.to_vec());
                    }
                    // Void: the copy has been brought elsewhere since.
                    _ => {}
                }
            }
            state.compared(now)
        };
        wake.into_iter().for_each(|wake| wake());
        self.let_go();
    }

    /// What has become of the guest's packets so far.
    pub fn stats(&self) -> OutputStats {
        let state = self.lock();
        let held_bytes = match &state.part {
            Part::Buffer(buffer) => buffer.bytes(),
            Part::Compare(compare) => compare.comparer.held_bytes(),
            Part::Open | Part::Copy { .. } => 0,
        };
        let State { released, dropped, differences, .. } = *state;
        OutputStats { released, held_bytes, dropped, differences }
    }

    /// Whether the guest is a copy of a primary's: what comes from the world is for the primary.
    pub fn is_copys(&self) -> bool {
        matches!(self.lock().part, Part::Copy { .. })
    }

    /// The guest is a primary's from here on. It stands still.
    fn becomes_primarys(&self, policy: ColoOutput, timeout: Duration, wake: Wake) {
        self.lock().part = match policy {
            ColoOutput::None => Part::Open,
            ColoOutput::Buffer => Part::Buffer(Buffer::default()),
            ColoOutput::Compare => Part::Compare(Box::new(Compare {
                comparer: Comparer::new(timeout),
                epoch: 0,
                early: VecDeque::new(),
                differs: false,
                wake,
            })),
        };
    }

    /// Whether a checkpoint is to be taken, and if not, how long it may be until one is.
    fn is_due(&self) -> Due {
        let now = self.now();
        let mut state = self.lock();
        // It is being asked whoever would be woken.
        let _wake = state.compared(now);
        match &state.part {
            Part::Compare(compare) if compare.differs => Due::Now,
            Part::Compare(compare) => Due::Within(compare.comparer.wait(now)),
            Part::Open | Part::Copy { .. } | Part::Buffer(_) => Due::Within(None),
        }
    }

    /// The guest is a copy from here on, which has loaded so many checkpoints. It stands still.
    fn becomes_copys(&self, epoch: u64) {
        self.lock().part = Part::Copy { epoch };
    }

    /// The guest stands still for a checkpoint.
    fn boundary(&self) -> Boundary {
        match &mut self.lock().part {
            Part::Buffer(buffer) => Boundary::Buffer(buffer.count()),
            Part::Compare(compare) => Boundary::Compare(compare.comparer.boundary()),
            Part::Open | Part::Copy { .. } => Boundary::Open,
        }
    }

    /// The checkpoint for which it stood still then is at the secondary.
    fn is_complete(&self, boundary: Boundary) {
        let now = self.now();
        let wake = {
            let mut state = self.lock();
            let State { part, ready, .. } = &mut *state;
            match (part, boundary) {
                (Part::Buffer(buffer), Boundary::Buffer(count)) => {
                    ready.extend(buffer.release(count).map(Ready::World));
                }
                (Part::Compare(compare), Boundary::Compare(boundary)) => {
                    compare.comparer.complete(now, boundary);
                    (compare.epoch, compare.differs) = (compare.epoch + 1, false);
                    for packet in std::mem::take(&mut compare.early) {
                        compare.comparer.copy(now, &packet);
                    }
                }
                _ => {}
            }
            state.compared(now)
        };
        wake.into_iter().for_each(|wake| wake());
        self.let_go();
    }

    /// The guest is kept in step no more, and nobody's copy: all that is held may leave.
    fn opens(&self) {
        {
            let mut state = self.lock();
            let State { part, ready, .. } = &mut *state;
            match std::mem::take(part) {
                Part::Buffer(mut buffer) => {
                    let all = buffer.count();
                    ready.extend(buffer.release(all).map(Ready::World));
                }
                Part::Compare(mut compare) => {
                    ready.extend(compare.comparer.let_all_go().into_iter().map(Ready::World));
                }
                Part::Open | Part::Copy { .. } => {}
            }
        }
        self.let_go();
    }

    /// The guest is kept in step no more and stands still, and what is held is not to leave.
    fn forgets(&self) {
        self.lock().part = Part::Open;
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

impl State {
    /// What has been compared may leave. Gives what asks for a checkpoint, if one is needed and has
    /// not been asked for.
    fn compared(&mut self, now: Duration) -> Option<Wake> {
        let Part::Compare(compare) = &mut self.part else { return None };
        self.ready.extend(compare.comparer.released().into_iter().map(Ready::World));
        if compare.differs || compare.comparer.differs(now).is_none() {
            return None;
        }
        compare.differs = true;
        self.differences += 1;
        Some(compare.wake.clone())
    }
}

/// When the next checkpoint is to be taken, whatever the time since the last.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Due {
    Now,
    /// Not before that, unless it is asked for.
    Within(Option<Duration>),
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
    /// Packets that were dropped because too many were held.
    pub dropped: u64,
    /// How often a checkpoint was needed because the guest and its copy did not say the same, or not
    /// in time: with policy [`ColoOutput::Compare`].
    pub differences: u64,
}

/// The way out of a VM, if its VMM has told of one.
#[derive(Clone, Debug, Default)]
pub(crate) struct MaybeOutput(pub(crate) Option<Output>);

impl MaybeOutput {
    pub(crate) fn becomes_primarys(&self, policy: ColoOutput, timeout: Duration, wake: Wake) {
        self.0.iter().for_each(|output| output.becomes_primarys(policy, timeout, wake.clone()));
    }

    pub(crate) fn becomes_copys(&self, epoch: u64) {
        self.0.iter().for_each(|output| output.becomes_copys(epoch));
    }

    pub(crate) fn is_due(&self) -> Due {
        self.0.as_ref().map_or(Due::Within(None), Output::is_due)
    }

    pub(crate) fn boundary(&self) -> Boundary {
        self.0.as_ref().map_or(Boundary::Open, Output::boundary)
    }

    pub(crate) fn is_complete(&self, boundary: Boundary) {
        if let Some(output) = &self.0 {
            output.is_complete(boundary);
        }
    }

    pub(crate) fn opens(&self) {
        self.0.iter().for_each(Output::opens);
    }

    pub(crate) fn forgets(&self) {
        self.0.iter().for_each(Output::forgets);
    }
}
