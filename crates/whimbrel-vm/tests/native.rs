//! The native VM: every workload, a check that can fail, state that moves.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod guest;

use std::thread::sleep;
use std::time::{Duration, Instant};

use guest::{
    PAGE, config, destination, expect_writes_as_said, iterate, make, move_and_go_on,
    pause_and_check, run_for_updates, state,
};
use whimbrel::Vm;
use whimbrel_ram::PageSize;
use whimbrel_vm::{
    Accel, AccelChoice, Config, DirtyKind, Error, Fill, MismatchKind, RAM_NAME, ReferenceVm,
};

const BUSY: [&str; 4] = ["sequential", "uniform", "zipf", "hot-cold"];

fn native(vcpus: u32, workload: &str) -> Config {
    config(AccelChoice::Native, vcpus, workload)
}

/// Offset of a page of the working set: the only ones that hold their number, the seed and a
/// count of zero before the guest has run.
fn page_offset(vm: &ReferenceVm, page: u64) -> u64 {
    let (_, block) = vm.ram().find(RAM_NAME).unwrap();
    let seed = vm.workload().seed;
    let word = |at| block.load_u64(at).unwrap();
    (0..block.len())
        .step_by(PAGE)
        .find(|&at| word(at) == page && word(at + 24) == seed && word(at + 16) > 1 << 32)
        .expect("the page is in memory")
}

#[test]
fn every_workload_passes_its_own_check() {
    for workload in BUSY {
        for vcpus in [1, 2, 8] {
            let vm = make(&native(vcpus, &format!("{workload},seed=5")));
            assert_eq!(vm.accel(), Accel::Native);
            vm.resume().unwrap();
            run_for_updates(&vm, 5000);
            pause_and_check(&vm);
            let check = vm.self_check();
            assert!(check.pages_checked >= check.updates + 1024, "{workload}: {check:?}");
            assert!(check.gap_max > Duration::ZERO);
            // With more vCPUs than cores the first may not have had its turn yet.
            assert!(vcpus > 1 || vm.serial_output() == "whimbrel guest: running\n");
        }
    }
}

#[test]
fn an_idle_guest_changes_nothing() {
    let vm = make(&native(2, "idle"));
    vm.resume().unwrap();
    sleep(Duration::from_millis(20));
    pause_and_check(&vm);
    assert_eq!(vm.self_check().updates, 0);
}

#[test]
fn workloads_choose_as_they_say() {
    let updated = |workload: &str| {
        let vm = make(&native(1, workload));
        vm.resume().unwrap();
        run_for_updates(&vm, 20_000);
        pause_and_check(&vm);
        let (_, block) = vm.ram().find(RAM_NAME).unwrap();
        let mut counts: Vec<u64> =
            (0..1024).map(|page| block.load_u64(page_offset(&vm, page) + 8).unwrap()).collect();
        let total: u64 = counts.iter().sum();
        let first_tenth: u64 = counts[..103].iter().sum();
        counts.sort_unstable();
        let top: u64 = counts[1024 - 16..].iter().sum();
        let share = |part: u64| part * 100 / total;
        (share(first_tenth), share(top), counts[0])
    };
    let (_, top, least) = updated("sequential");
    assert!(top <= 2 && least >= 19, "sequential: {top}% {least}");
    let (first, top, _) = updated("uniform");
    assert!((7..=13).contains(&first) && top <= 4, "uniform: {first}% {top}%");
    let (_, top, least) = updated("zipf");
    // The harmonic numbers: H(16) / H(1024) is 45%.
    assert!((40..=50).contains(&top) && least < 19, "zipf: {top}% {least}");
    let (first, _, _) = updated("hot-cold");
    assert!((87..=93).contains(&first), "hot-cold: {first}%");
}

