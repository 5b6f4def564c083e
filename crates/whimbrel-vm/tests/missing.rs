//! A guest that runs while pages of its memory are missing: it waits for them, and nobody else does.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod guest;

use std::ops::Range;
use std::sync::Arc;
use std::thread::sleep;
use std::time::{Duration, Instant};

use guest::{PAGE, config, destination, make, pause_and_check, run_for_updates};
use whimbrel::Vm;
use whimbrel_ram::{AbsentRam, Received, Split, TargetPage};
use whimbrel_vm::{AccelChoice, Error, RAM_NAME, ReferenceVm, WritableKind};

/// What of a guest's memory is missing.
#[derive(Clone, Copy, PartialEq)]
enum Missing {
    All,
    /// What KVM itself reads is there, such as the guest's page tables: where it does in software
    /// what a processor does otherwise, nobody wakes it from waiting for them.
    WorkingSet,
}

/// A guest that has run, and one with its state of whose memory `missing` has not come; it runs, too.
fn left_behind(
    accel: AccelChoice,
    missing: Missing,
) -> Option<(Arc<ReferenceVm>, Arc<ReferenceVm>, AbsentRam)> {
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
    if missing == Missing::WorkingSet {
        let mut page = [0; PAGE];
        for (index, block) in from.ram().blocks() {
            let missing = working_set(&from, block.name());
            for number in (0..block.target_pages()).filter(|page| !missing.contains(page)) {
                let page_at = TargetPage(number);
                block.read(page_at.offset(), &mut page).unwrap();
                to.ram().block(index).write(page_at.offset(), &page).unwrap();
                received.set(index, page_at);
            }
        }
    }
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

/// The pages of a block that are the working set.
fn working_set(vm: &ReferenceVm, block: &str) -> Range<u64> {
    let all = vm.writable_pages();
    let found = all.into_iter().find(|it| it.kind == WritableKind::WorkingSet && it.block == block);
    found.map_or(0..0, |it| it.pages)
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
        let Some((from, to, absent)) = left_behind(accel, Missing::All) else { continue };
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

/// A vCPU that waits for a page stops all the same, and waits for it again when it runs on.
#[test]
fn a_pause_does_not_wait_for_missing_pages() {
    for accel in [AccelChoice::Native, AccelChoice::Kvm] {
        let Some((from, to, absent)) = left_behind(accel, Missing::WorkingSet) else { continue };
        let mut first = None;
        for _ in 0..3 {
            match to.pause() {
                Err(error) if accel == AccelChoice::Kvm => {
                    // One that does the guest's instructions itself waits as a whole.
                    assert!(error.to_string().contains("2 vCPUs did not stop"), "{error}");
                    return eprintln!("skipped: this KVM cannot be woken from waiting for a page");
                }
                other => other.unwrap(),
            }
            assert!(!to.running());
            if accel == AccelChoice::Native {
                // Whatever it had begun of an update is taken back.
                let stands = to.save().unwrap();
                assert_eq!(*first.get_or_insert_with(|| stands.clone()), stands);
            }
            to.resume().unwrap();
            sleep(Duration::from_millis(20));
            assert_eq!((to.progress().updates, to.failure()), (0, None));
        }
        bring(&from, &absent);
        run_for_updates(&to, 50);
        absent.finish().unwrap();
        pause_and_check(&to);
    }
}

#[test]
fn a_vm_that_is_to_end_waits_for_no_page() {
    let Some((_from, to, absent)) = left_behind(AccelChoice::Native, Missing::All) else { return };
    assert_eq!(to.halt(Duration::from_secs(60)), 0);
    drop((to, absent));
}

/// Where a vCPU cannot be woken from that.
#[test]
fn a_vm_that_is_to_end_says_who_still_waits() {
    let Some((from, to, absent)) = left_behind(AccelChoice::Kvm, Missing::All) else { return };
    let waiting = to.halt(Duration::from_millis(50));
    bring(&from, &absent);
    assert_eq!(to.halt(Duration::from_secs(60)), 0, "with the pages, if not before: {waiting}");
    drop(absent);
}

/// A guest whose memory is lost takes a machine check; the VMM goes on.
#[test]
fn a_guest_that_touches_what_is_lost_stops_there_and_the_vmm_does_not() {
    for accel in [AccelChoice::Native, AccelChoice::Kvm] {
        let Some((_from, to, absent)) = left_behind(accel, Missing::WorkingSet) else { continue };
        let (index, block) = to.ram().find(RAM_NAME).unwrap();
        let pages = working_set(&to, block.name());
        let (offset, len) = (pages.start * 4096, (pages.end - pages.start) * 4096);
        if let Err(error) = absent.poison(index, offset, len) {
            return eprintln!("skipped: {error}");
        }
        let start = Instant::now();
        while to.failure().is_none() {
            assert!(start.elapsed() < Duration::from_secs(60), "it goes on");
            sleep(Duration::from_millis(1));
        }
        let failure = to.failure().unwrap();
        // A KVM that does the guest's instructions itself may say no more than that it cannot.
        let emulated = accel == AccelChoice::Kvm && failure.contains("the guest stopped at ");
        let told = failure.contains("machine check: the guest touched page ");
        assert!(told || emulated, "{failure}");
        assert_eq!(to.progress().updates, 0);
        to.pause().unwrap();
        let error = to.resume().unwrap_err().to_string();
        assert_eq!(error, failure, "it does not run again");
    }
}

#[test]
fn a_vm_that_waits_for_no_page_ends_at_once() {
    let vm = make(&config(AccelChoice::Native, 2, "uniform,rate=1"));
    vm.resume().unwrap();
    assert_eq!(vm.halt(Duration::from_secs(60)), 0);
}
