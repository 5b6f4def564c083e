//! One set of connections of a postcopy: what `source/main` does with it, and `source/urgent` beside.
//!
//! On the first one the guest is given away; on those that take the place of broken ones the
//! destination says first what it has. Then all that is left is sent.

use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use whimbrel_ram::PageMap;
use whimbrel_wire::package::PACKAGE_LOADED_PING;
use whimbrel_wire::recovery::{FAREWELL, HelloKind};
use whimbrel_wire::{Command, DeviceSection, encode_end_of_section, encode_eof};

use super::answers::Answers;
use super::background::Background;
use super::held::Held;
use super::hot::Hot;
use super::multifd::{Beside, Channels, Opening, Terms};
use super::out::Out;
use super::pages::Pages;
use super::postcopy::{Failed, HandOver, Postcopy};
use super::said::Said;
use super::setup::{RAM_SECTION, Stream};
use super::urgent::Urgent;
use super::wanted::Wanted;
use crate::channel::{Channel, Route, link};
use crate::error::Error;
use crate::hello::{Features, PONG_PACKAGE};
use crate::plan::Rate;
use crate::recovery::exchange::SourceExchange;
use crate::recovery::proofs::Ticket;
use crate::recovery::{self, Beat, PING_BEAT};
use crate::report::set;
use crate::status::MigrationStatus;
use crate::worker::{Role, scoped};

/// The PING behind the package.
const PING_BEHIND: u32 = 4;

/// How long the other channels are waited for at once.
const LOOK: Duration = Duration::from_secs(1);

/// What one set of connections has to do.
pub(super) enum Part<'h> {
    /// To give the guest away, and then all that is left.
    Whole { sections: Vec<DeviceSection>, channels: Option<Channels> },
    /// The guest has gone, and these have taken the place of broken ones.
    Rest { again: Option<(&'h Opening, Ticket)>, route: Route },
}

/// One set of connections.
pub(super) struct Session {
    pub(super) stream: Stream,
    pub(super) urgent: Option<Channel>,
    /// What has still to be said before pages move.
    pub(super) exchange: Option<SourceExchange>,
}

impl<'a> Postcopy<'a> {
    /// Does `part` over one set of connections.
    pub(super) fn session(
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
            said.wait_until_told(self.parameters.with(recovery::silence), &links)?;
        }
        let Some((opening, ticket)) = again else { return Ok(None) };
        let hello = |number| ticket.words(HelloKind::Multifd(number));
        let parameters = self.parameters.get();
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
            silence: self.parameters.with(recovery::silence),
        })
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
        let beat = Beat::new(self.parameters.with(recovery::beat));
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
        let unpaced = || self.parameters.with(|p| p.max_postcopy_bandwidth) == 0;
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
