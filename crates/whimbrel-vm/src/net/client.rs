//! A client of the guest's service, which checks every byte of every answer.

use std::collections::VecDeque;
use std::time::Duration;

use smoltcp::iface::{Config, Interface, SocketHandle, SocketSet};
use smoltcp::phy::{Device, DeviceCapabilities, Medium, RxToken, TxToken};
use smoltcp::socket::tcp;
use smoltcp::time::Instant;
use smoltcp::wire::{EthernetAddress, HardwareAddress, IpAddress, IpCidr};

use super::{FRAME_MAX, NetConfig, SERVICE_PORT, chain};

/// How many requests are under way at a time.
const AHEAD: u64 = 4;

/// What a client of a guest that survives everything never sees.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ClientError {
    /// An answer that does not follow from the requests.
    #[error(
        "answer {number} is {found:016x?}, expected {expected:016x?}: the guest does not know what \
         it has said"
    )]
    Answer {
        /// Which one, from 1 on.
        number: u64,
        /// What it should be: the count of answers, and what follows from the requests.
        expected: [u64; 2],
        /// What it is.
        found: [u64; 2],
    },
    /// The connection was reset.
    #[error("the connection was reset after {answered} answers")]
    Reset {
        /// How many had come.
        answered: u64,
    },
}

/// A client with a network stack of its own: frames go in and come out. It does no I/O, and is told
/// the time.
pub struct Client {
    interface: Interface,
    frames: Frames,
    sockets: SocketSet<'static>,
    tcp: SocketHandle,
    asked: u64,
    answered: u64,
    chain: u64,
    connected: bool,
    /// When each request that is not answered was made.
    waiting: VecDeque<Duration>,
    longest: Duration,
    last: Duration,
}

impl std::fmt::Debug for Client {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Client")
            .field("asked", &self.asked)
            .field("answered", &self.answered)
            .finish_non_exhaustive()
    }
}

impl Client {
    /// One of that name, in a network of 256 addresses, that talks to the guest at `server` from its
    /// port `port`. `now` is the time since whenever, as everywhere here.
    pub fn new(own: NetConfig, server: [u8; 4], port: u16, now: Duration) -> Client {
        let mut frames = Frames::default();
        let mut config = Config::new(HardwareAddress::Ethernet(EthernetAddress(own.mac)));
        config.random_seed = u64::from(port);
        let mut interface = Interface::new(config, &mut frames, time(now));
        interface.update_ip_addrs(|addresses| {
            // An empty list has room for one.
            let _ = addresses.push(IpCidr::new(IpAddress::Ipv4(own.ip.into()), 24));
        });
        let buffer = || tcp::SocketBuffer::new(vec![0; 4096]);
        let mut socket = tcp::Socket::new(buffer(), buffer());
        socket.set_nagle_enabled(false);
        let server = (IpAddress::Ipv4(server.into()), SERVICE_PORT);
        socket.connect(interface.context(), server, port).expect("a fresh socket, and a port");
        let mut sockets = SocketSet::new(Vec::new());
        let tcp = sockets.add(socket);
        Client {
            interface,
            frames,
            sockets,
            tcp,
            asked: 0,
            answered: 0,
            chain: 0,
            connected: false,
            waiting: VecDeque::new(),
            longest: Duration::ZERO,
            last: now,
        }
    }

    /// A frame has come for it.
    pub fn receive(&mut self, frame: Vec<u8>) {
        self.frames.come.push_back(frame);
    }

    /// Does what there is to do; gives the frames that it sends.
    pub fn poll(&mut self, now: Duration) -> Result<Vec<Vec<u8>>, ClientError> {
        self.interface.poll(time(now), &mut self.frames, &mut self.sockets);
        self.talk(now)?;
        self.interface.poll(time(now), &mut self.frames, &mut self.sockets);
        Ok(std::mem::take(&mut self.frames.go))
    }

    /// How long until there is something to do, if nothing comes.
    pub fn wait(&mut self, now: Duration) -> Option<Duration> {
        let wait = self.interface.poll_delay(time(now), &self.sockets);
        wait.map(|wait| Duration::from_micros(wait.total_micros()))
    }

    fn talk(&mut self, now: Duration) -> Result<(), ClientError> {
        let socket = self.sockets.get_mut::<tcp::Socket<'_>>(self.tcp);
        self.connected |= socket.may_send();
        if self.connected && !socket.may_recv() || socket.state() == tcp::State::Closed {
            return Err(ClientError::Reset { answered: self.answered });
        }
        while socket.recv_queue() >= 16 {
            let mut answer = [0; 16];
            if socket.recv_slice(&mut answer) != Ok(16) {
                break;
            }
            let word = |at: usize| {
                u64::from_le_bytes(answer[at..at + 8].try_into().expect("8 of 16 bytes"))
            };
            let found = [word(0), word(8)];
            self.chain = chain(self.chain, request(self.answered));
            self.answered += 1;
            let expected = [self.answered, self.chain];
            if found != expected {
                return Err(ClientError::Answer { number: self.answered, expected, found });
            }
            let asked = self.waiting.pop_front().unwrap_or(now);
            self.longest = self.longest.max(now.saturating_sub(asked));
            self.last = now;
        }
        while socket.may_send()
            && self.asked - self.answered < AHEAD
            && socket.send_capacity() - socket.send_queue() >= 8
        {
            if socket.send_slice(&request(self.asked).to_le_bytes()) != Ok(8) {
                break;
            }
            self.asked += 1;
            self.waiting.push_back(now);
        }
        Ok(())
    }

    /// How many requests have been answered, rightly.
    pub fn answered(&self) -> u64 {
        self.answered
    }

    /// The longest time that one has waited for its answer.
    pub fn longest_wait(&self) -> Duration {
        self.longest
    }

    /// When the last answer came.
    pub fn last_answer(&self) -> Duration {
        self.last
    }

    /// Forgets the longest wait so far.
    pub fn forget_wait(&mut self) {
        self.longest = Duration::ZERO;
    }
}

/// The request of that number.
fn request(number: u64) -> u64 {
    number.wrapping_mul(0xd6e8_feb8_6659_fd93)
}

fn time(since: Duration) -> Instant {
    Instant::from_micros(i64::try_from(since.as_micros()).unwrap_or(i64::MAX))
}

/// Frames that have come, and that go.
#[derive(Debug, Default)]
struct Frames {
    come: VecDeque<Vec<u8>>,
    go: Vec<Vec<u8>>,
}

struct Come(Vec<u8>);

struct Go<'f>(&'f mut Vec<Vec<u8>>);

impl Device for Frames {
    type RxToken<'a> = Come;
    type TxToken<'a> = Go<'a>;

    fn receive(&mut self, _: Instant) -> Option<(Come, Go<'_>)> {
        Some((Come(self.come.pop_front()?), Go(&mut self.go)))
    }

    fn transmit(&mut self, _: Instant) -> Option<Go<'_>> {
        Some(Go(&mut self.go))
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        (capabilities.medium, capabilities.max_transmission_unit) = (Medium::Ethernet, FRAME_MAX);
        capabilities
    }
}

impl RxToken for Come {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        f(&self.0)
    }
}

impl TxToken for Go<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, len: usize, f: F) -> R {
        let mut frame = vec![0; len];
        let result = f(&mut frame);
        self.0.push(frame);
        result
    }
}
