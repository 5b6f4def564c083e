//! Kept VMs written and read by several threads, past the page cache and through it.

use std::collections::BTreeMap;
use std::fs::{self, OpenOptions};
use std::io::Read;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use whimbrel_wire::{Decoded, MainDecoder, MainOptions, page_bitmap};

use crate::kept::{Unmount, content, golden, names, uri};
use crate::process::{Running, SMALL, VmProcess, folder, run, until, verify_moved, whimbrel};

/// More than one chunk for each thread, and nothing that packs or is zero.
const LARGER: [&str; 4] = [
    "--accel=native",
    "--memory=96M",
    "--workload=uniform,rate=2000,working-set=1M",
    "--fill=random",
];

/// Ways to write and read a file, without those that this file system has not.
fn ways(folder: &Path) -> Vec<Vec<&'static str>> {
    let mut ways = vec![vec!["--threads=1", "--direct-io=off"], vec!["--threads=4"]];
    match takes_direct_io(folder) {
        true => ways.push(vec!["--threads=3", "--direct-io"]),
        false => println!("not with direct I/O: this file system has none"),
    }
    ways
}

fn takes_direct_io(folder: &Path) -> bool {
    let probe = folder.join("probe");
    let mut dd = Command::new("dd");
    dd.args(["if=/dev/zero", "bs=4096", "count=16", "oflag=direct"]);
    dd.arg(format!("of={}", probe.display()));
    let took = run(dd).status.success();
    // It may not have been made.
    let _ = fs::remove_file(probe);
    took
}

/// Starts `whimbrel receive` into `store`; gives where it waits, too.
fn receive(folder: &Path, store: &Path, way: &[&str]) -> (Running, String) {
    let at = format!("unix:{}", folder.join("socket").display());
    let store = store.display().to_string();
    let receive = Running::start(&[&["receive", &at, "--store", &store], way].concat());
    receive.waits_at();
    (receive, at)
}

#[test]
fn every_way_in_fits_every_way_out() {
    let folder = folder();
    let store = folder.path().join("kept");
    for way_in in ways(folder.path()) {
        let channels = if way_in.contains(&"--threads=4") { "3" } else { "0" };
        let multifd: &[&str] = &["--multifd", channels];
        let way_in = [way_in, if channels == "0" { vec![] } else { multifd.to_vec() }].concat();
        let mut from = VmProcess::source(&LARGER);
        from.switch_on(&["return-path"]);
        if channels != "0" {
            from.switch_on(&["multifd"]);
            let channels = serde_json::json!({ "multifd-channels": 3 });
            from.qmp.set_parameters(channels).expect("allowed");
        }
        let (receiver, at) = receive(folder.path(), &store, &way_in);
        from.qmp.migrate(&at).expect("it starts");
        from.reaches("completed", "into receive");
        receiver.ended("receive").expect_success("receive");
        assert_eq!(names(folder.path()), ["kept"]);

        let store = store.display().to_string();
        for way_out in ways(folder.path()) {
            let what = format!("in by {way_in:?}, out by {way_out:?}");
            let mut to = VmProcess::destination(&LARGER);
            let address = to.listen(&at);
            let restore = [&["restore", &store, &address], &way_out[..]].concat();
            whimbrel(&restore).expect_success(&what);
            to.reaches("completed", &what);
            verify_moved(&mut from, &mut to, &what);
            to.quit(&what);
        }
    }
}

/// What a kept VM's file says of its pages, without any of the code that is under test.
fn pages_in(path: &Path) -> BTreeMap<(usize, u64), Vec<u8>> {
    let bytes = fs::read(path).expect("a file");
    let mut decoder = MainDecoder::new(MainOptions::default());
    let (mut at, mut pages, mut blocks) = (0, BTreeMap::new(), None);
    while blocks.is_none() {
        let (used, decoded) = decoder.decode(&bytes[at..]).expect("a good file");
        at += used;
        match decoded {
            Decoded::NeedMore(_) => panic!("the file is truncated at {at}"),
            Decoded::MappedBlock { skip, .. } => {
                at += usize::try_from(skip).expect("inside");
                decoder.payload_taken(skip);
            }
            Decoded::RamSetup(list) => blocks = Some(list),
            _ => {}
        }
    }
    for (index, info) in blocks.expect("just seen").iter() {
        let header = info.mapped_ram.expect("a mapped-ram file");
        let place = |at: u64| usize::try_from(at).expect("inside");
        let bitmap = &bytes[place(header.bitmap_offset)..];
        for page in (0..info.used_length / 4096).filter(|&page| page_bitmap::is_set(bitmap, page)) {
            let from = place(header.pages_offset + page * 4096);
            let content = bytes[from..from + 4096].to_vec();
            if content.iter().any(|&byte| byte != 0) {
                pages.insert((index.get(), page * 4096), content);
            }
        }
    }
    pages
}

