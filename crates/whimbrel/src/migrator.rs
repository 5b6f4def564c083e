//! The public face: one value for each VM, through which it is moved, watched and stopped.

use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::address::Address;
use crate::channel::{Listener, Route};
use crate::colo::output::{MaybeOutput, Outlet, Output};
use crate::colo::{Fence, Replication};
use crate::destination::live;
use crate::error::Error;
use crate::guest::Guest;
use crate::objects::{Object, Router};
use crate::recovery::{self, WayOn};
use crate::report::{Report, Side};
use crate::rescue::{self, Filled, KeptPart, Lost, Orders, Part};
use crate::settings::{Capabilities, Capability, Parameters, SettingError};
use crate::source;
use crate::status::{ColoMode, ColoStatus, Event, MigrationInfo, MigrationStatus, RunState};
use crate::vm::{Vm, VmError};
use crate::worker::{Cancel, Links, Role, Worker};

/// How a VM stands when its [`Migrator`] is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Start {
    /// Its guest is stopped; [`Migrator::cont`] runs it.
    Paused,
    /// It waits for a migration. Then, with `autostart`, its guest runs at once if it ran at the
    /// source.
    Incoming {
        /// Whether to run it without being told.
        autostart: bool,
    },
}

/// Moves one VM: starts migrations, tells how they stand, ends them.
///
/// Nothing here waits for a migration's threads, except [`Migrator::wait`] and dropping it.
#[derive(Debug)]
pub struct Migrator {
    guest: Arc<Guest>,
    autostart: bool,
    router: Router,
    inner: Mutex<Inner>,
}

#[derive(Default)]
struct Inner {
    capabilities: Capabilities,
    exit_on_error: bool,
    fence: Option<Fence>,
    output: MaybeOutput,
    run: Option<Run>,
}

impl std::fmt::Debug for Inner {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Inner").field("run", &self.run).finish_non_exhaustive()
    }
}

/// A migration under way, or the last one.
#[derive(Debug)]
struct Run {
    side: Side,
    report: Arc<Report>,
    cancel: Cancel,
    proceed: Cancel,
    /// `migrate-start-postcopy`.
    postcopy: Cancel,
    /// The connections in postcopy: `migrate-pause`, and the end.
    links: Links,
    way_on: Way,
    colo: Arc<Replication>,
    allows_postcopy: bool,
    worker: Option<Worker>,
}

/// How a migration that is paused is told to go on.
#[derive(Debug)]
enum Way {
    /// `migrate` with `resume`.
    Resume(Arc<WayOn<Route>>),
    /// `migrate-recover`, and rescues.
    Recover(Arc<WayOn<Listener>>, Arc<Orders>),
}

impl Run {
    /// One whose thread has yet to be started.
    fn new(
        cancel: Cancel,
        capabilities: Capabilities,
        way_on: Way,
        (fence, output): (Option<Fence>, MaybeOutput),
    ) -> Result<Run, Error> {
        let (side, part) = match &way_on {
            Way::Resume(_) => (Side::Source, ColoMode::Primary),
            Way::Recover(..) => (Side::Destination, ColoMode::Secondary),
        };
        let (report, colo) =
            (Arc::new(Report::new(side)), Arc::new(Replication::new(part, fence, output)));
        report.set_colo(colo.clone());
        Ok(Run {
            side,
            report,
            cancel,
            proceed: new_cancel()?,
            postcopy: new_cancel()?,
            links: new_links()?,
            way_on,
            colo,
            allows_postcopy: capabilities.has(Capability::PostcopyRam),
            worker: None,
        })
    }

    fn start(&mut self, role: Role, body: impl FnOnce() + Send + 'static) -> Result<(), Error> {
        let worker = Worker::start(role, self.cancel.clone(), body);
        self.worker = Some(worker.map_err(Error::system("starting a thread"))?);
        Ok(())
    }
}

impl Drop for Run {
    fn drop(&mut self) {
        // Before the worker is joined, and the reason before what it is the reason of.
        self.cancel.set();
        self.links.end();
    }
}

/// Ends a subscription when it is dropped.
#[derive(Debug)]
pub struct Subscription {
    guest: Arc<Guest>,
    id: u64,
}

impl Drop for Subscription {
    fn drop(&mut self) {
        self.guest.unsubscribe(self.id);
    }
}