/// Runs a guest, does something to a page while it is stopped, and tells what the full check
/// and then the guest itself make of it.
fn after(damage: impl Fn(&ReferenceVm, u64, &[u8; PAGE])) -> [MismatchKind; 2] {
    let vm = make(&native(1, "sequential,working-set=256k,seed=3"));
    let (_, block) = vm.ram().find(RAM_NAME).unwrap();
    let offset = page_offset(&vm, 20);
    vm.resume().unwrap();
    run_for_updates(&vm, 500);
    pause_and_check(&vm);
    let mut earlier = [0; PAGE];
    block.read(offset, &mut earlier).unwrap();
    vm.resume().unwrap();
    run_for_updates(&vm, 500);
    pause_and_check(&vm);

    damage(&vm, offset, &earlier);
    let full = vm.self_check();
    assert_eq!(full.errors, 1);
    vm.resume().unwrap();
    run_for_updates(&vm, 500);
    vm.pause().unwrap();
    let own = vm.self_check();
    assert_eq!(own.errors, 1, "{own:?}");
    assert!(vm.serial_output().contains("self-check failed on vcpu 0, page 0000000000000014"));
    let kind = |check: whimbrel_vm::SelfCheck| {
        let error = check.first_error.unwrap();
        assert_eq!((error.vcpu, error.page), (0, 20));
        error.kind
    };
    [kind(full), kind(own)]
}

#[test]
fn a_corrupt_page_is_found() {
    let found = after(|vm, offset, _| {
        let (_, block) = vm.ram().find(RAM_NAME).unwrap();
        let word = block.load_u64(offset + 2048).unwrap();
        block.store_u64(offset + 2048, word ^ 1 << 17).unwrap();
    });
    assert_eq!(found, [MismatchKind::Checksum; 2]);
}

#[test]
fn a_stale_page_is_found() {
    let found = after(|vm, offset, earlier| {
        vm.ram().find(RAM_NAME).unwrap().1.write(offset, earlier).unwrap();
    });
    assert_eq!(found, [MismatchKind::Count; 2]);
}

#[test]
fn a_torn_page_is_found() {
    let found = after(|vm, offset, earlier| {
        vm.ram().find(RAM_NAME).unwrap().1.write(offset + 2048, &earlier[2048..]).unwrap();
    });
    assert_eq!(found, [MismatchKind::Checksum; 2]);
}

#[test]
fn a_lost_page_is_found() {
    let found = after(|vm, offset, _| {
        vm.ram().find(RAM_NAME).unwrap().1.write_zeros(offset, PAGE).unwrap();
    });
    assert_eq!(found, [MismatchKind::Number; 2]);
}

#[test]
fn a_guest_moves_and_goes_on() {
    for workload in BUSY {
        for vcpus in [1, 2, 8] {
            let config = Config { fill: Fill::Random, ..native(vcpus, workload) };
            let (from, to) = (make(&config), destination(&config));
            from.resume().unwrap();
            run_for_updates(&from, 1000);
            pause_and_check(&from);
            move_and_go_on(&from, &to, 1000);
        }
    }
}

#[test]
fn memory_is_filled_from_a_file_over_and_over_again() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("content");
    // No multiple of a page, and shorter than the memory.
    let content: Vec<u8> =
        (0..1_500_000_u32).map(|at| (at.wrapping_mul(0x9e37_79b9) >> 24) as u8).collect();
    std::fs::write(&path, &content).unwrap();
    let filled = |fill| {
        let vm = make(&Config { fill, ..native(1, "idle,working-set=64k") });
        let (_, block) = vm.ram().find(RAM_NAME).unwrap();
        let mut bytes = vec![0; usize::try_from(block.len()).unwrap()];
        block.read(0, &mut bytes).unwrap();
        bytes
    };
    let (guest, found) = (filled(Fill::Zero), filled(Fill::File(path.clone())));
    // The guest itself is where it would be without.
    let rest = guest.iter().rposition(|byte| *byte != 0).unwrap() + 1;
    let rest = rest.next_multiple_of(PAGE);
    assert!(found[..rest] == guest[..rest]);
    assert!(found.len() - rest > content.len(), "no byte of it comes twice");
    let expected = (rest..found.len()).map(|at| content[at % content.len()]);
    assert!(found[rest..].iter().copied().eq(expected));

    std::fs::write(&path, []).unwrap();
    for path in [path, folder.path().join("missing")] {
        let config = Config { fill: Fill::File(path.clone()), ..native(1, "idle,working-set=64k") };
        let error = ReferenceVm::new(config).unwrap_err().to_string();
        assert!(
            error.starts_with(&format!("cannot fill the memory from {}", path.display())),
            "{error}"
        );
    }
}

