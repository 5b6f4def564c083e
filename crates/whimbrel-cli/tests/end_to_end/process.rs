//! `whimbrel` processes, each with a limit to how long it may take.

use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tempfile::TempDir;
use whimbrel_control::{Client, Endpoint};

/// Nothing in these tests takes longer, on the slowest machine.
pub(crate) const LIMIT: Duration = Duration::from_secs(180);

/// The command under test.
pub(crate) const WHIMBREL: &str = env!("CARGO_BIN_EXE_whimbrel");

/// A folder of the test's own.
pub(crate) fn folder() -> TempDir {
    tempfile::Builder::new().prefix("whimbrel-test-").tempdir().expect("a folder")
}

/// Waits until `done`; panics with `what` when it does not come.
pub(crate) fn until(what: &str, mut done: impl FnMut() -> bool) {
    let start = Instant::now();
    while !done() {
        assert!(start.elapsed() < LIMIT, "{what}: not within {LIMIT:?}");
        sleep(Duration::from_millis(2));
    }
}

/// How a process ended and what it said.
#[derive(Debug)]
pub(crate) struct Ended {
    pub(crate) status: ExitStatus,
    pub(crate) out: String,
    pub(crate) err: String,
}

impl Ended {
    pub(crate) fn expect_success(self, what: &str) -> String {
        assert!(self.status.success(), "{what}: {self:?}");
        self.out
    }

    /// It failed with one line on the standard error, which holds all of `texts`. Lines of
    /// progress may come before it.
    pub(crate) fn expect_line(self, what: &str, texts: &[&str]) -> String {
        const PROGRESS: [&str; 7] = [
            "waiting for a ",
            "received ",
            "setup",
            "active",
            "device",
            "postcopy-",
            "link lost, recovering ",
        ];
        assert_eq!(self.status.code(), Some(1), "{what}: {self:?}");
        let progress = |line: &&str| PROGRESS.iter().any(|start| line.starts_with(start));
        let lines: Vec<&str> = self.err.lines().skip_while(progress).collect();
        let [line] = lines[..] else { panic!("{what}: not one line: {self:?}") };
        assert!(line.starts_with("whimbrel: "), "{what}: {line}");
        for text in texts {
            assert!(line.contains(text), "{what}: no '{text}' in: {line}");
        }
        line.to_owned()
    }
}

/// Runs the command to its end.
pub(crate) fn whimbrel<S: AsRef<OsStr>>(arguments: &[S]) -> Ended {
    let mut command = Command::new(WHIMBREL);
    command.args(arguments);
    run(command)
}

/// Runs any command to its end.
pub(crate) fn run(mut command: Command) -> Ended {
    let folder = folder();
    let (out, err) = (folder.path().join("out"), folder.path().join("err"));
    let mut child = command
        .stdin(Stdio::null())
        .stdout(fs::File::create(&out).expect("a file"))
        .stderr(fs::File::create(&err).expect("a file"))
        .spawn()
        .expect("it starts");
    let status = wait(&mut child, &format!("{command:?}"));
    let text = |path: &Path| fs::read_to_string(path).expect("what it said");
    Ended { status, out: text(&out), err: text(&err) }
}

fn wait(child: &mut Child, what: &str) -> ExitStatus {
    let start = Instant::now();
    loop {
        if let Some(status) = child.try_wait().expect("our child") {
            return status;
        }
        if start.elapsed() > LIMIT {
            child.kill().expect("our child");
            child.wait().expect("our child");
            panic!("{what}: did not end within {LIMIT:?}");
        }
        sleep(Duration::from_millis(2));
    }
}

/// A `whimbrel` that runs beside the test. Dropped, it is killed.
pub(crate) struct Running {
    child: Child,
    folder: TempDir,
}

impl Running {
    pub(crate) fn start<S: AsRef<OsStr>>(arguments: &[S]) -> Running {
        let mut command = Command::new(WHIMBREL);
        command.args(arguments);
        Running::beside(command)
    }

