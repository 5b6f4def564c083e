//! A postcopy whose link broke: finding the destination again, and hearing what it has.
//!
//! The guest has gone; what is kept here nobody writes any more. So there is no hurry but the
//! guest's, which may be waiting for a page, and no way to fail but to be ended.

use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags};
use whimbrel_ram::{GuestRam, PageMap};
use whimbrel_wire::BlockList;
use whimbrel_wire::recovery::{HelloKind, Welcome};

use super::answers::{Answer, Answers};
use super::out::Out;
use super::postcopy::{HandOver, open_urgent};
use super::setup::Stream;
use crate::channel::{Channel, Route, Search};
use crate::error::Error;
use crate::hello::Features;
use crate::plan::Retry;
use crate::recovery::exchange::SourceExchange;
use crate::recovery::proofs::{Proofs, Ticket, random};
use crate::recovery::{self, ANSWER, WayOn};
use crate::settings::Current;
use crate::status::MigrationStatus;
use crate::worker::{Cancel, Links};

/// Where a destination may be found again.
#[derive(Clone, Copy)]
pub(crate) struct Ways<'a> {
    /// `migrate` with `resume`; `None` where nobody can say that.
    pub(crate) told: Option<&'a WayOn<Route>>,
    /// Another way to the same destination (`recover-uri`), if there is one now.
    pub(crate) other: &'a (dyn Fn() -> Option<Route> + Sync),
}

/// What the broken connections leave behind for those that take their places.
pub(super) struct Recover<'a> {
    pub(super) ram: &'a GuestRam,
    pub(super) parameters: &'a Current,
    pub(super) links: &'a Links,
    pub(super) ways: Ways<'a>,
    pub(super) route: Route,
    pub(super) blocks: Arc<BlockList>,
    pub(super) agreed: Features,
    /// With a whimbrel.
    pub(super) proofs: Option<Proofs>,
    /// There is a channel for urgent pages.
    pub(super) preempt: bool,
    /// A QEMU up to 7.2 has it connected before it says anything.
    pub(super) urgent_first: bool,
    pub(super) attempts: u32,
    /// The last outage, and when it was over.
    pub(super) last: Option<(Outage, Instant)>,
}

/// New connections to the same destination.
pub(super) struct Recovered {
    pub(super) stream: Stream,
    pub(super) urgent: Option<Channel>,
    /// What has still to be said, between whimbrels.
    pub(super) exchange: Option<SourceExchange>,
    /// What other channels begin with, between whimbrels.
    pub(super) ticket: Option<Ticket>,
    pub(super) route: Route,
}