#[test]
fn state_of_another_moment_is_found() {
    let config = native(1, "uniform");
    let (from, to) = (make(&config), destination(&config));
    from.resume().unwrap();
    run_for_updates(&from, 100);
    from.pause().unwrap();
    let early = from.save().unwrap();
    from.resume().unwrap();
    run_for_updates(&from, 100);
    from.pause().unwrap();
    guest::copy_ram(from.ram(), to.ram());
    to.load(early).unwrap();
    to.resume().unwrap();
    run_for_updates(&to, 10);
    to.pause().unwrap();
    assert_eq!(to.self_check().first_error.unwrap().kind, MismatchKind::Updates);
}

/// Copies by what the log tells, and lets the guest go on where the copy is.
fn follow_the_log(config: &Config) -> bool {
    let from = match ReferenceVm::new(config.clone()) {
        Ok(vm) => vm,
        Err(error @ (Error::DirtyLog { .. } | Error::TooFewHugePages { .. })) => {
            eprintln!("skipped: {error}");
            return false;
        }
        Err(error) => panic!("{error}"),
    };
    let to = destination(config);
    from.resume().unwrap();
    let copied = iterate(&from, &to, 5, 300);
    assert!(copied > 100, "{config:?}: {copied} pages");
    to.load(from.save().unwrap()).unwrap();
    to.resume().unwrap();
    run_for_updates(&to, 500);
    pause_and_check(&to);
    true
}

#[test]
fn the_log_sees_every_write() {
    for workload in BUSY {
        assert!(follow_the_log(&native(2, workload)), "auto always finds a log");
        for dirty in [DirtyKind::PagemapScan, DirtyKind::OwnWrites] {
            follow_the_log(&Config { dirty, ..native(2, workload) });
        }
    }
}

#[test]
fn every_kind_of_memory_does() {
    let config = native(2, "uniform");
    for (page_size, shared) in
        [(PageSize::SIZE_4K, true), (PageSize::SIZE_2M, true), (PageSize::SIZE_2M, false)]
    {
        follow_the_log(&Config { page_size, shared, prefault: true, ..config.clone() });
    }
    let vm = make(&Config { shared: true, ..config });
    assert!(vm.ram().blocks().all(|(_, block)| block.shared_fd().is_some()));
}

#[test]
fn the_gap_holds_the_downtime() {
    let config = native(1, "uniform");
    let (from, to) = (make(&config), destination(&config));
    from.resume().unwrap();
    run_for_updates(&from, 10);
    pause_and_check(&from);
    from.reset_gap();
    assert_eq!(from.self_check().gap_max, Duration::ZERO);
    sleep(Duration::from_millis(150));
    move_and_go_on(&from, &to, 10);
    assert!(to.self_check().gap_max >= Duration::from_millis(150));
}

#[test]
fn what_was_done_on_a_host_is_counted_there() {
    let config = native(2, "uniform,rate=2000");
    let (from, to) = (make(&config), destination(&config));
    assert_eq!((from.progress(), to.progress()), Default::default());
    from.resume().unwrap();
    run_for_updates(&from, 100);
    pause_and_check(&from);
    assert_eq!(from.progress().updates, from.self_check().updates);
    sleep(Duration::from_millis(300));
    move_and_go_on(&from, &to, 100);
    let (here, all) = (to.progress(), to.self_check());
    assert_eq!(from.progress().updates + here.updates, all.updates);
    // Neither guest could have been held up for so long on its own host.
    assert!(all.gap_max >= Duration::from_millis(300));
    assert!(here.gap_max > Duration::ZERO && here.gap_max < all.gap_max, "{here:?}");
}

