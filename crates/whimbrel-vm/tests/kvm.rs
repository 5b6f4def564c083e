//! The VM on KVM: the guest's code, its complete state, KVM's dirty logs.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod guest;

use std::sync::Arc;
use std::thread::sleep;
use std::time::{Duration, Instant};

use guest::{
    PAGE, config, copy_ram, destination, expect_writes_as_said, iterate, make, move_and_go_on,
    pause_and_check, run_for_updates, state,
};
use whimbrel::{DeviceState, Vm};
use whimbrel_ram::PageSize;
use whimbrel_vm::{
    Accel, AccelChoice, Config, DirtyKind, Error, MismatchKind, RAM_NAME, ReferenceVm,
};

const BUSY: [&str; 4] = ["sequential", "uniform", "zipf", "hot-cold"];

/// A VM on KVM, or where there is none a line that says why the test is skipped.
fn kvm(vcpus: u32, workload: &str) -> Option<Config> {
    let config = Config { memory: 4 << 20, ..config(AccelChoice::Kvm, vcpus, workload) };
    match ReferenceVm::new(config.clone()) {
        Err(error @ Error::Kvm { .. }) => {
            eprintln!("skipped: {error}");
            None
        }
        Err(error) => panic!("{error}"),
        Ok(_) => Some(config),
    }
}

/// A VM that has run for a while and is stopped.
fn stopped(config: &Config, updates: u64) -> Arc<ReferenceVm> {
    let vm = make(config);
    vm.resume().unwrap();
    run_for_updates(&vm, updates);
    pause_and_check(&vm);
    vm
}

#[test]
fn every_workload_passes_its_own_check() {
    for workload in BUSY {
        for vcpus in [1, 2] {
            let Some(config) = kvm(vcpus, workload) else { return };
            let vm = stopped(&config, 60);
            assert_eq!(vm.accel(), Accel::Kvm);
            let check = vm.self_check();
            assert!(check.updates >= 60 && check.gap_max > Duration::ZERO, "{check:?}");
        }
    }
}

#[test]
fn a_guest_writes_what_it_is_said_to_write() {
    for workload in BUSY {
        let Some(config) = kvm(2, workload) else { return };
        expect_writes_as_said(&config);
    }
}

#[test]
fn auto_takes_kvm_where_it_is() {
    let Some(config) = kvm(1, "idle") else { return };
    let vm = make(&Config { accel: AccelChoice::Auto, ..config });
    assert_eq!(vm.accel(), Accel::Kvm);
}

#[test]
fn eight_vcpus_run_and_say_so() {
    let Some(config) = kvm(8, "uniform") else { return };
    let vm = stopped(&config, 200);
    assert_eq!(vm.serial_output(), "whimbrel guest: running\n");
}

/// The native guest and the one on KVM are two implementations of one thing: on the same
/// orders they leave the same memory, but for what each accelerator keeps there for itself.
#[test]
fn kvm_and_native_guests_do_the_same() {
    for workload in ["sequential,seed=4", "uniform,seed=5", "zipf,seed=6", "hot-cold,seed=7"] {
        let Some(config) = kvm(1, workload) else { return };
        let kvm = stopped(&config, 100);
        let updates = kvm.self_check().updates;
        // Every page of the working set as it is after so many updates of the other guest.
        let expected = native_counts(&Config { accel: AccelChoice::Native, ..config }, updates);
        assert_eq!(counts(&kvm), expected, "{workload}");
    }
}

/// How often each page has been updated: the pages that hold the seed, by their numbers.
fn counts(vm: &ReferenceVm) -> Vec<(u64, u64)> {
    let (_, block) = vm.ram().find(RAM_NAME).unwrap();
    let word = |at| block.load_u64(at).unwrap();
    let seed = vm.workload().seed;
    (0..block.len())
        .step_by(PAGE)
        .filter(|&at| word(at + 24) == seed && word(at + 16) > 1 << 32)
        .map(|at| (word(at), word(at + 8)))
        .collect()
}

