//! A migration ends before its end: cancelled, or with a process that is gone.

use std::io::Write;
use std::net::TcpListener;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use serde_json::json;

use crate::process::{Running, SMALL, VmProcess, folder, move_and_verify, until};
use crate::stream::{Stream, TINY};

/// How long a cancelled migration may take to be over.
const SOON: Duration = Duration::from_secs(20);

/// Cancels, and expects the guest to be as if nothing had been.
fn cancel(vm: &mut VmProcess, what: &str) {
    let since = Instant::now();
    vm.qmp.migrate_cancel().expect("cancels");
    until(&format!("{what}: the end"), || {
        let status = vm.status();
        status != "cancelling"
            && status != "active"
            && status != "setup"
            && status != "device"
            && status != "pre-switchover"
    });
    assert_eq!(vm.status(), "cancelled", "{what}");
    assert!(since.elapsed() < SOON, "{what}: cancelled only after {:?}", since.elapsed());
    vm.expect_healthy(what);
}

fn expect_movable(vm: &mut VmProcess, what: &str) {
    vm.qmp.set_parameters(json!({ "max-bandwidth": 0 })).expect("allowed");
    vm.qmp.set_capability_named("pause-before-switchover", false).expect("allowed");
    let mut to = VmProcess::destination(&SMALL);
    move_and_verify(vm, &mut to, "tcp:127.0.0.1:0", what);
}

#[test]
fn while_nobody_accepts_or_reads() {
    let mut vm = VmProcess::source(&SMALL);
    vm.switch_on(&["return-path"]);
    // Connections are made by the kernel; then nobody accepts, reads or answers.
    let listener = TcpListener::bind(("127.0.0.1", 0)).expect("a port");
    let uri = format!("tcp:127.0.0.1:{}", listener.local_addr().expect("its address").port());
    for delay in [0, 5, 100] {
        vm.qmp.migrate(&uri).expect("it starts");
        std::thread::sleep(Duration::from_millis(delay));
        cancel(&mut vm, &format!("nobody reads, cancelled after {delay} ms"));
    }
    // A command that never reads its input.
    vm.qmp.set_capability_named("return-path", false).expect("allowed");
    vm.qmp.migrate("exec:sleep 1000").expect("it starts");
    std::thread::sleep(Duration::from_millis(50));
    cancel(&mut vm, "a command that does not read");
    expect_movable(&mut vm, "after nobody read");
}

#[test]
fn before_the_switchover_and_in_slow_motion() {
    let mut vm = VmProcess::source(&SMALL);
    vm.switch_on(&["return-path", "pause-before-switchover"]);
    let mut to = VmProcess::destination(&SMALL);
    let address = to.listen("tcp:127.0.0.1:0");
    vm.qmp.migrate(&address).expect("it starts");
    vm.reaches("pre-switchover", "before the switchover");
    assert_eq!(vm.run_state(), "finish-migrate");
    cancel(&mut vm, "before the switchover");
    let what = "a destination that is cancelled before the switchover";
    to.process.ended(what).expect_line(what, &["incoming migration: ", "channel, byte "]);

    vm.qmp.set_parameters(json!({ "max-bandwidth": 100_000 })).expect("allowed");
    let mut to = VmProcess::destination(&SMALL);
    let address = to.listen("tcp:127.0.0.1:0");
    vm.qmp.migrate(&address).expect("it starts");
    vm.reaches("active", "in slow motion");
    std::thread::sleep(Duration::from_millis(50));
    cancel(&mut vm, "in slow motion");
    expect_movable(&mut vm, "after slow motion");
}

#[test]
fn into_a_file_nothing_is_left() {
    let folder = folder();
    let mut vm = VmProcess::source(&SMALL);
    vm.qmp.set_parameters(json!({ "max-bandwidth": 1 << 20 })).expect("allowed");
    vm.qmp.migrate(&format!("file:{}", folder.path().join("kept").display())).expect("it starts");
    vm.reaches("active", "into a file");
    cancel(&mut vm, "into a file");
    let left: Vec<_> = folder.path().read_dir().expect("ours").flatten().collect();
    assert!(left.is_empty(), "half-written: {left:?}");
}

