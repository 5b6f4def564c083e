//! What TCP knows of the link below a channel, and how much of the link it may take.
//!
//! Everything here is a wish: on a socket that is not TCP, or a kernel that lacks an option, it
//! does nothing, and the migration is as fast, and as patient, as without it.
#![expect(unsafe_code, reason = "rustix lacks these socket options")]

use std::mem::{self, MaybeUninit};
use std::os::fd::{AsRawFd, BorrowedFd};
use std::time::Duration;

use rustix::net::sockopt;

/// A wish of how full to keep a connection, decided in `plan/window.rs`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Flow {
    /// Bytes under way at most, ours in the socket included; `None` leaves it to the kernel.
    pub(crate) window: Option<u64>,
    /// Bytes a second at most; `None` is without limit.
    pub(crate) rate: Option<u64>,
}

/// What TCP says of a connection.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Facts {
    /// Bytes the peer has acknowledged since the connection began.
    pub(crate) acked: u64,
    /// Bytes sent and not acknowledged, or not even sent.
    pub(crate) outstanding: u64,
    /// The round trip, smoothed over a few acknowledgements.
    pub(crate) rtt: Duration,
    /// The shortest round trip of the last minutes.
    pub(crate) min_rtt: Duration,
}

/// What a connection is for, for whoever orders packets on the way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Class {
    /// A vCPU waits for it.
    Urgent,
    /// Nobody waits for it.
    Background,
}

impl Class {
    /// The kernel's own bands: 6 is "interactive", the highest that needs no privilege; 2 is
    /// "bulk". `pfifo_fast` and `prio` send the first before, the second after all others.
    fn priority(self) -> libc::c_int {
        match self {
            Class::Urgent => 6,
            Class::Background => 2,
        }
    }

    /// AF22 and AF11: low-latency and bulk data (RFC 4594). Of the codepoints of these classes
    /// they are the ones that a Linux router without a policy sorts likewise, since it reads the
    /// byte as the type of service of old: AF21, for one, would be "bulk" to it.
    fn traffic_class(self) -> u8 {
        match self {
            Class::Urgent => 0x50,
            Class::Background => 0x28,
        }
    }
}

/// Marks what goes out on `socket`.
pub(crate) fn classify(socket: BorrowedFd<'_>, class: Class) {
    // One of the two is the wrong family. They come first: each sets a priority, too.
    let _ = sockopt::set_ip_tos(socket, class.traffic_class());
    let _ = sockopt::set_ipv6_tclass(socket, class.traffic_class().into());
    set(socket, libc::SOL_SOCKET, libc::SO_PRIORITY, class.priority());
}

/// Has the kernel end the connection when what was sent is not acknowledged for `silence`, or when
/// nothing is sent and nobody answers for so long.
pub(crate) fn watch(socket: BorrowedFd<'_>, silence: Duration) {
    // Of an idle connection the kernel asks whether the peer is there three times in that time; whole
    // seconds are what it counts in.
    let every = Duration::from_secs((silence.as_secs() / 3).max(1));
    let ms = u32::try_from(silence.as_millis()).unwrap_or(u32::MAX);
    let _ = sockopt::set_tcp_keepidle(socket, every);
    let _ = sockopt::set_tcp_keepintvl(socket, every);
    let _ = sockopt::set_tcp_keepcnt(socket, 3);
    let _ = sockopt::set_tcp_user_timeout(socket, ms);
    let _ = sockopt::set_socket_keepalive(socket, true);
}

/// What TCP knows by now; `None` where there is no TCP.
pub(crate) fn facts(socket: BorrowedFd<'_>) -> Option<Facts> {
    let info = tcp_info(socket)?;
    let unacked = u64::from(info.tcpi_unacked) * u64::from(info.tcpi_snd_mss);
    Some(Facts {
        acked: info.tcpi_bytes_acked,
        outstanding: unacked + u64::from(info.tcpi_notsent_bytes),
        rtt: Duration::from_micros(info.tcpi_rtt.into()),
        min_rtt: Duration::from_micros(info.tcpi_min_rtt.into()),
    })
}

