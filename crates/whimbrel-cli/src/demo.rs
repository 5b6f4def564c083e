//! `whimbrel demo`: a busy guest moves between two processes, and its memory is verified.

mod chart;
mod child;
mod html;
mod in_step;
mod outcome;
mod pages;
mod record;
mod svg;
mod text;
mod verdict;

use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::{Args, ValueEnum};
use serde_json::{Value, json};
use whimbrel_control::Client;
use whimbrel_vm::parse_size;

use crate::drive::{After, COMMAND, Ended, Run, allow_postcopy};
use crate::failure::Failure;
use crate::monitor::{GUEST_PROGRESS, RAM_DIGEST, SELF_CHECK, VM_INFO};
use crate::multifd_options::Compression;
use crate::progress::mib;
use crate::recovery::Plan;
use crate::vm_options::VmOptions;
use child::Child;
use outcome::{Outcome, Postcopy, VmFacts};
use record::Record;
use verdict::{Checks, Verdict};

/// Migrate a busy guest between two processes on this machine.
#[derive(Debug, Args)]
pub(crate) struct Demo {
    /// How to migrate
    #[arg(long, default_value = "preempt")]
    mode: Mode,
    #[command(flatten)]
    vm: VmOptions,
    /// Bytes a second at most, with k, M, G; 0 is without limit
    #[arg(long, default_value = "0", value_parser = parse_size, value_name = "RATE")]
    bandwidth: u64,
    /// When the guest goes over in postcopy: so many ms after the start, or when every page has been
    /// sent once
    #[arg(long, default_value = "0", value_name = "MS|first-pass")]
    postcopy_after: After,
    /// How long the guest may stand still in precopy, in ms
    #[arg(long, default_value_t = 300, value_name = "MS")]
    downtime_limit: u64,
    /// Send pages on so many connections (multifd); 0 is on one
    #[arg(long, default_value_t = 0, value_name = "N")]
    channels: u8,
    /// With --channels: how pages are compressed
    #[arg(long, default_value = "none", requires = "channels", value_name = "METHOD")]
    compression: Compression,
    /// Do not slow down a guest that dirties memory faster than the link
    #[arg(long)]
    no_auto_converge: bool,
    /// How long the guest runs before it is moved, in ms
    #[arg(long, default_value_t = 500, value_name = "MS")]
    warm_up: u64,
    /// With --mode colo: how long after a checkpoint the next one is taken, in ms
    #[arg(long, default_value_t = 50, value_parser = clap::value_parser!(u64).range(1..), value_name = "MS")]
    checkpoint_delay: u64,
    /// With --mode colo: how long the two are in step before the first is killed, in ms
    #[arg(long, default_value_t = 3000, value_name = "MS")]
    in_step: u64,
    /// Give up when it is not done after so many seconds
    #[arg(long, default_value_t = 120, value_name = "SECONDS")]
    timeout: u64,
    /// Print one JSON object, under QMP's names
    #[arg(long)]
    json: bool,
    /// Write a page with all figures and charts, for a browser
    #[arg(long, value_name = "FILE")]
    report: Option<PathBuf>,
}

/// How to migrate.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Mode {
    /// All of RAM before the guest runs at the destination
    Precopy,
    /// The guest first, and its pages in the order in which they are asked for
    Postcopy,
    /// The guest first; the pages that it waits for overtake all others
    Preempt,
    /// The guest stays and answers a client; a second VM is kept in step, and takes over when the first
    /// is killed
    Colo,
}

/// How long the guest runs at the destination before it is asked how it is.
const AFTERWARDS: Duration = Duration::from_millis(500);

impl Demo {
    pub(crate) fn run(self) -> Result<(), Failure> {
        if self.mode == Mode::Colo {
            return in_step::run(&self);
        }
        let folder = tempfile::Builder::new().prefix("whimbrel-demo-").tempdir()?;
        let options = self.vm.to_arguments();
        let mut source = Child::start("source", folder.path(), &options, &[])?;
        let mut waits = vec!["--incoming=defer"];
        if self.mode == Mode::Precopy {
            // It stands still at first, so that its RAM can be compared.
            waits.push("--paused");
        }
        let mut destination = Child::start("destination", folder.path(), &options, &waits)?;
        let outcome = self.migrate(&mut source, &mut destination, folder.path())?;
        match self.json {
            true => println!("{}", outcome.to_json()),
            false => print!("{}", text::summary(&outcome)),
        }
        if let Some(path) = &self.report {
            std::fs::write(path, html::page(&outcome)).map_err(|error| {
                Failure::new(format!("cannot write the report {}: {error}", path.display()))
            })?;
            if !self.json {
                println!("report      {}", path.display());
            }
        }
        source.quit()?;
        destination.quit()?;
        match outcome.verdict.failure {
            None => Ok(()),
            Some(why) => Err(Failure::new(why)),
        }
    }

