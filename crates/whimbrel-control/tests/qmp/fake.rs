//! A backend without a VM: it remembers what it is told, and says and sends what a test wants.

use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use serde_json::{Map, Value, json};
use whimbrel::{
    Address, Capabilities, Capability, Event, MigrationInfo, MigrationStats, MigrationStatus,
    Parameters, RunState,
};
use whimbrel_control::{
    Backend, Endpoint, EventListener, ParameterChange, QmpError, Server, ServerOptions,
    Subscription,
};

#[derive(Default)]
pub(crate) struct Fake {
    pub(crate) settings: Mutex<Settings>,
    listeners: Arc<Mutex<Vec<(usize, EventListener)>>>,
    subscribed: AtomicUsize,
    pub(crate) quit: AtomicBool,
    /// How long `stop` takes.
    pub(crate) stop_takes: Mutex<Duration>,
    gate: Arc<Gate>,
}

/// What `stop` waits at.
#[derive(Default)]
struct Gate {
    state: Mutex<GateState>,
    changed: Condvar,
}

#[derive(Default)]
struct GateState {
    closed: bool,
    waiting: usize,
}

/// While it is there, `stop` waits.
pub(crate) struct Held(Arc<Gate>);

impl Drop for Held {
    fn drop(&mut self) {
        self.0.state.lock().unwrap().closed = false;
        self.0.changed.notify_all();
    }
}

pub(crate) struct Settings {
    pub(crate) run_state: RunState,
    pub(crate) capabilities: Capabilities,
    pub(crate) parameters: Parameters,
    pub(crate) info: MigrationInfo,
    pub(crate) calls: Vec<String>,
}

impl Default for Settings {
    fn default() -> Settings {
        Settings {
            run_state: RunState::Running,
            capabilities: Capabilities::default(),
            parameters: Parameters::default(),
            info: MigrationInfo::default(),
            calls: Vec::new(),
        }
    }
}

impl Fake {
    pub(crate) fn emit(&self, event: &Event) {
        for (_, listener) in self.listeners.lock().unwrap().iter() {
            listener(event);
        }
    }

    pub(crate) fn listeners(&self) -> usize {
        self.listeners.lock().unwrap().len()
    }

    pub(crate) fn enable(&self, capability: Capability) {
        self.settings.lock().unwrap().capabilities.set(capability, true);
    }

    /// Has every `stop` wait until what is returned is dropped.
    pub(crate) fn hold_stop(&self) -> Held {
        self.gate.state.lock().unwrap().closed = true;
        Held(Arc::clone(&self.gate))
    }

    /// Waits until `count` clients wait in `stop`.
    pub(crate) fn wait_stops(&self, count: usize) {
        let state = self.gate.state.lock().unwrap();
        let limit = Duration::from_secs(10);
        let enough = |state: &mut GateState| state.waiting < count;
        let (_state, waited) = self.gate.changed.wait_timeout_while(state, limit, enough).unwrap();
        assert!(!waited.timed_out(), "{count} clients do not wait in 'stop'");
    }

    fn pass_gate(&self) {
        let mut state = self.gate.state.lock().unwrap();
        state.waiting += 1;
        self.gate.changed.notify_all();
        let mut state = self.gate.changed.wait_while(state, |state| state.closed).unwrap();
        state.waiting -= 1;
    }

    pub(crate) fn calls(&self) -> Vec<String> {
        self.settings.lock().unwrap().calls.clone()
    }

    fn while_paused(&self, refusal: &str) -> Result<(), QmpError> {
        match self.settings.lock().unwrap().info.status {
            Some(MigrationStatus::PostcopyPaused) => Ok(()),
            _ => Err(QmpError::generic(refusal)),
        }
    }

    fn call(&self, call: String) -> Result<(), QmpError> {
        self.settings.lock().unwrap().calls.push(call);
        Ok(())
    }
}

impl Backend for Fake {
    fn name(&self) -> Option<String> {
        Some("fake".into())
    }

    fn run_state(&self) -> RunState {
        self.settings.lock().unwrap().run_state
    }

    fn stop(&self) -> Result<(), QmpError> {
        let takes = *self.stop_takes.lock().unwrap();
        std::thread::sleep(takes);
        self.pass_gate();
        self.settings.lock().unwrap().run_state = RunState::Paused;
        self.emit(&Event::Stop);
        Ok(())
    }

    fn cont(&self) -> Result<(), QmpError> {
        self.settings.lock().unwrap().run_state = RunState::Running;
        self.emit(&Event::Resume);
        Ok(())
    }

    fn quit(&self) {
        self.quit.store(true, Ordering::Release);
    }

    fn capabilities(&self) -> Capabilities {
        self.settings.lock().unwrap().capabilities
    }

    fn set_capabilities(&self, changes: &[(Capability, bool)]) -> Result<(), QmpError> {
        let mut settings = self.settings.lock().unwrap();
        let mut capabilities = settings.capabilities;
        for (capability, on) in changes {
            capabilities.set(*capability, *on);
        }
        settings.capabilities = capabilities;
        Ok(())
    }

