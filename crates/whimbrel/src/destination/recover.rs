//! A postcopy whose link broke: waiting for the source to come back, and telling it what is here.
//!
//! The guest runs meanwhile, until it touches what is missing. Nothing but being ended ends the wait,
//! where somebody can still say how to go on.

use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use whimbrel_wire::recovery::{Hello, Proof};
use whimbrel_wire::{BlockList, Command, Decoded, ReturnMessage};

use super::arriving::Arriving;
use super::door::{Door, Visitor};
use super::input::Input;
use super::postcopy::{Shared, Terms};
use super::session::{Beside, Session};
use crate::channel::Channel;
use crate::error::Error;
use crate::recovery::ANSWER;
use crate::recovery::exchange::DestinationExchange;
use crate::recovery::proofs::{Attempt, Proofs, Ticket, random};
use crate::rescue::Orders;
use crate::status::MigrationStatus;
use crate::worker::Cancel;

/// Is told how a migration stands, and why it is paused.
pub(crate) type Stands<'a> = dyn Fn(MigrationStatus, Option<&Error>) + Sync + 'a;

/// What the broken connections leave behind for those that take their places.
pub(super) struct ComingBack<'a> {
    pub(super) shared: &'a Shared,
    pub(super) arriving: &'a Arriving<'a>,
    pub(super) announced: Arc<BlockList>,
    pub(super) door: &'a Door<'a>,
    pub(super) proofs: Option<Proofs>,
    pub(super) terms: &'a Terms<'a>,
    /// Multifd channels that go on.
    pub(super) multifd: u8,
    /// How long the source may say nothing.
    pub(super) quiet: Option<Duration>,
}

