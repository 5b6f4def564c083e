//! Postcopy between two `whimbrel vm` processes: the guest runs while its pages come.

use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::demo::accelerators;
use crate::process::{SMALL, VmProcess, until, verify_moved, whimbrel};

/// So slow that 16 MiB take 4 s.
pub(crate) const SLOW: u64 = 4 << 20;

/// Two VMs that may use postcopy, and how the guest is to be moved.
pub(crate) fn pair(options: &[&str], waits: &[&str], preempt: bool) -> (VmProcess, VmProcess) {
    let mut from = VmProcess::source(options);
    let mut to = VmProcess::start(&[options, &["--incoming=defer"], waits].concat());
    for side in [&mut from, &mut to] {
        side.qmp
            .set_capabilities_named(&[
                ("return-path", true),
                ("postcopy-ram", true),
                ("postcopy-preempt", preempt),
                ("postcopy-blocktime", true),
            ])
            .expect("capabilities");
    }
    (from, to)
}

/// Moves the guest, which then runs at the destination; pages come at no more than `bandwidth`.
pub(crate) fn begin(from: &mut VmProcess, to: &mut VmProcess, bandwidth: u64, what: &str) {
    let limits = json!({ "max-bandwidth": bandwidth, "max-postcopy-bandwidth": bandwidth });
    from.qmp.set_parameters(limits).expect("allowed");
    let address = to.listen("tcp:127.0.0.1:0");
    from.qmp.migrate(&address).expect("it starts");
    from.qmp.migrate_start_postcopy().expect("it is allowed");
    from.reaches("postcopy-active", what);
    to.reaches("postcopy-active", what);
}

pub(crate) fn progress(vm: &mut VmProcess) -> u64 {
    vm.execute("x-guest-progress", json!({}))["updates"].as_u64().expect("a number")
}

#[test]
fn the_guest_runs_while_its_pages_come_and_nobody_waits_for_it() {
    for accel in accelerators() {
        for preempt in [false, true] {
            let what = format!("{accel}, preempt {preempt}");
            let accel = format!("--accel={accel}");
            let options = [&[accel.as_str()], &SMALL[1..]].concat();
            let (mut from, mut to) = pair(&options, &[], preempt);
            begin(&mut from, &mut to, SLOW, &what);
            assert_eq!(
                (from.run_state(), to.run_state()),
                ("postmigrate".into(), "running".into())
            );

            let before = progress(&mut to);
            until(&format!("{what}: the guest goes on"), || progress(&mut to) > before + 20);
            assert_eq!(from.status(), "postcopy-active", "{what}: with pages still to come");
            for command in ["x-self-check", "x-ram-digest"] {
                let error = to.qmp.execute(command, json!({})).expect_err("not now");
                let error = error.to_string();
                assert!(error.contains("migration is postcopy-active"), "{what}: {error}");
            }
            to.qmp.stop().expect("a vCPU that waits for a page gets it");
            let stands = progress(&mut to);
            let error = to.qmp.execute("x-ram-digest", json!({})).expect_err("not now either");
            assert!(error.to_string().contains("pages of RAM may be missing"), "{what}: {error}");
            assert_eq!(progress(&mut to), stands, "{what}");
            to.qmp.cont().expect("runs on");
            let error = from.qmp.cont().expect_err("it has gone");
            assert!(error.to_string().contains("destination"), "{what}: {error}");

            from.qmp.set_parameters(json!({ "max-postcopy-bandwidth": 0 })).expect("allowed");
            from.reaches("completed", &what);
            let report = to.reaches("completed", &what);
            expect_consistent(&report, &what);
            to.expect_healthy(&what);
            from.quit(&what);
            to.quit(&what);
        }
    }
}