    /// Runs any command beside the test.
    pub(crate) fn beside(mut command: Command) -> Running {
        let folder = folder();
        let err = fs::File::create(folder.path().join("err")).expect("a file");
        let child = command
            .stdin(Stdio::null())
            .stdout(fs::File::create(folder.path().join("out")).expect("a file"))
            .stderr(err)
            .spawn()
            .expect("it starts");
        Running { child, folder }
    }

    /// What it has said on the standard error so far.
    pub(crate) fn err(&self) -> String {
        fs::read_to_string(self.folder.path().join("err")).expect("what it said")
    }

    pub(crate) fn id(&self) -> u32 {
        self.child.id()
    }

    /// Where it says that it waits.
    pub(crate) fn waits_at(&self) -> String {
        let mut address = None;
        until("an address to be told", || {
            let err = self.err();
            let told = err.lines().filter_map(|line| line.strip_prefix("waiting for a "));
            let told = told.filter_map(|what| what.split_once(" at ")).map(|(_, at)| at).next();
            address = told.map(str::to_owned);
            address.is_some()
        });
        address.expect("told")
    }

    pub(crate) fn ended(mut self, what: &str) -> Ended {
        let status = wait(&mut self.child, what);
        let out = fs::read_to_string(self.folder.path().join("out")).expect("what it said");
        Ended { status, out, err: self.err() }
    }

    /// SIGINT, by which it ends in order.
    pub(crate) fn interrupt(&self) {
        let mut interrupt = Command::new("kill");
        interrupt.args(["-INT", &self.id().to_string()]);
        run(interrupt).expect_success("kill -INT");
    }

    /// SIGKILL.
    pub(crate) fn kill(mut self) {
        self.child.kill().expect("our child");
        self.child.wait().expect("our child");
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if matches!(self.child.try_wait(), Ok(None)) {
            self.child.kill().expect("our child");
            self.child.wait().expect("our child");
        }
    }
}

/// A `whimbrel vm` and its QMP.
pub(crate) struct VmProcess {
    pub(crate) process: Running,
    pub(crate) qmp: Client,
    /// Where the socket is, for who else wants to connect.
    _socket: TempDir,
}

/// The options of a small VM that every machine can run.
pub(crate) const SMALL: [&str; 4] = [
    "--accel=native",
    "--memory=16M",
    "--workload=uniform,rate=5000,working-set=1M",
    "--fill=random",
];

impl VmProcess {
    /// Starts a VM whose guest runs.
    pub(crate) fn source(options: &[&str]) -> VmProcess {
        let mut vm = VmProcess::start(options);
        vm.expect_progress("the source's guest");
        vm
    }

    /// Starts a VM that waits for `migrate-incoming`, and then for `cont`.
    pub(crate) fn destination(options: &[&str]) -> VmProcess {
        VmProcess::start(&[options, &["--incoming=defer", "--paused"]].concat())
    }

    pub(crate) fn start(options: &[&str]) -> VmProcess {
        VmProcess::inheriting("", options)
    }

    /// Starts a VM by `command`, such as one that goes elsewhere first.
    pub(crate) fn within(command: &[String], options: &[&str]) -> VmProcess {
        VmProcess::started_by(command, "", options)
    }

    /// Starts a VM with what `redirection`, in the shell's words, lets it inherit.
    pub(crate) fn inheriting(redirection: &str, options: &[&str]) -> VmProcess {
        VmProcess::started_by(&[], redirection, options)
    }

    fn started_by(before: &[String], redirection: &str, options: &[&str]) -> VmProcess {
        let socket = folder();
        let path = socket.path().join("qmp");
        let qmp = format!("--qmp=unix:{}", path.display());
        let mut command = Command::new("/bin/sh");
        command.arg("-c").arg(format!("exec \"$@\" {redirection}")).arg("sh");
        command.args(before).args([WHIMBREL, "vm", "--serial=none", &qmp]).args(options);
        let process = Running::beside(command);
        let qmp = connect(&path, &process);
        VmProcess { process, qmp, _socket: socket }
    }

    pub(crate) fn execute(&mut self, command: &str, arguments: Value) -> Value {
        self.qmp.execute(command, arguments).expect("a command that is allowed")
    }

