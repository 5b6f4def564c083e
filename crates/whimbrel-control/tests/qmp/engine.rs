//! The engine and the reference VM behind the server, driven by nothing but QMP.

use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use serde_json::json;
use whimbrel::{Capability, MigrationStatus, Migrator, SocketAddressInfo, Start};
use whimbrel_control::{Client, ClientError, Endpoint, MigratorBackend, PeerStatus, Server};
use whimbrel_vm::{AccelChoice, Config, Fill, ReferenceVm};

const PATIENCE: Duration = Duration::from_secs(60);
const MEMORY: u64 = 64 << 20;

/// A VM with its QMP socket.
struct Machine {
    vm: Arc<ReferenceVm>,
    endpoint: Endpoint,
    quit: Arc<AtomicBool>,
    _server: Server,
    dir: tempfile::TempDir,
}

impl Machine {
    fn new(incoming: bool) -> Machine {
        let workload = "uniform,rate=2000,working-set=4M".parse().unwrap();
        let accel = AccelChoice::Native;
        let fill = Fill::Random;
        let config = Config { workload, accel, fill, incoming, ..Config::new(MEMORY) };
        let vm = ReferenceVm::new(config).unwrap();
        let start = if incoming { Start::Incoming { autostart: true } } else { Start::Paused };
        let migrator = Arc::new(Migrator::new(vm.clone(), start));
        let quit = Arc::new(AtomicBool::new(false));
        let backend = MigratorBackend::new(migrator)
            .with_name("reference")
            .with_command("x-updates", {
                let vm = vm.clone();
                move |_| Ok(json!(vm.self_check().updates))
            })
            .on_quit({
                let quit = quit.clone();
                move || quit.store(true, Ordering::Release)
            });
        let dir = tempfile::tempdir().unwrap();
        let endpoint = Endpoint::Unix(dir.path().join("qmp"));
        let server = Server::bind(endpoint.clone(), Arc::new(backend)).unwrap();
        Machine { vm, endpoint, quit, _server: server, dir }
    }

    fn client(&self) -> Client {
        let mut client = Client::connect(self.endpoint.clone(), PATIENCE).unwrap();
        client.set_capability(Capability::Events, true).unwrap();
        client
    }

    /// Where a listener that takes nothing in can be put.
    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }
}

/// Waits for the `MIGRATION` event with `status`, and returns those before it as well.
fn until(client: &mut Client, status: MigrationStatus) -> Vec<MigrationStatus> {
    let mut seen = Vec::new();
    loop {
        let event = client.wait_event("MIGRATION", PATIENCE).unwrap();
        let PeerStatus::Known(now) = event.migration_status().unwrap() else { panic!("{event:?}") };
        seen.push(now);
        if now == status {
            return seen;
        }
        assert!(now.is_running(), "{seen:?}: {:?}", client.query_migrate());
    }
}

/// Asks 100 times, and says how long it took on average and at worst.
fn ask_often(client: &mut Client) -> (Duration, Duration) {
    let mut worst = Duration::ZERO;
    let began = Instant::now();
    for _ in 0..100 {
        let asked = Instant::now();
        client.query_migrate().unwrap();
        worst = worst.max(asked.elapsed());
    }
    (began.elapsed() / 100, worst)
}

fn refusal<T: std::fmt::Debug>(outcome: Result<T, ClientError>) -> String {
    match outcome.unwrap_err() {
        ClientError::Refused { class, desc, .. } => {
            assert_eq!(class, "GenericError");
            desc
        }
        other => panic!("{other}"),
    }
}

#[test]
fn a_guest_moves_pauses_before_the_switchover_and_goes_on() {
    use MigrationStatus::{Active, Completed, Device, PreSwitchover, Setup};
    let (here, there) = (Machine::new(false), Machine::new(true));
    let (mut from, mut to) = (here.client(), there.client());
    from.cont().unwrap();
    from.wait_event("RESUME", PATIENCE).unwrap();
    from.set_capability(Capability::PauseBeforeSwitchover, true).unwrap();
    from.set_capability(Capability::ReturnPath, true).unwrap();
    to.set_capability(Capability::ReturnPath, true).unwrap();
    from.set_parameters(json!({"max-bandwidth": 0, "downtime-limit": 2000})).unwrap();

    to.migrate_incoming("tcp:127.0.0.1:0").unwrap();
    let listening = to.query_migrate().unwrap().info.socket_address.unwrap();
    let [SocketAddressInfo::Inet { host, port }] = listening.as_slice() else {
        panic!("{listening:?}");
    };
    from.migrate(&format!("tcp:{host}:{port}")).unwrap();
    assert_eq!(until(&mut from, PreSwitchover), [Setup, Active, PreSwitchover]);
    assert!(!from.query_status().unwrap().running);
    assert!(refusal(from.migrate("tcp:127.0.0.1:1")).contains("migration process in progress"));
    refusal(from.set_capability(Capability::Events, true));
    refusal(from.migrate_continue("device"));
    from.migrate_continue("pre-switchover").unwrap();
    assert_eq!(until(&mut from, Completed), [Device, Completed]);
    until(&mut to, Completed);

    let report = from.query_migrate().unwrap();
    assert_eq!(report.status, PeerStatus::Known(Completed));
    let ram = report.info.ram.unwrap();
    assert!(ram.total >= MEMORY && ram.transferred >= MEMORY && ram.remaining == 0, "{ram:?}");
    assert_eq!(from.query_status().unwrap().status, "postmigrate");
    assert!(to.query_status().unwrap().running);
    let before = to.execute("x-updates", json!({})).unwrap().as_u64().unwrap();
    let deadline = Instant::now() + PATIENCE;
    while to.execute("x-updates", json!({})).unwrap().as_u64().unwrap() < before + 100 {
        assert!(Instant::now() < deadline, "the guest stands still");
    }
    to.stop().unwrap();
    let check = there.vm.self_check();
    assert!(check.passed(), "{:?}", check.first_error);
    from.quit().unwrap();
    let deadline = Instant::now() + PATIENCE;
    while !here.quit.load(Ordering::Acquire) {
        assert!(Instant::now() < deadline, "quit reached nobody");
        std::thread::yield_now();
    }
}

