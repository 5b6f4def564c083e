//! Connections of nobody to a destination that waits.

#[path = "support/vms.rs"]
mod vms;

use std::net::TcpStream;

use vms::Side;
use whimbrel::{Address, Capability, MigrationStatus};
use whimbrel_vm::{AccelChoice, Config, Fill};

fn connect(address: &Address) -> TcpStream {
    let Address::Tcp { host, port } = address else { panic!("{address}") };
    TcpStream::connect((host.as_str(), *port)).expect("somebody listens")
}

/// Somebody has connected before the source, and says nothing: neither the main channel nor the
/// urgent one is taken for theirs.
#[test]
fn who_connects_and_says_nothing_keeps_no_source_out() {
    for preempt in [false, true] {
        let what = format!("preempt {preempt}");
        let config = Config {
            accel: AccelChoice::Native,
            workload: "uniform,rate=5000,working-set=2M".parse().expect("a workload"),
            fill: Fill::Random,
            ..Config::new(8 << 20)
        };
        let (source, destination) = (Side::running(&config), Side::waiting(&config, true));
        let mut capabilities = vec![Capability::ReturnPath];
        if preempt {
            capabilities.extend([Capability::PostcopyRam, Capability::PostcopyPreempt]);
        }
        for side in [&source, &destination] {
            side.switch_on(&capabilities);
        }
        let address = destination.listen("tcp:127.0.0.1:0");
        let strangers: Vec<TcpStream> = (0..3).map(|_| connect(&address)).collect();
        source.migrator.migrate(address).expect("it starts");
        if preempt {
            source.migrator.start_postcopy().expect("it is allowed");
        }
        for side in [&source, &destination] {
            let info = side.ended(&what);
            assert_eq!(info.status, Some(MigrationStatus::Completed), "{what}: {info:?}");
        }
        destination.expect_healthy(&what);
        drop(strangers);
    }
}
