//! `cargo xtask bench zero-copy`: does sending without a copy (`MSG_ZEROCOPY`) pay here?

use anyhow::Result;
use serde_json::{Map, json};

use super::contender::Memory;
use super::janitor::Janitor;
use super::network::{Link, Network, Way};
use super::plain::{self, Transfer};
use super::sample::{Row, keep, machine, table};
use crate::workspace::Workspace;

/// What both hosts' TCP is set to, as in the other benches.
const CONGESTION: &str = "cubic";

/// What to measure.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Links between two network namespaces, in Gbit/s, beside the loopback (needs root)
    #[arg(long, value_delimiter = ',', value_parser = Link::parse)]
    link: Vec<Link>,
    /// How many connections share the bytes
    #[arg(long, default_value = "1,2,4", value_delimiter = ',')]
    channels: Vec<u32>,
    /// How many bytes
    #[arg(long, default_value = "4G", value_parser = Memory::parse)]
    memory: Memory,
    /// How many times each way is taken
    #[arg(long, default_value_t = 5)]
    runs: u32,
}

/// Measures, prints the table, keeps everything.
pub(crate) fn run(workspace: &Workspace, args: &Args) -> Result<bool> {
    let mut rows = Vec::new();
    // Before anything is measured: this may not be allowed.
    let mut janitor = Janitor::start()?;
    let mut links = Vec::new();
    for link in &args.link {
        janitor.allow_congestion(CONGESTION)?;
        let name = link.mbit_per_s.to_string();
        links.push((link, Network::build(&mut janitor, &name, *link, CONGESTION)?));
    }
    measure(args, "loopback", Way::Loopback, &mut rows)?;
    for (link, network) in &links {
        measure(args, &link.to_string(), Way::Link(network), &mut rows)?;
    }
    println!("{}", table(&rows, "copied"));
    let mut about: Map<_, _> = machine();
    about.insert("memory-bytes".to_owned(), json!(args.memory.bytes()));
    about.insert("runs".to_owned(), json!(args.runs));
    let rows = rows.iter().map(Row::json).collect();
    println!("kept in {}", keep(workspace, "zero-copy", about, rows)?.display());
    Ok(true)
}

fn measure(args: &Args, name: &str, way: Way<'_>, rows: &mut Vec<Row>) -> Result<()> {
    for &connections in &args.channels {
        let mut ours = [("copied", false), ("MSG_ZEROCOPY", true)].map(|(contender, zero_copy)| {
            let row = Row {
                scenario: format!("{name}, {connections} connections"),
                contender: contender.to_owned(),
                samples: Vec::new(),
            };
            (row, Transfer { memory: args.memory, connections, zero_copy })
        });
        for _ in 0..args.runs {
            for (row, transfer) in &mut ours {
                let sample = plain::sample(*transfer, way)?;
                let Row { scenario, contender, .. } = &row;
                eprintln!(
                    "{scenario}: {contender}: {:.2} GB/s, CPU s/GiB {:.2} + {:.2}",
                    sample.gigabytes_per_second,
                    sample.source_cpu_per_gib,
                    sample.destination_cpu_per_gib
                );
                row.samples.push(sample);
            }
            // A B, then B A.
            ours.reverse();
        }
        ours.sort_by_key(|(_, transfer)| transfer.zero_copy);
        rows.extend(ours.map(|(row, _)| row));
    }
    Ok(())
}
