//! One side of a postcopy is gone for good, and the guest comes back all the same.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use tempfile::TempDir;

use crate::demo::accelerators;
use crate::kept::names;
use crate::postcopy::{SLOW, begin, expect_quits, pair, progress};
use crate::process::{Running, SMALL, VmProcess, folder, run, until, whimbrel};

/// A folder in memory, where there is one.
fn folder_in_memory() -> TempDir {
    let shm = Path::new("/dev/shm");
    match shm.is_dir() {
        true => {
            tempfile::Builder::new().prefix("whimbrel-test-").tempdir_in(shm).expect("a folder")
        }
        false => folder(),
    }
}

fn text(path: &Path) -> String {
    path.to_str().expect("a name that is text").to_owned()
}

/// Two VMs with the guest at the second one, most of its RAM at the first.
struct Broken {
    from: VmProcess,
    to: VmProcess,
    /// The file that is the source's memory.
    memory: PathBuf,
    folder: TempDir,
}

impl Broken {
    /// The guest has moved, and a quarter of its RAM has followed.
    fn begin(options: &[&str], what: &str) -> Broken {
        let mut broken = Broken::soon(options, what);
        // The guest has changed pages there, and others have come that it has not.
        until(&format!("{what}: some of it comes"), || {
            let ram = broken.from.qmp.query_migrate().expect("a report").info.ram;
            ram.unwrap_or_default().remaining < 13 << 20 && progress(&mut broken.to) > 20
        });
        broken
    }

    /// The guest has just moved, and hardly anything has followed.
    fn soon(options: &[&str], what: &str) -> Broken {
        let folder = folder_in_memory();
        let memory = folder.path().join("memory");
        let in_file = format!("--memory-path={}", memory.display());
        let (mut from, mut to) = {
            let (from, to) = pair(options, &[], true);
            from.quit(what);
            let mut from = VmProcess::source(&[options, &[in_file.as_str()]].concat());
            from.switch_on(&["return-path", "postcopy-ram", "postcopy-preempt"]);
            (from, to)
        };
        begin(&mut from, &mut to, SLOW, what);
        Broken { from, to, memory, folder }
    }

    fn file(&self, name: &str) -> String {
        text(&self.folder.path().join(name))
    }

    /// SIGKILL; gives what is left.
    fn kill_source(self, what: &str) -> (VmProcess, String, TempDir) {
        let Broken { from, mut to, memory, folder } = self;
        from.process.kill();
        to.reaches("postcopy-paused", what);
        (to, text(&memory), folder)
    }
}

fn keep(side: &VmProcess, file: &str, what: &str) -> Value {
    let qmp = side.qmp.endpoint().to_string();
    let told = whimbrel(&["rescue", "keep", &qmp, file, "--json"]).expect_success(what);
    serde_json::from_str(&told).expect("JSON")
}

/// Restores `whole` to a fresh VM, whose guest goes on and finds everything as it left it.
fn restore_and_verify(options: &[&str], whole: &str, what: &str) {
    let mut to = VmProcess::start(&[options, &["--incoming=defer"]].concat());
    let address = to.listen("tcp:127.0.0.1:0");
    whimbrel(&["restore", whole, &address]).expect_success(what);
    to.reaches("completed", what);
    to.expect_healthy(what);
    to.quit(what);
}

fn missing(report: &Value) -> u64 {
    report["missing-pages"].as_u64().expect("a number")
}

