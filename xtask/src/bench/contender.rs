//! A migration engine under measurement: two processes of it, both driven over QMP.

use std::fs::{self, File};
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::json;
use whimbrel_peers::install::{Peer, install};
use whimbrel_peers::qmp::Qmp;
use whimbrel_peers::wait;

use super::sample::Sample;
use crate::workspace::Workspace;

/// From the start of a process to its greeting: it may be preallocating many GiB.
const START_MAX: Duration = Duration::from_secs(120);
const MIGRATION_MAX: Duration = Duration::from_secs(300);
/// The kernel's unit of processor time in /proc, whatever its own clock.
const TICKS_PER_SECOND: f64 = 100.0;

/// How much memory is moved.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Memory {
    mib: u32,
}

impl Memory {
    /// From `2G` or `512M`.
    pub(crate) fn parse(text: &str) -> Result<Self, String> {
        let (digits, mib_per_unit) = match text.split_at_checked(text.len().saturating_sub(1)) {
            Some((digits, "G")) => (digits, 1024),
            Some((digits, "M")) => (digits, 1),
            Some(_) | None => return Err("expected a size such as 2G or 512M".to_owned()),
        };
        let units: u32 = digits.parse().map_err(|error| format!("{digits:?}: {error}"))?;
        let mib = units.checked_mul(mib_per_unit).filter(|mib| *mib > 0);
        Ok(Self { mib: mib.ok_or("out of range")? })
    }

    pub(crate) fn bytes(self) -> u64 {
        u64::from(self.mib) << 20
    }

    pub(crate) fn gib(self) -> f64 {
        f64::from(self.mib) / 1024.0
    }

    pub(crate) fn gigabytes(self) -> f64 {
        self.gib() * 1.073_741_824
    }

    /// As QEMU and whimbrel take it.
    pub(crate) fn argument(self) -> String {
        format!("{}M", self.mib)
    }
}

/// What the memory holds, and what the destination has done before.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Scenario {
    pub(crate) name: &'static str,
    /// Pseudo-random bytes; else zeros.
    pub(crate) incompressible: bool,
    /// Whether every page of the destination was taken from the host before.
    pub(crate) preallocated: bool,
}

/// Who moves it.
#[derive(Debug, Clone)]
pub(crate) enum Contender {
    /// This workspace's release build.
    Whimbrel { binary: PathBuf },
    /// A stock QEMU.
    Qemu { qemu: Qemu, version: String },
}

/// Where a QEMU comes from.
#[derive(Debug, Clone)]
pub(crate) enum Qemu {
    /// One that was fetched into this folder.
    Fetched { peer: Peer, folder: PathBuf },
    /// The user's own.
    Given(PathBuf),
}

impl Qemu {
    /// The user's own, or the newest one that can be fetched.
    pub(crate) fn find(workspace: &Workspace, given: Option<&Path>) -> Result<Self> {
        if let Some(path) = given {
            return Ok(Self::Given(path.canonicalize().context(path.display().to_string())?));
        }
        let folder = workspace.target("peers");
        let missing = install(&folder);
        if let Some((_, why)) = missing.peers.iter().find(|(peer, _)| *peer == Peer::V10_0) {
            bail!("no QEMU to measure against ({why}): name one with --qemu PATH");
        }
        Ok(Self::Fetched { peer: Peer::V10_0, folder })
    }

    pub(crate) fn command(&self) -> Result<Command> {
        match self {
            Self::Fetched { peer, folder } => peer.command_in(folder),
            Self::Given(path) => Ok(Command::new(path)),
        }
    }

