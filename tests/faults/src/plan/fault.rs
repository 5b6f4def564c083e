//! What goes wrong, and when.

use std::fmt;
use std::time::Duration;

use crate::dice::Dice;

use super::Scene;

/// A side of the migration.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Side {
    Source,
    Destination,
}

impl Side {
    pub(crate) const BOTH: [Side; 2] = [Side::Source, Side::Destination];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Side::Source => "source",
            Side::Destination => "destination",
        }
    }
}

/// What a connection is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Channel {
    Main,
    Multifd(u8),
    Urgent,
}

impl fmt::Display for Channel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Channel::Main => f.write_str("main"),
            Channel::Multifd(number) => write!(f, "multifd-{number}"),
            Channel::Urgent => f.write_str("urgent"),
        }
    }
}

/// From the source to the destination, or back.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Direction {
    Forth,
    Back,
}

/// A place in the stream that is found by reading along.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Mark {
    /// The first RAM section after the setup.
    Ram,
    /// The last RAM of a precopy.
    LastRam,
    /// The first device section.
    Devices,
    /// The PING behind the last device.
    PingLoaded,
    /// The end mark of the stream.
    Eof,
    /// The command that says that postcopy may follow.
    Advise,
    /// The package with the devices.
    Package,
    /// The last command of the package: the guest is given away.
    Run,
    /// What comes after the package.
    Rest,
    /// The PONG that says that all is loaded.
    PongLoaded,
    /// The first request for a page.
    Request,
    /// The destination's last word.
    Shut,
}

impl Mark {
    pub(crate) fn direction(self) -> Direction {
        match self {
            Mark::PongLoaded | Mark::Request | Mark::Shut => Direction::Back,
            _ => Direction::Forth,
        }
    }
}

/// When a fault happens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Trigger {
    /// When so many bytes of a channel have been forwarded, all connections of that channel counted
    /// together.
    Byte(Channel, Direction, u64),
    /// So many bytes behind a mark in the main channel.
    Mark(Mark, u64),
    /// So long after a side has told of a state.
    Status(Side, &'static str, Duration),
    /// So long after the migration began.
    Time(Duration),
}

impl Trigger {
    #[cfg(test)]
    pub(crate) const KINDS: [&str; 4] = ["byte", "mark", "status", "time"];

    #[cfg(test)]
    pub(crate) fn kind(&self) -> &'static str {
        match self {
            Trigger::Byte(..) => "byte",
            Trigger::Mark(..) => "mark",
            Trigger::Status(..) => "status",
            Trigger::Time(_) => "time",
        }
    }

    /// The channel at whose bytes it is.
    pub(crate) fn channel(&self) -> Option<Channel> {
        match self {
            Trigger::Byte(channel, ..) => Some(*channel),
            Trigger::Mark(..) => Some(Channel::Main),
            Trigger::Status(..) | Trigger::Time(_) => None,
        }
    }

    /// The direction in which that channel's bytes go.
    pub(crate) fn direction(&self) -> Direction {
        match self {
            Trigger::Byte(_, direction, _) => *direction,
            Trigger::Mark(mark, _) => mark.direction(),
            Trigger::Status(..) | Trigger::Time(_) => Direction::Forth,
        }
    }

    fn draw(dice: &mut Dice, scene: &Scene) -> Trigger {
        match dice.weighted(&[(4, 0), (if scene.tls { 0 } else { 4 }, 1), (3, 2), (1, 3)]) {
            0 => Trigger::draw_byte(dice, scene),
            1 => Trigger::draw_mark(dice, scene),
            2 => {
                let (side, status) = draw_status(dice, scene);
                Trigger::Status(side, status, Duration::from_micros(dice.by_magnitude(100_000)))
            }
            _ => Trigger::Time(dice.millis(0, 120)),
        }
    }

    fn draw_byte(dice: &mut Dice, scene: &Scene) -> Trigger {
        let multifd = match scene.channels {
            0 => Channel::Main,
            channels => {
                let number = dice.below(u64::from(channels));
                Channel::Multifd(u8::try_from(number).expect("below the number of channels"))
            }
        };
        let urgent = if scene.has(Channel::Urgent) { Channel::Urgent } else { Channel::Main };
        let channel = dice.weighted(&[(4, Channel::Main), (3, multifd), (2, urgent)]);
        let direction = match channel {
            Channel::Main => dice.weighted(&[(3, Direction::Forth), (1, Direction::Back)]),
            // Nothing goes back there but what TLS says.
            _ => dice.weighted(&[(9, Direction::Forth), (u64::from(scene.tls), Direction::Back)]),
        };
        let end = scene.bytes_on(channel, direction);
        // Half of them anywhere, half near the beginning, where most is said.
        let anywhere = direction == Direction::Forth && dice.one_in(2);
        let at = if anywhere { dice.below(end) } else { dice.by_magnitude(end) };
        Trigger::Byte(channel, direction, at)
    }

    fn draw_mark(dice: &mut Dice, scene: &Scene) -> Trigger {
        let mark = draw_mark(dice, scene);
        let content = scene.bytes_on(Channel::Main, Direction::Forth);
        let anywhere = dice.one_in(2);
        let then = match mark {
            Mark::Rest if anywhere => dice.below(content / 2),
            Mark::Ram | Mark::LastRam | Mark::Rest => dice.by_magnitude(64 << 10),
            Mark::Advise | Mark::Devices | Mark::Package | Mark::Eof => dice.by_magnitude(1 << 10),
            Mark::Request => dice.by_magnitude(4 << 10),
            Mark::Run => dice.below(8),
            Mark::PingLoaded | Mark::PongLoaded | Mark::Shut => dice.below(9),
        };
        Trigger::Mark(mark, then)
    }
}

