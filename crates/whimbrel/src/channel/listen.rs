//! Waiting for the way in, at the destination.

use std::fmt;
use std::io;
use std::net::{SocketAddr, TcpListener, ToSocketAddrs};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::thread;
use std::time::Duration;

use whimbrel_wire::ChannelKind;

use super::connect::open_error;
use super::tls::TlsServer;
use super::unix_socket::{SocketFile, listen_at};
use super::waiting::Waiting;
use super::{Channel, Kind, end, exec, fd, file};
use crate::address::Address;
use crate::error::Error;
use crate::status::SocketAddressInfo;
use crate::worker::{Cancel, Links, Role, Shut, scoped};

/// As many connections as the system lets wait to be accepted.
const BACKLOG: i32 = -1;

/// A bound address that the source has not come to yet.
#[derive(Debug)]
pub(crate) struct Listener {
    address: Address,
    socket: Socket,
    /// What the channels that come belong to.
    links: Option<Links>,
    /// With it, every channel is secret.
    tls: Option<TlsServer>,
    /// How long a peer may take nothing of what is sent; `None` is for ever.
    silence: Option<Duration>,
    /// Connections that have come, and that nobody has waited for yet.
    waiting: Mutex<Waiting>,
    refusals: Refusals,
}

/// Who wants to know why.
type Told = Box<dyn Fn(&Error) + Send + Sync>;

/// Connections that were turned away while others are waited for.
#[derive(Default)]
struct Refusals {
    told: Option<Told>,
    last: Mutex<Option<String>>,
}

impl std::fmt::Debug for Refusals {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Refusals").field("last", &self.last).finish_non_exhaustive()
    }
}

#[derive(Debug)]
enum Socket {
    Tcp(Arc<Bound<TcpListener>>),
    Unix(Arc<Bound<UnixListener>>, SocketFile),
    /// Nothing to wait for: opened when it is accepted.
    Direct,
}

/// A listening socket, non-blocking.
#[derive(Debug)]
struct Bound<L> {
    listener: L,
    /// A Unix socket that is shut down wakes whoever waits, and then has them wait again.
    shut: AtomicBool,
}

impl<L> Bound<L> {
    fn new(listener: L) -> Arc<Bound<L>> {
        Arc::new(Bound { listener, shut: AtomicBool::new(false) })
    }

    /// What `accept` gives, unless it has been shut down.
    fn next<T>(&self, accept: impl Fn(&L) -> io::Result<T>) -> io::Result<T> {
        let shut = || self.shut.load(Ordering::SeqCst);
        match accept(&self.listener) {
            Err(_) if shut() => Err(end::shut_on_request()),
            accepted => accepted,
        }
    }
}

impl<L: AsFd + fmt::Debug + Send + Sync> Shut for Bound<L> {
    fn shut_down(&self) {
        self.shut.store(true, Ordering::SeqCst);
        end::shut_down(&self.listener);
    }
}

impl Listener {
    /// Binds `address`, so that a source can connect from now on.
    pub(crate) fn bind(address: &Address, cancel: &Cancel) -> Result<Listener, Error> {
        let socket = match address {
            Address::Tcp { host, port } => {
                tcp(host, *port).map(|listener| Socket::Tcp(Bound::new(listener)))
            }
            Address::Unix(path) => listen_at(path, BACKLOG)
                .map(|(listener, file)| Socket::Unix(Bound::new(listener), file)),
            Address::Fd(_) | Address::Exec(_) | Address::File { .. } => Ok(Socket::Direct),
        }
        .map_err(|source| open_error(address, source, cancel))?;
        Ok(Listener {
            address: address.clone(),
            socket,
            links: None,
            tls: None,
            silence: None,
            waiting: Mutex::default(),
            refusals: Refusals::default(),
        })
    }

    /// With `tls`, every channel is secret, or it is none.
    pub(crate) fn secured(self, tls: Option<TlsServer>) -> Listener {
        Listener { tls, ..self }
    }

    /// A peer that takes nothing for so long has gone; `None` is to wait for ever.
    pub(crate) fn waiting_no_longer_than(self, silence: Option<Duration>) -> Listener {
        Listener { silence, ..self }
    }

    /// Calls `told` with the reason whenever a connection is turned away and another one waited
    /// for. It must not block.
    pub(crate) fn telling(self, told: impl Fn(&Error) + Send + Sync + 'static) -> Listener {
        let refusals = Refusals { told: Some(Box::new(told)), ..self.refusals };
        Listener { refusals, ..self }
    }