    fn parameters(&self) -> Parameters {
        self.settings.lock().unwrap().parameters.clone()
    }

    fn update_parameters(&self, change: ParameterChange<'_>) -> Result<(), QmpError> {
        change(&mut self.settings.lock().unwrap().parameters)
    }

    fn migrate(&self, destination: Address) -> Result<(), QmpError> {
        let total = 1 << 30;
        self.settings.lock().unwrap().info = MigrationInfo {
            status: Some(MigrationStatus::Active),
            ram: Some(MigrationStats { total, remaining: total, ..MigrationStats::default() }),
            ..MigrationInfo::default()
        };
        self.call(format!("migrate {destination}"))
    }

    fn migrate_resume(&self, destination: Address) -> Result<(), QmpError> {
        self.while_paused("Cannot resume if there is no paused migration")?;
        self.call(format!("migrate {destination} resume"))
    }

    fn migrate_recover(&self, source: Address) -> Result<(), QmpError> {
        self.while_paused("Migrate recover can only be run when postcopy is paused.")?;
        self.call(format!("migrate-recover {source}"))
    }

    fn migrate_incoming(&self, source: Address, exit_on_error: bool) -> Result<(), QmpError> {
        self.call(format!("migrate-incoming {source} {exit_on_error}"))
    }

    fn migrate_cancel(&self) -> Result<(), QmpError> {
        self.call("migrate_cancel".into())
    }

    fn migrate_continue(&self, state: MigrationStatus) -> Result<(), QmpError> {
        self.call(format!("migrate-continue {state}"))
    }

    fn migrate_start_postcopy(&self) -> Result<(), QmpError> {
        self.call("migrate-start-postcopy".into())
    }

    fn migrate_pause(&self) -> Result<(), QmpError> {
        self.call("migrate-pause".into())
    }

    fn yank(&self) -> Result<(), QmpError> {
        self.call("yank".into())
    }

    fn migration_info(&self) -> MigrationInfo {
        self.settings.lock().unwrap().info.clone()
    }

    fn subscribe(&self, listener: EventListener) -> Subscription {
        let number = self.subscribed.fetch_add(1, Ordering::Relaxed);
        self.listeners.lock().unwrap().push((number, listener));
        let listeners = Arc::clone(&self.listeners);
        Subscription::new(move || listeners.lock().unwrap().retain(|(other, _)| *other != number))
    }

    fn extra_commands(&self) -> Vec<String> {
        vec!["x-whimbrel-checksum".into()]
    }

    fn extra(
        &self,
        command: &str,
        arguments: &Map<String, Value>,
    ) -> Option<Result<Value, QmpError>> {
        (command == "x-whimbrel-checksum").then(|| Ok(json!({ "over": arguments })))
    }
}

/// A fake, its server on a Unix socket, and what the server reported.
pub(crate) struct Served {
    pub(crate) fake: Arc<Fake>,
    pub(crate) endpoint: Endpoint,
    pub(crate) reports: Arc<Mutex<Vec<String>>>,
    _server: Server,
    dir: tempfile::TempDir,
}

impl Served {
    pub(crate) fn new() -> Served {
        Served::with(ServerOptions::default())
    }

    pub(crate) fn with(mut options: ServerOptions) -> Served {
        let dir = tempfile::tempdir().unwrap();
        let fake = Arc::new(Fake::default());
        let reports = Arc::new(Mutex::new(Vec::new()));
        options.report = Arc::new({
            let reports = Arc::clone(&reports);
            move |line: &str| reports.lock().unwrap().push(line.to_owned())
        });
        let endpoint = Endpoint::Unix(dir.path().join("qmp"));
        let backend: Arc<dyn Backend> = Arc::clone(&fake) as Arc<dyn Backend>;
        let server = Server::bind_with(endpoint.clone(), backend, options).unwrap();
        Served { fake, endpoint, reports, _server: server, dir }
    }

    pub(crate) fn path(&self) -> std::path::PathBuf {
        self.dir.path().join("qmp")
    }

    /// Waits until the server has reported something with `part` in it.
    pub(crate) fn wait_report(&self, part: &str) -> String {
        for _ in 0..500 {
            if let Some(line) = self.reports.lock().unwrap().iter().find(|l| l.contains(part)) {
                return line.clone();
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        panic!("no report with '{part}' in {:?}", self.reports.lock().unwrap());
    }
}

/// The names of this process's threads that begin with `prefix`.
pub(crate) fn threads(prefix: &str) -> Vec<String> {
    let names = std::fs::read_dir(Path::new("/proc/self/task")).unwrap().flatten();
    names
        .filter_map(|task| std::fs::read_to_string(task.path().join("comm")).ok())
        .map(|name| name.trim_end().to_owned())
        .filter(|name| name.starts_with(prefix))
        .collect()
}
