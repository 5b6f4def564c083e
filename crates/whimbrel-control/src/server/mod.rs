//! The server: a listener, a thread that accepts, and a thread per client.

mod address;
mod arguments;
mod command;
mod connection;
mod event;
mod in_order;
mod object;
mod outbox;
mod parameters;
mod session;
mod yank;

use std::fmt;
use std::io::{self, ErrorKind, Write};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, poll};
use whimbrel::Event;

use self::outbox::{Outbox, Waker};
use crate::stream::{Listener, Stream};
use crate::{Backend, Endpoint, QmpError, Subscription};

/// How long accepting rests after the kernel refused it (most likely for want of descriptors).
const ACCEPT_REST: Duration = Duration::from_millis(100);

/// What can be chosen about a server.
#[derive(Clone)]
pub struct ServerOptions {
    /// How many clients may be connected at a time; the next is told so and disconnected.
    pub max_clients: usize,
    /// A client that has been connected for so long and has not negotiated makes room for the next.
    pub negotiation_limit: Duration,
    /// How many bytes of replies and events may wait for a client that does not read, before it
    /// is disconnected.
    pub max_backlog: usize,
    /// Where lines go that an administrator may want to see: a client refused or disconnected.
    pub report: Arc<dyn Fn(&str) + Send + Sync>,
}

impl Default for ServerOptions {
    /// 8 clients, 10 s, 256 KiB, standard error.
    fn default() -> ServerOptions {
        ServerOptions {
            max_clients: 8,
            negotiation_limit: Duration::from_secs(10),
            max_backlog: 256 << 10,
            report: Arc::new(|line| {
                // A closed standard error is no reason to fail.
                let _ = writeln!(io::stderr(), "qmp: {line}");
            }),
        }
    }
}

impl fmt::Debug for ServerOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ServerOptions")
            .field("max_clients", &self.max_clients)
            .field("negotiation_limit", &self.negotiation_limit)
            .field("max_backlog", &self.max_backlog)
            .finish_non_exhaustive()
    }
}

/// Why a server could not start.
#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    /// Someone else listens there, or a file is in the way.
    #[error("cannot listen for QMP on {0}: address in use; choose another or end its user")]
    InUse(Endpoint),
    /// Binding failed for another reason.
    #[error("cannot listen for QMP on {endpoint}: {cause}")]
    Listen {
        /// Where.
        endpoint: Endpoint,
        /// Why.
        #[source]
        cause: io::Error,
    },
    /// A thread or an eventfd was not to be had.
    #[error("cannot serve QMP on {endpoint}: {cause}")]
    Resources {
        /// Where.
        endpoint: Endpoint,
        /// Why.
        #[source]
        cause: io::Error,
    },
}

/// A QMP server. Dropped, it disconnects its clients, joins its threads and removes its socket.
pub struct Server {
    endpoint: Endpoint,
    shared: Arc<Shared>,
    acceptor: Option<JoinHandle<()>>,
    subscription: Option<Subscription>,
}

impl Server {
    /// Serves `backend` at `endpoint`, with the usual options.
    pub fn bind(endpoint: Endpoint, backend: Arc<dyn Backend>) -> Result<Server, ServerError> {
        Server::bind_with(endpoint, backend, ServerOptions::default())
    }

    /// Serves `backend` at `endpoint`.
    pub fn bind_with(
        endpoint: Endpoint,
        backend: Arc<dyn Backend>,
        options: ServerOptions,
    ) -> Result<Server, ServerError> {
        let listener = Listener::bind(&endpoint).map_err(|cause| match cause.kind() {
            ErrorKind::AddrInUse => ServerError::InUse(endpoint.clone()),
            _ => ServerError::Listen { endpoint: endpoint.clone(), cause },
        })?;
        let no_resources = |cause| ServerError::Resources { endpoint: endpoint.clone(), cause };
        let bound = listener.endpoint().map_err(no_resources)?;
        if listener.is_open_to_others() {
            (options.report)(&format!(
                "{bound} is open to other hosts: whoever connects controls this VM, and runs \
                 commands as its user"
            ));
        }
        let waker = Waker::new().map_err(no_resources)?;
        let shared = Arc::new(Shared {
            backend,
            options,
            waker,
            ending: AtomicBool::new(false),
            clients: Mutex::default(),
        });
        let subscription = {
            let shared = Arc::downgrade(&shared);
            shared.upgrade().map(|strong| {
                strong.backend.subscribe(Box::new(move |event| {
                    if let Some(shared) = shared.upgrade() {
                        shared.publish(event);
                    }
                }))
            })
        };
        let acceptor = thread::Builder::new().name("qmp/accept".into()).spawn({
            let shared = Arc::clone(&shared);
            move || Acceptor { listener, shared, clients: Vec::new() }.run()
        });
        let acceptor = Some(acceptor.map_err(no_resources)?);
        Ok(Server { endpoint: bound, shared, acceptor, subscription })
    }

    /// Where it listens, with the real port where any free one was asked for.
    pub fn endpoint(&self) -> &Endpoint {
        &self.endpoint
    }
}

impl fmt::Debug for Server {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Server").field("endpoint", &self.endpoint).finish_non_exhaustive()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.subscription = None;
        self.shared.ending.store(true, Ordering::Release);
        self.shared.waker.wake();
        if let Some(acceptor) = self.acceptor.take() {
            // Should it have panicked, its message is out already.
            let _ = acceptor.join();
        }
    }
}

