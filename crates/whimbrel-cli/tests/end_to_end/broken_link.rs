//! A link that really breaks: two VMs in network namespaces of their own, between which a cable is
//! pulled.

use std::process::Command;
use std::thread::sleep;
use std::time::Duration;

use serde_json::{Value, json};

use crate::process::VmProcess;

/// Slow enough that the guest's pages are not through before the cable has been pulled ten times.
const RATE: u64 = 3 << 20;

/// Two hosts and a cable; gone when this is dropped.
struct Cable {
    hosts: [String; 2],
}

/// The hosts' ends of the cable, and the destination's address on it.
const ENDS: [&str; 2] = ["192.0.2.1/30", "192.0.2.2/30"];
const DESTINATION: &str = "192.0.2.2";

impl Cable {
    /// `None`, with a line that says why, where no namespaces are to be had.
    fn lay(name: &str) -> Option<Cable> {
        let unique = format!("whimbrel-{}-{name}", std::process::id());
        let hosts = ["source", "destination"].map(|role| format!("{unique}-{role}"));
        if let Err(why) = ip(&format!("netns add {}", hosts[0])) {
            eprintln!("not run with a cable that is pulled: {why}");
            return None;
        }
        let cable = Cable { hosts };
        let [here, there] = &cable.hosts;
        ip(&format!("netns add {there}")).expect("as the first");
        ip(&format!("-n {here} link add cable type veth peer name cable netns {there}"))
            .expect("a cable");
        for (host, address) in cable.hosts.iter().zip(ENDS) {
            for what in
                ["link set lo up", &format!("address add {address} dev cable"), "link set cable up"]
            {
                ip(&format!("-n {host} {what}")).expect(what);
            }
        }
        Some(cable)
    }

    /// A command for one of the hosts.
    fn at(&self, host: usize) -> Vec<String> {
        ["ip", "netns", "exec", &self.hosts[host]].map(str::to_owned).to_vec()
    }

    fn pull(&self, host: usize) {
        ip(&format!("-n {} link set cable down", self.hosts[host])).expect("a cable");
    }

    fn plug_in(&self, host: usize) {
        ip(&format!("-n {} link set cable up", self.hosts[host])).expect("a cable");
    }
}

impl Drop for Cable {
    fn drop(&mut self) {
        for host in &self.hosts {
            // One that was never made cannot be removed.
            let _ = ip(&format!("netns delete {host}"));
        }
    }
}

pub(crate) fn ip(arguments: &str) -> Result<(), String> {
    let mut command = Command::new("ip");
    command.args(arguments.split_whitespace());
    match command.output() {
        Ok(output) if output.status.success() => Ok(()),
        Ok(output) => Err(String::from_utf8_lossy(&output.stderr).trim().to_owned()),
        Err(error) => Err(format!("'ip' (iproute2): {error}")),
    }
}

/// A guest that is busy all the time.
const BUSY: [&str; 4] = [
    "--accel=native",
    "--memory=64M",
    "--workload=zipf,rate=3000,working-set=48M",
    "--fill=random",
];

/// Pages that nobody writes but the guest, of which it says which it may: all others are the same
/// on both sides.
fn expect_same_pages(from: &mut VmProcess, to: &mut VmProcess, what: &str) {
    let folder = crate::process::folder();
    let digests = ["here", "there"].map(|name| folder.path().join(name));
    let mut blocks = Value::Null;
    for (vm, file) in [&mut *from, &mut *to].into_iter().zip(&digests) {
        blocks = vm.execute("x-ram-digest", json!({ "file": file }))["blocks"].take();
    }
    let [here, there] = digests.map(|file| std::fs::read(file).expect("digests"));
    assert_eq!(here.len(), there.len(), "{what}");
    let info = from.execute("x-vm-info", json!({}));
    let writable = info["writable-pages"].as_array().expect("ranges");
    let may_write = |block: &Value, page: u64| {
        writable.iter().any(|range| {
            let first = range["first"].as_u64().expect("a page");
            let pages = range["pages"].as_u64().expect("a number");
            range["block"] == *block && (first..first + pages).contains(&page)
        })
    };
    let (mut at, mut compared) = (0, 0);
    for block in blocks.as_array().expect("blocks") {
        for page in 0..block["pages"].as_u64().expect("a number") {
            let digest = at..at + 8;
            at += 8;
            if !may_write(&block["name"], page) {
                compared += 1;
                let (here, there) = (&here[digest.clone()], &there[digest]);
                assert_eq!(here, there, "{what}: page {page} of {}", block["name"]);
            }
        }
    }
    assert_eq!(at, here.len(), "{what}");
    assert!(compared > 1000, "{what}: {compared} pages are nobody's");
}

/// The states that a side has been in since it was asked last.
fn states(vm: &mut VmProcess) -> Vec<String> {
    let mut seen = Vec::new();
    while let Some(event) = vm.qmp.next_event(Duration::ZERO).expect("events") {
        seen.extend(event.migration_status().map(|status| status.name().to_owned()));
    }
    seen
}

/// Ten times, for a moment that TCP gets over and for one in which both sides give the link up, at
/// either end, nobody does anything about it, and the guest arrives whole.
#[test]
fn a_cable_that_is_pulled_ten_times_costs_time_and_nothing_else() {
    for preempt in [true, false] {
        let what = format!("a cable, preempt {preempt}");
        let Some(cable) = Cable::lay(if preempt { "preempt" } else { "plain" }) else { return };
        let options = [&BUSY[..], &["--silence-limit=400"]].concat();
        let mut from = VmProcess::within(&cable.at(0), &options);
        let mut to =
            VmProcess::within(&cable.at(1), &[&options[..], &["--incoming=defer"]].concat());
        from.expect_progress(&what);
        for side in [&mut from, &mut to] {
            side.switch_on(&["events", "return-path", "postcopy-ram"]);
            if preempt {
                side.switch_on(&["postcopy-preempt"]);
            }
        }
        let rates = json!({ "max-bandwidth": RATE, "max-postcopy-bandwidth": RATE });
        from.qmp.set_parameters(rates).expect("allowed");
        to.qmp.migrate_incoming(&format!("tcp:{DESTINATION}:4444")).expect("it waits");
        from.qmp.migrate(&format!("tcp:{DESTINATION}:4444")).expect("it starts");
        from.qmp.migrate_start_postcopy().expect("it is allowed");
        from.reaches("postcopy-active", &what);
        to.reaches("postcopy-active", &what);
        states(&mut from);

        for round in 0..10 {
            let (end, long) = (round % 2, round % 3 == 0);
            sleep(Duration::from_millis(150));
            cable.pull(end);
            if long {
                from.reaches("postcopy-paused", &format!("{what}, round {round}"));
            } else {
                sleep(Duration::from_millis(100));
            }
            cable.plug_in(end);
            if long {
                from.reaches("postcopy-active", &format!("{what}, round {round}"));
                to.reaches("postcopy-active", &format!("{what}, round {round}"));
            }
        }
        let seen = states(&mut from);
        let paused = seen.iter().filter(|state| *state == "postcopy-paused").count();
        assert!(paused >= 4, "{what}: {seen:?}");
        assert!(!seen.iter().any(|state| state == "completed"), "{what}: too early: {seen:?}");
        from.qmp.set_parameters(json!({ "max-postcopy-bandwidth": 0 })).expect("allowed");
        from.reaches("completed", &what);
        to.reaches("completed", &what);
        to.expect_healthy(&what);
        to.qmp.stop().expect("stops");
        expect_same_pages(&mut from, &mut to, &what);
        from.quit(&what);
        to.quit(&what);
    }
}
