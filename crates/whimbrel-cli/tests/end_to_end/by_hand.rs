//! A postcopy that is paused, and goes on because QMP says how.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::Duration;

use serde_json::json;
use whimbrel_control::ClientError;

use crate::process::{LIMIT, Running, SMALL, VmProcess, until};

/// So slow that 16 MiB take 8 s.
const SLOW: u64 = 2 << 20;

/// Nobody goes on by himself.
const BY_HAND: &str = "--auto-recover=off";

/// Two VMs in the middle of a postcopy.
fn in_postcopy(preempt: bool, what: &str) -> (VmProcess, VmProcess) {
    let options = [&SMALL[..], &[BY_HAND]].concat();
    let mut from = VmProcess::source(&options);
    let mut to = VmProcess::start(&[&options[..], &["--incoming=defer"]].concat());
    for side in [&mut from, &mut to] {
        side.switch_on(&["return-path", "postcopy-ram"]);
        side.qmp.set_capability_named("postcopy-preempt", preempt).expect("allowed");
    }
    limit(&mut from, SLOW);
    let address = to.listen("tcp:127.0.0.1:0");
    from.qmp.migrate(&address).expect("it starts");
    from.qmp.migrate_start_postcopy().expect("it is allowed");
    from.reaches("postcopy-active", what);
    to.reaches("postcopy-active", what);
    (from, to)
}

fn limit(from: &mut VmProcess, rate: u64) {
    let limits = json!({ "max-bandwidth": rate, "max-postcopy-bandwidth": rate });
    from.qmp.set_parameters(limits).expect("allowed");
}

/// Has the destination wait once more; gives where it does.
fn wait_again(to: &mut VmProcess, uri: &str) -> String {
    to.qmp.migrate_recover(uri).expect("it is paused");
    let report = to.qmp.query_migrate().expect("a report");
    match report.raw["socket-address"][0]["port"].as_str() {
        Some(port) if uri.starts_with("tcp:") => format!("tcp:127.0.0.1:{port}"),
        _ => uri.to_owned(),
    }
}

/// Whatever goes on from here goes on well.
fn expect_arrives(mut from: VmProcess, mut to: VmProcess, what: &str) {
    limit(&mut from, 0);
    from.reaches("completed", what);
    to.reaches("completed", what);
    to.expect_healthy(what);
    from.quit(what);
    to.quit(what);
}

fn expect_event(side: &mut VmProcess, status: &str, what: &str) {
    until(&format!("{what}: the event {status}"), || {
        let event = side.qmp.next_event(LIMIT).expect("events").expect("one of them");
        event.migration_status().is_some_and(|now| now.name() == status)
    });
}

fn refusal<T: std::fmt::Debug>(outcome: Result<T, ClientError>, what: &str) -> String {
    match outcome.expect_err(what) {
        ClientError::Refused { desc, .. } => {
            assert!(!desc.contains('\n'), "{what}: {desc}");
            desc
        }
        other => panic!("{what}: {other}"),
    }
}

#[test]
fn either_side_pauses_and_both_go_on_where_they_are_told() {
    let folder = crate::process::folder();
    let socket = format!("unix:{}", folder.path().join("again").display());
    for preempt in [false, true] {
        let what = format!("by hand, preempt {preempt}");
        let (mut from, mut to) = in_postcopy(preempt, &what);
        for (at_source, uri) in
            [(true, "tcp:127.0.0.1:0"), (false, "tcp:127.0.0.1:0"), (true, &*socket)]
        {
            let side = if at_source { &mut from } else { &mut to };
            side.qmp.migrate_pause().expect("it is in postcopy");
            from.reaches("postcopy-paused", &what);
            to.reaches("postcopy-paused", &what);
            assert_eq!(from.run_state(), "postmigrate", "{what}");
            assert_eq!(to.run_state(), "running", "{what}");
            let address = wait_again(&mut to, uri);
            from.qmp.migrate_resume(&address).expect("it is paused");
            from.reaches("postcopy-active", &what);
            to.reaches("postcopy-active", &what);
        }
        expect_arrives(from, to, &what);
    }
}

