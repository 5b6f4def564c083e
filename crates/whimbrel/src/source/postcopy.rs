//! Postcopy: the guest goes first, and the rest of its RAM follows.
//!
//! What the destination does not have yet is named (RAM_DISCARD), the devices go in one package
//! that ends in RUN, and the guest runs there. From then on `source/main` sends all that is left,
//! in an order that follows what is asked for, while [`urgent`](super::urgent) answers requests.
//!
//! The right to run the guest is given up before the last bytes of the package, RUN, go out. After
//! that no failure brings it back: the migration pauses, and both sides keep what they have.

use whimbrel_ram::dirty::DirtyBits;
use whimbrel_ram::{GuestRam, PageMap, TARGET_PAGE};
use whimbrel_wire::{Command, DeviceSection};

use super::multifd::{Channels, Opening};
use super::recover::{Recover, Recovered, Ways};
use super::session::{Part, Session};
use super::setup::Stream;
use crate::address::Address;
use crate::channel::{Channel, Route};
use crate::error::Error;
use crate::hello::Features;
use crate::recovery;
use crate::recovery::proofs::{self, Proofs};
use crate::report::Report;
use crate::settings::Current;
use crate::status::MigrationStatus;
use crate::worker::{Cancel, Links};

/// Who gives the guest away.
pub(crate) trait HandOver {
    /// The guest is about to be the destination's: gives up the right to run it.
    fn give_up(&mut self);
    /// RUN has not gone out as a whole: nobody was given anything.
    fn take_back(&mut self);
    /// RUN has gone out.
    fn gone(&mut self);
    /// After that: how the migration stands.
    fn stands(&mut self, status: MigrationStatus);
    /// After that: the link is broken, and why.
    fn paused(&mut self, reason: &Error);
}

/// How a postcopy failed.
#[derive(Debug)]
pub(crate) enum Failed {
    /// Before the guest was given away: it is still here.
    Before(Error),
    /// After that, and it was ended while it was paused.
    After(Error),
}

/// What is needed to send the rest after the guest.
pub(crate) struct Postcopy<'a> {
    pub(crate) ram: &'a GuestRam,
    pub(crate) report: &'a Report,
    pub(crate) parameters: &'a Current,
    /// Ends everything up to the hand-over.
    pub(crate) cancel: &'a Cancel,
    /// End everything after it.
    pub(crate) links: &'a Links,
    /// Pages that may hold something else than zeros; `None` to ask the kernel.
    pub(crate) content: Option<DirtyBits>,
    /// Pages that the guest wrote last, where that is known.
    pub(crate) hot: Option<DirtyBits>,
    /// A QEMU up to 7.2 wants the urgent channel to be ended by a mark.
    pub(crate) urgent_ends_with_mark: bool,
    /// Multifd channels. A whimbrel takes pages on them also now; for a QEMU they stay open.
    pub(crate) channels: Option<(Channels, Opening)>,
    /// Where the destination is, and where else it may be found.
    pub(crate) route: Route,
    pub(crate) ways: Ways<'a>,
}

/// Opens the channel for urgent pages. The destination must have answered already, so that it
/// does not take this for the main channel.
pub(crate) fn open_urgent(route: &Route, cancel: &Cancel, links: &Links) -> Result<Channel, Error> {
    match &route.address {
        Address::Tcp { .. } | Address::Unix(_) => route.connect("urgent", cancel, links),
        address @ (Address::Fd(_) | Address::Exec(_) | Address::File { .. }) => {
            Err(Error::Refused(format!(
                "{address}: capability postcopy-preempt needs a second connection, which this \
             transport has not; switch it off or use tcp: or unix:"
            )))
        }
    }
}

/// The map by which the rest is sent: what must not be split over two channels is what the
/// destination places at once. `left` has host pages for units.
pub(crate) fn map_for(agreed: Features, ram: &GuestRam, left: PageMap) -> PageMap {
    left.widen_to_host_pages();
    if left.pending() == 0 {
        // A destination wants to be told of something that it has not got.
        let (block, _) = ram.blocks().next().expect("a guest has RAM");
        left.mark_run(block, 0..left.unit(block).target_pages());
    }
    if !agreed.has(Features::SMALL_PIECES) {
        return left;
    }
    let map = PageMap::with_units(ram, |_| TARGET_PAGE);
    for (block, _) in ram.blocks() {
        left.runs(block).for_each(|run| {
            map.mark_run(block, run);
        });
    }
    map
}

impl<'a> Postcopy<'a> {
    /// Says what the destination has to forget, gives it the guest, and sends all that is on
    /// `map`; whenever the connections break after that, over others.
    pub(crate) fn run(
        mut self,
        map: &'a PageMap,
        mut stream: Stream,
        urgent: Option<Channel>,
        sections: Vec<DeviceSection>,
        hand_over: &mut dyn HandOver,
    ) -> Result<(), Failed> {
        let agreed = stream.agreed();
        let mut recover = self.recover(agreed, &mut stream, &urgent).map_err(Failed::Before)?;
        let (channels, opening) = self.channels.take().unzip();
        let goes_on = agreed.has(Features::MULTIFD_GOES_ON);
        let session = Session { stream, urgent, exchange: None };
        let mut outcome = self.session(map, session, Part::Whole { sections, channels }, hand_over);
        while let Err(Failed::After(error)) = &outcome {
            hand_over.paused(error);
            let recovered = recover.run(map, hand_over).map_err(Failed::After)?;
            let Some(Recovered { stream, urgent, exchange, ticket, route }) = recovered else {
                break;
            };
            let session = Session { stream, urgent, exchange };
            let again = opening.as_ref().filter(|_| goes_on).zip(ticket);
            let part = Part::Rest { again, route };
            outcome = self.session(map, session, part, hand_over);
        }
        outcome
    }

    /// What is needed to find the destination again; tells it what makes this migration itself,
    /// where it understands that.
    fn recover(
        &self,
        agreed: Features,
        stream: &mut Stream,
        urgent: &Option<Channel>,
    ) -> Result<Recover<'a>, Error> {
        let proofs = match agreed.has(Features::RECOVERS) {
            true => {
                let beat = self.parameters.with(recovery::beat).unwrap_or_default();
                let beat_ms = u32::try_from(beat.as_millis()).unwrap_or(u32::MAX);
                let identity = proofs::new_identity(beat_ms)?;
                self.report.is_of(identity.id);
                Command::Identity(identity).encode(stream.out.words());
                Some(Proofs::of(identity))
            }
            false => None,
        };
        Ok(Recover {
            ram: self.ram,
            parameters: self.parameters,
            links: self.links,
            ways: self.ways,
            route: self.route.clone(),
            blocks: stream.out.blocks().clone(),
            agreed,
            proofs,
            preempt: urgent.is_some(),
            urgent_first: self.urgent_ends_with_mark,
            attempts: 0,
            last: None,
        })
    }
}
