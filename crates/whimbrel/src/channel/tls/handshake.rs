//! The handshake, in steps that never wait: so that one thread can have many under way, and none
//! delays another.

use std::io;
use std::os::fd::BorrowedFd;
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

/// How long a handshake may take: a few round trips, and a signature on each side.
const HANDSHAKE_MAX: Duration = Duration::from_secs(20);

/// More than any handshake has to keep of what has come.
const INCOMING_MAX: usize = 8 * RECORD_MAX;

/// What a handshake waits for.
#[derive(Debug)]
pub(in crate::channel) enum Progress {
    /// The descriptor has to be ready for this.
    Needs(PollFlags),
    /// Nothing: it is over, and went well. Said once.
    Done(Arc<Session>),
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

/// On the way to a session, over a descriptor that is somebody else's.
pub(in crate::channel) struct Handshake {
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
    /// Why it has failed: rustls must not be asked again then.
    failed: Option<String>,
}

impl std::fmt::Debug for Handshake {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Handshake").field("endpoint", &self.endpoint).finish_non_exhaustive()
    }
}

impl Handshake {
    /// As the side that has connected.
    pub(crate) fn connect(how: &TlsClient) -> Result<Handshake, String> {
        let connection = UnbufferedClientConnection::new(how.config.clone(), how.name.clone());
        Handshake::begin(connection.map(Connection::Client), None, TlsEndpoint::Client)
    }

    /// As the side that was connected to.
    pub(crate) fn accept(how: &TlsServer) -> Result<Handshake, String> {
        let connection = UnbufferedServerConnection::new(Arc::clone(&how.config));
        let authorization = how.authorization.clone();
        Handshake::begin(connection.map(Connection::Server), authorization, TlsEndpoint::Server)
    }

    fn begin(
        connection: Result<Connection, TlsError>,
        authorization: Option<Authorization>,
        endpoint: TlsEndpoint,
    ) -> Result<Handshake, String> {
        let connection = connection.map_err(|error| words::of_handshake(&error, endpoint))?;
        Ok(Handshake {
            endpoint,
            connection: Some(connection),
            authorization,
            incoming: Vec::new(),
            shown: 0,
            outgoing: Vec::new(),
            deadline: Instant::now() + HANDSHAKE_MAX,
            failed: None,
        })
    }

    /// When it has to be over: from then on a step is an error.
    pub(crate) fn deadline(&self) -> Instant {
        self.deadline
    }

    /// Goes as far as it can without waiting. An error is final, however often it is asked for, and
    /// says in words what is wrong.
    pub(crate) fn step(&mut self, socket: BorrowedFd<'_>) -> Result<Progress, String> {
        match &self.failed {
            Some(reason) => Err(reason.clone()),
            None => self.try_step(socket).inspect_err(|reason| self.failed = Some(reason.clone())),
        }
    }

    fn try_step(&mut self, socket: BorrowedFd<'_>) -> Result<Progress, String> {
        loop {
            if !self.outgoing.is_empty() && !self.send(socket)? {
                return self.wait(PollFlags::OUT);
            }
            match self.turn(socket)? {
                Turn::Again => {}
                Turn::Done => {
                    return self.finish(socket).map(|session| Progress::Done(Arc::new(session)));
                }
                Turn::NeedMore => {
                    if !self.show_next()? && !self.receive(socket)? {
                        return self.wait(PollFlags::IN);
                    }
                }
            }
        }
    }

    fn wait(&self, what: PollFlags) -> Result<Progress, String> {
        match Instant::now() < self.deadline {
            true => Ok(Progress::Needs(what)),
            false => Err(format!(
                "{} does not go on with the handshake for {} s: it may not speak TLS: set \
                 tls-creds on both sides",
                self.peer(),
                HANDSHAKE_MAX.as_secs()
            )),
        }
    }

    fn turn(&mut self, socket: BorrowedFd<'_>) -> Result<Turn, String> {
        let shown = &mut self.incoming[..self.shown];
        let (discard, turn) = match &mut self.connection {
            None => (0, Err(TlsError::HandshakeNotComplete)),
            Some(Connection::Client(connection)) => {
                turn(connection.process_tls_records(shown), &mut self.outgoing)
            }
            Some(Connection::Server(connection)) => {
                turn(connection.process_tls_records(shown), &mut self.outgoing)
            }
        };
        self.incoming.drain(..discard);
        self.shown -= discard;
        turn.map_err(|error| self.give_up(&error, socket))
    }

