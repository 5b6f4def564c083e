//! The options that say how a kept VM's file is written or read, shared by `receive` and `restore`.

use std::num::NonZeroU8;

use clap::{Args, ValueEnum};
use whimbrel::kept::{Access, DirectIo};

/// How the file is written or read.
#[derive(Clone, Copy, Debug, Args)]
pub(crate) struct FileAccess {
    /// How many threads write or read the file (default: one for each processor, 4 at most)
    #[arg(long, value_name = "N")]
    threads: Option<NonZeroU8>,
    /// Past the page cache (O_DIRECT): off, auto (writing, where the file system can), or on;
    /// without a value: on
    #[arg(
        long,
        value_name = "WHEN",
        num_args = 0..=1,
        require_equals = true,
        default_value = "auto",
        default_missing_value = "on"
    )]
    direct_io: When,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum When {
    Off,
    Auto,
    On,
}

impl FileAccess {
    pub(crate) fn access(self) -> Access {
        let direct = match self.direct_io {
            When::Off => DirectIo::Off,
            When::Auto => DirectIo::Auto,
            When::On => DirectIo::On,
        };
        let threads = self.threads.unwrap_or(Access::default().threads);
        Access { threads, direct }
    }

    /// Whether it is to go past the page cache whatever that costs.
    pub(crate) fn insists_on_direct(self) -> bool {
        matches!(self.direct_io, When::On)
    }
}
