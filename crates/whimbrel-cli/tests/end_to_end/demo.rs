//! `whimbrel demo`, as the README has it run.

use std::fs;

use serde_json::Value;
use whimbrel_vm::{AccelChoice, Config, ReferenceVm};

use crate::process::{folder, whimbrel};

/// The accelerators of this machine; says which it does without.
pub(crate) fn accelerators() -> Vec<&'static str> {
    match ReferenceVm::new(Config { accel: AccelChoice::Kvm, ..Config::new(8 << 20) }) {
        Ok(_) => vec!["native", "kvm"],
        Err(why) => {
            eprintln!("not run with KVM: {why}");
            vec!["native"]
        }
    }
}

fn demo(options: &[&str]) -> Value {
    demo_in("precopy", options)
}

fn demo_in(mode: &str, options: &[&str]) -> Value {
    let out = whimbrel(&[&["demo", &format!("--mode={mode}"), "--json"], options].concat())
        .expect_success(&format!("demo {options:?}"));
    let mut lines = out.lines();
    let object: Value = serde_json::from_str(lines.next().expect("a line")).expect("JSON");
    assert_eq!(lines.next(), None, "one object: {out}");
    assert_eq!(object["status"], "completed", "{options:?}: {object}");
    assert_eq!(object["verified"], true, "{options:?}: {object}");
    assert_eq!(object["mode"], mode, "{object}");
    object
}

#[test]
fn a_client_goes_on_when_the_primary_was_killed() {
    for channels in ["0", "2"] {
        let options = ["--memory=32M", "--in-step=1000", "--channels", channels];
        let object = demo_in("colo", &options);
        for figure in ["answers-before", "answers-after"] {
            assert!(object[figure].as_u64() > Some(0), "{figure}: {object}");
        }
        assert!(object["x-colo"]["checkpoints"].as_u64() > Some(3), "{object}");
        let stop = &object["x-colo"]["stop-us"];
        assert!(stop["p50"].as_f64() > Some(0.0) && stop["p50"].as_f64() <= stop["p99"].as_f64());
        assert_eq!(object["self-check"]["passed"], true, "{object}");
    }
    whimbrel(&["demo", "--mode=colo", "--accel=kvm"])
        .expect_line("colo on KVM", &["no driver for a network", "--accel native"]);
}

/// A guest whose pages take 0.3 s at the least.
const FOLLOWED: [&str; 5] = [
    "--memory=32M",
    "--fill=random",
    "--workload=uniform,rate=5000",
    "--bandwidth=100M",
    "--warm-up=100",
];

/// The figures of a postcopy are there, and agree with each other.
fn expect_postcopy_figures(object: &Value) {
    let faults = object["faults"].as_u64().expect("a number");
    assert!(faults > 0, "{object}");
    assert_eq!(object["x-faults"]["count"], faults, "{object}");
    let dist = object["postcopy-latency-dist"].as_array().expect("buckets");
    assert_eq!(dist.len(), 24, "{object}");
    assert_eq!(dist.iter().filter_map(Value::as_u64).sum::<u64>(), faults, "{object}");
    let latency = |name: &str| object["fault-latency-us"][name].as_f64().expect(name);
    assert!(latency("mean") > 0.0 && latency("mean") <= latency("max"), "{object}");
    assert!(latency("p50") <= latency("p90") && latency("p90") <= latency("p99"), "{object}");
    assert!(latency("p99") <= latency("max"), "{object}");
    // All of a fault's time is in one of its parts.
    let split = object["fault-split-us"].as_object().expect("parts");
    let parts: f64 = split.values().map(|part| part.as_f64().expect("a number")).sum();
    assert!((parts - latency("mean")).abs() < latency("mean") * 0.1 + 1.0, "{object}");
    assert!(object["postcopy-time"].as_f64() > Some(0.0), "{object}");
    assert!(object["postcopy-blocktime"].is_u64(), "{object}");
    assert!(object["guest-updates-in-postcopy"].is_u64(), "{object}");
    assert!(object["guest-gap-max-us"].as_u64() > Some(0), "{object}");
    let ram = &object["ram"];
    assert_eq!(ram["remaining"], 0, "{object}");
    assert!(ram["postcopy-bytes"].as_u64() > Some(16 << 20), "{object}");
    assert!(ram["postcopy-requests"].as_u64() > Some(0), "{object}");
    // Every page of the guest's memory and its firmware has been compared.
    let pages = |name: &str| object[name].as_u64().expect(name);
    assert_eq!(pages("pages-identical") + pages("pages-written-since"), 8192 + 16, "{object}");
}

