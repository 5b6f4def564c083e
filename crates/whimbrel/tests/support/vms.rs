//! Two VMs in one process, and what has to be true of them after every migration.

#![allow(
    dead_code,
    clippy::allow_attributes,
    reason = "each test binary uses the part it needs of what they share"
)]

use std::fs;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::sleep;
use std::time::{Duration, Instant};

use whimbrel::{Address, Capability, MigrationInfo, MigrationStatus, Migrator, RunState, Start};
use whimbrel_ram::TargetPage;
use whimbrel_vm::{AccelChoice, Config, ReferenceVm};

/// Nothing in these tests takes longer, on the slowest machine.
pub(crate) const LIMIT: Duration = Duration::from_secs(120);

/// Waits until `done`; panics with `what` when it does not come.
pub(crate) fn until(what: &str, mut done: impl FnMut() -> bool) {
    let start = Instant::now();
    while !done() {
        assert!(start.elapsed() < LIMIT, "{what}: not within {LIMIT:?}");
        sleep(Duration::from_millis(1));
    }
}

/// A reproducible sequence of choices (splitmix64).
#[derive(Clone, Debug)]
pub(crate) struct Dice(pub u64);

impl Dice {
    pub(crate) fn roll(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Below `end`.
    pub(crate) fn below(&mut self, end: u64) -> u64 {
        self.roll() % end
    }

    pub(crate) fn one_of<T: Copy>(&mut self, all: &[T]) -> T {
        all[usize::try_from(self.below(all.len() as u64)).expect("below a length")]
    }
}

/// The seed of this run: `WHIMBREL_SEED`, or one of the clock's. Printed, so that it can be
/// replayed.
pub(crate) fn seed(test: &str) -> u64 {
    let seed = match std::env::var("WHIMBREL_SEED") {
        Ok(text) => text.parse().expect("WHIMBREL_SEED is a number"),
        Err(_) => {
            let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
            u64::from(now.expect("after 1970").subsec_nanos())
        }
    };
    eprintln!("{test}: seed {seed}; replay with WHIMBREL_SEED={seed}");
    seed
}

/// The runs of a test that draws at random what it does: each one's number, from 0, and what was
/// drawn for it. Environment variable `count` says how many there are, instead of `default`, and
/// `WHIMBREL_ONLY` picks one of them.
pub(crate) fn drawn<T>(
    test: &str,
    (count, default): (&str, u64),
    mut draw: impl FnMut(&mut Dice) -> T,
) -> impl Iterator<Item = (u64, T)> {
    let number = |name| std::env::var(name).ok().map(|text| text.parse().expect("a number"));
    let (runs, only) = (number(count).unwrap_or(default), number("WHIMBREL_ONLY"));
    let mut dice = Dice(seed(test));
    // Also what is not run is drawn: the dice are the same for the one that is.
    (0..runs)
        .map(move |run| (run, draw(&mut dice)))
        .filter(move |(run, _)| only.is_none_or(|only| only == *run))
}

/// Accelerators of this machine.
pub(crate) fn accelerators() -> Vec<AccelChoice> {
    let probe = Config { accel: AccelChoice::Kvm, ..Config::new(8 << 20) };
    match ReferenceVm::new(probe) {
        Ok(_) => vec![AccelChoice::Native, AccelChoice::Kvm],
        Err(why) => {
            eprintln!("not run with KVM: {why}");
            vec![AccelChoice::Native]
        }
    }
}

/// One VM and its migrator.
pub(crate) struct Side {
    pub vm: Arc<ReferenceVm>,
    pub migrator: Migrator,
}

impl Side {
    /// A VM with a guest that runs and has done something already.
    pub(crate) fn running(config: &Config) -> Side {
        let vm = ReferenceVm::new(config.clone()).expect("a VM");
        let migrator = Migrator::new(vm.clone(), Start::Paused);
        let side = Side { vm, migrator };
        side.migrator.cont().expect("a guest that runs");
        side.expect_progress("the source's guest");
        side
    }

    /// A VM that waits; its guest runs at once if `autostart`.
    pub(crate) fn waiting(config: &Config, autostart: bool) -> Side {
        let config = Config { incoming: true, ..config.clone() };
        let vm = ReferenceVm::new(config).expect("a VM");
        let migrator = Migrator::new(vm.clone(), Start::Incoming { autostart });
        Side { vm, migrator }
    }

    /// Has it wait at `address`; gives where it really is.
    pub(crate) fn listen(&self, address: &str) -> Address {
        let address: Address = address.parse().expect("an address");
        self.migrator.incoming(&address, false).expect("a free address");
        match &address {
            Address::Tcp { .. } => self.address(),
            _ => address,
        }
    }