fn draw_mark(dice: &mut Dice, scene: &Scene) -> Mark {
    match scene.way.is_postcopy() {
        false => dice.weighted(&[
            (2, Mark::Ram),
            (1, Mark::LastRam),
            (1, Mark::Devices),
            (1, Mark::PingLoaded),
            (2, Mark::Eof),
            (1, Mark::PongLoaded),
            (1, Mark::Shut),
        ]),
        true => dice.weighted(&[
            (1, Mark::Ram),
            (1, Mark::Advise),
            (2, Mark::Package),
            (2, Mark::Run),
            (6, Mark::Rest),
            (4, Mark::Request),
            (1, Mark::Eof),
            (1, Mark::Shut),
        ]),
    }
}

fn draw_status(dice: &mut Dice, scene: &Scene) -> (Side, &'static str) {
    let side = dice.one_of(&Side::BOTH);
    let status = match (scene.way.is_postcopy(), side) {
        (false, Side::Source) => dice.one_of(&["setup", "active", "active", "device"]),
        (false, Side::Destination) => "active",
        (true, _) => dice.weighted(&[
            (1, "active"),
            (1, "postcopy-device"),
            (6, "postcopy-active"),
            (1, "postcopy-paused"),
            (1, "postcopy-recover-setup"),
            (2, "postcopy-recover"),
        ]),
    };
    (side, status)
}

/// What a fault is done to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Scope {
    /// The channel at whose bytes it happens, or the main one.
    One,
    All,
}

/// How a connection ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum How {
    /// Both ends see a reset, and what is in flight is lost (Unix sockets: they see the end).
    Reset,
    /// Both ends see the end of the stream, behind what was in flight.
    Close,
}

/// What goes wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Action {
    /// Connections end; new ones are refused for so long after it.
    Cut(Scope, How, Duration),
    /// The receiver of one direction sees the end; the other direction goes on.
    HalfClose,
    /// One direction stands still for so long.
    Delay(Duration),
    /// So many bytes a second, for so long.
    Throttle(Scope, u64, Duration),
    /// Nothing moves, and nobody is told; for ever without a time.
    Freeze(Scope, Option<Duration>),
    /// Another connection says what this one said first, and stays for so long.
    Duplicate(Duration),
    /// One bit of the next byte.
    Flip,
    /// The first connections arrive in another order than they were made.
    Reorder,
    /// SIGKILL.
    Kill(Side),
    /// SIGSTOP, and SIGCONT after so long; without a time when the other side has come to rest.
    Stop(Side, Option<Duration>),
    /// `migrate-pause`.
    Pause(Side),
    /// New connections are refused for so long.
    Refuse(Duration),
}

