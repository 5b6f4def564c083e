//! The guest is given away: what the destination has to forget, the devices in one package, and RUN.
//!
//! The right to run the guest is given up before the last bytes of the package, RUN, go out. Up to
//! there any failure leaves the guest here.

use std::time::Duration;

use whimbrel_ram::{GuestRam, PageMap, TARGET_PAGE};
use whimbrel_wire::package::{PACKAGE_LOADED_PING, PACKAGE_PING};
use whimbrel_wire::{BlockOffset, Command, DeviceSection, DiscardRange, Package, RamDiscard};

use super::answers::LOADING;
use super::postcopy::{Failed, HandOver, Postcopy};
use super::said::Said;
use super::setup::{Stream, name};
use crate::error::Error;
use crate::recovery;
use crate::report::add;
use crate::worker::{Cancel, Woken};

/// The PING before the package.
const PING_BEFORE: u32 = 2;

/// The command RUN, the last bytes of every package.
const RUN: usize = 5;

impl Postcopy<'_> {
    /// Everything up to and with RUN.
    pub(super) fn give_away(
        &self,
        map: &PageMap,
        stream: &mut Stream,
        sections: Vec<DeviceSection>,
        (said, before_run): (&Said, Option<u32>),
        hand_over: &mut dyn HandOver,
    ) -> Result<(), Failed> {
        let before = stream.out.bytes();
        self.send_package(map, stream, sections).map_err(Failed::Before)?;
        if let Err(error) = self.wait_until_it_may_go(said, before_run) {
            withdraw(stream);
            return Err(Failed::Before(error));
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

    /// Up to here a destination that does not get the devices, or that cannot load them while requests
    /// are answered, leaves the guest here.
    fn wait_until_it_may_go(&self, said: &Said, before_run: Option<u32>) -> Result<(), Error> {
        if let Some(pong) = before_run {
            let limit = self.parameters.with(recovery::silence).map(|limit| limit.max(LOADING));
            said.wait_for_pong(pong, limit, self.cancel)?;
        }
        if self.cancel.is_set() {
            return Err(Error::Cancelled);
        }
        match said.is_over() {
            true => Err(Error::PeerGone), // It says why.
            false => Ok(()),
        }
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
}

/// The guest stays here: says so, by something else in RUN's place, if that goes out at once. A
/// destination that does not hear it takes RUN for lost, and waits.
fn withdraw(stream: &mut Stream) {
    let channel = stream.out.channel();
    let (Ok(now), mut words) = (Cancel::new(), Vec::new()) else { return };
    Command::PostcopyResume.encode(&mut words);
    channel.heed(now);
    if matches!(channel.ready_to_send(Some(Duration::ZERO)), Ok(Woken::Ready)) {
        let _ = channel.send_bytes(&words);
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
