//! `whimbrel receive`: take in a migration and keep it.

use std::path::PathBuf;
use std::time::Instant;

use clap::Args;
use serde_json::json;
use whimbrel::kept::Receiver;
use whimbrel::{Address, SocketAddressInfo};

use crate::failure::Failure;
use crate::progress::{Line, mib};
use crate::signals::OnSignal;

/// Take in a migration and keep it.
#[derive(Debug, Args)]
pub(crate) struct Receive {
    /// Where to wait: tcp:HOST:PORT, unix:PATH, fd:N, exec:CMD or file:PATH
    uri: Address,
    /// The file to keep the VM in, in QEMU's mapped-ram format
    #[arg(long, value_name = "FILE")]
    store: PathBuf,
    /// Print one JSON object at the end
    #[arg(long)]
    json: bool,
}

impl Receive {
    pub(crate) fn run(self) -> Result<(), Failure> {
        let receiver = Receiver::bind(&self.uri)?;
        let stop = receiver.stopper();
        let _signals = OnSignal::call(move || stop.stop())?;
        match receiver.socket_address() {
            Some(SocketAddressInfo::Inet { host, port }) => {
                eprintln!("waiting for a migration at tcp:{host}:{port}");
            }
            Some(_) => eprintln!("waiting for a migration at {}", self.uri),
            None => {}
        }
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
            println!(
                "{}",
                json!({
                    "status": "completed",
                    "file": self.store.display().to_string(),
                    "machine": summary.machine,
                    "ram-bytes": summary.ram_bytes,
                    "stored-bytes": summary.stored_bytes,
                    "device-sections": summary.devices,
                    "seconds": seconds,
                })
            );
        } else {
            println!(
                "kept {}: machine {}, {} of RAM ({} not zero), {} device sections",
                self.store.display(),
                summary.machine,
                mib(summary.ram_bytes),
                mib(summary.stored_bytes),
                summary.devices
            );
        }
        Ok(())
    }
}
