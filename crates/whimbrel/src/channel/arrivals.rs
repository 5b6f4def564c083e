//! The connections of one migration at the destination: which of them is which.
//!
//! A source with multifd connects several times, and the connections arrive in any order. What one
//! of them is for, its first bytes say; one that says nothing keeps nobody waiting.

use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use whimbrel_wire::ChannelKind;
use whimbrel_wire::multifd::{MultifdDecoded, MultifdDecoder, MultifdInit};

use super::listen::not_expected;
use super::waiting::Waiting;
use super::{Channel, Listener, name, tls};
use crate::error::Error;
use crate::worker::{Cancel, Woken};

/// How long the source may take to connect one more channel, when it has begun to.
const NEXT: Duration = Duration::from_secs(30);

/// The same, when it has closed one: what it sent before may be all there is to it.
const CLOSED: Duration = Duration::from_secs(1);

/// How often a connection of which a part of the first message has come is looked at again.
const LOOK: Duration = Duration::from_millis(1);

/// All channels of a migration.
#[derive(Debug)]
pub(crate) struct Arrivals {
    pub(crate) main: Channel,
    /// The multifd channels by their numbers.
    pub(crate) multifd: Vec<Channel>,
    /// What the source says is its VM's UUID on multifd channels; zero is none.
    pub(crate) uuid: [u8; 16],
    /// Ends the waits of all of them when one has failed.
    pub(crate) stop: Cancel,
}

/// What a connection turned out to be.
enum Said {
    Nothing,
    /// The first message, as far as it has come.
    Part,
    /// What it is not to say: another one is waited for.
    Wrong(Error),
    Main,
    Multifd(MultifdInit),
    Gone,
}

impl Arrivals {
    /// Waits for the main channel and `multifd` more.
    pub(crate) fn wait(
        listener: &Listener,
        multifd: u8,
        cancel: &Cancel,
    ) -> Result<Arrivals, Error> {
        let stop = cancel.part().map_err(Error::system("making an eventfd"))?;
        if multifd == 0 {
            let main = match listener.as_fd() {
                Some(_) => first_to_speak(listener, &stop)?,
                None => listener.accept("main", &stop)?,
            };
            return Ok(Arrivals { main, multifd: Vec::new(), uuid: [0; 16], stop });
        }
        if listener.as_fd().is_none() {
            return Err(Error::Refused(
                "capability multifd needs several connections, which this transport has not: \
                 switch it off on both sides or use tcp: or unix:"
                    .into(),
            ));
        }
        let mut gathering = Gathering {
            main: None,
            multifd: std::iter::repeat_with(|| None).take(multifd.into()).collect(),
            uuid: None,
            silent: listener.take_waiting().with_room_for(1 + usize::from(multifd)),
            last: None,
            closed: None,
        };
        while !gathering.is_complete() {
            gathering.step(listener, &stop)?;
        }
        let Gathering { main: Some(main), multifd, uuid, silent, .. } = gathering else {
            unreachable!("complete");
        };
        // It may be the urgent channel, which need not say anything.
        listener.leave_waiting(silent);
        let multifd = multifd.into_iter().flatten().map(|(channel, _)| channel).collect();
        Ok(Arrivals { main, multifd, uuid: uuid.unwrap_or_default(), stop })
    }
}

struct Gathering {
    main: Option<Channel>,
    multifd: Vec<Option<(Channel, MultifdInit)>>,
    uuid: Option<[u8; 16]>,
    silent: Waiting,
    /// When the last channel was known.
    last: Option<Instant>,
    /// A channel that the source has closed already, and since when that is known.
    closed: Option<(&'static str, Instant)>,
}

impl Gathering {
    fn is_complete(&self) -> bool {
        self.main.is_some() && self.multifd.iter().all(Option::is_some)
    }

    /// Those that are known.
    fn arrived(&self) -> impl Iterator<Item = &Channel> {
        let multifd = self.multifd.iter().flatten().map(|(channel, _)| channel);
        self.main.iter().chain(multifd)
    }

    fn step(&mut self, listener: &Listener, stop: &Cancel) -> Result<(), Error> {
        let left = match self.last {
            None => None,
            Some(last) => match NEXT.checked_sub(last.elapsed()) {
                Some(left) => Some(left),
                None => return Err(self.missing(listener)),
            },
        };
        let (left, arrived) = match self.closed {
            Some((_, since)) => match CLOSED.checked_sub(since.elapsed()) {
                Some(left) => (Some(left), Vec::new()),
                None => return Err(self.missing(listener)),
            },
            None => (left, self.arrived().map(AsFd::as_fd).collect()),
        };
        if self.silent.wait(listener, &arrived, left, stop)? == Woken::TimedOut {
            return Err(self.missing(listener));
        }
        let mut progress = self.silent.admit(listener, "multifd", stop)?;
        let mut partly = false;
        for (mut channel, since) in self.silent.take_all() {
            match hear(&mut channel)? {
                Said::Nothing => {
                    self.silent.keep(channel, since);
                    continue;
                }
                // The rest of what it was to say is lost with it.
                Said::Part if self.last.is_some() && channel.is_closed_by_peer() => {
                    self.closed.get_or_insert(("multifd", Instant::now()));
                }
                Said::Part => {
                    partly = true;
                    self.silent.keep(channel, since);
                    continue;
                }
                Said::Wrong(reason) => listener.refuse(&reason),
                Said::Gone => {}
                Said::Main => self.take_main(channel)?,
                Said::Multifd(init) => self.take_multifd(channel, init)?,
            }
            progress = true;
        }
        let closed = self.arrived().find(|channel| channel.is_closed_by_peer()).map(Channel::name);
        if self.closed.is_none() {
            self.closed = closed.map(|name| (name, Instant::now()));
        }
        if partly && !progress {
            // A part of a message is there, for which `poll` does not wait.
            stop.sleep(LOOK).map_err(Error::system("waiting"))?;
        }
        Ok(())
    }

