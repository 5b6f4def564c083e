//! A guest that checks itself is moved back and forth by every road there is, drawn from a seed, and
//! after each migration all is as before: its memory, and what the process has.
//!
//! 20 migrations by default; `WHIMBREL_SOAK` sets another number, `WHIMBREL_SEED` draws the same
//! again. Both sides live in this process, so that whatever either of them leaves behind is here to
//! be seen after the next migration, and after the next hundred.

#[path = "support/pki.rs"]
mod pki;
#[path = "support/vms.rs"]
mod vms;

use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread::sleep;
use std::time::{Duration, Instant};

use pki::{Authority, Who};
use vms::{Dice, Held, LIMIT, Side, accelerators, expect_same_ram, seed, until};
use whimbrel::{
    Capability, MigrationInfo, MigrationStatus, MultifdCompression, Parameters, TlsCredentials,
    TlsEndpoint, ZeroPageDetection,
};
use whimbrel_ram::TargetPage;
use whimbrel_vm::{Config, Fill};

const MEMORY: u64 = 24 << 20;
/// The most that the process's memory may grow from the second quarter of the migrations to the
/// last.
const GROWTH_MAX: u64 = 2 << 20;
/// Has the allocator give back what is freed, as far as it can: otherwise it keeps, for each thread
/// that there once was at the same time, about as much as that had at most.
const ALLOCATOR: [(&str, &str); 3] = [
    ("MALLOC_ARENA_MAX", "1"),
    ("MALLOC_MMAP_THRESHOLD_", "65536"),
    ("MALLOC_TRIM_THRESHOLD_", "65536"),
];

/// When the guest goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum When {
    /// When the rest of its RAM takes less than the downtime limit.
    Last,
    /// Before anything of its RAM has gone.
    First,
    /// When half of its RAM has been sent.
    Halfway,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Multifd {
    channels: u8,
    compression: MultifdCompression,
    level: u8,
    zeros: ZeroPageDetection,
    zero_copy: bool,
}

/// One migration.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Hop {
    when: When,
    preempt: bool,
    multifd: Option<Multifd>,
    return_path: bool,
    xbzrle: bool,
    tls: bool,
    unix: bool,
    /// The guest runs at the destination at once, and faults while its RAM follows.
    autostart: bool,
    /// Bytes a second; 0 is as many as go.
    bandwidth: u64,
    /// Another one goes before it, and is cancelled.
    cancelled: bool,
}

impl Hop {
    const PLAIN: Hop = Hop {
        when: When::Last,
        preempt: false,
        multifd: None,
        return_path: true,
        xbzrle: false,
        tls: false,
        unix: false,
        autostart: true,
        bandwidth: 0,
        cancelled: false,
    };

    fn draw(dice: &mut Dice) -> Hop {
        let mut one_in = |n| dice.below(n) == 0;
        let (preempt, xbzrle, unix, autostart) = (one_in(2), one_in(4), one_in(3), one_in(3));
        let (no_return_path, cancelled, tls) = (one_in(8), one_in(5), one_in(3));
        let when = dice.one_of(&[When::Last, When::Last, When::First, When::Halfway]);
        let multifd = (dice.below(4) > 0).then(|| Multifd::draw(dice));
        Hop {
            when,
            preempt: preempt && when != When::Last,
            xbzrle: xbzrle && multifd.is_none(),
            multifd,
            tls,
            return_path: when != When::Last || !no_return_path,
            unix,
            autostart,
            bandwidth: dice.one_of(&[0, 0, 64 << 20, 256 << 20]),
            cancelled,
        }
    }

    fn capabilities(&self) -> Vec<(Capability, bool)> {
        use Capability as C;
        let possible = !self.unix && !self.tls;
        let zero_copy = possible && self.multifd.is_some_and(|multifd| multifd.zero_copy);
        vec![
            (C::PostcopyRam, self.when != When::Last),
            (C::PostcopyPreempt, self.preempt),
            (C::Multifd, self.multifd.is_some()),
            (C::ZeroCopySend, zero_copy),
            (C::Xbzrle, self.xbzrle),
            (C::ReturnPath, self.return_path),
        ]
    }

