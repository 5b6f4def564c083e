//! The contenders: how each is started and told what to do.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result};
use serde_json::json;
use whimbrel_peers::qmp::Qmp;
use whimbrel_peers::wait;

use super::scenario::{Guest, Method, Room, Scenario, Tls};
use super::ticker;
use crate::bench::contender::{Memory, Qemu, Side};
use crate::bench::network::{End, Way};

/// A dirtying guest's working set: a thirtieth of what is moved, so that what it holds matters little.
pub(super) const WORKING_SET_MIB: u32 = 128;
/// From power on to the first tick: the firmware, without KVM.
const BOOT_MAX: Duration = Duration::from_secs(60);
/// The object that holds the credentials.
const CREDENTIALS: &str = "tls0";

/// Who moves the guest.
#[derive(Debug, Clone)]
pub(super) enum Engine {
    Whimbrel { binary: PathBuf },
    Qemu { qemu: Qemu, version: String },
}

/// What does not change from run to run.
#[derive(Debug, Clone)]
pub(super) struct Setup {
    pub(super) memory: Memory,
    /// Pages a second.
    pub(super) dirty_rate: u32,
    pub(super) zlib_level: u8,
    pub(super) zstd_level: u8,
    pub(super) zero_copy: bool,
    /// Where the certificates are, laid out as QEMU's.
    pub(super) credentials: Option<PathBuf>,
    /// For what is made for each run.
    pub(super) folder: PathBuf,
}

impl Engine {
    pub(super) fn name(&self) -> String {
        match self {
            Self::Whimbrel { .. } => "whimbrel".to_owned(),
            Self::Qemu { version, .. } => format!("QEMU {version}"),
        }
    }

    pub(super) fn is_qemu(&self) -> bool {
        matches!(self, Self::Qemu { .. })
    }