#[test]
fn a_guest_whose_source_was_killed_comes_back_from_two_parts() {
    let what = "source killed, two parts";
    let broken = Broken::begin(&SMALL, what);
    let (mut to, memory, folder) = broken.kill_source(what);
    // Whatever it waits for, it is stopped.
    let part = text(&folder.path().join("part"));
    let kept = keep(&to, &part, what);
    assert_eq!(kept["side"], "destination", "{kept}");
    let lacks = missing(&kept);
    assert!(lacks > 1 << 8 && lacks < 14 << 8, "{kept}");
    assert_eq!(to.run_state(), "postmigrate", "it does not run here any more");
    assert_eq!(to.status(), "postcopy-paused", "{what}");

    let shown = whimbrel(&["inspect", &part]).expect_success(what);
    assert!(shown.contains("part of a VM: what the destination had"), "{shown}");
    assert!(shown.contains(&format!("{lacks} pages are missing")), "{shown}");

    // Both are of one migration, and say so.
    let shown = whimbrel(&["inspect", &part, "--json", "--pages"]).expect_success(what);
    let shown: Value = serde_json::from_str(&shown).expect("JSON");
    let described = fs::read(format!("{memory}.json")).expect("a description");
    let described: Value = serde_json::from_slice(&described).expect("JSON");
    let id = shown["migration"].as_str().expect("an identifier").replace('-', "");
    assert_eq!(described["migration"], id, "{shown} {described}");
    let runs = shown["blocks"].as_array().expect("a list").iter();
    let runs = runs.flat_map(|block| block["missing"].as_array().expect("a list"));
    let pages = runs.map(|run| run[1].as_u64().expect("a page") - run[0].as_u64().expect("a page"));
    assert_eq!(pages.sum::<u64>(), lacks, "{shown}");

    let whole = text(&folder.path().join("whole"));
    let joined = ["rescue", "join", &part, &memory, "-o", &whole, "--json"];
    let joined = whimbrel(&joined).expect_success(what);
    let joined: Value = serde_json::from_str(&joined).expect("JSON");
    assert_eq!(joined["pages-taken"], lacks, "{joined}");
    assert_eq!(joined["lost-pages"], 0, "{joined}");
    // The process that has it is not needed any more.
    expect_quits(to, what);
    restore_and_verify(&SMALL, &whole, what);
    // Nothing of the parts was touched, and nothing else was left.
    assert_eq!(names(folder.path()), ["memory", "memory.json", "part", "whole"]);
    let again = text(&folder.path().join("again"));
    whimbrel(&["rescue", "join", &part, &memory, "-o", &again]).expect_success(what);
    assert!(fs::read(&whole).expect("ours") == fs::read(&again).expect("ours"));
}

#[test]
fn a_destination_is_filled_while_its_guest_runs() {
    for accel in accelerators() {
        let what = format!("source killed, filled, {accel}");
        let accel = format!("--accel={accel}");
        let options = [&[accel.as_str()], &SMALL[1..]].concat();
        let broken = Broken::begin(&options, &what);
        let qmp = broken.to.qmp.endpoint().to_string();
        let memory = text(&broken.memory);
        whimbrel(&["rescue", "fill", &qmp, &memory])
            .expect_line(&what, &["the process whose memory it is still has it"]);
        let (mut to, memory, _folder) = broken.kill_source(&what);
        let before = progress(&mut to);
        let filled = whimbrel(&["rescue", "fill", &qmp, &memory]).expect_success(&what);
        assert!(filled.contains("nothing is lost"), "{what}: {filled}");
        to.reaches("completed", &what);
        assert_eq!(to.run_state(), "running", "{what}: it was never stopped");
        until(&what, || progress(&mut to) > before + 20);
        to.expect_healthy(&what);
        let error = whimbrel(&["rescue", "fill", &qmp, &memory]);
        error.expect_line(&what, &["nothing to be rescued"]);
        to.quit(&what);
    }
}

