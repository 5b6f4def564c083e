//! A guest that runs while pages of its memory are missing: it waits for them, and nobody else does.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod guest;

use std::sync::Arc;
use std::thread::{self, sleep};
use std::time::{Duration, Instant};

use guest::{PAGE, config, destination, make, pause_and_check, run_for_updates};
use whimbrel::Vm;
use whimbrel_ram::{AbsentRam, Received, Split, TargetPage};
use whimbrel_vm::{AccelChoice, Error, ReferenceVm};

/// A guest that has run, and one with its state of whose memory nothing has come; it runs, too.
fn left_behind(accel: AccelChoice) -> Option<(Arc<ReferenceVm>, Arc<ReferenceVm>, AbsentRam)> {
    let config = config(accel, 2, "uniform,working-set=1M");
    let from = match ReferenceVm::new(config.clone()) {
        Err(error @ Error::Kvm { .. }) => {
            eprintln!("skipped: {error}");
            return None;
        }
        other => other.unwrap(),
    };
    from.resume().unwrap();
    run_for_updates(&from, 20);
    pause_and_check(&from);
    let to = destination(&config);
    let received = Arc::new(Received::new(to.ram()));
    let absent = match AbsentRam::watch(to.ram(), received, Split::Whole) {
        Ok(absent) => absent,
        Err(error) => {
            eprintln!("skipped: this host does not let memory be watched: {error}");
            return None;
        }
    };
    // None of its memory is needed for this.
    to.load(from.save().unwrap()).unwrap();
    to.resume().unwrap();
    let mut faults = Vec::new();
    let start = Instant::now();
    while faults.len() < 2 {
        assert!(start.elapsed() < Duration::from_secs(60), "the vCPUs touch nothing: {faults:?}");
        absent.read_faults(&mut faults).unwrap();
        sleep(Duration::from_millis(1));
    }
    Some((from, to, absent))
}

/// All pages come.
fn bring(from: &ReferenceVm, absent: &AbsentRam) {
    let mut page = [0; PAGE];
    for (index, block) in from.ram().blocks() {
        for number in (0..block.target_pages()).map(TargetPage) {
            block.read(number.offset(), &mut page).unwrap();
            absent.place(index, number.offset(), &page).unwrap();
        }
    }
}

#[test]
fn the_guest_alone_waits() {
    for accel in [AccelChoice::Native, AccelChoice::Kvm] {
        let Some((from, to, absent)) = left_behind(accel) else { continue };
        // Whoever asks is told, with no page there.
        assert!(to.running());
        assert_eq!(to.progress(), Default::default());
        assert_eq!(to.writable_pages(), from.writable_pages());
        assert_eq!(to.vcpu_threads().len(), 2);
        assert_eq!((to.failure(), to.workload()), (None, from.workload()));
        bring(&from, &absent);
        run_for_updates(&to, 50);
        absent.finish().unwrap();
        pause_and_check(&to);
        assert!(to.progress().updates >= 50);
    }
}

/// A native vCPU cannot be interrupted while it waits for a page.
#[test]
fn a_pause_that_is_given_up_was_none() {
    let Some((from, to, absent)) = left_behind(AccelChoice::Native) else { return };
    let pausing = to.clone();
    let pauses = thread::Builder::new().name("pauses".into());
    let pausing = pauses.spawn(move || pausing.pause()).unwrap();
    sleep(Duration::from_millis(50));
    assert!(to.running(), "told while the pause waits");
    let error = pausing.join().unwrap().unwrap_err().to_string();
    assert!(error.contains("2 vCPUs did not stop"), "{error}");
    bring(&from, &absent);
    run_for_updates(&to, 50);
    absent.finish().unwrap();
    pause_and_check(&to);
}

#[test]
fn a_vm_that_is_to_end_says_who_still_waits() {
    let Some((from, to, absent)) = left_behind(AccelChoice::Native) else { return };
    assert_eq!(to.halt(Duration::from_millis(50)), 2);
    let error = to.pause().unwrap_err().to_string();
    assert!(error.contains("2 vCPUs did not stop"), "at once: {error}");
    bring(&from, &absent);
    assert_eq!(to.halt(Duration::from_secs(60)), 0);
    drop(absent);
}

#[test]
fn a_vm_that_waits_for_no_page_ends_at_once() {
    let vm = make(&config(AccelChoice::Native, 2, "uniform,rate=1"));
    vm.resume().unwrap();
    assert_eq!(vm.halt(Duration::from_secs(60)), 0);
}
