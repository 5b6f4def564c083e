//! COLO as a client sees it: whichever side is lost, at whatever byte, a client that checks every byte
//! of every answer goes on with the other, on the same connection.
//!
//! `WHIMBREL_FAILOVERS` says how many runs (50), `WHIMBREL_SEED` replays them, `WHIMBREL_ONLY` picks
//! one of them.

#[path = "support/relay.rs"]
mod relay;
#[path = "support/vms.rs"]
mod vms;

use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use relay::Relay;
use vms::{Alone, Dice, Side, drawn};
use whimbrel::{
    Capability, ColoOutput, MigrationStatus, MultifdCompression, Outlet, Output, VmError,
};
use whimbrel_vm::net::{Client, NetConfig};
use whimbrel_vm::{AccelChoice, Config, Fill};

const MEMORY: u64 = 8 << 20;
const GUEST: NetConfig = NetConfig { mac: [2, 0, 0, 0, 0, 1], ip: [10, 0, 0, 1] };
const CLIENT: NetConfig = NetConfig { mac: [2, 0, 0, 0, 0, 2], ip: [10, 0, 0, 2] };

/// What fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Lost {
    /// The primary, with everything it has not let out.
    Primary,
    Secondary,
    /// The link alone: both want to go on, and one may.
    Link,
}

/// Everything that is drawn for one run.
#[derive(Clone, Copy, Debug)]
struct Draw {
    policy: ColoOutput,
    channels: u8,
    compression: MultifdCompression,
    lost: Lost,
    /// After so many bytes more on the link.
    bytes: u64,
}

fn draw(dice: &mut Dice) -> Draw {
    let range = dice.one_of(&[200, 60_000, 4_000_000]);
    Draw {
        policy: dice.one_of(&[ColoOutput::Buffer, ColoOutput::Compare]),
        channels: dice.one_of(&[0, 0, 2]),
        compression: dice.one_of(&[MultifdCompression::None, MultifdCompression::Zstd]),
        lost: dice.one_of(&[Lost::Primary, Lost::Secondary, Lost::Link]),
        bytes: dice.below(range),
    }
}

fn config() -> Config {
    let workload = "uniform,rate=8000,working-set=2M,seed=7".parse().expect("a workload");
    let network = Some(GUEST);
    let accel = AccelChoice::Native;
    Config { accel, workload, network, fill: Fill::Random, ..Config::new(MEMORY) }
}

const NOBODY: u8 = 0;
const PRIMARY: u8 = 1;
const SECONDARY: u8 = 2;

/// Who may go on: whoever asks first. It stands for fences that switch the other side off.
#[derive(Debug, Default)]
struct Lease(AtomicU8);

impl Lease {
    fn take(&self, side: u8) -> Result<(), VmError> {
        let taken = self.0.compare_exchange(NOBODY, side, Ordering::SeqCst, Ordering::SeqCst);
        match taken {
            Ok(_) => Ok(()),
            Err(holder) if holder == side => Ok(()),
            Err(_) => Err(VmError::new("the other side has the lease")),
        }
    }

    fn holder(&self) -> u8 {
        self.0.load(Ordering::SeqCst)
    }
}

/// Where a side's packets go.
struct Wire {
    world: Sender<Vec<u8>>,
    /// A process that was killed sends nothing.
    dead: Arc<AtomicBool>,
    /// The primary's VMM, to which the copy's packets are brought.
    primary: Arc<OnceLock<Output>>,
}

impl Outlet for Wire {
    fn release(&self, packet: &[u8]) {
        if !self.dead.load(Ordering::SeqCst) {
            // A client that has gone hears nothing.
            let _ = self.world.send(packet.to_vec());
        }
    }

    fn copy_said(&self, epoch: u64, packet: &[u8]) {
        if let Some(primary) = self.primary.get()
            && !self.dead.load(Ordering::SeqCst)
        {
            primary.copy_said(epoch, packet);
        }
    }
}

/// A VM in its network.
struct Plugged {
    side: Side,
    output: Output,
    dead: Arc<AtomicBool>,
}

impl Plugged {
    fn new(side: Side, world: &Sender<Vec<u8>>, primary: &Arc<OnceLock<Output>>) -> Plugged {
        let dead = Arc::new(AtomicBool::new(false));
        let (world, primary) = (world.clone(), Arc::clone(primary));
        let wire = Wire { world, dead: Arc::clone(&dead), primary };
        let output = side.migrator.set_outlet(wire);
        let nic = side.vm.nic().expect("it has one");
        nic.on_send({
            let output = output.clone();
            move |frame| output.send(frame)
        });
        Plugged { side, output, dead }
    }

    fn receive(&self, frame: &[u8], mirrored: bool) {
        if !self.dead.load(Ordering::SeqCst) && (mirrored || !self.output.is_copys()) {
            self.side.vm.nic().expect("it has one").receive(frame.to_vec());
        }
    }

    fn is(&self, status: MigrationStatus) -> bool {
        self.side.status() == Some(status)
    }
}

impl Drop for Plugged {
    fn drop(&mut self) {
        // It holds what holds the VM.
        self.side.vm.nic().expect("it has one").unplug();
    }
}

/// Two VMs in step, and their client.
struct Stage {
    primary: Plugged,
    secondary: Plugged,
    relay: Relay,
    lease: Arc<Lease>,
    client: Client,
    world: Receiver<Vec<u8>>,
    mirrored: bool,
    begun: Instant,
}

