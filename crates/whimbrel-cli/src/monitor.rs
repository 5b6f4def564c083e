//! QMP's commands for the reference VM: those of a migration, and a few of its own.

use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::Sender;
use std::time::Duration;

use serde_json::{Map, Value, json};
use whimbrel::rescue::{Lost, Part};
use whimbrel::{Migrator, RunState};
use whimbrel_control::{MigratorBackend, QmpError};
use whimbrel_ram::{BlockDigest, GuestRam, RamBlock};
use whimbrel_vm::{ReferenceVm, WritablePages};

use crate::vm::News;

/// A digest of each block of RAM, while the guest stands still. With `file` one of each page, into a
/// file of that name, block after block: 8 bytes each, the lowest first.
pub(crate) const RAM_DIGEST: &str = "x-ram-digest";
/// What the guest's checks of itself found.
pub(crate) const SELF_CHECK: &str = "x-self-check";
/// What the guest has done on this host, without a look at its memory.
pub(crate) const GUEST_PROGRESS: &str = "x-guest-progress";
/// What VM this is.
pub(crate) const VM_INFO: &str = "x-vm-info";

/// Keeps what is here of a guest whose other side is gone for good, in `file`.
pub(crate) const RESCUE: &str = "x-rescue";
/// Brings what is missing here from the part in `file`; `lost` says what becomes of the rest.
pub(crate) const FILL: &str = "x-rescue-fill";

/// What the QMP server acts on; `end` is told of `quit`.
pub(crate) fn backend(
    migrator: &Arc<Migrator>,
    vm: &Arc<ReferenceVm>,
    end: Sender<News>,
) -> MigratorBackend {
    let (for_digest, for_check, for_info) = (migrator.clone(), migrator.clone(), migrator.clone());
    let (checked, watched, described) = (vm.clone(), vm.clone(), vm.clone());
    let (for_rescue, for_fill) = (migrator.clone(), migrator.clone());
    MigratorBackend::new(migrator.clone())
        // A receiver that is gone means that the end has begun.
        .on_quit(move || drop(end.send(News::Quit)))
        .with_command(RAM_DIGEST, move |arguments| ram_digest(&for_digest, arguments))
        .with_command(SELF_CHECK, move |arguments| {
            none_of(arguments, &[])?;
            self_check(&for_check, &checked)
        })
        .with_command(GUEST_PROGRESS, move |arguments| {
            none_of(arguments, &[])?;
            Ok(guest_progress(&watched))
        })
        .with_command(RESCUE, move |arguments| rescue(&for_rescue, arguments))
        .with_command(FILL, move |arguments| fill(&for_fill, arguments))
        .with_command(VM_INFO, move |arguments| {
            none_of(arguments, &[])?;
            Ok(vm_info(&for_info, &described))
        })
}

/// Refuses arguments that are not `known`.
fn none_of(arguments: &Map<String, Value>, known: &[&str]) -> Result<(), QmpError> {
    match arguments.keys().find(|name| !known.contains(&name.as_str())) {
        None => Ok(()),
        Some(name) => Err(QmpError::generic(format_args!("Parameter '{name}' is unexpected"))),
    }
}

/// Refuses to look at memory of which a part may be elsewhere: it would have to be fetched, and
/// may never come.
fn refuse_in_postcopy(migrator: &Migrator) -> Result<(), QmpError> {
    match migrator.info().status.filter(|status| status.is_postcopy()) {
        None => Ok(()),
        Some(status) => Err(QmpError::generic(format_args!(
            "the migration is {status}, and pages of RAM may be missing: ask again when it is \
             completed"
        ))),
    }
}

/// A member that is a string, if it is there.
fn text<'a>(arguments: &'a Map<String, Value>, name: &str) -> Result<Option<&'a str>, QmpError> {
    match arguments.get(name) {
        None => Ok(None),
        Some(Value::String(text)) => Ok(Some(text)),
        Some(_) => Err(QmpError::generic(format_args!("Parameter '{name}' expects a string"))),
    }
}

