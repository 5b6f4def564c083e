//! A link that can be cut again and again: it forwards every connection, and lets new ones through.

#![allow(
    dead_code,
    clippy::allow_attributes,
    reason = "each test binary uses the part it needs of what they share"
)]

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{Builder, JoinHandle};

use whimbrel::Address;

/// The link; dropped, it is gone, and so are its threads.
#[derive(Debug)]
pub(crate) struct Relay {
    /// Where the source is to connect to.
    pub address: Address,
    shared: Arc<Shared>,
    accepting: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    to: Mutex<Address>,
    /// Both ends of every connection.
    ends: Mutex<Vec<TcpStream>>,
    threads: Mutex<Vec<JoinHandle<()>>>,
    over: AtomicBool,
    /// Nobody gets through.
    closed: AtomicBool,
    /// The link breaks under the destination's last word, once.
    loses_last_word: AtomicBool,
    /// It breaks when so many bytes more have gone through, in both directions together.
    bytes_left: AtomicU64,
}

/// The return path's SHUT 0.
const LAST_WORD: [u8; 8] = [0, 1, 0, 4, 0, 0, 0, 0];

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn connect(address: &Address) -> std::io::Result<TcpStream> {
    let Address::Tcp { host, port } = address else { panic!("{address} is not tcp:") };
    TcpStream::connect((&**host, *port))
}

impl Relay {
    /// A link to `to`.
    pub(crate) fn to(to: &Address) -> Relay {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let port = listener.local_addr().expect("bound").port();
        let shared = Arc::new(Shared {
            to: Mutex::new(to.clone()),
            ends: Mutex::default(),
            threads: Mutex::default(),
            over: AtomicBool::new(false),
            closed: AtomicBool::new(false),
            loses_last_word: AtomicBool::new(false),
            bytes_left: AtomicU64::new(u64::MAX),
        });
        let inner = shared.clone();
        let accepting = Builder::new().name("proxy".into()).spawn(move || {
            for stream in listener.incoming() {
                if inner.over.load(Ordering::SeqCst) {
                    return;
                }
                if let Ok(stream) = stream
                    && !inner.closed.load(Ordering::SeqCst)
                {
                    inner.forward(stream);
                }
            }
        });
        let address = Address::Tcp { host: "127.0.0.1".into(), port };
        Relay { address, shared, accepting: Some(accepting.expect("a thread")) }
    }

    /// Cuts every connection; new ones are let through.
    pub(crate) fn cut(&self) {
        self.shared.cut();
    }

    /// Cuts every connection when so many bytes more have gone through.
    pub(crate) fn cut_after(&self, bytes: u64) {
        self.shared.bytes_left.store(bytes, Ordering::SeqCst);
    }

    /// The destination's last word is lost, and every connection with it.
    pub(crate) fn lose_last_word(&self) {
        self.shared.loses_last_word.store(true, Ordering::SeqCst);
    }

    /// Whether the last word has still to be lost.
    pub(crate) fn has_to_lose(&self) -> bool {
        self.shared.loses_last_word.load(Ordering::SeqCst)
    }

    /// Whether new connections are let through.
    pub(crate) fn close(&self, closed: bool) {
        self.shared.closed.store(closed, Ordering::SeqCst);
    }
}

impl Shared {
    fn cut(&self) {
        for end in lock(&self.ends).drain(..) {
            let _ = end.shutdown(Shutdown::Both);
        }
    }

    /// How many of so many bytes may still go through.
    fn grant(&self, bytes: usize) -> usize {
        let (bytes, order) = (bytes as u64, Ordering::SeqCst);
        let take = |left: u64| match left {
            u64::MAX => Some(left),
            left => Some(left.saturating_sub(bytes)),
        };
        let left = self.bytes_left.fetch_update(order, order, take).unwrap_or_default();
        usize::try_from(bytes.min(left)).expect("no more than were read")
    }

    fn forward(self: &Arc<Shared>, here: TcpStream) {
        let Ok(there) = connect(&lock(&self.to)) else { return };
        for stream in [&here, &there] {
            stream.set_nodelay(true).expect("an option");
            lock(&self.ends).push(stream.try_clone().expect("a descriptor"));
        }
        let again = |stream: &TcpStream| stream.try_clone().expect("a descriptor");
        for (mut from, mut to) in [(again(&here), again(&there)), (there, here)] {
            let shared = self.clone();
            let copy = move || {
                let mut buffer = vec![0; 256 << 10];
                while let Ok(bytes @ 1..) = from.read(&mut buffer) {
                    if buffer[..bytes].ends_with(&LAST_WORD)
                        && shared.loses_last_word.swap(false, Ordering::SeqCst)
                    {
                        break;
                    }
                    let granted = shared.grant(bytes);
                    if to.write_all(&buffer[..granted]).is_err() {
                        break;
                    }
                    if granted < bytes {
                        shared.cut();
                        break;
                    }
                }
                let _ = to.shutdown(Shutdown::Both);
                let _ = from.shutdown(Shutdown::Both);
            };
            let thread = Builder::new().name("proxy".into()).spawn(copy).expect("a thread");
            lock(&self.threads).push(thread);
        }
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.shared.over.store(true, Ordering::SeqCst);
        drop(connect(&self.address)); // Wakes who accepts.
        if let Some(accepting) = self.accepting.take() {
            let _ = accepting.join();
        }
        self.cut();
        for thread in lock(&self.shared.threads).drain(..) {
            let _ = thread.join();
        }
    }
}
