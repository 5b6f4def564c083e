//! Two `whimbrel vm` processes, driven through nothing but QMP.

use std::time::Duration;

use serde_json::{Value, json};
use whimbrel_control::Client;

use crate::process::{SMALL, VmProcess, folder, move_and_verify, until, verify_moved};

fn pair() -> (VmProcess, VmProcess) {
    (VmProcess::source(&SMALL), VmProcess::destination(&SMALL))
}

fn text(path: &std::path::Path) -> String {
    path.display().to_string()
}

#[test]
fn over_tcp_and_unix_with_and_without_a_return_path() {
    for (uri, return_path) in [("tcp", true), ("tcp", false), ("unix", true), ("unix", false)] {
        let (mut from, mut to) = pair();
        let folder = folder();
        let what = format!("{uri}, return-path {return_path}");
        let uri = match uri {
            "tcp" => "tcp:127.0.0.1:0".to_owned(),
            _ => format!("unix:{}", text(&folder.path().join("socket"))),
        };
        if return_path {
            from.switch_on(&["return-path"]);
        }
        move_and_verify(&mut from, &mut to, &uri, &what);
        assert_eq!(folder.path().read_dir().expect("ours").count(), 0, "{what}: a file is left");
        from.quit(&what);
        to.quit(&what);
    }
}

#[test]
fn through_a_file_and_through_commands() {
    let folder = folder();
    let file = text(&folder.path().join("stream"));
    for (out, back) in [
        (format!("exec:cat > {file}"), format!("exec:cat {file}")),
        (format!("file:{file}"), format!("file:{file}")),
        (format!("file:{file},offset=4096"), format!("exec:tail -c +4097 {file}")),
    ] {
        let (mut from, mut to) = pair();
        from.qmp.migrate(&out).expect("it starts");
        from.reaches("completed", &out);
        to.qmp.migrate_incoming(&back).expect("it starts");
        to.reaches("completed", &back);
        verify_moved(&mut from, &mut to, &out);
        let names: Vec<_> = folder.path().read_dir().expect("ours").flatten().collect();
        assert_eq!(names.len(), 1, "{out}: only the stream is left: {names:?}");
        std::fs::remove_file(&file).expect("the stream");
    }
}

#[test]
fn through_inherited_descriptors() {
    // Whoever starts a process hands it its end; the shell does so for us, under number 9.
    let folder = folder();
    let file = text(&folder.path().join("stream"));
    let mut from = VmProcess::inheriting(&format!("9>{file}"), &SMALL);
    from.expect_progress("the source's guest");
    from.qmp.migrate("fd:9").expect("it starts");
    from.reaches("completed", "into a descriptor");
    let waits = [&SMALL[..], &["--incoming=defer", "--paused"]].concat();
    let mut to = VmProcess::inheriting(&format!("9<{file}"), &waits);
    to.qmp.migrate_incoming("fd:9").expect("it starts");
    to.reaches("completed", "from a descriptor");
    verify_moved(&mut from, &mut to, "fd");
}

#[test]
fn a_vm_kept_in_a_file_can_run_on_where_it_was() {
    let folder = folder();
    let mut vm = VmProcess::source(&SMALL);
    vm.qmp.migrate(&format!("file:{}", text(&folder.path().join("stream")))).expect("it starts");
    vm.reaches("completed", "file");
    vm.qmp.cont().expect("nobody else runs it");
    vm.expect_healthy("after it was written to a file");
}

/// What has happened so far, as `MIGRATION` states and other names.
fn events(qmp: &mut Client) -> Vec<String> {
    let mut names = Vec::new();
    while let Some(event) = qmp.next_event(Duration::from_millis(20)).expect("connected") {
        match event.migration_status() {
            Some(status) => names.push(status.name().to_owned()),
            None if event.name == "MIGRATION_PASS" => {}
            None => names.push(event.name),
        }
    }
    names
}

#[test]
fn events_come_in_order() {
    let (mut from, mut to) = pair();
    from.switch_on(&["events", "return-path", "pause-before-switchover"]);
    to.switch_on(&["events"]);
    events(&mut from.qmp);
    let address = to.listen("tcp:127.0.0.1:0");
    from.qmp.migrate(&address).expect("it starts");
    from.reaches("pre-switchover", "pause-before-switchover");
    assert_eq!(from.run_state(), "finish-migrate");
    assert_eq!(to.status(), "active");
    let wrong = from.qmp.migrate_continue("device").expect_err("another state");
    assert!(wrong.to_string().contains("device"), "{wrong}");
    from.qmp.migrate_continue("pre-switchover").expect("goes on");
    from.reaches("completed", "after migrate-continue");
    to.reaches("completed", "after migrate-continue");
    to.qmp.cont().expect("runs");
    let expected = ["setup", "active", "STOP", "pre-switchover", "device", "completed"];
    assert_eq!(events(&mut from.qmp), expected, "at the source");
    assert_eq!(events(&mut to.qmp), ["setup", "active", "completed", "RESUME"], "and there");
}

#[test]
fn the_guest_resumes_by_itself_before_the_migration_is_completed_there() {
    let mut from = VmProcess::source(&SMALL);
    let mut to = VmProcess::start(&[&SMALL[..], &["--incoming=defer"]].concat());
    to.switch_on(&["events"]);
    let address = to.listen("tcp:127.0.0.1:0");
    from.switch_on(&["return-path"]);
    from.qmp.migrate(&address).expect("it starts");
    from.reaches("completed", "autostart");
    to.reaches("completed", "autostart");
    assert_eq!(events(&mut to.qmp), ["setup", "active", "RESUME", "completed"]);
    to.expect_healthy("autostart");
}

