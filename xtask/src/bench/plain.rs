//! The floor: as many bytes sent from memory to memory over the same loopback, and nothing else.
//!
//! Each end is a process of its own. They speak to the bench over standard input and output: the
//! receiver says its port when its memory is ready, and both say their processor time at the end.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};
use std::time::Instant;

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};

use super::contender::{Memory, cpu_seconds, random_bytes};
use super::sample::Sample;

/// As large as a migration engine's writes usefully get; larger is not faster.
const CHUNK_BYTES: usize = 1 << 20;

/// One end.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    bytes: usize,
    /// Where to send to; without it, receive
    #[arg(long)]
    to: Option<String>,
}

pub(crate) fn run(args: &Args) -> Result<bool> {
    match &args.to {
        Some(address) => send(args.bytes, address)?,
        None => receive(args.bytes)?,
    }
    Ok(true)
}

fn send(bytes: usize, address: &str) -> Result<()> {
    let memory = random_bytes(bytes);
    let mut stream = TcpStream::connect(address)?;
    stream.set_nodelay(true)?;
    let before = cpu_seconds(std::process::id())?;
    for chunk in memory.chunks(CHUNK_BYTES) {
        stream.write_all(chunk)?;
    }
    // The receiver closes when it has everything.
    stream.shutdown(std::net::Shutdown::Write)?;
    stream.read_to_end(&mut Vec::new())?;
    println!("{}", json!({ "cpu": cpu_seconds(std::process::id())? - before }));
    Ok(())
}

fn receive(bytes: usize) -> Result<()> {
    // Ones, not zeros: every page is there before the first byte comes.
    let mut memory = vec![1_u8; bytes];
    let listener = TcpListener::bind("127.0.0.1:0")?;
    println!("{}", json!({ "address": listener.local_addr()?.to_string() }));
    let (mut stream, _) = listener.accept()?;
    let before = cpu_seconds(std::process::id())?;
    let begun = Instant::now();
    for chunk in memory.chunks_mut(CHUNK_BYTES) {
        stream.read_exact(chunk)?;
    }
    let seconds = begun.elapsed().as_secs_f64();
    let cpu = cpu_seconds(std::process::id())? - before;
    println!("{}", json!({ "cpu": cpu, "seconds": seconds }));
    Ok(())
}

/// One transfer of this much memory between two fresh processes.
pub(crate) fn sample(memory: Memory) -> Result<Sample> {
    let program = std::env::current_exe()?;
    let bytes = memory.bytes().to_string();
    let mut receiver = End::start(Command::new(&program).args(["bench", "plain-end", &bytes]))?;
    let address = receiver.said()?["address"].as_str().context("no address")?.to_owned();
    let mut sender =
        End::start(Command::new(&program).args(["bench", "plain-end", &bytes, "--to", &address]))?;
    let received = receiver.said()?;
    let sent = sender.said()?;
    let number = |value: &Value| value.as_f64().context("a number");
    Ok(Sample {
        gigabytes_per_second: memory.gigabytes() / number(&received["seconds"])?,
        source_cpu_per_gib: number(&sent["cpu"])? / memory.gib(),
        destination_cpu_per_gib: number(&received["cpu"])? / memory.gib(),
    })
}

/// A process of this program that says what it measured. Dropped, it is killed.
pub(super) struct End {
    child: Child,
    lines: BufReader<std::process::ChildStdout>,
}

impl End {
    pub(super) fn start(command: &mut Command) -> Result<Self> {
        let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn()?;
        let lines = BufReader::new(child.stdout.take().context("its output is piped")?);
        Ok(Self { child, lines })
    }

    /// The next line that it says.
    pub(super) fn said(&mut self) -> Result<Value> {
        let mut line = String::new();
        self.lines.read_line(&mut line)?;
        ensure!(!line.is_empty(), "an end of a plain connection died");
        Ok(serde_json::from_str(&line)?)
    }
}

impl Drop for End {
    fn drop(&mut self) {
        // Both fail only for a process that is gone, which is what is wanted.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
