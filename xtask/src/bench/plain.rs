//! The physical limit: as many bytes sent from memory to memory over the same link and as many
//! connections, and nothing else.
//!
//! Each end is a process of its own with a thread for each connection. They speak to the bench over
//! standard output: the receiver says its address when its memory is ready, and both say their
//! processor time at the end.

use std::io::{BufRead as _, BufReader};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::ops::Range;
use std::os::fd::AsFd as _;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::{Value, json};
use whimbrel_ram::RamBlock;
use whimbrel_ram::kernel_copy::{Done, Gather, InFlight, Scatter};

use super::contender::{Memory, cpu_seconds};
use super::network::{self, Way};
use super::sample::Sample;

/// As large as a migration engine's writes usefully get; larger is not faster.
const CHUNK_BYTES: u64 = 512 << 10;
/// How often a sender looks whether the kernel is done with what it sent without a copy.
const REAP_EVERY: Duration = Duration::from_micros(50);

/// One end.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    bytes: u64,
    /// Where to receive; with --send, where to send to
    address: String,
    #[arg(long)]
    send: bool,
    #[arg(long, default_value_t = 1)]
    connections: u32,
    /// Send with MSG_ZEROCOPY
    #[arg(long)]
    zero_copy: bool,
}

pub(crate) fn run(args: &Args) -> Result<bool> {
    match args.send {
        true => send(args)?,
        false => receive(args)?,
    }
    Ok(true)
}

impl Args {
    /// What each connection carries.
    fn shares(&self) -> impl Iterator<Item = Range<u64>> {
        let connections = u64::from(self.connections);
        let part = (self.bytes / connections).next_multiple_of(CHUNK_BYTES);
        let end = self.bytes;
        (0..connections).map(move |index| (index * part).min(end)..((index + 1) * part).min(end))
    }

    /// Memory that is there.
    fn memory(&self) -> Result<RamBlock> {
        let memory = RamBlock::anonymous("memory", 0, self.bytes)?;
        memory.populate(0, self.bytes)?;
        Ok(memory)
    }
}

fn chunks(share: Range<u64>) -> impl Iterator<Item = (u64, usize)> {
    let end = share.end;
    let starts = share.step_by(usize::try_from(CHUNK_BYTES).expect("small"));
    starts
        .map(move |start| (start, usize::try_from((end - start).min(CHUNK_BYTES)).expect("small")))
}

fn send(args: &Args) -> Result<()> {
    let memory = args.memory()?;
    let connect = || -> Result<TcpStream> {
        let stream = TcpStream::connect(&args.address)?;
        stream.set_nodelay(true)?;
        Ok(stream)
    };
    let shares = args.shares().map(|share| Ok((connect()?, share))).collect::<Result<Vec<_>>>()?;
    let before = cpu_seconds(std::process::id())?;
    let done = in_threads(shares, |(stream, share)| match args.zero_copy {
        true => send_zero_copy(&memory, &stream, share),
        false => send_share(&memory, &stream, share).map(|()| Done::default()),
    })?;
    let (copied, without_copy) = done
        .iter()
        .fold((0, 0), |(copied, without), one| (copied + one.copied, without + one.without_copy));
    let cpu = cpu_seconds(std::process::id())? - before;
    println!("{}", json!({ "cpu": cpu, "copied": copied, "without-copy": without_copy }));
    Ok(())
}

fn send_share(memory: &RamBlock, stream: &TcpStream, share: Range<u64>) -> Result<()> {
    for (offset, len) in chunks(share) {
        let mut pieces = Gather::new();
        pieces.push_guest(memory, offset, len)?;
        while pieces.bytes_left() > 0 {
            pieces.send(stream.as_fd(), false)?;
        }
    }
    until_taken(stream)
}

fn send_zero_copy(memory: &RamBlock, stream: &TcpStream, share: Range<u64>) -> Result<Done> {
    let mut in_flight = InFlight::on(stream.as_fd())?;
    for (offset, len) in chunks(share) {
        let mut pieces = Gather::new();
        pieces.push_guest(memory, offset, len)?;
        while pieces.bytes_left() > 0 {
            if pieces.send_zero_copy(stream.as_fd(), &mut in_flight)?.is_none() {
                ensure!(!in_flight.is_empty(), "not one chunk may be pinned: see ulimit -l");
                thread::sleep(REAP_EVERY);
            }
            in_flight.reap(stream.as_fd())?;
        }
    }
    while !in_flight.is_empty() {
        thread::sleep(REAP_EVERY);
        in_flight.reap(stream.as_fd())?;
    }
    until_taken(stream)?;
    Ok(in_flight.done())
}