/// The figures of a destination agree with each other.
fn expect_consistent(report: &Value, what: &str) {
    let faults = report["x-faults"]["count"].as_u64();
    assert!(faults > Some(0), "{what}: no fault: {report}");
    let dist = report["postcopy-latency-dist"].as_array().expect("buckets");
    assert_eq!(dist.len(), 24, "{what}");
    assert_eq!(Some(dist.iter().filter_map(Value::as_u64).sum()), faults, "{what}: {report}");
    assert_eq!(report["postcopy-vcpu-blocktime"].as_array().map(Vec::len), Some(1), "{what}");
    let mean = report["x-faults"]["latency-us"]["mean"].as_f64().expect("a mean") * 1000.0;
    let told = report["postcopy-latency"].as_f64().expect("a mean");
    assert!((told - mean).abs() < mean * 0.1 + 1000.0, "{what}: {told} ns, {mean} ns");
}

#[test]
fn ram_that_no_guest_has_touched_arrives_identical() {
    for preempt in [false, true] {
        let what = format!("paused, preempt {preempt}");
        let (mut from, mut to) = pair(&SMALL, &["--paused"], preempt);
        begin(&mut from, &mut to, 0, &what);
        from.reaches("completed", &what);
        to.reaches("completed", &what);
        verify_moved(&mut from, &mut to, &what);
    }
}

#[test]
fn migrate_drives_it_on_both_sides() {
    for (options, channels) in [(&["--postcopy"][..], 1), (&["--postcopy", "--preempt"], 2)] {
        for after in ["first-pass", "0", "30"] {
            let what = format!("migrate {options:?} after {after}");
            let mut from = VmProcess::source(&SMALL);
            let mut to = VmProcess::start(&[&SMALL[..], &["--incoming=defer"]].concat());
            // Without a limit a precopy could be done before postcopy begins.
            from.qmp.set_parameters(json!({ "downtime-limit": 0 })).expect("allowed");
            let (a, b) = (from.qmp.endpoint().to_string(), to.qmp.endpoint().to_string());
            let after = format!("--postcopy-after={after}");
            let command = ["migrate", &a, &b, "--json", "--bandwidth=16M", &after];
            let out = whimbrel(&[&command[..], options].concat()).expect_success(&what);
            let report: Value = serde_json::from_str(&out).expect("JSON");
            assert_eq!(report["status"], "completed", "{what}: {report}");
            assert_eq!(report["x-destination"]["status"], "completed", "{what}: {report}");
            assert!(report["ram"]["postcopy-bytes"].as_u64() > Some(0), "{what}: {report}");
            let first_pass = report["ram"]["precopy-bytes"].as_u64() >= Some(16 << 20);
            assert_eq!(first_pass, what.ends_with("first-pass"), "{what}: {report}");
            let parameters = from.qmp.query_parameters().expect("they are told");
            assert_eq!(parameters["max-postcopy-bandwidth"], 16 << 20, "{what}");
            for side in [&mut from, &mut to] {
                let list = side.execute("query-migrate-capabilities", json!({}));
                let on = |name: &str| {
                    let entry = json!({ "capability": name, "state": true });
                    list.as_array().expect("a list").contains(&entry)
                };
                assert!(on("postcopy-ram") && on("return-path"), "{what}: {list}");
                assert_eq!(on("postcopy-preempt"), channels == 2, "{what}: {list}");
            }
            to.expect_healthy(&what);
        }
    }
}

#[test]
fn migrate_says_when_there_was_nothing_left_for_postcopy() {
    let what = "an idle guest";
    let idle = ["--accel=native", "--memory=16M", "--workload=idle"];
    let from = VmProcess::start(&idle);
    let to = VmProcess::start(&[&idle[..], &["--incoming=defer"]].concat());
    let (a, b) = (from.qmp.endpoint().to_string(), to.qmp.endpoint().to_string());
    let out = whimbrel(&["migrate", &a, &b, "--postcopy"]).expect_success(what);
    assert!(out.ends_with(", precopy was done before postcopy could begin\n"), "{out}");
    from.quit(what);
    to.quit(what);
}

/// Ends in order, and soon, though a vCPU of it may wait for a page for ever.
pub(crate) fn expect_quits(vm: VmProcess, what: &str) {
    let since = Instant::now();
    vm.quit(what);
    assert!(since.elapsed() < Duration::from_secs(30), "{what}: {:?}", since.elapsed());
}

