//! Two VMs, and everything between them over TLS.

#[path = "support/pki.rs"]
mod pki;
#[path = "support/vms.rs"]
mod vms;

use std::io::Read as _;
use std::net::TcpStream;

use pki::{Authority, Folder, Who};
use vms::Side;
use whimbrel::{
    Address, Authorization, Capability, MigrationStatus, TlsCredentials, TlsEndpoint, TlsOptions,
};
use whimbrel_vm::{AccelChoice, Config, Workload};

fn config() -> Config {
    let workload: Workload = "uniform,rate=2000".parse().expect("a workload");
    Config { accel: AccelChoice::Native, workload, ..Config::new(16 << 20) }
}

fn secure(side: &Side, folder: &Folder, endpoint: TlsEndpoint) {
    let options = TlsOptions { sanity_check: false, ..TlsOptions::default() };
    let loaded = TlsCredentials::load_with(folder.path(), endpoint, options).expect("credentials");
    side.migrator.add_object("tls0", loaded).expect("a new id");
    side.migrator.update_parameters(|all| all.tls_creds = "tls0".into()).expect("a name");
}

/// A running VM, one that waits, and where.
fn sides(capabilities: &[Capability], channels: u8) -> (Side, Side) {
    let (from, to) = (Side::running(&config()), Side::waiting(&config(), true));
    for side in [&from, &to] {
        side.switch_on(capabilities);
        side.migrator
            .update_parameters(|all| {
                all.max_bandwidth = 0;
                all.multifd_channels = channels;
            })
            .expect("in range");
    }
    (from, to)
}

fn host(address: &Address) -> Address {
    let Address::Tcp { port, .. } = address else { panic!("{address}") };
    Address::Tcp { host: "localhost".into(), port: *port }
}

#[test]
fn a_guest_moves_over_tls_whatever_the_channels() {
    let folder = Authority::new("CA").folder(&Who::localhost());
    use Capability::{Multifd, PostcopyPreempt, PostcopyRam, ReturnPath};
    let ways: [(&[Capability], u8, bool); 6] = [
        (&[], 2, false),
        (&[ReturnPath], 2, false),
        (&[ReturnPath, Multifd], 4, false),
        (&[PostcopyRam], 2, true),
        (&[PostcopyRam, PostcopyPreempt], 2, true),
        (&[PostcopyRam, PostcopyPreempt, Multifd], 3, true),
    ];
    for (capabilities, channels, postcopy) in ways {
        let what = format!("{capabilities:?}");
        let (from, to) = sides(capabilities, channels);
        secure(&from, &folder, TlsEndpoint::Client);
        secure(&to, &folder, TlsEndpoint::Server);
        to.migrator
            .add_object("authz0", Authorization::only([r"O=Example\, Inc.,CN=localhost"]))
            .expect("a new id");
        to.migrator.update_parameters(|all| all.tls_authz = "authz0".into()).expect("a name");
        let address = host(&to.listen("tcp:127.0.0.1:0"));
        from.migrator.migrate(address).expect("it begins");
        if postcopy {
            from.migrator.start_postcopy().expect("it was allowed");
        }
        let ended = from.ended(&what);
        assert_eq!(ended.status, Some(MigrationStatus::Completed), "{what}: {ended:?}");
        let ended = to.ended(&what);
        assert_eq!(ended.status, Some(MigrationStatus::Completed), "{what}: {ended:?}");
        to.expect_healthy(&what);
    }
}

#[test]
fn a_wrong_certificate_leaves_the_guest_where_it_is_and_the_right_one_still_comes_in() {
    let ca = Authority::new("CA");
    let good = ca.folder(&Who::localhost());
    let other = Authority::new("other").folder(&Who::localhost());
    let ca_of_good = std::fs::read_to_string(good.file("ca-cert.pem")).expect("there");
    other.write("ca-cert.pem", &ca_of_good);
    let expired = ca.folder(&Who { until: 2023, ..Who::localhost() });
    let nobody = ca.folder(&Who::localhost());
    nobody.remove(&["client-cert.pem", "client-key.pem"]);
    let (_, to) = sides(&[Capability::ReturnPath], 2);
    secure(&to, &good, TlsEndpoint::Server);
    let address = host(&to.listen("tcp:127.0.0.1:0"));
    for (bad, why) in
        [(&other, "not of the CA"), (&expired, "has expired"), (&nobody, "shows no certificate")]
    {
        let (from, _) = sides(&[Capability::ReturnPath], 2);
        secure(&from, bad, TlsEndpoint::Client);
        from.migrator.migrate(address.clone()).expect("it begins");
        let ended = from.ended(why);
        assert_eq!(ended.status, Some(MigrationStatus::Failed), "{why}: {ended:?}");
        let said = ended.error_desc.expect("a reason");
        assert!(said.starts_with("main channel"), "{why}: {said}");
        from.expect_healthy("the source's guest");
        vms::until(why, || to.migrator.info().error_desc.is_some_and(|there| there.contains(why)));
        assert_eq!(to.status(), Some(MigrationStatus::Setup), "it waits on");
    }
    let (from, _) = sides(&[Capability::ReturnPath], 2);
    secure(&from, &good, TlsEndpoint::Client);
    from.migrator.migrate(address).expect("it begins");
    assert_eq!(from.ended("the right one").status, Some(MigrationStatus::Completed));
    let ended = to.ended("the right one");
    assert_eq!((ended.status, ended.error_desc), (Some(MigrationStatus::Completed), None));
    to.expect_healthy("the guest");
}

