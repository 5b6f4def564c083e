//! A session after its handshake: two directions that have nothing in common but the place where
//! new keys come from.

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use rustls::client::ClientConnectionData;
use rustls::kernel::KernelConnection;
use rustls::server::ServerConnectionData;
use rustls::{
    AlertDescription, ConnectionTrafficSecrets, ContentType, ExtractedSecrets, ProtocolVersion,
    SupportedCipherSuite,
};
use whimbrel_ram::kernel_copy::{Gather, Scatter};

use super::receiving::{Broken, Opened, Receiving};
use super::record::Key;
use super::sending::Sending;

/// With so few records left to be sealed, the key is replaced.
const KEY_ENDS: u64 = 64;

/// The most that is ever peeked at.
const PEEK_MAX: usize = 1 << 10;

/// `KeyUpdate`, to which no answer is wanted.
const KEY_UPDATE: [u8; 5] = [24, 0, 0, 1, 0];

/// Where new keys come from.
pub(super) enum Keys {
    Client(KernelConnection<ClientConnectionData>),
    Server(KernelConnection<ServerConnectionData>),
}

impl Keys {
    fn version(&self) -> (ProtocolVersion, SupportedCipherSuite) {
        match self {
            Keys::Client(keys) => (keys.protocol_version(), keys.negotiated_cipher_suite()),
            Keys::Server(keys) => (keys.protocol_version(), keys.negotiated_cipher_suite()),
        }
    }

    fn make(&self, secrets: (u64, ConnectionTrafficSecrets)) -> Result<Key, rustls::Error> {
        let (version, suite) = self.version();
        Key::new(version, suite, secrets)
    }

    fn next_out(&mut self) -> Result<Key, rustls::Error> {
        let secrets = match self {
            Keys::Client(keys) => keys.update_tx_secret(),
            Keys::Server(keys) => keys.update_tx_secret(),
        }?;
        self.make(secrets)
    }

    fn next_in(&mut self) -> Result<Key, rustls::Error> {
        let secrets = match self {
            Keys::Client(keys) => keys.update_rx_secret(),
            Keys::Server(keys) => keys.update_rx_secret(),
        }?;
        self.make(secrets)
    }
}

/// Why a session does not go on.
#[derive(Debug)]
pub(in crate::channel) enum Fault {
    /// What the system said; it may be that nothing can be done at once (`WouldBlock`).
    System(io::Error),
    /// The connection ended, and the peer had not said that it would.
    Truncated,
    /// What the peer sends is wrong, or it says that what we send is.
    Broken(Broken),
    /// No new key could be made.
    Key(rustls::Error),
    /// TLS 1.2 has no way to replace a key that was used as often as it may be.
    KeyUsedUp,
}

impl From<io::Error> for Fault {
    fn from(error: io::Error) -> Fault {
        Fault::System(error)
    }
}

impl From<Broken> for Fault {
    fn from(broken: Broken) -> Fault {
        Fault::Broken(broken)
    }
}

impl From<rustls::Error> for Fault {
    fn from(error: rustls::Error) -> Fault {
        Fault::Key(error)
    }
}

/// One step of sending.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::channel) enum Sent {
    /// So many bytes of the application's have gone out.
    Some(usize),
    /// Everything has.
    All,
}

/// A session, for one thread each way. A direction's lock hands it from one such thread to the
/// next: nobody waits for the peer with it.
pub(in crate::channel) struct Session {
    sending: Mutex<Sending>,
    receiving: Mutex<Receiving>,
    keys: Mutex<Keys>,
    /// The peer wants our direction to go on with a new key.
    new_key_wanted: AtomicBool,
}

impl std::fmt::Debug for Session {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (version, suite) = lock(&self.keys).version();
        f.debug_struct("Session")
            .field("version", &version)
            .field("suite", &suite.suite())
            .finish_non_exhaustive()
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // A record is sealed or opened, or it is not: a panic leaves nothing half done that could be
    // taken for whole, since its tag would be wrong.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Session {
    /// From a handshake, behind which `come` has come already.
    pub(super) fn new(
        keys: Keys,
        secrets: ExtractedSecrets,
        come: &[u8],
    ) -> Result<Session, rustls::Error> {
        let sending = Sending::new(keys.make(secrets.tx)?);
        let receiving = Receiving::new(keys.make(secrets.rx)?, come);
        Ok(Session {
            sending: Mutex::new(sending),
            receiving: Mutex::new(receiving),
            keys: Mutex::new(keys),
            new_key_wanted: AtomicBool::new(false),
        })
    }

    /// Sends what was sealed and is not sent yet, and then, with this and the next calls, all of
    /// `pieces`. Never waits.
    pub(in crate::channel) fn send(
        &self,
        socket: BorrowedFd<'_>,
        pieces: &mut Gather<'_>,
        apart: bool,
    ) -> Result<Sent, Fault> {
        let mut sending = lock(&self.sending);
        if sending.is_sent() {
            if pieces.bytes_left() == 0 {
                return Ok(Sent::All);
            }
            self.renew_key(&mut sending)?;
            sending.seal(pieces);
        }
        Ok(Sent::Some(sending.send(socket, apart)?))
    }

