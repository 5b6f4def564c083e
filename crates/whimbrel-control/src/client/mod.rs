//! A small client that drives QEMU and whimbrel alike.

mod error;
mod report;

use std::collections::VecDeque;
use std::io::{ErrorKind, Read, Write};
use std::time::{Duration, Instant};

use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use whimbrel::Capability;

pub use self::error::ClientError;
pub use self::report::{MigrationReport, PeerEvent, PeerRunState, PeerStatus};
use crate::Endpoint;
use crate::framing::Framing;
use crate::stream::Stream;

/// The longest message taken. QEMU's longest, its schema, is below 1 MiB.
const MAX_MESSAGE: usize = 16 << 20;
/// Read at a time.
const READ_SIZE: usize = 16 << 10;
/// For how long after a deadline what has come already is read.
const GRACE: Duration = Duration::from_millis(100);
/// Events kept for whoever asks for them; then the oldest go.
const MAX_EVENTS: usize = 4096;
/// QMP's capability that lets commands overtake others.
const OOB: &str = "oob";

/// A negotiated connection to a QMP server.
///
/// Events that come between replies are kept apart, for [`Client::next_event`]. Where the peer lets
/// commands overtake others, those that may do so: they work while an earlier one is still
/// waited for.
#[derive(Debug)]
pub struct Client {
    endpoint: Endpoint,
    stream: Stream,
    framing: Framing,
    timeout: Duration,
    last_id: u64,
    events: VecDeque<PeerEvent>,
    version: Value,
    out_of_band: bool,
}

impl Client {
    /// Connects and negotiates. Each of connecting, greeting and every command from then on may
    /// take `timeout`.
    pub fn connect(endpoint: Endpoint, timeout: Duration) -> Result<Client, ClientError> {
        let stream = Stream::connect(&endpoint, timeout)
            .map_err(|cause| ClientError::Connect { endpoint: endpoint.clone(), cause })?;
        let mut client = Client {
            endpoint,
            stream,
            framing: Framing::new(MAX_MESSAGE),
            timeout,
            last_id: 0,
            events: VecDeque::new(),
            version: Value::Null,
            out_of_band: false,
        };
        let mut greeting = client.read_greeting()?;
        client.version = greeting["version"].take();
        let offered =
            greeting["capabilities"].as_array().is_some_and(|all| all.contains(&OOB.into()));
        let enable = if offered { json!({ "enable": [OOB] }) } else { json!({}) };
        client.execute("qmp_capabilities", enable)?;
        client.out_of_band = offered;
        Ok(client)
    }

    /// Where it is connected to.
    pub fn endpoint(&self) -> &Endpoint {
        &self.endpoint
    }

    /// What the peer's greeting says of its version: `qemu` (`major`, `minor`, `micro`) and
    /// `package`.
    pub fn version(&self) -> &Value {
        &self.version
    }

    /// Executes a command and returns what it returns. A refusal is [`ClientError::Refused`].
    ///
    /// After [`ClientError::TimedOut`] the client can be used on: a late reply is dropped.
    pub fn execute(&mut self, command: &str, arguments: Value) -> Result<Value, ClientError> {
        self.execute_by("execute", command, arguments)
    }

    /// As [`Client::execute`], and ahead of commands whose replies are still to come, where the peer
    /// allows that at all. It has to allow it for this command.
    pub fn execute_out_of_band(
        &mut self,
        command: &str,
        arguments: Value,
    ) -> Result<Value, ClientError> {
        let how = if self.out_of_band { "exec-oob" } else { "execute" };
        self.execute_by(how, command, arguments)
    }

    fn execute_by(
        &mut self,
        how: &str,
        command: &str,
        arguments: Value,
    ) -> Result<Value, ClientError> {
        let awaited = format!("reply to {command}");
        self.last_id += 1;
        let id = Value::from(self.last_id);
        let request = json!({ how: command, "arguments": arguments, "id": id });
        self.send(&format!("{request}\n"), &awaited)?;
        let deadline = Instant::now() + self.timeout;
        loop {
            let Some(mut message) = self.read_message(deadline, &awaited)? else {
                return Err(self.timed_out(awaited, self.timeout));
            };
            // Without an id it is an error about what could not be read, or about ourselves.
            if message.get("id").is_some_and(|other| *other != id) {
                continue;
            }
            if let Some(value) = message.get_mut("return") {
                return Ok(value.take());
            }
            return Err(match message.get("error") {
                Some(error) => self.refused(command, error),
                None => self.not_qmp(awaited, &message.to_string()),
            });
        }
    }

    /// The next event, oldest first; `None` if there is none within `timeout`.
    pub fn next_event(&mut self, timeout: Duration) -> Result<Option<PeerEvent>, ClientError> {
        let deadline = Instant::now() + timeout;
        while self.events.is_empty() {
            // A reply that comes now is one that was given up.
            if self.read_any(deadline, "event")?.is_none() {
                break;
            }
        }
        Ok(self.events.pop_front())
    }

