//! Postcopy: the guest goes first, and the rest of its RAM follows.
//!
//! What the destination does not have yet is named (RAM_DISCARD), the devices go in one package
//! that ends in RUN, and the guest runs there. From then on `source/main` sends all that is left,
//! in an order that follows what is asked for, while [`urgent`](super::urgent) answers requests.
//!
//! The right to run the guest is given up before the last bytes of the package, RUN, go out. After
//! that no failure brings it back: the migration pauses, and both sides keep what they have.

use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use whimbrel_ram::dirty::DirtyBits;
use whimbrel_ram::{GuestRam, PageMap, TARGET_PAGE};
use whimbrel_wire::package::{PACKAGE_LOADED_PING, PACKAGE_PING};
use whimbrel_wire::recovery::{FAREWELL, HelloKind};
use whimbrel_wire::{
    BlockOffset, Command, DeviceSection, DiscardRange, Package, RamDiscard, encode_end_of_section,
    encode_eof,
};

use super::answers::{Answers, LOADING};
use super::background::Background;
use super::held::Held;
use super::hot::Hot;
use super::multifd::{Beside, Channels, Opening, Terms};
use super::out::Out;
use super::pages::Pages;
use super::recover::{Recover, Recovered, Ways};
use super::said::Said;
use super::setup::{RAM_SECTION, Stream, name};
use super::urgent::Urgent;
use super::wanted::Wanted;
use crate::address::Address;
use crate::channel::{Channel, Route, link};
use crate::error::Error;
use crate::hello::{Features, PONG_PACKAGE};
use crate::plan::Rate;
use crate::recovery::exchange::SourceExchange;
use crate::recovery::proofs::{self, Proofs, Ticket};
use crate::recovery::{self, Beat, PING_BEAT};
use crate::report::{Report, add, set};
use crate::settings::Parameters;
use crate::status::MigrationStatus;
use crate::worker::{Cancel, Links, Role, scoped};

/// The PING before the package.
const PING_BEFORE: u32 = 2;
/// The PING behind the package.
const PING_BEHIND: u32 = 4;

/// How long the other channels are waited for at once.
const LOOK: Duration = Duration::from_secs(1);

/// The command RUN, the last bytes of every package.
const RUN: usize = 5;

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
    pub(crate) parameters: &'a (dyn Fn() -> Parameters + Sync),
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

