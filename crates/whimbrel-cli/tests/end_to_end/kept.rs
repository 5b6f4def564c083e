//! A VM goes into a file and comes out again.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::Value;
use whimbrel_wire::{Decoded, MainDecoder, MainOptions, RamRecord};

use crate::process::{Running, SMALL, VmProcess, folder, run, until, verify_moved, whimbrel};

/// Writes a golden stream of QEMU's, unpacked, into `folder`.
pub(crate) fn golden(name: &str, folder: &Path) -> PathBuf {
    let packed = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../whimbrel-wire/tests/golden")
        .join(format!("{name}.zst"));
    let packed = fs::File::open(&packed).expect("a golden stream");
    let path = folder.join(name);
    let bytes = zstd::decode_all(packed).expect("packed with zstd");
    fs::write(&path, bytes).expect("room for it");
    path
}

pub(crate) fn uri(path: &Path) -> String {
    format!("file:{}", path.display())
}

pub(crate) fn names(folder: &Path) -> Vec<String> {
    let entries = folder.read_dir().expect("ours").flatten();
    let mut names: Vec<_> =
        entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
    names.sort_unstable();
    names
}

#[test]
fn a_running_guest_is_kept_and_brought_back() {
    let folder = folder();
    let store = folder.path().join("kept");
    let socket = folder.path().join("socket");
    let at = format!("unix:{}", socket.display());
    let receive =
        Running::start(&["receive", &at, "--json", &format!("--store={}", store.display())]);
    assert_eq!(receive.waits_at(), at);
    let mut from = VmProcess::source(&SMALL);
    from.switch_on(&["return-path"]);
    from.qmp.migrate(&at).expect("it starts");
    from.reaches("completed", "into receive");
    let told = receive.ended("receive").expect_success("receive");
    let told: Value = serde_json::from_str(&told).expect("JSON");
    assert_eq!(told["status"], "completed", "{told}");
    assert_eq!(names(folder.path()), ["kept"]);

    // Twice, and by both ways out: what is kept stays kept.
    for way in ["unix", "tcp"] {
        let mut to = VmProcess::destination(&SMALL);
        let address = match way {
            "unix" => to.listen(&at),
            _ => to.listen("tcp:127.0.0.1:0"),
        };
        let store = store.display().to_string();
        let report = whimbrel(&["restore", &store, &address, "--json"]).expect_success("restore");
        let report: Value = serde_json::from_str(&report).expect("JSON");
        assert_eq!(report["status"], "completed", "{report}");
        to.reaches("completed", "restore");
        verify_moved(&mut from, &mut to, &format!("restored over {way}"));
        to.quit("restored");
    }
}

/// Everything that a stream says: pages by block and offset, and the devices' bytes.
#[derive(Debug, Default, PartialEq)]
pub(crate) struct Content {
    machine: String,
    blocks: Vec<(String, u64)>,
    /// Block, offset and content of every page that is not zero, in the end.
    pub(crate) pages: std::collections::BTreeMap<(usize, u64), Vec<u8>>,
    pub(crate) devices: Vec<(String, u32, Vec<u8>)>,
}

pub(crate) fn content(path: &Path) -> Content {
    let bytes = fs::read(path).expect("a stream");
    let mut decoder = MainDecoder::new(MainOptions::default());
    let mut content = Content::default();
    let mut at = 0;
    while at < bytes.len() {
        let (used, decoded) = decoder.decode(&bytes[at..]).expect("a good stream");
        at += used;
        match decoded {
            Decoded::NeedMore(_) if used == 0 => panic!("the stream is truncated at {at}"),
            Decoded::Configuration(configuration) => {
                content.machine = configuration.machine.to_string();
            }
            Decoded::RamSetup(blocks) => {
                content.blocks = blocks
                    .iter()
                    .map(|(_, info)| (info.name.to_string(), info.used_length))
                    .collect();
            }
            Decoded::Ram(RamRecord::Zero { block, offset }) => {
                content.pages.remove(&(block.get(), offset.0));
            }
            Decoded::Ram(RamRecord::PageFollows { block, offset, .. }) => {
                let page = bytes[at..at + 4096].to_vec();
                at += 4096;
                decoder.payload_taken(4096);
                match page.iter().all(|&byte| byte == 0) {
                    true => content.pages.remove(&(block.get(), offset.0)),
                    false => content.pages.insert((block.get(), offset.0), page),
                };
            }
            Decoded::DeviceState(state) => {
                for section in &state.sections {
                    let header = &section.header;
                    let mut bytes = Vec::new();
                    section.encode(&mut bytes);
                    content.devices.push((header.name.to_string(), header.instance_id, bytes));
                }
            }
            _ => {}
        }
    }
    assert!(!content.blocks.is_empty() && !content.devices.is_empty(), "a whole migration");
    content
}

