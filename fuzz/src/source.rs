//! A whole source, and a destination that answers what an input says: the real engine with all of
//! its threads, and a guest of 8 MiB.

use std::os::fd::AsFd;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, poll};
use whimbrel::fuzzing::Knowing;
use whimbrel::{
    Address, AutoRecover, Capability, MigrationInfo, MigrationStatus, Migrator, RunState, Start,
};
use whimbrel_wire::recovery::{Hello, Proof};
use whimbrel_wire::{ChannelKind, Command, Decoded, MainDecoder, MainOptions, ReturnMessage};

use crate::answering::{Answered, encode};
use crate::choices::{Choices, read_all};
use crate::ends::{End, patience, timespec, within};
use crate::guest::{Alone, FuzzVm, expect_one_line, scratch};

/// The source's own settings, a bit each in the first byte of an input.
pub(crate) mod set {
    pub(crate) const POSTCOPY: u8 = 1;
    pub(crate) const PREEMPT: u8 = 2;
    pub(crate) const MULTIFD: u8 = 4;
    pub(crate) const XBZRLE: u8 = 8;
    pub(crate) const RETURN_PATH: u8 = 16;
    /// What is not asked for in postcopy comes slowly.
    pub(super) const SLOW: u8 = 32;
    pub(super) const UUID: u8 = 64;
    /// A QEMU is looked for by itself when its link breaks. That it goes with another is to have one
    /// byte of settings.
    pub(crate) const RECOVERS: u8 = UUID;
    /// The guest stands still before it is moved.
    pub(super) const PAUSED: u8 = 128;
}

/// How many bytes of settings an input begins with.
pub(crate) const SETTINGS: usize = 1;

/// How long it may be silent when there is nothing that it has to say.
const SILENCE: Duration = Duration::from_millis(20);

/// How long the source may be silent before what it is waited for is given up.
const AWAITED: Duration = patience(30);

fn capabilities(settings: u8) -> Vec<(Capability, bool)> {
    let preempt = settings & set::PREEMPT != 0;
    let multifd = settings & set::MULTIFD != 0;
    let chosen = [
        (Capability::PostcopyRam, settings & set::POSTCOPY != 0 || preempt),
        (Capability::PostcopyPreempt, preempt),
        (Capability::Multifd, multifd),
        (Capability::Xbzrle, settings & set::XBZRLE != 0 && !multifd),
        (Capability::ReturnPath, settings & set::RETURN_PATH != 0),
        (Capability::ValidateUuid, settings & set::UUID != 0),
    ];
    chosen.into_iter().filter(|(_, on)| *on).collect()
}

/// The destination.
struct Far {
    listener: UnixListener,
    main: Option<End>,
    /// Of multifd channels and the urgent one: what comes there is taken and forgotten.
    others: Vec<End>,
    decoder: MainDecoder,
    /// How PINGs are answered; `None` is not at all.
    pongs: Option<u8>,
    in_package: bool,
    heard: Heard,
    /// What makes the migration itself, if the source has said so.
    knowing: Option<Knowing>,
    words: Words,
    /// All connections were broken once: this main channel is not the first.
    is_back: bool,
    /// This main channel has said something.
    has_spoken: bool,
    /// The first words of a source that has come back.
    hello: Option<Hello>,
}

/// What the next bytes of the main channel are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Words {
    Stream,
    Hello,
    Proof,
    /// Nothing that is understood here.
    Anything,
}

/// What the source has said.
#[derive(Clone, Copy, Debug, Default)]
struct Heard {
    pings: u32,
    resumed: bool,
    ram: bool,
    /// A package begins; its RUN may wait for an answer.
    devices: bool,
    /// All of it, RUN included.
    package: bool,
    eof: bool,
}

/// What two whimbrels agree on, as an answer.
const AGREED: u32 = 0x5749_0000;
const QUESTION: u32 = 0x5748_0000;