/// The other side accepts and reads nothing: the migration hangs in a send for as long as it is
/// let. Everything QMP asks is answered all the same, and cancelling works.
#[test]
fn a_stalled_link_holds_up_no_answer() {
    let here = Machine::new(false);
    let mut client = here.client();
    client.cont().unwrap();
    let path = here.path("stalled");
    let listener = UnixListener::bind(&path).unwrap();
    client.migrate(&format!("unix:{}", path.display())).unwrap();
    let (_stalled, _) = listener.accept().unwrap();
    until(&mut client, MigrationStatus::Active);

    let desc = refusal(client.migrate_start_postcopy());
    assert!(desc.contains("before the start of migration"), "{desc}");
    let (mean, worst) = ask_often(&mut client);
    assert!(mean < Duration::from_millis(500), "{mean:?} on average, {worst:?} at worst");
    assert!(worst < Duration::from_secs(10), "{mean:?} on average, {worst:?} at worst");
    let began = Instant::now();
    client.set_parameters(json!({"max-bandwidth": 1 << 20})).unwrap();
    client.stop().unwrap();
    client.cont().unwrap();
    client.migrate_cancel().unwrap();
    assert!(began.elapsed() < Duration::from_secs(10), "{:?}", began.elapsed());
    let seen = until(&mut client, MigrationStatus::Cancelled);
    assert!(began.elapsed() < Duration::from_secs(30), "{seen:?} took {:?}", began.elapsed());
    assert!(client.query_status().unwrap().running);
    client.migrate_cancel().unwrap();
    assert_eq!(client.query_migrate().unwrap().status.name(), "cancelled");
    client.stop().unwrap();
    assert!(here.vm.self_check().passed());
}

#[test]
fn what_the_engine_refuses_is_one_line_of_class_generic_error() {
    let here = Machine::new(false);
    let mut client = here.client();
    for uri in ["tcp:127.0.0.1", "bogus:1", "unix:", "rdma:h:1"] {
        let desc = refusal(client.migrate(uri));
        assert!(desc.contains(uri) && !desc.contains('\n'), "{desc}");
    }
    let desc = refusal(client.migrate_incoming("tcp:127.0.0.1:0"));
    assert!(!desc.contains('\n'), "{desc}");
    refusal(client.migrate_continue("pre-switchover"));
    refusal(client.set_parameters(json!({"max-bandwidth": 5, "cpu-throttle-initial": 0})));
    assert_eq!(client.query_parameters().unwrap()["max-bandwidth"], 128 << 20);
    assert_eq!(client.query_migrate().unwrap().raw, json!({}));

    let preempt = [("postcopy-preempt", true)];
    let desc = refusal(client.set_capabilities_named(&preempt));
    assert!(desc.contains("requires capability 'postcopy-ram'"), "{desc}");
    client.set_capabilities_named(&[preempt[0], ("postcopy-ram", true)]).unwrap();
    let desc = refusal(client.set_capability(Capability::PostcopyRam, false));
    assert!(desc.contains("requires capability 'postcopy-ram'"), "{desc}");
    let desc = refusal(client.migrate_start_postcopy());
    assert!(desc.contains("no migration"), "{desc}");
    let desc = refusal(client.migrate_pause());
    assert!(desc.contains("postcopy-active"), "{desc}");
    let desc = refusal(client.migrate_resume("tcp:127.0.0.1:1"));
    assert_eq!(desc, "Cannot resume if there is no paused migration");
    let desc = refusal(client.migrate_recover("tcp:127.0.0.1:0"));
    assert_eq!(desc, "Migrate recover can only be run when postcopy is paused.");

    let there = Machine::new(true);
    let mut waiting = there.client();
    refusal(waiting.migrate("tcp:127.0.0.1:1"));
    refusal(waiting.cont());
    assert_eq!(waiting.query_status().unwrap().status, "inmigrate");
}
