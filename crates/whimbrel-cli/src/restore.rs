//! `whimbrel restore`: send a kept VM to whoever waits for it.

use std::path::PathBuf;

use clap::Args;
use serde_json::json;
use whimbrel::Address;
use whimbrel::kept::KeptVm;

use crate::failure::Failure;
use crate::progress::{Line, describe, mib};
use crate::signals::OnSignal;

/// Send a kept VM to whoever waits for it.
#[derive(Debug, Args)]
pub(crate) struct Restore {
    /// The kept VM's file (mapped-ram, from 'whimbrel receive' or a QEMU)
    file: PathBuf,
    /// Where the destination waits: tcp:HOST:PORT, unix:PATH, fd:N, exec:CMD or file:PATH
    uri: Address,
    /// Print one JSON object at the end
    #[arg(long)]
    json: bool,
}

impl Restore {
    pub(crate) fn run(self) -> Result<(), Failure> {
        let vm = KeptVm::open(&self.file)?;
        let restoring = vm.restoring()?;
        let stop = restoring.stopper();
        let _signals = OnSignal::call(move || stop.stop())?;
        let progress = restoring.progress();
        let line = Line::start(move || describe(&progress.info()))?;
        let result = restoring.send(&vm, &self.uri);
        drop(line);
        let info = result?;
        if self.json {
            let mut report = serde_json::to_value(&info)?;
            if let Some(object) = report.as_object_mut() {
                object.insert("machine".into(), json!(vm.machine()));
                object.insert("file".into(), json!(self.file.display().to_string()));
            }
            println!("{report}");
        } else {
            println!(
                "restored {} to {}: machine {}, {} of RAM, in {} ms",
                self.file.display(),
                self.uri,
                vm.machine(),
                mib(vm.ram_bytes()),
                info.total_time.unwrap_or(0)
            );
        }
        Ok(())
    }
}