#[test]
fn every_golden_file_comes_out_in_every_way() {
    for name in
        ["mapped-ram-10.0.2.file", "mapped-ram-11.1.3.file", "mapped-ram-multifd-11.1.3.file"]
    {
        let folder = folder();
        let file = golden(name, folder.path());
        let expected = pages_in(&file);
        assert!(expected.len() > 8, "{name}: the guest had written to its memory");
        for way in ways(folder.path()) {
            let stream = folder.path().join("stream");
            let (file, to) = (file.display().to_string(), uri(&stream));
            whimbrel(&[&["restore", &file, &to], &way[..]].concat()).expect_success(name);
            let content = content(&stream);
            assert!(content.pages == expected, "{name} by {way:?}: RAM differs");
            assert!(!content.devices.is_empty(), "{name} by {way:?}");
            // And back into a file of the same kind.
            let again = folder.path().join("again");
            let store = again.display().to_string();
            whimbrel(&[&["receive", &to, "--store", &store], &way[..]].concat())
                .expect_success(name);
            assert!(pages_in(&again) == expected, "{name} by {way:?}: RAM differs when kept");
        }
    }
}

#[test]
fn a_disk_that_fills_up_past_the_page_cache_costs_nothing() {
    let folder = folder();
    let (image, small) = (folder.path().join("image"), folder.path().join("small"));
    fs::create_dir(&small).expect("ours");
    let file = fs::File::create(&image).expect("ours");
    file.set_len(40 << 20).expect("room");
    let mut mkfs = Command::new("mkfs.ext4");
    mkfs.arg("-q").arg(&image);
    let mut mount = Command::new("mount");
    mount.args(["-o", "loop"]).arg(&image).arg(&small);
    if fs::metadata("/sbin/mkfs.ext4").is_err() || !run(mkfs).status.success() {
        return println!("not run with a full disk: no file system can be made");
    }
    let mounted = run(mount);
    if !mounted.status.success() {
        return println!("not run with a full disk: {}", mounted.err.trim());
    }
    let _unmount = Unmount(small.clone());
    fill_up(&small, takes_direct_io(&small));
}

/// The same where only a file system in memory can be made.
#[test]
fn a_file_system_that_fills_up_costs_nothing() {
    let folder = folder();
    let small = folder.path().join("small");
    fs::create_dir(&small).expect("ours");
    let mut mount = Command::new("mount");
    mount.args(["-t", "tmpfs", "-o", "size=20m", "tmpfs"]).arg(&small);
    let mounted = run(mount);
    if !mounted.status.success() {
        return println!("not run with a full disk: {}", mounted.err.trim());
    }
    let _unmount = Unmount(small.clone());
    fill_up(&small, false);
}

fn fill_up(small: &Path, direct: bool) {
    let before = names(small);
    let folder = folder();
    let mut vm = VmProcess::source(&LARGER);
    vm.switch_on(&["return-path"]);
    let mut ways = vec![vec!["--threads=4"], vec!["--threads=2", "--direct-io=off"]];
    if direct {
        ways.push(vec!["--threads=3", "--direct-io"]);
    }
    for way in ways {
        let what = format!("a full disk, by {way:?}");
        let store: PathBuf = small.join("kept");
        let (receiver, at) = receive(folder.path(), &store, &way);
        vm.qmp.migrate(&at).expect("it starts");
        let texts = [&store.display().to_string()[..], "No space left on device"];
        receiver.ended(&what).expect_line(&what, &texts);
        until(&what, || vm.status() == "failed");
        vm.expect_healthy(&what);
        assert_eq!(names(small), before, "{what}: half-written");
    }
}