    /// A connection has been turned away.
    pub(crate) fn refuse(&self, reason: &Error) {
        *lock(&self.refusals.last) = Some(reason.to_string());
        if let Some(told) = &self.refusals.told {
            told(reason);
        }
    }

    /// Why the last connection was turned away, for an error to end in.
    pub(super) fn last_refusal(&self) -> String {
        let last = lock(&self.refusals.last);
        last.as_ref().map(|why| format!("; a connection was refused: {why}")).unwrap_or_default()
    }

    /// Takes over the connections that have come and have not been waited for.
    pub(super) fn take_waiting(&self) -> Waiting {
        std::mem::take(&mut lock(&self.waiting))
    }

    /// Leaves connections to whoever waits next.
    pub(super) fn leave_waiting(&self, waiting: Waiting) {
        *lock(&self.waiting) = waiting;
    }

    /// With the channels that come, and the wait for them, among a migration's connections.
    pub(crate) fn joined(self, links: &Links) -> Listener {
        let end: Option<Weak<dyn Shut>> = match &self.socket {
            Socket::Tcp(listener) => Some(weak(listener)),
            Socket::Unix(listener, _) => Some(weak(listener)),
            Socket::Direct => None,
        };
        if let Some(end) = end {
            links.join(end);
        }
        Listener { links: Some(links.clone()), ..self }
    }

    /// Where it really listens, the port chosen included.
    pub(crate) fn socket_address(&self) -> Option<SocketAddressInfo> {
        match (&self.socket, &self.address) {
            (Socket::Tcp(bound), _) => bound.listener.local_addr().ok().map(|at| {
                SocketAddressInfo::Inet { host: at.ip().to_string(), port: at.port().to_string() }
            }),
            (Socket::Unix(..), Address::Unix(path)) => {
                Some(SocketAddressInfo::Unix { path: path.display().to_string() })
            }
            _ => None,
        }
    }

    /// Takes a connection that is there already, as `name`; `None` when none is. Of what is not
    /// listened to there is one.
    pub(crate) fn accept_now(
        &self,
        name: &'static str,
        cancel: &Cancel,
    ) -> Result<Option<Channel>, Error> {
        let accepted = match &self.socket {
            Socket::Tcp(bound) => bound.next(TcpListener::accept).and_then(|(stream, _)| {
                stream.set_nodelay(true)?;
                Ok((OwnedFd::from(stream), Kind::Socket))
            }),
            Socket::Unix(bound, _file) => bound
                .next(UnixListener::accept)
                .map(|(stream, _)| (OwnedFd::from(stream), Kind::Socket)),
            Socket::Direct => open(&self.address),
        };
        let error = |source| open_error(&self.address, source, cancel);
        match accepted {
            Ok((fd, kind)) => {
                let mut channel = Channel::new(name, fd, kind, cancel).map_err(error)?;
                channel.wait_no_longer_than(self.silence);
                let mut channel = match &self.links {
                    Some(links) => channel.joined(links),
                    None => channel,
                };
                if let Some(tls) = &self.tls {
                    channel.secure_as_server(tls)?;
                }
                Ok(Some(channel))
            }
            // One that went away between connecting and being accepted is none.
            Err(source)
                if matches!(
                    source.kind(),
                    io::ErrorKind::WouldBlock | io::ErrorKind::ConnectionAborted
                ) =>
            {
                Ok(None)
            }
            Err(source) => Err(error(source)),
        }
    }

    /// Refuses a migration of which a multifd channel has come, where none is expected: its pages
    /// have gone nowhere.
    fn refuse_multifd(&self, cancel: &Cancel) -> Result<(), Error> {
        let mut waiting = self.take_waiting();
        waiting.admit(self, "urgent", cancel)?;
        for (mut channel, since) in waiting.take_all() {
            if first_of(&mut channel) == Some(ChannelKind::Multifd) {
                return Err(not_expected());
            }
            waiting.keep(channel, since);
        }
        self.leave_waiting(waiting);
        Ok(())
    }

    /// What can be read when a connection has come, where there is one to wait for.
    pub(crate) fn as_fd(&self) -> Option<BorrowedFd<'_>> {
        match &self.socket {
            Socket::Tcp(bound) => Some(bound.listener.as_fd()),
            Socket::Unix(bound, _file) => Some(bound.listener.as_fd()),
            Socket::Direct => None,
        }
    }

    /// Waits for the source's next channel, which gets `name`. One that has to show first who it is
    /// delays no other by that. The address is taken until the listener goes.
    pub(crate) fn accept(&self, name: &'static str, cancel: &Cancel) -> Result<Channel, Error> {
        let mut waiting = self.take_waiting();
        let accepted = loop {
            waiting.admit(self, name, cancel)?;
            if let Some(channel) = waiting.next_known(self) {
                break channel;
            }
            waiting.wait(self, &[], None, cancel)?;
        };
        self.leave_waiting(waiting);
        Ok(accepted.known_as(name, cancel))
    }
}