fn rescue(migrator: &Migrator, arguments: &Map<String, Value>) -> Result<Value, QmpError> {
    none_of(arguments, &["file"])?;
    let file = text(arguments, "file")?;
    let file = file.ok_or_else(|| QmpError::generic("Parameter 'file' is missing"))?;
    let kept = migrator.rescue(Path::new(file)).map_err(QmpError::generic)?;
    Ok(json!({
        "side": kept.side.name(),
        "machine": kept.machine,
        "ram-bytes": kept.ram_bytes,
        "stored-bytes": kept.stored_bytes,
        "missing-pages": kept.missing_pages,
        "device-sections": kept.devices,
    }))
}

fn fill(migrator: &Migrator, arguments: &Map<String, Value>) -> Result<Value, QmpError> {
    none_of(arguments, &["file", "lost"])?;
    let lost = match text(arguments, "lost")? {
        None | Some("refuse") => Lost::Refuse,
        Some("poison") => Lost::Poison,
        Some(_) => {
            return Err(QmpError::generic("Parameter 'lost' expects 'refuse' or 'poison'"));
        }
    };
    let file = text(arguments, "file")?;
    let part =
        file.map(|file| Part::open(Path::new(file))).transpose().map_err(QmpError::generic)?;
    let filled = migrator.fill(part, lost).map_err(QmpError::generic)?;
    Ok(json!({ "pages": filled.pages, "lost-pages": filled.lost_pages }))
}

fn ram_digest(migrator: &Migrator, arguments: &Map<String, Value>) -> Result<Value, QmpError> {
    none_of(arguments, &["file"])?;
    let file = text(arguments, "file")?;
    refuse_in_postcopy(migrator)?;
    if migrator.lost_pages() > 0 {
        return Err(QmpError::generic("pages of RAM are lost: whoever reads them is killed"));
    }
    match migrator.run_state() {
        RunState::Running => {
            return Err(QmpError::generic("the guest runs: stop it first, its RAM changes"));
        }
        RunState::Inmigrate => return Err(QmpError::generic("the guest has not arrived yet")),
        _ => {}
    }
    let ram = migrator.vm().ram();
    let Some(path) = file else {
        let block = |block: BlockDigest| json!({ "name": block.name, "pages": block.pages, "digest": block.digest.to_string() });
        return Ok(
            json!({ "blocks": ram.digest().into_iter().map(block).collect::<Vec<Value>>() }),
        );
    };
    write_digests(ram, path)
        .map_err(|error| QmpError::generic(format_args!("cannot write {path}: {error}")))?;
    let block =
        |(_, block): (_, &RamBlock)| json!({ "name": block.name(), "pages": block.target_pages() });
    Ok(json!({ "blocks": ram.blocks().map(block).collect::<Vec<Value>>() }))
}

fn write_digests(ram: &GuestRam, path: &str) -> io::Result<()> {
    let mut out = BufWriter::new(File::create(path)?);
    for (_, block) in ram.blocks() {
        for digest in block.page_digests() {
            out.write_all(&digest.to_le_bytes())?;
        }
    }
    out.flush()
}

fn self_check(migrator: &Migrator, vm: &ReferenceVm) -> Result<Value, QmpError> {
    refuse_in_postcopy(migrator)?;
    let check = vm.self_check();
    Ok(json!({
        "passed": check.passed(),
        "updates": check.updates,
        "pages-checked": check.pages_checked,
        "errors": check.errors,
        "first-error": check.first_error.map(|error| error.to_string()),
        "gap-max-us": micros(check.gap_max),
        "failure": vm.failure(),
        "lost-pages": migrator.lost_pages(),
    }))
}

fn guest_progress(vm: &ReferenceVm) -> Value {
    let progress = vm.progress();
    json!({
        "updates": progress.updates,
        "gap-max-us": micros(progress.gap_max),
        "failure": vm.failure(),
    })
}

fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}

fn vm_info(migrator: &Migrator, vm: &ReferenceVm) -> Value {
    json!({
        "machine": migrator.vm().machine(),
        "accel": vm.accel().name(),
        "dirty-log": vm.dirty_log_name(),
        "workload": vm.workload().to_string(),
        "memory-bytes": migrator.vm().ram().total_bytes(),
        "pid": std::process::id(),
        "writable-pages": vm.writable_pages().iter().map(writable).collect::<Vec<Value>>(),
    })
}

/// Pages that the guest writes; all others stay as they are.
fn writable(range: &WritablePages) -> Value {
    json!({
        "kind": range.kind.name(),
        "block": range.block,
        "first": range.pages.start,
        "pages": range.pages.end - range.pages.start,
    })
}