    /// It fails here: the peer is told why, as far as it takes that at once.
    fn give_up(&mut self, error: &TlsError, socket: BorrowedFd<'_>) -> String {
        let shown = &mut self.incoming[..self.shown];
        let told = match &mut self.connection {
            None => (0, Ok(Turn::Done)),
            Some(Connection::Client(connection)) => {
                turn(connection.process_tls_records(shown), &mut self.outgoing)
            }
            Some(Connection::Server(connection)) => {
                turn(connection.process_tls_records(shown), &mut self.outgoing)
            }
        };
        // What it was told before stays the reason.
        drop(told);
        // If it cannot be told, the end of the connection tells it.
        let _ = self.send(socket);
        words::of_handshake(error, self.endpoint)
    }

    /// Shows rustls one record more; false when it has not come as a whole.
    fn show_next(&mut self) -> Result<bool, String> {
        let next = &self.incoming[self.shown..];
        match record_len(next) {
            Ok(Some(len)) if len <= next.len() => {
                self.shown += len;
                Ok(true)
            }
            Ok(_) => Ok(false),
            // Nothing is said to somebody who does not speak TLS.
            Err(Wrong::Header(_)) => Err(format!(
                "{} does not speak TLS: set tls-creds there, too, or on neither side",
                self.peer()
            )),
            Err(_) => Err(format!("{} begins with a record that is too long", self.peer())),
        }
    }

    /// Sends some; true when nothing is left.
    fn send(&mut self, socket: BorrowedFd<'_>) -> Result<bool, String> {
        while !self.outgoing.is_empty() {
            let mut pieces = Gather::new();
            pieces.push_bytes(&self.outgoing);
            let result = pieces.send(socket, false);
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
    fn receive(&mut self, socket: BorrowedFd<'_>) -> Result<bool, String> {
        const AT_ONCE: usize = 4 << 10;
        let before = self.incoming.len();
        if before > INCOMING_MAX {
            return Err(format!("{} sends a handshake that is too long", self.peer()));
        }
        self.incoming.resize(before + AT_ONCE, 0);
        let mut pieces = Scatter::new();
        pieces.push_buffer(&mut self.incoming[before..]);
        let result = pieces.read(socket);
        drop(pieces);
        self.incoming.truncate(before + result.as_ref().map_or(0, |bytes| *bytes));
        match result {
            Ok(0) => Err(format!(
                "{} closed the connection during the handshake: see what it says; if it does not \
                 speak TLS, set tls-creds there, too",
                self.peer()
            )),
            Ok(_) => Ok(true),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(false),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => Ok(true),
            Err(error) => Err(self.broken(&error)),
        }
    }

    fn finish(&mut self, socket: BorrowedFd<'_>) -> Result<Session, String> {
        let Some(connection) = self.connection.take() else {
            unreachable!("it has just said that it is done");
        };
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
            .map_err(|error| words::of_handshake(&error, self.endpoint))?;
        let Some(refused) = self.refused(name) else { return Ok(session) };
        session.alert(AlertDescription::AccessDenied);
        // If it cannot be told, the end of the connection tells it.
        let _ = session.send(socket, &mut Gather::new(), false);
        Err(refused)
    }

    /// Why the peer may not come in.
    fn refused(&self, name: Option<String>) -> Option<String> {
        let authorization = self.authorization.as_ref()?;
        match name {
            Some(name) if authorization.of(&name) == Policy::Allow => None,
            Some(name) => Some(format!(
                "the source's certificate is for '{name}', which tls-authz does not allow in"
            )),
            None => Some(
                "the source shows no certificate, and tls-authz allows in nobody without one"
                    .into(),
            ),
        }
    }

    fn peer(&self) -> &'static str {
        match self.endpoint {
            TlsEndpoint::Client => "the destination",
            TlsEndpoint::Server => "the source",
        }
    }

    fn broken(&self, error: &io::Error) -> String {
        format!("{error}, during the handshake: see what {} says", self.peer())
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

fn encode<Data>(
    data: &mut EncodeTlsData<'_, Data>,
    outgoing: &mut Vec<u8>,
) -> Result<(), TlsError> {
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
