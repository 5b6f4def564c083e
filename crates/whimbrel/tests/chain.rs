//! A guest that is moved on in the very moment in which it is said to have arrived: the host it came
//! from hears that it has, and is not left in doubt.

#[path = "support/vms.rs"]
mod vms;

use std::sync::{Arc, OnceLock};

use vms::{Alone, Side};
use whimbrel::{Address, Capability, Event, MigrationStatus, Migrator, Start};
use whimbrel_vm::{AccelChoice, Config, ReferenceVm};

fn config() -> Config {
    let workload = "uniform,rate=5000,working-set=1M".parse().expect("a workload");
    Config { accel: AccelChoice::Native, workload, ..Config::new(8 << 20) }
}

/// A VM that waits for a guest, and sends it on to `next` from within the event of its arrival.
fn sends_on(next: Address) -> (Arc<Migrator>, whimbrel::Subscription, Arc<OnceLock<bool>>) {
    let vm = ReferenceVm::new(Config { incoming: true, ..config() }).expect("a VM");
    let migrator = Arc::new(Migrator::new(vm, Start::Incoming { autostart: true }));
    let sent_on = Arc::new(OnceLock::new());
    let subscription = {
        let (weak, sent_on) = (Arc::downgrade(&migrator), sent_on.clone());
        migrator.subscribe(move |event| {
            let Event::Migration(MigrationStatus::Completed) = event else { return };
            if let (Some(migrator), None) = (weak.upgrade(), sent_on.get()) {
                let _ = sent_on.set(migrator.migrate(next.clone()).is_ok());
            }
        })
    };
    (migrator, subscription, sent_on)
}

#[test]
fn whoever_sent_it_hears_of_its_arrival() {
    for way in [Capability::ReturnPath, Capability::PostcopyRam] {
        let alone = Alone::begin();
        {
            let what = way.name();
            let (source, last) = (Side::running(&config()), Side::waiting(&config(), true));
            last.switch_on(&[way]);
            let (between, _told, sent_on) = sends_on(last.listen("tcp:127.0.0.1:0"));
            source.switch_on(&[way]);
            between.set_capabilities(&[(way, true)]).expect("no migration runs");
            between.incoming(&"tcp:127.0.0.1:0".parse().expect("one"), false).expect("free");
            let told = between.info().socket_address.and_then(|all| all.into_iter().next());
            let Some(whimbrel::SocketAddressInfo::Inet { host, port }) = told else {
                panic!("{what}: {told:?}")
            };
            let port = port.parse().expect("a port");
            source.migrator.migrate(Address::Tcp { host, port }).expect("it starts");
            if way == Capability::PostcopyRam {
                source.migrator.start_postcopy().expect("allowed");
            }
            let info = source.ended(what);
            assert_eq!(info.status, Some(MigrationStatus::Completed), "{what}: {info:?}");
            let info = last.ended(what);
            assert_eq!(info.status, Some(MigrationStatus::Completed), "{what}: {info:?}");
            assert_eq!(sent_on.get(), Some(&true), "{what}");
            source.migrator.cont().expect_err("it runs elsewhere, and that is known");
            last.expect_healthy(what);
        }
        alone.expect_nothing_left("a chain of hosts");
    }
}