    fn set(&self, parameters: &mut Parameters, endpoint: TlsEndpoint) {
        parameters.tls_creds = if self.tls { endpoint.name().into() } else { String::new() };
        parameters.tls_hostname = if self.unix { "localhost".into() } else { String::new() };
        parameters.max_bandwidth = self.bandwidth;
        parameters.max_postcopy_bandwidth = self.bandwidth;
        let Some(multifd) = self.multifd else { return };
        parameters.multifd_channels = multifd.channels;
        parameters.multifd_compression = multifd.compression;
        parameters.multifd_zlib_level = multifd.level;
        parameters.multifd_zstd_level = multifd.level;
        parameters.zero_page_detection = multifd.zeros;
    }
}

impl Multifd {
    fn draw(dice: &mut Dice) -> Multifd {
        use MultifdCompression::{Auto, None, Zlib, Zstd};
        use ZeroPageDetection as Z;
        let compression = dice.one_of(&[None, None, Zlib, Zstd, Auto]);
        Multifd {
            channels: u8::try_from(1 + dice.below(8)).expect("at most 8"),
            compression,
            level: u8::try_from(dice.below(4)).expect("at most 3"),
            zeros: dice.one_of(&[Z::Multifd, Z::Multifd, Z::Legacy, Z::None]),
            zero_copy: compression == None && dice.below(4) == 0,
        }
    }
}

impl fmt::Display for Hop {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", self.when)?;
        let flags = [
            (self.preempt, "preempt"),
            (self.xbzrle, "xbzrle"),
            (!self.return_path, "no return path"),
            (self.tls, "TLS"),
            (self.unix, "unix"),
            (self.autostart, "autostart"),
            (self.cancelled, "after one that is cancelled"),
        ];
        flags.iter().filter(|(on, _)| *on).try_for_each(|(_, name)| write!(f, ", {name}"))?;
        if self.bandwidth > 0 {
            write!(f, ", {} MiB/s", self.bandwidth >> 20)?;
        }
        let Some(Multifd { channels, compression, level, zeros, zero_copy }) = self.multifd else {
            return Ok(());
        };
        let zero_copy = if zero_copy { ", zero-copy" } else { "" };
        write!(f, ", {channels} channels, {compression:?} {level}, zeros {zeros:?}{zero_copy}")
    }
}

#[test]
fn a_guest_that_is_moved_back_and_forth_leaves_nothing_behind() {
    if ALLOCATOR.iter().all(|(name, _)| std::env::var_os(name).is_some()) {
        return soak();
    }
    // An allocator is set up when its process starts; and so it is the only test in it.
    let test = "a_guest_that_is_moved_back_and_forth_leaves_nothing_behind";
    let ended = Command::new(std::env::current_exe().expect("this program"))
        .args(["--exact", test, "--nocapture"])
        .envs(ALLOCATOR)
        .output()
        .expect("it starts");
    eprint!("{}", String::from_utf8_lossy(&ended.stderr));
    assert!(ended.status.success(), "the migrations ended with {}", ended.status);
}