impl Recover<'_> {
    /// Finds the destination again, however long that takes; `None` when it is ended instead.
    pub(super) fn run(
        &mut self,
        map: &PageMap,
        stands: &mut dyn HandOver,
    ) -> Result<Option<Recovered>, Error> {
        // Connections that broke at once were none: what lets a recovery through and then breaks
        // it is not tried without a pause.
        let again = self.last.take().filter(|(_, over)| over.elapsed() < AT_ONCE);
        let mut outage = again.map_or_else(|| Outage::begin(self.limit()), |(outage, _)| outage);
        loop {
            let Some((channel, route)) = self.find(&mut outage, stands)? else { return Ok(None) };
            match self.meet(channel, route, map, stands) {
                Ok(recovered) => {
                    self.last = Some((outage, Instant::now()));
                    return Ok(Some(recovered));
                }
                Err(error) => {
                    self.links.break_now();
                    stands.paused(&error);
                }
            }
        }
    }

    fn limit(&self) -> Option<Duration> {
        let seconds = self.parameters.with(|p| p.recover_time_limit);
        (seconds > 0).then(|| Duration::from_secs(seconds))
    }

    /// Whether it may go on without being told to.
    fn is_automatic(&self) -> bool {
        self.parameters.with(|p| recovery::is_automatic(self.links, p, self.proofs.is_some()))
    }

    /// A connection to the destination, or to whoever is there now.
    fn find(
        &mut self,
        outage: &mut Outage,
        stands: &mut dyn HandOver,
    ) -> Result<Option<(Channel, Route)>, Error> {
        let ended = self.links.ended().clone();
        let mut search = Search::default();
        // Told to go on: tried until an attempt has come to its end.
        let mut told = false;
        loop {
            if ended.is_set() {
                return Ok(None);
            }
            if let Some(route) = self.ways.told.and_then(WayOn::take) {
                self.links.let_go();
                *outage = Outage::begin(self.limit());
                (told, self.route) = (true, route);
                stands.stands(MigrationStatus::PostcopyRecoverSetup);
                search.begin(&self.route);
            }
            let automatic = self.is_automatic() && !outage.is_over();
            if automatic && outage.retry.is_due(outage.now()) {
                search.begin(&self.route);
                if let Some(other) = (self.ways.other)() {
                    search.begin(&other);
                }
            }
            let current = self.renewed()?;
            if let Some(connected) = search.take_connected("main", &current, self.links) {
                match connected {
                    Ok(found) => return Ok(Some(found)),
                    Err(error) => {
                        told = false;
                        stands.paused(&error);
                    }
                }
            }
            if search.is_over() && told {
                told = false;
                let nobody = || Error::Refused(format!("{}: nobody answers", self.route.address));
                stands.paused(&search.take_failure().unwrap_or_else(nobody));
            }
            if self.ways.told.is_none() && !automatic {
                return Ok(None); // Nobody is left to say how to go on.
            }
            let wait = match automatic {
                true => outage.retry.wait(outage.now()),
                // What is under way comes to an end some time.
                false if !search.is_over() => LOOK,
                false => Duration::MAX,
            };
            let told = self.ways.told.iter();
            let told = told.map(|told| PollFd::from_borrowed_fd(told.as_fd(), PollFlags::IN));
            ended
                .poll(told.chain(search.fds()), Some(wait))
                .map_err(Error::system("waiting to connect"))?;
        }
    }

    /// What ends the waits on connections that are made now.
    fn renewed(&self) -> Result<Cancel, Error> {
        match self.links.current() {
            current if current.is_set() => {
                self.links.renew().map_err(Error::system("making an eventfd"))
            }
            current => Ok(current),
        }
    }

    /// Says who is here, and hears what the destination has, or that it will say so.
    fn meet(
        &mut self,
        channel: Channel,
        route: Route,
        map: &PageMap,
        stands: &mut dyn HandOver,
    ) -> Result<Recovered, Error> {
        match self.proofs.clone() {
            Some(proofs) => self.meet_whimbrel(&proofs, channel, route, stands),
            None => self.meet_qemu(channel, route, map, stands),
        }
    }

    fn meet_whimbrel(
        &mut self,
        proofs: &Proofs,
        mut channel: Channel,
        route: Route,
        stands: &mut dyn HandOver,
    ) -> Result<Recovered, Error> {
        self.attempts += 1;
        let (mut exchange, words) =
            SourceExchange::with_whimbrel(proofs.clone(), self.attempts, random()?, self.ram);
        channel.send_bytes(&words)?;
        // While the answer is on its way.
        let urgent = self.urgent(&route)?;
        let mut welcome = [0; Welcome::LEN];
        let (deadline, what) = (Instant::now() + ANSWER, "the destination's welcome");
        channel.receive_all_until(&mut welcome, deadline, what)?;
        let welcomed = Welcome::parse(&welcome).and_then(|welcome| exchange.welcome(&welcome));
        let Some((attempt, words)) = welcomed else {
            return Err(Error::Refused(format!(
                "main channel, byte 0: who answers at {} is not this migration's destination",
                route.address
            )));
        };
        channel.send_bytes(&words)?;
        // Not before it is known that somebody is there: what answers and breaks again and again is
        // nothing to tell of.
        stands.stands(MigrationStatus::PostcopyRecoverSetup);
        stands.stands(MigrationStatus::PostcopyRecover);
        let ticket = Ticket::new(proofs, attempt);
        let urgent = urgent
            .map(|mut urgent| urgent.send_bytes(&ticket.words(HelloKind::Urgent)).map(|()| urgent));
        let (stream, urgent) = (self.stream(channel), urgent.transpose()?);
        let (exchange, ticket) = (Some(exchange), Some(ticket));
        Ok(Recovered { stream, urgent, exchange, ticket, route })
    }

    fn meet_qemu(
        &mut self,
        channel: Channel,
        route: Route,
        map: &PageMap,
        stands: &mut dyn HandOver,
    ) -> Result<Recovered, Error> {
        stands.stands(MigrationStatus::PostcopyRecoverSetup);
        let mut stream = self.stream(channel);
        let early = if self.urgent_first { self.urgent(&route)? } else { None };
        let (mut exchange, words) = SourceExchange::with_qemu(self.ram)?;
        stream.out.words().extend_from_slice(&words);
        stream.out.flush()?;
        stands.stands(MigrationStatus::PostcopyRecover);
        self.hear(&mut stream, "a bitmap", |answer| match answer {
            Answer::Bitmap { block, received } => Some(exchange.bitmap(map, *block, received)),
            _ => None,
        })?;
        let urgent = match early {
            None => self.urgent(&route)?,
            early => early,
        };
        let words = exchange.resume();
        stream.out.words().extend_from_slice(&words);
        stream.out.flush()?;
        self.hear(&mut stream, "RESUME_ACK", |answer| match answer {
            Answer::Resumed => Some(exchange.acknowledged().map(|()| true)),
            _ => None,
        })?;
        Ok(Recovered { stream, urgent, exchange: None, ticket: None, route })
    }

    /// Hears what the destination says until `take` has all that it waits for, which is `what`; of
    /// anything else `take` makes nothing.
    fn hear(
        &self,
        stream: &mut Stream,
        what: &str,
        mut take: impl FnMut(&Answer) -> Option<Result<bool, &'static str>>,
    ) -> Result<(), Error> {
        let limit = self.parameters.with(recovery::silence).unwrap_or(FOREVER);
        let answers = stream.answers.as_mut().expect("a recovery has a return path");
        loop {
            let answer = answers.next(stream.out.channel(), Instant::now() + limit)?;
            match answer {
                None => return Err(Error::Silent { channel: "return path", limit }),
                Some(Answer::End) => return Err(Error::PeerGone),
                Some(Answer::Pong(_)) => {}
                Some(answer) => match take(&answer) {
                    Some(Ok(true)) => return Ok(()),
                    Some(Ok(false)) => {}
                    Some(Err(problem)) => return Err(answers.wrong(problem)),
                    None => return Err(answers.wrong(&format!("{answer:?} instead of {what}"))),
                },
            }
        }
    }

    fn urgent(&self, route: &Route) -> Result<Option<Channel>, Error> {
        match self.preempt {
            true => open_urgent(route, &self.links.current(), self.links).map(Some),
            false => Ok(None),
        }
    }

    fn stream(&self, channel: Channel) -> Stream {
        let out = Out::new(channel, self.ram.clone(), self.blocks.clone());
        Stream { out, answers: Some(Answers::recovering(self.agreed, self.ram.clone())) }
    }
}

/// How often attempts are looked at that nobody else follows.
const LOOK: Duration = Duration::from_millis(100);

/// Connections that have lasted longer have been some.
const AT_ONCE: Duration = Duration::from_secs(1);

/// For ever, as far as a migration can tell.
const FOREVER: Duration = Duration::from_secs(3600);

/// The time since the link broke.
pub(super) struct Outage {
    since: Instant,
    retry: Retry,
    limit: Option<Duration>,
}

impl Outage {
    fn begin(limit: Option<Duration>) -> Outage {
        Outage { since: Instant::now(), retry: Retry::new(Duration::ZERO), limit }
    }

    fn now(&self) -> Duration {
        self.since.elapsed()
    }

    /// Whether nobody tries any more without being told to.
    fn is_over(&self) -> bool {
        self.limit.is_some_and(|limit| self.retry.away(self.now()) >= limit)
    }
}
