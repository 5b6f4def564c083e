//! The `whimbrel` command, as a user runs it.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use crate::wait;

/// Where the command is: set by `cargo xtask`.
pub const BINARY_VARIABLE: &str = "WHIMBREL_BIN";

/// The command's path: as `cargo xtask` set it, or beside the tests in the target directory.
///
/// # Errors
/// It has not been built.
pub fn binary() -> Result<PathBuf> {
    let path = match std::env::var_os(BINARY_VARIABLE) {
        Some(path) => PathBuf::from(path),
        None => {
            let program = std::env::current_exe()?;
            // target/debug/deps/NAME
            let folder = program.ancestors().nth(2).context("no folder above the tests")?;
            folder.join("whimbrel")
        }
    };
    ensure!(path.is_file(), "{} is missing: run cargo build", path.display());
    Ok(path)
}

/// How a run of the command ended.
#[derive(Debug)]
pub struct Ended {
    /// Its exit status.
    pub status: ExitStatus,
    /// Its standard output.
    pub output: String,
    /// Its standard error.
    pub complaints: String,
}

impl Ended {
    /// That it exited with 0.
    ///
    /// # Errors
    /// What it complained about.
    pub fn succeeded(self) -> Result<Self> {
        ensure!(self.status.success(), "whimbrel ended with {}: {}", self.status, self.complaints);
        Ok(self)
    }

    /// That it exited with an error of one line on standard error; gives the line.
    ///
    /// # Errors
    /// It succeeded, died of a signal, panicked, or said something else than one line.
    pub fn refused(self) -> Result<String> {
        ensure!(
            self.status.code().is_some_and(|code| code != 0),
            "an error exit was expected, not {}: {}",
            self.status,
            self.output
        );
        let errors: Vec<&str> =
            self.complaints.lines().filter(|line| !line.trim().is_empty()).collect();
        ensure!(!self.complaints.contains("panicked"), "whimbrel panicked: {}", self.complaints);
        let last = errors.last().context("an error exit without a word")?;
        Ok((*last).to_owned())
    }

    /// The one JSON object of `--json`.
    ///
    /// # Errors
    /// There is none.
    pub fn json(&self) -> Result<Value> {
        serde_json::from_str(self.output.trim())
            .with_context(|| format!("no JSON object: {}", self.output))
    }
}

/// The command under way. Dropped, it is killed.
#[derive(Debug)]
pub struct Whimbrel {
    child: Child,
    what: String,
    output: PathBuf,
    complaints: PathBuf,
}

impl Whimbrel {
    /// Starts `whimbrel ARGUMENTS`; what it prints goes to files called `name` in `folder`.
    ///
    /// # Errors
    /// It has not been built.
    pub fn start(folder: &Path, name: &str, arguments: &[&str]) -> Result<Self> {
        let output = folder.join(format!("{name}.output"));
        let complaints = folder.join(format!("{name}.stderr"));
        let child = Command::new(binary()?)
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(File::create(&output)?)
            .stderr(File::create(&complaints)?)
            .spawn()?;
        Ok(Self { child, what: format!("whimbrel {}", arguments.join(" ")), output, complaints })
    }

    /// Waits for its end.
    ///
    /// # Errors
    /// It takes longer than `limit`; with what it said so far.
    pub fn wait(&mut self, limit: Duration) -> Result<Ended> {
        let Self { child, what, output, complaints } = self;
        let read =
            |path: &Path| String::from_utf8_lossy(&fs::read(path).unwrap_or_default()).into_owned();
        let status = wait::until(&format!("the end of {what}"), limit, || Ok(child.try_wait()?))
            .with_context(|| format!("it said {:?}", read(complaints)))?;
        Ok(Ended { status, output: read(output), complaints: read(complaints) })
    }

    /// What Ctrl-C does.
    ///
    /// # Errors
    /// It has ended already.
    pub fn interrupt(&self) -> Result<()> {
        let process = self.child.id().to_string();
        let status = Command::new("kill").args(["-INT", &process]).status()?;
        ensure!(status.success(), "{}: not to be interrupted ({status})", self.what);
        Ok(())
    }

    /// Whether it is still running.
    ///
    /// # Errors
    /// The system's.
    pub fn is_running(&mut self) -> Result<bool> {
        Ok(self.child.try_wait()?.is_none())
    }
}

impl Drop for Whimbrel {
    fn drop(&mut self) {
        // Both fail only for a process that is gone, which is what is wanted.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