#[test]
fn what_cannot_be_now_is_refused_and_harms_nothing() {
    let what = "wrong states";
    let (mut from, mut to) = in_postcopy(true, what);
    for side in [&mut from, &mut to] {
        let why = refusal(side.qmp.migrate_recover("tcp:127.0.0.1:0"), "nothing is paused");
        assert!(why.contains("when postcopy is paused"), "{why}");
        let why = refusal(side.qmp.migrate_resume("tcp:127.0.0.1:1"), "nothing is paused");
        assert!(why.contains("no paused migration"), "{why}");
    }
    from.qmp.migrate_pause().expect("it is in postcopy");
    from.reaches("postcopy-paused", what);
    to.reaches("postcopy-paused", what);

    refusal(from.qmp.migrate_recover("tcp:127.0.0.1:0"), "it is the source");
    refusal(to.qmp.migrate_resume("tcp:127.0.0.1:1"), "it is the destination");
    refusal(from.qmp.migrate("tcp:127.0.0.1:1"), "another migration");
    refusal(to.qmp.migrate_incoming("tcp:127.0.0.1:0"), "another migration");
    refusal(from.qmp.migrate_cancel(), "nothing can be undone");
    refusal(from.qmp.cont(), "the guest is there");
    for side in [&mut from, &mut to] {
        refusal(side.qmp.migrate_pause(), "it is paused already");
    }
    refusal(to.qmp.migrate_recover("tcp:127.0.0.1"), "no address");
    refusal(from.qmp.migrate_resume("tcp:127.0.0.1"), "no address");

    // Nobody listens there: it is told why, and asked again.
    from.qmp.migrate_resume("tcp:127.0.0.1:1").expect("it is paused");
    until("the reason", || {
        let report = from.qmp.query_migrate().expect("a report");
        let why = report.raw["error-desc"].as_str().unwrap_or_default().to_owned();
        report.status.name() == "postcopy-paused" && why.contains("127.0.0.1:1")
    });

    let address = wait_again(&mut to, "tcp:127.0.0.1:0");
    // Who knows nothing of it learns nothing, and is in nobody's way.
    let place = address.trim_start_matches("tcp:");
    let _silent = TcpStream::connect(place).expect("it waits there");
    let mut stranger = TcpStream::connect(place).expect("it waits there");
    stranger.write_all(b"QEVM\0\0\0\x03 and so on").expect("it takes that");
    stranger.set_read_timeout(Some(LIMIT)).expect("a time");
    let mut heard = Vec::new();
    // The end may come as a reset: what it sent was not all read.
    let _ = stranger.read_to_end(&mut heard);
    assert_eq!(heard, b"");
    assert_eq!(to.status(), "postcopy-paused");

    from.qmp.migrate_resume(&address).expect("it is paused");
    from.reaches("postcopy-active", what);
    to.reaches("postcopy-active", what);
    expect_arrives(from, to, what);
}

/// Two migrations are paused, and the source of one is sent to the destination of the other.
#[test]
fn another_migration_is_refused_and_both_go_on() {
    let (mut from, mut to) = in_postcopy(true, "one");
    let (mut other_from, mut other_to) = in_postcopy(true, "another");
    for side in [&mut from, &mut other_from] {
        side.qmp.migrate_pause().expect("it is in postcopy");
    }
    for side in [&mut from, &mut to, &mut other_from, &mut other_to] {
        side.reaches("postcopy-paused", "both");
    }
    let address = wait_again(&mut to, "tcp:127.0.0.1:0");
    let before = other_from.qmp.query_migrate().expect("a report").raw["error-desc"].clone();
    other_from.qmp.migrate_resume(&address).expect("it is paused");
    until("a refusal", || {
        let report = other_from.qmp.query_migrate().expect("a report");
        report.status.name() == "postcopy-paused" && report.raw["error-desc"] != before
    });
    assert_eq!(to.status(), "postcopy-paused");
    for (from, to, address) in [(&mut from, &mut to, address), {
        let address = wait_again(&mut other_to, "tcp:127.0.0.1:0");
        (&mut other_from, &mut other_to, address)
    }] {
        from.qmp.migrate_resume(&address).expect("it is paused");
        from.reaches("postcopy-active", &address);
        to.reaches("postcopy-active", &address);
    }
    expect_arrives(from, to, "one");
    expect_arrives(other_from, other_to, "another");
}

/// Whimbrels that are told not to reconnect by themselves, and somebody who drives both.
#[test]
fn migrate_has_both_sides_go_on() {
    let what = "migrate, by hand";
    let options = [&SMALL[..], &[BY_HAND]].concat();
    let mut from = VmProcess::source(&options);
    let mut to = VmProcess::start(&[&options[..], &["--incoming=defer"]].concat());
    let (a, b) = (from.qmp.endpoint().to_string(), to.qmp.endpoint().to_string());
    let command = ["migrate", &a, &b, "--postcopy", "--postcopy-after=0", "--bandwidth=2M"];
    for side in [&mut from, &mut to] {
        side.switch_on(&["events"]);
    }
    let driving = Running::start(&command);
    for at_source in [true, false, true] {
        from.reaches("postcopy-active", what);
        to.reaches("postcopy-active", what);
        std::thread::sleep(Duration::from_millis(100));
        let side = if at_source { &mut from } else { &mut to };
        side.qmp.migrate_pause().expect("it is in postcopy");
        // It may be over before anybody asks.
        for status in ["postcopy-paused", "postcopy-active"] {
            expect_event(side, status, what);
        }
    }
    from.reaches("postcopy-active", what);
    to.reaches("postcopy-active", what);
    limit(&mut from, 0);
    driving.ended(what).expect_success(what);
    to.expect_healthy(what);
    from.quit(what);
    to.quit(what);
}
