//! A VM's threads have names, and nothing of a VM is left when it is gone. A test binary of its
//! own, with one test: it looks at all of its process.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod guest;

use std::fs;

use guest::{config, run_for_updates};
use whimbrel::Vm;
use whimbrel_vm::{AccelChoice, Error, ReferenceVm};

fn vcpu_threads() -> Vec<String> {
    let tasks = fs::read_dir("/proc/self/task").unwrap();
    let names = tasks.filter_map(|task| fs::read_to_string(task.ok()?.path().join("comm")).ok());
    let mut names: Vec<String> =
        names.map(|name| name.trim().to_owned()).filter(|name| name.starts_with("vcpu-")).collect();
    names.sort();
    names
}

fn name_of(thread: u32) -> String {
    let name = fs::read_to_string(format!("/proc/self/task/{thread}/comm")).unwrap();
    name.trim().to_owned()
}

fn open_files() -> usize {
    fs::read_dir("/proc/self/fd").unwrap().count()
}

#[test]
fn nothing_is_left_of_a_vm() {
    for accel in [AccelChoice::Native, AccelChoice::Kvm] {
        for workload in ["uniform", "uniform,rate=2", "idle"] {
            let files = open_files();
            let vm = match ReferenceVm::new(config(accel, 3, workload)) {
                Ok(vm) => vm,
                Err(error @ Error::Kvm { .. }) => {
                    eprintln!("skipped: {error}");
                    return;
                }
                Err(error) => panic!("{error}"),
            };
            vm.dirty_log().start().unwrap();
            vm.resume().unwrap();
            if workload == "uniform" {
                run_for_updates(&vm, 20);
            }
            assert_eq!(vcpu_threads(), ["vcpu-0", "vcpu-1", "vcpu-2"]);
            let names = vm.vcpu_threads().into_iter().map(name_of);
            assert_eq!(names.collect::<Vec<_>>(), ["vcpu-0", "vcpu-1", "vcpu-2"], "in their order");
            // While it runs.
            drop(vm);
            assert!(vcpu_threads().is_empty(), "{accel:?} {workload}");
            assert_eq!(open_files(), files, "{accel:?} {workload}");
        }
    }
}
