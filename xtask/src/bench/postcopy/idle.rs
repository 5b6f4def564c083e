//! The floor of a fault: how long a request and its page take on the idle link.
//!
//! A request of 30 bytes from the destination, a reply of 4 KiB from the source, on a connection
//! of their own: what postcopy does, without anything that makes it wait. Each end is a process
//! at its end of the link.

use std::io::{Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::process::Command;
use std::time::Instant;

use anyhow::{Context as _, Result};
use serde_json::{Value, json};

use crate::bench::network::{End, Network, SOURCE_ADDRESS};
use crate::bench::plain;
use crate::bench::sample::Spread;

const REQUEST_BYTES: usize = 30;
const REPLY_BYTES: usize = 4096;
const ROUNDS: usize = 2000;

/// One end.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Answer here; with --ask, ask there
    address: String,
    #[arg(long)]
    ask: bool,
}

pub(crate) fn run(args: &Args) -> Result<bool> {
    match args.ask {
        true => ask(&args.address)?,
        false => answer(&args.address)?,
    }
    Ok(true)
}

fn answer(address: &str) -> Result<()> {
    let listener = TcpListener::bind(address)?;
    println!("{}", json!({ "address": listener.local_addr()?.to_string() }));
    let (mut stream, _) = listener.accept()?;
    stream.set_nodelay(true)?;
    let mut request = [0; REQUEST_BYTES];
    for _ in 0..ROUNDS {
        stream.read_exact(&mut request)?;
        stream.write_all(&[1; REPLY_BYTES])?;
    }
    // Until the other side has it all.
    stream.read_to_end(&mut Vec::new())?;
    Ok(())
}

fn ask(address: &str) -> Result<()> {
    let mut stream = TcpStream::connect(address)?;
    stream.set_nodelay(true)?;
    let mut reply = [0; REPLY_BYTES];
    let mut times = Vec::with_capacity(ROUNDS);
    for _ in 0..ROUNDS {
        let begun = Instant::now();
        stream.write_all(&[2; REQUEST_BYTES])?;
        stream.read_exact(&mut reply)?;
        times.push(begun.elapsed().as_secs_f64() * 1e6);
    }
    let spread = Spread::of(times).context("no round was made")?;
    println!("{}", json!({ "median-us": spread.median, "min-us": spread.least }));
    Ok(())
}

/// Measures the link; the median and the least round trip, in us.
pub(in crate::bench) fn round_trip(network: &Network) -> Result<Value> {
    let program = std::env::current_exe()?;
    let start = |end, arguments: &[&str]| {
        let mut command = Command::new(&program);
        command.args(["bench", "round-trip-end"]).args(arguments);
        plain::End::start(&mut network.at(end, &command))
    };
    let mut source = start(End::Source, &[&format!("{SOURCE_ADDRESS}:0")])?;
    let address = source.said()?["address"].as_str().context("no address")?.to_owned();
    start(End::Destination, &[&address, "--ask"])?.said()
}
