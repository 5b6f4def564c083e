//! Whatever is wrong: one clear line, a status other than 0, the source's guest running, and
//! nothing half-written. `WHIMBREL_SEED` replays the random damage.

use std::fs;
use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::Command;

use crate::kept::{golden, names, uri};
use crate::process::{Running, SMALL, VmProcess, WHIMBREL, folder, run, until, whimbrel};
use crate::stream::{Stream, TINY, What};

/// Has a VM take `bytes` in; it is to end with one line that holds `texts`.
fn refused(what: &str, bytes: &[u8], texts: &[&str]) {
    let folder = folder();
    let path = folder.path().join("stream");
    fs::write(&path, bytes).expect("room");
    let incoming = format!("--incoming={}", uri(&path));
    let vm = [&["vm", "--serial=none"][..], &TINY, &[&incoming]].concat();
    whimbrel(&vm).expect_line(what, &[&["incoming migration: "], texts].concat());
    assert_eq!(names(folder.path()), ["stream"], "{what}");
}

#[test]
fn truncated_anywhere() {
    let stream = Stream::record();
    for what in [
        What::Header,
        What::Configuration,
        What::RamStart,
        What::BlockList,
        What::Page,
        What::Zero,
        What::RamEnd,
        What::Footer,
        What::Device,
        What::Eof,
    ] {
        let at = stream.first(what);
        for cut in [at.start, at.start.midpoint(at.end)] {
            // At the place where it was cut, or where what is incomplete begins.
            let line = ["main channel, byte ", "expected"];
            refused(&format!("cut at {cut}, {what:?}"), &stream.bytes[..cut], &line);
        }
    }
    let last_device = stream.all(What::Device).last().expect("devices").end;
    let place = format!("byte {last_device}");
    refused("cut before the end mark", &stream.bytes[..last_device], &[&place]);
}

#[test]
fn corrupted_in_every_word() {
    let stream = Stream::record();
    let at = |what| stream.first(what).start;
    // A record word: the page's offset, and flags in its low bits; then the block's name.
    let page = at(What::Page);
    let start = at(What::RamStart);
    let name_length = 6 + usize::from(stream.bytes[at(What::Device) + 5]);
    let cases: [(&str, usize, &[u8], &[&str]); 13] = [
        ("magic", 0, b"nope", &["byte 0", "magic"]),
        ("file version", 4, &[0, 0, 0, 9], &["byte 4", "version", "9"]),
        ("unknown section type", at(What::RamPart), &[0x33], &["0x33"]),
        ("PART of an unknown section", at(What::RamPart) + 1, &[1, 2, 3, 4], &["section"]),
        ("unknown section name", start + 6, b"rum", &["rum"]),
        ("newer version of ram", start + 1 + 4 + 1 + 3 + 4, &[0, 0, 0, 5], &["version", "5"]),
        ("footer", at(What::Footer), &[0x7d], &["footer"]),
        ("footer of another section", at(What::Footer) + 1, &[9; 4], &["footer"]),
        ("unknown command", at(What::RamPart), &[0x08, 0, 0x77, 0, 0], &["command", "119"]),
        ("unknown flag of a record", page + 6, &[0xff, 0xff], &["record"]),
        ("page outside its block", page, &[0, 0, 0, 0x7f], &["inside RAM block"]),
        ("unknown block in a record", page + 9, b"XX", &["XX"]),
        (
            "newer version of a device",
            at(What::Device) + name_length + 4,
            &[0, 0, 0, 99],
            &["99", "version"],
        ),
    ];
    for (what, at, bytes, texts) in cases {
        refused(what, &stream.over(at, bytes), texts);
    }
    refused("nothing at all", b"", &["byte 0"]);
    refused("a text", &b"#!/bin/sh\nexit 0\n".repeat(100), &["byte 0", "magic"]);
}

