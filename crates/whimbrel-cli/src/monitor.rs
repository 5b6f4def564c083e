//! QMP's commands for the reference VM: those of a migration, and a few of its own.

use std::sync::Arc;
use std::sync::mpsc::Sender;

use serde_json::{Value, json};
use whimbrel::{Migrator, RunState};
use whimbrel_control::{MigratorBackend, QmpError};
use whimbrel_vm::ReferenceVm;

use crate::vm::End;

/// Digests of every page of RAM, while the guest stands still.
pub(crate) const RAM_DIGEST: &str = "x-ram-digest";
/// What the guest's checks of itself found.
pub(crate) const SELF_CHECK: &str = "x-self-check";
/// What VM this is.
pub(crate) const VM_INFO: &str = "x-vm-info";

/// What the QMP server acts on; `end` is told of `quit`.
pub(crate) fn backend(
    migrator: &Arc<Migrator>,
    vm: &Arc<ReferenceVm>,
    end: Sender<End>,
) -> MigratorBackend {
    let (for_digest, for_info) = (migrator.clone(), migrator.clone());
    let (checked, described) = (vm.clone(), vm.clone());
    MigratorBackend::new(migrator.clone())
        // A receiver that is gone means that the end has begun.
        .on_quit(move || drop(end.send(End::Quit)))
        .with_command(RAM_DIGEST, move |_| ram_digest(&for_digest))
        .with_command(SELF_CHECK, move |_| Ok(self_check(&checked)))
        .with_command(VM_INFO, move |_| Ok(vm_info(&for_info, &described)))
}

fn ram_digest(migrator: &Migrator) -> Result<Value, QmpError> {
    match migrator.run_state() {
        RunState::Running => {
            return Err(QmpError::generic("the guest runs: stop it first, its RAM changes"));
        }
        RunState::Inmigrate => return Err(QmpError::generic("the guest has not arrived yet")),
        _ => {}
    }
    let block = |block: whimbrel_ram::BlockDigest| json!({ "name": block.name, "pages": block.pages, "digest": block.digest.to_string() });
    let digests = migrator.vm().ram().digest();
    Ok(json!({ "blocks": digests.into_iter().map(block).collect::<Vec<Value>>() }))
}

fn self_check(vm: &ReferenceVm) -> Value {
    let check = vm.self_check();
    json!({
        "passed": check.passed(),
        "updates": check.updates,
        "pages-checked": check.pages_checked,
        "errors": check.errors,
        "first-error": check.first_error.map(|error| error.to_string()),
        "gap-max-us": u64::try_from(check.gap_max.as_micros()).unwrap_or(u64::MAX),
        "failure": vm.failure(),
    })
}

fn vm_info(migrator: &Migrator, vm: &ReferenceVm) -> Value {
    json!({
        "machine": migrator.vm().machine(),
        "accel": vm.accel().name(),
        "dirty-log": vm.dirty_log_name(),
        "workload": vm.workload().to_string(),
        "memory-bytes": migrator.vm().ram().total_bytes(),
        "pid": std::process::id(),
    })
}
