//! Multifd: pages on several connections at once.
//!
//! Each connection has a thread, `source/send-N` ([`sender`]), that claims its pages itself, from
//! one walk over RAM that all of them share ([`crew`]). `source/main` gives the turns, and says on
//! the main channel where one ends: all channels deliver what belongs to a turn before any of them
//! begins the next, so that no page is overwritten by an older version of itself.

mod crew;
mod sender;

use std::sync::atomic::AtomicU64;
use std::thread;

use whimbrel_ram::PageMap;
use whimbrel_wire::encode_multifd_flush;

use crate::address::Address;
use crate::channel::Route;
use crate::error::Error;
use crate::packing::{Packing, Peer};
use crate::settings::{MultifdCompression, Parameters, ZeroPageDetection};
use crate::worker::{Cancel, Links, Role, scoped};

pub(crate) use crew::{Beside, Crew, Log, Supply, Terms};
use sender::Sender;

/// How the destination wants it, which both sides know from the machine type.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Dialect {
    /// Every end of a `ram` section is a mark (machine types of QEMU 8.0 and before); otherwise
    /// marks are records of their own.
    pub(crate) mark_each_section: bool,
    /// Who looks for pages of zeros.
    pub(crate) zeros: ZeroPageDetection,
}

impl Dialect {
    /// Appends the mark at which the destination waits for what all channels have sent.
    pub(crate) fn encode_mark(self, words: &mut Vec<u8>) {
        if !self.mark_each_section {
            encode_multifd_flush(words);
        }
    }
}

/// What the channels of one migration have in common.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Opening {
    /// The VM's UUID; zero is none.
    pub(crate) uuid: [u8; 16],
    pub(crate) dialect: Dialect,
    /// Capability `zero-copy-send`.
    pub(crate) zero_copy: bool,
    /// How many there are.
    pub(crate) channels: u8,
}

/// The connections, and what belongs to them for as long as they live.
#[derive(Debug)]
pub(crate) struct Channels {
    senders: Vec<Sender>,
    dialect: Dialect,
    /// Ends their waits, together with the migration's cancellation.
    stop: Cancel,
    /// Packets sent so far, on all of them.
    packets: AtomicU64,
    /// How they pack pages.
    packing: Packing,
}

impl Channels {
    /// Connects all channels to where the main channel is connected to. They have delivered what
    /// belongs to the stream's beginning, whose mark the main channel has still to carry.
    pub(crate) fn connect(
        route: &Route,
        cancel: &Cancel,
        links: &Links,
        opening: &Opening,
        parameters: &Parameters,
    ) -> Result<Channels, Error> {
        let address = &route.address;
        if !matches!(address, Address::Tcp { .. } | Address::Unix(_)) {
            return Err(Error::Refused(format!(
                "{address}: capability multifd needs several connections, which this transport \
                 has not; switch it off or use tcp: or unix:"
            )));
        }
        if opening.zero_copy && parameters.multifd_compression != MultifdCompression::None {
            return Err(Error::Refused(
                "capability zero-copy-send sends pages as they are: set multifd-compression to none"
                    .into(),
            ));
        }
        let stop = cancel.part().map_err(Error::system("making an eventfd"))?;
        let packing = Packing::new(parameters, Peer::Stock);
        let mut channels = Channels::open(route, stop, links, opening, packing, &|_| Vec::new())?;
        channels.end_round()?;
        Ok(channels)
    }

    /// Connects all channels anew after the link broke in postcopy: each begins with its `hello`.
    pub(crate) fn connect_again(
        route: &Route,
        cancel: &Cancel,
        links: &Links,
        opening: &Opening,
        parameters: &Parameters,
        hello: &dyn Fn(u8) -> Vec<u8>,
    ) -> Result<Channels, Error> {
        let packing = Packing::new(parameters, Peer::Whimbrel);
        Channels::open(route, cancel.clone(), links, opening, packing, hello)
    }

    fn open(
        route: &Route,
        stop: Cancel,
        links: &Links,
        opening: &Opening,
        packing: Packing,
        hello: &dyn Fn(u8) -> Vec<u8>,
    ) -> Result<Channels, Error> {
        let connect =
            |number| Sender::connect(number, route, &stop, links, opening, &packing, hello(number));
        let senders = (0..opening.channels).map(connect).collect::<Result<_, Error>>()?;
        let packets = AtomicU64::new(0);
        Ok(Channels { senders, dialect: opening.dialect, stop, packets, packing })
    }

    /// How many there are.
    pub(crate) fn count(&self) -> usize {
        self.senders.len()
    }

    /// What ends the waits of all of them when one has failed: for the main channel to heed, too.
    pub(crate) fn stop(&self) -> &Cancel {
        &self.stop
    }

    pub(crate) fn dialect(&self) -> Dialect {
        self.dialect
    }

    /// Has their threads send what is on `map`, in the turns that `lead` gives. When it returns no
    /// thread is left.
    pub(crate) fn send<'a, T>(
        &mut self,
        map: &'a PageMap,
        terms: Terms<'a>,
        lead: impl FnOnce(&Crew<'a>) -> Result<T, Error>,
    ) -> Result<T, Error> {
        let senders = std::mem::take(&mut self.senders);
        let packing = self.packing.clone();
        let crew =
            Crew::new(map, terms, (self.dialect, packing), self.stop.clone(), senders.len())?;
        let packets = &self.packets;
        let result = thread::scope(|scope| {
            let over = crew.over_when_dropped();
            let mut running = Vec::with_capacity(senders.len());
            for mut sender in senders {
                let crew = &crew;
                let work = move || {
                    crew.work(&mut sender, packets);
                    sender
                };
                let role = Role::SourceSend(sender_number(&running));
                running
                    .push(scoped(scope, role, work).map_err(Error::system("starting a thread"))?);
            }
            let result = lead(&crew);
            if result.is_err() {
                self.stop.set();
            }
            drop(over);
            self.senders = running.into_iter().filter_map(|thread| thread.join().ok()).collect();
            result
        });
        // Whatever `source/main` met when it was woken, this was first.
        result.map_err(|error| crew.take_failure().unwrap_or(error))
    }

    /// The guest goes before the rest of its RAM, and they go on behind it: ends a round for that.
    pub(crate) fn end_round(&mut self) -> Result<(), Error> {
        let packets = &self.packets;
        self.senders.iter_mut().try_for_each(|sender| sender.send_sync(packets))
    }

    /// From here on `cancel` is what ends their waits, and what is set when one fails.
    pub(crate) fn heed(&mut self, cancel: &Cancel) {
        self.stop = cancel.clone();
        self.senders.iter_mut().for_each(|sender| sender.heed(cancel.clone()));
    }

    /// Everything was sent: ends the connections in an orderly way.
    pub(crate) fn finish(self) -> Result<(), Error> {
        self.senders.into_iter().try_for_each(Sender::finish)
    }
}

fn sender_number<T>(running: &[T]) -> u8 {
    u8::try_from(running.len()).expect("at most 255 channels")
}
