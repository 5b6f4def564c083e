//! A client of QMP, QEMU's control protocol: enough to drive a migration, of QEMU or whimbrel.

use std::collections::VecDeque;
use std::io::{BufRead as _, BufReader, ErrorKind, Write as _};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use serde_json::{Value, json};

use crate::wait;

/// The longest a peer may take for one answer. QEMU's monitor stalls while it loads a guest.
const ANSWER_MAX: Duration = Duration::from_secs(60);

/// An event, as it came.
#[derive(Debug, Clone)]
pub struct Event {
    /// Such as `MIGRATION`.
    pub name: String,
    /// What belongs to it; null if nothing.
    pub data: Value,
    /// When it happened, by the sender's clock: since 1970.
    pub at: Duration,
}

/// A connection in command mode.
#[derive(Debug)]
pub struct Qmp {
    reader: BufReader<UnixStream>,
    events: VecDeque<Event>,
}

impl Qmp {
    /// Connects and negotiates.
    ///
    /// # Errors
    /// No socket, or something else than QMP behind it.
    pub fn connect(path: &Path) -> Result<Self> {
        let stream =
            UnixStream::connect(path).with_context(|| format!("QMP at {}", path.display()))?;
        stream.set_read_timeout(Some(ANSWER_MAX))?;
        let mut qmp = Self { reader: BufReader::new(stream), events: VecDeque::new() };
        let greeting = qmp.read()?;
        if greeting.get("QMP").is_none() {
            bail!("no QMP greeting at {}: {greeting}", path.display());
        }
        qmp.execute("qmp_capabilities", &json!({}))?;
        Ok(qmp)
    }

    /// One command, its `return`. Events that come between are kept.
    ///
    /// # Errors
    /// The peer's own description, or that it went away.
    pub fn execute(&mut self, command: &str, arguments: &Value) -> Result<Value> {
        let request = json!({ "execute": command, "arguments": arguments });
        writeln!(self.reader.get_mut(), "{request}")
            .with_context(|| format!("QMP {command}: the peer is gone"))?;
        loop {
            let mut answer = self.read().with_context(|| format!("QMP {command}"))?;
            if let Some(value) = answer.get_mut("return") {
                return Ok(value.take());
            }
            if let Some(error) = answer.get("error") {
                bail!("QMP {command}: {}", error["desc"].as_str().unwrap_or("no description"));
            }
            self.keep_event(&mut answer);
        }
    }

    /// The next event called `name`; earlier ones of other names are dropped.
    ///
    /// # Errors
    /// It did not come within `limit`.
    pub fn wait_event(&mut self, name: &str, limit: Duration) -> Result<Event> {
        let begun = Instant::now();
        loop {
            let left = limit.saturating_sub(begun.elapsed());
            let event =
                self.next_event(left).with_context(|| format!("waiting for the event {name}"))?;
            if event.name == name {
                return Ok(event);
            }
        }
    }

    /// The next event, whatever it is.
    ///
    /// # Errors
    /// None came within `limit`.
    pub fn next_event(&mut self, limit: Duration) -> Result<Event> {
        let begun = Instant::now();
        loop {
            if let Some(event) = self.events.pop_front() {
                return Ok(event);
            }
            let left = limit.saturating_sub(begun.elapsed());
            if left.is_zero() {
                bail!("no event in {} s", limit.as_secs());
            }
            self.reader.get_ref().set_read_timeout(Some(left))?;
            let read = self.read();
            self.reader.get_ref().set_read_timeout(Some(ANSWER_MAX))?;
            let mut message = read?;
            self.keep_event(&mut message);
        }
    }

    /// Turns capabilities on.
    ///
    /// # Errors
    /// As [`Self::execute`].
    pub fn enable(&mut self, capabilities: &[&str]) -> Result<()> {
        if capabilities.is_empty() {
            return Ok(());
        }
        let list: Vec<Value> = capabilities
            .iter()
            .map(|capability| json!({ "capability": capability, "state": true }))
            .collect();
        self.execute("migrate-set-capabilities", &json!({ "capabilities": list })).map(drop)
    }

    /// Starts an outgoing migration.
    ///
    /// # Errors
    /// As [`Self::execute`].
    pub fn migrate(&mut self, uri: &str) -> Result<()> {
        self.execute("migrate", &json!({ "uri": uri })).map(drop)
    }

    /// Waits until a migration, outgoing or incoming, has ended well.
    ///
    /// # Errors
    /// It failed, was cancelled, or took longer than `limit`.
    pub fn wait_migrated(&mut self, limit: Duration) -> Result<Value> {
        let mut last = Value::Null;
        let ended = wait::until("the end of the migration", limit, || {
            let report = self.execute("query-migrate", &json!({}))?;
            last = report.clone();
            match report["status"].as_str() {
                Some("completed") => Ok(Some(report)),
                Some("failed" | "cancelled" | "postcopy-paused") => {
                    bail!("the migration failed: {report}")
                }
                Some(_) | None => Ok(None),
            }
        });
        ended.with_context(|| format!("last seen: {last}"))
    }

    /// The run state, such as `running` or `inmigrate`.
    ///
    /// # Errors
    /// As [`Self::execute`].
    pub fn run_state(&mut self) -> Result<String> {
        let status = self.execute("query-status", &json!({}))?;
        Ok(status["status"].as_str().context("query-status without a status")?.to_owned())
    }

    fn keep_event(&mut self, message: &mut Value) {
        if let Some(name) = message["event"].as_str() {
            let name = name.to_owned();
            let stamp = |part: &str| message["timestamp"][part].as_u64().unwrap_or_default();
            let at = Duration::from_secs(stamp("seconds"))
                + Duration::from_micros(stamp("microseconds"));
            self.events.push_back(Event { name, data: message["data"].take(), at });
        }
    }

    fn read(&mut self) -> Result<Value> {
        let mut line = String::new();
        match self.reader.read_line(&mut line) {
            Ok(0) => bail!("the peer closed the connection"),
            Ok(_) => serde_json::from_str(&line).with_context(|| format!("no JSON: {line}")),
            Err(error) if error.kind() == ErrorKind::WouldBlock => bail!("no answer in time"),
            Err(error) => Err(error.into()),
        }
    }
}
