//! Many clients, slow ones and silent ones: none is in the way of another, or of a migration.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::json;
use whimbrel::{Capability, Event, MigrationStatus};
use whimbrel_control::{
    Backend, Client, ClientError, Endpoint, Server, ServerError, ServerOptions,
};

use crate::fake::{Fake, Served, threads};
use crate::raw::Raw;

/// Waits until `condition` holds.
fn eventually(what: &str, condition: impl Fn() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(10);
    while !condition() {
        assert!(Instant::now() < deadline, "{what}");
        thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn events_reach_all_who_negotiated_in_their_order() {
    let served = Served::new();
    let mut silent = Raw::connect(&served.path());
    silent.line();
    let mut clients: Vec<Raw> = (0..3).map(|_| Raw::negotiated(&served.path())).collect();

    served.fake.emit(&Event::Migration(MigrationStatus::Setup));
    served.fake.enable(Capability::Events);
    served.fake.emit(&Event::Migration(MigrationStatus::Active));
    for pass in 1..=100 {
        served.fake.emit(&Event::MigrationPass(pass));
    }
    served.fake.emit(&Event::Stop);
    served.fake.emit(&Event::Resume);

    for client in &mut clients {
        let first = client.value();
        assert_eq!(
            (&first["event"], &first["data"]),
            (&json!("MIGRATION"), &json!({"status": "active"}))
        );
        assert!(first["timestamp"]["seconds"].as_u64().unwrap() > 1_600_000_000);
        assert!(first["timestamp"]["microseconds"].as_u64().unwrap() < 1_000_000);
        for pass in 1..=100 {
            assert_eq!(client.value()["data"], json!({"pass": pass}));
        }
        let stop = client.value();
        assert_eq!((&stop["event"], stop.get("data")), (&json!("STOP"), None));
        assert_eq!(client.value()["event"], "RESUME");
    }
    let reply = silent.ask(r#"{"execute":"qmp_capabilities"}"#);
    assert_eq!(reply, r#"{"return":{}}"#, "events before the negotiation are not kept");
}

#[test]
fn the_event_of_a_command_comes_before_its_reply() {
    let served = Served::new();
    let mut raw = Raw::negotiated(&served.path());
    raw.send(r#"{"execute":"stop"}{"execute":"cont","id":2}"#);
    assert_eq!(raw.value()["event"], "STOP");
    assert_eq!(raw.line(), r#"{"return":{}}"#);
    assert_eq!(raw.value()["event"], "RESUME");
    assert_eq!(raw.line(), r#"{"id":2,"return":{}}"#);
}

/// A thread emits events without a pause, one client is in a command that takes long, another
/// reads nothing: queries of a third are answered at once all the same.
#[test]
fn queries_are_quick_whatever_the_others_do() {
    let served = Served::new();
    served.fake.enable(Capability::Events);
    *served.fake.stop_takes.lock().unwrap() = Duration::from_secs(2);
    let mut stuck = Raw::negotiated(&served.path());
    stuck.send(r#"{"execute":"stop"}"#);
    let _deaf = Raw::negotiated(&served.path());
    let mut client = Client::connect(served.endpoint.clone(), Duration::from_secs(5)).unwrap();
    client.migrate("tcp:nowhere:1").unwrap();

    let over = Arc::new(AtomicBool::new(false));
    let noise = thread::Builder::new().spawn({
        let (fake, over) = (Arc::clone(&served.fake), Arc::clone(&over));
        move || {
            let mut pass = 0;
            while !over.load(Ordering::Acquire) {
                pass += 1;
                fake.emit(&Event::MigrationPass(pass));
                thread::sleep(Duration::from_micros(200));
            }
            pass
        }
    });
    let mut worst = Duration::ZERO;
    let began = Instant::now();
    for _ in 0..100 {
        let asked = Instant::now();
        let report = client.query_migrate().unwrap();
        worst = worst.max(asked.elapsed());
        assert_eq!(report.status.name(), "active");
    }
    let all = began.elapsed();
    over.store(true, Ordering::Release);
    let passes = noise.unwrap().join().unwrap();
    assert!(passes > 0);
    assert!(all < Duration::from_secs(20), "100 queries took {all:?}, the worst {worst:?}");
    assert!(worst < Duration::from_secs(5), "the worst of 100 queries took {worst:?}");
}

/// A command takes long, others wait for their turn behind it: what may overtake them is answered
/// at once, and all others in their order.
#[test]
fn what_may_overtake_does_and_all_else_keeps_its_order() {
    let served = Served::new();
    let held = served.fake.hold_stop();
    let mut raw = Raw::out_of_band(&served.path());
    raw.send(r#"{"execute":"stop","id":1}{"execute":"nope","id":2}nonsense"#);
    raw.send("\n");
    raw.send(r#"{"execute":"query-name","id":3}{"exec-oob":"migrate-pause","id":4}"#);
    raw.send(r#"{"exec-oob":"query-name","id":5}"#);
    assert_eq!(raw.line(), r#"{"id":4,"return":{}}"#);
    assert_eq!(raw.value()["id"], 5);
    assert_eq!(served.fake.calls(), ["migrate-pause"]);
    drop(held);
    assert_eq!(raw.value()["event"], "STOP");
    assert_eq!(raw.line(), r#"{"id":1,"return":{}}"#);
    assert_eq!(raw.value()["id"], 2);
    assert_eq!(raw.value()["error"]["class"], "GenericError");
    assert_eq!(raw.line(), r#"{"id":3,"return":{"name":"fake"}}"#);
}

/// As many commands wait as may: what comes behind them is read when there is room, and then
/// overtakes what is left.
#[test]
fn who_has_too_many_commands_waiting_is_not_listened_to() {
    let served = Served::new();
    let held = served.fake.hold_stop();
    let mut raw = Raw::out_of_band(&served.path());
    raw.send(r#"{"execute":"stop"}"#);
    raw.send(&r#"{"execute":"query-name"}"#.repeat(7));
    raw.send(r#"{"exec-oob":"migrate-pause","id":4}"#);
    raw.stream.set_read_timeout(Some(Duration::from_millis(200))).unwrap();
    let silence = raw.stream.read(&mut [0; 1]).unwrap_err();
    assert_eq!(silence.kind(), std::io::ErrorKind::WouldBlock);
    assert_eq!(served.fake.calls(), [""; 0]);
    raw.stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    drop(held);
    let replies: Vec<_> = (0..10).map(|_| raw.value()).collect();
    assert_eq!(replies.iter().filter(|reply| reply["return"]["name"] == "fake").count(), 7);
    assert_eq!(replies.iter().filter(|reply| reply["id"] == 4).count(), 1);
    assert_eq!(served.fake.calls(), ["migrate-pause"]);
}

/// With commands that overtake too: whoever closes its side gets what it asked for, and whoever
/// goes is not missed.
#[test]
fn a_client_whose_commands_wait_may_close_its_side_or_go() {
    let served = Served::new();
    let held = served.fake.hold_stop();
    let mut raw = Raw::out_of_band(&served.path());
    raw.send(
        r#"{"execute":"stop","id":1}{"execute":"query-name","id":2}{"execute":"quit","id":3}"#,
    );
    raw.stream.shutdown(std::net::Shutdown::Write).unwrap();
    let mut gone = Raw::out_of_band(&served.path());
    gone.send(r#"{"execute":"stop"}{"execute":"migrate_cancel"}"#);
    served.fake.wait_stops(2);
    drop(gone);
    drop(held);
    let lines: Vec<_> = std::iter::from_fn(|| {
        let line = raw.line();
        (!line.is_empty()).then_some(line)
    })
    .filter(|line| line.contains("\"id\""))
    .collect();
    let expected = [
        r#"{"id":1,"return":{}}"#,
        r#"{"id":2,"return":{"name":"fake"}}"#,
        r#"{"id":3,"return":{}}"#,
    ];
    assert_eq!(lines, expected);
    assert!(served.fake.quit.load(Ordering::Acquire));
    eventually("its threads end", || threads("qmp/order-").is_empty());
}

#[test]
fn who_does_not_read_events_is_disconnected_and_holds_up_nobody() {
    let served = Served::new();
    served.fake.enable(Capability::Events);
    let mut deaf = Raw::negotiated(&served.path());
    let mut client = Client::connect(served.endpoint.clone(), Duration::from_secs(5)).unwrap();
    let began = Instant::now();
    let mut seen = 0;
    for pass in 1..=20_000_u64 {
        served.fake.emit(&Event::MigrationPass(pass));
        while seen < pass && pass % 100 == 0 {
            let event = client.next_event(Duration::from_secs(5)).unwrap().unwrap();
            seen += 1;
            assert_eq!(event.data, json!({"pass": seen}));
        }
    }
    let took = began.elapsed();
    assert!(took < Duration::from_secs(60), "20000 events took {took:?}");
    served.wait_report("does not read its events");
    let mut rest = Vec::new();
    deaf.stream.read_to_end(&mut rest).unwrap();
    assert!(rest.len() < 2 << 20, "{} bytes were kept for a client that reads none", rest.len());
    assert_eq!(client.query_status().unwrap().status, "running");
}

#[test]
fn who_does_not_read_replies_waits_for_itself() {
    let served = Served::new();
    let mut raw = Raw::negotiated(&served.path());
    raw.stream.set_write_timeout(Some(Duration::from_millis(300))).unwrap();
    let request = format!("{}\n", json!({"execute": "query-migrate-parameters"})).repeat(100);
    let mut written = 0;
    let blocked = loop {
        match raw.stream.write(request.as_bytes()) {
            Ok(count) => written += count,
            Err(error) => break error,
        }
        assert!(written < 16 << 20, "requests are taken without end");
    };
    assert_eq!(blocked.kind(), std::io::ErrorKind::WouldBlock);
    let mut other = Raw::negotiated(&served.path());
    assert_eq!(other.ask(r#"{"execute":"query-name"}"#), r#"{"return":{"name":"fake"}}"#);
    let each = format!("{}\n", json!({"execute": "query-migrate-parameters"})).len();
    for _ in 0..written / each {
        assert!(raw.value()["return"]["max-bandwidth"].is_u64());
    }
}

#[test]
fn one_client_too_many_is_told_so() {
    let options = ServerOptions { max_clients: 2, ..ServerOptions::default() };
    let served = Served::with(options);
    let connect = || Client::connect(served.endpoint.clone(), Duration::from_secs(5));
    let first = connect().unwrap();
    let mut second = connect().unwrap();
    let error = connect().unwrap_err();
    assert!(matches!(error, ClientError::Refused { .. }), "{error}");
    assert!(error.to_string().contains("too many clients: at most 2 are served"), "{error}");
    served.wait_report("a client was refused");
    assert!(second.query_status().unwrap().running);
    drop(first);
    eventually("a place is free again", || connect().is_ok());
}

#[test]
fn who_does_not_negotiate_makes_room_and_who_does_keeps_its_place() {
    let options = ServerOptions {
        max_clients: 2,
        negotiation_limit: Duration::from_millis(50),
        ..ServerOptions::default()
    };
    let served = Served::with(options);
    let mut first = Raw::negotiated(&served.path());
    let mut silent = Raw::connect(&served.path());
    assert!(silent.line().contains("QMP"));
    thread::sleep(Duration::from_millis(100));
    let mut next = Raw::negotiated(&served.path());
    assert_eq!(silent.line(), "", "it has been disconnected");
    served.wait_report("it did not negotiate");
    for client in [&mut first, &mut next] {
        assert_eq!(client.ask(r#"{"execute":"query-name"}"#), r#"{"return":{"name":"fake"}}"#);
    }
    let error = Client::connect(served.endpoint.clone(), Duration::from_secs(5)).unwrap_err();
    assert!(error.to_string().contains("too many clients"), "{error}");
}

/// A page that a browser shows can have it send a request here, with a body of its own. None of it is
/// executed.
#[test]
fn who_does_not_begin_with_qmp_is_disconnected() {
    let served = Served::new();
    let mut browser = Raw::connect(&served.path());
    assert!(browser.line().contains("QMP"));
    browser.send("POST / HTTP/1.1\r\nHost: localhost\r\n\r\n{\"execute\":\"qmp_capabilities\"}");
    // The answer may be lost with the connection.
    let _ = browser.stream.write_all(b"{\"execute\":\"stop\"}\n");
    served.wait_report("it does not speak QMP");
    let mut rest = Vec::new();
    let _ = browser.stream.read_to_end(&mut rest);
    let rest = String::from_utf8_lossy(&rest);
    assert!(!rest.contains("return"), "{rest}");
    assert_eq!(
        Raw::negotiated(&served.path()).ask(r#"{"execute":"query-name"}"#),
        r#"{"return":{"name":"fake"}}"#
    );
    assert!(served.fake.settings.lock().unwrap().run_state == whimbrel::RunState::Running);
}

#[test]
fn a_server_that_is_open_to_others_says_so() {
    let lines = Arc::new(std::sync::Mutex::new(Vec::new()));
    let options = ServerOptions {
        report: Arc::new({
            let lines = lines.clone();
            move |line: &str| lines.lock().unwrap().push(line.to_owned())
        }),
        ..ServerOptions::default()
    };
    let bind = |place: &str| {
        let backend = Arc::new(Fake::default()) as Arc<dyn Backend>;
        drop(Server::bind_with(place.parse().unwrap(), backend, options.clone()).unwrap());
    };
    bind("tcp::0");
    bind("tcp:127.0.0.1:0");
    assert_eq!(*lines.lock().unwrap(), [""; 0]);
    bind("tcp:0.0.0.0:0");
    let lines = lines.lock().unwrap();
    assert!(
        lines.len() == 1 && lines[0].contains("whoever connects controls this VM"),
        "{lines:?}"
    );
}

#[test]
fn nothing_is_left_of_a_server_that_is_dropped() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("qmp");
    let fake = Arc::new(Fake::default());
    let backend = Arc::clone(&fake) as Arc<dyn Backend>;
    let server = Server::bind(Endpoint::Unix(path.clone()), backend).unwrap();
    assert_eq!(fake.listeners(), 1);
    let mut clients: Vec<UnixStream> =
        (0..4).map(|_| UnixStream::connect(&path).unwrap()).collect();
    for client in &mut clients {
        assert_eq!(client.read(&mut [0; 16]).unwrap(), 16);
    }
    // Listing tasks while other tests' come and go may miss some.
    eventually("a thread per client, named", || threads("qmp/client-").len() >= 4);
    drop(server);
    assert!(!path.exists());
    assert_eq!(fake.listeners(), 0);
    assert_eq!(Arc::strong_count(&fake), 1, "no thread holds the backend");
    for mut client in clients {
        let mut rest = Vec::new();
        client.read_to_end(&mut rest).unwrap();
    }
}

#[test]
fn a_place_in_use_is_one_clear_line() {
    let served = Served::new();
    let again = |endpoint: &Endpoint| {
        let backend = Arc::new(Fake::default()) as Arc<dyn Backend>;
        Server::bind(endpoint.clone(), backend).unwrap_err()
    };
    let error = again(&served.endpoint);
    assert!(matches!(error, ServerError::InUse(_)), "{error}");
    assert!(error.to_string().contains("address in use"), "{error}");
    assert!(!error.to_string().contains('\n'));
    assert!(fs::exists(served.path()).unwrap());

    let backend = Arc::new(Fake::default()) as Arc<dyn Backend>;
    let tcp = Server::bind("tcp:127.0.0.1:0".parse().unwrap(), backend).unwrap();
    assert!(matches!(again(tcp.endpoint()), ServerError::InUse(_)));
    let mut client = Client::connect(tcp.endpoint().clone(), Duration::from_secs(5)).unwrap();
    assert!(client.query_status().unwrap().running);

    let missing = again(&Endpoint::Unix("/nonexistent/qmp".into()));
    assert!(missing.to_string().contains("unix:/nonexistent/qmp"), "{missing}");
}
