//! The link by itself, with plain sockets at both ends.

use std::io::{ErrorKind, Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::thread::{Builder, JoinHandle, sleep};
use std::time::{Duration, Instant};

use rustix::process::Pid;

use super::{Fired, Place, Proxy};
use crate::only::Only;
use crate::plan::{Action, Channel, Direction, Fault, How, Plan, Scope, Side, Trigger, Way};

const LIMIT: Duration = Duration::from_secs(60);
const FORTH: Direction = Direction::Forth;

struct Stage {
    there: TcpListener,
    proxy: Proxy,
}

impl Stage {
    fn new(way: Way, faults: &[(Trigger, Action)]) -> Stage {
        Stage::of(way, faults, own_pid())
    }

    fn of(way: Way, faults: &[(Trigger, Action)], process: Pid) -> Stage {
        let drawn = Plan::draw(1, 1, Only { way: Some(way), ..Only::default() });
        let mut plan = Plan {
            faults: faults.iter().map(|&(trigger, action)| Fault { trigger, action }).collect(),
            ..drawn
        };
        plan.scene.tls = false;
        plan.scene.channels = if way.is_multifd() { 2 } else { 0 };
        let there = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let upstream = Place::Tcp(there.local_addr().unwrap().port());
        let proxy = Proxy::start(&plan, &Place::Tcp(0), upstream, [process; 2]).unwrap();
        Stage { there, proxy }
    }

    fn connect(&self) -> TcpStream {
        let Place::Tcp(port) = self.proxy.place() else { unreachable!("it was asked for TCP") };
        limited(TcpStream::connect((Ipv4Addr::LOCALHOST, *port)).unwrap())
    }

    fn accept(&self) -> TcpStream {
        limited(self.there.accept().unwrap().0)
    }

    fn pair(&self) -> (TcpStream, TcpStream) {
        let near = self.connect();
        (near, self.accept())
    }

    /// Waits until so many faults have happened.
    fn fired(&self, count: usize) -> Vec<Fired> {
        let (begun, mut fired) = (Instant::now(), Vec::new());
        while fired.len() < count {
            fired.extend(self.proxy.fired());
            assert!(begun.elapsed() < LIMIT, "{fired:?}");
            sleep(Duration::from_millis(1));
        }
        fired
    }
}

fn own_pid() -> Pid {
    rustix::process::getpid()
}

fn limited(stream: TcpStream) -> TcpStream {
    stream.set_read_timeout(Some(LIMIT)).unwrap();
    stream
}

fn read(stream: &mut TcpStream, count: usize) -> Vec<u8> {
    let mut bytes = vec![0; count];
    stream.read_exact(&mut bytes).unwrap();
    bytes
}

/// All that comes up to the end; and whether that was a reset.
fn rest(stream: &mut TcpStream) -> (Vec<u8>, bool) {
    let mut bytes = Vec::new();
    match stream.read_to_end(&mut bytes) {
        Ok(_) => (bytes, false),
        Err(error) if error.kind() == ErrorKind::ConnectionReset => (bytes, true),
        Err(error) => panic!("{error}"),
    }
}

fn at(byte: u64) -> Trigger {
    Trigger::Byte(Channel::Main, FORTH, byte)
}

/// Does `work` on a thread of its own.
fn beside<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> JoinHandle<T> {
    Builder::new().name("writer".into()).spawn(work).unwrap()
}

/// Bytes none of which is as the one before.
fn words(count: usize) -> Vec<u8> {
    (0..count).map(|at| u8::try_from(at % 251).unwrap()).collect()
}

#[test]
fn a_link_without_a_fault_forwards_all_and_both_ends() {
    let stage = Stage::new(Way::Precopy, &[]);
    let (mut near, mut far) = stage.pair();
    let sent = words(1 << 20);
    let (to_send, mut sending) = (sent.clone(), near.try_clone().unwrap());
    let writer = beside(move || {
        sending.write_all(&to_send).unwrap();
        sending.shutdown(std::net::Shutdown::Write).unwrap();
    });
    assert_eq!(rest(&mut far), (sent, false));
    writer.join().unwrap();
    far.write_all(b"answer").unwrap();
    drop(far);
    assert_eq!(rest(&mut near), (b"answer".to_vec(), false));
    assert_eq!(stage.proxy.moved(), (1 << 20) + 6);
}

#[test]
fn a_cut_is_at_its_very_byte() {
    for (how, byte) in [(How::Close, 0), (How::Close, 1000), (How::Close, 100_000)] {
        let stage =
            Stage::new(Way::Precopy, &[(at(byte), Action::Cut(Scope::One, how, Duration::ZERO))]);
        let (mut near, mut far) = stage.pair();
        let sent = words(200_000);
        let to_send = sent.clone();
        let writer = beside(move || {
            // It may see the end at any byte.
            let _ = near.write_all(&to_send);
            near
        });
        let (came, reset) = rest(&mut far);
        assert_eq!((came.len() as u64, reset), (byte, false));
        assert_eq!(came, sent[..came.len()]);
        drop(writer.join().unwrap());
        assert_eq!(stage.fired(1)[0].fault, 0);
    }
}

#[test]
fn a_reset_is_one_on_both_sides() {
    let cut = Action::Cut(Scope::All, How::Reset, Duration::ZERO);
    let stage = Stage::new(Way::Precopy, &[(at(10), cut)]);
    let (mut near, mut far) = stage.pair();
    near.write_all(&words(10)).unwrap();
    assert!(rest(&mut far).1, "a reset");
    assert!(rest(&mut near).1, "a reset");
}

#[test]
fn one_direction_can_end_alone() {
    let stage = Stage::new(Way::Precopy, &[(at(10), Action::HalfClose)]);
    let (mut near, mut far) = stage.pair();
    near.write_all(&words(20)).unwrap();
    assert_eq!(rest(&mut far), (words(10), false));
    far.write_all(b"back").unwrap();
    assert_eq!(read(&mut near, 4), b"back");
    near.write_all(b"into the void").unwrap();
}

#[test]
fn one_bit_of_one_byte_is_changed() {
    // A channel that nobody reads along in.
    let place = Trigger::Byte(Channel::Urgent, FORTH, 5);
    let stage = Stage::new(Way::Preempt, &[(place, Action::Flip)]);
    let _main = stage.pair();
    let (mut near, mut far) = stage.pair();
    let sent = words(20);
    near.write_all(&sent).unwrap();
    let came = read(&mut far, 20);
    let differs: Vec<usize> = (0..20).filter(|at| sent[*at] != came[*at]).collect();
    assert_eq!(differs, [5]);
    assert_eq!((sent[5] ^ came[5]).count_ones(), 1);
}

#[test]
fn a_delay_passes_and_loses_nothing() {
    let time = Duration::from_millis(80);
    let stage = Stage::new(Way::Precopy, &[(at(10), Action::Delay(time))]);
    let (mut near, mut far) = stage.pair();
    let begun = Instant::now();
    near.write_all(&words(20)).unwrap();
    far.write_all(b"back").unwrap();
    assert_eq!(read(&mut near, 4), b"back", "the other direction is not held up");
    assert_eq!(read(&mut far, 20), words(20));
    assert!(begun.elapsed() >= time, "{:?}", begun.elapsed());
}

#[test]
fn what_is_frozen_for_ever_moves_when_it_is_healed() {
    let freeze = Action::Freeze(Scope::All, None);
    let stage = Stage::new(Way::Precopy, &[(at(10), freeze)]);
    let (mut near, mut far) = stage.pair();
    near.write_all(&words(20)).unwrap();
    assert_eq!(read(&mut far, 10), words(10));
    stage.fired(1);
    far.set_read_timeout(Some(Duration::from_millis(50))).unwrap();
    let error = far.read(&mut [0; 1]).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::WouldBlock);
    stage.proxy.heal();
    far.set_read_timeout(Some(LIMIT)).unwrap();
    assert_eq!(read(&mut far, 10), words(20)[10..]);
}

