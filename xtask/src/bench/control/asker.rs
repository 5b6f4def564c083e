//! A client that asks `query-status` every few ms and notes how long each answer took: a process of
//! its own, run before all others where that is allowed, so that the times are the VMM's.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};

/// No VMM here takes longer, not even one that hangs.
const ANSWER_MAX: Duration = Duration::from_secs(60);

/// The process.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The control socket
    socket: PathBuf,
    /// From one question to the next, in us
    #[arg(long)]
    every: u64,
}

/// Asks until its input ends, then says all it has found.
pub(crate) fn run(args: &Args) -> Result<bool> {
    let stream = UnixStream::connect(&args.socket)?;
    stream.set_read_timeout(Some(ANSWER_MAX))?;
    let mut session = Session { reader: BufReader::new(stream), line: String::new() };
    session.line()?; // The greeting.
    session.ask(r#"{"execute":"qmp_capabilities"}"#)?;
    println!("{}", json!("asking"));
    let ended = AtomicBool::new(false);
    let mut answers = Vec::new();
    std::thread::scope(|scope| -> Result<()> {
        scope.spawn(|| {
            // Whatever ends it, it has ended.
            let _ = std::io::stdin().read_to_end(&mut Vec::new());
            ended.store(true, Ordering::Release);
        });
        let every = Duration::from_micros(args.every);
        while !ended.load(Ordering::Acquire) {
            let (at, begun) = (SystemTime::now(), Instant::now());
            session.ask(r#"{"execute":"query-status"}"#)?;
            let took = begun.elapsed();
            let at = at.duration_since(UNIX_EPOCH)?;
            answers.push(json!([at.as_secs_f64(), took.as_secs_f64() * 1e3]));
            std::thread::sleep(every.saturating_sub(took));
        }
        Ok(())
    })?;
    println!("{}", Value::Array(answers));
    Ok(true)
}

struct Session {
    reader: BufReader<UnixStream>,
    line: String,
}

impl Session {
    fn line(&mut self) -> Result<&str> {
        self.line.clear();
        ensure!(self.reader.read_line(&mut self.line)? > 0, "the VMM has closed its socket");
        Ok(&self.line)
    }

    /// Asks, and waits for the answer; events are no answers.
    fn ask(&mut self, request: &str) -> Result<()> {
        writeln!(self.reader.get_mut(), "{request}")?;
        while !self.line()?.contains("\"return\"") {
            ensure!(self.line.contains("\"event\""), "{request}: {}", self.line.trim());
        }
        Ok(())
    }
}

/// An answer: when it was asked for, by the clock, and how many ms it took.
#[derive(Debug, Clone, Copy)]
pub(super) struct Answer {
    pub(super) at: Duration,
    pub(super) ms: f64,
}

/// The process under way. Dropped, it is killed.
#[derive(Debug)]
pub(super) struct Asker {
    child: Child,
    output: BufReader<ChildStdout>,
}

impl Asker {
    /// Starts to ask at `socket`.
    pub(super) fn start(socket: &Path, every: Duration) -> Result<Self> {
        let program = std::env::current_exe()?;
        let mut command = match before_all_others() {
            true => {
                let mut command = Command::new("chrt");
                command.args(["--fifo", "50"]).arg(program);
                command
            }
            false => Command::new(program),
        };
        command.args(["bench", "control-asker"]).arg(socket);
        command.args(["--every", &every.as_micros().to_string()]);
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
        let output = child.stdout.take().context("it was asked for")?;
        let mut asker = Self { child, output: BufReader::new(output) };
        ensure!(asker.says()? == json!("asking"), "it does not ask");
        Ok(asker)
    }

    /// Ends it; gives all answers it got.
    pub(super) fn finish(mut self) -> Result<Vec<Answer>> {
        drop(self.child.stdin.take());
        let Value::Array(answers) = self.says()? else { anyhow::bail!("it says no answers") };
        let answer = |answer: &Value| {
            let number = |place: usize| answer[place].as_f64().context("no number");
            Ok(Answer { at: Duration::from_secs_f64(number(0)?), ms: number(1)? })
        };
        answers.iter().map(answer).collect()
    }

    fn says(&mut self) -> Result<Value> {
        let mut line = String::new();
        self.output.read_line(&mut line)?;
        serde_json::from_str(&line).with_context(|| format!("the asker has failed: {line}"))
    }
}

impl Drop for Asker {
    fn drop(&mut self) {
        // It fails only if it has ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Whether the asker can be run before all others: else its own waits for a processor are in the
/// times, too.
pub(super) fn before_all_others() -> bool {
    let tried = Command::new("chrt").args(["--fifo", "50", "true"]).stderr(Stdio::null()).status();
    tried.is_ok_and(|status| status.success())
}
