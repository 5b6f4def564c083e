//! The protocol, over real Unix sockets: what is sent, and what comes back.

use std::io::Write;
use std::sync::atomic::Ordering;
use std::time::Duration;

use serde_json::{Value, json};
use whimbrel::{AnswerStats, Capability, FaultStats, Latency, MigrationInfo, MigrationStatus};
use whimbrel_control::Client;

use crate::fake::Served;
use crate::raw::Raw;
use crate::refusals;

#[test]
fn the_greeting_has_the_shape_qemus_clients_want() {
    let served = Served::new();
    let greeting = Raw::connect(&served.path()).value();
    let qmp = &greeting["QMP"];
    for part in ["major", "minor", "micro"] {
        assert!(qmp["version"]["qemu"][part].is_u64(), "{greeting}");
    }
    assert!(qmp["version"]["package"].as_str().unwrap().starts_with("whimbrel "), "{greeting}");
    assert_eq!(qmp["capabilities"], json!(["oob"]));
}

#[test]
fn nothing_is_executed_before_the_negotiation() {
    let served = Served::new();
    let mut raw = Raw::connect(&served.path());
    raw.line();
    let expected = "Expecting capabilities negotiation with 'qmp_capabilities'";
    for command in ["stop", "quit", "bogus", "x-whimbrel-checksum"] {
        let (class, desc) = raw.refused(&format!("{{\"execute\":\"{command}\"}}"));
        assert_eq!((class.as_str(), desc.as_str()), ("CommandNotFound", expected));
    }
    assert!(!served.fake.quit.load(Ordering::Acquire));
    raw.refused(r#"{"execute":"qmp_capabilities","arguments":{"enable":["oob","bogus"]}}"#);
    raw.refused(r#"{"exec-oob":"qmp_capabilities"}"#);
    assert_eq!(raw.ask(r#"{"execute":"qmp_capabilities","id":1}"#), r#"{"id":1,"return":{}}"#);
    let (class, desc) = raw.refused(r#"{"execute":"qmp_capabilities"}"#);
    let expected = "Capabilities negotiation is already complete, command ignored";
    assert_eq!((class.as_str(), desc.as_str()), ("CommandNotFound", expected));
}

#[test]
fn ids_of_any_kind_come_back() {
    let served = Served::new();
    let mut raw = Raw::negotiated(&served.path());
    for id in [json!(1), json!("x"), json!(null), json!({"a": [1, null, 2.5]})] {
        raw.send(&json!({"execute": "query-status", "id": id}).to_string());
        let reply = raw.value();
        assert_eq!(reply["id"], id);
        assert_eq!(reply["return"], json!({"status": "running", "running": true}));
        raw.send(&json!({"execute": "bogus", "id": id}).to_string());
        let reply = raw.value();
        assert_eq!(reply["id"], id);
        assert_eq!(reply["error"]["class"], "CommandNotFound");
    }
}

#[test]
fn requests_split_glued_and_spread_over_lines_are_answered_in_order() {
    let served = Served::new();
    let mut raw = Raw::negotiated(&served.path());
    raw.send(
        "{\"execute\":\"query-status\",\"id\":1}{\"execute\"\n\n:\r\n \"query-status\"\n,\"id\":2}",
    );
    raw.send(" {\"execute\":\"que");
    std::thread::sleep(Duration::from_millis(20));
    raw.send("ry-status\",\"id\":3}");
    for id in 1..=3 {
        assert_eq!(raw.value()["id"], id);
    }
}

#[test]
fn garbage_costs_its_line_and_nothing_else() {
    let served = Served::new();
    let mut raw = Raw::negotiated(&served.path());
    for garbage in [
        "nonsense",
        "}}}}",
        "{\"execute\":\"stop\",}",
        "{\"execute\":\"stop\",\"execute\":\"cont\"}",
        "GET / HTTP/1.1",
        "{\"execute\":\"st",
        &"[".repeat(1000),
        &format!("{{\"execute\":\"{}\"}}", "x".repeat(100_000)),
        &format!("{{\"a\":{}{}}}", "[".repeat(60), "]".repeat(60)),
    ] {
        let (class, desc) = raw.refused(garbage);
        assert_eq!(class, "GenericError", "{desc}");
        assert_eq!(raw.ask(r#"{"execute":"query-name"}"#), r#"{"return":{"name":"fake"}}"#);
    }
    assert!(raw.refused(&"x".repeat(70_000)).1.contains("at most 65536 bytes"));
    raw.stream.shutdown(std::net::Shutdown::Write).unwrap();
    assert_eq!(raw.line(), "");
}

#[test]
fn a_client_that_closes_its_side_still_gets_its_replies() {
    let served = Served::new();
    let mut raw = Raw::connect(&served.path());
    raw.send(
        "{\"execute\":\"qmp_capabilities\"}{\"execute\":\"query-name\"}{\"execute\":\"quit\"}",
    );
    raw.stream.shutdown(std::net::Shutdown::Write).unwrap();
    let lines: Vec<Value> = (0..5).map(|_| raw.value()).collect();
    assert_eq!(lines[2]["return"]["name"], "fake");
    assert_eq!(lines[3]["event"], "SHUTDOWN");
    assert_eq!(lines[4]["return"], json!({}));
    assert_eq!(raw.line(), "");
    assert!(served.fake.quit.load(Ordering::Acquire));
}

#[test]
fn commands_reach_the_backend_as_they_were_given() {
    let served = Served::new();
    let mut raw = Raw::negotiated(&served.path());
    let channel = |addr: Value| json!([{"channel-type": "main", "addr": addr}]);
    served.fake.settings.lock().unwrap().info.status = Some(MigrationStatus::PostcopyPaused);
    let requests = [
        ("migrate", json!({"uri": "tcp:[::1]:5", "resume": true})),
        ("migrate-recover", json!({"uri": "unix:/run/again"})),
        (
            "migrate-recover",
            json!({"channels": channel(
                json!({"transport": "socket", "type": "inet", "host": "", "port": "0"})
            )}),
        ),
        ("migrate", json!({"uri": "tcp:h:1", "resume": false})),
        ("migrate", json!({"uri": "tcp:[::1]:4444", "detach": true})),
        ("migrate", json!({"uri": "unix:/run/m", "channels": []})),
        (
            "migrate",
            json!({"channels": channel(
                json!({"transport": "socket", "type": "inet", "host": "::1", "port": "7"})
            )}),
        ),
        (
            "migrate",
            json!({"channels": channel(json!({"transport": "exec", "args": ["cat", "x"]}))}),
        ),
        (
            "migrate-incoming",
            json!({"channels": channel(
                json!({"transport": "file", "filename": "/f", "offset": 4096})
            )}),
        ),
        ("migrate-incoming", json!({"uri": "fd:7", "exit-on-error": false})),
        ("migrate-continue", json!({"state": "pre-switchover"})),
        ("migrate-start-postcopy", json!({})),
        ("migrate-pause", json!({})),
        ("migrate_cancel", json!({})),
    ];
    for (command, arguments) in requests {
        raw.send(&json!({"execute": command, "arguments": arguments}).to_string());
        assert_eq!(raw.line(), r#"{"return":{}}"#, "{command} {arguments}");
    }
    let expected = [
        "migrate tcp:[::1]:5 resume",
        "migrate-recover unix:/run/again",
        "migrate-recover tcp::0",
        "migrate tcp:h:1",
        "migrate tcp:[::1]:4444",
        "migrate unix:/run/m",
        "migrate tcp:[::1]:7",
        "migrate exec:cat x",
        "migrate-incoming file:/f,offset=4096 true",
        "migrate-incoming fd:7 false",
        "migrate-continue pre-switchover",
        "migrate-start-postcopy",
        "migrate-pause",
        "migrate_cancel",
    ];
    assert_eq!(served.fake.calls(), expected);
    for command in ["migrate-start-postcopy", "migrate-pause"] {
        raw.refused(&json!({"execute": command, "arguments": {"now": true}}).to_string());
    }
    assert_eq!(served.fake.calls().len(), expected.len());
}

#[test]
fn settings_are_set_in_whole_or_not_at_all() {
    let served = Served::new();
    let mut raw = Raw::negotiated(&served.path());
    let set = |name: &str, state: bool| json!({"capability": name, "state": state});
    let capabilities = |list: Value| {
        json!({"execute": "migrate-set-capabilities", "arguments": {"capabilities": list}})
            .to_string()
    };
    assert_eq!(raw.ask(&capabilities(json!([set("events", true)]))), r#"{"return":{}}"#);
    raw.refused(&capabilities(json!([set("xbzrle", true), set("bogus", true)])));
    raw.send(r#"{"execute":"query-migrate-capabilities"}"#);
    let listed = raw.value()["return"].as_array().unwrap().clone();
    assert_eq!(listed.len(), Capability::ALL.len());
    let on: Vec<&Value> = listed.iter().filter(|entry| entry["state"] == json!(true)).collect();
    assert_eq!(on, [&json!({"capability": "events", "state": true})]);

    let parameters = |changes: Value| {
        json!({"execute": "migrate-set-parameters", "arguments": changes}).to_string()
    };
    assert_eq!(raw.ask(&parameters(json!({"max-bandwidth": 5}))), r#"{"return":{}}"#);
    raw.refused(&parameters(json!({"downtime-limit": 9, "max-cpu-throttle": 3})));
    raw.refused(&parameters(json!({"downtime-limit": 9, "bogus": 3})));
    raw.send(r#"{"execute":"query-migrate-parameters"}"#);
    let listed = raw.value()["return"].clone();
    assert_eq!((&listed["max-bandwidth"], &listed["downtime-limit"]), (&json!(5), &json!(300)));
}

#[test]
fn what_the_backend_adds_is_known_and_listed() {
    let served = Served::new();
    let mut raw = Raw::negotiated(&served.path());
    let reply = raw.ask(r#"{"execute":"x-whimbrel-checksum","arguments":{"block":"ram"}}"#);
    assert_eq!(reply, r#"{"return":{"over":{"block":"ram"}}}"#);
    raw.send(r#"{"execute":"query-commands"}"#);
    let commands = raw.value()["return"].clone();
    for name in ["x-whimbrel-checksum", "quit", "qmp_capabilities", "migrate_cancel"] {
        let entry = json!({"name": name});
        assert!(commands.as_array().unwrap().contains(&entry), "{name}: {commands}");
    }
}

#[test]
fn query_migrate_is_empty_before_and_full_during_a_migration() {
    let served = Served::new();
    let mut raw = Raw::negotiated(&served.path());
    assert_eq!(raw.ask(r#"{"execute":"query-migrate"}"#), r#"{"return":{}}"#);
    raw.ask(r#"{"execute":"migrate","arguments":{"uri":"tcp:h:1"}}"#);
    raw.send(r#"{"execute":"query-migrate"}"#);
    let info = raw.value()["return"].clone();
    assert_eq!(info["status"], MigrationStatus::Active.name());
    assert_eq!(info["ram"]["total"], 1 << 30);
}

#[test]
fn a_migration_can_be_yanked_while_there_is_one() {
    let served = Served::new();
    let mut raw = Raw::negotiated(&served.path());
    let yank = r#"{"execute":"yank","arguments":{"instances":[{"type":"migration"}]}}"#;
    assert_eq!(raw.ask(r#"{"execute":"query-yank"}"#), r#"{"return":[]}"#);
    assert_eq!(raw.refused(yank), ("DeviceNotFound".into(), "Instance not found".into()));
    raw.ask(r#"{"execute":"migrate","arguments":{"uri":"tcp:h:1"}}"#);
    assert_eq!(raw.ask(r#"{"execute":"query-yank"}"#), r#"{"return":[{"type":"migration"}]}"#);
    raw.refused(
        r#"{"execute":"yank","arguments":{"instances":[{"type":"migration"},{"type":"chardev","id":"c"}]}}"#,
    );
    assert_eq!(raw.ask(r#"{"execute":"yank","arguments":{"instances":[]}}"#), r#"{"return":{}}"#);
    assert_eq!(served.fake.calls(), ["migrate tcp:h:1"], "nothing has been yanked so far");
    assert_eq!(raw.ask(yank), r#"{"return":{}}"#);
    assert_eq!(served.fake.calls(), ["migrate tcp:h:1", "yank"]);
    served.fake.settings.lock().unwrap().info.status = Some(MigrationStatus::Failed);
    raw.refused(yank);
}

#[test]
fn a_report_on_postcopy_arrives_whole_at_the_client() {
    let served = Served::new();
    let latency = Latency { mean: 96.5, p50: 80.0, p90: 150.25, p99: 900.0, max: 1200.0 };
    let mut dist = vec![0; 24];
    (dist[6], dist[7]) = (60, 40);
    let info = MigrationInfo {
        status: Some(MigrationStatus::PostcopyActive),
        postcopy_blocktime: Some(3),
        postcopy_vcpu_blocktime: Some(vec![3, 9]),
        postcopy_latency: Some(96_500),
        postcopy_vcpu_latency: Some(vec![96_500, 0]),
        postcopy_non_vcpu_latency: Some(0),
        postcopy_latency_dist: Some(dist),
        faults: Some(FaultStats {
            count: 100,
            latency_us: latency,
            asked_again: 1,
            came_twice: 2,
            ..FaultStats::default()
        }),
        answers: Some(AnswerStats { count: 90, queued_us: latency, already_sent: 10 }),
        ..MigrationInfo::default()
    };
    served.fake.settings.lock().unwrap().info = info.clone();
    let mut client = Client::connect(served.endpoint.clone(), Duration::from_secs(10)).unwrap();
    let report = client.query_migrate().unwrap();
    assert!(report.status.is_postcopy() && report.status.is_running());
    assert_eq!(report.info, info);
    // Under the names that QMP, or its way to name what it does not know, has for them.
    for name in ["postcopy-blocktime", "postcopy-latency-dist", "x-faults", "x-answers"] {
        assert!(!report.raw[name].is_null(), "{name}: {}", report.raw);
    }
    assert_eq!(report.raw["x-faults"]["latency-us"]["p90"], 150.25);
    client.migrate_start_postcopy().unwrap();
    client.migrate_pause().unwrap();
    assert_eq!(served.fake.calls(), ["migrate-start-postcopy", "migrate-pause"]);
}

/// Requests with bytes changed, cut out and put in, from a fixed seed: whatever they are, each
/// client gets replies that are JSON, and the server goes on serving.
#[test]
fn mangled_requests_never_end_the_server() {
    const SEED: u64 = 0x5eed_09a3_b1e5_5c3d;
    let requests: Vec<&str> = refusals::REFUSALS.iter().map(|(request, ..)| *request).collect();
    let served = Served::new();
    let mut state = SEED;
    let mut random = |below: usize| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        usize::try_from(state >> 33).unwrap() % below
    };
    for round in 0..60 {
        let mut raw = Raw::negotiated(&served.path());
        let mut bytes = Vec::new();
        for _ in 0..20 {
            let mut request = requests[random(requests.len())].as_bytes().to_vec();
            for _ in 0..random(4) {
                let place = random(request.len());
                match random(3) {
                    0 => request[place] = u8::try_from(random(256)).unwrap(),
                    1 => drop(request.drain(place..(place + random(9)).min(request.len()))),
                    _ => request.insert(place, b"{}[]\",:\\\n"[random(9)]),
                }
                if request.is_empty() {
                    request.push(b'{');
                }
            }
            bytes.extend(request);
            bytes.push(b'\n');
        }
        raw.stream.write_all(&bytes).unwrap();
        raw.stream.shutdown(std::net::Shutdown::Write).unwrap();
        loop {
            let line = raw.line();
            if line.is_empty() {
                break;
            }
            let reply: Value = serde_json::from_str(&line).unwrap();
            let known = ["return", "error", "event"].iter().any(|name| reply.get(name).is_some());
            assert!(known, "seed {SEED:#x}, round {round}: {line}");
        }
    }
    assert!(Client::connect(served.endpoint.clone(), Duration::from_secs(5)).is_ok());
    assert!(served.reports.lock().unwrap().is_empty());
}