    fn renew_key(&self, sending: &mut Sending) -> Result<(), Fault> {
        let ends = sending.records_left() <= KEY_ENDS;
        if !self.new_key_wanted.swap(false, Ordering::AcqRel) && !ends {
            return Ok(());
        }
        let mut keys = lock(&self.keys);
        if keys.version().0 != ProtocolVersion::TLSv1_3 {
            return Err(Fault::KeyUsedUp);
        }
        sending.seal_message(ContentType::Handshake, &KEY_UPDATE);
        sending.set_key(keys.next_out()?);
        Ok(())
    }

    /// Says that nothing more comes, behind what was sealed and not sent; the rest of it goes with
    /// [`send`](Session::send) of nothing.
    pub(in crate::channel) fn end(&self) {
        self.say(1, AlertDescription::CloseNotify);
    }

    /// Says why we give up.
    pub(in crate::channel) fn alert(&self, description: AlertDescription) {
        self.say(2, description);
    }

    fn say(&self, level: u8, description: AlertDescription) {
        let mut sending = lock(&self.sending);
        if sending.records_left() > 0 {
            sending.seal_message(ContentType::Alert, &[level, description.into()]);
        }
    }

    /// Fills some of `pieces`: 0 where the peer has ended the stream, `None` when nothing is there
    /// yet. Never waits.
    pub(in crate::channel) fn receive(
        &self,
        fd: BorrowedFd<'_>,
        pieces: &mut Scatter<'_>,
    ) -> Result<Option<usize>, Fault> {
        let mut receiving = lock(&self.receiving);
        let mut taken = 0;
        loop {
            taken += receiving.take(pieces);
            if pieces.bytes_left() == 0 {
                return Ok(Some(taken));
            }
            match self.open_next(&mut receiving)? {
                Opened::NeedMore | Opened::Ended if taken > 0 => return Ok(Some(taken)),
                Opened::NeedMore => {
                    if !read(&mut receiving, fd)? {
                        return Ok(None);
                    }
                }
                Opened::Ended => return Ok(Some(0)),
                Opened::Data | Opened::Nothing | Opened::NewKey { .. } => {}
            }
        }
    }

    /// Copies what comes next into `buffer` and leaves it to be received: as much as is there and
    /// fits. `None` when nothing is there yet, 0 where the peer has ended the stream.
    pub(in crate::channel) fn peek(
        &self,
        fd: BorrowedFd<'_>,
        buffer: &mut [u8],
    ) -> Result<Option<usize>, Fault> {
        assert!(buffer.len() <= PEEK_MAX, "with what is peeked at, a record still fits");
        let mut receiving = lock(&self.receiving);
        let mut ended = false;
        while receiving.plain().len() < buffer.len() {
            match self.open_next(&mut receiving)? {
                Opened::NeedMore => {
                    if !read(&mut receiving, fd)? {
                        break;
                    }
                }
                Opened::Ended => {
                    ended = true;
                    break;
                }
                Opened::Data | Opened::Nothing | Opened::NewKey { .. } => {}
            }
        }
        let there = receiving.plain();
        let len = there.len().min(buffer.len());
        buffer[..len].copy_from_slice(&there[..len]);
        Ok((len > 0 || ended).then_some(len))
    }

    /// Why the peer gave up, if it said so and that is the next it says.
    pub(in crate::channel) fn last_word(&self, fd: BorrowedFd<'_>) -> Option<Fault> {
        let mut receiving = lock(&self.receiving);
        // What is there is for whoever receives.
        while receiving.plain().is_empty() {
            match self.open_next(&mut receiving) {
                Err(alert @ Fault::Broken(Broken::Alert(_))) => return Some(alert),
                Ok(Opened::NeedMore) => match read(&mut receiving, fd) {
                    Ok(true) => {}
                    Ok(false) | Err(_) => return None,
                },
                Ok(Opened::Nothing | Opened::NewKey { .. }) => {}
                Ok(Opened::Data | Opened::Ended) | Err(_) => return None,
            }
        }
        None
    }

    fn open_next(&self, receiving: &mut Receiving) -> Result<Opened, Fault> {
        let opened = receiving.open_next()?;
        if let Opened::NewKey { answer } = opened {
            let mut keys = lock(&self.keys);
            if keys.version().0 != ProtocolVersion::TLSv1_3 {
                return Err(Broken::Message("a new key, which TLS 1.2 has not").into());
            }
            receiving.set_key(keys.next_in()?);
            if answer {
                self.new_key_wanted.store(true, Ordering::Release);
            }
        }
        Ok(opened)
    }
}

/// Reads once; false when nothing is there yet.
fn read(receiving: &mut Receiving, fd: BorrowedFd<'_>) -> Result<bool, Fault> {
    match receiving.read(fd) {
        Ok(0) => Err(Fault::Truncated),
        Ok(_) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(false),
        Err(error) if error.kind() == io::ErrorKind::Interrupted => Ok(true),
        Err(error) => Err(error.into()),
    }
}