#[test]
fn a_throttle_counts_its_bytes_out() {
    let throttle = Action::Throttle(Scope::All, 64 << 10, Duration::from_secs(60));
    let stage = Stage::new(Way::Precopy, &[(at(0), throttle)]);
    let (mut near, mut far) = stage.pair();
    let begun = Instant::now();
    near.write_all(&words(16 << 10)).unwrap();
    assert_eq!(read(&mut far, 16 << 10), words(16 << 10));
    // The first of four portions goes at once.
    assert!(begun.elapsed() >= Duration::from_millis(180), "{:?}", begun.elapsed());
}

#[test]
fn a_duplicate_says_what_the_first_one_said() {
    let twin = Action::Duplicate(Duration::from_millis(1));
    let stage = Stage::new(Way::Precopy, &[(at(100), twin)]);
    let (mut near, _far) = stage.pair();
    near.write_all(&words(100)).unwrap();
    let mut second = stage.accept();
    assert_eq!(rest(&mut second).0, words(100));
}

#[test]
fn connections_are_refused_for_a_time() {
    let refuse = Action::Refuse(Duration::from_millis(100));
    let stage = Stage::new(Way::Precopy, &[(at(1), refuse)]);
    let (mut near, mut far) = stage.pair();
    near.write_all(&words(2)).unwrap();
    assert_eq!(read(&mut far, 2), words(2), "the one that is there goes on");
    let Place::Tcp(port) = stage.proxy.place().clone() else { unreachable!("TCP") };
    let try_again = || TcpStream::connect((Ipv4Addr::LOCALHOST, port));
    let begun = Instant::now();
    assert_eq!(try_again().unwrap_err().kind(), ErrorKind::ConnectionRefused);
    while try_again().is_err() {
        assert!(begun.elapsed() < LIMIT);
        sleep(Duration::from_millis(2));
    }
}