#[test]
fn reordered() {
    let stream = Stream::record();
    let bytes = &stream.bytes;
    let setup = stream.first(What::RamStart).start;
    let first_part = stream.first(What::RamPart).start;
    let part = first_part..stream.first(What::RamEnd).start;
    let device = stream.first(What::Device);
    let last = stream.all(What::Device).last().expect("devices");
    let end = stream.first(What::RamEnd).start..device.start;
    let glue = |pieces: &[&[u8]]| pieces.concat();
    refused(
        "pages before their section starts",
        &glue(&[&bytes[..setup], &bytes[part.clone()], &bytes[setup..]]),
        &["main channel"],
    );
    refused(
        "devices before RAM",
        &glue(&[&bytes[..setup], &bytes[device.clone()], &bytes[device.end..]]),
        &["main channel"],
    );
    refused(
        "the section starts twice",
        &glue(&[&bytes[..first_part], &bytes[setup..first_part], &bytes[first_part..]]),
        &["main channel"],
    );
    refused(
        "a PART after the END",
        &glue(&[&bytes[..end.end], &bytes[part], &bytes[end.end..]]),
        &["main channel"],
    );
    refused("no RAM at all", &glue(&[&bytes[..setup], &bytes[device.start..]]), &["main channel"]);
    refused(
        "the header again",
        &glue(&[&bytes[..setup], &bytes[..setup], &bytes[setup..]]),
        &["main channel"],
    );
    refused(
        "a device twice",
        &glue(&[&bytes[..device.end], &bytes[device.clone()], &bytes[device.end..]]),
        &["another section has"],
    );
    refused(
        "a device missing",
        &glue(&[&bytes[..last.start], &bytes[last.end..]]),
        &["loading the devices"],
    );
}

#[test]
fn random_damage_is_kept_whole_or_refused_with_one_line() {
    let mut seed = match std::env::var("WHIMBREL_SEED") {
        Ok(text) => text.parse().expect("WHIMBREL_SEED is a number"),
        Err(_) => u64::from(std::process::id()),
    };
    eprintln!("random_damage: replay with WHIMBREL_SEED={seed}");
    let mut roll = |end: usize| {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        usize::try_from(seed >> 33).expect("31 bits") % end
    };
    let folder = folder();
    let streams = [
        Stream::record().bytes,
        fs::read(golden("precopy-10.0.2.stream", folder.path())).expect("just written"),
    ];
    let (damaged, store) = (folder.path().join("damaged"), folder.path().join("store"));
    let before = names(folder.path());
    for run in 0..40 {
        let mut bytes = streams[run % 2].clone();
        for _ in 0..=roll(3) {
            let at = match roll(3) {
                0 => roll(600),
                1 => bytes.len() - 1 - roll(4000),
                _ => roll(bytes.len()),
            };
            match roll(4) {
                0 => bytes.truncate(at),
                1 => drop(bytes.splice(at..(at + 1 + roll(9)).min(bytes.len()), [])),
                2 => bytes.insert(at, 0xff),
                _ => bytes[at] ^= 1 << roll(8),
            }
            bytes.resize(bytes.len().max(5000), 0);
        }
        fs::write(&damaged, &bytes).expect("room");
        let what = format!("damage {run}");
        let store_option = format!("--store={}", store.display());
        let ended = whimbrel(&["receive", &uri(&damaged), &store_option]);
        if ended.status.success() {
            fs::remove_file(&store).expect("what it said it kept");
        } else {
            ended.expect_line(&what, &[]);
        }
        fs::remove_file(&damaged).expect("ours");
        assert_eq!(names(folder.path()), before, "{what}: something is left");
    }
}

/// Migrates between VMs that do not fit each other, over TCP, with a return path.
fn mismatch(what: &str, there: &[&str], texts: &[&str]) {
    let mut from = VmProcess::source(&SMALL);
    let mut to = VmProcess::destination(there);
    from.switch_on(&["return-path"]);
    let address = to.listen("tcp:127.0.0.1:0");
    from.qmp.migrate(&address).expect("it starts");
    to.process.ended(what).expect_line(what, &[&["incoming migration: "], texts].concat());
    until(what, || from.status() == "failed");
    let report = from.qmp.query_migrate().expect("a report").raw;
    assert!(report["error-desc"].is_string(), "{what}: {report}");
    from.expect_healthy(what);
}

#[test]
fn vms_that_do_not_fit() {
    mismatch(
        "another size",
        &["--accel=native", "--memory=32M"],
        &["length of RAM block vm.ram", "16777216 bytes", "33554432 bytes"],
    );
    mismatch(
        "more vCPUs",
        &[&SMALL[..], &["--vcpus=2"]].concat(),
        &["loading the devices", "vcpu"],
    );
}

#[test]
fn a_qemus_vm_is_no_whimbrels() {
    let folder = folder();
    let stream = golden("precopy-10.0.2.stream", folder.path());
    refused(
        "QEMU's machine",
        &fs::read(stream).expect("just written"),
        &["machine type", "pc-q35-10.0", "whimbrel-vm-1"],
    );
}

