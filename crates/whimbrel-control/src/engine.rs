//! The engine behind the server: every command of a migration, as [`Migrator`] does it.

use std::fmt;
use std::sync::Arc;

use serde_json::{Map, Value};
use whimbrel::{
    Address, Capabilities, Capability, ColoStatus, MigrationInfo, MigrationStatus, Migrator,
    Object, Parameters, RunState,
};

use crate::backend::{Backend, EventListener, ParameterChange, Subscription};
use crate::error::QmpError;

/// What a command of the VMM's own does with its arguments.
type Command = Box<dyn Fn(&Map<String, Value>) -> Result<Value, QmpError> + Send + Sync>;

/// A [`Backend`] on a [`Migrator`]. What is the VMM's to do, its commands and its end, it is told.
pub struct MigratorBackend {
    migrator: Arc<Migrator>,
    name: Option<String>,
    quit: Option<Box<dyn Fn() + Send + Sync>>,
    commands: Vec<(String, Command)>,
}

impl MigratorBackend {
    /// Acts on `migrator`.
    pub fn new(migrator: Arc<Migrator>) -> MigratorBackend {
        MigratorBackend { migrator, name: None, quit: None, commands: Vec::new() }
    }

    /// With a name, for `query-name`.
    #[must_use]
    pub fn with_name(mut self, name: impl Into<String>) -> MigratorBackend {
        self.name = Some(name.into());
        self
    }

    /// With `quit` called on `quit`, after the migration under way has been told to end. It only
    /// causes the end, and does not wait for it: see [`Backend::quit`].
    #[must_use]
    pub fn on_quit(mut self, quit: impl Fn() + Send + Sync + 'static) -> MigratorBackend {
        self.quit = Some(Box::new(quit));
        self
    }

    /// With a command of the VMM's own, which has to judge its arguments itself. Its name should
    /// begin with `x-`.
    #[must_use]
    pub fn with_command(
        mut self,
        name: impl Into<String>,
        command: impl Fn(&Map<String, Value>) -> Result<Value, QmpError> + Send + Sync + 'static,
    ) -> MigratorBackend {
        self.commands.push((name.into(), Box::new(command)));
        self
    }
}

impl fmt::Debug for MigratorBackend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MigratorBackend")
            .field("migrator", &self.migrator)
            .field("name", &self.name)
            .field("commands", &self.extra_commands())
            .finish_non_exhaustive()
    }
}

impl Backend for MigratorBackend {
    fn name(&self) -> Option<String> {
        self.name.clone()
    }

    fn run_state(&self) -> RunState {
        self.migrator.run_state()
    }

    fn stop(&self) -> Result<(), QmpError> {
        self.migrator.stop().map_err(QmpError::generic)
    }

    fn cont(&self) -> Result<(), QmpError> {
        self.migrator.cont().map_err(QmpError::generic)
    }

    fn quit(&self) {
        // Refused in postcopy, where nothing can be undone: it ends with the VMM.
        let _ = self.migrator.cancel();
        if let Some(quit) = &self.quit {
            quit();
        }
    }

    fn capabilities(&self) -> Capabilities {
        self.migrator.capabilities()
    }

    fn set_capabilities(&self, changes: &[(Capability, bool)]) -> Result<(), QmpError> {
        self.migrator.set_capabilities(changes).map_err(QmpError::generic)
    }

    fn parameters(&self) -> Parameters {
        self.migrator.parameters()
    }

    fn update_parameters(&self, change: ParameterChange<'_>) -> Result<(), QmpError> {
        let mut outcome = Ok(());
        let checked = self.migrator.update_parameters(|parameters| {
            let before = parameters.clone();
            outcome = change(parameters);
            if outcome.is_err() {
                *parameters = before;
            }
        });
        outcome.and(checked.map_err(QmpError::generic))
    }

    fn add_object(&self, id: &str, object: Object) -> Result<(), QmpError> {
        self.migrator.add_object(id, object).map_err(QmpError::generic)
    }

    fn remove_object(&self, id: &str) -> Result<(), QmpError> {
        self.migrator.remove_object(id).map_err(QmpError::generic)
    }

    fn migrate(&self, destination: Address) -> Result<(), QmpError> {
        self.migrator.migrate(destination).map_err(QmpError::generic)
    }

    fn migrate_resume(&self, destination: Address) -> Result<(), QmpError> {
        self.migrator.resume(destination).map_err(QmpError::generic)
    }

    fn migrate_recover(&self, source: Address) -> Result<(), QmpError> {
        self.migrator.recover(&source).map_err(QmpError::generic)
    }

    fn migrate_incoming(&self, source: Address, exit_on_error: bool) -> Result<(), QmpError> {
        self.migrator.incoming(&source, exit_on_error).map_err(QmpError::generic)
    }

    fn migrate_cancel(&self) -> Result<(), QmpError> {
        self.migrator.cancel().map_err(QmpError::generic)
    }

    fn migrate_start_postcopy(&self) -> Result<(), QmpError> {
        self.migrator.start_postcopy().map_err(QmpError::generic)
    }

    fn migrate_pause(&self) -> Result<(), QmpError> {
        self.migrator.pause().map_err(QmpError::generic)
    }

    fn colo_status(&self) -> ColoStatus {
        self.migrator.colo_status()
    }

    fn colo_lost_heartbeat(&self) -> Result<(), QmpError> {
        self.migrator.colo_lost_heartbeat().map_err(QmpError::generic)
    }

    fn colo_checkpoint(&self) -> Result<(), QmpError> {
        self.migrator.colo_checkpoint().map_err(QmpError::generic)
    }

    fn yank(&self) -> Result<(), QmpError> {
        self.migrator.yank().map_err(|_| QmpError::instance_not_found())
    }

    fn migrate_continue(&self, state: MigrationStatus) -> Result<(), QmpError> {
        self.migrator.proceed(state).map_err(QmpError::generic)
    }

    fn migration_info(&self) -> MigrationInfo {
        self.migrator.info()
    }

    fn subscribe(&self, listener: EventListener) -> Subscription {
        let subscription = self.migrator.subscribe(listener);
        Subscription::new(move || drop(subscription))
    }

    fn extra_commands(&self) -> Vec<String> {
        self.commands.iter().map(|(name, _)| name.clone()).collect()
    }

    fn extra(
        &self,
        command: &str,
        arguments: &Map<String, Value>,
    ) -> Option<Result<Value, QmpError>> {
        let (_, run) = self.commands.iter().find(|(name, _)| name == command)?;
        Some(run(arguments))
    }
}
