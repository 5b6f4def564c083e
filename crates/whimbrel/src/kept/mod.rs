//! Kept VMs: migrations that end in a file, and begin from one.
//!
//! The file is QEMU's own mapped-ram format, in which every page has a fixed place: a stock QEMU
//! of 9.0 or later starts from it by itself.

mod by_postcopy;
pub(crate) mod disk;
pub(crate) mod keeper;
pub(crate) mod layout;
mod machine;
mod on_channels;
mod open;
mod restore;
#[cfg(test)]
mod round_trip;
mod standby;
mod supply;
mod touch;
mod writers;
pub(crate) mod writing;

use std::num::NonZeroU8;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

pub use by_postcopy::ByPostcopy;
pub use disk::DirectIo;
pub use on_channels::Multifd;
pub use open::KeptVm;
pub use restore::Restoring;
pub use standby::{StandbyProgress, StoodBy};
pub use touch::Touch;
pub(crate) use writers::Changes;

use crate::address::Address;
use crate::channel::tls::{Authorization, TlsCredentials};
use crate::channel::{Arrivals, Listener};
use crate::destination::Back;
use crate::destination::incoming::{Arrived, Incoming};
use crate::destination::postcopy::{Failed, Terms};
use crate::error::Error;
use crate::recovery;
use crate::report::{Report, Side};
use crate::rescue::Missing;
use crate::settings::{AutoRecover, Current, Parameters};
use crate::status::{FaultStats, MigrationInfo, MigrationStatus, SocketAddressInfo};
use crate::worker::{Cancel, Links};

/// How the file of a kept VM is written and read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Access {
    /// By how many threads.
    pub threads: NonZeroU8,
    /// Whether past the page cache.
    pub direct: DirectIo,
}

impl Access {
    /// The most threads by default: no disk was found to be faster with more (docs/benchmarks.md).
    const DEFAULT_THREADS_MAX: NonZeroU8 = NonZeroU8::new(4).expect("not zero");
}

impl Default for Access {
    /// A thread for each processor, up to four, and direct I/O where it helps.
    fn default() -> Access {
        let processors = std::thread::available_parallelism().ok();
        let threads = processors.and_then(|count| NonZeroU8::try_from(count).ok());
        let threads = threads.unwrap_or(NonZeroU8::MIN).min(Access::DEFAULT_THREADS_MAX);
        Access { threads, direct: DirectIo::Auto }
    }
}

/// How many seconds a source that has not heard that everything is kept is waited for at most.
const FAREWELL_MAX: u64 = 30;

/// Takes one migration in and keeps it. Made first, so that the address is bound before the
/// source is told to connect.
#[derive(Debug)]
pub struct Receiver {
    listener: Listener,
    cancel: Cancel,
    links: Links,
    placed: Arc<AtomicU64>,
    preempt: bool,
    multifd: u8,
    touch: Touch,
    access: Access,
    parameters: Parameters,
}

/// What has been kept.
#[derive(Clone, Debug, PartialEq)]
pub struct KeptSummary {
    /// The machine type's full name.
    pub machine: String,
    /// Bytes of RAM, all blocks together.
    pub ram_bytes: u64,
    /// Bytes of RAM that are not zero, and so are in the file.
    pub stored_bytes: u64,
    /// Device sections.
    pub devices: usize,
    /// The pages that were touched before they had come, if it came by postcopy.
    pub faults: Option<FaultStats>,
}

/// Ends what a [`Receiver`] or [`KeptVm`] does, from another thread.
#[derive(Clone, Debug)]
pub struct Stop {
    cancel: Cancel,
    links: Links,
}

impl Stop {
    /// Ends it: the operation returns [`Error::Cancelled`] and leaves nothing half written.
    pub fn stop(&self) {
        self.cancel.set();
        self.links.end();
    }
}

impl Receiver {
    /// Binds `address`.
    pub fn bind(address: &Address) -> Result<Receiver, Error> {
        let cancel = Cancel::new().map_err(Error::system("making an eventfd"))?;
        let links = Links::new().map_err(Error::system("making an eventfd"))?;
        let listener = Listener::bind(address, &cancel)?;
        let (placed, preempt, multifd, touch) = (Arc::default(), false, 0, Touch::Nothing);
        let (access, parameters) = (Access::default(), Parameters::default());
        Ok(Receiver {
            listener,
            cancel,
            links,
            placed,
            preempt,
            multifd,
            touch,
            access,
            parameters,
        })
    }

    /// When the link breaks in postcopy, the source is waited for, on the same address, for so many
    /// seconds (`auto-recover`, `recover-time-limit`; 0 is without end). A QEMU has to be told
    /// `migrate` with `resume` meanwhile.
    #[must_use]
    pub fn recovering(self, auto_recover: AutoRecover, recover_time_limit: u64) -> Receiver {
        let parameters = Parameters { auto_recover, recover_time_limit, ..self.parameters };
        Receiver { parameters, ..self }
    }

    /// A source that is silent for so many ms where it must not be has gone (`silence-limit`); 0 is
    /// to wait for ever.
    #[must_use]
    pub fn waiting_no_longer_than(self, silence_limit: u64) -> Receiver {
        Receiver { parameters: Parameters { silence_limit, ..self.parameters }, ..self }
    }

    /// The source has capability `postcopy-preempt` on: a postcopy has a second connection.
    #[must_use]
    pub fn with_preempt(self, preempt: bool) -> Receiver {
        Receiver { preempt, ..self }
    }

    /// The source has capability `multifd` on, and as many `multifd-channels`; 0 is without.
    #[must_use]
    pub fn with_multifd(self, channels: u8) -> Receiver {
        Receiver { multifd: channels, ..self }
    }