    pub(crate) fn switch_on(&mut self, capabilities: &[&str]) {
        for name in capabilities {
            self.qmp.set_capability_named(name, true).expect("a capability");
        }
    }

    /// Has it wait at `uri`; gives where it really does.
    pub(crate) fn listen(&mut self, uri: &str) -> String {
        self.qmp.migrate_incoming(uri).expect("a free address");
        let report = self.qmp.query_migrate().expect("a report");
        match report.raw["socket-address"][0]["port"].as_str() {
            Some(port) => format!("tcp:127.0.0.1:{port}"),
            None => uri.to_owned(),
        }
    }

    pub(crate) fn status(&mut self) -> String {
        self.qmp.query_migrate().expect("a report").status.to_string()
    }

    /// Waits until the migration has `status`; panics when it ends otherwise. Gives the report.
    pub(crate) fn reaches(&mut self, status: &str, what: &str) -> Value {
        let mut report = Value::Null;
        until(&format!("{what}: {status}"), || {
            let now = self.qmp.query_migrate().expect("a report");
            let reached = now.status.name() == status;
            assert!(
                reached || now.status.is_running() || now.status.name() == "none",
                "{what}: not {status}: {}",
                now.raw
            );
            report = now.raw;
            reached
        });
        report
    }

    pub(crate) fn run_state(&mut self) -> String {
        self.qmp.query_status().expect("a state").status
    }

    pub(crate) fn digest(&mut self) -> Value {
        let digest = self.execute("x-ram-digest", json!({}));
        assert!(digest["blocks"].as_array().is_some_and(|blocks| !blocks.is_empty()), "{digest}");
        digest
    }

    /// The guest does something.
    pub(crate) fn expect_progress(&mut self, what: &str) {
        let updates = |vm: &mut VmProcess| {
            vm.execute("x-self-check", json!({}))["updates"].as_u64().expect("a number")
        };
        let before = updates(self);
        until(&format!("{what} goes on"), || updates(self) > before + 100);
    }

    /// The guest runs on and has lost nothing. It runs afterwards.
    pub(crate) fn expect_healthy(&mut self, what: &str) {
        assert_eq!(self.run_state(), "running", "{what}");
        self.expect_progress(what);
        self.qmp.stop().expect("stops");
        let check = self.execute("x-self-check", json!({}));
        assert_eq!(check["passed"], true, "{what}: {check}");
        assert_eq!(check["failure"], Value::Null, "{what}: {check}");
        assert!(check["pages-checked"].as_u64() > check["updates"].as_u64(), "{what}: {check}");
        self.qmp.cont().expect("runs on");
    }

    pub(crate) fn quit(self, what: &str) {
        self.qmp.quit().expect("quits");
        self.process.ended(what).expect_success(what);
    }
}

fn connect(path: &Path, process: &Running) -> Client {
    let start = Instant::now();
    loop {
        let endpoint = Endpoint::Unix(PathBuf::from(path));
        match Client::connect(endpoint, LIMIT) {
            Ok(client) => return client,
            Err(error) => {
                assert!(start.elapsed() < LIMIT, "no QMP: {error}; it says: {}", process.err());
            }
        }
        sleep(Duration::from_millis(2));
    }
}

/// Moves the guest of `from` to `to` at `uri`, compares all of RAM, and lets it run on.
pub(crate) fn move_and_verify(from: &mut VmProcess, to: &mut VmProcess, uri: &str, what: &str) {
    let address = to.listen(uri);
    from.qmp.migrate(&address).expect("it starts");
    from.reaches("completed", what);
    to.reaches("completed", what);
    verify_moved(from, to, what);
}

/// All of RAM is the same on both sides, where the guest stands still; then it runs on.
pub(crate) fn verify_moved(from: &mut VmProcess, to: &mut VmProcess, what: &str) {
    assert_eq!(from.run_state(), "postmigrate", "{what}");
    assert_eq!(from.digest(), to.digest(), "{what}: RAM");
    to.qmp.cont().expect("runs");
    to.expect_healthy(what);
}
