//! A `whimbrel` command at one end of a migration, which ends by itself.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;
use whimbrel_peers::wait;

use crate::bench::contender::cpu_seconds;

/// The command under way. Dropped, it is killed.
#[derive(Debug)]
pub(super) struct Helper {
    child: Child,
    output: PathBuf,
    complaints: PathBuf,
}

/// How it ended: well, or it is an error.
#[derive(Debug)]
pub(super) struct Ended {
    /// Its one JSON object.
    pub(super) said: Value,
    /// Its processor time.
    pub(super) cpu_s: f64,
}

impl Helper {
    /// Starts it; what it prints goes to files of this name.
    pub(super) fn start(mut command: Command, files: &Path) -> Result<Self> {
        let output = files.with_extension("output");
        let complaints = files.with_extension("stderr");
        let child = command
            .stdin(Stdio::null())
            .stdout(File::create(&output)?)
            .stderr(File::create(&complaints)?)
            .spawn()
            .with_context(|| format!("{} did not start", command.get_program().display()))?;
        Ok(Self { child, output, complaints })
    }

    /// Where it waits for a migration, which it says when it does.
    pub(super) fn listens_at(&mut self, limit: Duration) -> Result<String> {
        wait::until("whimbrel to listen", limit, || {
            let said = fs::read_to_string(&self.complaints)?;
            let address = address_in(&said);
            ensure!(
                address.is_some() || self.child.try_wait()?.is_none(),
                "whimbrel ended at once: {}",
                said.trim()
            );
            Ok(address)
        })
    }

    /// Waits for its end.
    pub(super) fn wait(&mut self, limit: Duration) -> Result<Ended> {
        // Its accounts are there until it is waited for.
        let path = format!("/proc/{}/stat", self.child.id());
        wait::until("whimbrel to end", limit, || {
            Ok(is_dead(&fs::read_to_string(&path)?).then_some(()))
        })?;
        let cpu_s = cpu_seconds(self.child.id())?;
        let status = self.child.wait()?;
        let complaints = fs::read_to_string(&self.complaints)?;
        let last = complaints.trim().lines().last().unwrap_or("nothing");
        ensure!(status.success(), "whimbrel ended with {status}: {last}");
        let said = serde_json::from_str(&fs::read_to_string(&self.output)?)
            .context("whimbrel printed no JSON object")?;
        Ok(Ended { said, cpu_s })
    }
}

impl Drop for Helper {
    fn drop(&mut self) {
        // Both fail only for a process that is gone, which is what is wanted.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// From a whole line like `waiting for a migration at tcp:192.0.2.5:4444`.
fn address_in(said: &str) -> Option<String> {
    let whole = said.split_inclusive('\n').filter(|line| line.ends_with('\n'));
    let mut addresses =
        whole.filter_map(|line| line.trim().strip_prefix("waiting for a migration at "));
    addresses.next().map(str::to_owned)
}

/// Whether a line of /proc/PID/stat is that of a process that has ended.
fn is_dead(stat: &str) -> bool {
    // The name may hold anything, the state follows its last parenthesis.
    stat.rsplit_once(')').is_some_and(|(_, fields)| fields.trim_start().starts_with('Z'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_read_when_its_line_is_whole() {
        assert_eq!(address_in("waiting for a migration at tcp:1.2.3.4:5"), None);
        let said = "note: x\nwaiting for a migration at tcp:1.2.3.4:56\nreceived 3 MiB";
        assert_eq!(address_in(said).as_deref(), Some("tcp:1.2.3.4:56"));
    }

    #[test]
    fn the_dead_are_told_from_the_living() {
        assert!(is_dead("12 (a) Z b) Z 1 1"));
        assert!(!is_dead("12 (a) Z b) S 1 1"));
    }

    #[test]
    fn its_end_comes_with_its_accounts() {
        let folder = std::env::temp_dir();
        let files = folder.join(format!("whimbrel-helper-{}", std::process::id()));
        let shell = |script: &str| {
            let mut command = Command::new("sh");
            command.args(["-c", script]);
            Helper::start(command, &files).unwrap().wait(Duration::from_secs(60))
        };
        let ended = shell("echo '{\"a\": 1}'").unwrap();
        assert_eq!(ended.said["a"], 1);
        assert!(ended.cpu_s >= 0.0);
        let error = shell("echo why >&2; exit 3").unwrap_err().to_string();
        assert!(error.contains("why"), "{error}");
        for extension in ["output", "stderr"] {
            fs::remove_file(files.with_extension(extension)).unwrap();
        }
    }
}