#[test]
fn a_guest_writes_what_it_is_said_to_write() {
    for workload in BUSY {
        for vcpus in [1, 3] {
            expect_writes_as_said(&native(vcpus, workload));
        }
    }
    expect_writes_as_said(&Config { fill: Fill::Random, ..native(1, "uniform,working-set=64k") });
}

#[test]
fn a_guest_that_is_halted_never_runs_again() {
    let vm = make(&native(2, "uniform"));
    vm.resume().unwrap();
    run_for_updates(&vm, 100);
    assert_eq!(vm.halt(Duration::from_secs(60)), 0);
    let updates = vm.self_check().updates;
    vm.resume().unwrap();
    sleep(Duration::from_millis(20));
    assert_eq!(vm.progress().updates, updates);
}

#[test]
fn a_log_that_is_kvms_is_refused() {
    let error = ReferenceVm::new(Config { dirty: DirtyKind::KvmRing, ..native(1, "idle") });
    let error = error.unwrap_err().to_string();
    assert_eq!(error, "dirty log kvm-ring: is KVM's: take --accel kvm, or another log");
}

#[test]
fn what_was_put_back_shows_again() {
    let vm = make(&native(1, "sequential"));
    let log = vm.dirty_log();
    log.start().unwrap();
    vm.resume().unwrap();
    run_for_updates(&vm, 100);
    vm.pause().unwrap();
    let taken = log.take().unwrap();
    assert!(taken.count() >= 100);
    log.put_back(taken.clone());
    log.stop();
    log.start().unwrap();
    let again = log.take().unwrap();
    let mut both = again.clone();
    both.merge(&taken);
    assert_eq!(both, again);
    log.stop();
}

#[test]
fn a_pause_is_short_and_holds() {
    for workload in ["uniform", "uniform,rate=3", "idle"] {
        let vm = make(&native(2, workload));
        let mut pauses: Vec<Duration> = (0..20)
            .map(|_| {
                vm.resume().unwrap();
                sleep(Duration::from_millis(2));
                let start = Instant::now();
                vm.pause().unwrap();
                start.elapsed()
            })
            .collect();
        pauses.sort_unstable();
        // The shortest: a machine that is shared has its moments, and so have the other tests.
        assert!(pauses[0] < Duration::from_millis(100), "{workload}: {pauses:?}");
        let check = vm.self_check();
        sleep(Duration::from_millis(5));
        assert_eq!(vm.self_check().updates, check.updates);
    }
}

#[test]
fn the_rate_is_kept() {
    let vm = make(&native(2, "uniform,rate=500"));
    vm.resume().unwrap();
    let start = Instant::now();
    sleep(Duration::from_millis(500));
    vm.pause().unwrap();
    let most = 2.0 * 500.0 * start.elapsed().as_secs_f64() + 20.0;
    let updates = vm.self_check().updates;
    assert!(updates >= 250, "{updates}");
    assert!((updates as f64) < most, "{updates} of {most}");
}

#[test]
fn the_throttle_takes_its_share() {
    let vm = make(&native(1, "uniform"));
    let speed = |percent| {
        vm.throttle(percent);
        let before = vm.self_check().updates;
        let start = Instant::now();
        vm.resume().unwrap();
        sleep(Duration::from_millis(400));
        vm.pause().unwrap();
        (vm.self_check().updates - before) as f64 / start.elapsed().as_secs_f64()
    };
    let (full, slow, again) = (speed(0), speed(90), speed(0));
    assert!(slow < full.max(again) * 0.5, "{full} {slow} {again}");
    assert!(slow > 0.0);
    assert!(again > slow, "{full} {slow} {again}");
}