fn soak() {
    let runs: usize = std::env::var("WHIMBREL_SOAK")
        .map_or(20, |text| text.parse().expect("WHIMBREL_SOAK is a number of migrations"));
    let seed = seed("soak");
    let mut dice = Dice(seed);
    let certificates = Authority::new("CA").folder(&Who::localhost());
    let folder = certificates.path();
    let accel = dice.one_of(&accelerators());
    let config = Config {
        accel,
        vcpus: 1 + u32::try_from(dice.below(3)).expect("small"),
        workload: format!("uniform,rate=3000,working-set=6M,seed={}", seed % 1000)
            .parse()
            .expect("a workload"),
        fill: Fill::File(content(folder)),
        ..Config::new(MEMORY)
    };
    // One whose guest came from elsewhere, as all that follow: its migrator keeps how that went.
    let mut here = go(&Hop::PLAIN, &Side::running(&config), &config, folder, "the first");
    here.expect_healthy("the first");
    let held = Held::now();
    let mut memory = Vec::new();
    for run in 1..=runs {
        let begun = Instant::now();
        let hop = Hop::draw(&mut dice);
        let what = format!("seed {seed}, migration {run} ({accel:?}: {hop})");
        if hop.cancelled {
            cancel(&hop, &here, &config, folder, &what);
        }
        let there = go(&hop, &here, &config, folder, &what);
        expect_arrived(&hop, &here, &there, &what);
        here = there;
        here.expect_healthy(&what);
        held.expect_again(&what);
        memory.push(anonymous_memory());
        let (took, memory) = (begun.elapsed(), anonymous_memory() >> 10);
        eprintln!("{what}: well after {took:.1?}, {memory} KiB");
    }
    expect_no_growth(&memory, &format!("seed {seed}"));
}

/// Memory that is random here and compressible there, and nowhere zero: how many pages of zeros
/// are really there depends on the road they took.
fn content(folder: &Path) -> PathBuf {
    let path = folder.join("content");
    let mut dice = Dice(7);
    let mut bytes = Vec::new();
    while bytes.len() < usize::try_from(MEMORY).expect("small") {
        let number = bytes.len() as u64 / 4096;
        let line = format!("page {number} of a guest's memory\n");
        let end = bytes.len() + 4096;
        while bytes.len() < end {
            match number % 2 {
                0 => bytes.extend(dice.roll().to_le_bytes()),
                _ => bytes.extend(line.as_bytes()),
            }
        }
        bytes.truncate(end);
    }
    fs::write(&path, bytes).expect("a file");
    path
}

/// A fresh VM that waits, and the guest on its way to it.
fn begin(hop: &Hop, from: &Side, config: &Config, folder: &Path, what: &str) -> Side {
    let to = Side::waiting(config, hop.autostart);
    for endpoint in [TlsEndpoint::Client, TlsEndpoint::Server] {
        let credentials = TlsCredentials::load(folder, endpoint).expect(what);
        to.migrator.add_object(endpoint.name(), credentials).expect(what);
    }
    for (side, endpoint) in [(from, TlsEndpoint::Client), (&to, TlsEndpoint::Server)] {
        side.migrator.set_capabilities(&hop.capabilities()).expect(what);
        side.migrator.update_parameters(|parameters| hop.set(parameters, endpoint)).expect(what);
    }
    let address = match hop.unix {
        true => to.listen(&format!("unix:{}", folder.join("to").display())),
        false => to.listen("tcp:127.0.0.1:0"),
    };
    from.migrator.migrate(address).expect(what);
    to
}

/// Moves the guest.
fn go(hop: &Hop, from: &Side, config: &Config, folder: &Path, what: &str) -> Side {
    let to = begin(hop, from, config, folder, what);
    if hop.when == When::Halfway {
        until(&format!("{what}: half of it"), || {
            let info = from.migrator.info();
            // It may be there before anybody has looked.
            info.ram.is_some_and(|ram| ram.remaining < MEMORY / 2)
                || !info.status.is_some_and(MigrationStatus::is_running)
        });
    }
    if hop.when != When::Last {
        from.migrator.start_postcopy().expect(what);
    }
    let expect_completed = |info: MigrationInfo, side: &str| {
        let why = info.error_desc;
        assert_eq!(info.status, Some(MigrationStatus::Completed), "{what}: {side}: {why:?}");
    };
    let begun = Instant::now();
    let goes_on = |side: &Side| side.status().is_some_and(MigrationStatus::is_running);
    while goes_on(from) || goes_on(&to) {
        assert!(!(to.vm.running() && from.vm.running()), "{what}: two guests run");
        let infos = || [from, &to].map(|side| side.migrator.info());
        assert!(
            begun.elapsed() < LIMIT,
            "{what}: not within {LIMIT:?}: {:#?}\n{}",
            infos(),
            threads()
        );
        sleep(Duration::from_millis(1));
    }
    expect_completed(from.migrator.wait(), "the source");
    expect_completed(to.migrator.wait(), "the destination");
    to
}