impl Action {
    pub(crate) const KINDS: [&str; 14] = [
        "cut",
        "delay",
        "duplicate",
        "flip",
        "freeze",
        "freeze for ever",
        "half-close",
        "kill destination",
        "kill source",
        "migrate-pause",
        "refuse",
        "reorder",
        "stop",
        "throttle",
    ];

    /// Its name in the summary.
    pub(crate) fn kind(&self) -> &'static str {
        match self {
            Action::Cut(..) => "cut",
            Action::HalfClose => "half-close",
            Action::Delay(_) => "delay",
            Action::Throttle(..) => "throttle",
            Action::Freeze(_, Some(_)) => "freeze",
            Action::Freeze(_, None) => "freeze for ever",
            Action::Duplicate(_) => "duplicate",
            Action::Flip => "flip",
            Action::Reorder => "reorder",
            Action::Kill(Side::Source) => "kill source",
            Action::Kill(Side::Destination) => "kill destination",
            Action::Stop(..) => "stop",
            Action::Pause(_) => "migrate-pause",
            Action::Refuse(_) => "refuse",
        }
    }

    /// Whether it is the link that fails, and not a side, and nobody asked for it.
    pub(crate) fn is_of_link(&self) -> bool {
        !matches!(self, Action::Kill(_) | Action::Stop(..) | Action::Pause(_))
    }

    fn draw(dice: &mut Dice, scene: &Scene) -> Action {
        let scope = dice.one_of(&[Scope::One, Scope::All]);
        let how = dice.one_of(&[How::Reset, How::Close]);
        let some_time = dice.millis(1, 150);
        let outage = if dice.one_in(3) { some_time } else { Duration::ZERO };
        let side = dice.one_of(&Side::BOTH);
        let rate = dice.one_of(&[1 << 18, 1 << 20, 1 << 22]);
        let cut = Action::Cut(scope, how, outage);
        dice.weighted(&[
            (8, cut),
            (3, Action::HalfClose),
            (2, Action::Delay(some_time)),
            (2, Action::Throttle(scope, rate, some_time)),
            (3, Action::Freeze(scope, Some(some_time))),
            (2, Action::Freeze(scope, None)),
            (3, Action::Duplicate(some_time)),
            (3, Action::Flip),
            (2, if scene.channels > 0 { Action::Reorder } else { cut }),
            (2, Action::Kill(side)),
            (2, Action::Stop(side, Some(some_time))),
            (1, Action::Stop(side, None)),
            (3, if scene.way.is_postcopy() { Action::Pause(side) } else { cut }),
            (2, Action::Refuse(some_time)),
        ])
    }
}

/// One thing that goes wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Fault {
    pub(crate) trigger: Trigger,
    pub(crate) action: Action,
}

impl Fault {
    pub(super) fn draw(dice: &mut Dice, scene: &Scene) -> Fault {
        let action = Action::draw(dice, scene);
        let trigger = Trigger::draw(dice, scene);
        let trigger = match action {
            // Before anybody has connected.
            Action::Reorder => Trigger::Time(Duration::ZERO),
            Action::Refuse(_) if dice.one_in(2) => Trigger::Time(Duration::ZERO),
            // There has to be a byte whose bit can be changed, and where nothing protects it, one
            // that is not a guest's page.
            Action::Flip => flip_at(dice, scene, trigger),
            _ => trigger,
        };
        Fault { trigger, action }
    }
}

fn flip_at(dice: &mut Dice, scene: &Scene, drawn: Trigger) -> Trigger {
    /// The first message of a multifd channel, and the header behind it.
    const HEADERS: u64 = 96;
    match drawn {
        Trigger::Byte(Channel::Multifd(number), direction, at) if !scene.tls => {
            Trigger::Byte(Channel::Multifd(number), direction, at % HEADERS)
        }
        // The first word of a record.
        Trigger::Byte(Channel::Urgent, direction, at) if !scene.tls => {
            Trigger::Byte(Channel::Urgent, direction, at % 8)
        }
        Trigger::Byte(..) | Trigger::Mark(..) => drawn,
        Trigger::Status(..) | Trigger::Time(_) => {
            Trigger::Byte(Channel::Main, Direction::Forth, dice.below(scene.memory))
        }
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} at {:?}", self.action, self.trigger)
    }
}
