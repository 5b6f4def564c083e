//! QMP's commands for the reference VM: those of a migration, and a few of its own.

use std::sync::Arc;
use std::sync::mpsc::Sender;

use serde_json::{Map, Value, json};
use whimbrel::{
    Address, Capabilities, Capability, MigrationInfo, MigrationStatus, Migrator, Parameters,
    RunState,
};
use whimbrel_control::{
    Backend, EventListener, MigratorBackend, ParameterChange, QmpError, Subscription,
};
use whimbrel_vm::ReferenceVm;

use crate::failure::Failure;
use crate::vm::End;

/// Digests of every page of RAM, while the guest stands still.
pub(crate) const RAM_DIGEST: &str = "x-ram-digest";
/// What the guest's checks of itself found.
pub(crate) const SELF_CHECK: &str = "x-self-check";
/// What VM this is.
pub(crate) const VM_INFO: &str = "x-vm-info";

/// What the QMP server acts on.
pub(crate) struct Monitor {
    migration: MigratorBackend,
    migrator: Arc<Migrator>,
    vm: Arc<ReferenceVm>,
    end: Sender<End>,
}

impl Monitor {
    pub(crate) fn new(migrator: Arc<Migrator>, vm: Arc<ReferenceVm>, end: Sender<End>) -> Monitor {
        Monitor { migration: MigratorBackend::new(migrator.clone()), migrator, vm, end }
    }

    /// Waits for a migration at `address`.
    pub(crate) fn wait_for(&self, address: &Address, exit_on_error: bool) -> Result<(), Failure> {
        Ok(self.migrator.incoming(address, exit_on_error)?)
    }

    fn ram_digest(&self) -> Result<Value, QmpError> {
        match self.migrator.run_state() {
            RunState::Running => {
                return Err(QmpError::generic("the guest runs: stop it first, its RAM changes"));
            }
            RunState::Inmigrate => {
                return Err(QmpError::generic("the guest has not arrived yet"));
            }
            _ => {}
        }
        let ram = self.migrator.vm().ram();
        let digests = ram.digest();
        Ok(json!({
            "blocks": digests
                .iter()
                .map(|block| json!({
                    "name": block.name,
                    "pages": block.pages,
                    "digest": block.digest.to_string(),
                }))
                .collect::<Vec<Value>>()
        }))
    }

    fn self_check(&self) -> Value {
        let check = self.vm.self_check();
        json!({
            "passed": check.passed(),
            "updates": check.updates,
            "pages-checked": check.pages_checked,
            "errors": check.errors,
            "first-error": check.first_error.map(|error| error.to_string()),
            "gap-max-us": u64::try_from(check.gap_max.as_micros()).unwrap_or(u64::MAX),
            "failure": self.vm.failure(),
        })
    }

    fn vm_info(&self) -> Value {
        let ram = self.migrator.vm().ram();
        json!({
            "machine": self.migrator.vm().machine(),
            "accel": self.vm.accel().name(),
            "dirty-log": self.vm.dirty_log_name(),
            "workload": self.vm.workload().to_string(),
            "memory-bytes": ram.total_bytes(),
            "pid": std::process::id(),
        })
    }
}

impl Backend for Monitor {
    fn run_state(&self) -> RunState {
        self.migration.run_state()
    }

    fn stop(&self) -> Result<(), QmpError> {
        self.migration.stop()
    }

    fn cont(&self) -> Result<(), QmpError> {
        self.migration.cont()
    }

    fn quit(&self) {
        // A receiver that is gone means that the end has begun.
        let _ = self.end.send(End::Quit);
    }

    fn capabilities(&self) -> Capabilities {
        self.migration.capabilities()
    }

    fn set_capabilities(&self, changes: &[(Capability, bool)]) -> Result<(), QmpError> {
        self.migration.set_capabilities(changes)
    }

    fn parameters(&self) -> Parameters {
        self.migration.parameters()
    }

    fn update_parameters(&self, change: ParameterChange<'_>) -> Result<(), QmpError> {
        self.migration.update_parameters(change)
    }

    fn migrate(&self, destination: Address) -> Result<(), QmpError> {
        self.migration.migrate(destination)
    }

    fn migrate_incoming(&self, source: Address, exit_on_error: bool) -> Result<(), QmpError> {
        self.migration.migrate_incoming(source, exit_on_error)
    }

    fn migrate_cancel(&self) -> Result<(), QmpError> {
        self.migration.migrate_cancel()
    }

    fn migrate_continue(&self, state: MigrationStatus) -> Result<(), QmpError> {
        self.migration.migrate_continue(state)
    }

    fn migration_info(&self) -> MigrationInfo {
        self.migration.migration_info()
    }

    fn subscribe(&self, listener: EventListener) -> Subscription {
        self.migration.subscribe(listener)
    }

    fn extra_commands(&self) -> Vec<String> {
        [RAM_DIGEST, SELF_CHECK, VM_INFO].map(String::from).into()
    }

    fn extra(
        &self,
        command: &str,
        _arguments: &Map<String, Value>,
    ) -> Option<Result<Value, QmpError>> {
        match command {
            RAM_DIGEST => Some(self.ram_digest()),
            SELF_CHECK => Some(Ok(self.self_check())),
            VM_INFO => Some(Ok(self.vm_info())),
            _ => None,
        }
    }
}
