//! How many channels carry pages, and how they are packed: `whimbrel restore`.

use clap::{Args, ValueEnum};
use whimbrel::kept::Multifd;
use whimbrel::{MultifdCompression, ZeroPageDetection};

/// The destination has capability 'multifd' on.
#[derive(Debug, Args)]
pub(crate) struct MultifdOptions {
    /// Send pages on so many connections: the destination's 'multifd-channels' (0: on one)
    #[arg(long, default_value_t = 0, value_name = "N", conflicts_with = "postcopy")]
    multifd: u8,
    /// With --multifd: the destination's 'multifd-compression'; auto is for zstd, as far as it helps
    #[arg(long, default_value = "none", requires = "multifd", value_name = "METHOD")]
    compression: Compression,
    /// With --compression: 0 to 9 for zlib, 0 to 20 for zstd
    #[arg(long, requires = "compression", value_name = "LEVEL")]
    level: Option<u8>,
    /// With --multifd: how pages of zeros are told of, instead of as the machine type has it
    #[arg(long, requires = "multifd", value_name = "HOW")]
    zero_page_detection: Option<Zeros>,
    /// With --multifd: the destination's UUID, if it is not the one that was kept
    #[arg(long, requires = "multifd", value_parser = parse_uuid, value_name = "UUID")]
    uuid: Option<[u8; 16]>,
}

/// `multifd-compression`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Compression {
    /// Pages as they are
    None,
    /// By zlib
    Zlib,
    /// By zstd
    Zstd,
    /// By zstd where and as far as it makes the migration faster
    Auto,
}

impl From<Compression> for MultifdCompression {
    fn from(compression: Compression) -> MultifdCompression {
        match compression {
            Compression::None => MultifdCompression::None,
            Compression::Zlib => MultifdCompression::Zlib,
            Compression::Zstd => MultifdCompression::Zstd,
            Compression::Auto => MultifdCompression::Auto,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Zeros {
    /// Not at all: every page goes with its content
    None,
    /// On the main channel
    Legacy,
    /// On the channel that would have carried them
    Multifd,
}

fn parse_uuid(text: &str) -> Result<[u8; 16], String> {
    let digits: String = text.chars().filter(|digit| *digit != '-').collect();
    u128::from_str_radix(&digits, 16)
        .ok()
        .filter(|_| digits.len() == 32)
        .map(u128::to_be_bytes)
        .ok_or_else(|| "expected a UUID: 32 hexadecimal digits, with or without hyphens".into())
}

impl MultifdOptions {
    /// What was asked for; `None` for a single channel.
    pub(crate) fn to_multifd(&self) -> Option<Multifd> {
        if self.multifd == 0 {
            return None;
        }
        Some(Multifd {
            compression: self.compression.into(),
            level: self.level,
            zero_page_detection: self.zero_page_detection.map(|how| match how {
                Zeros::None => ZeroPageDetection::None,
                Zeros::Legacy => ZeroPageDetection::Legacy,
                Zeros::Multifd => ZeroPageDetection::Multifd,
            }),
            uuid: self.uuid,
            ..Multifd::new(self.multifd)
        })
    }
}