    /// Waits for an event called `name`. Others stay for [`Client::next_event`], in their order.
    pub fn wait_event(&mut self, name: &str, timeout: Duration) -> Result<PeerEvent, ClientError> {
        let deadline = Instant::now() + timeout;
        let awaited = format!("event {name}");
        loop {
            let found = self.events.iter().position(|event| event.name == name);
            if let Some(event) = found.and_then(|index| self.events.remove(index)) {
                return Ok(event);
            }
            if self.read_any(deadline, &awaited)?.is_none() {
                return Err(self.timed_out(awaited, timeout));
            }
        }
    }

    /// `query-migrate`.
    pub fn query_migrate(&mut self) -> Result<MigrationReport, ClientError> {
        self.execute("query-migrate", json!({})).map(MigrationReport::new)
    }

    /// `query-status`.
    pub fn query_status(&mut self) -> Result<PeerRunState, ClientError> {
        self.execute_as("query-status", json!({}))
    }

    /// `query-migrate-parameters`, of which a peer may have more and fewer than
    /// [`whimbrel::Parameters`]: so it is left as it is.
    pub fn query_parameters(&mut self) -> Result<Value, ClientError> {
        self.execute("query-migrate-parameters", json!({}))
    }

    /// `migrate` to a URI. It returns once the migration has begun.
    pub fn migrate(&mut self, uri: &str) -> Result<(), ClientError> {
        self.execute("migrate", json!({ "uri": uri })).map(drop)
    }

    /// `migrate` to a URI, with `resume`: goes on with a migration that is paused in postcopy. It
    /// returns once connecting has begun.
    pub fn migrate_resume(&mut self, uri: &str) -> Result<(), ClientError> {
        self.execute("migrate", json!({ "uri": uri, "resume": true })).map(drop)
    }

    /// `migrate-recover`: a destination that is paused in postcopy waits once more, at a URI.
    pub fn migrate_recover(&mut self, uri: &str) -> Result<(), ClientError> {
        self.execute_out_of_band("migrate-recover", json!({ "uri": uri })).map(drop)
    }

    /// `migrate-incoming` at a URI. Where it really listens is in
    /// [`MigrationReport::info`]'s `socket_address`.
    pub fn migrate_incoming(&mut self, uri: &str) -> Result<(), ClientError> {
        self.execute("migrate-incoming", json!({ "uri": uri })).map(drop)
    }

    /// `migrate_cancel`.
    pub fn migrate_cancel(&mut self) -> Result<(), ClientError> {
        self.execute("migrate_cancel", json!({})).map(drop)
    }

    /// `migrate-continue` from the state named.
    pub fn migrate_continue(&mut self, state: &str) -> Result<(), ClientError> {
        self.execute("migrate-continue", json!({ "state": state })).map(drop)
    }

    /// `migrate-start-postcopy`: the migration under way goes over to postcopy as soon as it can. No
    /// error when it is too late for that.
    pub fn migrate_start_postcopy(&mut self) -> Result<(), ClientError> {
        self.execute("migrate-start-postcopy", json!({})).map(drop)
    }

    /// `migrate-pause`: breaks the connections of a migration in postcopy.
    pub fn migrate_pause(&mut self) -> Result<(), ClientError> {
        self.execute_out_of_band("migrate-pause", json!({})).map(drop)
    }

    /// `yank`: shuts the connections of the migration under way down, whoever waits on them.
    pub fn yank_migration(&mut self) -> Result<(), ClientError> {
        let instances = json!({ "instances": [{ "type": "migration" }] });
        self.execute_out_of_band("yank", instances).map(drop)
    }

    /// Switches a capability that whimbrel has too.
    pub fn set_capability(&mut self, capability: Capability, on: bool) -> Result<(), ClientError> {
        self.set_capability_named(capability.name(), on)
    }

    /// Switches any capability of the peer's.
    pub fn set_capability_named(&mut self, name: &str, on: bool) -> Result<(), ClientError> {
        self.set_capabilities_named(&[(name, on)])
    }

    /// Switches several, all of them or, with an error, none: some need others.
    pub fn set_capabilities_named(&mut self, changes: &[(&str, bool)]) -> Result<(), ClientError> {
        let entry = |(name, on): &(&str, bool)| json!({ "capability": name, "state": on });
        let changes: Vec<Value> = changes.iter().map(entry).collect();
        self.execute("migrate-set-capabilities", json!({ "capabilities": changes })).map(drop)
    }

    /// `migrate-set-parameters` with an object of any of the peer's parameters.
    pub fn set_parameters(&mut self, changes: Value) -> Result<(), ClientError> {
        self.execute("migrate-set-parameters", changes).map(drop)
    }

    /// `stop`.
    pub fn stop(&mut self) -> Result<(), ClientError> {
        self.execute("stop", json!({})).map(drop)
    }

    /// `cont`.
    pub fn cont(&mut self) -> Result<(), ClientError> {
        self.execute("cont", json!({})).map(drop)
    }

    /// `quit`. A peer that was quicker to end than to answer has done what was asked.
    pub fn quit(mut self) -> Result<(), ClientError> {
        match self.execute("quit", json!({})) {
            Ok(_) | Err(ClientError::Closed { .. }) => Ok(()),
            Err(error) => Err(error),
        }
    }