#[test]
fn both_sides_that_live_can_be_kept_and_joined() {
    let what = "both live";
    let mut broken = Broken::begin(&SMALL, what);
    let not_yet = broken.to.qmp.execute("x-rescue", json!({ "file": broken.file("no") }));
    let error = not_yet.expect_err("not paused").to_string();
    assert!(error.contains("nothing to be rescued"), "{error}");
    broken.from.qmp.migrate_pause().expect("it is in postcopy");
    broken.from.reaches("postcopy-paused", what);
    broken.to.reaches("postcopy-paused", what);
    let (source, destination) = (broken.file("source"), broken.file("destination"));
    let from = keep(&broken.from, &source, what);
    assert_eq!((from["side"].as_str(), missing(&from)), (Some("source"), 0), "{from}");
    let to = keep(&broken.to, &destination, what);
    assert!(missing(&to) > 0, "{to}");

    // What is in the wrong place, or not whole, is none of this.
    let whole = broken.file("whole");
    let join = |parts: &[&str]| whimbrel(&[&["rescue", "join"], parts, &["-o", &whole]].concat());
    join(&[&source, &destination]).expect_line(what, &["it is the source's"]);
    join(&[&destination, &destination]).expect_line(what, &["the other part is the source's"]);
    let lacks = format!("{} pages of RAM are in neither part", missing(&to));
    join(&[&destination]).expect_line(what, &[&lacks, "--lost poison"]);
    whimbrel(&["rescue", "roll-back", &destination, "-o", &whole])
        .expect_line(what, &["not what a source process has kept"]);
    whimbrel(&["restore", &destination, "tcp:127.0.0.1:1"])
        .expect_line(what, &["only a part of a VM", "rescue join"]);
    assert!(!Path::new(&whole).exists());

    join(&[&destination, &source]).expect_success(what);
    restore_and_verify(&SMALL, &whole, what);
    // The guest as it was handed over, should the destination's part be gone as well.
    let back = broken.file("back");
    whimbrel(&["rescue", "roll-back", &source, "-o", &back]).expect_success(what);
    restore_and_verify(&SMALL, &back, what);
    expect_quits(broken.from, what);
    expect_quits(broken.to, what);
}

/// Who only keeps a guest keeps what has come of it when its source is gone.
#[test]
fn a_guest_that_was_to_be_kept_comes_back_too() {
    let what = "kept, source killed";
    let folder = folder_in_memory();
    let file = |name: &str| text(&folder.path().join(name));
    let (memory, store, at) = (file("memory"), file("store"), format!("unix:{}", file("socket")));
    let receive = Running::start(&["receive", &at, "--store", &store]);
    assert_eq!(receive.waits_at(), at);
    let in_file = format!("--memory-path={memory}");
    let mut from = VmProcess::source(&[&SMALL[..], &[in_file.as_str()]].concat());
    from.switch_on(&["return-path", "postcopy-ram"]);
    let slow = json!({ "max-bandwidth": SLOW, "max-postcopy-bandwidth": SLOW });
    from.qmp.set_parameters(slow).expect("allowed");
    from.qmp.migrate(&at).expect("it starts");
    from.qmp.migrate_start_postcopy().expect("it is allowed");
    from.reaches("postcopy-active", what);
    until("some of it comes", || {
        let ram = from.qmp.query_migrate().expect("a report").info.ram;
        ram.unwrap_or_default().remaining < 13 << 20
    });
    from.process.kill();
    // It waits for its source, which could come back. A human knows better.
    let mut kill = std::process::Command::new("kill");
    kill.args(["-TERM", &receive.id().to_string()]);
    assert!(run(kill).status.success(), "{what}");
    let part = format!("{store}.part");
    let told = format!("what has come is kept in {part}");
    receive.ended(what).expect_line(what, &["the source has given its guest away", &told]);
    assert!(!Path::new(&store).exists());
    let whole = file("whole");
    whimbrel(&["rescue", "join", &part, &memory, "-o", &whole]).expect_success(what);
    restore_and_verify(&SMALL, &whole, what);
}

