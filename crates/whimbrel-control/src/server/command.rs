//! The commands.

use std::fs;

use serde_json::{Value, json};
use whimbrel::{Capability, MigrationStatus, RunState};

use super::address::Place;
use super::arguments::Arguments;
use super::object;
use super::parameters;
use super::yank;
use crate::{Backend, QmpError};

type Outcome = Result<Value, QmpError>;
type Run = fn(Arguments, &dyn Backend) -> Outcome;

/// Every command but the two that a session answers itself.
const COMMANDS: [(&str, Run); 26] = [
    ("cont", cont),
    ("migrate", migrate),
    ("migrate-continue", migrate_continue),
    ("migrate-incoming", migrate_incoming),
    ("migrate-pause", migrate_pause),
    ("migrate-recover", migrate_recover),
    ("migrate-set-capabilities", migrate_set_capabilities),
    ("migrate-set-parameters", migrate_set_parameters),
    ("migrate-start-postcopy", migrate_start_postcopy),
    ("migrate_cancel", migrate_cancel),
    ("object-add", object::add),
    ("object-del", object::delete),
    ("query-colo-status", query_colo_status),
    ("query-commands", query_commands),
    ("query-migrate", query_migrate),
    ("query-migrate-capabilities", query_migrate_capabilities),
    ("query-migrate-parameters", query_migrate_parameters),
    ("query-migrationthreads", query_migrationthreads),
    ("query-name", query_name),
    ("query-status", query_status),
    ("query-version", query_version),
    ("query-yank", yank::query),
    ("stop", stop),
    ("x-colo-checkpoint", colo_checkpoint),
    ("x-colo-lost-heartbeat", colo_lost_heartbeat),
    ("yank", yank::yank),
];

/// Commands a session answers itself.
const SESSION_COMMANDS: [&str; 2] = ["qmp_capabilities", "quit"];

/// Commands that may overtake others (`exec-oob`): what helps a client whose earlier command waits
/// for a migration, or for a guest that waits for one.
const OUT_OF_BAND: [&str; 4] =
    ["migrate-pause", "migrate-recover", "x-colo-lost-heartbeat", "yank"];

/// Executes a command that is to overtake others.
pub(super) fn execute_out_of_band(
    command: &str,
    arguments: Arguments,
    backend: &dyn Backend,
) -> Outcome {
    if OUT_OF_BAND.contains(&command) {
        return execute(command, arguments, backend);
    }
    Err(match names(backend).iter().any(|name| name == command) {
        true => QmpError::generic(format_args!("The command {command} does not support OOB")),
        false => QmpError::command_not_found(command),
    })
}

/// Executes a command of a client that has negotiated.
pub(super) fn execute(command: &str, arguments: Arguments, backend: &dyn Backend) -> Outcome {
    match COMMANDS.iter().find(|(name, _)| *name == command) {
        Some((_, run)) => run(arguments, backend),
        None => backend
            .extra(command, &arguments.rest())
            .unwrap_or_else(|| Err(QmpError::command_not_found(command))),
    }
}

/// All commands, those of the backend included.
fn names(backend: &dyn Backend) -> Vec<String> {
    let own = COMMANDS.iter().map(|(name, _)| *name).chain(SESSION_COMMANDS);
    own.map(str::to_owned).chain(backend.extra_commands()).collect()
}

/// What `query-version` answers. QEMU's clients want a version of QEMU: it is that of the QMP
/// spoken here. Who it really is, is said in `package`.
pub(super) fn version() -> Value {
    json!({
        "qemu": { "major": 10, "minor": 0, "micro": 0 },
        "package": concat!("whimbrel ", env!("CARGO_PKG_VERSION")),
    })
}

fn done(outcome: Result<(), QmpError>) -> Outcome {
    outcome.map(|()| json!({}))
}

fn cont(arguments: Arguments, backend: &dyn Backend) -> Outcome {
    arguments.finish()?;
    done(backend.cont())
}

fn stop(arguments: Arguments, backend: &dyn Backend) -> Outcome {
    arguments.finish()?;
    done(backend.stop())
}

fn migrate(mut arguments: Arguments, backend: &dyn Backend) -> Outcome {
    let place = Place::take(&mut arguments)?;
    // It has meant nothing to QMP ever: the command always returns at once.
    arguments.optional_bool("detach")?;
    let resume = arguments.optional_bool("resume")?.unwrap_or(false);
    arguments.finish()?;
    let destination = place.address()?;
    done(match resume {
        true => backend.migrate_resume(destination),
        false => backend.migrate(destination),
    })
}

fn migrate_incoming(mut arguments: Arguments, backend: &dyn Backend) -> Outcome {
    let place = Place::take(&mut arguments)?;
    let exit_on_error = arguments.optional_bool("exit-on-error")?.unwrap_or(true);
    arguments.finish()?;
    done(backend.migrate_incoming(place.address()?, exit_on_error))
}