#[test]
fn the_first_connections_arrive_the_other_way_round() {
    let reorder = (Trigger::Time(Duration::ZERO), Action::Reorder);
    let stage = Stage::new(Way::Multifd, &[reorder]);
    stage.fired(1);
    let mut nears: Vec<TcpStream> = (0..3).map(|_| stage.connect()).collect();
    for (at, near) in nears.iter_mut().enumerate() {
        near.write_all(&[u8::try_from(at).unwrap()]).unwrap();
    }
    let order: Vec<u8> = (0..3).map(|_| read(&mut stage.accept(), 1)[0]).collect();
    assert_eq!(order, [2, 1, 0]);
}

#[test]
fn a_process_is_stopped_continued_and_killed_at_its_byte() {
    let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
    let stop = Action::Stop(Side::Source, Some(Duration::from_millis(50)));
    let faults = [(at(10), stop), (at(20), Action::Kill(Side::Destination))];
    let stage = Stage::of(Way::Precopy, &faults, Pid::from_child(&child));
    let (mut near, mut far) = stage.pair();
    near.write_all(&words(10)).unwrap();
    stage.fired(1);
    let begun = Instant::now();
    while stage.proxy.has_stopped(Side::Source) {
        assert!(begun.elapsed() < LIMIT);
        sleep(Duration::from_millis(1));
    }
    assert!(!stage.proxy.has_killed(Side::Destination));
    near.write_all(&words(10)).unwrap();
    assert_eq!(read(&mut far, 10), words(10));
    stage.fired(1);
    let status = child.wait().unwrap();
    assert!(stage.proxy.has_killed(Side::Destination) && !status.success());
}

#[test]
fn an_outage_begins_with_a_cut() {
    let cut = Action::Cut(Scope::All, How::Reset, Duration::from_secs(60));
    let stage = Stage::new(Way::Precopy, &[(at(1), cut)]);
    let (mut near, mut far) = stage.pair();
    near.write_all(&words(1)).unwrap();
    assert!(rest(&mut far).1);
    let Place::Tcp(port) = stage.proxy.place().clone() else { unreachable!("TCP") };
    let again = TcpStream::connect((Ipv4Addr::LOCALHOST, port));
    assert_eq!(again.unwrap_err().kind(), ErrorKind::ConnectionRefused);
    stage.proxy.heal();
    let begun = Instant::now();
    while TcpStream::connect((Ipv4Addr::LOCALHOST, port)).is_err() {
        assert!(begun.elapsed() < LIMIT);
        sleep(Duration::from_millis(2));
    }
}