#[test]
fn a_guest_that_goes_first_is_followed_by_its_ram() {
    for accel in accelerators() {
        for mode in ["postcopy", "preempt"] {
            let accel_option = format!("--accel={accel}");
            let object = demo_in(mode, &[&FOLLOWED[..], &[&accel_option]].concat());
            expect_postcopy_figures(&object);
            assert_eq!(object["accel"], accel, "{object}");
            let answers = object["x-answers"]["count"].as_u64();
            assert_eq!(answers > Some(0), mode == "preempt", "{object}");
        }
    }
}

#[test]
fn on_many_vcpus_and_after_a_first_pass() {
    for mode in ["postcopy", "preempt"] {
        let vcpus = ["--accel=native", "--vcpus=4"];
        let object = demo_in(mode, &[&FOLLOWED[..], &vcpus].concat());
        expect_postcopy_figures(&object);
        assert_eq!(object["postcopy-vcpu-blocktime"].as_array().map(Vec::len), Some(4));

        let later = ["--accel=native", "--postcopy-after=first-pass"];
        let object = demo_in(mode, &[&FOLLOWED[..], &later].concat());
        assert!(object["ram"]["precopy-bytes"].as_u64() >= Some(32 << 20), "{object}");
        assert!(object["postcopy-time"].as_f64() > Some(0.0), "{object}");
    }
}

#[test]
fn preempt_is_what_it_does_unless_told_otherwise_and_the_report_is_whole() {
    let folder = folder();
    let report = folder.path().join("a&b.html");
    let report_option = format!("--report={}", report.display());
    let native = ["--accel=native", &report_option];
    let out = whimbrel(&[&["demo"], &FOLLOWED[..], &native].concat()).expect_success("demo");
    for part in ["faults by latency", "MB/s over time", "queued", "verified    "] {
        assert!(out.contains(part), "{part}: {out}");
    }
    for line in out.lines() {
        assert!(line.chars().count() <= 80 || line.starts_with("report "), "{line}");
    }
    let html = fs::read_to_string(&report).expect("a report");
    assert!(html.starts_with("<!DOCTYPE html>") && html.ends_with("</html>\n"), "{html}");
    assert!(html.contains("postcopy with preemption") && html.contains(">verified<"), "{html}");
    assert!(html.contains("a&amp;b.html") && !html.contains("a&b.html"), "{html}");
    assert_eq!(html.matches("<svg").count(), 3, "{html}");
    for foreign in ["http", "src=", "href=", "<script", "url(", "@import"] {
        assert!(!html.contains(foreign), "{foreign}: {html}");
    }
}

#[test]
fn a_report_that_cannot_be_written_is_one_line() {
    whimbrel(&["demo", "--json", "--memory=8M", "--accel=native", "--report=/proc/none/a.html"])
        .expect_line("demo", &["cannot write the report /proc/none/a.html: "]);
}