    /// From `QEMU emulator version 10.0.2 (..)`.
    pub(crate) fn version(&self) -> Result<String> {
        let output = self.command()?.arg("--version").output()?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let version = text.split_whitespace().nth(3).context("qemu --version says no version")?;
        Ok(version.to_owned())
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Role {
    Source,
    Destination,
}

impl Contender {
    pub(crate) fn name(&self) -> String {
        match self {
            Self::Whimbrel { .. } => "whimbrel".to_owned(),
            Self::Qemu { version, .. } => format!("QEMU {version}"),
        }
    }

    fn command(
        &self,
        role: Role,
        scenario: Scenario,
        memory: Memory,
        content: &Path,
    ) -> Result<Command> {
        match self {
            Self::Whimbrel { binary } => {
                let mut command = Command::new(binary);
                command.args(["vm", "--accel", "native", "--workload", "idle,working-set=1M"]);
                command.args(["--memory", &memory.argument()]);
                match role {
                    Role::Source if scenario.incompressible => command.args(["--fill", "random"]),
                    Role::Source => &mut command,
                    Role::Destination => command.args(["--incoming", "defer"]),
                };
                if role == Role::Destination && scenario.preallocated {
                    command.arg("--prefault");
                }
                command.arg("--qmp");
                Ok(command)
            }
            Self::Qemu { qemu, .. } => {
                let mut command = qemu.command()?;
                let bytes = memory.bytes();
                let backend = match role {
                    // Shared, so that what is in the file is in the guest without a copy.
                    Role::Source if scenario.incompressible => format!(
                        "memory-backend-file,id=ram,size={bytes},share=on,mem-path={}",
                        content.display()
                    ),
                    Role::Source => format!("memory-backend-ram,id=ram,size={bytes}"),
                    Role::Destination => {
                        let prealloc = if scenario.preallocated { "on" } else { "off" };
                        format!("memory-backend-ram,id=ram,size={bytes},prealloc={prealloc}")
                    }
                };
                command
                    .args(["-accel", "tcg", "-machine", "q35,memory-backend=ram", "-nodefaults"])
                    .args(["-display", "none", "-m", &memory.argument(), "-object", &backend])
                    // Idle, and nothing written over the content.
                    .arg("-S");
                if role == Role::Destination {
                    command.args(["-incoming", "defer"]);
                }
                command.arg("-qmp");
                Ok(command)
            }
        }
    }

    /// The control socket's address, as each writes it.
    fn qmp_argument(&self, socket: &Path) -> String {
        match self {
            Self::Whimbrel { .. } => format!("unix:{}", socket.display()),
            Self::Qemu { .. } => format!("unix:{},server=on,wait=off", socket.display()),
        }
    }

    /// One migration between two fresh processes.
    pub(crate) fn sample(
        &self,
        scenario: Scenario,
        memory: Memory,
        folder: &Path,
        content: &Path,
    ) -> Result<Sample> {
        let start = |role, name| {
            let command = self.command(role, scenario, memory, content)?;
            Side::start(command, &folder.join(name), |socket| self.qmp_argument(socket))
        };
        let mut source = start(Role::Source, "source")?;
        let mut destination = start(Role::Destination, "destination")?;
        let unlimited = json!({ "max-bandwidth": 0 });
        source.qmp.execute("migrate-set-parameters", &unlimited)?;
        source.qmp.enable(&["events"])?;
        let listen = json!({ "uri": "tcp:127.0.0.1:0" });
        destination.qmp.execute("migrate-incoming", &listen)?;
        let report = destination.qmp.execute("query-migrate", &json!({}))?;
        let port = report["socket-address"][0]["port"].as_str().context("no port to go to")?;
        let uri = format!("tcp:127.0.0.1:{port}");

        let before = (source.cpu()?, destination.cpu()?);
        let begun = Instant::now();
        source.qmp.migrate(&uri)?;
        loop {
            let event = source.qmp.wait_event("MIGRATION", MIGRATION_MAX)?;
            match event.data["status"].as_str() {
                Some("completed") => break,
                Some("failed" | "cancelled") => bail!("{}: the migration failed", self.name()),
                Some(_) | None => {}
            }
        }
        let seconds = begun.elapsed().as_secs_f64();
        destination.qmp.wait_migrated(MIGRATION_MAX)?;
        Ok(Sample {
            gigabytes_per_second: memory.gigabytes() / seconds,
            source_cpu_per_gib: (source.cpu()? - before.0) / memory.gib(),
            destination_cpu_per_gib: (destination.cpu()? - before.1) / memory.gib(),
        })
    }
}

/// One process of the two. Dropped, it is killed.
pub(crate) struct Side {
    child: Child,
    pub(crate) qmp: Qmp,
}

impl Side {
    /// Starts it, with the argument for its control socket added.
    pub(crate) fn start(
        mut command: Command,
        files: &Path,
        qmp_argument: impl FnOnce(&Path) -> String,
    ) -> Result<Self> {
        let socket = files.with_extension("qmp");
        let complaints = files.with_extension("stderr");
        // A socket of an earlier run would be in the way.
        let _ = fs::remove_file(&socket);
        let mut child = command
            .arg(qmp_argument(&socket))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(File::create(&complaints)?)
            .spawn()
            .with_context(|| format!("{} did not start", command.get_program().display()))?;
        let connected = wait::until("the control socket", START_MAX, || {
            if let Some(status) = child.try_wait()? {
                let said = fs::read_to_string(&complaints).unwrap_or_default();
                bail!("ended at once ({status}): {}", said.trim());
            }
            Ok(Qmp::connect(&socket).ok())
        });
        match connected {
            Ok(qmp) => Ok(Self { child, qmp }),
            Err(error) => {
                end(&mut child);
                Err(error)
            }
        }
    }

    /// Its process.
    pub(crate) fn id(&self) -> u32 {
        self.child.id()
    }

    /// Its processor time so far.
    pub(crate) fn cpu(&self) -> Result<f64> {
        cpu_seconds(self.child.id())
    }
}

impl Drop for Side {
    fn drop(&mut self) {
        end(&mut self.child);
    }
}

/// Kills and reaps. Both fail only for a process that is gone, which is what is wanted.
fn end(child: &mut Child) {
    let _ = child.kill();
    let _ = child.wait();
}

/// The processor time of a process so far, user and system, all its threads.
pub(crate) fn cpu_seconds(process: u32) -> Result<f64> {
    let path = format!("/proc/{process}/stat");
    let stat = fs::read_to_string(&path).with_context(|| path.clone())?;
    // The name may hold anything; what follows its last parenthesis begins with field 3.
    let (_, fields) = stat.rsplit_once(')').with_context(|| path.clone())?;
    let mut ticks = fields.split_whitespace().skip(11).map(str::parse::<u32>);
    let (Some(Ok(user)), Some(Ok(system))) = (ticks.next(), ticks.next()) else {
        bail!("{path} has no processor times")
    };
    Ok(f64::from(user.saturating_add(system)) / TICKS_PER_SECOND)
}

/// Bytes that nothing compresses (xorshift64), the same every time.
pub(crate) fn random_bytes(count: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut bytes = Vec::with_capacity(count.next_multiple_of(8));
    while bytes.len() < count {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend(state.to_le_bytes());
    }
    bytes.truncate(count);
    bytes
}

/// A file of incompressible bytes, as a source's memory.
pub(crate) fn content_file(folder: &Path, memory: Memory) -> Result<PathBuf> {
    let path = folder.join("content");
    let mut file = File::create(&path).with_context(|| path.display().to_string())?;
    let count = usize::try_from(memory.bytes()).context("more than this machine addresses")?;
    file.write_all(&random_bytes(count))?;
    ensure!(file.metadata()?.len() == memory.bytes(), "{} is short", path.display());
    Ok(path)
}

/// The whimbrel of this workspace, built as users run it.
pub(crate) fn whimbrel(workspace: &Workspace) -> Result<PathBuf> {
    let status = workspace
        .cargo()
        .args(["build", "--quiet", "--release", "--locked", "--package", "whimbrel-cli"])
        .status()?;
    ensure!(status.success(), "the whimbrel command does not build");
    Ok(workspace.target("release/whimbrel"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read() {
        assert_eq!(Memory::parse("2G").unwrap().bytes(), 2 << 30);
        assert_eq!(Memory::parse("512M").unwrap().argument(), "512M");
        for bad in ["", "G", "2", "2T", "99999999999G", "0M"] {
            assert!(Memory::parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn our_own_time_is_counted() {
        let before = cpu_seconds(std::process::id()).unwrap();
        let begun = Instant::now();
        while begun.elapsed() < Duration::from_millis(100) {
            std::hint::spin_loop();
        }
        assert!(cpu_seconds(std::process::id()).unwrap() > before);
    }
}