#[test]
fn ended_while_it_writes_nothing_is_left() {
    let folder = folder();
    let store = folder.path().join("kept");
    let mut vm = VmProcess::source(&LARGER);
    vm.switch_on(&["return-path"]);
    for rate in [4 << 20, 64 << 20] {
        let what = format!("ended at {rate} bytes a second");
        let (receiver, at) = receive(folder.path(), &store, &["--threads=4"]);
        let slow = serde_json::json!({ "max-bandwidth": rate });
        vm.qmp.set_parameters(slow).expect("allowed");
        vm.qmp.migrate(&at).expect("it starts");
        until(&what, || names(folder.path()).iter().any(|name| name.starts_with("kept.partial-")));
        std::thread::sleep(Duration::from_millis(200));
        let mut kill = Command::new("kill");
        kill.args(["-INT", &receiver.id().to_string()]);
        run(kill).expect_success("kill");
        receiver.ended(&what).expect_line(&what, &["cancelled"]);
        until(&what, || vm.status() == "failed");
        vm.expect_healthy(&what);
        assert_eq!(names(folder.path()), [""; 0], "{what}: half-written");
    }
}

#[test]
fn a_file_that_is_cut_off_while_it_is_sent_is_one_line() {
    let folder = folder();
    let store = folder.path().join("kept");
    let mut vm = VmProcess::source(&LARGER);
    let stream = format!("file:{}", folder.path().join("stream").display());
    vm.qmp.migrate(&stream).expect("it starts");
    vm.reaches("completed", "into a file");
    let kept = store.display().to_string();
    whimbrel(&["receive", &stream, "--store", &kept]).expect_success("receive");

    let socket = folder.path().join("socket");
    let listener = UnixListener::bind(&socket).expect("a socket");
    let at = format!("unix:{}", socket.display());
    // Mapped, and looked at by nobody but the kernel: the one that a signal could end.
    let restore = Running::start(&["restore", &kept, &at, "--direct-io=off"]);
    let (mut taken, _) = listener.accept().expect("it connects");
    let mut first = vec![0; 1 << 20];
    taken.read_exact(&mut first).expect("pages");
    OpenOptions::new().write(true).open(&store).expect("ours").set_len(8 << 20).expect("ours");
    let mut rest = Vec::new();
    // It ends in an error of ours, by which the connection may break.
    let _ = taken.read_to_end(&mut rest);
    assert!(rest.len() < 64 << 20, "{} bytes of a file that had 8 MiB", rest.len());
    let what = "a file that is cut off";
    restore.ended(what).expect_line(what, &[&kept, "it has become shorter while it was read"]);
}

#[test]
fn what_cannot_be_is_refused_with_one_line() {
    let folder = folder();
    let file = golden("mapped-ram-10.0.2.file", folder.path()).display().to_string();
    let at = format!("unix:{}", folder.path().join("nobody").display());
    let what = "postcopy past the page cache";
    let postcopy = ["restore", &file, &at, "--postcopy", "--direct-io"];
    whimbrel(&postcopy).expect_line(what, &["--direct-io", "postcopy"]);
    for bad in [["--threads", "0"], ["--threads", "256"], ["--threads", "x"]] {
        let ended = whimbrel(&[&["restore", &file, &at], &bad[..]].concat());
        assert_eq!(ended.status.code(), Some(2), "{bad:?}: {ended:?}");
    }
    // Nor can a file be made everywhere.
    let store = "/proc/self/whimbrel-kept";
    let at = format!("unix:{}", folder.path().join("socket").display());
    let mut vm = VmProcess::source(&SMALL);
    vm.switch_on(&["return-path"]);
    let receive = Running::start(&["receive", &at, "--store", store, "--direct-io"]);
    receive.waits_at();
    vm.qmp.migrate(&at).expect("it starts");
    let what = "a file system that takes no files";
    receive.ended(what).expect_line(what, &[store, "cannot be created"]);
    until(what, || vm.status() == "failed");
    vm.expect_healthy(what);
}