impl Stage {
    fn begin(draw: &Draw) -> Stage {
        let (sender, world) = mpsc::channel();
        let to_primary = Arc::new(OnceLock::new());
        let primary = Plugged::new(Side::running(&config()), &sender, &to_primary);
        let secondary = Plugged::new(Side::waiting(&config(), true), &sender, &to_primary);
        to_primary.set(primary.output.clone()).expect("once");
        let lease = Arc::new(Lease::default());
        for (plugged, name) in [(&primary, PRIMARY), (&secondary, SECONDARY)] {
            let (migrator, lease) = (&plugged.side.migrator, Arc::clone(&lease));
            migrator.set_fence(move || lease.take(name));
            plugged.side.switch_on(&[Capability::ReturnPath, Capability::XColo]);
            if draw.channels > 0 {
                plugged.side.switch_on(&[Capability::Multifd]);
            }
            let change = |p: &mut whimbrel::Parameters| {
                p.multifd_channels = draw.channels.max(1);
                p.multifd_compression = draw.compression;
                p.x_colo_output = draw.policy;
                // By the clock with one policy, mostly by what differs with the other.
                let buffers = draw.policy == ColoOutput::Buffer;
                p.x_checkpoint_delay = if buffers { 20 } else { 200 };
                p.x_colo_compare_timeout = 100;
                (p.max_bandwidth, p.silence_limit) = (0, 5000);
            };
            migrator.update_parameters(change).expect("allowed");
        }
        let relay = Relay::to(&secondary.side.listen("tcp:127.0.0.1:0"));
        let client = Client::new(CLIENT, GUEST.ip, 40_000, Duration::ZERO);
        let mirrored = draw.policy == ColoOutput::Compare;
        let begun = Instant::now();
        Stage { primary, secondary, relay, lease, client, world, mirrored, begun }
    }

    /// Has the client talk until `done`.
    fn serve(&mut self, what: &str, mut done: impl FnMut(&Stage) -> bool) {
        let since = Instant::now();
        loop {
            let frames = self.client.poll(self.begun.elapsed());
            let frames = frames.unwrap_or_else(|error| panic!("{what}: {error}"));
            for frame in frames {
                // What the client says comes to both if the copy is to do as the guest does.
                self.primary.receive(&frame, false);
                self.secondary.receive(&frame, self.mirrored);
            }
            if done(self) {
                return;
            }
            assert!(
                since.elapsed() < vms::LIMIT,
                "{what}: not within {:?}: {:?}, primary {:?} {:?}, secondary {:?} {:?}",
                vms::LIMIT,
                self.client,
                self.primary.side.migrator.info().error_desc,
                self.primary.output,
                self.secondary.side.migrator.info().error_desc,
                self.secondary.output,
            );
            let frame = self.world.recv_timeout(Duration::from_millis(1));
            frame.into_iter().for_each(|frame| self.client.receive(frame));
            while let Ok(frame) = self.world.try_recv() {
                self.client.receive(frame);
            }
        }
    }

    fn serve_more(&mut self, answers: u64, what: &str) {
        let until = self.client.answered() + answers;
        self.serve(what, |stage| stage.client.answered() >= until);
    }

    fn lose(&self, draw: &Draw) {
        match draw.lost {
            Lost::Link => {}
            Lost::Primary => self.lease.take(SECONDARY).expect("nobody has it"),
            Lost::Secondary => self.lease.take(PRIMARY).expect("nobody has it"),
        }
        // The moment it has gone through, the dead are dead.
        self.relay.cut_after(draw.bytes);
    }

    fn survivor(&self) -> &Plugged {
        match self.lease.holder() {
            PRIMARY => &self.primary,
            _ => &self.secondary,
        }
    }
}

#[test]
fn a_client_goes_on_with_whichever_side_is_left() {
    let alone = Alone::begin();
    let (mut differences, mut survivors) = (0, [0; 2]);
    for (run, draw) in drawn("failover", ("WHIMBREL_FAILOVERS", 50), draw) {
        let what = format!("run {run}: {draw:?}");
        let began = Instant::now();
        let mut stage = Stage::begin(&draw);
        stage.serve_more(10, &what);
        let address = stage.relay.address.clone();
        stage.primary.side.migrator.migrate(address).expect("it starts");
        stage.serve(&what, |stage| {
            [&stage.primary, &stage.secondary].iter().all(|side| side.is(MigrationStatus::Colo))
        });
        stage.serve_more(40, &what);
        stage.lose(&draw);
        stage.serve(&what, |stage| {
            let info = |side: &Plugged| side.side.migrator.info().error_desc.is_some();
            info(&stage.primary) && info(&stage.secondary)
        });
        let loser = match stage.lease.holder() {
            PRIMARY => &stage.secondary,
            _ => &stage.primary,
        };
        loser.dead.store(true, Ordering::SeqCst);
        // A copy may run on, and is let out nowhere.
        let still = loser.output.is_copys() || !loser.side.runs();
        assert!(still, "{what}: two guests are let out");
        stage.serve(&what, |stage| stage.survivor().is(MigrationStatus::Completed));
        stage.serve_more(100, &what);
        stage.survivor().side.expect_healthy(&what);
        if stage.lease.holder() == SECONDARY {
            // Ended, it neither runs nor says what it had held.
            let said = stage.primary.output.stats().released;
            stage.primary.side.migrator.end();
            assert!(!stage.primary.side.vm.running(), "{what}: it was refused");
            assert_eq!(stage.primary.output.stats().released, said, "{what}: it was refused");
        }
        differences += stage.primary.output.stats().differences;
        survivors[usize::from(stage.lease.holder() == SECONDARY)] += 1;
        eprintln!("{what}: {} answers, in {:?}", stage.client.answered(), began.elapsed());
        drop(stage);
        alone.expect_nothing_left(&what);
    }
    let [primaries, secondaries] = survivors;
    eprintln!(
        "{primaries} primaries and {secondaries} secondaries went on; {differences} differences"
    );
}