    fn take_main(&mut self, mut channel: Channel) -> Result<(), Error> {
        channel.rename("main");
        if self.main.replace(channel).is_some() {
            return Err(Error::Refused("main channel: a second one has connected".into()));
        }
        self.last = Some(Instant::now());
        Ok(())
    }

    fn take_multifd(&mut self, mut channel: Channel, init: MultifdInit) -> Result<(), Error> {
        let named = name::multifd(init.channel);
        channel.rename(named);
        let count = self.multifd.len();
        let Some(slot) = self.multifd.get_mut(usize::from(init.channel)) else {
            return Err(Error::Refused(format!(
                "{named} channel: the source has more channels than the {count} of \
                 multifd-channels here: set the same on both sides"
            )));
        };
        if *self.uuid.get_or_insert(init.uuid) != init.uuid {
            return Err(Error::Refused(format!(
                "{named} channel, byte 8: it is of another VM than the channels before it, by its UUID"
            )));
        }
        if slot.replace((channel, init)).is_some() {
            return Err(Error::Refused(format!("{named} channel: it has connected twice")));
        }
        self.last = Some(Instant::now());
        Ok(())
    }

    fn missing(&self, listener: &Listener) -> Error {
        if let Some((closed, _)) = self.closed {
            return Error::Refused(format!(
                "{closed} channel: the source closed it before its other channels had come: see \
                 what it says"
            ));
        }
        let missing: Vec<&str> = std::iter::once(self.main.is_none().then_some("main"))
            .chain(
                self.multifd
                    .iter()
                    .zip(0u8..)
                    .map(|(channel, number)| channel.is_none().then(|| name::multifd(number))),
            )
            .flatten()
            .collect();
        let (channel, what) = match missing[..] {
            [one] => (one, String::new()),
            [first, ..] => (first, format!(", nor {} others", missing.len() - 1)),
            [] => ("main", String::new()),
        };
        Error::Refused(format!(
            "{channel} channel: it has not connected within {} s of the others{what}: set \
             capability multifd and the same multifd-channels on both sides{}",
            NEXT.as_secs(),
            listener.last_refusal()
        ))
    }
}

/// A source connects for its main channel first, and speaks at once. So whoever has connected before
/// it and says nothing is not of it, and keeps it out of nothing.
fn first_to_speak(listener: &Listener, stop: &Cancel) -> Result<Channel, Error> {
    let mut waiting = listener.take_waiting();
    loop {
        waiting.admit(listener, "main", stop)?;
        let (mut main, mut silent) = (None, Vec::new());
        for (mut channel, since) in waiting.take_all() {
            if main.is_some() {
                // It may be the urgent channel, which need not say anything.
                waiting.keep(channel, since);
                continue;
            }
            let mut first = [0; ChannelKind::BYTES];
            match channel.handshake().and_then(|_| channel.peek(&mut first)) {
                Ok(None) => silent.push((channel, since)),
                Ok(Some(ChannelKind::BYTES))
                    if ChannelKind::of(first) == Some(ChannelKind::Multifd) =>
                {
                    return Err(not_expected());
                }
                Err(reason @ Error::Tls { .. }) => listener.refuse(&reason),
                // Whatever it says, be it that this is the end, is for who reads it to judge.
                Ok(Some(_)) | Err(_) => main = Some(channel),
            }
        }
        if let Some(mut main) = main {
            listener.leave_waiting(waiting);
            main.rename("main");
            return Ok(main);
        }
        silent.into_iter().for_each(|(channel, since)| waiting.keep(channel, since));
        waiting.wait(listener, &[], None, stop)?;
    }
}

/// What the connection has said of itself by now.
fn hear(channel: &mut Channel) -> Result<Said, Error> {
    match channel.handshake() {
        Ok(None) => {}
        Ok(Some(_)) => return Ok(Said::Nothing),
        Err(reason) => return Ok(Said::Wrong(reason)),
    }
    let mut first = [0; MultifdInit::LEN];
    let bytes = match channel.peek(&mut first) {
        Ok(None) => return Ok(Said::Nothing),
        // Whoever it was, it took nothing with it.
        Ok(Some(0)) | Err(Error::Channel { .. } | Error::Truncated { .. }) => {
            return Ok(Said::Gone);
        }
        Err(reason @ Error::Tls { .. }) => return Ok(Said::Wrong(reason)),
        Ok(Some(bytes)) => bytes,
        Err(error) => return Err(error),
    };
    let Some(magic) = first[..bytes].first_chunk() else { return Ok(Said::Part) };
    if tls::is_spoken_by(magic) {
        return Err(channel.tls_error(tls::UNEXPECTED.into()));
    }
    match ChannelKind::of(*magic) {
        Some(ChannelKind::Main) => Ok(Said::Main),
        Some(ChannelKind::Multifd) if bytes < MultifdInit::LEN => Ok(Said::Part),
        Some(ChannelKind::Multifd) => {
            let mut decoder = MultifdDecoder::new(whimbrel_wire::TargetPage::FOUR_KIB);
            let (_, decoded) = decoder
                .decode(&first)
                .map_err(|source| Error::Protocol { channel: channel.name(), source })?;
            let MultifdDecoded::Init(init) = decoded else {
                unreachable!("the first message of a channel, and all of it is here");
            };
            Ok(Said::Multifd(init))
        }
        _ => Err(Error::Refused(format!(
            "multifd channel, byte 0: a connection begins with {:#010x}, expected the beginning of \
             a main channel (0x5145564d) or of a multifd channel (0x11223344)",
            u32::from_be_bytes(*magic)
        ))),
    }
}
