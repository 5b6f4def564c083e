//! The VM on KVM.
mod guest;
use guest::*;
use std::time::{Duration, Instant};
use whimbrel::Vm;
use whimbrel_vm::AccelChoice;
#[test]
fn speed() {
    for (n, w) in [(1, "uniform"), (2, "uniform"), (1, "zipf")] {
        let vm = make(&config(AccelChoice::Kvm, n, w));
        vm.resume().unwrap();
        std::thread::sleep(Duration::from_secs(2));
        let t = Instant::now();
        vm.pause().unwrap();
        println!(
            "{n} {w} pause {:?} {:?} {:?} fail {:?}",
            t.elapsed(),
            vm.self_check(),
            vm.serial_output(),
            vm.failure()
        );
        let s = vm.save().unwrap();
        for d in &s {
            println!("{} {}", d.name, d.bytes.len());
        }
    }
}
