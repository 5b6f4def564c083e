//! Capability `validate-uuid`: a guest only goes to the VM that is meant.

#[path = "support/vms.rs"]
mod vms;

use vms::Side;
use whimbrel::{Capability, MigrationStatus};
use whimbrel_vm::{AccelChoice, Config};

/// Migrates between VMs of these UUIDs; says why that failed, if it did.
fn migrate(here: u8, there: u8, validate: bool) -> Option<String> {
    let config = |uuid| Config {
        accel: AccelChoice::Native,
        workload: "uniform,rate=20000".parse().expect("a workload"),
        uuid: Some([uuid; 16]),
        ..Config::new(8 << 20)
    };
    let source = Side::running(&config(here));
    let destination = Side::waiting(&config(there), true);
    for side in [&source, &destination] {
        side.switch_on(&[Capability::ReturnPath]);
        if validate {
            side.switch_on(&[Capability::ValidateUuid]);
        }
    }
    let address = destination.listen("tcp:127.0.0.1:0");
    source.migrator.migrate(address).expect("it starts");
    let (from, to) = (source.ended("uuid"), destination.ended("uuid"));
    assert_eq!(from.status, to.status);
    let moved = to.status == Some(MigrationStatus::Completed);
    if moved { &destination } else { &source }.expect_healthy("uuid");
    to.error_desc
}

#[test]
fn another_vm_is_refused_and_the_guest_stays() {
    let why = migrate(1, 2, true).expect("refused");
    assert!(why.contains("UUID") && why.contains("0101") && why.contains("0202"), "{why}");
    assert_eq!(migrate(1, 1, true), None);
    assert_eq!(migrate(1, 2, false), None, "nobody asked");
}