/// Holds the connection to `flow`.
///
/// The kernel appends to what is not sent yet without asking how much there is. So the window
/// holds, and a piece goes out as one, only where each piece is sent with `MSG_EOR`, and without
/// waiting for a full segment (`TCP_NODELAY`).
pub(crate) fn hold(socket: BorrowedFd<'_>, flow: Flow) {
    let rate = flow.rate.map_or(libc::c_ulong::MAX, |rate| {
        libc::c_ulong::try_from(rate).unwrap_or(libc::c_ulong::MAX)
    });
    set(socket, libc::SOL_SOCKET, libc::SO_MAX_PACING_RATE, rate);
    let held = flow.window.is_some_and(|window| hold_window(socket, window));
    if !held {
        release_window(socket);
    }
}

/// Caps what is under way through the send buffer; false if it cannot hold as much.
fn hold_window(socket: BorrowedFd<'_>, window: u64) -> bool {
    // The kernel doubles what it is given, and counts an eighth or so of overhead.
    let Ok(half) = usize::try_from(window / 2 + window / 16) else { return false };
    if sockopt::set_socket_send_buffer_size_force(socket, half).is_ok() {
        return true;
    }
    let set = sockopt::set_socket_send_buffer_size(socket, half);
    // Without a privilege the kernel cuts it to `net.core.wmem_max`, and says nothing.
    set.is_ok() && sockopt::socket_send_buffer_size(socket).is_ok_and(|size| size >= 2 * half)
}

/// Gives the send buffer's size back to the kernel, which lets it grow again.
fn release_window(socket: BorrowedFd<'_>) {
    const SNDBUF_LOCK: libc::c_int = 1;
    let locks = get(socket, libc::SOL_SOCKET, libc::SO_BUF_LOCK);
    let released = match locks {
        Some(locks) if locks & SNDBUF_LOCK == 0 => true,
        Some(locks) => set(socket, libc::SOL_SOCKET, libc::SO_BUF_LOCK, locks & !SNDBUF_LOCK),
        None => false,
    };
    if !released {
        // Before Linux 5.14 there is no way back, only more than enough.
        const PLENTY: usize = 4 << 20;
        let _ = sockopt::set_socket_send_buffer_size(socket, PLENTY);
        let _ = sockopt::set_socket_send_buffer_size_force(socket, PLENTY);
    }
}

fn tcp_info(socket: BorrowedFd<'_>) -> Option<libc::tcp_info> {
    let mut info = MaybeUninit::<libc::tcp_info>::zeroed();
    let room = mem::size_of::<libc::tcp_info>();
    let mut len = libc::socklen_t::try_from(room).expect("a small struct");
    // SAFETY: the kernel writes at most `len` bytes, which is the room there is.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::IPPROTO_TCP,
            libc::TCP_INFO,
            info.as_mut_ptr().cast(),
            &raw mut len,
        )
    };
    // What an older kernel does not know it does not fill in.
    let known = usize::try_from(len).is_ok_and(|len| {
        len >= mem::offset_of!(libc::tcp_info, tcpi_min_rtt) + mem::size_of::<u32>()
    });
    // SAFETY: it is made of integers, all initialised: with zero, some of them overwritten.
    (result == 0 && known).then(|| unsafe { info.assume_init() })
}

fn get(socket: BorrowedFd<'_>, level: libc::c_int, name: libc::c_int) -> Option<libc::c_int> {
    let mut value: libc::c_int = 0;
    let room = mem::size_of::<libc::c_int>();
    let mut len = libc::socklen_t::try_from(room).expect("a few bytes");
    // SAFETY: the kernel writes at most `len` bytes, which is the size of `value`.
    let result = unsafe {
        libc::getsockopt(socket.as_raw_fd(), level, name, (&raw mut value).cast(), &raw mut len)
    };
    (result == 0).then_some(value)
}