#[test]
fn a_stream_or_a_file_of_another_kind() {
    let folder = folder();
    let store = folder.path().join("store").display().to_string();
    for (name, text) in [
        ("mapped-ram-10.0.2.file", "whimbrel restore"),
        ("multifd-none-10.0.2.main", "multifd"),
        ("postcopy-10.0.2.main", "return-path"),
    ] {
        let stream = golden(name, folder.path());
        let receive = whimbrel(&["receive", &uri(&stream), "--store", &store]);
        receive.expect_line(name, &[text]);
        fs::remove_file(stream).expect("ours");
        assert_eq!(names(folder.path()), [""; 0], "{name}: something is left");
    }
    let stream = golden("precopy-10.0.2.stream", folder.path()).display().to_string();
    whimbrel(&["restore", &stream, "tcp:127.0.0.1:1"]).expect_line("restore a stream", &[&stream]);
    whimbrel(&["restore", "/no/such/file", "tcp:127.0.0.1:1"])
        .expect_line("restore nothing", &["/no/such/file", "No such file"]);
}

#[test]
fn addresses_that_cannot_be_had() {
    let folder = folder();
    let listener = TcpListener::bind(("127.0.0.1", 0)).expect("a port");
    let port = listener.local_addr().expect("its address").port();
    let socket = folder.path().join("socket");
    let _unix = UnixListener::bind(&socket).expect("a socket");
    let in_use = [format!("tcp:127.0.0.1:{port}"), format!("unix:{}", socket.display())];
    let store = format!("--store={}", folder.path().join("store").display());
    for uri in &in_use {
        let texts = [uri.as_str(), "in use"];
        whimbrel(&["receive", uri, &store]).expect_line("receive, in use", &texts);
        let incoming = format!("--incoming={uri}");
        whimbrel(&[&["vm"][..], &TINY, &[&incoming]].concat()).expect_line("vm, in use", &texts);
        let qmp = format!("--qmp={uri}");
        whimbrel(&[&["vm"][..], &TINY, &[&qmp]].concat()).expect_line("QMP, in use", &["in use"]);
    }
    assert!(socket.exists(), "somebody else's socket");
    whimbrel(&["receive", "file:/no/such/file", &store])
        .expect_line("no file", &["/no/such/file", "No such file", "check the path"]);
    whimbrel(&["receive", "exec:exit 3", &store]).expect_line("a command that fails", &["byte 0"]);

    let mut vm = VmProcess::source(&SMALL);
    for (uri, text) in [
        // A port that is let go is soon another test's.
        ("tcp:127.0.0.1:1".to_owned(), "nobody listens there"),
        ("unix:/no/such/socket".into(), "check the path"),
        ("file:/no/such/folder/file".into(), "check the path"),
        ("exec:exit 3".into(), ""),
        ("fd:999".into(), "not an inherited descriptor"),
    ] {
        vm.qmp.migrate(&uri).expect("it starts");
        until(&uri, || vm.status() == "failed");
        let report = vm.qmp.query_migrate().expect("a report").raw;
        let why = report["error-desc"].as_str().unwrap_or_default();
        assert!(why.contains(text) && !why.is_empty(), "{uri}: {report}");
        vm.expect_healthy(&uri);
    }
    let nonsense = vm.qmp.migrate("ftp:host").expect_err("no address");
    assert!(nonsense.to_string().contains("is no migration address"), "{nonsense}");
}

/// Runs the command as a user who may do nothing; `None` where that cannot be had.
fn as_nobody(arguments: &[&str]) -> Option<crate::process::Ended> {
    // The command may lie where nobody can look: it is run from a copy.
    let folder = tempfile::Builder::new().prefix("whimbrel-nobody-").tempdir().expect("a folder");
    fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o755)).expect("ours");
    let copy = folder.path().join("whimbrel");
    fs::copy(WHIMBREL, &copy).expect("room");
    let mut command = Command::new("setpriv");
    command.args(["--reuid=65534", "--regid=65534", "--clear-groups"]).arg(&copy).args(arguments);
    let mut probe = Command::new("setpriv");
    probe.args(["--reuid=65534", "--regid=65534", "--clear-groups", "true"]);
    if !probe.output().is_ok_and(|output| output.status.success()) {
        eprintln!("not run as another user: 'setpriv' is missing, or this user may not");
        return None;
    }
    Some(run(command))
}

