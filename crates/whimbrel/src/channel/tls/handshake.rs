//! The handshake, in steps that never wait: so that one thread can have many under way, and none
//! delays another.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustls::client::UnbufferedClientConnection;
use rustls::server::UnbufferedServerConnection;
use rustls::unbuffered::{
    ConnectionState, EncodeError, EncodeTlsData, InsufficientSizeError, UnbufferedStatus,
};
use rustls::{AlertDescription, Error as TlsError, ExtractedSecrets};

use rustix::event::PollFlags;
use whimbrel_ram::kernel_copy::{Gather, Scatter};

use super::authorization::{Authorization, Policy};
use super::credentials::{TlsClient, TlsEndpoint, TlsServer};
use super::record::{RECORD_MAX, Wrong, record_len};
use super::session::{Keys, Session};
use super::{distinguished_name, words};
use crate::channel::Channel;
use crate::error::Error;
use crate::worker::{Cancel, Woken};

/// How long a handshake may take: a few round trips, and a signature on each side.
const HANDSHAKE_MAX: Duration = Duration::from_secs(20);

/// More than any handshake has to keep of what has come.
const INCOMING_MAX: usize = 8 * RECORD_MAX;

/// What a handshake waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Progress {
    /// The descriptor has to be ready for this.
    Needs(PollFlags),
    /// Nothing: it is over, and went well.
    Done,
}

enum Connection {
    Client(UnbufferedClientConnection),
    Server(UnbufferedServerConnection),
}

/// What rustls wants next.
enum Turn {
    /// To go on.
    Again,
    /// Another record.
    NeedMore,
    /// Nothing more.
    Done,
}

/// A channel on its way to be a secret one.
pub(crate) struct Handshake {
    channel: Channel,
    /// Which side we are.
    endpoint: TlsEndpoint,
    /// Until it is over.
    connection: Option<Connection>,
    authorization: Option<Authorization>,
    incoming: Vec<u8>,
    /// Of `incoming`, what rustls has been shown: whole records, and none behind the last of the
    /// handshake. What comes behind that is the session's.
    shown: usize,
    outgoing: Vec<u8>,
    deadline: Instant,
}

impl std::fmt::Debug for Handshake {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Handshake").field("channel", &self.channel).finish_non_exhaustive()
    }
}

impl AsFd for Handshake {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.channel.as_fd()
    }
}

impl Handshake {
    /// As the side that has connected.
    pub(crate) fn connect(channel: Channel, how: &TlsClient) -> Result<Handshake, Error> {
        let connection =
            UnbufferedClientConnection::new(how.config.clone(), how.name.clone()).map(Connection::Client);
        Handshake::begin(channel, connection, None, TlsEndpoint::Client)
    }

    /// As the side that was connected to.
    pub(crate) fn accept(channel: Channel, how: &TlsServer) -> Result<Handshake, Error> {
        let connection =
            UnbufferedServerConnection::new(Arc::clone(&how.config)).map(Connection::Server);
        Handshake::begin(channel, connection, how.authorization.clone(), TlsEndpoint::Server)
    }

    fn begin(
        channel: Channel,
        connection: Result<Connection, TlsError>,
        authorization: Option<Authorization>,
        endpoint: TlsEndpoint,
    ) -> Result<Handshake, Error> {
        let connection = connection
            .map_err(|error| channel.tls_error(words::of_handshake(&error, endpoint)))?;
        Ok(Handshake {
            channel,
            endpoint,
            connection: Some(connection),
            authorization,
            incoming: Vec::new(),
            shown: 0,
            outgoing: Vec::new(),
            deadline: Instant::now() + HANDSHAKE_MAX,
        })
    }

    /// When it has to be over: then the next step is an error.
    pub(crate) fn deadline(&self) -> Instant {
        self.deadline
    }

    /// Goes as far as it can without waiting.
    pub(crate) fn step(&mut self) -> Result<Progress, Error> {
        loop {
            if !self.outgoing.is_empty() && !self.send()? {
                return self.wait(PollFlags::OUT);
            }
            if self.connection.is_none() {
                return Ok(Progress::Done);
            }
            match self.turn()? {
                Turn::Again => {}
                Turn::Done => self.finish()?,
                Turn::NeedMore => {
                    if !self.show_next()? && !self.receive()? {
                        return self.wait(PollFlags::IN);
                    }
                }
            }
        }
    }

