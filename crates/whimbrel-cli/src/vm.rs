//! `whimbrel vm`: the reference VM, controlled through QMP.

use std::sync::Arc;
use std::sync::mpsc::{self, Sender};
use std::time::Duration;

use clap::Args;
use whimbrel::{Address, Event, MigrationStatus, Migrator, RunState, Start, rescue};
use whimbrel_control::{Endpoint, Server};
use whimbrel_vm::{Config, ReferenceVm, SerialOutput};

use crate::failure::Failure;
use crate::fence;
use crate::monitor;
use crate::network::NetOptions;
use crate::recover_options::RecoverOfSource;
use crate::signals::OnSignal;
use crate::tls_options::TlsOfVm;
use crate::vm_options::VmOptions;

/// Run the reference VM.
#[derive(Debug, Args)]
pub(crate) struct RunVm {
    #[command(flatten)]
    vm: VmOptions,
    /// Where to serve QMP: unix:PATH or tcp:HOST:PORT
    #[arg(long, value_name = "SOCKET")]
    qmp: Option<Endpoint>,
    /// Wait for a migration at this address, or, with 'defer', until QMP's migrate-incoming
    /// names one
    #[arg(long, value_name = "URI")]
    incoming: Option<String>,
    #[command(flatten)]
    net: NetOptions,
    /// When the other side of COLO is lost, go on as soon as this command has succeeded, which makes
    /// sure that the other side runs no more, and never will
    #[arg(long, value_name = "COMMAND")]
    fence: Option<String>,
    #[command(flatten)]
    tls: TlsOfVm,
    #[command(flatten)]
    recover: RecoverOfSource,
    /// Leave the guest stopped until QMP's cont
    #[arg(long, short = 'S')]
    paused: bool,
    /// Where the guest's serial port goes: none, stdout, stderr or file:PATH
    #[arg(long, default_value = "stdout", value_name = "OUTPUT")]
    serial: SerialOutput,
}

/// How long the vCPUs may take to end. One that waits for a page may never.
const HALT: Duration = Duration::from_millis(500);

/// What the VM's main thread is told.
#[derive(Debug)]
pub(crate) enum News {
    /// It is to end.
    Quit,
    /// It is to end, for what it waited for will not come.
    Failed(String),
    /// The guest has gone, and runs elsewhere on what is left of it here; or it has come, whole.
    Memory,
}

impl RunVm {
    pub(crate) fn run(self) -> Result<(), Failure> {
        let incoming = self.incoming.is_some();
        let address: Option<Address> = match self.incoming.as_deref() {
            None | Some("defer") => None,
            Some(uri) => Some(uri.parse()?),
        };
        if incoming && address.is_none() && self.qmp.is_none() {
            return Err(Failure::new("'--incoming defer' waits for a QMP command: add '--qmp'"));
        }
        let config = self.vm.config(incoming, self.serial.clone());
        let vm = ReferenceVm::new(Config { network: self.net.config(), ..config })?;
        let start = match incoming {
            true => Start::Incoming { autostart: !self.paused },
            false => Start::Paused,
        };
        let migrator = Arc::new(Migrator::new(vm.clone(), start));
        self.tls.secure(&migrator, incoming)?;
        migrator.update_parameters(|parameters| self.recover.apply(parameters))?;
        if let Some(command) = self.fence.clone() {
            migrator.set_fence(move || fence::run(&command));
        }
        let plugged = self.net.plug_in(&vm, &migrator)?;
        let (end, ended) = mpsc::channel();
        let _told = tell_of_migrations(&migrator, end.clone());
        let _signals = {
            let end = end.clone();
            // A receiver that is gone means that the end has begun.
            OnSignal::call(move || drop(end.send(News::Quit)))?
        };
        let backend = Arc::new(monitor::backend(&migrator, &vm, end));
        if let Some(address) = &address {
            migrator.incoming(address, true)?;
            let waits_at = migrator.info().socket_address.unwrap_or_default();
            self.tls.warn(waits_at.first());
        }
        // Before anybody can say anything: whoever is quick may have moved it away already.
        if !incoming && !self.paused {
            migrator.cont()?;
        }
        let server = self.qmp.clone().map(|at| Server::bind(at, backend)).transpose()?;
        let end = loop {
            match ended.recv().unwrap_or(News::Quit) {
                News::Memory => self.describe_memory(&migrator),
                end => break end,
            }
        };
        let waiting = vm.halt(HALT);
        migrator.end();
        drop((server, plugged));
        if waiting > 0 {
            // In postcopy, for pages that are never to come: these vCPUs end with the process.
            std::mem::forget(vm);
        }
        match end {
            News::Failed(why) => Err(Failure::new(why)),
            News::Quit | News::Memory => Ok(()),
        }
    }

    /// Says what the file of memory is now: a part of a migration that has an identifier, or a
    /// guest's as a whole. While pages are still to come it is neither, and nothing says so.
    fn describe_memory(&self, migrator: &Migrator) {
        let Some(path) = &self.vm.memory_path else { return };
        if let Err(error) = rescue::describe(path, migrator.vm(), migrator.migration_id()) {
            // What was there before still says what lies where.
            eprintln!("whimbrel: {error}");
        }
    }
}

fn tell_of_migrations(migrator: &Arc<Migrator>, main: Sender<News>) -> whimbrel::Subscription {
    let weak = Arc::downgrade(migrator);
    migrator.subscribe(move |event| {
        let Some(migrator) = weak.upgrade() else { return };
        let news = match event {
            Event::Migration(MigrationStatus::PostcopyActive)
                if migrator.run_state() == RunState::Postmigrate =>
            {
                News::Memory
            }
            Event::Migration(MigrationStatus::Completed)
                if migrator.run_state() != RunState::Postmigrate =>
            {
                News::Memory
            }
            Event::Migration(MigrationStatus::Failed) if migrator.exits_on_error() => {
                let why = migrator.info().error_desc;
                let why = why.unwrap_or_else(|| "the migration failed".into());
                News::Failed(format!("incoming migration: {why}"))
            }
            _ => return,
        };
        // A receiver that is gone means that the end has begun.
        let _ = main.send(news);
    })
}