impl ComingBack<'_> {
    /// Waits for the source, and takes in what it sends, until every page is there or the link
    /// breaks again; or for a rescue to bring every page: then it gives the error there was. An error besides that of a broken link is that nobody comes back any more.
    pub(super) fn run(
        &mut self,
        input: &mut Input,
        error: Error,
    ) -> Result<Result<(), Error>, Error> {
        // The source may not have noticed.
        input.channel().hang_up();
        self.shared.outbox.disconnect();
        self.arriving.forget_begun();
        // Only a guest that is here can be rescued.
        let orders = self.terms.orders.filter(|_| self.shared.run.is_set());
        // First: as soon as it is told that it is paused, it may be told where to wait, or rescued.
        let attending = orders.map(Orders::attend);
        self.door.is_paused();
        (self.terms.stands)(MigrationStatus::PostcopyPaused, Some(&error));
        let (channel, visitor) = match self.wait(orders) {
            Came::Source(source) => *source,
            Came::Rescue => {
                (self.terms.stands)(MigrationStatus::PostcopyActive, None);
                return Ok(Err(error));
            }
            Came::Nobody => return Err(error),
        };
        drop(attending);
        let links = self.terms.links.renew().map_err(Error::system("making an eventfd"))?;
        Ok(self.go_on(input, channel, visitor, &links))
    }

    /// Who comes back. Rescues that are ordered meanwhile are done.
    fn wait(&self, orders: Option<&Orders>) -> Came {
        let (ended, since) = (self.terms.links.ended(), Instant::now());
        loop {
            if ended.is_set() || self.shared.is_fatal() {
                return Came::Nobody;
            }
            if let Some(visitor) = self.door.visitor() {
                return Came::Source(Box::new(visitor));
            }
            if let Some(orders) = orders {
                orders.obey(self.arriving.absent);
                if self.arriving.is_complete() {
                    return Came::Rescue;
                }
            }
            let limit =
                match (self.terms.recover, self.terms.parameters.with(|p| p.recover_time_limit)) {
                    (Some(_), _) | (None, 0) => LOOK,
                    (None, seconds) => {
                        match Duration::from_secs(seconds).checked_sub(since.elapsed()) {
                            Some(left) => left.min(LOOK),
                            None => return Came::Nobody,
                        }
                    }
                };
            if self.terms.recover.is_none() && !self.door.is_automatic() {
                return Came::Nobody; // Nobody is left to say how to go on.
            }
            let back = self.door.back().as_fd();
            // Without descriptors to wait on there is nothing to be done but to look again.
            let _ = match orders {
                Some(orders) => ended.wait_any(&[back, orders.as_fd()], limit),
                None => ended.wait_any(&[back], limit),
            };
        }
    }

    fn go_on(
        &self,
        input: &mut Input,
        mut channel: Channel,
        visitor: Visitor,
        links: &Cancel,
    ) -> Result<(), Error> {
        channel.rename("main");
        channel.heed(links.clone());
        let heard = (links.clone(), self.quiet);
        let announced = self.announced.clone();
        let session = Session::new(self.shared, self.arriving, announced, self.door, heard)?;
        (self.terms.stands)(MigrationStatus::PostcopyRecover, None);
        match (visitor, &self.proofs) {
            (Visitor::Whimbrel(hello), Some(proofs)) => {
                self.meet_whimbrel(input, channel, &hello, proofs)?;
            }
            _ => self.meet_qemu(input, channel)?,
        }
        // The source has given the guest away, or it would not be here: be it that RUN was lost.
        self.shared.run.set();
        self.door.is_active();
        (self.terms.stands)(MigrationStatus::PostcopyActive, None);
        session.run(input, Beside::Again { urgent: self.terms.preempt, multifd: self.multifd })
    }

    fn meet_whimbrel(
        &self,
        input: &mut Input,
        mut channel: Channel,
        hello: &Hello,
        proofs: &Proofs,
    ) -> Result<(), Error> {
        let (nonce, ram) = (random()?, self.arriving.absent.ram());
        let (mut exchange, say) =
            DestinationExchange::with_whimbrel(proofs.clone(), hello, nonce, ram);
        let attempt = Attempt { number: hello.attempt, source: hello.nonce, destination: nonce };
        self.door.admit(Ticket::new(proofs, attempt));
        self.shared.outbox.connect(channel.other_direction("return path"), say);
        let mut proof = [0; Proof::LEN];
        let deadline = Instant::now() + ANSWER;
        channel.receive_all_until(&mut proof, deadline, "the source's proof")?;
        let proved = match Proof::parse(&proof) {
            Some(proof) => exchange.proof(&proof),
            None => Err("these are no words of a recovery"),
        };
        proved.map_err(|problem| Error::Refused(format!("main channel: {problem}")))?;
        input.reconnect(channel)
    }

    fn meet_qemu(&self, input: &mut Input, channel: Channel) -> Result<(), Error> {
        let (ram, outbox) = (self.arriving.absent.ram(), &self.shared.outbox);
        let mut exchange = DestinationExchange::with_qemu();
        outbox.connect(channel.other_direction("return path"), Vec::new());
        input.reconnect(channel)?;
        while !exchange.is_over() {
            let next = input.next(|_, ping| outbox.push(&ReturnMessage::Pong(ping)))?;
            match next {
                Some(Decoded::Command(Command::Ping(value))) => {
                    outbox.push(&ReturnMessage::Pong(value))?;
                }
                Some(Decoded::Command(command)) => {
                    let say = exchange.command(&command, ram).map_err(|problem| {
                        let at = input.decoder().offset();
                        Error::Refused(format!("main channel, before byte {at}: {problem}"))
                    })?;
                    outbox.say(say)?;
                }
                Some(other) => {
                    let at = input.decoder().offset();
                    return Err(Error::Refused(format!(
                        "main channel, before byte {at}: {other:?} has no meaning in a recovery"
                    )));
                }
                None => return Err(input.ended("the rest of a recovery")),
            }
        }
        Ok(())
    }
}

/// What ends a pause.
enum Came {
    /// The source is back.
    Source(Box<(Channel, Visitor)>),
    /// Every page is there.
    Rescue,
    /// Nobody comes back any more.
    Nobody,
}

/// How often it is looked whether anybody is still waited for.
const LOOK: Duration = Duration::from_secs(1);