#[test]
fn memory_of_which_a_part_is_still_to_come_is_no_part() {
    let what = "a destination's memory";
    let folder = folder_in_memory();
    let file = |name: &str| text(&folder.path().join(name));
    let in_file = |name: &str| format!("--memory-path={}", file(name));
    let (option, description) = (in_file("memory"), file("memory.json"));
    let mut from = VmProcess::source(&SMALL);
    let mut to = VmProcess::start(&[&SMALL[..], &["--incoming=defer", &option]].concat());
    for side in [&mut from, &mut to] {
        side.switch_on(&["return-path", "postcopy-ram"]);
    }
    begin(&mut from, &mut to, SLOW, what);
    assert!(!Path::new(&description).exists(), "its pages are still to come");
    from.qmp.set_parameters(json!({ "max-postcopy-bandwidth": 0 })).expect("allowed");
    to.reaches("completed", what);
    until("it is the guest's memory as a whole", || Path::new(&description).exists());
    to.expect_healthy(what);
    from.quit(what);
    to.quit(what);
}

/// The guest stops where it touches what is lost, and nothing else does.
fn expect_machine_check(vm: &mut VmProcess, what: &str) {
    let mut failure = Value::Null;
    until(&format!("{what}: a machine check"), || {
        failure = vm.execute("x-guest-progress", json!({}))["failure"].take();
        failure.is_string()
    });
    let failure = failure.as_str().expect("a text");
    // A KVM that does the guest's instructions itself may say no more than that it cannot.
    let emulated = what.ends_with("kvm") && failure.contains("the guest stopped at ");
    let told = failure.contains("machine check: the guest touched page ");
    assert!(told || emulated, "{what}: {failure}");
    vm.qmp.stop().expect("stops");
    let check = vm.execute("x-self-check", json!({}));
    assert_eq!(check["passed"], false, "{what}: {check}");
    assert!(check["lost-pages"].as_u64() > Some(0), "{what}: {check}");
    let first = check["first-error"].as_str().unwrap_or_default();
    assert!(first.contains("lost for ever"), "{what}: {check}");
    let error = vm.qmp.execute("x-ram-digest", json!({})).expect_err("it cannot be read");
    assert!(error.to_string().contains("pages of RAM are lost"), "{what}: {error}");
    let error = vm.qmp.migrate("tcp:127.0.0.1:1").expect_err("it cannot be read");
    assert!(error.to_string().contains("RAM are lost: it cannot be migrated"), "{what}: {error}");
}

#[test]
fn pages_that_are_lost_are_given_up_and_a_guest_that_touches_one_stops_there() {
    for accel in accelerators() {
        let what = format!("lost, {accel}");
        let accel = format!("--accel={accel}");
        let options = [&[accel.as_str()], &SMALL[1..]].concat();
        let (mut to, _memory, _folder) = Broken::soon(&options, &what).kill_source(&what);
        let qmp = to.qmp.endpoint().to_string();
        whimbrel(&["rescue", "fill", &qmp])
            .expect_line(&what, &["pages of RAM are in neither part"]);
        assert_eq!(to.status(), "postcopy-paused", "{what}");
        let filled = whimbrel(&["rescue", "fill", &qmp, "--lost=poison"]).expect_success(&what);
        assert!(filled.contains("are lost, and given up"), "{what}: {filled}");
        to.reaches("completed", &what);
        expect_machine_check(&mut to, &what);
        to.quit(&what);
    }
}

#[test]
fn a_vm_with_lost_pages_is_kept_and_restored_without_them() {
    let what = "lost, kept";
    let (to, _memory, folder) = Broken::soon(&SMALL, what).kill_source(what);
    let (part, whole) = (text(&folder.path().join("part")), text(&folder.path().join("whole")));
    let kept = keep(&to, &part, what);
    expect_quits(to, what);
    let join = ["rescue", "join", &part, "-o", &whole, "--lost=poison", "--json"];
    let joined: Value = serde_json::from_str(&whimbrel(&join).expect_success(what)).expect("JSON");
    assert_eq!(joined["lost-pages"], missing(&kept), "{joined}");
    let mut vm = VmProcess::start(&[&SMALL[..], &["--incoming=defer"]].concat());
    vm.switch_on(&["return-path", "postcopy-ram"]);
    let address = vm.listen("tcp:127.0.0.1:0");
    whimbrel(&["restore", &whole, &address, "--postcopy"]).expect_line(what, &["by precopy only"]);
    whimbrel(&["restore", &whole, &address]).expect_success(what);
    vm.reaches("completed", what);
    expect_machine_check(&mut vm, what);
    vm.quit(what);
}

