//! A VM of 8 MiB without vCPUs, and what has to be true of the engine behind every run.

use std::fs;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use whimbrel::{DeviceState, LoadRule, Loaders, Vm, VmError};
use whimbrel_ram::dirty::{DirtyLog, OwnWrites};
use whimbrel_ram::{GuestRam, RamBlock};

use crate::telling::{BLOCKS, DEVICE, MACHINE};

const PAGE: u64 = 4096;

/// The VM. Its one device is a list of pages to be touched: in loading it those before the first
/// zero, and by the guest, as soon as it runs, those behind.
pub(crate) struct FuzzVm {
    ram: GuestRam,
    log: OwnWrites,
    uuid: Option<[u8; 16]>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    loaded: u32,
    resumed: u32,
    paused: u32,
    running: bool,
    to_touch: Vec<u8>,
    guest: Option<JoinHandle<()>>,
}

/// How often each was done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Done {
    pub(crate) loaded: u32,
    pub(crate) resumed: u32,
    pub(crate) paused: u32,
    pub(crate) running: bool,
}

impl FuzzVm {
    pub(crate) fn new(uuid: Option<[u8; 16]>) -> Arc<FuzzVm> {
        let blocks = BLOCKS.map(|(name, pages)| {
            RamBlock::anonymous(name, 0, pages * PAGE).expect("8 MiB of memory")
        });
        let ram = GuestRam::new(blocks.into());
        Arc::new(FuzzVm { log: OwnWrites::new(&ram), ram, uuid, state: Mutex::default() })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn done(&self) -> Done {
        let State { loaded, resumed, paused, running, .. } = *self.state();
        Done { loaded, resumed, paused, running }
    }

    /// The guest writes `count` pages.
    pub(crate) fn write(&self, first: u16, count: u8, fill: u8) {
        let (index, block) = self.ram.blocks().next().expect("it has RAM");
        for page in 0..u64::from(count) {
            let offset = (u64::from(first) + page) % block.target_pages() * PAGE;
            block.write(offset, &[fill; 64]).expect("inside");
            self.log.note(index, offset, 64);
        }
    }

    /// Waits for the end of its guest: nothing watches its RAM any more.
    pub(crate) fn end(&self) {
        let guest = self.state().guest.take();
        if let Some(guest) = guest {
            guest.join().expect("it only reads");
        }
    }
}

/// Reads a word of each of these pages.
fn touch(ram: &GuestRam, pages: &[u8]) {
    let (_, block) = ram.blocks().next().expect("it has RAM");
    for page in pages {
        block.load_u64(u64::from(*page) * PAGE).expect("inside");
    }
}

impl Vm for FuzzVm {
    fn machine(&self) -> String {
        MACHINE.into()
    }

    fn uuid(&self) -> Option<[u8; 16]> {
        self.uuid
    }

    fn ram(&self) -> &GuestRam {
        &self.ram
    }

    fn ram_is_fresh(&self) -> bool {
        true
    }

    fn dirty_log(&self) -> &dyn DirtyLog {
        &self.log
    }

    fn pause(&self) -> Result<(), VmError> {
        let mut state = self.state();
        (state.paused, state.running) = (state.paused + 1, false);
        Ok(())
    }

    fn resume(&self) -> Result<(), VmError> {
        let mut state = self.state();
        assert!(!state.running, "a guest that runs is not run again");
        (state.resumed, state.running) = (state.resumed + 1, true);
        let pages = std::mem::take(&mut state.to_touch);
        if !pages.is_empty() {
            let ram = self.ram.clone();
            let guest = thread::Builder::new().name("guest".into());
            state.guest = Some(guest.spawn(move || touch(&ram, &pages)).map_err(VmError::new)?);
        }
        Ok(())
    }

    fn save(&self) -> Result<Vec<DeviceState>, VmError> {
        let device = |name: &str, bytes: &[u8]| DeviceState {
            name: name.into(),
            instance_id: 0,
            version_id: 1,
            bytes: bytes.into(),
        };
        Ok(vec![device(DEVICE, &[0, 1]), device("other", &[])])
    }