    fn migrate(
        &self,
        source: &mut Child,
        destination: &mut Child,
        folder: &Path,
    ) -> Result<Outcome, Failure> {
        std::thread::sleep(Duration::from_millis(self.warm_up));
        let vm = self.facts(source)?;
        if !self.json {
            eprintln!(
                "a guest with {} of RAM runs '{}' on {}; moving it to another process",
                mib(vm.memory),
                vm.workload,
                vm.accel,
            );
        }
        self.set_up(source, destination)?;
        let in_postcopy = self.mode != Mode::Precopy;
        let watcher = match in_postcopy {
            true => Some(Client::connect(destination.qmp.endpoint().clone(), COMMAND)?),
            false => None,
        };
        let mut record = Record::new(watcher);
        let Ended { source: told, destination: told_there } = Run {
            from: &mut source.qmp,
            to: &mut destination.qmp,
            timeout: Some(Duration::from_secs(self.timeout)),
            postcopy: in_postcopy.then_some(self.postcopy_after),
            plan: Plan::default(),
            record: Some(&mut |look| record.look(look)),
        }
        .go("tcp:127.0.0.1:0")?;
        let postcopy = match in_postcopy {
            true => {
                let progress = destination.qmp.execute(GUEST_PROGRESS, json!({}))?;
                Some(Postcopy {
                    time: record::postcopy_time(&source.events()?),
                    updates_meanwhile: record.updates_meanwhile(),
                    gap_max: Duration::from_micros(progress["gap-max-us"].as_u64().unwrap_or(0)),
                    ..Postcopy::of(&told, &told_there)
                })
            }
            false => None,
        };
        let verdict = match in_postcopy {
            true => self.verify_running(source, destination, folder)?,
            false => verify_standing(source, destination)?,
        };
        let mode = self.mode.to_possible_value().map(|mode| mode.get_name().to_owned());
        Ok(Outcome {
            mode: mode.unwrap_or_default(),
            vm,
            source: told,
            postcopy,
            samples: record.into_samples(),
            verdict,
            command: ["whimbrel".to_owned()].into_iter().chain(std::env::args().skip(1)).collect(),
        })
    }

    fn facts(&self, source: &mut Child) -> Result<VmFacts, Failure> {
        let info = source.qmp.execute(VM_INFO, json!({}))?;
        let text = |name: &str| info[name].as_str().unwrap_or("?").to_owned();
        Ok(VmFacts {
            accel: text("accel"),
            dirty_log: text("dirty-log"),
            workload: text("workload"),
            vcpus: self.vm.vcpus,
            memory: self.vm.memory,
            page_size: self.vm.page_size.bytes(),
        })
    }

    fn set_up(&self, source: &mut Child, destination: &mut Child) -> Result<(), Failure> {
        for side in [&mut *source, &mut *destination] {
            match self.mode {
                Mode::Precopy => side.qmp.set_capability_named("return-path", true)?,
                Mode::Colo => {} // Goes another way.
                Mode::Postcopy | Mode::Preempt => {
                    allow_postcopy(&mut side.qmp, self.mode == Mode::Preempt)?;
                    side.qmp.set_capabilities_named(&[
                        ("postcopy-blocktime", true),
                        ("events", true),
                    ])?;
                }
            }
        }
        if self.channels > 0 {
            let method = self.compression.to_possible_value();
            for side in [&mut *source, &mut *destination] {
                side.qmp.set_capability_named("multifd", true)?;
                side.qmp.set_parameters(json!({
                    "multifd-channels": self.channels,
                    "multifd-compression": method.as_ref().map(|method| method.get_name()),
                }))?;
            }
        }
        source.qmp.set_capability_named("auto-converge", !self.no_auto_converge)?;
        source.qmp.set_parameters(json!({
            "max-bandwidth": self.bandwidth,
            "max-postcopy-bandwidth": self.bandwidth,
            // Precopy is not to be done before postcopy begins.
            "downtime-limit": if self.mode == Mode::Precopy { self.downtime_limit } else { 0 },
        }))?;
        Ok(())
    }

    /// Compares each page with what it was when the guest left, while it stands still again.
    fn verify_running(
        &self,
        source: &mut Child,
        destination: &mut Child,
        folder: &Path,
    ) -> Result<Verdict, Failure> {
        destination.qmp.stop()?;
        let digests = |side: &mut Child, name: &str| -> Result<(PathBuf, Value), Failure> {
            let path = folder.join(name);
            let told = side.qmp.execute(RAM_DIGEST, json!({ "file": path }))?;
            Ok((path, told["blocks"].clone()))
        };
        let (left, blocks) = digests(source, "left")?;
        let (arrived, same_blocks) = digests(destination, "arrived")?;
        if blocks != same_blocks {
            return Err(Failure::new(format!(
                "the sides have other RAM blocks: {blocks} left, {same_blocks} arrived"
            )));
        }
        let writable = source.qmp.execute(VM_INFO, json!({}))?["writable-pages"].take();
        let compared = pages::compare(
            &serde_json::from_value::<Vec<_>>(blocks)?,
            &serde_json::from_value::<Vec<_>>(writable)?,
            &left,
            &arrived,
        )?;
        let at_source = source.qmp.execute(SELF_CHECK, json!({}))?;
        let checks = run_on(destination)?;
        Ok(Verdict::running(&compared, &at_source, self.vm.vcpus, &checks))
    }
}

/// Compares all of RAM while both guests stand still, then lets the guest go on and asks it.
fn verify_standing(source: &mut Child, destination: &mut Child) -> Result<Verdict, Failure> {
    let left = source.qmp.execute(RAM_DIGEST, json!({}))?;
    let arrived = destination.qmp.execute(RAM_DIGEST, json!({}))?;
    let checks = run_on(destination)?;
    Ok(Verdict::standing(&left, &arrived, &checks))
}

/// Lets a guest that stands still check itself, run for a while and check itself again.
fn run_on(destination: &mut Child) -> Result<Checks, Failure> {
    let before = destination.qmp.execute(SELF_CHECK, json!({}))?;
    destination.qmp.cont()?;
    std::thread::sleep(AFTERWARDS);
    destination.qmp.stop()?;
    let after = destination.qmp.execute(SELF_CHECK, json!({}))?;
    Ok(Checks { before, after })
}
