//! Who moves the guest to whom, and how.

use std::fmt;

use clap::ValueEnum;

use crate::bench::network::Link;

/// What runs at one end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Engine {
    Qemu,
    Whimbrel,
}

/// A pair of contenders, by the first letters of source and destination.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum Pair {
    /// QEMU to QEMU
    Qq,
    /// whimbrel to whimbrel: two reference VMs
    Ww,
    /// whimbrel to QEMU: a QEMU guest kept in a file, served by `whimbrel restore`
    Wq,
    /// QEMU to whimbrel: `whimbrel receive`, which touches the pages at random
    Qw,
}

impl Pair {
    pub(super) fn name(self, qemu_version: &str) -> String {
        match self {
            Self::Qq => format!("QEMU {qemu_version}"),
            Self::Ww => "whimbrel".to_owned(),
            Self::Wq => format!("whimbrel to QEMU {qemu_version}"),
            Self::Qw => format!("QEMU {qemu_version} to whimbrel"),
        }
    }

    /// Whether it needs the whimbrel command.
    pub(super) fn has_whimbrel(self) -> bool {
        self != Self::Qq
    }
}

/// The host pages of the guest's memory, on both sides.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, ValueEnum)]
pub(in crate::bench) enum Pages {
    #[value(name = "4k")]
    Small,
    #[value(name = "2M")]
    Huge,
}

impl Pages {
    /// As `whimbrel` takes it.
    pub(in crate::bench) fn name(self) -> &'static str {
        match self {
            Self::Small => "4k",
            Self::Huge => "2M",
        }
    }

    /// How long each is.
    pub(super) fn bytes(self) -> u32 {
        match self {
            Self::Small => 4 << 10,
            Self::Huge => 2 << 20,
        }
    }
}

/// One channel, or a second one for urgent pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum Mode {
    Plain,
    Preempt,
    /// As the one before, with two multifd channels that go on in postcopy: between whimbrels.
    Multifd,
}

impl Mode {
    /// What both sides must have on.
    pub(super) fn capabilities(self) -> &'static [&'static str] {
        match self {
            Self::Plain => &["events", "return-path", "postcopy-ram"],
            Self::Preempt => &["events", "return-path", "postcopy-ram", "postcopy-preempt"],
            Self::Multifd => {
                &["events", "return-path", "postcopy-ram", "postcopy-preempt", "multifd"]
            }
        }
    }

    /// Whether `pair` has what it takes.
    pub(super) fn is_for(self, pair: Pair) -> bool {
        self != Self::Multifd || pair == Pair::Ww
    }
}

/// What all contenders do in turn.
#[derive(Debug, Clone, Copy)]
pub(super) struct Scenario {
    pub(super) link: Link,
    pub(super) pages: Pages,
    pub(super) mode: Mode,
}

impl fmt::Display for Scenario {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mode = match self.mode {
            Mode::Plain => "plain",
            Mode::Preempt => "preempt",
            Mode::Multifd => "preempt and multifd",
        };
        write!(formatter, "{}, {}, {mode}", self.link, self.pages.name())
    }
}
