//! The shared memory of a process, which outlives it, and what has to be known of it then.

use std::fs;
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use whimbrel_ram::{Backing, RamBlock, TARGET_PAGE};

use super::{hex, parse_hex};
use crate::error::Error;
use crate::kept::writing::{Partial, kept_error};
use crate::vm::Vm;

const VERSION: u32 = 1;

/// The longest description that is read: 65,535 blocks with the longest names have less.
const LENGTH_MAX: u64 = 64 << 20;

/// Where a block is: name, length, and place in the file.
pub(super) type Place = (String, u64, u64);

/// What lies where in a file of memory.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub(super) struct Description {
    version: u32,
    machine: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    uuid: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    migration: Option<String>,
    blocks: Vec<Block>,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
struct Block {
    name: String,
    /// Bytes.
    length: u64,
    /// Where it begins in the file, in bytes.
    offset: u64,
}

/// The file that describes `memory`: beside it, with `.json` behind its name.
pub(super) fn description_of(memory: &Path) -> PathBuf {
    let mut name = memory.as_os_str().to_owned();
    name.push(".json");
    name.into()
}

/// Describes the file in which all of the VM's RAM lies, shared, so that it can be understood when
/// this process is gone: beside it, with `.json` behind its name. A VMM does this when it has made
/// its RAM, and again (with `migration`) as soon as it knows a migration's identifier.
///
/// It should hold a lock on the file (`flock`, exclusive) for as long as it has it as memory: by that
/// a rescue knows whether it still lives.
///
/// # Errors
/// When a block's memory is not a shared mapping of the file at `memory`, or the description cannot be written.
pub fn describe(memory: &Path, vm: &dyn Vm, migration: Option<[u8; 16]>) -> Result<(), Error> {
    let told = |error: io::Error| kept_error(memory, "cannot be described", &error);
    let metadata = fs::metadata(memory).map_err(told)?;
    let is_it = |block: &RamBlock| -> Result<Option<u64>, Error> {
        match block.backing() {
            Backing::Shared { file, offset } => {
                let there = file.metadata().map_err(told)?;
                let same = (there.dev(), there.ino()) == (metadata.dev(), metadata.ino());
                Ok(same.then_some(*offset))
            }
            _ => Ok(None),
        }
    };
    let mut blocks = Vec::with_capacity(vm.ram().block_count());
    for (_, block) in vm.ram().blocks() {
        let Some(offset) = is_it(block)? else {
            let reason = format!("RAM block {} is not a shared mapping of it", block.name());
            return Err(Error::Kept { path: memory.into(), reason });
        };
        blocks.push(Block { name: block.name().into(), length: block.len(), offset });
    }
    let description = Description {
        version: VERSION,
        machine: vm.machine(),
        uuid: vm.uuid().as_ref().map(hex),
        migration: migration.as_ref().map(hex),
        blocks,
    };
    let file = Partial::create(&description_of(memory))?;
    let text = serde_json::to_vec_pretty(&description).map_err(|error| told(error.into()))?;
    file.error_of(io::Write::write_all(&mut &file.file, &text))?;
    file.keep()
}

impl Description {
    /// That of the file at `memory`; `None` when there is none.
    pub(super) fn of(memory: &Path) -> Result<Option<Description>, Error> {
        let path = description_of(memory);
        let file = match fs::File::open(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            other => other.map_err(|error| kept_error(&path, "cannot be opened", &error))?,
        };
        let mut text = Vec::new();
        file.take(LENGTH_MAX)
            .read_to_end(&mut text)
            .map_err(|error| kept_error(&path, "cannot be read", &error))?;
        let description = serde_json::from_slice(&text).map_err(|error| Error::Kept {
            reason: format!("it does not describe memory: {error}"),
            path,
        })?;
        Ok(Some(description))
    }

    /// What it says, when that can be true of a file of so many bytes: machine, UUID, the migration's
    /// identifier, places.
    #[expect(clippy::type_complexity, reason = "taken apart where it is called")]
    pub(super) fn check(
        self,
        file_len: u64,
    ) -> Result<(String, Option<[u8; 16]>, Option<[u8; 16]>, Vec<Place>), String> {
        if self.version != VERSION {
            return Err(format!(
                "its description has version {}, expected {VERSION}",
                self.version
            ));
        }
        let id = |text: Option<String>, what: &str| match text {
            None => Ok(None),
            Some(text) => match parse_hex(&text) {
                Some(id) => Ok(Some(id)),
                None => Err(format!("its description has a {what} that is none: {text:?}")),
            },
        };
        let (uuid, migration) = (id(self.uuid, "uuid")?, id(self.migration, "migration")?);
        if self.blocks.is_empty() || self.blocks.len() > usize::from(u16::MAX) {
            let count = self.blocks.len();
            return Err(format!("its description has {count} blocks, expected 1 to 65,535"));
        }
        let mut places: Vec<Place> = Vec::with_capacity(self.blocks.len());
        let mut names = std::collections::BTreeSet::new();
        for Block { name, length, offset } in self.blocks {
            if name.is_empty() || name.len() > 255 || !names.insert(name.clone()) {
                return Err(format!(
                    "its description has a block {name:?}: names have 1 to 255 bytes, and each its \
                     own"
                ));
            }
            let inside = offset.checked_add(length).is_some_and(|end| end <= file_len);
            let whole = length > 0 && length.is_multiple_of(TARGET_PAGE.bytes() as u64);
            if !inside || !whole {
                return Err(format!(
                    "by its description RAM block {name} has {length} bytes from byte {offset} on, \
                     and the file has {file_len}"
                ));
            }
            places.push((name, length, offset));
        }
        Ok((self.machine, uuid, migration, places))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(text: &str) -> Result<Vec<Place>, String> {
        let description: Description = serde_json::from_str(text).map_err(|e| e.to_string())?;
        description.check(12288).map(|checked| checked.3)
    }

    #[test]
    fn a_description_is_checked() {
        let good = r#"{"version":1,"machine":"m","blocks":[
            {"name":"a","length":8192,"offset":0},{"name":"b","length":4096,"offset":8192}]}"#;
        let places = [("a".to_owned(), 8192, 0), ("b".to_owned(), 4096, 8192)];
        assert_eq!(check(good), Ok(places.to_vec()));
        for (from, to, text) in [
            ("\"version\":1", "\"version\":2", "version 2, expected 1"),
            ("\"length\":4096", "\"length\":4097", "RAM block b has 4097 bytes"),
            ("\"length\":4096", "\"length\":0", "RAM block b has 0 bytes"),
            ("\"offset\":8192", "\"offset\":8193", "and the file has 12288"),
            ("\"offset\":8192", "\"offset\":18446744073709551615", "and the file has 12288"),
            ("\"name\":\"b\"", "\"name\":\"a\"", "each its own"),
            ("\"name\":\"b\"", "\"name\":\"\"", "each its own"),
            ("\"machine\"", "\"uuid\":\"zz\",\"machine\"", "a uuid that is none"),
            ("\"machine\"", "\"more\":1,\"machine\"", "unknown field"),
            ("\"offset\":0", "\"offset\":-1", "invalid value"),
        ] {
            let error = check(&good.replace(from, to)).expect_err(text);
            assert!(error.contains(text), "{error}");
        }
        assert!(
            check(r#"{"version":1,"machine":"m","blocks":[]}"#).unwrap_err().contains("0 blocks")
        );
    }
}
