//! QMP: the server of a VM that a client says anything to, and a client that a server answers
//! anything.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::thread;
use std::time::Duration;

use serde_json::Value;
use whimbrel::{
    Address, Capabilities, Capability, Event, MigrationInfo, MigrationStatus, Object, Parameters,
    RunState,
};
use whimbrel_control::{
    Backend, Client, Endpoint, EventListener, ParameterChange, QmpError, Server, ServerOptions,
    Subscription,
};

use crate::asking::text;
use crate::choices::Choices;
use crate::ends::End;
use crate::guest::{Alone, expect_one_line, scratch};

/// How long a session may take that is not to end by itself: longer than any does.
const LIMIT: Duration = Duration::from_secs(20);

/// A VM of which nothing is but what it was told: no command of a client's opens, connects to or
/// runs anything here.
#[derive(Default)]
struct Told {
    inner: Mutex<Inner>,
}

#[derive(Default)]
struct Inner {
    running: bool,
    capabilities: Capabilities,
    parameters: Parameters,
    status: Option<MigrationStatus>,
    objects: Vec<String>,
    listener: Option<Arc<EventListener>>,
}

impl Told {
    fn change<T>(&self, change: impl FnOnce(&mut Inner) -> T) -> T {
        change(&mut self.inner.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn tell(&self, event: &Event) {
        // Without the lock: it may ask this backend something.
        if let Some(listener) = self.change(|inner| inner.listener.clone()) {
            listener(event);
        }
    }
}

impl Backend for Told {
    fn run_state(&self) -> RunState {
        self.change(|inner| if inner.running { RunState::Running } else { RunState::Paused })
    }

    fn stop(&self) -> Result<(), QmpError> {
        self.change(|inner| inner.running = false);
        self.tell(&Event::Stop);
        Ok(())
    }

    fn cont(&self) -> Result<(), QmpError> {
        self.change(|inner| inner.running = true);
        self.tell(&Event::Resume);
        Ok(())
    }

    fn quit(&self) {}

    fn capabilities(&self) -> Capabilities {
        self.change(|inner| inner.capabilities)
    }

    fn set_capabilities(&self, changes: &[(Capability, bool)]) -> Result<(), QmpError> {
        self.change(|inner| {
            let mut capabilities = inner.capabilities;
            changes.iter().for_each(|&(capability, on)| capabilities.set(capability, on));
            capabilities.check().map_err(QmpError::generic)?;
            inner.capabilities = capabilities;
            Ok(())
        })
    }

    fn parameters(&self) -> Parameters {
        self.change(|inner| inner.parameters.clone())
    }

    fn update_parameters(&self, change: ParameterChange<'_>) -> Result<(), QmpError> {
        self.change(|inner| {
            let mut parameters = inner.parameters.clone();
            change(&mut parameters)?;
            parameters.check().map_err(QmpError::generic)?;
            inner.parameters = parameters;
            Ok(())
        })
    }

    fn add_object(&self, id: &str, _: Object) -> Result<(), QmpError> {
        self.change(|inner| inner.objects.push(id.into()));
        Ok(())
    }

    fn remove_object(&self, id: &str) -> Result<(), QmpError> {
        self.change(|inner| inner.objects.retain(|other| other != id));
        Ok(())
    }

    fn migrate(&self, destination: Address) -> Result<(), QmpError> {
        let _ = destination.to_string();
        self.change(|inner| inner.status = Some(MigrationStatus::Active));
        self.tell(&Event::Migration(MigrationStatus::Active));
        Ok(())
    }

    fn migrate_resume(&self, destination: Address) -> Result<(), QmpError> {
        self.migrate(destination)
    }

    fn migrate_recover(&self, source: Address) -> Result<(), QmpError> {
        self.migrate_incoming(source, false)
    }

    fn migrate_incoming(&self, source: Address, _: bool) -> Result<(), QmpError> {
        let _ = source.to_string();
        self.change(|inner| inner.status = Some(MigrationStatus::Setup));
        Ok(())
    }

    fn migrate_cancel(&self) -> Result<(), QmpError> {
        self.change(|inner| inner.status = Some(MigrationStatus::Cancelled));
        Ok(())
    }

    fn migrate_start_postcopy(&self) -> Result<(), QmpError> {
        Ok(())
    }

    fn migrate_pause(&self) -> Result<(), QmpError> {
        Err(QmpError::generic("not now"))
    }

    fn yank(&self) -> Result<(), QmpError> {
        self.change(|inner| inner.status = Some(MigrationStatus::Failed));
        Ok(())
    }

    fn migrate_continue(&self, _: MigrationStatus) -> Result<(), QmpError> {
        Ok(())
    }

    fn migration_info(&self) -> MigrationInfo {
        MigrationInfo { status: self.change(|inner| inner.status), ..MigrationInfo::default() }
    }

    fn subscribe(&self, listener: EventListener) -> Subscription {
        self.change(|inner| inner.listener = Some(Arc::new(listener)));
        Subscription::new(|| {})
    }
}

/// The target of the server: every line that comes back is a message of QMP's.
pub fn qmp_server(data: &[u8]) {
    static SERVER: OnceLock<(Arc<Told>, Server, std::path::PathBuf)> = OnceLock::new();
    let _alone = Alone::begin();
    let (told, _, path) = SERVER.get_or_init(|| {
        let (told, path) = (Arc::new(Told::default()), scratch("qmp"));
        let options = ServerOptions { report: Arc::new(|_| ()), ..ServerOptions::default() };
        let backend: Arc<dyn Backend> = told.clone();
        let server = Server::bind_with(Endpoint::Unix(path.clone()), backend, options);
        (told, server.expect("a free address"), path)
    });
    told.change(|inner| *inner = Inner { listener: inner.listener.take(), ..Inner::default() });

    let mut choices = Choices::new(data);
    let raw = choices.byte() & 1 != 0;
    let said = if raw { data.get(1..).unwrap_or_default().to_vec() } else { text(&mut choices) };
    let mut end = End::connect(path).expect("it listens");
    // Whether it sends all at once or in pieces.
    let piece = if said.len() % 3 == 0 { 7 } else { said.len().max(1) };
    let few = said.len() / 64 + 1;
    said.chunks(piece.max(few)).for_each(|piece| end.send(piece));
    end.close();
    assert!(end.read_to_end(LIMIT), "a client that has gone is let go");
    for line in end.came.split(|byte| *byte == b'\n').filter(|line| !line.is_empty()) {
        let message: Value = serde_json::from_slice(line).expect("a message");
        let kinds = ["QMP", "return", "error", "event"];
        let members = message.as_object().expect("an object");
        assert_eq!(
            kinds.iter().filter(|kind| members.contains_key(**kind)).count(),
            1,
            "{message}"
        );
        if let Some(error) = members.get("error") {
            let desc = error.get("desc").and_then(Value::as_str).expect("says what is wrong");
            assert!(!desc.is_empty());
        }
    }
}

/// A server that says to whoever connects what it was told to, and then no more.
struct FarServer {
    path: std::path::PathBuf,
    say: Mutex<(Sender<Vec<u8>>, Receiver<()>)>,
}

impl FarServer {
    fn start() -> FarServer {
        let path = scratch("far-qmp");
        let listener = UnixListener::bind(&path).expect("a free address");
        let (say, said) = channel::<Vec<u8>>();
        let (done, ended) = channel();
        let serve = move || {
            while let Ok(bytes) = said.recv() {
                let (mut stream, _): (UnixStream, _) = listener.accept().expect("a client");
                stream.set_read_timeout(Some(LIMIT)).expect("a socket");
                // The client may have heard enough of it.
                let _ = stream.write_all(&bytes);
                let _ = stream.shutdown(Shutdown::Write);
                let mut asked = [0; 4096];
                while matches!(stream.read(&mut asked), Ok(1..)) {}
                if done.send(()).is_err() {
                    return;
                }
            }
        };
        thread::Builder::new().name("far-qmp".into()).spawn(serve).expect("a thread");
        FarServer { path, say: Mutex::new((say, ended)) }
    }
}

/// The target of the client: an answer is understood, or is an error of one line.
pub fn qmp_client(data: &[u8]) {
    static SERVER: OnceLock<FarServer> = OnceLock::new();
    let _alone = Alone::begin();
    let server = SERVER.get_or_init(FarServer::start);
    let turn = server.say.lock().unwrap_or_else(PoisonError::into_inner);
    let (choice, said) = data.split_first().unwrap_or((&0, &[]));
    // Mostly a server that is one, to begin with.
    let mut bytes = Vec::new();
    if choice & 1 == 0 {
        bytes.extend(GREETING);
    }
    bytes.extend(said);
    turn.0.send(bytes).expect("it serves");
    let told = converse(Endpoint::Unix(server.path.clone()), choice >> 1);
    if let Err(error) = told {
        expect_one_line(&error.to_string());
    }
    turn.1.recv_timeout(LIMIT).expect("the client has let go");
}

const GREETING: &[u8] =
    b"{\"QMP\": {\"version\": {\"qemu\": {\"major\": 10}}, \"capabilities\": []}}\n\
    {\"return\": {}, \"id\": 1}\n";

fn converse(server: Endpoint, choice: u8) -> Result<(), whimbrel_control::ClientError> {
    let mut client = Client::connect(server, Duration::from_secs(5))?;
    let _ = client.version();
    match choice % 6 {
        0 => {
            let report = client.query_migrate()?;
            let _ = (report.status.to_string(), report.status.is_running());
        }
        1 => drop(client.query_status()?),
        2 => drop(client.query_parameters()?),
        3 => drop(client.next_event(Duration::from_secs(5))?),
        4 => drop(client.wait_event("MIGRATION", Duration::from_secs(5))?),
        _ => client.migrate("tcp:192.0.2.7:4444")?,
    }
    while client.query_migrate().is_ok() {}
    Ok(())
}

/// What a server may answer, from which a fuzzer begins.
pub(crate) fn answers() -> Vec<(&'static str, Vec<u8>)> {
    let event = r#"{"event": "MIGRATION", "data": {"status": "active"}, "timestamp": {"seconds": 1, "microseconds": 2}}"#;
    let report = r#"{"return": {"status": "postcopy-active", "total-time": 5, "ram": {"total": 8388608, "transferred": 1, "mbps": 2.5}, "socket-address": [{"type": "inet", "host": "::1", "port": "7"}]}, "id": 2}"#;
    let status =
        r#"{"return": {"status": "running", "running": true, "singlestep": false}, "id": 2}"#;
    let error = r#"{"error": {"class": "GenericError", "desc": "no"}, "id": 2}"#;
    vec![
        ("report", format!("\0{event}\n{report}\n").into_bytes()),
        ("status", format!("\x02{status}\n").into_bytes()),
        (
            "parameters",
            format!("\x04{event}\r\n{{\"return\": {{\"a\": [1]}}, \"id\": 2}}").into_bytes(),
        ),
        ("event", format!("\x06{event}\n{event}").into_bytes()),
        ("other-event", format!("\x08{event}").into_bytes()),
        ("refused", format!("\x0a{error}").into_bytes()),
        ("no-greeting", format!("\x01{error}").into_bytes()),
        ("late", b"\0{\"return\": 1, \"id\": 1}{\"return\": {}, \"id\": 7}".to_vec()),
    ]
}