/// What the threads of a server have in common.
struct Shared {
    backend: Arc<dyn Backend>,
    options: ServerOptions,
    /// Wakes the acceptor.
    waker: Waker,
    ending: AtomicBool,
    /// Held while an event is handed out, so that all clients see the same order: never across a
    /// call that can block.
    clients: Mutex<Vec<Arc<Outbox>>>,
}

impl Shared {
    fn clients(&self) -> MutexGuard<'_, Vec<Arc<Outbox>>> {
        self.clients.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn report(&self, line: &str) {
        (self.options.report)(line);
    }

    /// Hands an event of the backend's to all clients that have negotiated.
    fn publish(&self, event: &Event) {
        if event::is_wanted(event, || self.backend.capabilities()) {
            self.send_event(&event::line(event));
        }
    }

    fn send_event(&self, line: &[u8]) {
        for client in self.clients().iter() {
            client.push_event(line);
        }
    }
}

/// Accepts clients, and joins the threads of those that have gone.
struct Acceptor {
    listener: Listener,
    shared: Arc<Shared>,
    /// By number, which is in the thread's name; `None` is free.
    clients: Vec<Option<Client>>,
}

/// A client's thread, and what it can be reached by.
struct Client {
    thread: JoinHandle<()>,
    outbox: Arc<Outbox>,
    since: Instant,
}

impl Client {
    fn join(self) {
        // Should it have panicked, its message is out already.
        let _ = self.thread.join();
    }
}

impl Acceptor {
    fn run(mut self) {
        let mut rest = false;
        while !self.shared.ending.load(Ordering::Acquire) {
            // Failing poll would be want of memory: resting is all that can be done about it.
            rest = self.wait(rest).is_err();
            self.join_gone();
            if rest {
                thread::sleep(ACCEPT_REST);
                continue;
            }
            rest = self.accept_all();
        }
        for client in self.shared.clients().iter() {
            client.end();
        }
        self.clients.drain(..).flatten().for_each(Client::join);
    }

    /// Waits for a client or the waker; when resting, for the waker or the end of the rest.
    fn wait(&self, rest: bool) -> io::Result<()> {
        let waker = PollFd::new(&self.shared.waker, PollFlags::IN);
        let listener = PollFd::new(&self.listener, PollFlags::IN);
        let pause = ACCEPT_REST.try_into().map_err(io::Error::other)?;
        let outcome = if rest {
            poll(&mut [waker], Some(&pause))
        } else {
            poll(&mut [waker, listener], None)
        };
        self.shared.waker.clear();
        match outcome {
            Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    fn join_gone(&mut self) {
        for slot in &mut self.clients {
            if let Some(gone) = slot.take_if(|client| client.thread.is_finished()) {
                gone.join();
            }
        }
    }

    /// A place that is free, or that the client gives up who has been silent for longest.
    fn free_place(&mut self) -> Option<usize> {
        if let Some(free) = self.clients.iter().position(Option::is_none) {
            return Some(free);
        }
        if self.clients.len() < self.shared.options.max_clients {
            self.clients.push(None);
            return Some(self.clients.len() - 1);
        }
        let limit = self.shared.options.negotiation_limit;
        let late = |client: &&mut Option<Client>| {
            client.as_ref().is_some_and(|client| {
                client.since.elapsed() > limit && !client.outbox.has_negotiated()
            })
        };
        let since = |client: &&mut Option<Client>| client.as_ref().map(|client| client.since);
        let silent = self.clients.iter_mut().filter(late).min_by_key(since)?.take()?;
        silent.outbox.end();
        // It executes nothing yet: it is gone as soon as it is told.
        silent.join();
        self.shared.report("a client was disconnected for another: it did not negotiate");
        self.clients.iter().position(Option::is_none)
    }

    /// True if the kernel would not let us accept.
    fn accept_all(&mut self) -> bool {
        loop {
            let error = match self.listener.accept() {
                Ok(stream) => match self.start(stream) {
                    Ok(()) => continue,
                    Err(error) => error,
                },
                Err(error) => error,
            };
            match error.kind() {
                ErrorKind::WouldBlock => return false,
                ErrorKind::Interrupted | ErrorKind::ConnectionAborted => {}
                _ => {
                    self.shared.report(&format!("a client was not accepted: {error}"));
                    return true;
                }
            }
        }
    }

    fn start(&mut self, stream: Stream) -> io::Result<()> {
        stream.set_nonblocking()?;
        let Some(number) = self.free_place() else {
            self.refuse(&stream);
            return Ok(());
        };
        let outbox = Arc::new(Outbox::new(self.shared.options.max_backlog)?);
        self.shared.clients().push(Arc::clone(&outbox));
        let entered = connection::Entered::new(Arc::clone(&self.shared), Arc::clone(&outbox));
        let name = format!("qmp/client-{}", number % 1000);
        let thread = thread::Builder::new()
            .name(name)
            .spawn(move || connection::serve(&stream, &entered, number))?;
        self.clients[number] = Some(Client { thread, outbox, since: Instant::now() });
        Ok(())
    }

    fn refuse(&self, mut stream: &Stream) {
        let most = self.shared.options.max_clients;
        let error = QmpError::generic(format_args!("too many clients: at most {most} are served"));
        // If it cannot be told, being disconnected tells it.
        let _ = stream.write(&session::error_line(&error, None));
        self.shared.report(&format!("a client was refused: {most} are connected already"));
    }
}