    fn load(&self, devices: Vec<DeviceState>) -> Result<(), VmError> {
        self.load_with(Loaders::one(), devices)
    }

    fn load_with(&self, loaders: Loaders, devices: Vec<DeviceState>) -> Result<(), VmError> {
        let mut state = self.state();
        assert_eq!(state.loaded, 0, "the devices are loaded once");
        assert_eq!(state.resumed, 0, "and before the guest runs");
        state.loaded += 1;
        drop(state);
        let rule = |device: &DeviceState| match device.name.as_str() {
            "cpu" => LoadRule::beside_others(),
            "x" => LoadRule::beside_others().after("cpu"),
            _ => LoadRule::alone(),
        };
        loaders.load(devices, rule, |device| {
            if device.version_id > 1 {
                return Err(VmError::new("it is of a version to come"));
            }
            let mut parts = device.bytes.splitn(2, |byte| *byte == 0);
            touch(&self.ram, parts.next().unwrap_or_default());
            self.state().to_touch.extend(parts.next().unwrap_or_default());
            Ok(())
        })
    }
}

/// A run of a target with threads and sockets, which is alone in its process: when it ends, nothing
/// of it is left.
pub(crate) struct Alone {
    before: Vec<String>,
    _turn: MutexGuard<'static, ()>,
}

/// How long a thread that was joined may stay listed, on a machine with more to do.
const GOES_WITHIN: Duration = Duration::from_secs(20);

impl Alone {
    pub(crate) fn begin() -> Alone {
        static TURN: Mutex<()> = Mutex::new(());
        // A run that failed has said so.
        let turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
        Alone { before: now(), _turn: turn }
    }

    /// Waits for the last of it to go: a thread that was joined stays listed for a moment.
    pub(crate) fn expect_nothing_left(&self) {
        let start = Instant::now();
        loop {
            // What was just going when this run began may have gone meanwhile.
            let mut left = now();
            for there in &self.before {
                if let Some(at) = left.iter().position(|other| other == there) {
                    left.swap_remove(at);
                }
            }
            if left.is_empty() {
                return;
            }
            assert!(start.elapsed() < GOES_WITHIN, "left behind: {left:?}");
            thread::yield_now();
        }
    }
}

/// Threads and descriptors of the engine.
fn now() -> Vec<String> {
    let ours = ["source/", "dest/", "guest"];
    let threads = entries("/proc/self/task")
        .filter_map(|task| fs::read_to_string(task.join("comm")).ok())
        .filter(|name| ours.iter().any(|ours| name.starts_with(ours)));
    let ours = ["socket:", "anon_inode:[userfaultfd]", "anon_inode:[eventfd]"];
    let descriptors = entries("/proc/self/fd")
        .filter_map(|fd| fs::read_link(fd).ok()?.into_os_string().into_string().ok())
        .filter_map(|to| ours.iter().find(|kind| to.starts_with(*kind)).map(|&k| k.to_owned()));
    let mut all: Vec<String> = threads.chain(descriptors).collect();
    all.sort_unstable();
    all
}

fn entries(folder: &str) -> impl Iterator<Item = PathBuf> {
    fs::read_dir(folder).expect("/proc").filter_map(Result::ok).map(|entry| entry.path())
}

/// A path for this run, in a folder of this process.
pub(crate) fn scratch(name: &str) -> PathBuf {
    static FOLDER: OnceLock<tempfile::TempDir> = OnceLock::new();
    static NUMBER: AtomicU64 = AtomicU64::new(0);
    let folder = FOLDER.get_or_init(|| {
        let mut builder = tempfile::Builder::new();
        builder.prefix("whimbrel-fuzz-");
        // In memory, where there is such a place: what is kept is synced.
        let folder = builder.tempdir_in("/dev/shm").or_else(|_| builder.tempdir());
        folder.expect("a folder")
    });
    let number = NUMBER.fetch_add(1, Ordering::Relaxed);
    folder.path().join(format!("{name}-{number}"))
}

/// What an error says is one line, and is something.
pub(crate) fn expect_one_line(text: &str) {
    assert!(!text.is_empty() && !text.contains('\n'), "an error in one line: {text:?}");
}