    fn execute_as<T: DeserializeOwned>(
        &mut self,
        command: &str,
        arguments: Value,
    ) -> Result<T, ClientError> {
        let value = self.execute(command, arguments)?;
        serde_json::from_value(value).map_err(|cause| ClientError::Reply {
            endpoint: self.endpoint.clone(),
            command: command.into(),
            cause,
        })
    }

    fn read_greeting(&mut self) -> Result<Value, ClientError> {
        let awaited = "greeting";
        let deadline = Instant::now() + self.timeout;
        let Some(mut message) = self.read_message(deadline, awaited)? else {
            return Err(self.timed_out(awaited.into(), self.timeout));
        };
        if message.pointer("/QMP/version").is_some() {
            return Ok(message["QMP"].take());
        }
        Err(match message.get("error") {
            Some(error) => self.refused("connecting", error),
            None => self.not_qmp(awaited.into(), &message.to_string()),
        })
    }

    fn send(&mut self, request: &str, awaited: &str) -> Result<(), ClientError> {
        let outcome = self
            .stream
            .set_write_timeout(self.timeout)
            .and_then(|()| (&self.stream).write_all(request.as_bytes()));
        outcome.map_err(|cause| match cause.kind() {
            ErrorKind::WouldBlock => self.timed_out(awaited.into(), self.timeout),
            ErrorKind::BrokenPipe | ErrorKind::ConnectionReset => self.closed(awaited),
            _ => self.failed(awaited, cause),
        })
    }

    /// The next message that is no event; `None` if none comes before the deadline.
    fn read_message(
        &mut self,
        deadline: Instant,
        awaited: &str,
    ) -> Result<Option<Value>, ClientError> {
        loop {
            match self.read_any(deadline, awaited)? {
                None => return Ok(None),
                Some(Some(message)) => return Ok(Some(message)),
                Some(None) => {}
            }
        }
    }

    /// Reads one message: an event is kept (`Some(None)`), anything else returned; `None` if none
    /// comes before the deadline.
    fn read_any(
        &mut self,
        deadline: Instant,
        awaited: &str,
    ) -> Result<Option<Option<Value>>, ClientError> {
        let message = loop {
            match self.framing.next_value() {
                Some(Ok(message)) => break message,
                Some(Err(error)) => return Err(self.not_qmp(awaited.into(), &error.to_string())),
                None => {}
            }
            if !self.receive(deadline, awaited)? {
                return Ok(None);
            }
        };
        if message.get("event").is_none() {
            return Ok(Some(Some(message)));
        }
        let text = message.to_string();
        let event =
            PeerEvent::from_message(message).ok_or_else(|| self.not_qmp(awaited.into(), &text))?;
        if self.events.len() == MAX_EVENTS {
            self.events.pop_front();
        }
        self.events.push_back(event);
        Ok(Some(None))
    }

    /// Reads some bytes; false if none come before the deadline.
    fn receive(&mut self, deadline: Instant, awaited: &str) -> Result<bool, ClientError> {
        // What has come already is read even at the deadline (zero would be without limit), but a
        // peer that never stops talking does not keep us for ever.
        let now = Instant::now();
        if now > deadline + GRACE {
            return Ok(false);
        }
        let left = deadline.saturating_duration_since(now).max(Duration::from_millis(1));
        self.stream.set_read_timeout(left).map_err(|cause| self.failed(awaited, cause))?;
        let mut buffer = [0; READ_SIZE];
        match (&self.stream).read(&mut buffer) {
            Ok(0) => Err(self.closed(awaited)),
            Ok(count) => {
                self.framing.feed(&buffer[..count]);
                Ok(true)
            }
            Err(cause) => match cause.kind() {
                ErrorKind::WouldBlock | ErrorKind::TimedOut => Ok(false),
                ErrorKind::Interrupted => Ok(true),
                ErrorKind::ConnectionReset => Err(self.closed(awaited)),
                _ => Err(self.failed(awaited, cause)),
            },
        }
    }

    fn refused(&self, awaited: &str, error: &Value) -> ClientError {
        let text = |name| error.get(name).and_then(Value::as_str).unwrap_or("?").to_owned();
        ClientError::Refused {
            endpoint: self.endpoint.clone(),
            awaited: awaited.into(),
            class: text("class"),
            desc: text("desc"),
        }
    }

    fn not_qmp(&self, awaited: String, found: &str) -> ClientError {
        let found = found.chars().take(100).collect();
        ClientError::NotQmp { endpoint: self.endpoint.clone(), awaited, found }
    }

    fn timed_out(&self, awaited: String, limit: Duration) -> ClientError {
        ClientError::TimedOut { endpoint: self.endpoint.clone(), awaited, limit }
    }

    fn closed(&self, awaited: &str) -> ClientError {
        ClientError::Closed { endpoint: self.endpoint.clone(), awaited: awaited.into() }
    }

    fn failed(&self, awaited: &str, cause: std::io::Error) -> ClientError {
        let awaited = awaited.into();
        ClientError::Connection { endpoint: self.endpoint.clone(), awaited, cause }
    }
}