#[test]
fn a_destination_that_is_killed_costs_nothing() {
    let mut vm = VmProcess::source(&SMALL);
    for (return_path, delay) in [(true, 0), (true, 30), (false, 60)] {
        vm.qmp.set_capability_named("return-path", return_path).expect("allowed");
        vm.qmp.set_parameters(json!({ "max-bandwidth": 8 << 20 })).expect("allowed");
        let mut to = VmProcess::destination(&SMALL);
        let address = to.listen("tcp:127.0.0.1:0");
        vm.qmp.migrate(&address).expect("it starts");
        vm.reaches("active", "to be killed");
        std::thread::sleep(Duration::from_millis(delay));
        to.process.kill();
        let what = format!("destination killed after {delay} ms, return-path {return_path}");
        until(&what, || vm.status() == "failed");
        let report = vm.qmp.query_migrate().expect("a report").raw;
        assert!(report["error-desc"].is_string(), "{what}: {report}");
        vm.expect_healthy(&what);
    }
    vm.switch_on(&["return-path"]);
    expect_movable(&mut vm, "after three that were killed");
}

#[test]
fn a_source_that_is_killed_ends_the_destination_with_one_line() {
    let mut vm = VmProcess::source(&SMALL);
    vm.qmp.set_parameters(json!({ "max-bandwidth": 8 << 20 })).expect("allowed");
    let folder = folder();
    let socket = folder.path().join("socket");
    let to = Running::start(
        &[
            &["vm", "--serial=none"][..],
            &SMALL,
            &[&format!("--incoming=unix:{}", socket.display())],
        ]
        .concat(),
    );
    until("the destination's socket", || socket.exists());
    vm.qmp.migrate(&format!("unix:{}", socket.display())).expect("it starts");
    vm.reaches("active", "to be killed");
    std::thread::sleep(Duration::from_millis(50));
    vm.process.kill();
    let what = "a destination whose source was killed";
    to.ended(what).expect_line(what, &["incoming migration: ", "main channel, byte "]);
    assert!(!socket.exists(), "{what}: its socket is left");
}

#[test]
fn a_destination_that_waits_for_a_frozen_source_can_be_ended() {
    let mut vm = VmProcess::source(&SMALL);
    let mut to = VmProcess::destination(&SMALL);
    vm.qmp.set_parameters(json!({ "max-bandwidth": 1 << 20 })).expect("allowed");
    let address = to.listen("tcp:127.0.0.1:0");
    vm.qmp.migrate(&address).expect("it starts");
    vm.reaches("active", "a slow source");
    to.quit("in the middle of a migration");
    until("the source sees it", || vm.status() == "failed");
    vm.expect_healthy("whose destination quit");
}

#[test]
fn a_guest_that_has_arrived_does_not_depend_on_its_source_any_more() {
    let stream = Stream::record();
    let mut to = VmProcess::start(&[&TINY[..], &["--incoming=defer"]].concat());
    let folder = folder();
    let socket = folder.path().join("socket");
    to.listen(&format!("unix:{}", socket.display()));
    let mut source = UnixStream::connect(&socket).expect("it listens");
    source.write_all(&stream.bytes).expect("it reads");
    to.reaches("completed", "a source that never closes");
    to.expect_healthy("a source that never closes");
    to.quit("a source that never closes");
    drop(source);
}

#[test]
fn qmp_answers_at_once_while_a_migration_is_stuck_or_busy() {
    let mut vm = VmProcess::source(&SMALL);
    // Busy all the time: what is dirtied is more than what is sent.
    vm.qmp
        .set_parameters(json!({ "max-bandwidth": 8 << 20, "downtime-limit": 0 }))
        .expect("allowed");
    let mut to = VmProcess::destination(&SMALL);
    let busy = to.listen("tcp:127.0.0.1:0");
    let listener = TcpListener::bind(("127.0.0.1", 0)).expect("a port");
    let stuck = format!("tcp:127.0.0.1:{}", listener.local_addr().expect("its address").port());
    for (what, uri) in [("busy", busy), ("stuck", stuck)] {
        vm.qmp.migrate(&uri).expect("it starts");
        vm.reaches("active", what);
        let mut times = Vec::new();
        for turn in 0..150 {
            let since = Instant::now();
            match turn % 3 {
                0 => drop(vm.qmp.query_migrate().expect("a report")),
                1 => vm.qmp.stop().expect("stops"),
                _ => vm.qmp.cont().expect("runs"),
            }
            times.push(since.elapsed());
            std::thread::sleep(Duration::from_millis(1));
        }
        times.sort_unstable();
        // A machine with more to do than CPUs may hold anybody up for a time slice or two.
        let p95 = times[times.len() * 95 / 100];
        assert!(p95 < Duration::from_secs(1), "{what}: p95 {p95:?}, {times:?}");
        assert_eq!(vm.status(), "active", "{what}: it was under way all the time");
        cancel(&mut vm, what);
    }
}
