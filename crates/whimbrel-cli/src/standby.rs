//! `whimbrel standby`: keep the newest checkpoint of a guest that runs elsewhere.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use clap::Args;
use serde_json::json;
use whimbrel::Address;
use whimbrel::kept::{KeptVm, Receiver, StandbyProgress};

use crate::failure::Failure;
use crate::file_access::FileAccess;
use crate::progress::mib;
use crate::receiving::announced;
use crate::tls_options::TlsOfDestination;

/// How often the newest checkpoint is told of.
const TELL: Duration = Duration::from_secs(1);

/// Keep the newest checkpoint of a guest that runs elsewhere, with capability 'x-colo' on, until its
/// host is lost.
#[derive(Debug, Args)]
pub(crate) struct Standby {
    /// Where to wait for the primary: tcp:HOST:PORT or unix:PATH
    uri: Address,
    /// The file to keep the VM in when the primary is lost, in QEMU's mapped-ram format
    #[arg(long, value_name = "FILE")]
    store: PathBuf,
    /// Then send it to a QEMU or whimbrel that waits there. Only where the primary is certain to run
    /// no more then: nothing here can know
    #[arg(long, value_name = "URI")]
    then: Option<Address>,
    /// The primary has capability 'multifd' on, with so many 'multifd-channels' (0: it has not)
    #[arg(long, default_value_t = 0, value_name = "N")]
    multifd: u8,
    /// Take the primary for lost when it takes nothing of what is sent for so long, in ms; 0 is never
    #[arg(long, default_value_t = 30_000, value_name = "MS")]
    silence_limit: u64,
    #[command(flatten)]
    file: FileAccess,
    #[command(flatten)]
    tls: TlsOfDestination,
    /// Print one JSON object at the end
    #[arg(long)]
    json: bool,
}

impl Standby {
    pub(crate) fn run(self) -> Result<(), Failure> {
        let receiver = Receiver::bind(&self.uri)?
            .waiting_no_longer_than(self.silence_limit)
            .with_multifd(self.multifd)
            .writing_by(self.file.access());
        let (receiver, _signals) = announced(receiver, &self.tls, &self.uri, "a primary")?;
        let mut told: Option<Instant> = None;
        let mut tell = |progress: StandbyProgress| {
            if told.is_none_or(|last| last.elapsed() >= TELL) {
                told = Some(Instant::now());
                let StandbyProgress { checkpoints, pages } = progress;
                eprintln!("in step: {checkpoints} checkpoints, {pages} pages in the newest");
            }
        };
        let stood_by = receiver.stand_by(&self.store, &mut tell)?;
        let (lost, file) = (&stood_by.lost, self.store.display());
        eprintln!("the primary is lost: {lost}");
        let sent = self.then.as_ref().map(|to| self.send(to)).transpose()?;
        let kept = &stood_by.kept;
        if self.json {
            let object = json!({
                "status": "completed",
                "checkpoints": stood_by.checkpoints,
                "lost": lost,
                "file": file.to_string(),
                "machine": kept.machine,
                "ram-bytes": kept.ram_bytes,
                "stored-bytes": kept.stored_bytes,
                "device-sections": kept.devices,
                "then": self.then.as_ref().map(ToString::to_string),
                "then-ms": sent,
            });
            println!("{object}");
            return Ok(());
        }
        println!(
            "kept {file}: checkpoint {}, machine {}, {} of RAM ({} not zero), {} device sections",
            stood_by.checkpoints,
            kept.machine,
            mib(kept.ram_bytes),
            mib(kept.stored_bytes),
            kept.devices
        );
        if let (Some(to), Some(ms)) = (&self.then, sent) {
            println!("restored it to {to}, in {ms} ms");
        }
        Ok(())
    }

    /// Sends what was kept; gives how many ms that took.
    fn send(&self, to: &Address) -> Result<u64, Failure> {
        let vm = KeptVm::open(&self.store)?;
        let info = vm.restoring()?.waiting_no_longer_than(self.silence_limit).send(&vm, to)?;
        Ok(info.total_time.unwrap_or(0))
    }
}