impl Far {
    /// Takes in whatever has come; says whether anything has.
    fn look(&mut self) -> bool {
        let mut any = false;
        while let Ok((stream, _)) = self.listener.accept() {
            any = true;
            let end = End::new(stream);
            match &self.main {
                None => self.main = Some(end),
                // It tries once more.
                Some(main) if main.ended && self.is_back => {
                    self.main = Some(end);
                    self.comes_back();
                }
                Some(_) => self.others.push(end),
            }
        }
        for other in &mut self.others {
            any |= other.receive();
            if self.has_spoken {
                // The first byte tells which of them is which.
                other.came.truncate(ChannelKind::BYTES);
            }
        }
        if let Some(mut main) = self.main.take() {
            any |= main.receive();
            if self.is_back && !self.has_spoken && main.ended && main.came.is_empty() {
                // Of several attempts under way at a time it has taken another.
                if let Some(at) = self.others.iter().position(|other| !other.ended) {
                    main = self.others.remove(at);
                }
            }
            self.has_spoken |= !main.came.is_empty();
            self.hear(&mut main);
            self.main = Some(main);
        }
        any
    }

    fn hear(&mut self, main: &mut End) {
        let came = std::mem::take(&mut main.came);
        let mut at = 0;
        if self.words == Words::Hello
            && let Some(first) = came.first_chunk()
        {
            self.hello = Some(Hello::parse(first).expect("our own source's"));
            (at, self.words) = (Hello::LEN, Words::Proof);
        }
        if self.words == Words::Proof && came.len() - at >= Proof::LEN {
            (at, self.words) = (at + Proof::LEN, Words::Stream);
        }
        while self.words == Words::Stream {
            let payload = self.decoder.payload_left();
            if payload > 0 {
                let here = payload.min((came.len() - at) as u64);
                self.decoder.payload_taken(here);
                at += usize::try_from(here).expect("no more than has come");
                if here < payload {
                    break;
                }
                self.heard.package |= std::mem::take(&mut self.in_package);
                continue;
            }
            let decoded = self.decoder.decode(&came[at..]);
            let (used, decoded) = decoded.expect("what our own source says");
            at += used;
            match decoded {
                Decoded::NeedMore(_) if used == 0 || at == came.len() => break,
                Decoded::Command(Command::Ping(value)) => {
                    self.heard.pings += 1;
                    let agreed = |pongs: u8| match pongs & 0x80 {
                        0 if value & 0xffff_0000 == QUESTION => AGREED | u32::from(pongs & 0x1f),
                        _ => value,
                    };
                    if let Some(pongs) = self.pongs {
                        let mut bytes = Vec::new();
                        ReturnMessage::Pong(agreed(pongs)).encode(&mut bytes);
                        main.send(&bytes);
                    }
                }
                Decoded::Command(Command::PostcopyResume) => self.heard.resumed = true,
                Decoded::Ram(_) => self.heard.ram = true,
                Decoded::PackageFollows { .. } => {
                    (self.in_package, self.heard.devices) = (true, true);
                }
                Decoded::Command(Command::Identity(identity)) => {
                    self.knowing = Some(Knowing::new(identity));
                }
                Decoded::Eof => {
                    self.heard.eof = true;
                    if self.heard.devices {
                        // A last word may follow, which is no part of the stream.
                        self.words = Words::Anything;
                    }
                }
                _ => {}
            }
        }
        main.came = came[at..].to_vec();
    }

    /// Breaks all connections.
    fn break_all(&mut self) {
        self.look();
        (self.main, self.others) = (None, Vec::new());
        self.comes_back();
    }

    /// The next main channel is that of a recovery.
    fn comes_back(&mut self) {
        let fresh = MainDecoder::new(MainOptions::default());
        let known = match std::mem::replace(&mut self.decoder, fresh).reconnected() {
            Ok(decoder) => {
                self.decoder = decoder;
                // What the guest's RAM ended with may have come before the link broke.
                self.heard.eof = false;
                true
            }
            // The guest had not gone.
            Err(_) => false,
        };
        (self.hello, self.in_package) = (None, false);
        (self.is_back, self.has_spoken) = (true, false);
        (self.heard.pings, self.heard.resumed) = (0, false);
        self.words = match (&self.knowing, known) {
            (_, false) => Words::Anything,
            (Some(_), true) => Words::Hello,
            (None, true) => Words::Stream,
        };
    }

