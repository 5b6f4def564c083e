//! What a peer says of its migration and of its guest, whatever its version.

use std::fmt;

use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};
use whimbrel::{MigrationInfo, MigrationStats, MigrationStatus};

/// A migration's state as a peer tells it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PeerStatus {
    /// One that whimbrel has too.
    Known(MigrationStatus),
    /// Another, such as QEMU's `failing` or `wait-unplug`.
    Other(String),
}

impl PeerStatus {
    fn from_name(name: &str) -> PeerStatus {
        match MigrationStatus::deserialize(&Value::from(name)) {
            Ok(status) => PeerStatus::Known(status),
            Err(_) => PeerStatus::Other(name.into()),
        }
    }

    /// QMP's name.
    pub fn name(&self) -> &str {
        match self {
            PeerStatus::Known(status) => status.name(),
            PeerStatus::Other(name) => name,
        }
    }

    /// Whether the guest has left the source and part of its RAM has not. A recovery is part of it.
    pub fn is_postcopy(&self) -> bool {
        match self {
            PeerStatus::Known(status) => status.is_postcopy(),
            PeerStatus::Other(name) => name.starts_with("postcopy-"),
        }
    }

    /// Whether a migration is under way. One in a state unknown here is: all states without a
    /// migration are known.
    pub fn is_running(&self) -> bool {
        match self {
            PeerStatus::Known(status) => status.is_running(),
            PeerStatus::Other(_) => true,
        }
    }
}

impl fmt::Display for PeerStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A peer's answer to `query-migrate`.
#[derive(Clone, Debug, PartialEq)]
pub struct MigrationReport {
    /// The state; `none` if the peer names none.
    pub status: PeerStatus,
    /// All that whimbrel knows too. A field that the peer leaves out or means differently is as
    /// in a report without it.
    pub info: MigrationInfo,
    /// The answer itself.
    pub raw: Value,
}

impl MigrationReport {
    pub(super) fn new(raw: Value) -> MigrationReport {
        let status = match raw.get("status").and_then(Value::as_str) {
            Some(name) => PeerStatus::from_name(name),
            None => PeerStatus::Known(MigrationStatus::None),
        };
        let mut info: MigrationInfo = known_members(&raw);
        if let Some(ram) = raw.get("ram") {
            info.ram = Some(known_members::<MigrationStats>(ram));
        }
        MigrationReport { status, info, raw }
    }
}

/// Reads those members of an object that `T` can take, each for itself: a value of a newer kind
/// costs its own field only.
fn known_members<T: DeserializeOwned + Default>(object: &Value) -> T {
    let members = object.as_object().cloned().unwrap_or_default();
    let taken: Map<String, Value> = members
        .into_iter()
        .filter(|(name, value)| {
            let alone = Map::from_iter([(name.clone(), value.clone())]);
            serde_json::from_value::<T>(Value::Object(alone)).is_ok()
        })
        .collect();
    serde_json::from_value(Value::Object(taken)).unwrap_or_default()
}

/// A peer's answer to `query-status`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct PeerRunState {
    /// The guest's state, such as `running` or `postmigrate`.
    pub status: String,
    /// Whether it runs.
    pub running: bool,
}

/// An event of a peer's.
#[derive(Clone, Debug, PartialEq)]
pub struct PeerEvent {
    /// Its name, such as `MIGRATION`.
    pub name: String,
    /// What comes with it; `null` if nothing does.
    pub data: Value,
    /// When it happened by the peer's clock, in whole seconds since 1970.
    pub seconds: u64,
    /// And microseconds.
    pub microseconds: u32,
}

impl PeerEvent {
    /// Reads a message that is an event.
    pub(super) fn from_message(mut message: Value) -> Option<PeerEvent> {
        let name = message.get("event")?.as_str()?.to_owned();
        let stamp = |name| message.get("timestamp")?.get(name)?.as_u64();
        let seconds = stamp("seconds").unwrap_or(0);
        let microseconds = stamp("microseconds").and_then(|n| n.try_into().ok()).unwrap_or(0);
        let data = message.get_mut("data").map(Value::take).unwrap_or_default();
        Some(PeerEvent { name, data, seconds, microseconds })
    }

    /// The state that a `MIGRATION` event tells.
    pub fn migration_status(&self) -> Option<PeerStatus> {
        let status = self.data.get("status")?.as_str()?;
        (self.name == "MIGRATION").then(|| PeerStatus::from_name(status))
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn an_answer_of_qemus_is_read_as_far_as_it_is_known() {
        let raw = json!({
            "status": "postcopy-recover", "total-time": 160, "expected-downtime": -1,
            "remaining": 5, "postcopy-latency-dist": [1, 2],
            "socket-address": [{"port": "1", "ipv4": true, "host": "::", "type": "inet"},
                               {"type": "vsock", "cid": "3", "port": "1"}],
            "ram": {"total": 134_217_728_u64, "mbps": 2.5, "skipped": 0, "normal": -3,
                    "transferred": 7},
        });
        let report = MigrationReport::new(raw.clone());
        assert_eq!(report.status, PeerStatus::Known(MigrationStatus::PostcopyRecover));
        assert!(report.status.is_running() && report.status.is_postcopy());
        assert_eq!(report.info.total_time, Some(160));
        assert_eq!((report.info.expected_downtime, report.info.socket_address), (None, None));
        assert_eq!(report.info.postcopy_latency_dist, Some(vec![1, 2]));
        let ram = report.info.ram.unwrap();
        assert_eq!((ram.total, ram.mbps, ram.transferred, ram.normal), (134_217_728, 2.5, 7, 0));
        assert_eq!(report.raw, raw);
    }

    #[test]
    fn a_destination_in_postcopy_is_read() {
        // As QEMU 11.1 told it, but for the lengths of the lists.
        let report = MigrationReport::new(json!({
            "status": "postcopy-active", "postcopy-blocktime": 12, "postcopy-latency": 30_123,
            "postcopy-vcpu-blocktime": [12, 14], "postcopy-vcpu-latency": [30_000, 40_000],
            "postcopy-non-vcpu-latency": 0,
        }));
        assert_eq!(report.status, PeerStatus::Known(MigrationStatus::PostcopyActive));
        assert!(report.status.is_postcopy());
        let info = report.info;
        assert_eq!((info.postcopy_blocktime, info.postcopy_latency), (Some(12), Some(30_123)));
        assert_eq!(info.postcopy_vcpu_blocktime, Some(vec![12, 14]));
        assert_eq!((info.faults, info.answers), (None, None));
        for name in ["active", "completed", "wait-unplug"] {
            assert!(!MigrationReport::new(json!({ "status": name })).status.is_postcopy());
        }
    }

    #[test]
    fn before_any_migration_the_state_is_none() {
        let report = MigrationReport::new(json!({}));
        assert_eq!(report.status, PeerStatus::Known(MigrationStatus::None));
        assert_eq!(report.info, MigrationInfo::default());
    }
}