    /// The channel, whose bytes are secret from here on.
    ///
    /// # Panics
    /// Before it is [`Done`](Progress::Done).
    pub(crate) fn into_channel(self) -> Channel {
        assert!(self.channel.is_secret(), "the handshake is not over");
        self.channel
    }

    /// Goes through with it, waiting as long as `cancel` allows.
    pub(crate) fn complete(mut self, cancel: &Cancel) -> Result<Channel, Error> {
        loop {
            match self.step()? {
                Progress::Done => return Ok(self.into_channel()),
                Progress::Needs(what) => {
                    let left = self.deadline.saturating_duration_since(Instant::now());
                    let woken = cancel
                        .wait(self.as_fd(), what, Some(left))
                        .map_err(Error::system("waiting for a TLS handshake"))?;
                    if woken == Woken::Cancelled {
                        return Err(Error::Cancelled);
                    }
                }
            }
        }
    }

    fn wait(&self, what: PollFlags) -> Result<Progress, Error> {
        match Instant::now() < self.deadline {
            true => Ok(Progress::Needs(what)),
            false => Err(self.error(format!(
                "{} does not go on with the handshake for {} s: it may not speak TLS: set \
                 tls-creds on both sides",
                self.peer(),
                HANDSHAKE_MAX.as_secs()
            ))),
        }
    }

    fn turn(&mut self) -> Result<Turn, Error> {
        let shown = &mut self.incoming[..self.shown];
        let (discard, turn) = match &mut self.connection {
            None => (0, Ok(Turn::Done)),
            Some(Connection::Client(connection)) => {
                turn(connection.process_tls_records(shown), &mut self.outgoing)
            }
            Some(Connection::Server(connection)) => {
                turn(connection.process_tls_records(shown), &mut self.outgoing)
            }
        };
        self.incoming.drain(..discard);
        self.shown -= discard;
        turn.map_err(|error| self.give_up(&error))
    }

    /// It fails here: the peer is told why, as far as it takes that at once.
    fn give_up(&mut self, error: &TlsError) -> Error {
        for _ in 0..4 {
            let (_, turn) = match &mut self.connection {
                None => break,
                Some(Connection::Client(connection)) => {
                    turn(connection.process_tls_records(&mut []), &mut self.outgoing)
                }
                Some(Connection::Server(connection)) => {
                    turn(connection.process_tls_records(&mut []), &mut self.outgoing)
                }
            };
            if !matches!(turn, Ok(Turn::Again)) {
                break;
            }
        }
        // If it cannot be told, the end of the connection tells it.
        let _ = self.send();
        self.error(words::of_handshake(error, self.endpoint))
    }

    /// Shows rustls one record more; false when it has not come as a whole.
    fn show_next(&mut self) -> Result<bool, Error> {
        let next = &self.incoming[self.shown..];
        match record_len(next) {
            Ok(Some(len)) if len <= next.len() => {
                self.shown += len;
                Ok(true)
            }
            Ok(_) => Ok(false),
            // Nothing is said to somebody who does not speak TLS.
            Err(Wrong::Header(_)) => Err(self.error(format!(
                "{} does not speak TLS: set tls-creds there, too, or on neither side",
                self.peer()
            ))),
            Err(_) => {
                Err(self.error(format!("{} begins with a record that is too long", self.peer())))
            }
        }
    }

    /// Sends some; true when nothing is left.
    fn send(&mut self) -> Result<bool, Error> {
        while !self.outgoing.is_empty() {
            let mut pieces = Gather::new();
            pieces.push_bytes(&self.outgoing);
            let result = pieces.send(self.channel.as_fd(), false);
            match result {
                Ok(bytes) => drop(self.outgoing.drain(..bytes)),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(false),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(self.broken(&error)),
            }
        }
        Ok(true)
    }

    /// Reads once; false when nothing is there.
    fn receive(&mut self) -> Result<bool, Error> {
        const AT_ONCE: usize = 4 << 10;
        let before = self.incoming.len();
        if before > INCOMING_MAX {
            return Err(self.error(format!("{} sends a handshake that is too long", self.peer())));
        }
        self.incoming.resize(before + AT_ONCE, 0);
        let mut pieces = Scatter::new();
        pieces.push_buffer(&mut self.incoming[before..]);
        let result = pieces.read(self.channel.as_fd());
        drop(pieces);
        self.incoming.truncate(before + result.as_ref().map_or(0, |bytes| *bytes));
        match result {
            Ok(0) => Err(self.error(format!(
                "{} closed the connection during the handshake: see what it says; if it does not \
                 speak TLS, set tls-creds there, too",
                self.peer()
            ))),
            Ok(_) => Ok(true),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(false),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => Ok(true),
            Err(error) => Err(self.broken(&error)),
        }
    }