#[test]
fn xbzrle_sends_deltas_and_ram_is_the_same() {
    let busy = ["--accel=native", "--memory=16M", "--workload=hot-cold,rate=2000,working-set=4M"];
    let (mut from, mut to) = (VmProcess::source(&busy), VmProcess::destination(&busy));
    from.switch_on(&["return-path", "xbzrle"]);
    to.switch_on(&["xbzrle"]);
    // Too slow to be done before pages have been written again, however busy the machine is.
    let slow = json!({ "max-bandwidth": 4 << 20, "downtime-limit": 1 });
    from.qmp.set_parameters(slow).expect("allowed");
    let address = to.listen("tcp:127.0.0.1:0");
    from.qmp.migrate(&address).expect("it starts");
    until("deltas", || {
        let report = from.qmp.query_migrate().expect("a report").raw;
        report["xbzrle-cache"]["pages"].as_u64() > Some(0)
    });
    let fast = json!({ "max-bandwidth": 0, "downtime-limit": 2000 });
    from.qmp.set_parameters(fast).expect("a running migration follows");
    for side in [&mut from, &mut to] {
        side.reaches("completed", "xbzrle");
    }
    verify_moved(&mut from, &mut to, "xbzrle");
}

#[test]
fn auto_converge_slows_a_guest_that_is_faster_than_the_link() {
    // 20000 updates a second over 1024 pages: far more than 4 MB/s carry.
    let busy = ["--accel=native", "--memory=8M", "--workload=uniform,rate=20000,working-set=4M"];
    let (mut from, mut to) = (VmProcess::source(&busy), VmProcess::destination(&busy));
    from.switch_on(&["return-path", "auto-converge"]);
    let limits = json!({ "max-bandwidth": 4 << 20, "downtime-limit": 100,
        "cpu-throttle-initial": 50, "cpu-throttle-increment": 20 });
    from.qmp.set_parameters(limits).expect("allowed");
    let address = to.listen("tcp:127.0.0.1:0");
    from.qmp.migrate(&address).expect("it starts");
    let mut throttled = 0;
    until("it converges", || {
        let report = from.qmp.query_migrate().expect("a report");
        assert_ne!(report.status.name(), "failed", "{}", report.raw);
        throttled = throttled.max(report.raw["cpu-throttle-percentage"].as_u64().unwrap_or(0));
        report.status.name() == "completed"
    });
    assert!(throttled >= 50, "converged without a throttle: {throttled} %");
    to.reaches("completed", "auto-converge");
    verify_moved(&mut from, &mut to, "auto-converge");
}

/// How many updates the guest does in half a second.
fn pace(vm: &mut VmProcess) -> u64 {
    let updates = |vm: &mut VmProcess| {
        vm.execute("x-self-check", json!({}))["updates"].as_u64().expect("a number")
    };
    let before = updates(vm);
    std::thread::sleep(Duration::from_millis(500));
    updates(vm) - before
}

#[test]
fn the_throttle_ends_with_the_migration() {
    let folder = folder();
    let busy = ["--accel=native", "--memory=8M", "--workload=uniform,rate=20000,working-set=4M"];
    let mut vm = VmProcess::source(&busy);
    let free = pace(&mut vm);
    vm.switch_on(&["auto-converge"]);
    let limits = json!({ "max-bandwidth": 4 << 20, "downtime-limit": 100,
        "cpu-throttle-initial": 90 });
    vm.qmp.set_parameters(limits).expect("allowed");
    vm.qmp.migrate(&format!("file:{}", text(&folder.path().join("stream")))).expect("it starts");
    vm.reaches("completed", "a throttled migration into a file");
    vm.qmp.cont().expect("nobody else runs it");
    let after = pace(&mut vm);
    assert!(after * 2 > free, "still throttled: {free} updates before, {after} after");
}

#[test]
fn back_and_forth() {
    let mut here = VmProcess::source(&SMALL);
    let mut updates = 0;
    for hop in 1..=5 {
        let what = format!("hop {hop}");
        let mut there = VmProcess::destination(&SMALL);
        here.switch_on(&["return-path"]);
        move_and_verify(&mut here, &mut there, "tcp:127.0.0.1:0", &what);
        let now = there.execute("x-self-check", json!({}))["updates"].as_u64();
        assert!(now > Some(updates), "{what}: the guest's count goes on: {now:?} after {updates}");
        updates = now.expect("a number");
        std::mem::replace(&mut here, there).quit(&what);
    }
}

#[test]
fn cancelled_and_tried_again() {
    let (mut from, mut to) = pair();
    from.switch_on(&["return-path"]);
    from.qmp.set_parameters(json!({ "max-bandwidth": 1 << 20 })).expect("allowed");
    let address = to.listen("tcp:127.0.0.1:0");
    from.qmp.migrate(&address).expect("it starts");
    from.reaches("active", "to be cancelled");
    let again = from.qmp.migrate(&address).expect_err("one at a time");
    assert!(again.to_string().contains("in progress"), "{again}");
    from.qmp.migrate_cancel().expect("cancels");
    from.reaches_end("cancelled");
    from.expect_healthy("cancelled");
    to.process.ended("a destination whose source cancelled").expect_line(
        "a destination whose source cancelled",
        &["incoming migration: ", "main channel, byte "],
    );
    from.qmp.set_parameters(json!({ "max-bandwidth": 0 })).expect("allowed");
    let mut to = VmProcess::destination(&SMALL);
    move_and_verify(&mut from, &mut to, "tcp:127.0.0.1:0", "tried again");
}

impl VmProcess {
    fn reaches_end(&mut self, status: &str) {
        let mut report = Value::Null;
        until("the migration's end", || {
            let now = self.qmp.query_migrate().expect("a report");
            report = now.raw;
            !now.status.is_running()
        });
        assert_eq!(report["status"], status, "{report}");
    }
}
