//! Where a migration stands, as far as faults are counted by it.

use serde::{Deserialize, Serialize};

/// A part of a migration, in their order.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Phase {
    /// Connecting and announcing.
    #[default]
    Setup,
    /// RAM, while the guest runs at the source.
    Ram,
    /// The guest stands still: the last RAM, and the devices.
    Switchover,
    /// Between the byte that gives the guest away and the answer to it, in precopy.
    HandOver,
    /// The guest runs at the destination, and its RAM follows.
    Postcopy,
    /// The same, and the link is lost.
    Paused,
    /// The link is back, and both sides find out what is missing.
    Recovery,
    /// All is over.
    After,
}

impl Phase {
    pub(crate) const ALL: [Phase; 8] = [
        Phase::Setup,
        Phase::Ram,
        Phase::Switchover,
        Phase::HandOver,
        Phase::Postcopy,
        Phase::Paused,
        Phase::Recovery,
        Phase::After,
    ];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Phase::Setup => "setup",
            Phase::Ram => "RAM",
            Phase::Switchover => "switchover",
            Phase::HandOver => "hand-over",
            Phase::Postcopy => "postcopy",
            Phase::Paused => "paused",
            Phase::Recovery => "recovery",
            Phase::After => "after",
        }
    }

    /// By the state that a source tells.
    pub(crate) fn of_status(status: &str) -> Phase {
        match status {
            "active" => Phase::Ram,
            "pre-switchover" | "device" | "postcopy-device" => Phase::Switchover,
            "postcopy-active" => Phase::Postcopy,
            "postcopy-paused" => Phase::Paused,
            "postcopy-recover-setup" | "postcopy-recover" => Phase::Recovery,
            "completed" | "failed" | "cancelled" | "cancelling" => Phase::After,
            _ => Phase::Setup,
        }
    }

    pub(crate) fn from_number(number: u8) -> Phase {
        Phase::ALL.get(usize::from(number)).copied().unwrap_or_default()
    }

    /// What QMP has told, and what was read along the way: whichever is further. What follows a
    /// broken link is known from QMP alone.
    pub(crate) fn seen(told: Phase, read: Phase) -> Phase {
        if told >= Phase::Paused { told } else { told.max(read) }
    }
}
