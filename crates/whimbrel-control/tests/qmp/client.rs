//! The client, against peers that play a part: late, silent, talkative, or no QMP at all.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use rustix::net::{self, AddressFamily, SocketAddrUnix, SocketType};
use serde_json::{Value, json};
use whimbrel_control::{Client, ClientError, Endpoint};

const GREETING: &str = r#"{"QMP": {"version": {"qemu": {"micro": 2, "minor": 0, "major": 10}, "package": ""}, "capabilities": ["oob"]}}"#;
const SHORT: Duration = Duration::from_millis(100);
const LONG: Duration = Duration::from_secs(10);

/// A peer for one client.
struct Peer {
    endpoint: Endpoint,
    thread: Option<JoinHandle<()>>,
    _dir: tempfile::TempDir,
}

impl Peer {
    fn new(part: impl FnOnce(&mut Line) + Send + 'static) -> Peer {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("qmp");
        let listener = UnixListener::bind(&path).unwrap();
        let thread = thread::Builder::new().name("peer".into()).spawn(move || {
            let (stream, _) = listener.accept().unwrap();
            part(&mut Line { reader: BufReader::new(stream.try_clone().unwrap()), stream });
        });
        Peer { endpoint: Endpoint::Unix(path), thread: Some(thread.unwrap()), _dir: dir }
    }

    /// A peer that has greeted and negotiated.
    fn negotiated(part: impl FnOnce(&mut Line) + Send + 'static) -> Peer {
        Peer::new(|line| {
            line.say(GREETING);
            let id = line.hear("qmp_capabilities");
            line.answer(&id, json!({}));
            part(line);
        })
    }

    fn end(mut self) {
        self.thread.take().unwrap().join().unwrap();
    }
}

/// The peer's end.
struct Line {
    stream: UnixStream,
    reader: BufReader<UnixStream>,
}

impl Line {
    fn say(&mut self, text: &str) {
        self.stream.write_all(format!("{text}\r\n").as_bytes()).unwrap();
    }

    /// Hears a command, and returns its id.
    fn hear(&mut self, command: &str) -> Value {
        self.hear_by("execute", command)
    }

    fn hear_by(&mut self, how: &str, command: &str) -> Value {
        let mut line = String::new();
        self.reader.read_line(&mut line).unwrap();
        let request: Value = serde_json::from_str(&line).unwrap();
        assert_eq!(request[how], command);
        request["id"].clone()
    }

    fn answer(&mut self, id: &Value, value: Value) {
        self.say(&json!({"return": value, "id": id}).to_string());
    }

    fn event(&mut self, name: &str, data: Value) {
        let stamp = json!({"seconds": 7, "microseconds": 8});
        self.say(&json!({"event": name, "data": data, "timestamp": stamp}).to_string());
    }

    fn wait_end(&mut self) {
        self.reader.read_line(&mut String::new()).unwrap();
    }
}

#[test]
fn events_between_replies_are_kept_in_order() {
    let peer = Peer::negotiated(|line| {
        line.event("A", json!(1));
        let id = line.hear("query-status");
        line.event("MIGRATION", json!({"status": "postcopy-active"}));
        line.answer(&id, json!({"status": "running", "running": true, "singlestep": false}));
        line.event("B", json!(2));
        line.wait_end();
    });
    let mut client = Client::connect(peer.endpoint.clone(), LONG).unwrap();
    assert_eq!(client.version()["qemu"]["major"], 10);
    assert!(client.query_status().unwrap().running);
    assert_eq!(client.wait_event("B", LONG).unwrap().data, json!(2));
    let first = client.next_event(LONG).unwrap().unwrap();
    assert_eq!((first.name.as_str(), first.seconds, first.microseconds), ("A", 7, 8));
    let second = client.next_event(LONG).unwrap().unwrap();
    assert_eq!(second.migration_status().unwrap().name(), "postcopy-active");
    assert_eq!(client.next_event(SHORT).unwrap(), None);
    let error = client.wait_event("C", SHORT).unwrap_err();
    assert!(error.to_string().ends_with("no event C within 100 ms"), "{error}");
    drop(client);
    peer.end();
}

/// The peer does not answer a command: those that may overtake it are sent as such, where the peer
/// has said that they may.
#[test]
fn what_may_overtake_is_sent_so_where_the_peer_allows_it() {
    let peer = Peer::negotiated(|line| {
        let late = line.hear("query-migrate");
        for command in ["migrate-pause", "migrate-recover", "yank"] {
            let id = line.hear_by("exec-oob", command);
            line.answer(&id, json!({}));
        }
        let id = line.hear("migrate");
        line.answer(&late, json!({"status": "postcopy-paused"}));
        line.answer(&id, json!({}));
        line.wait_end();
    });
    let mut client = Client::connect(peer.endpoint.clone(), SHORT).unwrap();
    assert!(matches!(client.query_migrate(), Err(ClientError::TimedOut { .. })));
    client.migrate_pause().unwrap();
    client.migrate_recover("tcp:127.0.0.1:0").unwrap();
    client.yank_migration().unwrap();
    client.migrate_resume("tcp:127.0.0.1:1").unwrap();
    drop(client);
    peer.end();

    let peer = Peer::new(|line| {
        line.say(&GREETING.replace("\"oob\"", ""));
        for command in ["qmp_capabilities", "migrate-pause"] {
            let id = line.hear(command);
            line.answer(&id, json!({}));
        }
    });
    Client::connect(peer.endpoint.clone(), LONG).unwrap().migrate_pause().unwrap();
    peer.end();
}