#[test]
fn a_destination_that_is_another_is_refused_by_the_source() {
    let ca = Authority::new("CA");
    let elsewhere = ca.folder(&Who { hosts: vec!["elsewhere".into()], ..Who::localhost() });
    let (from, to) = sides(&[], 2);
    secure(&from, &elsewhere, TlsEndpoint::Client);
    secure(&to, &elsewhere, TlsEndpoint::Server);
    let address = host(&to.listen("tcp:127.0.0.1:0"));
    from.migrator.migrate(address.clone()).expect("it begins");
    let said = from.ended("another host").error_desc.expect("a reason");
    assert!(said.contains("main channel") && said.contains("not for localhost"), "{said}");
    from.expect_healthy("the source's guest");
    from.migrator.update_parameters(|all| all.tls_hostname = "elsewhere".into()).expect("a name");
    from.migrator.migrate(address).expect("it begins");
    assert_eq!(from.ended("with tls-hostname").status, Some(MigrationStatus::Completed));
    assert_eq!(to.ended("with tls-hostname").status, Some(MigrationStatus::Completed));
}

#[test]
fn one_side_alone_with_tls_gets_nowhere_and_nothing_in_the_clear() {
    let folder = Authority::new("CA").folder(&Who::localhost());
    for (source, destination) in [(true, false), (false, true)] {
        let what = format!("TLS at the source {source}, at the destination {destination}");
        let (from, to) = sides(&[Capability::ReturnPath], 2);
        if source {
            secure(&from, &folder, TlsEndpoint::Client);
        }
        if destination {
            secure(&to, &folder, TlsEndpoint::Server);
        }
        let address = host(&to.listen("tcp:127.0.0.1:0"));
        from.migrator.migrate(address).expect("it begins");
        let ended = from.ended(&what);
        assert_eq!(ended.status, Some(MigrationStatus::Failed), "{what}");
        from.expect_healthy(&what);
        let word =
            if source { "speaks TLS; set tls-creds" } else { "does not speak TLS: set tls-creds" };
        vms::until(&what, || {
            to.migrator.info().error_desc.is_some_and(|there| there.contains(word))
        });
    }
}

#[test]
fn silent_strangers_delay_nobody() {
    let folder = Authority::new("CA").folder(&Who::localhost());
    for channels in [0, 255u8] {
        let capabilities: &[Capability] = match channels {
            0 => &[Capability::ReturnPath],
            _ => &[Capability::ReturnPath, Capability::Multifd],
        };
        let (from, to) = sides(capabilities, channels.max(1));
        secure(&from, &folder, TlsEndpoint::Client);
        secure(&to, &folder, TlsEndpoint::Server);
        let address = host(&to.listen("tcp:127.0.0.1:0"));
        let Address::Tcp { port, .. } = address else { panic!("{address}") };
        let mut strangers: Vec<TcpStream> = (0..100)
            .map(|_| TcpStream::connect(("127.0.0.1", port)).expect("it listens"))
            .collect();
        from.migrator.migrate(address).expect("it begins");
        let ended = from.ended("beside strangers");
        assert_eq!(ended.status, Some(MigrationStatus::Completed), "{ended:?}");
        to.ended("beside strangers");
        to.expect_healthy("the guest");
        drop((from, to));
        let mut heard = Vec::new();
        let _ = strangers[0].read_to_end(&mut heard);
        assert_eq!(heard, b"", "nothing is told to who says nothing");
    }
}

#[test]
fn parameters_have_to_name_what_is_there() {
    let folder = Authority::new("CA").folder(&Who::localhost());
    let (from, to) = sides(&[], 2);
    from.migrator.update_parameters(|all| all.tls_creds = "nobody".into()).expect("a name");
    let address: Address = "tcp:localhost:1".parse().expect("an address");
    let error = from.migrator.migrate(address.clone()).expect_err("no such id").to_string();
    assert!(error.contains("No TLS credentials with id 'nobody'"), "{error}");
    secure(&from, &folder, TlsEndpoint::Server);
    let error = from.migrator.migrate(address).expect_err("the wrong endpoint").to_string();
    assert!(error.contains("'server'") && error.contains("'client'"), "{error}");
    secure(&to, &folder, TlsEndpoint::Server);
    to.migrator.update_parameters(|all| all.tls_authz = "tls0".into()).expect("a name");
    let waits: Address = "tcp:127.0.0.1:0".parse().expect("an address");
    let error = to.migrator.incoming(&waits, false).expect_err("it is none").to_string();
    assert!(error.contains("no authorization with id 'tls0'"), "{error}");
    from.migrator.remove_object("tls0").expect("it is there");
    let error = from.migrator.remove_object("tls0").expect_err("it is gone").to_string();
    assert_eq!(error, "object 'tls0' not found");
}