    /// Answers a source that has come back.
    fn welcome(&mut self, wrong: bool) {
        let since = Instant::now();
        while self.hello.is_none() && self.words == Words::Hello && since.elapsed() < AWAITED {
            self.look();
            self.wait();
        }
        if let (Some(hello), Some(knowing), Some(main)) =
            (&self.hello, &self.knowing, &mut self.main)
        {
            let mut words = Vec::new();
            knowing.welcome(hello).encode(&mut words);
            if wrong && let Some(last) = words.last_mut() {
                *last ^= 1;
            }
            main.send(&words);
        }
    }

    /// Reads on until `heard`, or the source has been silent for long.
    fn hear_until(&mut self, silence: Duration, heard: impl Fn(&Heard) -> bool) {
        let mut since = Instant::now();
        while !heard(&self.heard) && self.main.as_ref().is_none_or(|main| !main.ended) {
            match self.look() {
                true => since = Instant::now(),
                false if since.elapsed() > silence => return,
                false => self.wait(),
            }
        }
    }

    /// Waits for the source to connect.
    fn wait_for_main(&mut self) {
        let since = Instant::now();
        while self.main.is_none() && since.elapsed() < AWAITED {
            self.look();
            self.wait();
        }
    }

    /// Waits for whatever comes next, for a moment.
    fn wait(&self) {
        let ends = self.main.iter().chain(&self.others).filter(|end| !end.ended);
        let fds = std::iter::once(self.listener.as_fd()).chain(ends.map(End::as_fd));
        let mut fds: Vec<_> = fds.map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN)).collect();
        // Looked at again in any case.
        let _ = poll(&mut fds, Some(&timespec(Duration::from_millis(2))));
    }
}

/// The target.
pub fn source(data: &[u8]) {
    run(data);
}

/// How the migration ended.
fn run(data: &[u8]) -> MigrationInfo {
    let alone = Alone::begin();
    let mut choices = Choices::new(data);
    let settings = choices.byte();
    let ops: Vec<Answered> = read_all(&mut choices);

    let vm = FuzzVm::new((settings & set::UUID != 0).then_some([1; 16]));
    vm.write(0, 64, 7);
    let migrator = Migrator::new(vm.clone(), Start::Paused);
    migrator.set_capabilities(&capabilities(settings)).expect("nothing runs");
    migrator
        .update_parameters(|parameters| {
            parameters.multifd_channels = 2;
            if settings & (set::POSTCOPY | set::PREEMPT) != 0 {
                // Or it would be over before it is told to go over to postcopy.
                parameters.max_bandwidth = 64 << 10;
            }
            if settings & set::SLOW != 0 {
                parameters.max_postcopy_bandwidth = 1;
            }
            if settings & set::RECOVERS != 0 {
                parameters.auto_recover = AutoRecover::On;
            }
        })
        .expect("allowed");
    if settings & set::PAUSED == 0 {
        migrator.cont().expect("its guest runs");
    }
    let path = scratch("out");
    let listener = UnixListener::bind(&path).expect("a free address");
    listener.set_nonblocking(true).expect("a socket");
    let decoder = MainDecoder::new(MainOptions::default());
    let (others, heard) = (Vec::new(), Heard::default());
    let pongs = Some(0x1f);
    let mut far = Far {
        listener,
        main: None,
        others,
        decoder,
        pongs,
        in_package: false,
        heard,
        knowing: None,
        words: Words::Stream,
        is_back: false,
        has_spoken: false,
        hello: None,
    };
    migrator.migrate(Address::Unix(path.clone())).expect("nothing is in its way");

    converse(&ops, &vm, &migrator, &mut far, &path);
    // Whatever it has still to say it says, or is waiting to be answered.
    far.hear_until(SILENCE, |_| false);
    let Far { main, others, listener, heard, .. } = far;
    drop((main, others, listener));
    within(AWAITED, || !is_under_way(&migrator));
    migrator.end();
    let info = migrator.info();
    expect_sound(&vm, &migrator, heard);
    vm.end();
    drop(migrator);
    assert_eq!(Arc::strong_count(&vm), 1, "nobody holds the VM");
    drop(vm);
    // Nobody listens there any more: the file is all that is left.
    let _ = std::fs::remove_file(&path);
    alone.expect_nothing_left();
    info
}

