//! The client drives a stock QEMU.

use std::time::Duration;

use serde_json::json;
use whimbrel::{Capability, MigrationStatus, SocketAddressInfo};
use whimbrel_control::{Client, ClientError, PeerStatus};

use crate::qemu::Qemu;

const PATIENCE: Duration = Duration::from_secs(30);

/// Waits for the end of a migration in its events, and returns the states it went through.
fn states(client: &mut Client) -> Vec<String> {
    let mut seen = Vec::new();
    loop {
        let event = client.wait_event("MIGRATION", PATIENCE).unwrap();
        let status = event.migration_status().unwrap();
        seen.push(status.name().to_owned());
        if !status.is_running() {
            return seen;
        }
    }
}

#[test]
fn a_guest_moves_between_two_qemus() {
    let Some(source) = Qemu::start(&["-m", "64M", "-S"]) else { return };
    let Some(destination) = Qemu::start(&["-m", "64M", "-incoming", "defer"]) else { return };
    let (mut from, mut to) = (source.client(PATIENCE), destination.client(PATIENCE));
    assert!(from.version()["qemu"]["major"].as_u64().unwrap() >= 7);
    assert_eq!(from.query_migrate().unwrap().status, PeerStatus::Known(MigrationStatus::None));
    assert_eq!(to.query_status().unwrap().status, "inmigrate");

    from.cont().unwrap();
    from.wait_event("RESUME", PATIENCE).unwrap();
    assert!(from.query_status().unwrap().running);
    for client in [&mut from, &mut to] {
        client.set_capability(Capability::Events, true).unwrap();
    }
    from.set_parameters(json!({"max-bandwidth": 1 << 30, "downtime-limit": 500})).unwrap();
    let parameters = from.query_parameters().unwrap();
    assert_eq!(parameters["downtime-limit"], 500);

    to.migrate_incoming("tcp:127.0.0.1:0").unwrap();
    let listening = to.query_migrate().unwrap().info.socket_address.unwrap();
    let [SocketAddressInfo::Inet { host, port }] = listening.as_slice() else {
        panic!("{listening:?}");
    };
    from.migrate(&format!("tcp:{host}:{port}")).unwrap();
    assert_eq!(states(&mut from).last().unwrap(), "completed");
    assert_eq!(states(&mut to).last().unwrap(), "completed");

    let report = from.query_migrate().unwrap();
    assert_eq!(report.status, PeerStatus::Known(MigrationStatus::Completed));
    let ram = report.info.ram.unwrap();
    assert!(ram.total >= 64 << 20 && ram.transferred > 0 && ram.page_size == 4096, "{ram:?}");
    assert!(report.info.total_time.is_some() && report.info.downtime.is_some());
    assert_eq!(from.query_status().unwrap().status, "postmigrate");
    assert!(to.query_status().unwrap().running);
    from.wait_event("STOP", PATIENCE).unwrap();
    from.quit().unwrap();
    to.quit().unwrap();
    source.wait_end(PATIENCE);
    destination.wait_end(PATIENCE);
}

#[test]
fn what_qemu_refuses_is_told_with_where_and_what() {
    let Some(qemu) = Qemu::start(&["-m", "16M"]) else { return };
    let mut client = qemu.client(PATIENCE);
    let error = client.execute("bogus", json!({})).unwrap_err();
    let ClientError::Refused { class, .. } = &error else { panic!("{error}") };
    assert_eq!(class, "CommandNotFound");
    let text = error.to_string();
    for part in [&client.endpoint().to_string(), "bogus", "has not been found"] {
        assert!(text.contains(part), "{text}");
    }
    let error = client.migrate("tcp:127.0.0.1:1");
    // 7.2 and 10.0 differ in whether they connect before they reply.
    assert!(matches!(error, Ok(()) | Err(ClientError::Refused { .. })), "{error:?}");
    assert!(client.query_status().is_ok());

    // QEMU serves one client at a time: the next is not greeted.
    let patience = Duration::from_millis(300);
    let error = Client::connect(qemu.endpoint(), patience).unwrap_err();
    assert!(matches!(error, ClientError::TimedOut { .. }), "{error}");
    assert!(error.to_string().contains("no greeting within 300 ms"), "{error}");
}