    /// Takes in only what comes over TLS, from whom `authorization` allows: without it, from
    /// everybody with a certificate of the CA.
    pub fn with_tls(
        self,
        credentials: &TlsCredentials,
        authorization: Option<Authorization>,
    ) -> Result<Receiver, Error> {
        let tls = credentials.server(authorization)?;
        Ok(Receiver { listener: self.listener.secured(Some(tls)), ..self })
    }

    /// Calls `told` with the reason whenever a connection is turned away and another one waited
    /// for. It must not block for long.
    #[must_use]
    pub fn telling_refusals(self, told: impl Fn(&Error) + Send + Sync + 'static) -> Receiver {
        Receiver { listener: self.listener.telling(told), ..self }
    }

    /// In a postcopy, pages are touched in this order while they come.
    #[must_use]
    pub fn touching(self, touch: Touch) -> Receiver {
        Receiver { touch, ..self }
    }

    /// The file is written like this.
    #[must_use]
    pub fn writing_by(self, access: Access) -> Receiver {
        Receiver { access, ..self }
    }

    /// Where it listens, the port chosen included; `None` for what is not listened to.
    pub fn socket_address(&self) -> Option<SocketAddressInfo> {
        self.listener.socket_address()
    }

    /// What ends it from another thread.
    pub fn stopper(&self) -> Stop {
        Stop { cancel: self.cancel.clone(), links: self.links.clone() }
    }

    /// Bytes of RAM placed so far, to be read while [`receive`](Receiver::receive) runs.
    pub fn progress(&self) -> Arc<AtomicU64> {
        self.placed.clone()
    }

    /// Waits for the source, takes everything in, and writes it to `path` before the source is
    /// told that it has arrived. On any error `path` is untouched and the source keeps its guest, unless
    /// it had given it away: then what has come is kept as a [part](crate::rescue), with `.part`
    /// behind its name.
    pub fn receive(self, path: &Path) -> Result<KeptSummary, Error> {
        let report = Report::new(Side::Destination);
        let mut keeper = keeper::Keeper::new(path, self.touch, self.access, &self.cancel);
        let Receiver { listener, cancel, links, placed, preempt, multifd, parameters, .. } = self;
        let listener = Arc::new(listener.waiting_no_longer_than(recovery::silence(&parameters)));
        let current = Current::of(parameters);
        let arrivals = Arrivals::wait(&listener, multifd, &cancel)?;
        keeper.is_of(arrivals.uuid);
        let stop = arrivals.stop.clone();
        let mut incoming = Incoming::new(arrivals).with_progress(placed);
        let arrived = listener.greeting(multifd > 0, &stop, || incoming.receive(&mut keeper));
        let mut back = None;
        let kept = arrived
            .and_then(|arrived| match arrived {
                Arrived::Whole => Ok(()),
                Arrived::GuestFirst(package) => {
                    let terms = Terms {
                        report: &report,
                        links: &links,
                        preempt,
                        blocktime: false,
                        parameters: &current,
                        recover: None,
                        orders: None,
                        stands: &|status, reason| stands(&report, status, reason),
                    };
                    back = take_rest(&mut incoming, &mut keeper, package, (listener, &terms))?;
                    Ok(())
                }
            })
            .and_then(|()| keeper.keep());
        let Ok(summary) = kept else {
            incoming.fail();
            return kept;
        };
        // It is on the disk: a source that has gone cannot change that, and is not waited for long.
        let parameters = current.get();
        let limit = parameters.recover_time_limit.clamp(1, FAREWELL_MAX);
        let parameters = Current::of(Parameters { recover_time_limit: limit, ..parameters });
        let _ = incoming.see_off(back, &links, &parameters);
        Ok(KeptSummary { faults: report.info().faults, ..summary })
    }
}

/// How a migration in postcopy stands now, and why it is paused.
fn stands(report: &Report, status: MigrationStatus, reason: Option<&Error>) {
    if let Some(reason) = reason {
        report.set_error(reason.text_of_pause());
    }
    report.set_status(status);
}

fn take_rest(
    incoming: &mut Incoming,
    keeper: &mut keeper::Keeper,
    package: u32,
    terms: (Arc<Listener>, &Terms<'_>),
) -> Result<Option<Back>, Error> {
    keeper.pause()?;
    let report = terms.1.report;
    match incoming.receive_rest(package, keeper, terms) {
        Ok(listener) => keeper.complete().map(|()| listener),
        Err(Failed::Before(error)) => Err(error),
        Err(Failed::After(error, absent)) => {
            let missing = Missing::of(absent.received(), absent.ram());
            let pages = missing.count();
            // Whoever touches its pages is woken: before its thread is waited for.
            drop(absent);
            let what = match keeper.keep_part(&missing, report.migration()) {
                Ok(part) => format!(
                    "what has come is kept in {}: 'whimbrel rescue join' makes it whole with what the \
                     source has left",
                    part.display()
                ),
                Err(error) => format!("nothing was kept: {error}"),
            };
            Err(Error::Refused(format!(
                "{error}; the source has given its guest away, and {pages} pages of it have not come: \
                 {what}"
            )))
        }
    }
}

/// How a kept VM's way out went (the fields of `query-migrate`).
pub(crate) fn report() -> Report {
    Report::new(Side::Source)
}

/// A report to be read while a kept VM is sent.
#[derive(Clone, Debug)]
pub struct Progress(Arc<Report>);

impl Progress {
    /// As of now.
    pub fn info(&self) -> MigrationInfo {
        self.0.info()
    }
}
