//! A running QEMU: its control socket, its guest's console, and its end.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, ExitStatus, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use serde_json::json;

use crate::console::Console;
use crate::guest::Guest;
use crate::install::Peer;
use crate::memory::{Backing, Memory};
use crate::qmp::Qmp;
use crate::wait;

/// From the start of the process to its greeting.
const START_MAX: Duration = Duration::from_secs(60);

/// What a QEMU does when it has started.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Begin {
    /// Boot the guest.
    Boot,
    /// Wait for [`Qemu::listen`].
    Incoming,
    /// The same, and do not run what has come.
    IncomingStopped,
}

/// A QEMU to be started.
#[derive(Debug, Clone, Copy)]
pub struct Machine<'a> {
    /// Which QEMU.
    pub peer: Peer,
    /// The machine type, such as `pc-q35-7.2`.
    pub machine: &'a str,
    /// The guest, which decides how much memory, and the devices.
    pub guest: &'a dyn Guest,
    /// What the memory lies in.
    pub backing: Backing,
}

/// A running QEMU. Dropped, it is killed.
#[derive(Debug)]
pub struct Qemu {
    name: String,
    child: Child,
    complaints: PathBuf,
    /// Where it is saved, and its size in bytes.
    memory: (PathBuf, u64),
    /// Another control socket: a QEMU listens to one client on each.
    other_control: PathBuf,
    /// The guest's serial port.
    pub console: Console,
    /// The control socket.
    pub qmp: Qmp,
}

impl Machine<'_> {
    /// Starts it; its files are called `name` in `folder`.
    ///
    /// # Errors
    /// QEMU is not there or refuses its arguments, in its own words.
    pub fn start(&self, folder: &Path, name: &str, begin: Begin) -> Result<Qemu> {
        let file = |extension: &str| folder.join(format!("{name}.{extension}"));
        let (socket, other_control, complaints) = (file("qmp"), file("qmp2"), file("stderr"));
        let console = Console::at(&file("console"));
        let mut command = self.peer.command()?;
        command
            .args(["-accel", "tcg", "-machine", self.machine, "-name", name])
            .args(["-nodefaults", "-no-user-config", "-display", "none"])
            .arg("-chardev")
            .arg(format!("file,id=console,path={}", console.path().display()))
            .args(["-serial", "chardev:console"])
            .arg("-qmp")
            .arg(format!("unix:{},server=on,wait=off", socket.display()))
            .arg("-qmp")
            .arg(format!("unix:{},server=on,wait=off", other_control.display()))
            .args(self.backing.arguments(self.guest.mebibytes(), &file("ram")))
            .args(self.guest.arguments(folder)?);
        match begin {
            Begin::Boot => {}
            Begin::Incoming => _ = command.args(["-incoming", "defer"]),
            Begin::IncomingStopped => _ = command.args(["-incoming", "defer", "-S"]),
        }
        let mut child = command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(File::create(&complaints)?)
            .spawn()
            .with_context(|| format!("{name}: QEMU {} did not start", self.peer.version()))?;
        let connected = wait::until(&format!("{name}'s control socket"), START_MAX, || {
            if let Some(status) = child.try_wait()? {
                bail!("{name} ended at once ({status}): {}", last_line(&complaints));
            }
            Ok(Qmp::connect(&socket).ok())
        });
        let memory = (file("memory"), u64::from(self.guest.mebibytes()) << 20);
        match connected {
            Ok(qmp) => {
                let name = name.to_owned();
                Ok(Qemu { name, child, complaints, memory, other_control, console, qmp })
            }
            Err(error) => {
                end(&mut child);
                Err(error)
            }
        }
    }
}

impl Qemu {
    /// Begins to wait for a migration at `uri`, with these capabilities on. The port of
    /// `tcp:HOST:0` is chosen by QEMU; the answer names the real one.
    ///
    /// # Errors
    /// QEMU's own.
    pub fn listen(&mut self, uri: &str, capabilities: &[&str]) -> Result<String> {
        self.qmp.enable(capabilities)?;
        self.qmp.execute("migrate-incoming", &json!({ "uri": uri }))?;
        let Some(host) = uri.strip_prefix("tcp:").and_then(|rest| rest.strip_suffix(":0")) else {
            return Ok(uri.to_owned());
        };
        let report = self.qmp.execute("query-migrate", &json!({}))?;
        let port = report["socket-address"][0]["port"]
            .as_str()
            .with_context(|| format!("{}: no port in {report}", self.name))?;
        Ok(format!("tcp:{host}:{port}"))
    }

    /// Migrates to `uri` and waits for the end.
    ///
    /// # Errors
    /// The migration failed, in QEMU's words.
    pub fn migrate_away(
        &mut self,
        uri: &str,
        capabilities: &[&str],
        limit: Duration,
    ) -> Result<()> {
        self.qmp.enable(capabilities)?;
        self.qmp.migrate(uri)?;
        self.wait_migrated(limit)
    }

    /// A control socket for somebody else, as the command takes it.
    #[must_use]
    pub fn other_control(&self) -> String {
        format!("unix:{}", self.other_control.display())
    }

    /// Waits until a migration has this status.
    ///
    /// # Errors
    /// It does not have it within `limit`; with what was said last.
    pub fn wait_status(&mut self, status: &str, limit: Duration) -> Result<()> {
        let mut last = serde_json::Value::Null;
        let reached = wait::until(&format!("{} to be {status}", self.name), limit, || {
            last = self.qmp.execute("query-migrate", &json!({}))?;
            Ok((last["status"] == status).then_some(()))
        });
        reached.with_context(|| format!("last seen: {last}"))
    }

    /// Waits for the end of the migration under way, on either side.
    ///
    /// # Errors
    /// It failed, in QEMU's words.
    pub fn wait_migrated(&mut self, limit: Duration) -> Result<()> {
        let migrated = self.qmp.wait_migrated(limit);
        let name = self.name.clone();
        migrated.map(drop).with_context(|| format!("{name} says {:?}", self.complaint()))
    }

    /// The guest's memory. Only of one that stands still is it that of one moment.
    ///
    /// # Errors
    /// QEMU's own.
    pub fn memory(&mut self) -> Result<Memory> {
        let (path, size) = &self.memory;
        let name = path.to_str().context("a path in UTF-8")?;
        let arguments = json!({ "val": 0, "size": size, "filename": name });
        self.qmp.execute("pmemsave", &arguments)?;
        Memory::read(path)
    }

    /// The last line QEMU wrote to its standard error.
    #[must_use]
    pub fn complaint(&self) -> String {
        last_line(&self.complaints)
    }

    /// Waits until the process ends by itself.
    ///
    /// # Errors
    /// It does not within `limit`.
    pub fn wait_exit(&mut self, limit: Duration) -> Result<ExitStatus> {
        let what = format!("{} to end", self.name);
        wait::until(&what, limit, || Ok(self.child.try_wait()?))
    }

    /// The process, for its accounts.
    #[must_use]
    pub fn process(&self) -> u32 {
        self.child.id()
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        end(&mut self.child);
    }
}

/// Kills and reaps. Both fail only for a process that is gone, which is what is wanted.
fn end(child: &mut Child) {
    let _ = child.kill();
    let _ = child.wait();
}

fn last_line(path: &Path) -> String {
    let text = fs::read(path).unwrap_or_default();
    String::from_utf8_lossy(&text).lines().last().unwrap_or("nothing").to_owned()
}
