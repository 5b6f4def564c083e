//! A link that can be cut again and again: it forwards every connection, and lets new ones through.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
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
}

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
        for end in lock(&self.shared.ends).drain(..) {
            let _ = end.shutdown(Shutdown::Both);
        }
    }

    /// Whether new connections are let through.
    pub(crate) fn close(&self, closed: bool) {
        self.shared.closed.store(closed, Ordering::SeqCst);
    }
}

impl Shared {
    fn forward(self: &Arc<Shared>, here: TcpStream) {
        let Ok(there) = connect(&lock(&self.to)) else { return };
        for stream in [&here, &there] {
            stream.set_nodelay(true).expect("an option");
            lock(&self.ends).push(stream.try_clone().expect("a descriptor"));
        }
        let again = |stream: &TcpStream| stream.try_clone().expect("a descriptor");
        for (mut from, mut to) in [(again(&here), again(&there)), (there, here)] {
            let copy = move || {
                let mut buffer = vec![0; 256 << 10];
                while let Ok(bytes @ 1..) = from.read(&mut buffer) {
                    if to.write_all(&buffer[..bytes]).is_err() {
                        break;
                    }
                }
                let _ = to.shutdown(Shutdown::Write);
                let _ = from.shutdown(Shutdown::Read);
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
