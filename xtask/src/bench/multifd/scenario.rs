//! What is measured: the scenarios, and within each the ways that the contenders take.

use std::fmt;

use clap::ValueEnum;

use super::content::Content;
use crate::bench::network::Between;

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum Compression {
    None,
    Zlib,
    Zstd,
    /// Whimbrel's own choice, which QEMU does not have
    Auto,
}

impl Compression {
    /// As the parameter `multifd-compression` has it.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Zlib => "zlib",
            Self::Zstd => "zstd",
            Self::Auto => "auto",
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum Tls {
    Off,
    On,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum Guest {
    /// Its memory stays as it is
    Idle,
    /// Writes to pages of a small part of its memory, at a steady rate
    Dirtying,
}

/// The destination's memory before anything arrives.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum Room {
    /// Every page was taken from the host
    Preallocated,
    /// No page was touched
    Untouched,
}

/// What all contenders do in turn.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Scenario {
    pub(super) between: Between,
    pub(super) content: Content,
    pub(super) guest: Guest,
    pub(super) room: Room,
    /// 0: without multifd.
    pub(super) channels: u8,
}

impl fmt::Display for Scenario {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { between, content, guest, room, channels } = self;
        let guest = match guest {
            Guest::Idle => "",
            Guest::Dirtying => ", dirtying",
        };
        let room = match room {
            Room::Preallocated => "",
            Room::Untouched => ", untouched",
        };
        let channels = match channels {
            0 => "no multifd".to_owned(),
            1 => "1 channel".to_owned(),
            more => format!("{more} channels"),
        };
        write!(formatter, "{between}, {}{guest}{room}, {channels}", content.name())
    }
}

/// How the bytes go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Method {
    pub(super) compression: Compression,
    pub(super) tls: Tls,
}

impl Method {
    pub(super) const PLAIN: Self = Self { compression: Compression::None, tls: Tls::Off };
}

impl fmt::Display for Method {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let tls = match self.tls {
            Tls::Off => "",
            Tls::On => ", TLS",
        };
        write!(formatter, "{}{tls}", self.compression.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scenarios_say_what_is_out_of_the_ordinary() {
        let scenario = Scenario {
            between: Between::parse("loopback").unwrap(),
            content: Content::Random,
            guest: Guest::Idle,
            room: Room::Preallocated,
            channels: 1,
        };
        assert_eq!(scenario.to_string(), "loopback, random, 1 channel");
        let scenario = Scenario {
            between: Between::parse("2.5").unwrap(),
            guest: Guest::Dirtying,
            room: Room::Untouched,
            channels: 0,
            ..scenario
        };
        assert_eq!(scenario.to_string(), "2.5 Gbit/s, random, dirtying, untouched, no multifd");
        assert!(Between::parse("fast").unwrap_err().starts_with("loopback, or: \"fast\""));
        assert_eq!(Method::PLAIN.to_string(), "none");
    }
}