/// As `counts`, of a native guest after exactly so many updates.
fn native_counts(config: &Config, updates: u64) -> Vec<(u64, u64)> {
    // Slow enough to be stopped in time; on a miss it is tried again.
    let mut rate = 1000;
    loop {
        let mut config = config.clone();
        config.workload.rate = rate;
        let vm = make(&config);
        while vm.self_check().updates < updates {
            vm.resume().unwrap();
            while vm.self_check().updates < updates {
                std::hint::spin_loop();
            }
            vm.pause().unwrap();
        }
        if vm.self_check().updates == updates {
            return counts(&vm);
        }
        rate = (rate / 2).max(20);
    }
}

#[test]
fn a_guest_moves_and_goes_on() {
    for workload in BUSY {
        let Some(config) = kvm(2, workload) else { return };
        let (from, to) = (stopped(&config, 50), destination(&config));
        move_and_go_on(&from, &to, 50);
        // And once more, now that what came by migration is what moves.
        let third = destination(&config);
        move_and_go_on(&to, &third, 20);
    }
}

#[test]
fn state_survives_to_the_byte() {
    let Some(config) = kvm(2, "uniform") else { return };
    let (from, to) = (stopped(&config, 50), destination(&config));
    copy_ram(from.ram(), to.ram());
    let there = from.save().unwrap();
    to.load(there.clone()).unwrap();
    let here = to.save().unwrap();
    // The clock goes on and so does the TSC in its MSR; all else is as it was.
    for (there, here) in there.iter().zip(&here) {
        assert_eq!((&there.name, there.instance_id), (&here.name, here.instance_id));
        if there.name == "clock" {
            continue;
        }
        let (there, here) = (fields(there), fields(here));
        assert_eq!(there.len(), here.len());
        for ((tag, there), (_, here)) in there.into_iter().zip(here) {
            let differ: Vec<usize> =
                (0..there.len()).filter(|&at| there[at] != here[at]).map(|at| at / 16).collect();
            let msr =
                |&at: &usize| u32::from_le_bytes(there[at * 16..at * 16 + 4].try_into().unwrap());
            if tag == 7 {
                assert!(differ.iter().all(|at| msr(at) == 0x10), "{:x?}", differ.iter().map(msr));
            } else {
                assert_eq!(there, here, "field {tag}");
            }
        }
    }
}

/// A device's fields: tag and bytes.
fn fields(device: &DeviceState) -> Vec<(u16, Vec<u8>)> {
    let (mut rest, mut fields) = (&device.bytes[..], Vec::new());
    while let [t0, t1, l0, l1, l2, l3, more @ ..] = rest {
        let len = u32::from_le_bytes([*l0, *l1, *l2, *l3]) as usize;
        fields.push((u16::from_le_bytes([*t0, *t1]), more[..len].to_vec()));
        rest = &more[len..];
    }
    fields
}

#[test]
fn the_guest_itself_finds_a_bad_page() {
    let Some(config) = kvm(1, "sequential,working-set=64k") else { return };
    let vm = stopped(&config, 40);
    let (_, block) = vm.ram().find(RAM_NAME).unwrap();
    let seed = vm.workload().seed;
    let word = |at| block.load_u64(at).unwrap();
    let bad = (0..block.len())
        .step_by(PAGE)
        .find(|&at| word(at) == 11 && word(at + 24) == seed && word(at + 16) > 1 << 32)
        .unwrap();
    block.store_u64(bad + 3000, word(bad + 3000) ^ 1).unwrap();
    assert_eq!(vm.self_check().first_error.unwrap().kind, MismatchKind::Checksum);
    vm.resume().unwrap();
    run_for_updates(&vm, 40);
    vm.pause().unwrap();
    let check = vm.self_check();
    let error = check.first_error.unwrap();
    assert_eq!((check.errors, error.page, error.kind), (1, 11, MismatchKind::Checksum));
    let said = "self-check failed on vcpu 0, page 000000000000000b, kind 4\n";
    assert!(vm.serial_output().ends_with(said), "{}", vm.serial_output());
}