fn converse(ops: &[Answered], vm: &FuzzVm, migrator: &Migrator, far: &mut Far, path: &Path) {
    let (mut damage, mut cut) = (None, 0);
    for op in ops {
        match op {
            Answered::Damage { at, value } => damage = Some((usize::from(*at), *value)),
            Answered::Cut { count } => cut = usize::from(*count),
            Answered::Close {} => far.main.iter_mut().for_each(End::close),
            Answered::CloseUrgent {} => far.others.clear(),
            Answered::Await { what } => match what % 5 {
                0 => far.hear_until(AWAITED, |heard| heard.pings > 0 || heard.resumed),
                1 => far.hear_until(AWAITED, |heard| heard.ram),
                2 => far.hear_until(AWAITED, |heard| heard.package),
                3 => far.hear_until(AWAITED, |heard| heard.eof),
                _ => far.hear_until(AWAITED, |heard| heard.devices),
            },
            // Refused where it does not fit; that is as good.
            Answered::StartPostcopy {} => drop(migrator.start_postcopy()),
            Answered::Pause {} => drop(migrator.pause()),
            Answered::Yank {} => drop(migrator.yank()),
            Answered::Write { page, count, fill } => vm.write(*page, *count, *fill),
            Answered::Manners { pongs } => far.pongs = (pongs & 0x40 == 0).then_some(*pongs),
            Answered::Leave {} => return,
            Answered::Break {} => far.break_all(),
            Answered::Welcome { wrong } => far.welcome(wrong & 1 != 0),
            Answered::Resume {} => {
                // It may be on its way back already, by itself.
                let broken = || migrator.info().status.is_some_and(is_broken);
                within(AWAITED, broken);
                // Refused where it is not paused.
                let _ = migrator.resume(Address::Unix(path.into()));
            }
            message => {
                let mut bytes = Vec::new();
                encode(message, &mut bytes);
                if let Some((at, value)) = damage.take()
                    && let Some(byte) = bytes.get_mut(at)
                {
                    *byte = value;
                }
                bytes.truncate(bytes.len().saturating_sub(std::mem::take(&mut cut)));
                if far.main.is_none() {
                    far.wait_for_main();
                }
                far.main.iter_mut().for_each(|main| main.send(&bytes));
                far.look();
            }
        }
    }
}

fn is_broken(status: MigrationStatus) -> bool {
    matches!(
        status,
        MigrationStatus::PostcopyPaused
            | MigrationStatus::PostcopyRecoverSetup
            | MigrationStatus::PostcopyRecover
    )
}

fn is_under_way(migrator: &Migrator) -> bool {
    migrator
        .info()
        .status
        .is_some_and(|status| status.is_running() && status != MigrationStatus::PostcopyPaused)
}

fn expect_sound(vm: &FuzzVm, migrator: &Migrator, heard: Heard) {
    let (info, done) = (migrator.info(), vm.done());
    let status = info.status.expect("one was begun");
    match status {
        MigrationStatus::Completed | MigrationStatus::Cancelled => {}
        _ => expect_one_line(info.error_desc.as_deref().expect("it says why it failed")),
    }
    if heard.eof || heard.package || status == MigrationStatus::PostcopyPaused {
        assert!(!done.running, "{status}: its guest may run elsewhere, and runs here: {heard:?}");
        if heard.package {
            migrator.cont().expect_err("a guest that was given away does not run here again");
        }
    }
    let says = migrator.run_state() == RunState::Running;
    assert_eq!(says, vm.done().running, "{status}: it says {:?}", migrator.run_state());
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::answering::conversations;
    use crate::choices::Op;

    /// What a fuzzer begins from goes as far as it is meant to.
    #[test]
    fn whole_conversations_end_a_migration_and_others_do_not() {
        for (name, settings, ops) in conversations() {
            let expected = match name {
                "cut" | "wrong" => MigrationStatus::PostcopyPaused,
                "refuses" => MigrationStatus::Failed,
                _ => MigrationStatus::Completed,
            };
            let mut input = vec![settings];
            ops.iter().for_each(|op| op.write(&mut input));
            let info = run(&input);
            assert_eq!(info.status, Some(expected), "{name}: {:?}", info.error_desc);
        }
    }
}