#[test]
fn without_rights() {
    let closed = folder();
    let stream = closed.path().join("stream");
    fs::write(&stream, Stream::record().bytes).expect("room");
    fs::set_permissions(closed.path(), fs::Permissions::from_mode(0o755)).expect("ours");
    fs::set_permissions(&stream, fs::Permissions::from_mode(0o644)).expect("ours");
    let store = closed.path().join("store").display().to_string();
    let Some(ended) = as_nobody(&["receive", &uri(&stream), "--store", &store]) else { return };
    ended.expect_line("a folder of somebody else's", &[&store, "Permission denied"]);
    assert_eq!(names(closed.path()), ["stream"], "half-written");

    fs::set_permissions(&stream, fs::Permissions::from_mode(0o600)).expect("ours");
    let ended = as_nobody(&["receive", &uri(&stream), "--store", "/tmp/never"]).expect("as before");
    ended.expect_line("a file of somebody else's", &["Permission denied", "owner and mode"]);
    assert!(!Path::new("/tmp/never").exists());

    if Path::new("/dev/kvm").exists() {
        let mode = fs::metadata("/dev/kvm").expect("it exists").permissions().mode();
        if mode & 0o006 != 0 {
            return eprintln!("not run without rights to /dev/kvm: everybody has them");
        }
    }
    let ended = as_nobody(&["vm", "--accel=kvm", "--memory=8M"]).expect("as before");
    ended.expect_line("no rights to KVM", &["/dev/kvm"]);
}

#[test]
fn too_much_is_asked_for() {
    let vm = |options: &[&str]| whimbrel(&[&["vm", "--accel=native"], options].concat());
    vm(&["--memory=1T"]).expect_line("memory", &["memory", "1099511627776"]);
    vm(&["--memory=200G"]).expect_line("memory", &["too little memory", "200G", "available"]);
    vm(&["--memory=64k", "--workload=idle"]).expect_line("memory", &["4M at least"]);
    vm(&["--memory=8M", "--workload=uniform,working-set=8M"])
        .expect_line("working set", &["working set of 8M", "at most"]);
    vm(&["--memory=64G", "--page-size=1G"]).expect_line("huge pages", &["too few huge pages"]);
    vm(&["--memory=8M", "--dirty=kvm-log"]).expect_line("dirty log", &["dirty log kvm-log"]);
    vm(&["--memory=8M", "--incoming=defer"]).expect_line("nobody to name it", &["add '--qmp'"]);
    vm(&["--memory=8M", "--incoming=ftp:x"]).expect_line("address", &["is no migration address"]);
}

#[test]
fn flags_that_are_none() {
    for (arguments, text) in [
        (&["vm", "--memory=lots"][..], "--memory"),
        (&["vm", "--vcpus=9"], "--vcpus"),
        (&["vm", "--accel=tcg"], "kvm, native or auto"),
        (&["vm", "--workload=zipf,speed=1"], "rate=N, working-set=SIZE or seed=N"),
        (&["vm", "--page-size=8k"], "4k, 2M or 1G"),
        (&["vm", "--no-such-flag"], "--no-such-flag"),
        (&["demo", "--mode=teleport"], "precopy, postcopy, preempt"),
        (&["demo", "--postcopy-after=soon"], "expected 'first-pass' or milliseconds"),
        (&["migrate", "unix:a", "unix:b", "--preempt"], "--postcopy"),
        (&["migrate", "unix:a", "unix:b", "--postcopy-after=0"], "--postcopy"),
        (&["receive", "tcp:127.0.0.1:0"], "--store"),
        (&["receive", "ftp:x", "--store=x"], "expected tcp:HOST:PORT"),
        (&["receive", "tcp:127.0.0.1:0", "--store=x", "--touch=all"], "sequential, random or"),
        (&["receive", "tcp:127.0.0.1:0", "--store=x", "--touch=random,seed=x"], "'x' is no number"),
        (&["receive", "tcp:127.0.0.1:0", "--store=x", "--touch=sequential,seed=1"], "only random"),
        (&["restore", "x", "tcp:127.0.0.1:1", "--preempt"], "--postcopy"),
        (&["restore", "x", "tcp:127.0.0.1:1", "--page-size=2M"], "--postcopy"),
        (&["restore", "x", "tcp:127.0.0.1:1", "--bandwidth=1M"], "--postcopy"),
        (&["restore", "x", "tcp:127.0.0.1:1", "--postcopy", "--page-size=ram=8k"], "4k, 2M or 1G"),
        (&["no-such-command"], "no-such-command"),
    ] {
        let ended = whimbrel(arguments);
        assert_eq!(ended.status.code(), Some(2), "{ended:?}");
        assert!(ended.err.starts_with("error: "), "{ended:?}");
        assert!(ended.err.contains(text), "{arguments:?}: no '{text}': {ended:?}");
        assert_eq!(ended.out, "", "{arguments:?}");
    }
}

#[test]
fn a_receiver_is_interrupted() {
    let folder = folder();
    let socket = folder.path().join("socket");
    let store = format!("--store={}", folder.path().join("store").display());
    let receive = Running::start(&["receive", &format!("unix:{}", socket.display()), &store]);
    receive.waits_at();
    receive.interrupt();
    receive.ended("interrupted").expect_line("interrupted", &["cancelled"]);
    assert_eq!(names(folder.path()), [""; 0], "something is left");
}
