//! The options that say what becomes of a migration whose link breaks in postcopy.

use std::time::Duration;

use clap::{Args, ValueEnum};
use whimbrel::{AutoRecover, Parameters, SettingError};

use crate::recovery::{LIMIT, Plan};

/// What either end of a migration does by itself.
#[derive(Clone, Debug, Default, Args)]
pub(crate) struct RecoverOptions {
    /// Whether a migration whose link breaks in postcopy goes on by itself; auto is for yes with a
    /// whimbrel at the other end, and no with a QEMU (default: auto)
    #[arg(long, value_name = "WHEN")]
    auto_recover: Option<When>,
    /// For how long that is tried, in seconds; 0 is without end (default: 300)
    #[arg(long, value_name = "SECONDS")]
    recover_time_limit: Option<u64>,
    /// Take the link for broken when the other end is silent for so long, in ms: 100 or more; 0 is
    /// never (default: 30000)
    #[arg(long, value_name = "MS")]
    silence_limit: Option<u64>,
}

/// `auto-recover`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum When {
    /// Between whimbrels, which prove that they are of the same migration
    Auto,
    /// Also with a QEMU, which proves nothing
    On,
    /// Never
    Off,
}

impl RecoverOptions {
    /// Puts what was asked for over `parameters`.
    pub(crate) fn apply(&self, parameters: &mut Parameters) {
        if let Some(when) = self.auto_recover {
            parameters.auto_recover = match when {
                When::Auto => AutoRecover::Auto,
                When::On => AutoRecover::On,
                When::Off => AutoRecover::Off,
            };
        }
        if let Some(limit) = self.recover_time_limit {
            parameters.recover_time_limit = limit;
        }
        if let Some(limit) = self.silence_limit {
            parameters.silence_limit = limit;
        }
    }

    /// What was asked for, all else being as usual.
    pub(crate) fn parameters(&self) -> Result<Parameters, SettingError> {
        checked(|parameters| self.apply(parameters))
    }
}

fn checked(apply: impl FnOnce(&mut Parameters)) -> Result<Parameters, SettingError> {
    let mut parameters = Parameters::default();
    apply(&mut parameters);
    parameters.check()?;
    Ok(parameters)
}

/// The same for an end that sends.
#[derive(Clone, Debug, Default, Args)]
pub(crate) struct RecoverOfSource {
    #[command(flatten)]
    both: RecoverOptions,
    /// Another address of the destination, tried in turn with the first when the link is broken
    #[arg(long, value_name = "URI")]
    recover_uri: Option<String>,
}

impl RecoverOfSource {
    /// Puts what was asked for over `parameters`, which have to be checked then.
    pub(crate) fn apply(&self, parameters: &mut Parameters) {
        self.both.apply(parameters);
        if let Some(uri) = &self.recover_uri {
            parameters.recover_uri.clone_from(uri);
        }
    }

    /// What was asked for, all else being as usual.
    pub(crate) fn parameters(&self) -> Result<Parameters, SettingError> {
        checked(|parameters| self.apply(parameters))
    }
}

/// What who drives both ends does about it.
#[derive(Clone, Debug, Default, Args)]
pub(crate) struct RecoverByHand {
    /// When the link breaks in postcopy, have the destination wait at this address (tcp:HOST:0 is any
    /// free port) and the source connect to it. Without this, whimbrels reconnect by themselves,
    /// and of others the destination waits at the same host again
    #[arg(long, requires = "postcopy", value_name = "URI")]
    recover: Option<String>,
    /// Leave a migration alone whose link breaks in postcopy
    #[arg(long, requires = "postcopy", conflicts_with = "recover")]
    no_recover: bool,
    /// Give up to recover after so many seconds, and leave both ends as they are; 0 is never
    #[arg(long, requires = "postcopy", default_value_t = LIMIT.as_secs(), value_name = "SECONDS")]
    recover_time_limit: u64,
}

impl RecoverByHand {
    pub(crate) fn plan(&self) -> Plan {
        let limit = Duration::from_secs(self.recover_time_limit);
        Plan {
            recover: !self.no_recover,
            uri: self.recover.clone(),
            limit: (!limit.is_zero()).then_some(limit),
        }
    }
}