    /// Where it waits.
    pub(crate) fn address(&self) -> Address {
        let told = self.migrator.info().socket_address.and_then(|all| all.into_iter().next());
        match told.expect("it waits") {
            whimbrel::SocketAddressInfo::Inet { host, port } => {
                Address::Tcp { host, port: port.parse().expect("a port") }
            }
            other => panic!("{other:?}"),
        }
    }

    pub(crate) fn switch_on(&self, capabilities: &[Capability]) {
        let changes: Vec<_> = capabilities.iter().map(|&one| (one, true)).collect();
        self.migrator.set_capabilities(&changes).expect("no migration runs");
    }

    pub(crate) fn status(&self) -> Option<MigrationStatus> {
        self.migrator.info().status
    }

    pub(crate) fn runs(&self) -> bool {
        // It may be about to run, or to stop: then one of them knows before the other.
        let (mut says, mut does) = (false, true);
        until("the engine and the VM agree on whether the guest runs", || {
            says = self.migrator.run_state() == RunState::Running;
            does = self.vm.running();
            says == does
        });
        does
    }

    /// Waits for the migration's end.
    pub(crate) fn ended(&self, what: &str) -> MigrationInfo {
        let since = Instant::now();
        until(what, || {
            self.relent(since);
            self.status().is_none_or(|status| !status.is_running())
        });
        self.migrator.info()
    }

    /// A machine that is busy with other things may be too slow for the downtime that a test begins
    /// with: that is not what the test is about.
    pub(crate) fn relent(&self, since: Instant) {
        if since.elapsed() > Duration::from_secs(5) {
            let relent = |p: &mut whimbrel::Parameters| {
                if p.downtime_limit > 0 {
                    p.downtime_limit = p.downtime_limit.max(5000);
                }
            };
            self.migrator.update_parameters(relent).expect("a downtime that is allowed");
        }
    }

    /// The migration says why it failed or paused, in one line that has all of `parts`.
    pub(crate) fn expect_reason(&self, parts: &[&str], what: &str) {
        let error = self.migrator.info().error_desc.expect("says why");
        let said = parts.iter().all(|part| error.contains(part)) && !error.contains('\n');
        assert!(said, "{what}: {error}");
    }

    /// The guest has not come, for such a reason, and nothing runs here.
    pub(crate) fn expect_not_arrived(&self, parts: &[&str], what: &str) {
        let info = self.ended(what);
        assert_eq!(info.status, Some(MigrationStatus::Failed), "{what}: {:?}", info.error_desc);
        self.expect_reason(parts, what);
        assert_eq!(self.migrator.run_state(), RunState::Inmigrate, "{what}");
        assert!(!self.runs(), "{what}");
    }

    /// The guest does something.
    pub(crate) fn expect_progress(&self, what: &str) {
        let before = self.vm.self_check().updates;
        until(&format!("{what} goes on"), || {
            assert_eq!(self.vm.failure(), None, "{what}");
            self.vm.self_check().updates > before + 200
        });
    }

    /// The guest runs, runs on, and has lost nothing.
    pub(crate) fn expect_healthy(&self, what: &str) {
        assert!(self.runs(), "{what} runs, and is {:?}", self.migrator.run_state());
        self.expect_progress(what);
        self.migrator.stop().expect("stops");
        let check = self.vm.self_check();
        assert!(check.passed(), "{what}: self-check: {:?}", check.first_error);
        assert!(check.pages_checked > check.updates, "{what}: every page was looked at");
        self.migrator.cont().expect("runs on");
    }
}

/// Moves the guest on to a fresh VM and compares all of RAM, page by page, while it stands still
/// on both sides.
pub(crate) fn expect_movable(from: &Side, config: &Config, what: &str) {
    let to = Side::waiting(config, false);
    let address = to.listen("tcp:127.0.0.1:0");
    from.migrator.migrate(address).expect("nothing is in the way of another migration");
    let info = from.ended(what);
    assert_eq!(info.status, Some(MigrationStatus::Completed), "{what}: {:?}", info.error_desc);
    let info = to.ended(what);
    assert_eq!(info.status, Some(MigrationStatus::Completed), "{what}: {:?}", info.error_desc);
    assert!(!from.runs() && !to.runs());
    expect_same_ram(from, &to, what);
    to.migrator.cont().expect("runs");
    to.expect_healthy(what);
}

/// Every page is the same on both sides.
pub(crate) fn expect_same_ram(one: &Side, other: &Side, what: &str) {
    for (index, block) in one.migrator.vm().ram().blocks() {
        let there = other.migrator.vm().ram().block(index);
        assert_eq!((block.name(), block.len()), (there.name(), there.len()), "{what}");
        let differ: Vec<u64> = (0..block.target_pages())
            .filter(|&page| {
                block.page_digest(TargetPage(page)) != there.page_digest(TargetPage(page))
            })
            .collect();
        assert!(differ.is_empty(), "{what}: pages of {} differ: {differ:?}", block.name());
    }
}

/// What this process has: to be the same before and after. Only for a test that is alone in its
/// process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Held {
    threads: Vec<String>,
    descriptors: Vec<String>,
}