impl Migrator {
    /// Takes charge of `vm`, whose guest does not run.
    pub fn new(vm: Arc<dyn Vm>, start: Start) -> Migrator {
        let (state, autostart) = match start {
            Start::Paused => (RunState::Prelaunch, true),
            Start::Incoming { autostart } => (RunState::Inmigrate, autostart),
        };
        Migrator {
            guest: Arc::new(Guest::new(vm, state)),
            autostart,
            router: Router::default(),
            inner: Mutex::default(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        // Only plain values are stored under the lock: a panic elsewhere cannot leave it half done.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The VM.
    pub fn vm(&self) -> &dyn Vm {
        self.guest.vm()
    }

    /// How the guest stands.
    pub fn run_state(&self) -> RunState {
        self.guest.state()
    }

    /// Stops the guest.
    pub fn stop(&self) -> Result<(), Error> {
        self.guest.stop()
    }

    /// Runs the guest, if it is here to be run.
    pub fn cont(&self) -> Result<(), Error> {
        self.guest.cont()
    }

    /// Calls `subscriber` on every event, from whichever thread causes it, until the
    /// subscription is dropped. It must not block.
    pub fn subscribe(&self, subscriber: impl Fn(&Event) + Send + Sync + 'static) -> Subscription {
        let id = self.guest.subscribe(Arc::new(subscriber));
        Subscription { guest: self.guest.clone(), id }
    }

    /// Which capabilities are on.
    pub fn capabilities(&self) -> Capabilities {
        self.lock().capabilities
    }

    /// Switches capabilities on and off; refused while a migration runs.
    pub fn set_capabilities(&self, changes: &[(Capability, bool)]) -> Result<(), Error> {
        let mut inner = self.lock();
        if inner.is_running() {
            return Err(SettingError::Running.into());
        }
        let mut capabilities = inner.capabilities;
        for &(capability, on) in changes {
            capabilities.set(capability, on);
        }
        capabilities.check()?;
        inner.capabilities = capabilities;
        Ok(())
    }

    /// The parameters.
    pub fn parameters(&self) -> Parameters {
        self.router.parameters().get()
    }

    /// Changes parameters; a running migration follows. `change` must not block.
    pub fn update_parameters(&self, change: impl FnOnce(&mut Parameters)) -> Result<(), Error> {
        Ok(self.router.parameters().change(change)?)
    }

    /// Adds what parameters can name by `id` (`object-add`).
    pub fn add_object(&self, id: &str, object: impl Into<Object>) -> Result<(), Error> {
        self.router.objects().add(id, object.into())
    }

    /// Removes what was added under `id` (`object-del`).
    pub fn remove_object(&self, id: &str) -> Result<(), Error> {
        self.router.objects().remove(id)
    }

    fn route(&self, address: Address, capabilities: Capabilities) -> Result<Route, Error> {
        let route = self.router.route(address)?;
        if route.tls.is_some() && capabilities.has(Capability::ZeroCopySend) {
            return Err(Error::Refused(
                "capability 'zero-copy-send' is not compatible with TLS: what is encrypted has to \
                 be copied"
                    .into(),
            ));
        }
        Ok(route)
    }

    /// Starts moving the guest to `address`. Errors from connecting on are in
    /// [`info`](Migrator::info).
    pub fn migrate(&self, address: Address) -> Result<(), Error> {
        let mut inner = self.lock();
        inner.refuse_while_running()?;
        match self.guest.state() {
            RunState::Inmigrate => {
                return Err(Error::Refused("Guest is waiting for an incoming migration".into()));
            }
            RunState::Postmigrate => {
                return Err(Error::Refused(
                    "Can't migrate the vm that was paused due to previous migration".into(),
                ));
            }
            _ => {}
        }
        if self.guest.lost_pages() > 0 {
            return Err(Error::Refused(format!(
                "{} pages of this guest's RAM are lost: it cannot be migrated",
                self.guest.lost_pages()
            )));
        }
        let route = self.route(address, inner.capabilities)?;
        let (cancel, resume) = (new_cancel()?, new_way_on()?);
        let way_on = Way::Resume(resume.clone());
        let colo = (inner.fence.clone(), inner.output.clone());
        let mut run = Run::new(cancel, inner.capabilities, way_on, colo)?;
        let job = source::Job {
            guest: self.guest.clone(),
            route,
            capabilities: inner.capabilities,
            router: self.router.clone(),
            report: run.report.clone(),
            cancel: run.cancel.clone(),
            proceed: run.proceed.clone(),
            postcopy: run.postcopy.clone(),
            links: run.links.clone(),
            resume,
            colo: run.colo.clone(),
        };
        run.start(Role::SourceMain, move || source::run(&job))?;
        let old = inner.run.replace(run);
        drop(inner);
        drop(old); // Its thread has told how it ended and is about to be gone: joined without the lock.
        Ok(())
    }

    /// Waits at `address` for the guest to come. The address is bound when this returns. What
    /// [`exits_on_error`](Migrator::exits_on_error) says from then on is `exit_on_error`.
    pub fn incoming(&self, address: &Address, exit_on_error: bool) -> Result<(), Error> {
        self.refuse_incoming(&self.lock())?;
        let cancel = new_cancel()?;
        // A name may have to be looked up: not with the lock held.
        let listener = self.listener(address, &cancel)?;
        let mut inner = self.lock();
        self.refuse_incoming(&inner)?;
        let orders = Arc::new(Orders::new().map_err(Error::system("making an eventfd"))?);
        let recover = new_way_on()?;
        let way_on = Way::Recover(recover.clone(), orders.clone());
        let colo = (inner.fence.clone(), inner.output.clone());
        let mut run = Run::new(cancel, inner.capabilities, way_on, colo)?;
        let listener = announced(listener, &run.report, &run.links);
        let job = live::Job {
            guest: self.guest.clone(),
            capabilities: inner.capabilities,
            multifd: match inner.capabilities.has(Capability::Multifd) {
                true => self.router.parameters().with(|p| p.multifd_channels),
                false => 0,
            },
            autostart: self.autostart,
            router: self.router.clone(),
            report: run.report.clone(),
            cancel: run.cancel.clone(),
            links: run.links.clone(),
            orders,
            recover,
            colo: run.colo.clone(),
        };
        run.start(Role::DestinationMain, move || live::run(&job, listener))?;
        inner.run = Some(run);
        inner.exit_on_error = exit_on_error;
        Ok(())
    }

    fn listener(&self, address: &Address, cancel: &Cancel) -> Result<Listener, Error> {
        let parameters = self.parameters();
        let tls = self.router.objects().server(&parameters)?;
        let listener = Listener::bind(address, cancel)?.secured(tls);
        Ok(listener.waiting_no_longer_than(recovery::silence(&parameters)))
    }

    fn refuse_incoming(&self, inner: &Inner) -> Result<(), Error> {
        inner.refuse_while_running()?;
        if self.guest.state() != RunState::Inmigrate {
            return Err(Error::Refused(
                "'-incoming' was not specified on the command line: the guest is here already"
                    .into(),
            ));
        }
        if inner.run.is_some() {
            return Err(Error::Refused("The incoming migration has already been started".into()));
        }
        Ok(())
    }

    /// Whether the VMM is to end when the migration it waits for fails (`exit-on-error`).
    pub fn exits_on_error(&self) -> bool {
        self.lock().exit_on_error
    }

    /// `migrate_cancel`: ends the migration; how it ended is in [`info`](Migrator::info) soon.
    /// No error when there is none. Refused in postcopy, where neither side has the whole guest.
    pub fn cancel(&self) -> Result<(), Error> {
        let inner = self.lock();
        let Some(run) = &inner.run else { return Ok(()) };
        let status = run.report.status();
        if status.is_postcopy() {
            return Err(Error::Refused(
                "Postcopy migration in progress, cannot cancel: neither side has the whole guest"
                    .into(),
            ));
        }
        if status.is_running() {
            run.cancel.set();
        }
        Ok(())
    }

    /// `migrate-start-postcopy`: the guest is to run at the destination as soon as that can be, and
    /// the rest of its RAM to follow. No error when it is too late for that.
    pub fn start_postcopy(&self) -> Result<(), Error> {
        let inner = self.lock();
        match &inner.run {
            Some(run) if run.side == Side::Source && run.allows_postcopy => {
                run.postcopy.set();
                Ok(())
            }
            Some(run) if run.side == Side::Source => Err(Error::Refused(
                "Enable postcopy with migrate_set_capability before the start of migration".into(),
            )),
            _ => Err(Error::Refused(
                "Can't start postcopy: no migration out of here was started".into(),
            )),
        }
    }

    /// `migrate-pause`: breaks the connections of a migration in postcopy. It does not go on by
    /// itself then: it waits for [`resume`](Migrator::resume) or [`recover`](Migrator::recover).
    pub fn pause(&self) -> Result<(), Error> {
        let inner = self.lock();
        match &inner.run {
            Some(run) if run.report.status().is_broken_by_pause() => {
                run.links.hold();
                Ok(())
            }
            _ => Err(Error::Refused(
                "migrate-pause is currently only supported during postcopy-active or \
                 postcopy-recover state"
                    .into(),
            )),
        }
    }

    /// Keeps what is here of a guest whose other side is gone for good, in a file at `path`, which may
    /// then be [joined](crate::rescue::join) with what the other side has left. Only while the
    /// migration is paused in postcopy; it stays so. Returns when all of it is on the disk.
    ///
    /// At a destination the guest is stopped: whoever restores the file runs it from then on, and
    /// here it does not run again unless a human says so ([`cont`](Migrator::cont)). On an error it
    /// runs on.
    pub fn rescue(&self, path: &Path) -> Result<KeptPart, Error> {
        let migration = self.migration_id();
        match self.orders()? {
            Some(orders) => rescue::keep_destination(&self.guest, &orders, migration, path),
            None => rescue::keep_source(&self.guest, migration, path),
        }
    }

    /// Brings what is missing at a destination that is paused in postcopy from `part`, which is what
    /// the source has left; the guest runs meanwhile, and the migration is completed. Pages that are
    /// not in `part` either are `lost`; without a part all are that are missing.
    ///
    /// A guest with pages that were given up runs until it touches one; it cannot be migrated any
    /// more.
    pub fn fill(&self, part: Option<Part>, lost: Lost) -> Result<Filled, Error> {
        match self.orders()? {
            Some(orders) => rescue::fill_destination(&self.guest, &orders, part, lost),
            None => Err(Error::Refused(
                "this is the source: it is the destination that lacks pages".into(),
            )),
        }
    }

    /// The identifier of the migration under way or the last one, once it has one: between two
    /// whimbrels, from just before the hand-over in postcopy on.
    pub fn migration_id(&self) -> Option<[u8; 16]> {
        self.lock().run.as_ref().and_then(|run| run.report.migration())
    }

    /// How many pages of 4 KiB of the guest's RAM are lost: they were given up, and whoever reads
    /// one is killed (SIGBUS).
    pub fn lost_pages(&self) -> u64 {
        self.guest.lost_pages()
    }

    /// Who rescues a destination; `None` for a source.
    fn orders(&self) -> Result<Option<Arc<Orders>>, Error> {
        let inner = self.lock();
        let paused = |run: &&Run| run.report.status() == MigrationStatus::PostcopyPaused;
        let run = inner.run.as_ref().filter(paused).ok_or_else(rescue::not_paused)?;
        Ok(match &run.way_on {
            Way::Recover(_, orders) => Some(orders.clone()),
            Way::Resume(_) => None,
        })
    }

    /// `migrate` with `resume`: a source in `postcopy-paused` connects to `address` and sends what the
    /// destination does not have. While it looks for the destination by itself, `address` is where
    /// it goes next, at once.
    pub fn resume(&self, address: Address) -> Result<(), Error> {
        let inner = self.lock();
        let route = self.route(address, inner.capabilities)?;
        match &inner.run {
            Some(Run { report, way_on: Way::Resume(way), .. }) if report.status().may_resume() => {
                way.tell(route);
                Ok(())
            }
            _ => Err(Error::Refused("Cannot resume if there is no paused migration".into())),
        }
    }

    /// `migrate-recover`: a destination in `postcopy-paused` waits for its source at `address`, and
    /// nowhere else. The address is bound when this returns.
    pub fn recover(&self, address: &Address) -> Result<(), Error> {
        let (cancel, way, report, links) = {
            let inner = self.lock();
            match &inner.run {
                Some(Run { report, links, cancel, way_on: Way::Recover(way, _), .. })
                    if report.status() == MigrationStatus::PostcopyPaused =>
                {
                    (cancel.clone(), way.clone(), report.clone(), links.clone())
                }
                _ => {
                    return Err(Error::Refused(
                        "Migrate recover can only be run when postcopy is paused.".into(),
                    ));
                }
            }
        };
        // A name may have to be looked up: not with the lock held.
        let listener = self.listener(address, &cancel)?;
        way.tell(announced(listener, &report, &links));
        Ok(())
    }

    /// `yank`: shuts down every connection of the migration under way, at once. What waits on one of
    /// them fails, as it does when the peer or the network breaks it: before the guest has changed
    /// hands the migration fails, and the guest stays at the source; in postcopy it pauses.
    ///
    /// For what hangs: [`cancel`](Migrator::cancel) and [`pause`](Migrator::pause) do the same in
    /// good order.
    pub fn yank(&self) -> Result<(), Error> {
        let links = {
            let inner = self.lock();
            let run = inner.run.as_ref().filter(|run| run.report.status().is_running());
            run.map(|run| run.links.clone())
        };
        match links {
            Some(links) => {
                links.shut_down();
                Ok(())
            }
            None => Err(Error::Refused("no migration is under way: nothing to be yanked".into())),
        }
    }

    /// `migrate-continue`: leaves the state `pre-switchover`.
    pub fn proceed(&self, state: MigrationStatus) -> Result<(), Error> {
        let inner = self.lock();
        match &inner.run {
            Some(run) if run.side == Side::Source && run.report.status() == state => {
                run.proceed.set();
                Ok(())
            }
            _ => Err(Error::Refused(format!("Migration not in expected state: {state}"))),
        }
    }

    /// `query-colo-status`: which part this VM has in COLO, or had.
    pub fn colo_status(&self) -> ColoStatus {
        self.colo().map(|colo| colo.status()).unwrap_or_default()
    }

    /// `x-colo-lost-heartbeat`: the other side of COLO is gone, whatever the connection says. The
    /// guest of a primary goes on alone; a secondary finishes or abandons the checkpoint that is
    /// coming, and takes the guest over. To say so of a primary that is not gone is to run the guest
    /// twice.
    pub fn colo_lost_heartbeat(&self) -> Result<(), Error> {
        self.colo().ok_or_else(crate::colo::not_in_colo)?.lose_heartbeat()
    }

    /// Has a primary take a checkpoint now, whatever `x-checkpoint-delay` says.
    pub fn colo_checkpoint(&self) -> Result<(), Error> {
        self.colo().ok_or_else(crate::colo::not_in_colo)?.want_checkpoint()
    }

    /// What makes certain that the other side of COLO runs no more when it is lost: called from the
    /// migration's thread. A secondary takes the guest over only if it returns without an error, and a
    /// primary that has one goes on alone only then. Where both sides have one, at most one of the two
    /// may succeed: each switches the other off, or both ask for one lease. It must return, and it
    /// counts for what is begun from then on.
    pub fn set_fence(&self, fence: impl Fn() -> Result<(), VmError> + Send + Sync + 'static) {
        self.lock().fence = Some(Arc::new(fence));
    }

    /// From now on what the guest says to the world leaves by `outlet`: what the VMM gives to the
    /// [`Output`] that this returns. A VM that is kept in step with another holds it until it may
    /// ([`ColoOutput`](crate::ColoOutput)); what a copy says does not leave at all. Before COLO begins.
    pub fn set_outlet(&self, outlet: impl Outlet + 'static) -> Output {
        let output = Output::new(outlet);
        self.lock().output = MaybeOutput(Some(output.clone()));
        output
    }

    fn colo(&self) -> Option<Arc<Replication>> {
        self.lock().run.as_ref().map(|run| run.colo.clone())
    }

    /// How the migration stands, or how the last one ended.
    pub fn info(&self) -> MigrationInfo {
        let report = self.lock().run.as_ref().map(|run| run.report.clone());
        report.map(|report| report.info()).unwrap_or_default()
    }

    /// Ends the migration under way, also one that is complete and waits for its peer to close,
    /// and waits for its thread.
    pub fn end(&self) {
        let worker = self.lock().run.as_mut().and_then(|run| {
            run.cancel.set();
            run.links.end();
            run.worker.take()
        });
        drop(worker); // Wakes it and joins it, without the lock.
    }

    /// Waits for the end of the migration under way, and says how it ended.
    pub fn wait(&self) -> MigrationInfo {
        let worker = self.lock().run.as_mut().and_then(|run| run.worker.take());
        if let Some(worker) = worker {
            worker.join();
        }
        self.info()
    }
}

impl Inner {
    fn is_running(&self) -> bool {
        self.run.as_ref().is_some_and(|run| run.report.status().is_running())
    }

    fn refuse_while_running(&self) -> Result<(), Error> {
        match self.is_running() {
            true => Err(Error::Refused("There's a migration process in progress".into())),
            false => Ok(()),
        }
    }
}

/// Tells in the report where a destination listens, and whom it turns away.
fn announced(listener: Listener, report: &Arc<Report>, links: &Links) -> Listener {
    report.set_socket_address(listener.socket_address());
    let told = report.clone();
    listener.telling(move |reason| told.set_error(reason.to_string())).joined(links)
}

fn new_way_on<T>() -> Result<Arc<WayOn<T>>, Error> {
    WayOn::new().map(Arc::new).map_err(Error::system("making an eventfd"))
}

fn new_links() -> Result<Links, Error> {
    Links::new().map_err(Error::system("making an eventfd"))
}

fn new_cancel() -> Result<Cancel, Error> {
    Cancel::new().map_err(Error::system("making an eventfd"))
}