/// Begins to move the guest, and takes it back.
fn cancel(hop: &Hop, from: &Side, config: &Config, folder: &Path, what: &str) {
    // So slow that it is not over before it is cancelled.
    let slow = Hop { bandwidth: 8 << 20, ..*hop };
    let to = begin(&slow, from, config, folder, what);
    until(&format!("{what}: some of it"), || {
        from.migrator.info().ram.is_some_and(|ram| ram.transferred > 1 << 20)
    });
    from.migrator.cancel().expect(what);
    let info = from.migrator.wait();
    assert_eq!(info.status, Some(MigrationStatus::Cancelled), "{what}: {:?}", info.error_desc);
    let info = to.migrator.wait();
    assert_eq!(info.status, Some(MigrationStatus::Failed), "{what}");
    assert!(!to.runs(), "{what}");
    from.expect_healthy(&format!("{what}: cancelled"));
}

/// All of its memory is there.
fn expect_arrived(hop: &Hop, from: &Side, to: &Side, what: &str) {
    assert!(!from.runs(), "{what}");
    if !hop.autostart {
        assert!(!to.runs(), "{what}");
        expect_same_ram(from, to, what);
        return to.migrator.cont().expect(what);
    }
    // The guest has gone on: what it may write differs, and its own check looks through that.
    to.expect_progress(what);
    to.migrator.stop().expect(what);
    let writable = to.vm.writable_pages();
    for (index, block) in from.migrator.vm().ram().blocks() {
        let there = to.migrator.vm().ram().block(index);
        let kept = |page: &u64| {
            let mut writable = writable.iter().filter(|pages| pages.block == block.name());
            !writable.any(|writable| writable.pages.contains(page))
        };
        let differ: Vec<u64> = (0..block.target_pages())
            .filter(kept)
            .filter(|&page| {
                block.page_digest(TargetPage(page)) != there.page_digest(TargetPage(page))
            })
            .collect();
        assert!(differ.is_empty(), "{what}: pages of {} differ: {differ:?}", block.name());
    }
    to.migrator.cont().expect(what);
}

/// What every thread waits for in the kernel.
fn threads() -> String {
    let read = |task: &fs::DirEntry, file| fs::read_to_string(task.path().join(file));
    let tasks = fs::read_dir("/proc/self/task").expect("/proc").filter_map(Result::ok);
    let line = |task: fs::DirEntry| {
        let name = read(&task, "comm").unwrap_or_default();
        // Readable by root only.
        let stack = read(&task, "stack").or_else(|_| read(&task, "wchan")).unwrap_or_default();
        let places: Vec<&str> = stack.lines().take(4).map(str::trim).collect();
        format!("{}: {}\n", name.trim(), places.join(" < "))
    };
    tasks.map(line).collect()
}

/// Memory of this process that is no file's, in bytes.
fn anonymous_memory() -> u64 {
    let status = fs::read_to_string("/proc/self/status").expect("/proc");
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:"));
    let kib = line.and_then(|line| line.trim().strip_suffix(" kB")).expect("RssAnon in kB");
    kib.parse::<u64>().expect("a number") << 10
}

fn expect_no_growth(memory: &[u64], what: &str) {
    let quarter = memory.len() / 4;
    let median = |part: &[u64]| {
        let mut part = part.to_vec();
        part.sort_unstable();
        part.get(part.len() / 2).copied().unwrap_or_default()
    };
    // The first quarter is for what is made once.
    let (early, late) =
        (median(&memory[quarter..2 * quarter]), median(&memory[memory.len() - quarter..]));
    eprintln!("{what}: {} KiB early, {} KiB late", early >> 10, late >> 10);
    assert!(late <= early + GROWTH_MAX, "{what}: memory grew from {early} to {late} bytes");
}
