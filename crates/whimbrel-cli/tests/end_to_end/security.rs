//! Who can reach what: modes of what is made, and words where anybody may come.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;

use crate::process::{Running, SMALL, VmProcess, WHIMBREL, folder, until, whimbrel};

fn mode(path: &Path) -> u32 {
    fs::metadata(path).expect("it is there").permissions().mode() & 0o777
}

/// As by somebody who lets everybody read and write what is made.
fn generous(arguments: &[&str]) -> Running {
    let mut command = Command::new("/bin/sh");
    command.args(["-c", "umask 0; exec \"$@\"", "sh", WHIMBREL]).args(arguments);
    Running::beside(command)
}

#[test]
fn sockets_and_kept_guests_are_their_owners_alone() {
    let folder = folder();
    let path = |name: &str| folder.path().join(name);
    let at = format!("unix:{}", path("migration").display());
    let store = format!("--store={}", path("kept").display());
    let receive = generous(&["receive", &at, &store]);
    receive.waits_at();
    assert_eq!(mode(&path("migration")), 0o600);
    let mut from = VmProcess::source(&SMALL);
    from.switch_on(&["return-path"]);
    from.qmp.migrate(&at).expect("it starts");
    from.reaches("completed", "into receive");
    receive.ended("receive").expect_success("receive");
    assert_eq!(mode(&path("kept")), 0o600);

    let to_file = format!("file:{}", path("stream").display());
    let mut vm = VmProcess::source(&SMALL);
    vm.qmp.migrate(&to_file).expect("it starts");
    vm.reaches("completed", "into a file");
    assert_eq!(mode(&path("stream")), 0o600);

    let qmp = format!("--qmp=unix:{}", path("qmp").display());
    let _vm = generous(&[&["vm", "--serial=none", &qmp][..], &SMALL].concat());
    until("a QMP socket", || path("qmp").exists());
    assert_eq!(mode(&path("qmp")), 0o600);
}

#[test]
fn who_waits_for_anybody_is_told_so() {
    const WARNING: &str = "whimbrel: warning: this waits on every address of this host";
    let folder = folder();
    let path = |name: &str| folder.path().join(name).display().to_string();
    for (arguments, name) in [
        (&["ca"][..], "--dir"),
        (&["host", "--name=localhost", &format!("--ca={}", path("ca"))], "--dir"),
    ] {
        let dir = format!("{name}={}", path(arguments[0]));
        whimbrel(&[&["tls"], arguments, &[&dir]].concat()).expect_success("certificates");
    }
    let tls = format!("--tls-creds={}", path("host"));
    let store = format!("--store={}", path("kept"));
    for (at, more, warns) in [
        ("tcp::0", &[][..], true),
        ("tcp:0.0.0.0:0", &[], true),
        ("tcp:127.0.0.1:0", &[], false),
        ("tcp::0", &[tls.as_str()], false),
    ] {
        let receive = Running::start(&[&["receive", at, &store][..], more].concat());
        receive.waits_at();
        if warns {
            until("a warning", || receive.err().contains(WARNING));
        } else {
            // By a signal it ends in order: it has said by then what it had to say.
            receive.interrupt();
            let ended = receive.ended("receive");
            assert!(!ended.err.contains(WARNING), "{at} {more:?}: {ended:?}");
        }
    }

    let vm = Running::start(&[&["vm", "--serial=none", "--incoming=tcp::0"][..], &SMALL].concat());
    until("a warning", || vm.err().contains(WARNING));
}