    /// Starts one end: the source with its guest and its content, the destination waiting.
    pub(super) fn start(
        &self,
        end: End,
        scenario: Scenario,
        setup: &Setup,
        (content, way): (&Path, Way<'_>),
    ) -> Result<Side> {
        let mut command = match self {
            Self::Whimbrel { binary } => whimbrel(binary, end, scenario, setup, content),
            Self::Qemu { qemu, .. } => {
                qemu_command(qemu.command()?, end, scenario, setup, content)?
            }
        };
        command.arg(if self.is_qemu() { "-qmp" } else { "--qmp" });
        let name = match end {
            End::Source => "source",
            End::Destination => "destination",
        };
        Side::start(way.at(end, command), &setup.folder.join(name), |socket| match self {
            Self::Whimbrel { .. } => format!("unix:{}", socket.display()),
            Self::Qemu { .. } => format!("unix:{},server=on,wait=off", socket.display()),
        })
    }

    /// Sets what both sides have to be set to, and what only the source needs.
    pub(super) fn configure(
        qmp: &mut Qmp,
        end: End,
        (scenario, method): (Scenario, Method),
        setup: &Setup,
    ) -> Result<()> {
        let mut capabilities = vec!["events", "return-path"];
        let mut parameters = json!({});
        if scenario.channels > 0 {
            capabilities.push("multifd");
            parameters["multifd-channels"] = json!(scenario.channels);
            parameters["multifd-compression"] = json!(method.compression.name());
            parameters["multifd-zlib-level"] = json!(setup.zlib_level);
            parameters["multifd-zstd-level"] = json!(setup.zstd_level);
        }
        if setup.zero_copy && method == Method::PLAIN {
            capabilities.push("zero-copy-send");
        }
        if method.tls == Tls::On {
            let folder = setup.credentials.as_ref().context("there are no certificates")?;
            let endpoint = match end {
                End::Source => "client",
                End::Destination => "server",
            };
            let object = json!({
                "qom-type": "tls-creds-x509",
                "id": CREDENTIALS,
                "dir": folder,
                "endpoint": endpoint,
                "verify-peer": true,
            });
            qmp.execute("object-add", &object)?;
            parameters["tls-creds"] = json!(CREDENTIALS);
        }
        if end == End::Source {
            parameters["max-bandwidth"] = json!(0);
        }
        qmp.enable(&capabilities)?;
        qmp.execute("migrate-set-parameters", &parameters).map(drop)
    }

    /// Waits until the guest does what the scenario says.
    pub(super) fn settle(&self, scenario: Scenario, qmp: &mut Qmp, setup: &Setup) -> Result<()> {
        // Whimbrel's has its working set, and runs, before its control socket is there.
        if !self.is_qemu() || scenario.guest == Guest::Idle {
            return Ok(());
        }
        let piece = setup.folder.join("piece");
        let place = json!({
            "val": ticker::RECORD_AT,
            "size": ticker::RECORD_BYTES,
            "filename": piece,
        });
        wait::until("the guest to dirty its memory", BOOT_MAX, || {
            qmp.execute("pmemsave", &place)?;
            Ok(ticker::ticks(&fs::read(&piece)?).filter(|ticks| *ticks > 0).map(drop))
        })
    }

    /// Why it cannot do this at all, if it cannot: what it says when it is told to.
    pub(super) fn obstacle(
        &self,
        scenario: Scenario,
        method: Method,
        setup: &Setup,
    ) -> Option<String> {
        let probe = || -> Result<()> {
            let memory = Memory::parse("64M").map_err(anyhow::Error::msg)?;
            let small = Setup { memory, ..setup.clone() };
            let bare = Scenario { guest: Guest::Idle, room: Room::Untouched, ..scenario };
            let end = End::Destination;
            let mut side = self.start(end, bare, &small, (Path::new(""), Way::Loopback))?;
            Self::configure(&mut side.qmp, end, (scenario, method), setup)
        };
        probe().err().map(|error: anyhow::Error| format!("{error:#}"))
    }
}

fn whimbrel(binary: &Path, end: End, scenario: Scenario, setup: &Setup, content: &Path) -> Command {
    let workload = match scenario.guest {
        Guest::Idle => "idle,working-set=1M".to_owned(),
        Guest::Dirtying => {
            format!("uniform,rate={},working-set={WORKING_SET_MIB}M", setup.dirty_rate)
        }
    };
    let mut command = Command::new(binary);
    command.args(["vm", "--accel", "native", "--vcpus", "1", "--serial", "none"]).args([
        "--workload",
        &workload,
        "--memory",
        &setup.memory.argument(),
    ]);
    match end {
        End::Source => {
            command.arg(format!("--fill=file:{}", content.display()));
        }
        End::Destination => {
            command.args(["--incoming", "defer"]);
            if scenario.room == Room::Preallocated {
                command.arg("--prefault");
            }
        }
    }
    command
}

fn qemu_command(
    mut command: Command,
    end: End,
    scenario: Scenario,
    setup: &Setup,
    content: &Path,
) -> Result<Command> {
    let bytes = setup.memory.bytes();
    let backend = match end {
        // What is in the file is in the guest without a copy; what the guest writes stays its own.
        End::Source => format!(
            "memory-backend-file,id=ram,size={bytes},share={},mem-path={}",
            if scenario.guest == Guest::Idle { "on" } else { "off" },
            content.display()
        ),
        End::Destination => {
            let prealloc = if scenario.room == Room::Preallocated { "on" } else { "off" };
            format!("memory-backend-ram,id=ram,size={bytes},prealloc={prealloc}")
        }
    };
    command
        .args(["-accel", "tcg", "-machine", "q35,memory-backend=ram", "-nodefaults"])
        .args(["-no-user-config", "-display", "none", "-m", &setup.memory.argument()])
        .args(["-object", &backend]);
    match scenario.guest {
        // Nothing is written over the content.
        Guest::Idle => {
            command.arg("-S");
        }
        Guest::Dirtying => {
            let image = setup.folder.join("ticker");
            fs::write(&image, ticker::image(setup.dirty_rate, WORKING_SET_MIB))?;
            command.arg("-kernel").arg(image);
        }
    }
    if end == End::Destination {
        command.args(["-incoming", "defer"]);
    }
    Ok(command)
}