    /// From here on the channel's bytes are secret.
    fn finish(&mut self) -> Result<(), Error> {
        let Some(connection) = self.connection.take() else { return Ok(()) };
        let name = match &connection {
            Connection::Server(connection) => {
                let shown = connection.peer_certificates().and_then(<[_]>::first);
                shown.map(|certificate| distinguished_name::of(certificate).unwrap_or_default())
            }
            Connection::Client(_) => None,
        };
        // Whatever was shown has been used up: what is left has come behind the handshake.
        let come = std::mem::take(&mut self.incoming);
        let session = into_session(connection, &come)
            .map_err(|error| self.error(words::of_handshake(&error, self.endpoint)))?;
        let refused = self.refused(name);
        if refused.is_some() {
            session.alert(AlertDescription::AccessDenied);
            // If it cannot be told, the end of the connection tells it.
            let _ = session.send(self.channel.as_fd(), &mut Gather::new(), false);
        }
        self.channel.set_session(session);
        refused.map_or(Ok(()), Err)
    }

    /// Why the peer may not come in.
    fn refused(&self, name: Option<String>) -> Option<Error> {
        let authorization = self.authorization.as_ref()?;
        match name {
            Some(name) if authorization.of(&name) == Policy::Allow => None,
            Some(name) => Some(self.error(format!(
                "the source's certificate is for '{name}', which tls-authz does not allow in"
            ))),
            None => Some(self.error(
                "the source shows no certificate, and tls-authz allows in nobody without one".into(),
            )),
        }
    }

    fn peer(&self) -> &'static str {
        match self.endpoint {
            TlsEndpoint::Client => "the destination",
            TlsEndpoint::Server => "the source",
        }
    }

    fn broken(&self, error: &io::Error) -> Error {
        self.error(format!("{error}, during the handshake: see what {} says", self.peer()))
    }

    fn error(&self, reason: String) -> Error {
        self.channel.tls_error(reason)
    }
}

fn into_session(connection: Connection, come: &[u8]) -> Result<Session, TlsError> {
    let (secrets, keys): (ExtractedSecrets, Keys) = match connection {
        Connection::Client(connection) => {
            let (secrets, keys) = connection.dangerous_into_kernel_connection()?;
            (secrets, Keys::Client(keys))
        }
        Connection::Server(connection) => {
            let (secrets, keys) = connection.dangerous_into_kernel_connection()?;
            (secrets, Keys::Server(keys))
        }
    };
    Session::new(keys, secrets, come)
}

/// What rustls wants, and how many bytes of what it was shown it has done with.
fn turn<Data>(
    status: UnbufferedStatus<'_, '_, Data>,
    outgoing: &mut Vec<u8>,
) -> (usize, Result<Turn, TlsError>) {
    let turn = match status.state {
        Ok(ConnectionState::EncodeTlsData(mut data)) => {
            encode(&mut data, outgoing).map(|()| Turn::Again)
        }
        Ok(ConnectionState::TransmitTlsData(data)) => {
            data.done(); // It is in `outgoing`, which goes before anything else.
            Ok(Turn::Again)
        }
        Ok(ConnectionState::BlockedHandshake) => Ok(Turn::NeedMore),
        Ok(ConnectionState::WriteTraffic(_)) => Ok(Turn::Done),
        Ok(_) => Err(TlsError::General("it goes on where it should end".into())),
        Err(error) => Err(error),
    };
    (status.discard, turn)
}

fn encode<Data>(data: &mut EncodeTlsData<'_, Data>, outgoing: &mut Vec<u8>) -> Result<(), TlsError> {
    let before = outgoing.len();
    let mut room = 1 << 10;
    loop {
        outgoing.resize(before + room, 0);
        match data.encode(&mut outgoing[before..]) {
            Ok(len) => {
                outgoing.truncate(before + len);
                return Ok(());
            }
            Err(EncodeError::InsufficientSize(InsufficientSizeError { required_size }))
                if required_size > room =>
            {
                room = required_size;
            }
            Err(error) => {
                outgoing.truncate(before);
                return Err(TlsError::General(error.to_string()));
            }
        }
    }
}
