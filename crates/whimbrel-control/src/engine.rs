//! The engine behind the server: every command of a migration, as [`Migrator`] does it.

use std::sync::Arc;

use whimbrel::{
    Address, Capabilities, Capability, MigrationInfo, MigrationStatus, Migrator, Parameters,
    RunState,
};

use crate::backend::{Backend, EventListener, ParameterChange, Subscription};
use crate::error::QmpError;

/// A [`Backend`] on a [`Migrator`], with commands of the VMM's own left out: a VMM that has some
/// (or that wants to end on `quit`) wraps it.
#[derive(Clone, Debug)]
pub struct MigratorBackend {
    migrator: Arc<Migrator>,
}

impl MigratorBackend {
    /// Acts on `migrator`.
    pub fn new(migrator: Arc<Migrator>) -> MigratorBackend {
        MigratorBackend { migrator }
    }
}

impl Backend for MigratorBackend {
    fn run_state(&self) -> RunState {
        self.migrator.run_state()
    }

    fn stop(&self) -> Result<(), QmpError> {
        self.migrator.stop().map_err(QmpError::generic)
    }

    fn cont(&self) -> Result<(), QmpError> {
        self.migrator.cont().map_err(QmpError::generic)
    }

    /// Ends the migration under way; ending the process is the VMM's.
    fn quit(&self) {
        self.migrator.cancel();
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
        let mut refused = Ok(());
        let changed = self.migrator.update_parameters(|parameters| {
            let before = parameters.clone();
            refused = change(parameters);
            if refused.is_err() {
                *parameters = before;
            }
        });
        refused?;
        changed.map_err(QmpError::generic)
    }

    fn migrate(&self, destination: Address) -> Result<(), QmpError> {
        self.migrator.migrate(destination).map_err(QmpError::generic)
    }

    fn migrate_incoming(&self, source: Address, exit_on_error: bool) -> Result<(), QmpError> {
        self.migrator.incoming(&source, exit_on_error).map_err(QmpError::generic)
    }

    fn migrate_cancel(&self) -> Result<(), QmpError> {
        self.migrator.cancel();
        Ok(())
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
}