impl Held {
    pub(crate) fn now() -> Held {
        let mut threads: Vec<String> = entries("/proc/self/task")
            .filter_map(|task| fs::read_to_string(task.join("comm")).ok())
            .map(|name| name.trim().to_owned())
            .collect();
        // Its own descriptor for reading the folder is gone when its link is looked at.
        let mut descriptors: Vec<String> = entries("/proc/self/fd")
            .filter_map(|fd| fs::read_link(fd).ok())
            .map(|target| target.display().to_string())
            .filter(|target| !target.starts_with("/proc/"))
            .map(|target| target.split(":[").next().unwrap_or_default().to_owned())
            .collect();
        threads.sort_unstable();
        descriptors.sort_unstable();
        Held { threads, descriptors }
    }

    /// Waits for the last of them to go: a joined thread stays listed for a moment.
    pub(crate) fn expect_again(&self, what: &str) {
        let start = Instant::now();
        while Held::now() != *self {
            let now = Held::now();
            assert!(
                start.elapsed() < Duration::from_secs(5),
                "{what}: left behind: before {self:?}, after {now:?}"
            );
            sleep(Duration::from_millis(1));
        }
    }
}

/// For tests that share a process: one at a time, and when it ends nothing of the engine's is left.
pub(crate) struct Alone {
    before: Vec<String>,
    /// Waits for pages that never come stay watched until the process ends: so many.
    kept: usize,
    _turn: MutexGuard<'static, ()>,
}

impl Alone {
    pub(crate) fn begin() -> Alone {
        static TURN: Mutex<()> = Mutex::new(());
        // A test that failed has said so.
        let turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
        Alone { before: Alone::now(), kept: 0, _turn: turn }
    }

    /// One destination was left with pages missing.
    pub(crate) fn keeps_one(&mut self) {
        self.kept += 1;
    }

    /// And its guest, with one vCPU, waits for one of them: nothing can end that.
    pub(crate) fn keeps_a_guest(&mut self, destination: Side) {
        self.kept += 1;
        self.before.push("vcpu-0".into());
        std::mem::forget(destination.vm);
    }

    /// Threads and descriptors that are the engine's or the VM's.
    fn now() -> Vec<String> {
        let ours = ["source/", "dest/", "vcpu-", "proxy"];
        let threads = entries("/proc/self/task")
            .filter_map(|task| fs::read_to_string(task.join("comm")).ok())
            .map(|name| name.trim().to_owned())
            .filter(|name| ours.iter().any(|ours| name.starts_with(ours)));
        let descriptors = entries("/proc/self/fd")
            .filter_map(|fd| fs::read_link(fd).ok())
            .map(|target| target.display().to_string())
            .filter(|target| target.starts_with("socket:") || target.starts_with("anon_inode:"))
            .map(|target| match target.starts_with("socket:") {
                true => "socket".to_owned(),
                false => target,
            });
        let mut all: Vec<String> = threads.chain(descriptors).collect();
        all.sort_unstable();
        all
    }

    /// Waits for the last of them to go: a joined thread stays listed for a moment.
    pub(crate) fn expect_nothing_left(&self, what: &str) {
        let mut expected = self.before.clone();
        expected.extend((0..self.kept).map(|_| "anon_inode:[userfaultfd]".to_owned()));
        expected.sort_unstable();
        let start = Instant::now();
        while Alone::now() != expected {
            let now = Alone::now();
            assert!(
                start.elapsed() < Duration::from_secs(5),
                "{what}: left behind: expected {expected:?}, found {now:?}"
            );
            sleep(Duration::from_millis(1));
        }
    }
}

fn entries(folder: &str) -> impl Iterator<Item = std::path::PathBuf> {
    fs::read_dir(folder).expect("/proc").filter_map(Result::ok).map(|entry| entry.path())
}
