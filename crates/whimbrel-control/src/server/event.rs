//! Events as lines.

use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::{Value, json};
use whimbrel::{Capabilities, Capability, Event};

/// Whether clients get this event: those of a migration's progress only with capability `events`.
pub(super) fn is_wanted(event: &Event, capabilities: impl FnOnce() -> Capabilities) -> bool {
    match event {
        Event::Migration(_) | Event::MigrationPass(_) => capabilities().has(Capability::Events),
        Event::Stop | Event::Resume | Event::ColoExit { .. } => true,
    }
}

/// The line for an event that happens now.
pub(super) fn line(event: &Event) -> Vec<u8> {
    match event {
        Event::Migration(status) => stamped("MIGRATION", Some(json!({ "status": status.name() }))),
        Event::MigrationPass(pass) => stamped("MIGRATION_PASS", Some(json!({ "pass": pass }))),
        Event::Stop => stamped("STOP", None),
        Event::Resume => stamped("RESUME", None),
        Event::ColoExit { mode, reason } => {
            let data = json!({ "mode": mode.name(), "reason": reason.name() });
            stamped("COLO_EXIT", Some(data))
        }
    }
}

/// The line that says that `quit` ends the VMM.
pub(super) fn shutdown_line() -> Vec<u8> {
    stamped("SHUTDOWN", Some(json!({ "guest": false, "reason": "host-qmp-quit" })))
}

fn stamped(name: &str, data: Option<Value>) -> Vec<u8> {
    // A clock set before 1970 is shown as 1970.
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let mut event = json!({
        "event": name,
        "timestamp": { "seconds": now.as_secs(), "microseconds": now.subsec_micros() },
    });
    if let Some(data) = data {
        event["data"] = data;
    }
    let mut line = event.to_string().into_bytes();
    line.push(b'\n');
    line
}
