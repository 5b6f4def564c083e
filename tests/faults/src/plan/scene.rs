//! The migration that is disturbed.

use std::fmt;

use crate::dice::Dice;
use crate::only::Only;

use super::{Channel, Direction};

/// How the guest goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Way {
    Precopy,
    Postcopy,
    Preempt,
    /// Precopy on several channels.
    Multifd,
    /// Several channels, then postcopy with one for urgent pages.
    MultifdPreempt,
}

impl Way {
    pub(crate) const ALL: [Way; 5] =
        [Way::Precopy, Way::Postcopy, Way::Preempt, Way::Multifd, Way::MultifdPreempt];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Way::Precopy => "precopy",
            Way::Postcopy => "postcopy",
            Way::Preempt => "preempt",
            Way::Multifd => "multifd",
            Way::MultifdPreempt => "multifd-preempt",
        }
    }

    pub(crate) fn is_postcopy(self) -> bool {
        matches!(self, Way::Postcopy | Way::Preempt | Way::MultifdPreempt)
    }

    pub(crate) fn is_preempt(self) -> bool {
        matches!(self, Way::Preempt | Way::MultifdPreempt)
    }

    pub(crate) fn is_multifd(self) -> bool {
        matches!(self, Way::Multifd | Way::MultifdPreempt)
    }
}

/// What lies between the two.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Transport {
    Tcp,
    Unix,
}

/// When a postcopy begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Begin {
    AtOnce,
    /// When half of the memory has been sent.
    Halfway,
    /// When all of it has been sent once.
    FirstPass,
}

/// One migration and its guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Scene {
    pub(crate) way: Way,
    pub(crate) begin: Begin,
    pub(crate) tls: bool,
    /// The guest's memory lies in huge pages.
    pub(crate) huge: bool,
    pub(crate) transport: Transport,
    /// The guest stands still on arrival, so that every page of it can be compared.
    pub(crate) paused: bool,
    /// Multifd channels; 0 without.
    pub(crate) channels: u8,
    pub(crate) compression: &'static str,
    /// Bytes.
    pub(crate) memory: u64,
    /// As `whimbrel vm --workload` takes it.
    pub(crate) workload: String,
    /// What the rest of memory holds.
    pub(crate) fill: &'static str,
    /// Bytes a second; 0 is as fast as it goes.
    pub(crate) bandwidth: u64,
    /// Milliseconds.
    pub(crate) downtime_limit: u64,
    /// What is lost in postcopy waits for somebody to resume it.
    pub(crate) by_hand: bool,
}

impl Scene {
    pub(super) fn draw(dice: &mut Dice, only: Only) -> Scene {
        let way = dice.weighted(&[
            (3, Way::Precopy),
            (3, Way::Postcopy),
            (4, Way::Preempt),
            (3, Way::Multifd),
            (3, Way::MultifdPreempt),
        ]);
        let way = only.way.unwrap_or(way);
        let begin =
            dice.weighted(&[(2, Begin::AtOnce), (2, Begin::Halfway), (1, Begin::FirstPass)]);
        let tls = dice.one_in(4) || only.tls;
        let huge = dice.one_in(6) || only.huge;
        let transport = dice.one_of(&[Transport::Tcp, Transport::Tcp, Transport::Unix]);
        let paused = dice.one_in(3);
        let channels = dice.one_of(&[1, 2, 3, 4]);
        let compression = dice.one_of(&["none", "none", "zlib", "zstd", "auto"]);
        let memory = dice.one_of(&[8u64, 8, 16]) << 20;
        let kind = dice.one_of(&["uniform", "uniform", "hot-cold", "sequential", "zipf"]);
        let rate = dice.one_of(&[500, 2000, 6000]);
        let working_set = dice.one_of(&["512k", "1M", "2M"]);
        let seed = dice.below(1 << 32);
        Scene {
            way,
            begin,
            tls,
            huge,
            transport: only.transport.unwrap_or(transport),
            paused,
            channels: if way.is_multifd() { channels } else { 0 },
            compression,
            memory,
            workload: format!("{kind},rate={rate},working-set={working_set},seed={seed}"),
            fill: dice.one_of(&["random", "random", "zero"]),
            // In postcopy slow enough for something to happen in it.
            bandwidth: match way.is_postcopy() {
                true => dice.one_of(&[0, 16, 32, 32, 64]) << 20,
                false => dice.one_of(&[0, 32, 64, 128]) << 20,
            },
            downtime_limit: dice.one_of(&[5, 30, 300]),
            by_hand: dice.one_in(8) && way.is_postcopy(),
        }
    }

    /// About how many bytes a channel carries: where to look for a place at which to fail.
    pub(crate) fn bytes_on(&self, channel: Channel, direction: Direction) -> u64 {
        let words = if self.tls { 4 << 10 } else { 64 };
        let content = match self.fill {
            "zero" => 2 << 20,
            _ => self.memory,
        };
        match (channel, direction) {
            (Channel::Main, Direction::Back) if self.way.is_postcopy() => words + (4 << 10),
            (_, Direction::Back) => words,
            (Channel::Main, Direction::Forth) if self.way == Way::Multifd => 8 << 10,
            (Channel::Main, Direction::Forth) => content,
            (Channel::Multifd(_), Direction::Forth) => content / u64::from(self.channels),
            (Channel::Urgent, Direction::Forth) => 512 << 10,
        }
    }

    pub(crate) fn has(&self, channel: Channel) -> bool {
        match channel {
            Channel::Main => true,
            Channel::Multifd(number) => number < self.channels,
            Channel::Urgent => self.way.is_preempt(),
        }
    }
}

impl fmt::Display for Scene {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.way.name())?;
        if self.way.is_postcopy() {
            write!(f, " ({:?})", self.begin)?;
        }
        if self.channels > 0 {
            write!(f, ", {} channels, {}", self.channels, self.compression)?;
        }
        let word = |on, word| if on { word } else { "" };
        let transport = match self.transport {
            Transport::Tcp => "tcp",
            Transport::Unix => "unix",
        };
        write!(
            f,
            ", {transport}{}{}{}, {} MiB, {}, fill {}, {} MiB/s, downtime {} ms{}",
            word(self.tls, ", tls"),
            word(self.huge, ", huge pages"),
            word(self.paused, ", paused on arrival"),
            self.memory >> 20,
            self.workload,
            self.fill,
            self.bandwidth >> 20,
            self.downtime_limit,
            word(self.by_hand, ", recovered by hand"),
        )
    }
}
