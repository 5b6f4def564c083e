//! `yank` and `query-yank`: connections that are shut down under whoever waits on them.

use serde_json::{Value, json};
use whimbrel::MigrationStatus;

use super::arguments::Arguments;
use crate::{Backend, QmpError};

/// What can be yanked here. QEMU has two kinds more, of which there are none here.
const MIGRATION: &str = "migration";

/// What there is to be yanked.
pub(super) fn query(arguments: Arguments, backend: &dyn Backend) -> Result<Value, QmpError> {
    arguments.finish()?;
    let instances = is_there(backend).then(|| json!({ "type": MIGRATION }));
    Ok(instances.into_iter().collect())
}

/// Yanks what is named: all of it, or nothing where something named is not there.
pub(super) fn yank(mut arguments: Arguments, backend: &dyn Backend) -> Result<Value, QmpError> {
    let instances = arguments.objects("instances")?;
    arguments.finish()?;
    let instances = instances.into_iter().map(Instance::take).collect::<Result<Vec<_>, _>>()?;
    let there = |instance: &Instance| matches!(instance, Instance::Migration) && is_there(backend);
    if !instances.iter().all(there) {
        return Err(QmpError::instance_not_found());
    }
    if !instances.is_empty() {
        backend.yank()?;
    }
    Ok(json!({}))
}

fn is_there(backend: &dyn Backend) -> bool {
    backend.migration_info().status.is_some_and(MigrationStatus::is_running)
}

enum Instance {
    Migration,
    /// Of a kind that is known, and not here.
    Other,
}

impl Instance {
    fn take(mut entry: Arguments) -> Result<Instance, QmpError> {
        let kind = entry.string("type")?;
        let instance = match kind.as_str() {
            MIGRATION => Instance::Migration,
            "block-node" => entry.string("node-name").map(|_| Instance::Other)?,
            "chardev" => entry.string("id").map(|_| Instance::Other)?,
            _ => return Err(QmpError::wrong_value("type", &kind)),
        };
        entry.finish()?;
        Ok(instance)
    }
}
