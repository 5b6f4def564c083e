//! A `whimbrel vm`, seen through its QMP and through the kernel.

use std::fs::{self, File};
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use rustix::process::Pid;
use serde_json::{Value, json};
use whimbrel_control::{Client, ClientError, Endpoint};

use crate::census::Census;
use crate::plan::{Scene, Side};
use crate::proxy::Place;

/// How long a process may take to start.
const STARTED: Duration = Duration::from_secs(20);
/// How long an answer may take, on a machine with too much to do.
const ANSWERED: Duration = Duration::from_secs(10);
/// How long a process may take to end: a second for vCPUs that wait for pages is among it.
const ENDED: Duration = Duration::from_secs(10);

/// Something that a VM has told, with its own time: microseconds since 1970.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Heard {
    pub(crate) micros: u64,
    pub(crate) what: What,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum What {
    /// The guest stands still.
    Stop,
    /// The guest runs.
    Resume,
    /// The migration is in another state.
    Migration(String),
}

/// What is known of a side.
#[derive(Clone, Debug, Default)]
pub(crate) struct Seen {
    /// The migration's state.
    pub(crate) status: String,
    pub(crate) error: Option<String>,
    /// The guest's state.
    pub(crate) run_state: String,
}

/// What the options of a process are, beside the scene.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Making<'m> {
    pub(crate) binary: &'m Path,
    /// Of TLS, for both endpoints.
    pub(crate) credentials: &'m Path,
    /// Where its files go.
    pub(crate) folder: &'m Path,
    pub(crate) huge: bool,
}

/// One process. Dropped, it is killed.
#[derive(Debug)]
pub(crate) struct Vm {
    pub(crate) side: Side,
    child: Child,
    qmp: Client,
    pub(crate) seen: Seen,
    /// How it ended, once it has.
    pub(crate) ended: Option<ExitStatus>,
    before: Option<Census>,
}

impl Vm {
    pub(crate) fn start(side: Side, scene: &Scene, making: Making<'_>) -> Result<Vm> {
        let name = side.name();
        let socket = making.folder.join(format!("{name}.qmp"));
        let log = making.folder.join(format!("{name}.log"));
        let page = if making.huge { "2M" } else { "4k" };
        let mut command = Command::new(making.binary);
        command
            .args(["vm", "--accel=native", "--serial=none"])
            .arg(format!("--memory={}", scene.memory))
            .arg(format!("--workload={}", scene.workload))
            .arg(format!("--fill={}", scene.fill))
            .arg(format!("--page-size={page}"))
            .arg(format!("--qmp=unix:{}", socket.display()))
            // Free memory is the system's again, so that what is not can be told.
            .env("MALLOC_ARENA_MAX", "1");
        if scene.tls {
            command.arg(format!("--tls-creds={}", making.credentials.display()));
        }
        match side {
            Side::Source if scene.tls => {
                command.arg("--tls-hostname=localhost");
            }
            Side::Source => {}
            Side::Destination => {
                command.arg("--incoming=defer");
            }
        }
        if side == Side::Destination && scene.paused {
            command.arg("--paused");
        }
        let mut child = command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(File::create(&log)?)
            .spawn()
            .with_context(|| format!("{} does not start", making.binary.display()))?;
        let qmp = connect(&socket, &log, &mut child).inspect_err(|_| {
            let _ = child.kill();
            let _ = child.wait();
        })?;
        Ok(Vm { side, child, qmp, seen: Seen::default(), ended: None, before: None })
    }

    pub(crate) fn id(&self) -> u32 {
        self.child.id()
    }

    pub(crate) fn pid(&self) -> Pid {
        Pid::from_child(&self.child)
    }

    /// Says how the guest is to go; what it has from here on is what it is to have afterwards.
    pub(crate) fn set_up(&mut self, scene: &Scene, abilities: &Abilities) -> Result<()> {
        let way = scene.way;
        self.qmp.set_capabilities_named(&[
            ("events", true),
            ("return-path", true),
            ("postcopy-ram", way.is_postcopy()),
            ("postcopy-preempt", way.is_preempt()),
            ("multifd", way.is_multifd()),
        ])?;
        let mut parameters = json!({
            "max-bandwidth": scene.bandwidth,
            "max-postcopy-bandwidth": scene.bandwidth,
            "downtime-limit": scene.downtime_limit,
            "multifd-compression": scene.compression,
        });
        if scene.channels > 0 {
            parameters["multifd-channels"] = scene.channels.into();
        }
        if abilities.recovers {
            // Longer than anything here lasts.
            parameters["recover-time-limit"] = 60.into();
            parameters["auto-recover"] = if scene.by_hand { "off" } else { "auto" }.into();
        }
        if abilities.notices_silence {
            // Short, so that ten thousand runs end on the same day; longer than what only lasts a while.
            parameters["silence-limit"] = 600.into();
        }
        self.qmp.set_parameters(parameters)?;
        self.before = Some(Census::take(self.id())?);
        Ok(())
    }

    /// What this version can do beyond the first of its kind.
    pub(crate) fn abilities(&mut self) -> Result<Abilities> {
        let parameters = self.qmp.query_parameters()?;
        Ok(Abilities {
            recovers: parameters.get("auto-recover").is_some(),
            notices_silence: parameters.get("silence-limit").is_some(),
        })
    }

