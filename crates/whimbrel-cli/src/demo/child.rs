//! A `whimbrel vm` of the demo's own.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use whimbrel_control::{Client, Endpoint, PeerEvent};

use crate::drive::COMMAND;
use crate::failure::Failure;

/// How long a VM may take to be built: its memory may have to be filled first.
const BUILT: Duration = Duration::from_secs(120);

/// A process that runs a VM. Dropped before [`quit`](Child::quit), it is killed.
#[derive(Debug)]
pub(super) struct Child {
    role: &'static str,
    process: std::process::Child,
    errors: PathBuf,
    pub(super) qmp: Client,
}

impl Child {
    /// Starts a VM and waits until its QMP answers.
    pub(super) fn start(
        role: &'static str,
        folder: &Path,
        options: &[String],
        more: &[&str],
    ) -> Result<Child, Failure> {
        let socket = folder.join(format!("{role}.qmp"));
        let errors = folder.join(format!("{role}.log"));
        let mut process = Command::new(std::env::current_exe()?)
            .arg("vm")
            .args(options)
            .args(more)
            .arg("--serial=none")
            .arg(format!("--qmp=unix:{}", socket.display()))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(std::fs::File::create(&errors)?)
            .spawn()?;
        let until = Instant::now() + BUILT;
        loop {
            let endpoint = Endpoint::Unix(socket.clone());
            if socket.exists()
                && let Ok(qmp) = Client::connect(endpoint, COMMAND)
            {
                return Ok(Child { role, process, errors, qmp });
            }
            if process.try_wait()?.is_some() {
                return Err(said(role, &errors));
            }
            if Instant::now() > until {
                // It hangs: killed, and waited for below.
                let _ = process.kill();
                let _ = process.wait();
                return Err(Failure::new(format!("the {role} VM did not start within {BUILT:?}")));
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// What has happened since it was last asked.
    pub(super) fn events(&mut self) -> Result<Vec<PeerEvent>, Failure> {
        let mut events = Vec::new();
        while let Some(event) = self.qmp.next_event(Duration::ZERO)? {
            events.push(event);
        }
        Ok(events)
    }

    /// The process.
    pub(super) fn id(&self) -> u32 {
        self.process.id()
    }

    /// Kills it (SIGKILL).
    pub(super) fn kill(mut self) -> Result<(), Failure> {
        self.process.kill()?;
        self.process.wait()?;
        Ok(())
    }

    /// Ends the VM in order.
    pub(super) fn quit(mut self) -> Result<(), Failure> {
        self.qmp.execute("quit", serde_json::json!({}))?;
        let status = self.process.wait()?;
        match status.success() {
            true => Ok(()),
            false => Err(said(self.role, &self.errors)),
        }
    }
}

fn said(role: &str, errors: &Path) -> Failure {
    let text = std::fs::read_to_string(errors).unwrap_or_default();
    let text = text.trim().trim_start_matches("whimbrel: ");
    Failure::new(format!("the {role} VM ended: {text}"))
}

impl Drop for Child {
    fn drop(&mut self) {
        if matches!(self.process.try_wait(), Ok(None)) {
            // Gone meanwhile is as good.
            let _ = self.process.kill();
            let _ = self.process.wait();
        }
    }
}