/// Whether the kernel took it.
fn set<T: Copy>(socket: BorrowedFd<'_>, level: libc::c_int, name: libc::c_int, value: T) -> bool {
    let len = libc::socklen_t::try_from(mem::size_of::<T>()).expect("a few bytes");
    // SAFETY: the kernel reads at most `len` bytes, which is the size of `value`.
    let result = unsafe {
        libc::setsockopt(socket.as_raw_fd(), level, name, (&raw const value).cast(), len)
    };
    result == 0
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::net::{TcpListener, TcpStream};
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixStream;

    use rustix::net::SendFlags;

    use super::*;

    fn pair() -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let near = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (far, _) = listener.accept().unwrap();
        near.set_nodelay(true).unwrap();
        (near, far)
    }

    /// Bytes that fit in while nobody reads.
    fn fill(socket: &TcpStream) -> usize {
        let mut total = 0;
        loop {
            match rustix::net::send(socket, &[1; 8 << 10], SendFlags::EOR | SendFlags::DONTWAIT) {
                Ok(bytes) => total += bytes,
                Err(error) => {
                    assert_eq!(error, rustix::io::Errno::AGAIN);
                    return total;
                }
            }
        }
    }

    #[test]
    fn facts_tell_what_has_arrived() {
        let (mut near, mut far) = pair();
        near.write_all(&[7; 100_000]).unwrap();
        far.read_exact(&mut [0; 100_000]).unwrap();
        near.write_all(&[7]).unwrap();
        far.read_exact(&mut [0]).unwrap();
        let facts = facts(near.as_fd()).unwrap();
        assert!(facts.acked >= 100_000, "{facts:?}");
        assert!(facts.min_rtt > Duration::ZERO && facts.min_rtt <= Duration::from_secs(10));
        assert!(facts.rtt > Duration::ZERO, "{facts:?}");
    }

    #[test]
    fn what_has_not_arrived_is_outstanding() {
        let (near, _far) = pair();
        let filled = fill(&near);
        let facts = facts(near.as_fd()).unwrap();
        // What is under way counts in whole segments.
        assert!(facts.acked + facts.outstanding >= filled as u64, "{filled} {facts:?}");
    }

    #[test]
    fn a_window_caps_what_the_socket_takes() {
        // The peer's buffer takes its share before ours fills: hold it small.
        let (near, far) = pair();
        sockopt::set_socket_recv_buffer_size(&far, 4 << 10).unwrap();
        hold(near.as_fd(), Flow { window: Some(64 << 10), rate: None });
        let capped = fill(&near);
        hold(near.as_fd(), Flow { window: Some(256 << 10), rate: None });
        let more = fill(&near);
        let facts = facts(near.as_fd()).unwrap();
        let reached = usize::try_from(facts.acked).unwrap();
        assert!(capped <= reached + (64 << 10) + (16 << 10), "{capped} {facts:?}");
        assert!(capped >= 32 << 10, "{capped}");
        assert!(more >= 128 << 10, "{more}");
    }

    #[test]
    fn a_released_window_grows_again() {
        let (near, mut far) = pair();
        hold(near.as_fd(), Flow { window: Some(32 << 10), rate: Some(1 << 20) });
        let held = sockopt::socket_send_buffer_size(&near).unwrap();
        hold(near.as_fd(), Flow { window: None, rate: None });
        let reader = std::thread::scope(|scope| {
            let reading = scope.spawn(|| {
                let mut buffer = vec![0; 1 << 20];
                let mut left = 64 << 20;
                while left > 0 {
                    left -= far.read(&mut buffer).unwrap().min(left);
                }
            });
            (&near).write_all(&vec![1; 64 << 20]).unwrap();
            reading.join()
        });
        reader.unwrap();
        let released = sockopt::socket_send_buffer_size(&near).unwrap();
        assert!(released > 2 * held, "{held} {released}");
    }

    #[test]
    fn a_class_marks_packets_and_orders_them() {
        for (class, priority, tos) in [(Class::Urgent, 6, 0x50), (Class::Background, 2, 0x28)] {
            let (near, _far) = pair();
            classify(near.as_fd(), class);
            let found = get(near.as_fd(), libc::SOL_SOCKET, libc::SO_PRIORITY);
            assert_eq!(found, Some(priority));
            assert_eq!(sockopt::ip_tos(&near).unwrap(), tos);
        }
    }

    #[test]
    fn a_socket_that_is_not_tcp_is_left_alone() {
        let (near, _far) = UnixStream::pair().unwrap();
        classify(near.as_fd(), Class::Urgent);
        hold(near.as_fd(), Flow { window: Some(1 << 20), rate: Some(1 << 20) });
        assert_eq!(facts(near.as_fd()), None);
        let file = std::fs::File::open("/dev/null").unwrap();
        assert_eq!(facts(file.as_fd()), None);
        hold(file.as_fd(), Flow { window: None, rate: None });
    }
}