#[test]
fn a_lost_register_is_found() {
    let Some(config) = kvm(1, "uniform") else { return };
    // (field, where in it, what the guest calls it): r14, and xmm15 in the XSAVE area.
    for (tag, at, kind) in
        [(1, 14 * 8, MismatchKind::Updates), (3, 160 + 15 * 16, MismatchKind::Register)]
    {
        let (from, to) = (stopped(&config, 20), destination(&config));
        copy_ram(from.ram(), to.ram());
        let mut devices = from.save().unwrap();
        let device = state(&mut devices, "vcpu");
        let mut at_byte = 0;
        for (field, bytes) in fields(device) {
            if field == tag {
                device.bytes[at_byte + 6 + at] ^= 1;
            }
            at_byte += 6 + bytes.len();
        }
        to.load(devices).unwrap();
        to.resume().unwrap();
        run_for_updates(&to, 5);
        to.pause().unwrap();
        assert_eq!(to.self_check().first_error.map(|error| error.kind), Some(kind));
    }
}

#[test]
fn every_log_sees_every_write() {
    let Some(config) = kvm(2, "uniform") else { return };
    for dirty in [DirtyKind::Auto, DirtyKind::KvmLog, DirtyKind::KvmRing, DirtyKind::PagemapScan] {
        let config = Config { dirty, ..config.clone() };
        let from = match ReferenceVm::new(config.clone()) {
            Ok(vm) => vm,
            Err(error @ Error::DirtyLog { .. }) => {
                eprintln!("skipped: {error}");
                continue;
            }
            Err(error) => panic!("{error}"),
        };
        let to = destination(&config);
        from.resume().unwrap();
        let copied = iterate(&from, &to, 4, 30);
        // What was updated, and no more than that: not all of memory over and over.
        assert!((60..2000).contains(&copied), "{dirty:?}: {copied} pages");
        to.load(from.save().unwrap()).unwrap();
        to.resume().unwrap();
        run_for_updates(&to, 50);
        pause_and_check(&to);
    }
}

/// More writes than a ring holds between two looks at the log: the vCPU goes on by itself, and
/// nothing that was in the ring is lost. (Where KVM emulates stores each is an entry.)
#[test]
fn a_ring_is_emptied_in_time() {
    let Some(config) = kvm(1, "sequential,working-set=2M") else { return };
    let config = Config { dirty: DirtyKind::KvmRing, ..config };
    let from = match ReferenceVm::new(config.clone()) {
        Ok(vm) => vm,
        Err(error @ Error::DirtyLog { .. }) => return eprintln!("skipped: {error}"),
        Err(error) => panic!("{error}"),
    };
    let to = destination(&config);
    from.resume().unwrap();
    let copied = iterate(&from, &to, 1, 300);
    assert!(copied > 300, "{copied}");
    pause_and_check(&from);
}

#[test]
fn huge_and_shared_pages_do_as_well() {
    let Some(config) = kvm(2, "uniform") else { return };
    for (page_size, shared) in [(PageSize::SIZE_2M, false), (PageSize::SIZE_4K, true)] {
        let config = Config { page_size, shared, prefault: true, ..config.clone() };
        // As many as are needed for both, or neither: others take and give such pages meanwhile.
        let both = ReferenceVm::new(config.clone()).and_then(|from| {
            Ok((from, ReferenceVm::new(Config { incoming: true, ..config.clone() })?))
        });
        let (from, to) = match both {
            Ok(both) => both,
            Err(error @ Error::TooFewHugePages { .. }) => {
                eprintln!("skipped: {error}");
                continue;
            }
            Err(error) => panic!("{error}"),
        };
        from.resume().unwrap();
        iterate(&from, &to, 2, 20);
        move_and_go_on(&from, &to, 20);
    }
}