#[test]
fn qemus_streams_come_out_as_they_went_in() {
    for name in ["precopy-7.2.22.stream", "precopy-10.0.2.stream", "precopy-11.1.3.stream"] {
        let folder = folder();
        let stream = golden(name, folder.path());
        let store = folder.path().join("kept").display().to_string();
        whimbrel(&["receive", &uri(&stream), "--store", &store]).expect_success(name);
        let again = folder.path().join("again");
        whimbrel(&["restore", &store, &uri(&again)]).expect_success(name);
        let (before, after) = (content(&stream), content(&again));
        assert_eq!(before.machine, after.machine, "{name}");
        assert_eq!(before.blocks, after.blocks, "{name}");
        assert!(before.pages == after.pages, "{name}: RAM differs");
        assert!(before.pages.len() > 8, "{name}: the guest had written to its memory");
        assert_eq!(before.devices, after.devices, "{name}");
        assert_eq!(names(folder.path()), ["again", "kept", name]);
    }
}

#[test]
fn a_disk_that_is_full_costs_nothing() {
    let folder = folder();
    let small = folder.path().join("small");
    fs::create_dir(&small).expect("ours");
    let mut mount = std::process::Command::new("mount");
    mount.args(["-t", "tmpfs", "-o", "size=4m", "tmpfs"]).arg(&small);
    let mounted = run(mount);
    if !mounted.status.success() {
        return eprintln!("not run with a full disk: {}", mounted.err.trim());
    }
    let _unmount = Unmount(small.clone());
    let socket = folder.path().join("socket");
    let at = format!("unix:{}", socket.display());
    let store = small.join("kept").display().to_string();
    let receive = Running::start(&["receive", &at, "--store", &store]);
    receive.waits_at();
    let mut vm = VmProcess::source(&SMALL);
    vm.switch_on(&["return-path"]);
    vm.qmp.migrate(&at).expect("it starts");
    let what = "a store that is full";
    receive.ended(what).expect_line(what, &[&store, "No space left on device"]);
    until(what, || vm.status() == "failed");
    vm.expect_healthy(what);
    assert_eq!(names(&small), [""; 0], "half-written");

    vm.qmp.set_capability_named("return-path", false).expect("allowed");
    vm.qmp.migrate(&format!("file:{store}")).expect("it starts");
    let what = "a stream into a disk that is full";
    until(what, || vm.status() == "failed");
    let report = vm.qmp.query_migrate().expect("a report").raw;
    let text = report["error-desc"].as_str().unwrap_or_default();
    assert!(text.contains("No space left on device"), "{report}");
    vm.expect_healthy(what);
    assert_eq!(names(&small), [""; 0], "half-written");
}

/// Unmounts at the end of the test, however it ends.
pub(crate) struct Unmount(pub(crate) PathBuf);

impl Drop for Unmount {
    fn drop(&mut self) {
        let mut umount = std::process::Command::new("umount");
        umount.arg("-l").arg(&self.0);
        assert!(run(umount).status.success() || std::thread::panicking(), "unmounts");
    }
}

#[test]
fn a_store_that_cannot_be_written_costs_nothing() {
    let folder = folder();
    let missing = folder.path().join("missing/kept").display().to_string();
    let socket = folder.path().join("socket");
    let at = format!("unix:{}", socket.display());
    let mut vm = VmProcess::source(&SMALL);
    vm.switch_on(&["return-path"]);
    let receive = Running::start(&["receive", &at, "--store", &missing]);
    receive.waits_at();
    vm.qmp.migrate(&at).expect("it starts");
    let what = "a store in a folder that is not there";
    receive.ended(what).expect_line(what, &[&missing, "No such file or directory"]);
    until(what, || vm.status() == "failed");
    vm.expect_healthy(what);
    assert_eq!(names(folder.path()), [""; 0]);
}
