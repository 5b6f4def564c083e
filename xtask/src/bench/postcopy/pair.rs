//! Who moves the guest to whom, and how.

use std::fmt;

use clap::ValueEnum;

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
pub(super) enum Pages {
    #[value(name = "4k")]
    Small,
    #[value(name = "2M")]
    Huge,
}

impl Pages {
    /// As `whimbrel` takes it.
    pub(super) fn name(self) -> &'static str {
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
}

impl Mode {
    /// What both sides must have on.
    pub(super) fn capabilities(self) -> &'static [&'static str] {
        match self {
            Self::Plain => &["events", "return-path", "postcopy-ram"],
            Self::Preempt => &["events", "return-path", "postcopy-ram", "postcopy-preempt"],
        }
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
        };
        write!(formatter, "{}, {}, {mode}", self.link, self.pages.name())
    }
}

/// How fast the link is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Link {
    pub(super) mbit_per_s: u32,
}

impl Link {
    /// From Gbit/s, such as `2.5`.
    pub(super) fn parse(text: &str) -> Result<Self, String> {
        let wrong =
            || format!("{text:?} is no rate in Gbit/s with up to three decimals, such as 2.5");
        let (whole, decimals) = text.split_once('.').unwrap_or((text, ""));
        if decimals.len() > 3 {
            return Err(wrong());
        }
        let thousandths: u32 = format!("{whole}{decimals:0<3}").parse().map_err(|_| wrong())?;
        match thousandths {
            0 => Err(wrong()),
            mbit_per_s => Ok(Self { mbit_per_s }),
        }
    }
}

impl fmt::Display for Link {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{} Gbit/s", f64::from(self.mbit_per_s) / 1000.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_are_read_and_written() {
        for (text, mbit_per_s, shown) in [
            ("1", 1000, "1 Gbit/s"),
            ("2.5", 2500, "2.5 Gbit/s"),
            ("10", 10_000, "10 Gbit/s"),
            ("0.125", 125, "0.125 Gbit/s"),
        ] {
            let link = Link::parse(text).unwrap();
            assert_eq!(link.mbit_per_s, mbit_per_s);
            assert_eq!(link.to_string(), shown);
        }
        for wrong in ["", "0", "1.2345", "-1", "fast", "1.-1"] {
            assert!(Link::parse(wrong).is_err(), "{wrong}");
        }
    }
}