#[test]
fn parts_that_do_not_fit_or_are_damaged_are_refused_by_one_line() {
    let what = "bad parts";
    let (to, memory, folder) = Broken::begin(&SMALL, what).kill_source(what);
    let file = |name: &str| text(&folder.path().join(name));
    let (part, whole) = (file("part"), file("whole"));
    keep(&to, &part, what);
    expect_quits(to, what);
    let refused = |part: &str, memory: &str, text: &str| {
        let ended = whimbrel(&["rescue", "join", part, memory, "-o", &whole]);
        ended.expect_line(what, &[text]);
        assert!(!Path::new(&whole).exists(), "{text}");
    };

    // Another VM of the same make, and one of another.
    for (name, options, text) in [
        ("twin", &SMALL[..3], "it seems to be of another VM"),
        ("other", &["--accel=native", "--memory=32M"], "length of RAM block vm.ram"),
    ] {
        let other = file(name);
        let option = format!("--memory-path={other}");
        let seed = "--workload=uniform,rate=5000,working-set=1M,seed=99";
        let options = [&options[..2], &[seed, "--fill=zero", &option]].concat();
        let mut vm = VmProcess::source(&options);
        vm.qmp.stop().expect("stops");
        vm.process.kill();
        refused(&part, &other, text);
        let unlike = whimbrel(&["rescue", "join", &part, &other, "-o", &whole, "--unlike"]);
        assert_eq!(unlike.status.success(), name == "twin", "{unlike:?}");
        let _ = fs::remove_file(&whole);
    }

    let bytes = fs::read(&part).expect("ours");
    let damaged = file("damaged");
    for len in [0, 3, 4, 100, bytes.len() / 2, bytes.len() - 1] {
        fs::write(&damaged, &bytes[..len]).expect("room");
        refused(&damaged, &memory, "damaged");
    }
    // Anything in the record of what is missing, which is at the end.
    for back in [17, 40, 100, 200] {
        let mut bytes = bytes.clone();
        let at = bytes.len() - back;
        bytes[at] ^= 1;
        fs::write(&damaged, &bytes).expect("room");
        refused(&damaged, &memory, "its record of what is missing");
    }
    refused(&file("nothing"), &memory, "No such file");
    let described = fs::read_to_string(format!("{memory}.json")).expect("ours");
    let id = described.find("\"migration\": \"").expect("it has one") + 14;
    let elsewhere = file("elsewhere");
    fs::hard_link(&memory, &elsewhere).expect("room");
    let other_id = format!("{}{:032x}{}", &described[..id], 7, &described[id + 32..]);
    fs::write(format!("{elsewhere}.json"), other_id).expect("room");
    refused(
        &part,
        &elsewhere,
        "it is of another VM: migration: 00000000000000000000000000000007 here",
    );
    let cut = file("cut");
    fs::copy(format!("{memory}.json"), format!("{cut}.json")).expect("room");
    fs::write(&cut, &fs::read(&memory).expect("ours")[..1 << 20]).expect("room");
    refused(&part, &cut, "and the file has 1048576");
    fs::write(format!("{cut}.json"), "{").expect("room");
    refused(&part, &cut, "it does not describe memory");
    let unknown = file("unknown");
    fs::write(&unknown, [0; 4096]).expect("room");
    refused(&part, &unknown, "it is no part of a VM");
    // A VM does not begin on what may be left of another.
    let option = format!("--memory-path={memory}");
    whimbrel(&["vm", &option, "--accel=native", "--memory=16M"])
        .expect_line(what, &["it may be what is left of a guest"]);
    assert!(whimbrel(&["rescue", "join", &part, &memory, "-o", &whole]).status.success());
}