impl Listener {
    /// Does `work`, and meanwhile, on a thread beside it, looks after whoever comes next.
    ///
    /// Shakes hands with it, for [`accept`](Listener::accept) to find: a source may wait for that
    /// before it goes on with what `work` waits for. And where no multifd channel is expected, one
    /// that comes ends it all, by `stop`, which `work` heeds: its pages would go nowhere.
    pub(crate) fn greeting<T>(
        &self,
        expects_multifd: bool,
        stop: &Cancel,
        work: impl FnOnce() -> Result<T, Error>,
    ) -> Result<T, Error> {
        if self.as_fd().is_none() {
            return work();
        }
        let over = Cancel::new().map_err(Error::system("making an eventfd"))?;
        let reason = Mutex::new(None);
        let result = thread::scope(|scope| {
            let _over = SetWhenDropped(&over);
            let greet = || {
                if let Err(error) = self.greet_next(expects_multifd, &over) {
                    *lock(&reason) = Some(error);
                    stop.set();
                }
            };
            scoped(scope, Role::DestinationUrgent, greet)
                .map_err(Error::system("starting a thread"))?;
            work()
        });
        match lock(&reason).take() {
            Some(error) => Err(error),
            None if !expects_multifd => {
                result.and_then(|done| self.refuse_multifd(stop).map(|()| done))
            }
            None => result,
        }
    }

    /// Up to the first that is known. What goes wrong with others is left to whoever accepts: it
    /// comes again.
    fn greet_next(&self, expects_multifd: bool, over: &Cancel) -> Result<(), Error> {
        let mut waiting = self.take_waiting();
        let mut known = false;
        while !known && waiting.admit(self, "urgent", over).is_ok() {
            for (mut channel, since) in waiting.take_all() {
                match first_of(&mut channel) {
                    Some(ChannelKind::Multifd) if !expects_multifd => return Err(not_expected()),
                    said => known |= said.is_some(),
                }
                waiting.keep(channel, since);
            }
            // Whose hand has been shaken need not say anything.
            if self.tls.is_some()
                && let Some(channel) = waiting.next_known(self)
            {
                waiting.keep_known(channel);
                known = true;
            }
            if !known && waiting.wait(self, &[], None, over).is_err() {
                break;
            }
        }
        self.leave_waiting(waiting);
        Ok(())
    }
}

/// What a channel is by its first bytes, if they have come.
fn first_of(channel: &mut Channel) -> Option<ChannelKind> {
    let mut first = [0; ChannelKind::BYTES];
    match channel.peek(&mut first) {
        Ok(Some(ChannelKind::BYTES)) => ChannelKind::of(first),
        _ => None,
    }
}

pub(super) fn not_expected() -> Error {
    Error::Refused(
        "multifd channel: the source has capability multifd on and this side has not: set the \
         same on both sides, and the same multifd-channels"
            .into(),
    )
}

/// Ends a thread's wait, also when another one panics.
struct SetWhenDropped<'c>(&'c Cancel);

impl Drop for SetWhenDropped<'_> {
    fn drop(&mut self) {
        self.0.set();
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Whole values are stored under it.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn weak<S: Shut + 'static>(listener: &Arc<S>) -> Weak<dyn Shut> {
    let end: Weak<S> = Arc::downgrade(listener);
    end
}

fn open(address: &Address) -> io::Result<(OwnedFd, Kind)> {
    match address {
        Address::Fd(number) => fd::take(*number),
        Address::Exec(words) => {
            exec::Command::writer(address, words).map(|(fd, command)| (fd, Kind::Command(command)))
        }
        Address::File { path, offset } => Ok((file::open(path, *offset)?, Kind::Pipe)),
        Address::Tcp { .. } | Address::Unix(_) => unreachable!("these are bound"),
    }
}

fn tcp(host: &str, port: u16) -> io::Result<TcpListener> {
    let host = if host.is_empty() { "0.0.0.0" } else { host };
    let addresses: Vec<SocketAddr> = (host, port).to_socket_addrs()?.collect();
    let listener = TcpListener::bind(&*addresses)?;
    listener.set_nonblocking(true)?;
    Ok(listener)
}
