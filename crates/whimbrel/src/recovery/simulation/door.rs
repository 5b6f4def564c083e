//! Who is let in while a guest's RAM is arriving: `destination/door.rs` without its sockets.

use whimbrel_wire::recovery::{Hello, HelloKind};

use super::net::{Between, End, Line};
use super::world::{Actor, World};
use crate::recovery::Admission;

/// The first bytes of a QEMU's new main channel.
const RECV_BITMAP: [u8; 3] = [8, 0, 10];

#[derive(Debug, Default)]
pub(super) struct Door {
    /// Connections of which it is not known what they are.
    pub(super) queue: Vec<Line>,
    pub(super) paused: bool,
    pub(super) admission: Admission,
    pub(super) expects_urgent: bool,
    pub(super) beside: Vec<(HelloKind, Line)>,
    pub(super) visitor: Option<(Line, Visitor)>,
    /// The latest that ever was let in.
    pub(super) admitted: u32,
}

#[derive(Debug)]
pub(super) enum Visitor {
    Whimbrel(Hello),
    Qemu,
}

enum Seen {
    Main(Visitor),
    Beside(HelloKind),
}

enum Judged {
    NotYet,
    Refused,
    LetIn(Seen),
}

impl World<'_> {
    /// One step of `dest/door`.
    pub(super) fn door(&mut self) {
        let door = &self.destination.door;
        if self.setting.qemu && !door.paused && !door.expects_urgent {
            return;
        }
        for line in std::mem::take(&mut self.destination.door.queue) {
            match self.judge(line) {
                Judged::NotYet => self.destination.door.queue.push(line),
                Judged::Refused => {
                    self.summary.refused += 1;
                    self.close(line, End::Destination);
                }
                Judged::LetIn(seen) => self.let_in(line, seen),
            }
        }
    }

    fn judge(&mut self, line: Line) -> Judged {
        let here = self.net.here(line, End::Destination);
        let ends = self.net.is_over(line, End::Destination);
        let door = &self.destination.door;
        let Some(proofs) = &self.destination.proofs else {
            if door.expects_urgent && !(ends && here.is_empty()) {
                return Judged::LetIn(Seen::Beside(HelloKind::Urgent));
            }
            let begun = here.len().min(RECV_BITMAP.len());
            return match () {
                () if here[..begun] != RECV_BITMAP[..begun] => Judged::Refused,
                () if begun == RECV_BITMAP.len() => Judged::LetIn(Seen::Main(Visitor::Qemu)),
                () if ends => Judged::Refused,
                () => Judged::NotYet,
            };
        };
        let seen = match door.admission.judge(proofs, here) {
            Ok(Some(hello)) if hello.kind == HelloKind::Main => {
                Seen::Main(Visitor::Whimbrel(hello))
            }
            Ok(Some(hello)) => Seen::Beside(hello.kind),
            Ok(None) if ends => return Judged::Refused,
            Ok(None) => return Judged::NotYet,
            Err(_) => return Judged::Refused,
        };
        self.net.take(line, End::Destination, Hello::LEN);
        Judged::LetIn(seen)
    }

    fn let_in(&mut self, line: Line, seen: Seen) {
        let between = self.net.between(line);
        // The urgent channel of a QEMU has nothing to show: whoever comes next is taken for it.
        let shows = !matches!(seen, Seen::Beside(_) if self.setting.qemu);
        assert!(!shows || between != Between::Stranger, "a stranger is let in");
        let door = &mut self.destination.door;
        match seen {
            Seen::Main(visitor) => {
                match &visitor {
                    Visitor::Whimbrel(hello) => {
                        door.admission.begin(hello.attempt);
                        door.admitted = door.admitted.max(hello.attempt);
                    }
                    Visitor::Qemu => door.expects_urgent = self.setting.preempt,
                }
                let old = door.visitor.replace((line, visitor));
                if !door.paused {
                    // It knows that the old connections are dead.
                    self.destination.broken = true;
                }
                if let Some((old, _)) = old {
                    self.close(old, End::Destination);
                }
                self.wake(Actor::DestinationMain);
            }
            Seen::Beside(kind) => {
                door.expects_urgent &= kind != HelloKind::Urgent;
                door.beside.push((kind, line));
                self.wake(Actor::DestinationUrgent);
            }
        }
    }

    /// The link is broken.
    pub(super) fn door_is_paused(&mut self) {
        let door = &mut self.destination.door;
        door.paused = true;
        door.admission.close();
        door.expects_urgent = false;
        for (_, line) in std::mem::take(&mut door.beside) {
            self.close(line, End::Destination);
        }
        self.wake(Actor::Door);
    }
}
