//! The end of a postcopy between whimbrels: everything is here, and the source has to hear of it.
//!
//! The last word may be lost with its connection. Then the source comes back for it, and is told
//! what it is told in every recovery: what is here, which is everything.

use std::os::fd::AsFd;
use std::thread;
use std::time::{Duration, Instant};

use whimbrel_wire::recovery::{FAREWELL, Hello, Proof};
use whimbrel_wire::return_path::{encode_bitmap_end, encode_bitmap_size};
use whimbrel_wire::{Command, Decoded, ReturnMessage};

use super::door::{Back, Door, Visitor};
use super::incoming::Incoming;
use crate::channel::Channel;
use crate::error::Error;
use crate::recovery::ANSWER;
use crate::recovery::exchange::{DestinationExchange, Say, bitmap_words};
use crate::recovery::proofs::{Proofs, random};
use crate::settings::Current;
use crate::source::setup::name;
use crate::worker::{Cancel, Links, Role, scoped};

/// How often it is looked whether anybody is still waited for.
const LOOK: Duration = Duration::from_secs(1);

impl Incoming {
    /// As [`finish`](Incoming::finish), of a guest that came before its RAM. A source that has not
    /// heard of it is waited for where it would come back to, as long as it would try.
    pub(crate) fn see_off(
        mut self,
        back: Option<Back>,
        links: &Links,
        parameters: &Current,
    ) -> Result<(), Error> {
        let (Some(identity), Some(back)) = (self.identity(), back) else {
            return self.finish();
        };
        if self.say_farewell() {
            return Ok(());
        }
        let proofs = Proofs::of(identity);
        let door = Door::new(back, None, Some(proofs.clone()), false, (links, parameters))?;
        door.is_paused();
        let stop = Cancel::new().map_err(Error::system("making an eventfd"))?;
        let (ended, since) = (links.ended(), Instant::now());
        thread::scope(|scope| {
            scoped(scope, Role::DestinationDoor, || door.run(&stop))
                .map_err(Error::system("starting a thread"))?;
            loop {
                let limit = match parameters.with(|p| p.recover_time_limit) {
                    0 => LOOK,
                    seconds => {
                        Duration::from_secs(seconds).saturating_sub(since.elapsed()).min(LOOK)
                    }
                };
                if ended.is_set() || limit.is_zero() || !door.is_automatic() {
                    break;
                }
                if let Some((channel, Visitor::Whimbrel(hello))) = door.visitor() {
                    let links = links.renew().map_err(Error::system("making an eventfd"))?;
                    // Whoever does not listen comes again.
                    if self.tell_again(channel, &hello, &proofs, links).is_ok_and(|heard| heard) {
                        break;
                    }
                }
                let _ = ended.wait_any(&[door.back().as_fd()], limit);
            }
            stop.set();
            Ok(())
        })
    }

    /// Tells a source that has come back that everything is here; says whether it has heard it.
    fn tell_again(
        &mut self,
        mut channel: Channel,
        hello: &Hello,
        proofs: &Proofs,
        links: Cancel,
    ) -> Result<bool, Error> {
        channel.rename("main");
        channel.heed(links);
        let ram = self.ram().ok_or(Error::PeerGone)?.clone();
        let (mut exchange, say) =
            DestinationExchange::with_whimbrel(proofs.clone(), hello, random()?, &ram);
        let mut words = Vec::new();
        for say in say {
            match say {
                Say::Words(bytes) => words.extend_from_slice(&bytes),
                Say::Requests => {}
                Say::Bitmap(block) => {
                    ReturnMessage::RecvBitmap(name(ram.block(block).name())?).encode(&mut words);
                    let bytes = bitmap_words(&ram, block) * 8;
                    encode_bitmap_size(bytes as u64, &mut words);
                    words.resize(words.len() + bytes, 0xff);
                    encode_bitmap_end(&mut words);
                }
            }
        }
        channel.send_bytes(&words)?;
        let mut proof = [0; Proof::LEN];
        channel.receive_all_until(&mut proof, Instant::now() + ANSWER, "the source's proof")?;
        let proof = Proof::parse(&proof).ok_or(Error::PeerGone)?;
        exchange.proof(&proof).map_err(|problem| Error::Refused(problem.into()))?;
        channel.expect_something_within(Some(ANSWER));
        let input = self.input();
        input.reconnect(channel)?;
        // It has nothing left to send.
        loop {
            match input.next(|_, _| Ok(()))? {
                Some(Decoded::Eof) => break,
                Some(Decoded::Command(Command::Ping(value))) => {
                    let mut pong = Vec::new();
                    ReturnMessage::Pong(value).encode(&mut pong);
                    input.channel().send_bytes(&pong)?;
                }
                Some(Decoded::Ram(record)) if record.is_page() => return Err(Error::PeerGone),
                Some(_) => {}
                None => return Err(Error::PeerGone),
            }
        }
        Ok(self.say_farewell())
    }
}

/// Whether what a source said at the very end is that it has heard.
pub(super) fn is_farewell(last: &[u8]) -> bool {
    last.ends_with(&FAREWELL)
}