    /// Waits at `place`; gives where it really does.
    pub(crate) fn listen(&mut self, command: &str, place: &Place) -> Result<Place> {
        let mut arguments = json!({ "uri": place.to_string() });
        if command == "migrate-incoming" {
            // It is still to be asked what it has when that failed.
            arguments["exit-on-error"] = false.into();
        }
        self.qmp.execute(command, arguments)?;
        let report = self.qmp.query_migrate()?;
        match report.raw["socket-address"][0]["port"].as_str() {
            Some(port) => Ok(Place::Tcp(port.parse()?)),
            None => Ok(place.clone()),
        }
    }

    pub(crate) fn execute(&mut self, command: &str, arguments: Value) -> Result<Value> {
        Ok(self.qmp.execute(command, arguments)?)
    }

    /// Whether it ran into its end, or was sent there.
    pub(crate) fn is_gone(&self) -> bool {
        self.ended.is_some()
    }

    /// Looks at how it is, and gives what it has told meanwhile. A process that has ended is seen to
    /// have.
    pub(crate) fn look(&mut self) -> Result<Vec<Heard>> {
        if self.is_gone() {
            return Ok(Vec::new());
        }
        match self.ask() {
            Ok(heard) => Ok(heard),
            Err(error) => match self.gone_within(Duration::from_millis(500))? {
                true => Ok(Vec::new()),
                false => bail!("the {} does not answer: {error}", self.side.name()),
            },
        }
    }

    fn ask(&mut self) -> Result<Vec<Heard>, ClientError> {
        let report = self.qmp.query_migrate()?;
        let run_state = self.qmp.query_status()?.status;
        self.seen =
            Seen { status: report.status.to_string(), error: report.info.error_desc, run_state };
        let mut heard = Vec::new();
        // After the answers: whatever came before them is here.
        while let Some(event) = self.qmp.next_event(Duration::ZERO)? {
            let what = match event.name.as_str() {
                "STOP" => What::Stop,
                "RESUME" => What::Resume,
                "MIGRATION" => {
                    What::Migration(event.data["status"].as_str().unwrap_or("?").to_owned())
                }
                _ => continue,
            };
            let micros = event.seconds * 1_000_000 + u64::from(event.microseconds);
            heard.push(Heard { micros, what });
        }
        Ok(heard)
    }

    /// Whether the process has ended, if it does so soon.
    fn gone_within(&mut self, limit: Duration) -> Result<bool> {
        let until = Instant::now() + limit;
        loop {
            self.ended = self.child.try_wait()?;
            if self.ended.is_some() || Instant::now() > until {
                return Ok(self.is_gone());
            }
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// `query-migrate`, whole; for a report.
    pub(crate) fn report(&mut self) -> String {
        match self.qmp.query_migrate() {
            Ok(report) => report.raw.to_string(),
            Err(error) => error.to_string(),
        }
    }

    /// Page updates the guest has done on this host.
    pub(crate) fn updates(&mut self) -> Result<u64> {
        let progress = self.execute("x-guest-progress", json!({}))?;
        if let Some(failure) = progress["failure"].as_str() {
            bail!("a vCPU of the {} failed: {failure}", self.side.name());
        }
        progress["updates"].as_u64().context("no number of updates")
    }

    /// That nothing is left here of the migration that is over.
    pub(crate) fn check_leaks(&mut self, guest_kib: u64) -> Result<()> {
        const GONE_WITHIN: Duration = Duration::from_secs(3);
        let before = self.before.as_ref().context("it was not counted before")?;
        let until = Instant::now() + GONE_WITHIN;
        loop {
            let Some(leaked) = Census::take(self.child.id())?.leaked_since(before, guest_kib)
            else {
                return Ok(());
            };
            ensure!(Instant::now() < until, "left behind at the {}: {leaked}", self.side.name());
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// Ends it in good order.
    pub(crate) fn quit(&mut self) -> Result<()> {
        if self.is_gone() {
            return Ok(());
        }
        match self.qmp.execute("quit", json!({})) {
            Ok(_) | Err(ClientError::Closed { .. }) => {}
            Err(error) => return Err(error.into()),
        }
        ensure!(self.gone_within(ENDED)?, "the {} did not end on 'quit'", self.side.name());
        let status = self.ended.context("it has ended")?;
        ensure!(status.success(), "the {} ended with {status}", self.side.name());
        Ok(())
    }

    /// Without mercy.
    pub(crate) fn kill(&mut self) {
        // Both fail only for a process that is gone, which is what is wanted.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        self.kill();
    }
}

fn connect(socket: &Path, log: &Path, child: &mut Child) -> Result<Client> {
    let until = Instant::now() + STARTED;
    loop {
        if socket.exists()
            && let Ok(client) = Client::connect(Endpoint::Unix(socket.to_owned()), ANSWERED)
        {
            return Ok(client);
        }
        let said = || fs::read_to_string(log).unwrap_or_default();
        if let Some(status) = child.try_wait()? {
            bail!("it ended at once with {status}: {}", said().trim());
        }
        ensure!(Instant::now() < until, "no QMP within {} s: {}", STARTED.as_secs(), said());
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// What is expected of the version under test, by what it says that it can do.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Abilities {
    /// A postcopy whose link is lost goes on by itself, and on request.
    pub(crate) recovers: bool,
    /// A peer that is silent is noticed.
    pub(crate) notices_silence: bool,
}