#[test]
fn what_does_not_fit_is_refused_and_nothing_taken() {
    let config = native(2, "uniform");
    let from = make(&config);
    from.resume().unwrap();
    run_for_updates(&from, 10);
    from.pause().unwrap();
    let good = from.save().unwrap();
    let to = destination(&config);
    let refused = |to: &ReferenceVm, change: &dyn Fn(&mut Vec<whimbrel::DeviceState>)| {
        let mut devices = good.clone();
        change(&mut devices);
        to.load(devices).unwrap_err().to_string()
    };
    assert_eq!(
        refused(&to, &|all| all.retain(|device| device.name != "serial")),
        "device serial/0: its state is missing"
    );
    assert_eq!(
        refused(&to, &|all| all.push(all[1].clone())),
        "device vcpu/0: its state is there twice"
    );
    assert_eq!(
        refused(&to, &|all| state(all, "serial").version_id = 2),
        "device serial/0: version 1 expected, found 2"
    );
    assert_eq!(
        refused(&to, &|all| {
            let mut more = all[1].clone();
            more.name = "disk".into();
            all.push(more);
        }),
        "device disk/0: this VM has none such"
    );
    // Every device cut off at every byte.
    for at in 0..good.len() {
        for len in 0..good[at].bytes.len() {
            refused(&to, &|all| all[at].bytes.truncate(len));
        }
    }
    // Bytes turned over at random: an error or a state, no panic.
    let scratch = destination(&config);
    let mut random = 0x1234_5678_9abc_def0u64;
    for _ in 0..5000 {
        let mut devices = good.clone();
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        let pick = usize::try_from(random >> 33).unwrap();
        let device = pick % devices.len();
        let bytes = &mut devices[device].bytes;
        let at = pick / 8 % bytes.len();
        bytes[at] ^= 1 << (pick % 8);
        let _either = scratch.load(devices);
    }
    let three = destination(&native(3, "uniform"));
    let error = refused(&three, &|_| ());
    assert!(error.ends_with("2 vCPUs, this VM 3: start this one with --vcpus 2"), "{error}");
    assert!(to.resume().is_err(), "there is still no guest");
    assert_eq!(to.self_check().updates, 0);

    guest::copy_ram(from.ram(), to.ram());
    to.load(good.clone()).unwrap();
    to.resume().unwrap();
    run_for_updates(&to, 10);
    pause_and_check(&to);
}

#[test]
fn a_destination_takes_the_workload_over() {
    let from = make(&native(2, "zipf,seed=77,working-set=1M,rate=9000"));
    let to = destination(&native(2, "idle"));
    move_and_go_on(&from, &to, 200);
    assert_eq!(to.workload(), from.workload());
}

#[test]
fn state_is_saved_and_loaded_only_while_stopped() {
    let vm = make(&native(1, "uniform"));
    vm.resume().unwrap();
    assert!(vm.save().is_err());
    assert!(vm.load(Vec::new()).is_err());
    vm.pause().unwrap();
    vm.pause().unwrap();
    assert!(vm.save().is_ok());
    vm.resume().unwrap();
    vm.resume().unwrap();
    drop(vm);
}

#[test]
fn one_line_says_what_cannot_be_built() {
    let error = |config: Config| ReferenceVm::new(config).unwrap_err().to_string();
    let config = || native(1, "uniform");
    assert!(error(Config { vcpus: 9, ..config() }).starts_with("9 vCPUs asked for"));
    assert!(error(Config { memory: (16 << 20) + 1, ..config() }).contains("page size 4k"));
    assert!(error(Config { memory: 200 << 30, ..config() }).starts_with("too little memory"));
    let huge = Config { page_size: PageSize::SIZE_1G, ..config() };
    let huge = error(Config { memory: 240 << 30, ..huge });
    assert!(huge.starts_with("too few huge pages: 240G asked for"), "{huge}");
    let too_much = native(1, "uniform,working-set=1G");
    assert!(error(too_much).contains("working set of 1G does not fit into a memory of 16M"));
}
