//! Where a bench keeps files that are read while it measures.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};

/// A folder in memory, where there is one: what is read from it is never read from a disk.
#[derive(Debug)]
pub(super) struct Scratch(PathBuf);

impl Scratch {
    pub(super) fn new() -> Result<Self> {
        let memory = Path::new("/dev/shm");
        let parent = if memory.is_dir() { memory.to_owned() } else { std::env::temp_dir() };
        let path = parent.join(format!("whimbrel-bench-{}", std::process::id()));
        std::fs::create_dir(&path).with_context(|| path.display().to_string())?;
        Ok(Self(path))
    }

    pub(super) fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // Best effort: it lies where the system keeps nothing over a restart.
        let _ = std::fs::remove_dir_all(&self.0);
    }
}
