//! `whimbrel demo`, as the README has it run.

use std::fs;

use serde_json::Value;
use whimbrel_vm::{AccelChoice, Config, ReferenceVm};

use crate::process::whimbrel;

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
    let out = whimbrel(&[&["demo", "--mode=precopy", "--json"], options].concat())
        .expect_success(&format!("demo {options:?}"));
    let mut lines = out.lines();
    let object: Value = serde_json::from_str(lines.next().expect("a line")).expect("JSON");
    assert_eq!(lines.next(), None, "one object: {out}");
    assert_eq!(object["status"], "completed", "{options:?}: {object}");
    assert_eq!(object["verified"], true, "{options:?}: {object}");
    assert!(object["guest-updates"].is_u64(), "{object}");
    object
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
        let object =
            demo(&["--memory=32M", "--page-size=2M", "--warm-up=100", &format!("--accel={accel}")]);
        assert_eq!(object["page-size"], 2 << 20, "{object}");
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
    let stubborn = ["demo", "--json", "--no-auto-converge", "--timeout=3"];
    whimbrel(&[&stubborn[..], &TOO_BUSY].concat()).expect_line(
        "demo that cannot converge",
        &["not converged within 3 s", "MB/s", "allow more bandwidth or downtime"],
    );
}
