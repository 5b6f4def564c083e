//! Two VMs in step, in two processes, one of which is killed; and a standby that has only the newest
//! checkpoint.

use serde_json::{Value, json};

use crate::process::{Running, SMALL, VmProcess, folder, until, whimbrel};

const IN_STEP: [&str; 2] = ["return-path", "x-colo"];

fn checkpoints(vm: &mut VmProcess) -> u64 {
    let report = vm.execute("query-migrate", json!({}));
    report["x-colo"]["checkpoints"].as_u64().unwrap_or(0)
}

/// A checkpoint every 50 ms, to `address`.
fn begin(primary: &mut VmProcess, address: &str, what: &str) {
    primary.switch_on(&IN_STEP);
    let often = json!({ "x-checkpoint-delay": 50, "max-bandwidth": 0 });
    primary.execute("migrate-set-parameters", often);
    primary.execute("migrate", json!({ "uri": address }));
    primary.reaches("colo", what);
    until(&format!("{what}: checkpoints"), || checkpoints(primary) > 3);
}

#[test]
fn the_secondary_takes_over_when_the_primary_was_killed() {
    let what = "the primary is killed";
    let (mut primary, mut secondary) = (
        VmProcess::source(&SMALL),
        VmProcess::start(&[&SMALL[..], &["--incoming=defer"]].concat()),
    );
    secondary.switch_on(&IN_STEP);
    let address = secondary.listen("tcp:127.0.0.1:0");
    begin(&mut primary, &address, what);
    assert_eq!(secondary.run_state(), "colo", "{what}");
    let status = secondary.execute("query-colo-status", json!({}));
    assert_eq!(status, json!({ "mode": "secondary", "last-mode": "none", "reason": "none" }));
    let status = primary.execute("query-colo-status", json!({}));
    assert_eq!(status["mode"], "primary", "{what}");
    primary.process.kill();
    until(what, || secondary.qmp.query_migrate().expect("a report").info.error_desc.is_some());
    let said = secondary.qmp.query_migrate().expect("a report").info.error_desc;
    assert!(said.is_some_and(|said| said.contains("x-colo-lost-heartbeat")), "{what}");
    secondary.execute("x-colo-lost-heartbeat", json!({}));
    secondary.reaches("completed", what);
    assert_eq!(secondary.run_state(), "running", "{what}");
    secondary.expect_healthy(what);
    secondary.quit(what);
}

#[test]
fn a_standby_hands_the_newest_checkpoint_on_when_the_primary_was_killed() {
    let what = "a standby";
    let folder = folder();
    let mut next = VmProcess::start(&[&SMALL[..], &["--incoming=defer"]].concat());
    let then = next.listen("tcp:127.0.0.1:0");
    let store = folder.path().join("kept").display().to_string();
    let place = format!("unix:{}", folder.path().join("standby").display());
    let arguments = ["standby", &place, "--store", &store, "--then", &then, "--json"];
    let standby = Running::start(&arguments);
    until(what, || standby.err().contains("waiting for a primary"));
    let mut primary = VmProcess::source(&SMALL);
    begin(&mut primary, &place, what);
    primary.process.kill();
    let told = standby.ended(what).expect_success(what);
    let told: Value = serde_json::from_str(&told).expect("JSON");
    assert!(told["checkpoints"].as_u64().is_some_and(|count| count > 3), "{told}");
    next.reaches("completed", what);
    next.expect_healthy(what);
    next.quit(what);
    // And it is there to be looked at, or restored once more.
    let shown = whimbrel(&["inspect", &store]).expect_success(what);
    assert!(shown.contains("whimbrel-vm-1"), "{shown}");
}

#[test]
fn a_standby_takes_what_it_can_keep_in_step_with_and_nothing_else() {
    let what = "no x-colo";
    let folder = folder();
    let store = folder.path().join("kept").display().to_string();
    let standby = Running::start(&["standby", "tcp:127.0.0.1:0", "--store", &store]);
    let place = standby.waits_at();
    let mut source = VmProcess::source(&SMALL);
    source.switch_on(&["return-path"]);
    source.execute("migrate", json!({ "uri": place }));
    source.reaches("failed", what);
    standby.ended(what).expect_line(what, &["x-colo", "set the same on both sides"]);
    assert!(!folder.path().join("kept").exists());
    source.expect_healthy(what);
    source.quit(what);
}