fn migrate_cancel(arguments: Arguments, backend: &dyn Backend) -> Outcome {
    arguments.finish()?;
    done(backend.migrate_cancel())
}

fn migrate_continue(mut arguments: Arguments, backend: &dyn Backend) -> Outcome {
    let name = arguments.string("state")?;
    let state: MigrationStatus = serde_json::from_value(Value::String(name.clone()))
        .map_err(|_| QmpError::wrong_value("state", &name))?;
    arguments.finish()?;
    done(backend.migrate_continue(state))
}

fn migrate_pause(arguments: Arguments, backend: &dyn Backend) -> Outcome {
    arguments.finish()?;
    done(backend.migrate_pause())
}

fn query_colo_status(arguments: Arguments, backend: &dyn Backend) -> Outcome {
    arguments.finish()?;
    serde_json::to_value(backend.colo_status()).map_err(QmpError::generic)
}

fn colo_lost_heartbeat(arguments: Arguments, backend: &dyn Backend) -> Outcome {
    arguments.finish()?;
    done(backend.colo_lost_heartbeat())
}

/// Whimbrel's own: QEMU's checkpoints on demand are asked for by its packet comparison.
fn colo_checkpoint(arguments: Arguments, backend: &dyn Backend) -> Outcome {
    arguments.finish()?;
    done(backend.colo_checkpoint())
}

/// QEMU knows `uri` alone.
fn migrate_recover(mut arguments: Arguments, backend: &dyn Backend) -> Outcome {
    let place = Place::take(&mut arguments)?;
    arguments.finish()?;
    done(backend.migrate_recover(place.address()?))
}

fn migrate_start_postcopy(arguments: Arguments, backend: &dyn Backend) -> Outcome {
    arguments.finish()?;
    done(backend.migrate_start_postcopy())
}

fn migrate_set_capabilities(mut arguments: Arguments, backend: &dyn Backend) -> Outcome {
    let entries = arguments.objects("capabilities")?;
    arguments.finish()?;
    let changes = entries.into_iter().map(take_capability).collect::<Result<Vec<_>, _>>()?;
    done(backend.set_capabilities(&changes))
}

fn take_capability(mut entry: Arguments) -> Result<(Capability, bool), QmpError> {
    let name = entry.string("capability")?;
    let capability = Capability::ALL
        .into_iter()
        .find(|capability| capability.name() == name)
        .ok_or_else(|| QmpError::wrong_value("capability", &name))?;
    let state = entry.bool("state")?;
    entry.finish()?;
    Ok((capability, state))
}

fn migrate_set_parameters(arguments: Arguments, backend: &dyn Backend) -> Outcome {
    let changes = arguments.rest();
    done(backend.update_parameters(&mut |parameters| parameters::merge(parameters, &changes)))
}

fn query_commands(arguments: Arguments, backend: &dyn Backend) -> Outcome {
    arguments.finish()?;
    Ok(names(backend).into_iter().map(|name| json!({ "name": name })).collect())
}

fn query_migrate(arguments: Arguments, backend: &dyn Backend) -> Outcome {
    arguments.finish()?;
    serde_json::to_value(backend.migration_info()).map_err(QmpError::generic)
}

fn query_migrate_capabilities(arguments: Arguments, backend: &dyn Backend) -> Outcome {
    arguments.finish()?;
    let on = backend.capabilities();
    let entry = |capability: Capability| json!({ "capability": capability.name(), "state": on.has(capability) });
    Ok(Capability::ALL.into_iter().map(entry).collect())
}

fn query_migrate_parameters(arguments: Arguments, backend: &dyn Backend) -> Outcome {
    arguments.finish()?;
    serde_json::to_value(backend.parameters()).map_err(QmpError::generic)
}

/// The threads of this process that carry a migration, told by the names the engine gives them.
fn query_migrationthreads(arguments: Arguments, _: &dyn Backend) -> Outcome {
    arguments.finish()?;
    let tasks = fs::read_dir("/proc/self/task").map_err(QmpError::generic)?;
    let threads = tasks.flatten().filter_map(|task| {
        let id: u64 = task.file_name().to_str()?.parse().ok()?;
        // It may have ended since the directory was read.
        let name = fs::read_to_string(task.path().join("comm")).ok()?;
        let name = name.trim_end();
        let migrates = name.starts_with("source/") || name.starts_with("dest/");
        migrates.then(|| json!({ "name": name, "thread-id": id }))
    });
    Ok(threads.collect())
}

fn query_name(arguments: Arguments, backend: &dyn Backend) -> Outcome {
    arguments.finish()?;
    Ok(backend.name().map_or_else(|| json!({}), |name| json!({ "name": name })))
}

fn query_status(arguments: Arguments, backend: &dyn Backend) -> Outcome {
    arguments.finish()?;
    let state = backend.run_state();
    Ok(json!({ "status": state.name(), "running": state == RunState::Running }))
}

fn query_version(arguments: Arguments, _: &dyn Backend) -> Outcome {
    arguments.finish()?;
    Ok(version())
}
