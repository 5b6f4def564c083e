//! What the tests of every accelerator do to a VM.

#![allow(
    dead_code,
    clippy::allow_attributes,
    reason = "each test binary uses the part it needs of what they share"
)]

use std::sync::Arc;
use std::thread::sleep;
use std::time::{Duration, Instant};

use whimbrel::{DeviceState, Vm};
use whimbrel_ram::dirty::DirtyBits;
use whimbrel_ram::{GuestRam, TARGET_PAGE, TargetPage};
use whimbrel_vm::{AccelChoice, Config, ReferenceVm};

pub(crate) const PAGE: usize = TARGET_PAGE.bytes();

/// A small VM with that workload.
pub(crate) fn config(accel: AccelChoice, vcpus: u32, workload: &str) -> Config {
    let workload = workload.parse().expect("a workload");
    Config { vcpus, accel, workload, ..Config::new(16 << 20) }
}

pub(crate) fn make(config: &Config) -> Arc<ReferenceVm> {
    ReferenceVm::new(config.clone()).expect("a VM")
}

/// Waits until the guest has done `updates` more.
pub(crate) fn run_for_updates(vm: &ReferenceVm, updates: u64) {
    let wanted = vm.guest_counters().updates + updates;
    let start = Instant::now();
    while vm.guest_counters().updates < wanted {
        assert_eq!(vm.failure(), None);
        let done = vm.guest_counters().updates;
        assert!(
            start.elapsed() < Duration::from_secs(60),
            "{done} of {wanted} updates in a minute"
        );
        sleep(Duration::from_millis(1));
    }
}

/// Stops the guest and checks all of its memory.
pub(crate) fn pause_and_check(vm: &ReferenceVm) {
    vm.pause().expect("pauses");
    let check = vm.self_check();
    assert!(check.passed(), "{:?}: {}", check.first_error, vm.serial_output());
}

/// A guest changes the pages that it is said to write, all kinds of them, and no others.
pub(crate) fn expect_writes_as_said(config: &Config) {
    let vm = make(config);
    vm.resume().expect("resumes");
    run_for_updates(&vm, 50);
    pause_and_check(&vm);
    let digests = |vm: &ReferenceVm| -> Vec<(String, Vec<u64>)> {
        let all = vm.ram().blocks();
        all.map(|(_, block)| (block.name().to_owned(), block.page_digests().collect())).collect()
    };
    let before = digests(&vm);
    vm.resume().expect("resumes");
    run_for_updates(&vm, 50);
    pause_and_check(&vm);
    let said = vm.writable_pages();
    let mut written = vec![0; said.len()];
    for ((block, before), (_, after)) in before.iter().zip(&digests(&vm)) {
        for (page, _) in (0..).zip(before.iter().zip(after)).filter(|(_, (one, two))| one != two) {
            let kind = said.iter().position(|s| s.block == block && s.pages.contains(&page));
            written[kind.unwrap_or_else(|| panic!("{config:?}: {block}, page {page}"))] += 1;
        }
    }
    assert!(written.iter().all(|&pages| pages > 0), "{config:?}: {said:?}: {written:?}");
}

/// The other end of a migration that copies memory within this process.
pub(crate) fn destination(config: &Config) -> Arc<ReferenceVm> {
    make(&Config { incoming: true, ..config.clone() })
}

/// Copies every page of `from`.
pub(crate) fn copy_ram(from: &GuestRam, to: &GuestRam) {
    let mut bits = DirtyBits::none(from);
    for (index, block) in from.blocks() {
        bits.insert(index, TargetPage(0), block.target_pages());
    }
    copy_pages(from, to, &bits);
}

/// Copies the pages of `from` that are in `bits`.
pub(crate) fn copy_pages(from: &GuestRam, to: &GuestRam, bits: &DirtyBits) {
    let mut page = [0; PAGE];
    for (index, block) in from.blocks() {
        for number in pages(bits.words(index)) {
            block.read(number.offset(), &mut page).expect("inside");
            to.block(index).write(number.offset(), &page).expect("inside");
        }
    }
}

pub(crate) fn pages(words: &[u64]) -> impl Iterator<Item = TargetPage> {
    let bits = |(at, word): (usize, &u64)| {
        let word = *word;
        (0..64)
            .filter(move |bit| word >> bit & 1 == 1)
            .map(move |bit| TargetPage(at as u64 * 64 + bit))
    };
    words.iter().enumerate().flat_map(bits)
}

/// The first page that differs.
pub(crate) fn first_difference(a: &GuestRam, b: &GuestRam) -> Option<(String, u64)> {
    let (mut one, mut other) = ([0; PAGE], [0; PAGE]);
    for (index, block) in a.blocks() {
        for page in (0..block.target_pages()).map(TargetPage) {
            block.read(page.offset(), &mut one).expect("inside");
            b.block(index).read(page.offset(), &mut other).expect("inside");
            if one != other {
                return Some((block.name().to_owned(), page.0));
            }
        }
    }
    None
}

/// Moves a stopped guest, lets it run on the other end and checks it there.
pub(crate) fn move_and_go_on(from: &ReferenceVm, to: &ReferenceVm, updates: u64) {
    copy_ram(from.ram(), to.ram());
    to.load(from.save().expect("saves")).expect("loads");
    let (before, after) = (from.self_check(), to.self_check());
    assert_eq!((before.updates, before.errors), (after.updates, after.errors));
    assert!(after.passed(), "{:?}", after.first_error);
    to.resume().expect("resumes");
    run_for_updates(to, updates);
    pause_and_check(to);
    assert!(to.self_check().updates >= before.updates + updates);
}

/// Copies only what the log says was written, in rounds while the guest runs and once more when
/// it is stopped: memory must be identical then. Gives the pages copied while it ran.
pub(crate) fn iterate(from: &ReferenceVm, to: &ReferenceVm, rounds: usize, updates: u64) -> u64 {
    let log = from.dirty_log();
    log.start().expect("starts");
    copy_ram(from.ram(), to.ram());
    let mut copied = 0;
    for round in 0..=rounds {
        if round == rounds {
            from.pause().expect("pauses");
        } else {
            run_for_updates(from, updates);
        }
        let bits = log.take().expect("takes");
        for (index, _) in from.ram().blocks() {
            for page in pages(bits.words(index)) {
                log.rearm(index, page, 1).expect("rearms");
            }
        }
        copy_pages(from.ram(), to.ram(), &bits);
        copied += bits.count();
    }
    log.stop();
    assert_eq!(first_difference(from.ram(), to.ram()), None);
    copied
}

/// The state of one device.
pub(crate) fn state<'a>(devices: &'a mut [DeviceState], name: &str) -> &'a mut DeviceState {
    devices.iter_mut().find(|device| device.name == name).expect("the device is there")
}
