//! `whimbrel receive`: take in a migration and keep it.

use std::path::PathBuf;
use std::time::Instant;

use clap::Args;
use serde_json::json;
use whimbrel::Address;
use whimbrel::kept::{Receiver, Touch};

use crate::failure::Failure;
use crate::file_access::FileAccess;
use crate::progress::{Line, mib};
use crate::receiving::announced;
use crate::recover_options::RecoverOptions;
use crate::tls_options::TlsOfDestination;

/// Take in a migration and keep it.
#[derive(Debug, Args)]
pub(crate) struct Receive {
    /// Where to wait: tcp:HOST:PORT, unix:PATH, fd:N, exec:CMD or file:PATH
    uri: Address,
    /// The file to keep the VM in, in QEMU's mapped-ram format
    #[arg(long, value_name = "FILE")]
    store: PathBuf,
    /// The source has capability 'postcopy-preempt' on
    #[arg(long)]
    preempt: bool,
    /// The source has capability 'multifd' on, with so many 'multifd-channels' (0: it has not)
    #[arg(long, default_value_t = 0, value_name = "N")]
    multifd: u8,
    /// In a postcopy, touch pages while they arrive: none, sequential, random or random,seed=N
    #[arg(long, default_value = "none", value_parser = parse_touch, value_name = "ORDER")]
    touch: Touch,
    #[command(flatten)]
    file: FileAccess,
    #[command(flatten)]
    tls: TlsOfDestination,
    #[command(flatten)]
    recover: RecoverOptions,
    /// Print one JSON object at the end
    #[arg(long)]
    json: bool,
}

fn parse_touch(text: &str) -> Result<Touch, String> {
    match text.split_once(",seed=") {
        None => match text {
            "none" => Ok(Touch::Nothing),
            "sequential" => Ok(Touch::Sequential),
            "random" => Ok(Touch::Random { seed: 1 }),
            _ => Err("expected none, sequential, random or random,seed=N".into()),
        },
        Some(("random", seed)) => match seed.parse() {
            Ok(seed) => Ok(Touch::Random { seed }),
            Err(_) => Err(format!("the seed '{seed}' is no number")),
        },
        Some(_) => Err("only random has a seed".into()),
    }
}

impl Receive {
    pub(crate) fn run(self) -> Result<(), Failure> {
        let parameters = self.recover.parameters()?;
        let receiver = Receiver::bind(&self.uri)?
            .recovering(parameters.auto_recover, parameters.recover_time_limit)
            .waiting_no_longer_than(parameters.silence_limit)
            .with_preempt(self.preempt)
            .with_multifd(self.multifd)
            .touching(self.touch)
            .writing_by(self.file.access());
        let (receiver, _signals) = announced(receiver, &self.tls, &self.uri, "a migration")?;
        let placed = receiver.progress();
        let started = Instant::now();
        let line = Line::start(move || {
            let bytes = placed.load(std::sync::atomic::Ordering::Relaxed);
            (bytes > 0).then(|| format!("received {} of RAM", mib(bytes)))
        })?;
        let result = receiver.receive(&self.store);
        drop(line);
        let summary = result?;
        let seconds = started.elapsed().as_secs_f64();
        if self.json {
            let mut object = json!({
                "status": "completed",
                "file": self.store.display().to_string(),
                "machine": summary.machine,
                "ram-bytes": summary.ram_bytes,
                "stored-bytes": summary.stored_bytes,
                "device-sections": summary.devices,
                "seconds": seconds,
            });
            if let Some(faults) = &summary.faults {
                object["faults"] = serde_json::to_value(faults)?;
            }
            println!("{object}");
        } else {
            println!(
                "kept {}: machine {}, {} of RAM ({} not zero), {} device sections",
                self.store.display(),
                summary.machine,
                mib(summary.ram_bytes),
                mib(summary.stored_bytes),
                summary.devices
            );
            if let Some(faults) = &summary.faults {
                let latency = &faults.latency_us;
                println!(
                    "postcopy: {} pages were waited for, {:.0} us on average, {:.0} us at most",
                    faults.count, latency.mean, latency.max
                );
            }
        }
        Ok(())
    }
}