/// The receiver closes when it has everything.
fn until_taken(mut stream: &TcpStream) -> Result<()> {
    stream.shutdown(Shutdown::Write)?;
    std::io::copy(&mut stream, &mut std::io::sink())?;
    Ok(())
}

fn receive(args: &Args) -> Result<()> {
    let memory = args.memory()?;
    let listener = TcpListener::bind(&args.address)?;
    println!("{}", json!({ "address": listener.local_addr()?.to_string() }));
    let shares =
        args.shares().map(|share| Ok((listener.accept()?.0, share))).collect::<Result<Vec<_>>>()?;
    let before = cpu_seconds(std::process::id())?;
    let begun = Instant::now();
    in_threads(shares, |(stream, share)| {
        for (offset, len) in chunks(share) {
            let mut pieces = Scatter::new();
            pieces.push_guest(&memory, offset, len)?;
            while pieces.bytes_left() > 0 {
                ensure!(pieces.read(stream.as_fd())? > 0, "the sender closed too early");
            }
        }
        Ok(())
    })?;
    let seconds = begun.elapsed().as_secs_f64();
    let cpu = cpu_seconds(std::process::id())? - before;
    println!("{}", json!({ "cpu": cpu, "seconds": seconds }));
    Ok(())
}

/// Does this with each of them at once.
fn in_threads<I: Send, O: Send>(
    each: Vec<I>,
    work: impl Fn(I) -> Result<O> + Sync,
) -> Result<Vec<O>> {
    thread::scope(|scope| {
        let work = &work;
        let threads: Vec<_> = each.into_iter().map(|one| scope.spawn(move || work(one))).collect();
        threads
            .into_iter()
            .map(|thread| thread.join().unwrap_or_else(|_| bail!("a thread panicked")))
            .collect()
    })
}

/// What is to be transferred.
#[derive(Debug, Clone, Copy)]
pub(super) struct Transfer {
    pub(super) memory: Memory,
    pub(super) connections: u32,
    pub(super) zero_copy: bool,
}

/// One of them between two fresh processes.
pub(super) fn sample(transfer: Transfer, way: Way<'_>) -> Result<Sample> {
    let Transfer { memory, connections, zero_copy } = transfer;
    let start = |end, address: &str, options: &[&str]| {
        let mut command = Command::new(std::env::current_exe()?);
        command.args(["bench", "plain-end", &memory.bytes().to_string(), address]);
        command.args(["--connections", &connections.to_string()]).args(options);
        End::start(&mut way.at(end, command))
    };
    let here = format!("{}:0", way.destination());
    let mut receiver = start(network::End::Destination, &here, &[])?;
    let address = receiver.said()?["address"].as_str().context("no address")?.to_owned();
    let options: &[_] = if zero_copy { &["--send", "--zero-copy"] } else { &["--send"] };
    let mut sender = start(network::End::Source, &address, options)?;
    let received = receiver.said()?;
    let sent = sender.said()?;
    let number = |value: &Value| value.as_f64().context("a number");
    let seconds = number(&received["seconds"])?;
    Ok(Sample {
        gigabytes_per_second: memory.gigabytes() / seconds,
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn connections_share_all_of_it() {
        for connections in [1, 2, 3, 8] {
            for bytes in [CHUNK_BYTES, 8 * CHUNK_BYTES, 7 * CHUNK_BYTES + 4096] {
                let args = Args {
                    bytes,
                    address: String::new(),
                    send: false,
                    connections,
                    zero_copy: false,
                };
                let mut next = 0;
                for (offset, len) in args.shares().flat_map(chunks) {
                    assert_eq!(offset, next, "{bytes} over {connections}");
                    next += len as u64;
                }
                assert_eq!(next, bytes, "{bytes} over {connections}");
                assert_eq!(args.shares().count(), connections as usize);
            }
        }
    }
}