/// What one set of connections has to do.
enum Part<'h> {
    /// To give the guest away, and then all that is left.
    Whole { sections: Vec<DeviceSection>, channels: Option<Channels> },
    /// The guest has gone, and these have taken the place of broken ones.
    Rest { again: Option<(&'h Opening, Ticket)>, route: Route },
}

/// One set of connections.
struct Session {
    stream: Stream,
    urgent: Option<Channel>,
    /// What has still to be said before pages move.
    exchange: Option<SourceExchange>,
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
                let beat = recovery::beat(&(self.parameters)()).unwrap_or_default();
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

    /// Does `part` over one set of connections.
    fn session(
        &self,
        map: &PageMap,
        session: Session,
        part: Part<'_>,
        hand_over: &mut dyn HandOver,
    ) -> Result<(), Failed> {
        let failed: fn(Error) -> Failed = match part {
            Part::Whole { .. } => Failed::Before,
            Part::Rest { .. } => Failed::After,
        };
        let Session { mut stream, urgent, exchange } = session;
        let answers = stream.answers.take().expect("a postcopy has a return path");
        let agreed = answers.agreed();
        let waits_for_bitmaps = exchange.is_some();
        let (said, wanted, all_sent) = (Said::default(), Wanted::new(), AtomicBool::new(false));
        let thread = self
            .urgent_thread(map, &mut stream, urgent, (answers, exchange), (&said, &wanted))
            .map_err(failed)?;
        let preempt = thread.out.is_some();
        let before_run = match () {
            () if agreed.has(Features::RUN_APART) && preempt => Some(PACKAGE_LOADED_PING),
            () if agreed.has(Features::RECOVERS) => Some(PONG_PACKAGE),
            () => None,
        };
        let result = thread::scope(|scope| {
            let (said, all_sent, links) = (&said, &all_sent, self.links);
            let body = move || {
                if let Err(error) = thread.run(&|| all_sent.load(Ordering::Acquire)) {
                    said.failed(error);
                    links.break_now();
                }
            };
            let spawned = scoped(scope, Role::SourceUrgent, body);
            spawned.map_err(Error::system("starting a thread")).map_err(failed)?;
            let channels = match part {
                Part::Whole { sections, channels } => self
                    .give_away(map, &mut stream, sections, (said, before_run), hand_over)
                    .map(|()| channels),
                Part::Rest { again, route } => self
                    .go_on(&mut stream, waits_for_bitmaps.then_some(said), again, &route)
                    .inspect(|_| hand_over.stands(MigrationStatus::PostcopyActive))
                    .map_err(Failed::After),
            };
            let result = channels.and_then(|channels| {
                let (beside, silent) = match agreed.has(Features::MULTIFD_GOES_ON) {
                    true => (channels, None),
                    false => (None, channels),
                };
                self.send_rest(map, &mut stream, &wanted, said, (all_sent, preempt), beside)
                    .map_err(Failed::After)?;
                // The destination has said that it has everything.
                silent.map_or(Ok(()), Channels::finish).or(Ok(()))
            });
            if result.is_err() {
                links.break_now();
            }
            // What the return path said, or what became of it, is the reason.
            result.map_err(|failed| match (failed, said.take_reason()) {
                (Failed::Before(_), Some(reason)) if !self.cancel.is_set() => {
                    Failed::Before(reason)
                }
                (Failed::After(_), Some(reason)) => Failed::After(reason),
                (failed, _) => failed,
            })
        });
        if result.is_ok() {
            if agreed.has(Features::RECOVERS) {
                stream.out.words().extend_from_slice(&FAREWELL);
            }
            // Whatever becomes of a last word, it has gone well.
            let _ = stream.out.flush().and_then(|()| stream.out.into_channel().finish());
        }
        result
    }

    /// Waits for what the destination says it has, and connects the multifd channels anew.
    fn go_on(
        &self,
        stream: &mut Stream,
        told: Option<&Said>,
        again: Option<(&Opening, Ticket)>,
        route: &Route,
    ) -> Result<Option<Channels>, Error> {
        let links = self.links.current();
        stream.out.channel().heed(links.clone());
        if let Some(said) = told {
            said.wait_until_told(recovery::silence(&(self.parameters)()), &links)?;
        }
        let Some((opening, ticket)) = again else { return Ok(None) };
        let hello = |number| ticket.words(HelloKind::Multifd(number));
        let parameters = (self.parameters)();
        Channels::connect_again(route, &links, self.links, opening, &parameters, &hello).map(Some)
    }

    fn urgent_thread<'t>(
        &self,
        map: &'t PageMap,
        stream: &mut Stream,
        urgent: Option<Channel>,
        (answers, exchange): (Answers, Option<SourceExchange>),
        (said, wanted): (&'t Said, &'t Wanted),
    ) -> Result<Urgent<'t>, Error>
    where
        'a: 't,
    {
        let links = self.links.current();
        let mut input = stream.out.channel().other_direction("return path");
        input.heed(links.clone());
        let out = urgent.map(|mut channel| {
            channel.heed(links);
            link::classify(channel.as_fd(), link::Class::Urgent);
            Out::new(channel, self.ram.clone(), stream.out.blocks().clone())
        });
        Ok(Urgent {
            map,
            pages: Pages::new(self.ram, self.report, None).only_content_in(self.content.clone()),
            report: self.report,
            said,
            wanted,
            answers,
            input,
            ends_with_mark: self.urgent_ends_with_mark && out.is_some(),
            out,
            last_block: None,
            exchange,
            silence: recovery::silence(&(self.parameters)()),
        })
    }

    /// Everything up to and with RUN.
    fn give_away(
        &self,
        map: &PageMap,
        stream: &mut Stream,
        sections: Vec<DeviceSection>,
        (said, before_run): (&Said, Option<u32>),
        hand_over: &mut dyn HandOver,
    ) -> Result<(), Failed> {
        let before = stream.out.bytes();
        self.send_package(map, stream, sections).map_err(Failed::Before)?;
        if let Some(pong) = before_run {
            // Up to here a destination that does not get the devices, or that cannot load them while
            // requests are answered, leaves the guest here.
            let limit = recovery::silence(&(self.parameters)()).map(|limit| limit.max(LOADING));
            said.wait_for_pong(pong, limit, self.cancel).map_err(Failed::Before)?;
        }
        if self.cancel.is_set() {
            return Err(Failed::Before(Error::Cancelled));
        }
        if said.is_over() {
            return Err(Failed::Before(Error::PeerGone)); // It says why.
        }
        hand_over.give_up();
        let sent_before = stream.out.channel().bytes_out();
        stream.out.channel().heed(self.links.current());
        Command::PostcopyRun.encode(stream.out.words());
        let result = stream.out.flush();
        if let Err(error) = result {
            if stream.out.channel().bytes_out() - sent_before < RUN as u64 {
                hand_over.take_back();
                return Err(Failed::Before(error));
            }
            return Err(Failed::After(error));
        }
        hand_over.gone();
        add(&self.report.counters.downtime_bytes, stream.out.bytes() - before);
        self.report.guest_has_gone();
        Ok(())
    }

    /// The package, and what comes before it, without its last command.
    fn send_package(
        &self,
        map: &PageMap,
        stream: &mut Stream,
        sections: Vec<DeviceSection>,
    ) -> Result<(), Error> {
        encode_discards(self.ram, map, stream.out.words())?;
        Command::Ping(PING_BEFORE).encode(stream.out.words());
        let package = Package { sections, pings: vec![PACKAGE_PING, PACKAGE_LOADED_PING] };
        let mut bytes = Vec::new();
        package.encode(&mut bytes);
        let len = u32::try_from(bytes.len()).map_err(|_| {
            Error::Refused(format!(
                "the devices have {} bytes of state, and postcopy takes less than 4 GiB",
                bytes.len()
            ))
        })?;
        Command::Packaged { len }.encode(stream.out.words());
        stream.out.words().extend_from_slice(&bytes[..bytes.len() - RUN]);
        stream.out.flush()
    }

    /// Everything after RUN.
    fn send_rest(
        &self,
        map: &PageMap,
        stream: &mut Stream,
        wanted: &Wanted,
        said: &Said,
        (all_sent, beside_urgent): (&AtomicBool, bool),
        channels: Option<Channels>,
    ) -> Result<(), Error> {
        stream.out.name_blocks_again();
        Command::Ping(PING_BEHIND).encode(stream.out.words());
        stream.out.flush()?;
        said.is_asked_from_now_on();
        let beat = Beat::new(recovery::beat(&(self.parameters)()));
        let mut pages = Pages::new(self.ram, self.report, None);
        pages = match &self.content {
            Some(content) => pages.only_content_in(Some(content.clone())),
            None => pages.leave_untouched(),
        };
        let background = Background {
            map,
            pages,
            sweep: map.sweep(),
            report: self.report,
            parameters: self.parameters,
            wanted,
            said,
            held: Held::new(beside_urgent, stream.out.channel()),
            rate: Rate::default(),
            beat,
            hot: self.hot.clone().and_then(|bits| Hot::new(self.ram, bits, map.pending())),
        };
        let channels = match channels {
            Some(channels) => Some(self.send_beside(map, stream, wanted, background, channels)?),
            None => background.run(&mut stream.out, None).map(|_| None)?,
        };
        all_sent.store(true, Ordering::Release);
        RAM_SECTION.encode_end(stream.out.words());
        encode_end_of_section(stream.out.words());
        RAM_SECTION.encode_footer(stream.out.words());
        encode_eof(stream.out.words());
        stream.out.flush()?;
        set(&self.report.counters.remaining, 0);
        match said.wait_for_shut(&self.links.current())? {
            0 => {
                // The destination has everything.
                if let Some(channels) = channels {
                    let _ = channels.finish();
                }
                Ok(())
            }
            _ => Err(Error::PeerFailed),
        }
    }

    /// The background, with multifd channels beside the main one: in the moments in which nobody
    /// waits for a page they take the link as a whole.
    fn send_beside(
        &self,
        map: &PageMap,
        stream: &mut Stream,
        wanted: &Wanted,
        background: Background<'_>,
        mut channels: Channels,
    ) -> Result<Channels, Error> {
        channels.heed(&self.links.current());
        let unpaced = || (self.parameters)().max_postcopy_bandwidth == 0;
        let terms = Terms {
            ram: self.ram,
            report: self.report,
            log: None,
            content: self.content.clone().or_else(|| self.ram.touched().ok()),
            supply: None,
            beside: Some(Beside { wanted, unpaced: &unpaced }),
        };
        channels.send(map, terms, |crew| {
            crew.begin();
            let mut beat = background.run(&mut stream.out, Some(crew))?;
            while !crew.wait(beat.wait().map_or(LOOK, |wait| wait.min(LOOK)))? {
                if beat.is_due() {
                    Command::Ping(PING_BEAT).encode(stream.out.words());
                    stream.out.flush()?;
                }
            }
            Ok(())
        })?;
        Ok(channels)
    }
}

/// What is on the map the destination has not got, or no longer as it is.
fn encode_discards(ram: &GuestRam, map: &PageMap, words: &mut Vec<u8>) -> Result<(), Error> {
    for (index, block) in ram.blocks() {
        let mut discard = RamDiscard { block: name(block.name())?, ranges: Vec::new() };
        for run in map.runs(index) {
            let page = TARGET_PAGE.bytes() as u64;
            let start = BlockOffset(run.start * page);
            discard.ranges.push(DiscardRange { start, length: (run.end - run.start) * page });
            if discard.ranges.len() == RamDiscard::RANGES_MAX {
                Command::RamDiscard(discard.clone()).encode(words);
                discard.ranges.clear();
            }
        }
        if !discard.ranges.is_empty() {
            Command::RamDiscard(discard).encode(words);
        }
    }
    Ok(())
}
