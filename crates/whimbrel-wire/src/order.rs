//! Which commands may come when, on a main channel.

use crate::{Command, ErrorKind};

/// How far a migration has come towards running the guest on the destination.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Phase {
    /// No postcopy was announced.
    Precopy,
    /// A postcopy may follow.
    Advised,
    /// The package was announced: the guest runs on the destination once it is loaded.
    Postcopy,
}

/// The order of commands on one main channel.
#[derive(Debug)]
pub(crate) struct Order {
    pub(crate) phase: Phase,
    /// ADVISE came with page sizes: RAM may go by postcopy.
    pub(crate) ram_advised: bool,
    discarded: bool,
    return_path: bool,
    /// A reconnected channel: only RECV_BITMAP so far.
    recovering: bool,
    setup_done: bool,
}

impl Order {
    pub(crate) const fn new() -> Self {
        Self {
            phase: Phase::Precopy,
            ram_advised: false,
            discarded: false,
            return_path: false,
            recovering: false,
            setup_done: false,
        }
    }

    /// The order on a channel that takes the place of a broken one.
    pub(crate) const fn recovery() -> Self {
        Self {
            phase: Phase::Postcopy,
            ram_advised: true,
            discarded: true,
            return_path: true,
            recovering: true,
            setup_done: true,
        }
    }

    /// The `ram` section has started.
    pub(crate) const fn setup_done(&mut self) {
        self.setup_done = true;
    }

    /// Whether RAM may come: not before POSTCOPY_RESUME.
    pub(crate) const fn waits_for_resume(&self) -> bool {
        self.recovering
    }

    /// Notes a command, or says why it may not come now.
    pub(crate) fn take(&mut self, command: &Command) -> Result<(), ErrorKind> {
        let problem = match command {
            Command::OpenReturnPath => {
                self.return_path = true;
                None
            }
            Command::Ping(_) => {
                (!self.return_path).then_some("the return path was not opened before")
            }
            Command::PostcopyAdvise(sizes) => self.advise(sizes.is_some()),
            Command::PostcopyListen => Some("it stands in a package only"),
            Command::PostcopyRun if self.phase == Phase::Postcopy => {
                Some("the guest was started already")
            }
            Command::PostcopyRun => Some("it stands in a package only"),
            Command::RamDiscard(_) => self.discard(),
            Command::Packaged { .. } => self.package(),
            Command::EnableColo => (self.phase != Phase::Precopy || self.setup_done)
                .then_some("it comes before RAM, without postcopy"),
            Command::PostcopyResume => {
                let was = core::mem::replace(&mut self.recovering, false);
                (!was).then_some("it ends a recovery, once")
            }
            Command::RecvBitmap(_) => {
                (!self.recovering).then_some("it is asked for in a recovery only")
            }
            Command::Identity(_) => (self.phase != Phase::Advised || !self.setup_done)
                .then_some("it comes between the RAM setup and the package of a postcopy"),
            Command::SwitchoverStart => {
                (self.phase == Phase::Postcopy).then_some("the guest was switched over already")
            }
        };
        problem
            .map_or(Ok(()), |state| Err(ErrorKind::CommandOrder { command: command.name(), state }))
    }

    fn advise(&mut self, ram: bool) -> Option<&'static str> {
        if self.phase != Phase::Precopy || self.setup_done {
            return Some("it comes once, before RAM");
        }
        self.phase = Phase::Advised;
        self.ram_advised = ram;
        None
    }

    fn discard(&mut self) -> Option<&'static str> {
        match self.phase {
            Phase::Advised if self.ram_advised && self.setup_done => {
                self.discarded = true;
                None
            }
            Phase::Precopy | Phase::Advised => Some("no postcopy of RAM was announced before"),
            Phase::Postcopy => Some("the guest runs on what would be discarded"),
        }
    }

    fn package(&mut self) -> Option<&'static str> {
        match self.phase {
            Phase::Precopy => Some("no postcopy was announced before"),
            Phase::Advised if !self.setup_done => Some("it comes after the RAM setup"),
            Phase::Advised => {
                self.phase = Phase::Postcopy;
                None
            }
            Phase::Postcopy => Some("it comes once"),
        }
    }
}