#[test]
fn a_reply_that_comes_too_late_is_not_taken_for_another() {
    let peer = Peer::negotiated(|line| {
        let late = line.hear("stop");
        let id = line.hear("query-migrate");
        line.answer(&late, json!({"status": "late"}));
        line.answer(&id, json!({"status": "failing", "error-desc": "x"}));
        line.wait_end();
    });
    let mut client = Client::connect(peer.endpoint.clone(), SHORT).unwrap();
    let error = client.stop().unwrap_err();
    assert!(matches!(error, ClientError::TimedOut { .. }) && !error.is_disconnect(), "{error}");
    let report = client.query_migrate().unwrap();
    assert_eq!((report.status.name(), report.info.error_desc.unwrap()), ("failing", "x".into()));
    drop(client);
    peer.end();
}

#[test]
fn who_is_silent_is_waited_for_no_longer_than_was_said() {
    let peer = Peer::new(Line::wait_end);
    let began = Instant::now();
    let error = Client::connect(peer.endpoint.clone(), SHORT).unwrap_err();
    assert!(matches!(error, ClientError::TimedOut { .. }), "{error}");
    assert!(began.elapsed() < LONG / 2);
    peer.end();
}

#[test]
fn who_never_stops_talking_is_not_listened_to_for_ever() {
    let peer = Peer::negotiated(|line| {
        line.hear("query-status");
        let chatter = json!({"return": {}, "id": "of another"}).to_string() + "\n";
        while line.stream.write_all(chatter.as_bytes()).is_ok() {}
    });
    let mut client = Client::connect(peer.endpoint.clone(), SHORT).unwrap();
    let began = Instant::now();
    let error = client.query_status().unwrap_err();
    assert!(matches!(error, ClientError::TimedOut { .. }), "{error}");
    assert!(began.elapsed() < LONG / 2);
    drop(client);
    peer.end();
}

#[test]
fn what_is_no_qmp_is_shown() {
    for (greeting, shown) in [("SSH-2.0-OpenSSH_9.2", "JSON parse error"), ("[1]", "[1]")] {
        let peer = Peer::new(move |line| {
            line.say(greeting);
            line.wait_end();
        });
        let error = Client::connect(peer.endpoint.clone(), LONG).unwrap_err();
        assert!(matches!(error, ClientError::NotQmp { .. }), "{error}");
        let text = error.to_string();
        assert!(
            text.contains(shown) && text.contains("greeting") && !text.contains('\n'),
            "{text}"
        );
        peer.end();
    }
}

#[test]
fn a_peer_that_goes_is_named_with_what_was_awaited() {
    let peer = Peer::negotiated(|line| {
        line.hear("cont");
    });
    let mut client = Client::connect(peer.endpoint.clone(), LONG).unwrap();
    let error = client.cont().unwrap_err();
    assert!(matches!(error, ClientError::Closed { .. }) && error.is_disconnect(), "{error}");
    let expected = format!("{}: disconnected while waiting for reply to cont", peer.endpoint);
    assert_eq!(error.to_string(), expected);
    peer.end();

    let peer = Peer::negotiated(|line| {
        line.hear("quit");
    });
    Client::connect(peer.endpoint.clone(), LONG).unwrap().quit().unwrap();
    peer.end();
}

#[test]
fn where_nobody_listens_is_told_at_once() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("qmp");
    let error = Client::connect(Endpoint::Unix(path.clone()), LONG).unwrap_err();
    let expected = format!("cannot connect to the QMP socket unix:{}: ", path.display());
    assert!(error.to_string().starts_with(&expected), "{error}");
    let too_long = Endpoint::Unix("x".repeat(200).into());
    assert!(matches!(Client::connect(too_long, LONG), Err(ClientError::Connect { .. })));
}

/// A listener that accepts nobody: its backlog fills, and from then on the kernel lets nobody
/// connect. The client gives up in time all the same.
#[test]
fn a_listener_whose_backlog_is_full_is_not_waited_for_for_ever() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("qmp");
    let listener = net::socket(AddressFamily::UNIX, SocketType::STREAM, None).unwrap();
    net::bind(&listener, &SocketAddrUnix::new(&path).unwrap()).unwrap();
    net::listen(&listener, 1).unwrap();
    let connect = || Client::connect(Endpoint::Unix(path.clone()), SHORT).unwrap_err();
    let errors: Vec<ClientError> = (0..3).map(|_| connect()).collect();
    // A place in the backlog stays taken though the client has gone.
    assert!(matches!(errors[0], ClientError::TimedOut { .. }), "{:?}", errors[0]);
    assert!(matches!(errors[2], ClientError::Connect { .. }), "{:?}", errors[2]);
    assert!(errors[2].to_string().contains("timed out"), "{}", errors[2]);
}
