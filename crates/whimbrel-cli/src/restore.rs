//! `whimbrel restore`: send a kept VM to whoever waits for it.

use std::path::PathBuf;

use clap::Args;
use serde_json::json;
use whimbrel::kept::{ByPostcopy, KeptVm};
use whimbrel::{Address, AddressError, Parameters};
use whimbrel_ram::PageSize;
use whimbrel_vm::{ParseError, parse_page_size, parse_size};

use crate::failure::Failure;
use crate::file_access::FileAccess;
use crate::multifd_options::MultifdOptions;
use crate::progress::{Line, describe, mib};
use crate::recover_options::RecoverOfSource;
use crate::signals::OnSignal;
use crate::tls_options::TlsOfSource;

/// Send a kept VM to whoever waits for it.
#[derive(Debug, Args)]
pub(crate) struct Restore {
    /// The kept VM's file (mapped-ram, from 'whimbrel receive' or a QEMU)
    file: PathBuf,
    /// Where the destination waits: tcp:HOST:PORT, unix:PATH, fd:N, exec:CMD or file:PATH
    uri: Address,
    /// Run the guest at the destination first, and let its RAM follow
    #[arg(long)]
    postcopy: bool,
    /// With --postcopy: the destination has capability 'postcopy-preempt' on
    #[arg(long, requires = "postcopy")]
    preempt: bool,
    /// With --postcopy: the page size of the destination's memory, of one block (BLOCK=SIZE) or of
    /// the largest (SIZE); 4k, 2M or 1G
    #[arg(long, requires = "postcopy", value_parser = parse_block_pages, value_name = "[BLOCK=]SIZE")]
    page_size: Vec<BlockPages>,
    /// With --postcopy: bytes a second that nobody asked for, with k, M, G; 0 is without limit
    #[arg(long, requires = "postcopy", default_value = "0", value_parser = parse_size, value_name = "RATE")]
    bandwidth: u64,
    #[command(flatten)]
    access: FileAccess,
    #[command(flatten)]
    multifd: MultifdOptions,
    #[command(flatten)]
    tls: TlsOfSource,
    #[command(flatten)]
    recover: RecoverOfSource,
    /// Print one JSON object at the end
    #[arg(long)]
    json: bool,
}

/// A block, or the largest one, and its page size.
type BlockPages = (Option<String>, PageSize);

fn parse_block_pages(text: &str) -> Result<BlockPages, ParseError> {
    match text.rsplit_once('=') {
        Some((block, size)) => Ok((Some(block.into()), parse_page_size(size)?)),
        None => Ok((None, parse_page_size(text)?)),
    }
}

impl Restore {
    pub(crate) fn run(self) -> Result<(), Failure> {
        let vm = KeptVm::open(&self.file)?;
        if self.postcopy && self.access.insists_on_direct() {
            return Err(Failure::new(
                "--direct-io: by postcopy the file is read through the page cache: leave it out",
            ));
        }
        let parameters = self.recover.parameters()?;
        let restoring = vm
            .restoring()?
            .waiting_no_longer_than(parameters.silence_limit)
            .reading_by(self.access.access())
            .with_multifd(self.multifd.to_multifd());
        let restoring = self.tls.secure(restoring)?;
        let stop = restoring.stopper();
        let _signals = OnSignal::call(move || stop.stop())?;
        let progress = restoring.progress();
        let line = Line::start(move || describe(&progress.info()))?;
        let result = match self.postcopy {
            true => {
                let how = self.by_postcopy(&vm, &parameters)?;
                restoring.send_by_postcopy(&vm, &self.uri, &how)
            }
            false => restoring.send(&vm, &self.uri),
        };
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

    fn by_postcopy(
        &self,
        vm: &KeptVm,
        parameters: &Parameters,
    ) -> Result<ByPostcopy, AddressError> {
        let largest = || vm.largest_block().to_owned();
        let sized = |(block, size): &BlockPages| (block.clone().unwrap_or_else(largest), *size);
        let other = Some(&parameters.recover_uri).filter(|uri| !uri.is_empty());
        Ok(ByPostcopy {
            preempt: self.preempt,
            page_sizes: self.page_size.iter().map(sized).collect(),
            max_bandwidth: self.bandwidth,
            auto_recover: (parameters.auto_recover, parameters.recover_time_limit),
            other_address: other.map(|uri| uri.parse()).transpose()?,
        })
    }
}