#[test]
fn a_source_that_is_killed_leaves_a_guest_that_waits() {
    for accel in accelerators() {
        for preempt in [false, true] {
            let what = format!("source killed, {accel}, preempt {preempt}");
            let accel = format!("--accel={accel}");
            let options = [&[accel.as_str()], &SMALL[1..]].concat();
            let (mut from, mut to) = pair(&options, &[], preempt);
            begin(&mut from, &mut to, SLOW, &what);
            from.process.kill();
            let report = to.reaches("postcopy-paused", &what);
            assert!(report["error-desc"].is_string(), "{what}: {report}");
            // The guest runs until it touches what is missing. All this while nobody else waits.
            let mut last = progress(&mut to);
            until(&format!("{what}: it waits"), || {
                std::thread::sleep(Duration::from_millis(300));
                let now = progress(&mut to);
                std::mem::replace(&mut last, now) == now
            });
            let since = Instant::now();
            assert_eq!(to.run_state(), "running", "{what}");
            let error = to.qmp.execute("x-self-check", json!({})).expect_err("not now");
            assert!(error.to_string().contains("migration is postcopy-paused"), "{what}: {error}");
            to.execute("x-vm-info", json!({}));
            assert!(since.elapsed() < Duration::from_secs(10), "{what}: {:?}", since.elapsed());
            expect_quits(to, &what);
        }
    }
}

#[test]
fn a_guest_that_waits_for_a_page_stops_and_runs_on_all_the_same() {
    let what = "stopped while it waits";
    let (mut from, mut to) = pair(&SMALL, &[], true);
    begin(&mut from, &mut to, SLOW, what);
    from.process.kill();
    to.reaches("postcopy-paused", what);
    std::thread::sleep(Duration::from_millis(300));
    for _ in 0..3 {
        to.qmp.stop().expect("it waits for a page that never comes, and stops");
        assert_eq!(to.run_state(), "paused", "{what}");
        to.qmp.cont().expect("it waits on");
        assert_eq!(to.run_state(), "running", "{what}");
    }
    expect_quits(to, what);
}

#[test]
fn a_destination_that_is_killed_takes_the_guest_with_it_and_nothing_else() {
    for preempt in [false, true] {
        let what = format!("destination killed, preempt {preempt}");
        let (mut from, mut to) = pair(&SMALL, &[], preempt);
        begin(&mut from, &mut to, SLOW, &what);
        to.process.kill();
        let report = from.reaches("postcopy-paused", &what);
        assert!(report["error-desc"].is_string(), "{what}: {report}");
        let error = from.qmp.cont().expect_err("it ran there");
        assert!(error.to_string().contains("destination"), "{what}: {error}");
        assert_eq!(from.run_state(), "postmigrate", "{what}");
        expect_quits(from, &what);
    }
}

#[test]
fn migrate_says_what_each_side_says_when_postcopy_breaks() {
    let what = "migrate, broken";
    let options = [&SMALL[..], &["--auto-recover=off"]].concat();
    let mut from = VmProcess::source(&options);
    let to = VmProcess::start(&[&options[..], &["--incoming=defer"]].concat());
    let (a, b) = (from.qmp.endpoint().to_string(), to.qmp.endpoint().to_string());
    let options =
        ["--postcopy", "--preempt", "--postcopy-after=0", "--bandwidth=4M", "--no-recover"];
    let driving = crate::process::Running::start(&[&["migrate", &a, &b][..], &options].concat());
    from.reaches("postcopy-active", what);
    from.qmp.migrate_pause().expect("it is in postcopy");
    driving.ended(what).expect_line(
        what,
        &[
            "broke in postcopy",
            "the source says postcopy-paused (",
            "the destination says ",
            "the source needs 'migrate' with 'resume'",
        ],
    );
    expect_quits(from, what);
    expect_quits(to, what);
}