#[test]
fn a_pause_is_short_and_holds() {
    for workload in ["uniform", "uniform,rate=3", "idle"] {
        let Some(config) = kvm(2, workload) else { return };
        let vm = make(&config);
        let mut pauses: Vec<Duration> = (0..20)
            .map(|_| {
                vm.resume().unwrap();
                sleep(Duration::from_millis(5));
                let start = Instant::now();
                vm.pause().unwrap();
                start.elapsed()
            })
            .collect();
        pauses.sort_unstable();
        assert!(pauses[0] < Duration::from_millis(100), "{workload}: {pauses:?}");
        assert_eq!(vm.failure(), None);
        let before = vm.self_check();
        assert!(before.passed(), "{before:?}");
        sleep(Duration::from_millis(20));
        assert_eq!(vm.self_check(), before);
    }
}

#[test]
fn the_throttle_takes_its_share() {
    let Some(config) = kvm(1, "uniform") else { return };
    let vm = make(&config);
    let speed = |percent| {
        vm.throttle(percent);
        let before = vm.self_check().updates;
        let start = Instant::now();
        vm.resume().unwrap();
        sleep(Duration::from_millis(500));
        vm.pause().unwrap();
        (vm.self_check().updates - before) as f64 / start.elapsed().as_secs_f64()
    };
    let (full, slow, again) = (speed(0), speed(90), speed(0));
    assert!(slow < full.max(again) * 0.5, "{full} {slow} {again}");
}

#[test]
fn bad_state_is_refused_and_nothing_taken() {
    let Some(config) = kvm(1, "uniform") else { return };
    let (from, to) = (stopped(&config, 20), destination(&config));
    let good = from.save().unwrap();
    let refused = |change: &dyn Fn(&mut Vec<DeviceState>)| {
        let mut devices = good.clone();
        change(&mut devices);
        to.load(devices).unwrap_err().to_string()
    };
    let vcpu = good.iter().position(|device| device.name == "vcpu").unwrap();
    for len in (0..good[vcpu].bytes.len()).step_by(97) {
        refused(&|all| all[vcpu].bytes.truncate(len));
    }
    assert_eq!(
        refused(&|all| all[vcpu].bytes[2..6].copy_from_slice(&u32::MAX.to_le_bytes())),
        "device vcpu/0: the field at byte 0 is cut off"
    );
    // What only the kernel refuses: control registers that contradict each other.
    let fresh = to.machine();
    let error = refused(&|all| {
        let mut at = 0;
        for (tag, bytes) in fields(&all[vcpu]) {
            if tag == 2 {
                // CR0 with paging but without protection.
                let cr0 = at + 6 + 8 * 24 + 2 * 16;
                all[vcpu].bytes[cr0] &= !1;
            }
            at += 6 + bytes.len();
        }
    });
    assert!(error.starts_with("device vcpu/0: KVM_SET_SREGS"), "{error}");
    let native = destination(&Config { accel: AccelChoice::Native, ..config.clone() });
    let error = native.load(good.clone()).unwrap_err().to_string();
    assert!(error.contains("runs on accelerator \"kvm\", this VM on \"native\""), "{error}");

    assert_eq!(to.machine(), fresh);
    copy_ram(from.ram(), to.ram());
    to.load(good.clone()).unwrap();
    to.resume().unwrap();
    run_for_updates(&to, 20);
    pause_and_check(&to);
}

#[test]
fn the_serial_port_keeps_its_registers() {
    let Some(config) = kvm(1, "uniform") else { return };
    let (from, to) = (stopped(&config, 20), destination(&config));
    move_and_go_on(&from, &to, 10);
    let of = |vm: &ReferenceVm| state(&mut vm.save().unwrap(), "serial").clone();
    assert_eq!(of(&from), of(&to));
    // It said so on the host it started on, and only there.
    assert_eq!(to.serial_output(), "");
}