#[test]
fn prints_what_the_design_promises() {
    for accel in accelerators() {
        let object = demo(&["--memory=256M", &format!("--accel={accel}")]);
        assert_eq!(object["mode"], "precopy");
        assert_eq!(object["accel"], accel);
        assert_eq!(object["memory-bytes"], 256 << 20);
        assert_eq!(object["page-size"], 4096);
        for time in ["total-time", "setup-time", "downtime"] {
            assert!(object[time].is_u64(), "{accel}: {time}: {object}");
        }
        let ram = object["ram"].as_object().expect("as query-migrate");
        for field in ["transferred", "remaining", "total", "duplicate", "normal", "mbps"] {
            assert!(ram[field].is_number(), "{accel}: ram {field}: {object}");
        }
        assert_eq!(ram["remaining"], 0, "{object}");
        // The guest's memory and its firmware.
        assert_eq!(ram["total"], (256 << 20) + (64 << 10), "{object}");
        assert!(ram["normal"].as_u64() >= Some(64 << 8), "the working set is not zero: {object}");
    }
}

#[test]
fn every_workload_on_one_and_on_four_vcpus() {
    for accel in accelerators() {
        for (kind, vcpus) in
            [("idle", 1), ("sequential", 4), ("uniform", 4), ("zipf", 1), ("hot-cold", 4)]
        {
            let object = demo(&[
                "--memory=16M",
                "--warm-up=100",
                &format!("--accel={accel}"),
                &format!("--vcpus={vcpus}"),
                &format!("--workload={kind},rate=2000"),
            ]);
            let updates = object["guest-updates"].as_u64();
            assert_eq!(updates > Some(0), kind != "idle", "{object}");
        }
    }
}

/// Huge pages reserved for the time of a test.
struct HugePages {
    before: String,
}

const NR_HUGEPAGES: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages";

impl HugePages {
    fn reserve(more: u64) -> Result<HugePages, String> {
        let read = || fs::read_to_string(NR_HUGEPAGES).map_err(|error| error.to_string());
        let before = read()?;
        let wanted = before.trim().parse::<u64>().map_err(|e| e.to_string())? + more;
        fs::write(NR_HUGEPAGES, wanted.to_string()).map_err(|error| error.to_string())?;
        let held = HugePages { before };
        let now = read()?.trim().parse::<u64>().map_err(|e| e.to_string())?;
        if now < wanted { Err(format!("{now} of {wanted} huge pages")) } else { Ok(held) }
    }
}

impl Drop for HugePages {
    fn drop(&mut self) {
        fs::write(NR_HUGEPAGES, &self.before).expect("put back as they were");
    }
}

#[test]
fn on_huge_pages() {
    // 32 MiB and the firmware, on both sides.
    let held = match HugePages::reserve(2 * (16 + 1)) {
        Ok(held) => held,
        Err(why) => return eprintln!("not run on huge pages: {why}"),
    };
    for accel in accelerators() {
        let accel = format!("--accel={accel}");
        let object = demo(&["--memory=32M", "--page-size=2M", "--warm-up=100", &accel]);
        assert_eq!(object["page-size"], 2 << 20, "{object}");
        for mode in ["postcopy", "preempt"] {
            let huge = ["--page-size=2M", &accel];
            let object = demo_in(mode, &[&FOLLOWED[..], &huge].concat());
            expect_postcopy_figures(&object);
            assert_eq!(object["page-size"], 2 << 20, "{object}");
        }
    }
    drop(held);
}

/// 20000 updates a second over 512 pages, and a link of 2 MB/s.
const TOO_BUSY: [&str; 5] = [
    "--accel=native",
    "--memory=8M",
    "--workload=uniform,rate=20000,working-set=2M",
    "--bandwidth=2M",
    "--downtime-limit=100",
];

#[test]
fn a_guest_faster_than_the_link_converges_through_auto_converge() {
    demo(&TOO_BUSY);
}

#[test]
fn or_it_says_that_it_does_not_and_why() {
    let stubborn = ["demo", "--mode=precopy", "--json", "--no-auto-converge", "--timeout=3"];
    whimbrel(&[&stubborn[..], &TOO_BUSY].concat()).expect_line(
        "demo that cannot converge",
        &["not converged within 3 s", "MB/s", "allow more bandwidth or downtime"],
    );
}
