//! What our engine relies on and no document promises (docs/peers.md): a recorded stream, played
//! into a stock QEMU with a PING where no QEMU puts one.

use std::fs;
use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use whimbrel_peers::guest::BootSector;
use whimbrel_peers::install::Peer;
use whimbrel_peers::journey::{Journey, MIGRATION_MAX, Transport};
use whimbrel_peers::on_each_peer;
use whimbrel_peers::qemu::Qemu;

const OPEN_RETURN_PATH: [u8; 5] = [8, 0, 1, 0, 0];
const PING_0X57: [u8; 9] = [8, 0, 2, 0, 4, 0, 0, 0, 0x57];
const PONG_0X57: [u8; 8] = [0, 2, 0, 4, 0, 0, 0, 0x57];
const SHUT_0: [u8; 8] = [0, 1, 0, 4, 0, 0, 0, 0];
const SHUT_1: [u8; 8] = [0, 1, 0, 4, 0, 0, 0, 1];
const EOF: u8 = 0;
const VMDESCRIPTION: u8 = 6;

/// A precopy stream of a guest, and where its parts end.
struct Recorded {
    bytes: Vec<u8>,
    configuration_end: usize,
    /// Where EOF stands, right behind the last footer.
    eof: usize,
}

impl Recorded {
    fn new(bytes: Vec<u8>) -> Result<Self> {
        let length = |at: usize| -> Result<usize> {
            let field = bytes.get(at..at + 4).context("a length")?;
            Ok(usize::try_from(u32::from_be_bytes(field.try_into()?))?)
        };
        let configuration_end = 13 + length(9)?;
        // The description's length reaches exactly to the end, and nothing else's does.
        let eof = (configuration_end..bytes.len() - 6)
            .rev()
            .find(|&at| {
                let is_end = bytes[at] == EOF && bytes[at + 1] == VMDESCRIPTION;
                is_end && length(at + 2).is_ok_and(|length| at + 6 + length == bytes.len())
            })
            .context("no end of the stream")?;
        Ok(Self { bytes, configuration_end, eof })
    }

    fn until_ping(&self) -> Vec<u8> {
        let (configuration, sections) = self.bytes[..self.eof].split_at(self.configuration_end);
        [configuration, &OPEN_RETURN_PATH, sections].concat()
    }
}

struct Replay<'a> {
    journey: Journey<'a>,
    source: Qemu,
    recorded: Recorded,
    destination: Qemu,
    link: UnixStream,
}

impl<'a> Replay<'a> {
    fn new(peer: Peer, guest: &'a BootSector) -> Result<Self> {
        let journey = Journey::new(peer.machine(), guest)?;
        let mut source = journey.boot(peer)?;
        let recorded = Recorded::new(fs::read(journey.write_file(&mut source, peer, false)?)?)?;
        let (destination, uri) = journey.waiting(peer, Transport::Unix, &[])?;
        let link = UnixStream::connect(uri.strip_prefix("unix:").context("a unix: URI")?)?;
        link.set_read_timeout(Some(MIGRATION_MAX))?;
        Ok(Self { journey, source, recorded, destination, link })
    }

    fn answer(&mut self) -> Result<[u8; 8]> {
        let mut answer = [0; 8];
        self.link.read_exact(&mut answer).context("no answer on the return path")?;
        Ok(answer)
    }

    fn check_waits(&mut self) -> Result<()> {
        std::thread::sleep(Duration::from_millis(200));
        let state = self.destination.qmp.run_state()?;
        ensure!(state == "inmigrate", "the destination is {state}");
        ensure!(self.destination.console.written().is_empty(), "the guest runs");
        Ok(())
    }
}

fn ping_before_eof_means_loaded_and_not_running(peer: Peer) -> Result<()> {
    let guest = BootSector { seed: 41 };
    let mut replay = Replay::new(peer, &guest)?;
    replay.link.write_all(&replay.recorded.until_ping())?;
    replay.link.write_all(&PING_0X57)?;
    ensure!(replay.answer()? == PONG_0X57, "another answer than PONG 0x57");
    replay.check_waits()?;
    replay.link.write_all(&replay.recorded.bytes[replay.recorded.eof..])?;
    ensure!(replay.answer()? == SHUT_0, "another answer than SHUT 0");
    replay.destination.wait_migrated(MIGRATION_MAX)?;
    replay.journey.check_arrived(&replay.source, &replay.destination)
}

fn no_pong_when_the_last_section_does_not_load(peer: Peer) -> Result<()> {
    let guest = BootSector { seed: 42 };
    let mut replay = Replay::new(peer, &guest)?;
    let mut stream = replay.recorded.until_ping();
    *stream.last_mut().context("a stream")? ^= 1; // the last footer's section id
    // The destination may be gone before it has taken everything.
    let _ = replay.link.write_all(&stream).and_then(|()| replay.link.write_all(&PING_0X57));
    // It may or may not still say that it failed.
    if let Ok(answer) = replay.answer() {
        ensure!(answer == SHUT_1, "a section that cannot be loaded was answered with {answer:?}");
    }
    ensure!(!replay.destination.wait_exit(MIGRATION_MAX)?.success(), "it loaded all the same");
    Ok(())
}

fn closed_before_eof_never_runs(peer: Peer) -> Result<()> {
    let guest = BootSector { seed: 43 };
    let mut replay = Replay::new(peer, &guest)?;
    replay.link.write_all(&replay.recorded.until_ping())?;
    replay.link.write_all(&PING_0X57)?;
    ensure!(replay.answer()? == PONG_0X57, "another answer than PONG 0x57");
    replay.link.shutdown(std::net::Shutdown::Both)?;
    ensure!(!replay.destination.wait_exit(MIGRATION_MAX)?.success(), "it ended well");
    ensure!(replay.destination.console.written().is_empty(), "the guest ran");
    Ok(())
}

/// Why VMDESCRIPTION goes out with EOF, always: without it the guest runs, and the source is told
/// that something was wrong.
fn eof_alone_runs_the_guest_and_says_shut_1(peer: Peer) -> Result<()> {
    let guest = BootSector { seed: 44 };
    let mut replay = Replay::new(peer, &guest)?;
    replay.link.write_all(&replay.recorded.until_ping())?;
    replay.link.write_all(&[EOF])?;
    replay.check_waits()?;
    replay.link.shutdown(std::net::Shutdown::Write)?;
    ensure!(replay.answer()? == SHUT_1, "another answer than SHUT 1");
    replay.journey.check_arrived(&replay.source, &replay.destination)
}

on_each_peer!(
    ping_before_eof_means_loaded_and_not_running,
    no_pong_when_the_last_section_does_not_load,
    closed_before_eof_never_runs,
    eof_alone_runs_the_guest_and_says_shut_1,
);
