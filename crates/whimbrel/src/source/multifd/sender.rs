//! One multifd channel at the source: claims become packets, and each packet is one system call.

use std::collections::VecDeque;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};

use whimbrel_ram::kernel_copy::Gather;
use whimbrel_ram::{BlockIndex, Claim, TARGET_PAGE, TargetPage};
use whimbrel_wire::BlockOffset;
use whimbrel_wire::multifd::{MultifdInit, PacketHeader, pages_per_packet};

use super::Opening;
use super::crew::Crew;
use crate::channel::{self, Channel, Route, ZeroCopy};
use crate::error::Error;
use crate::packing::{Packer, Packing};
use crate::settings::ZeroPageDetection;
use crate::source::held::Held;
use crate::source::setup::name;
use crate::worker::{Cancel, Links};

const PAGE: usize = TARGET_PAGE.bytes();

/// The page size, as the protocol has it.
const WIRE_PAGE: whimbrel_wire::TargetPage = whimbrel_wire::TargetPage::FOUR_KIB;

/// Pages of one packet at most.
const PACKET_MAX: usize = pages_per_packet(WIRE_PAGE) as usize;

/// The thread's own.
#[derive(Debug)]
pub(super) struct Sender {
    channel: Channel,
    packer: Packer,
    /// With capability `zero-copy-send`.
    zero_copy: Option<ZeroCopy>,
    header: Vec<u8>,
    /// Bytes sent that nobody has counted yet.
    uncounted: u64,
}

/// The pages of the next packet.
#[derive(Debug, Default)]
struct Packet<'a> {
    block: Option<BlockIndex>,
    normal: Vec<TargetPage>,
    zero: Vec<TargetPage>,
    /// Claims all of whose pages are in this packet or were in one before.
    whole: Vec<Claim<'a>>,
}

impl Sender {
    /// Connects channel `number`, and says, behind `first`, which one it is.
    pub(super) fn connect(
        number: u8,
        route: &Route,
        cancel: &Cancel,
        links: &Links,
        opening: &Opening,
        packing: &Packing,
        first: Vec<u8>,
    ) -> Result<Sender, Error> {
        let name = channel::name::multifd(number);
        let channel = route.connect(name, cancel, links).map_err(|error| match error {
            Error::Open { address, source, .. }
                if matches!(
                    source.kind(),
                    io::ErrorKind::ConnectionRefused | io::ErrorKind::NotFound
                ) =>
            {
                let hint = ": after the main channel nobody else is expected there; set capability \
                            multifd and the same multifd-channels on both sides";
                Error::Open { address, source, hint }
            }
            error => error,
        })?;
        let mut header = first;
        header.reserve(PacketHeader::len(WIRE_PAGE));
        MultifdInit { uuid: opening.uuid, channel: number }.encode(&mut header);
        let zero_copy = match opening.zero_copy {
            true => Some(ZeroCopy::on(&channel)?),
            false => None,
        };
        let packer = packing.packer();
        let mut sender = Sender { channel, packer, zero_copy, header, uncounted: 0 };
        sender.channel.send_bytes(&sender.header)?;
        Ok(sender)
    }

    /// Sends what it can claim until the walk has come to its end, or is halted.
    pub(super) fn turn(&mut self, crew: &Crew<'_>, packets: &AtomicU64) -> Result<(), Error> {
        let mut claims = VecDeque::new();
        let mut packet = Packet::default();
        let mut held = crew.wanted().map(|_| Held::new(true, &mut self.channel));
        loop {
            // What is begun is finished; what is not begun goes back on the map.
            if crew.is_halted() && !claims.front().is_some_and(Claim::is_begun) {
                return Ok(());
            }
            if claims.is_empty() {
                if !crew.wait_until_quiet()? {
                    return Ok(());
                }
                if let (Some(held), Some(wanted)) = (&mut held, crew.wanted()) {
                    held.look(&self.channel, wanted, crew.now());
                    self.channel.ready_to_send(None)?;
                }
                crew.claim(&mut claims, held.as_ref().map_or(0, |held| held.piece));
            }
            if claims.is_empty() {
                return Ok(());
            }
            packet.fill(crew, &mut claims)?;
            self.send(crew, &mut packet, packets)?;
        }
    }

    fn send(
        &mut self,
        crew: &Crew<'_>,
        packet: &mut Packet<'_>,
        packets: &AtomicU64,
    ) -> Result<(), Error> {
        let Packet { block: Some(index), normal, zero, whole } = packet else { return Ok(()) };
        let (normal_count, zero_count) = (normal.len() as u64, zero.len() as u64);
        if crew.tells_zeros_apart() && !zero.is_empty() {
            crew.tell_zeros(*index, zero.drain(..));
        }
        let before = self.channel.bytes_out();
        if !normal.is_empty() || !zero.is_empty() {
            let block = crew.ram().block(*index);
            let packed = self.packer.pack(block, normal)?;
            let offset = |page: &TargetPage| BlockOffset(page.offset());
            let header = PacketHeader::pages(
                &name(block.name())?,
                (normal.iter().map(offset), zero.iter().map(offset)),
                (packed.flags(), packed.len(), packets.fetch_add(1, Ordering::Relaxed)),
                WIRE_PAGE,
            );
            self.header.clear();
            header.encode(&mut self.header);
            let mut pieces = Gather::new();
            pieces.push_bytes(&self.header);
            match &mut self.zero_copy {
                None => {
                    packed.gather(&mut pieces)?;
                    self.channel.send(&mut pieces)?;
                }
                Some(zero_copy) => {
                    // The header's place is needed again before the kernel is done with it.
                    self.channel.send(&mut pieces)?;
                    let mut pieces = Gather::new();
                    packed.gather(&mut pieces)?;
                    zero_copy.send(&mut self.channel, &mut pieces)?;
                }
            }
        }
        whole.drain(..).for_each(Claim::spend);
        crew.needs_no_more(*index, normal);
        normal.clear();
        zero.clear();
        packet.block = None;
        let bytes = self.channel.bytes_out() - before + self.take_bytes();
        let wait = crew.sent(bytes, (normal_count, zero_count));
        if !wait.is_zero() {
            self.channel.pause(wait)?;
        }
        // Behind what the pace demands: to who waits for it that is a slow link like any other.
        self.packer.sent();
        Ok(())
    }

    /// Waits until nothing of this turn is read from guest memory any more. Says whether the kernel
    /// has copied something although it was asked not to.
    pub(super) fn settle(&mut self) -> Result<bool, Error> {
        match &mut self.zero_copy {
            Some(zero_copy) => zero_copy.settle(&self.channel),
            None => Ok(false),
        }
    }

    /// Says that everything of this turn has been sent.
    pub(super) fn send_sync(&mut self, packets: &AtomicU64) -> Result<(), Error> {
        let number = packets.fetch_add(1, Ordering::Relaxed);
        self.header.clear();
        PacketHeader::sync(number, WIRE_PAGE).encode(&mut self.header);
        self.uncounted += self.header.len() as u64;
        self.channel.send_bytes(&self.header)
    }

    /// From here on `cancel` is what ends its waits.
    pub(super) fn heed(&mut self, cancel: Cancel) {
        self.channel.heed(cancel);
    }

    /// Bytes sent that nobody has counted yet.
    pub(super) fn take_bytes(&mut self) -> u64 {
        std::mem::take(&mut self.uncounted)
    }

    /// Ends the connection in an orderly way.
    pub(super) fn finish(self) -> Result<(), Error> {
        self.channel.finish()
    }
}

impl<'a> Packet<'a> {
    /// Takes pages of one block from the claims, until the packet is full or no claim is left.
    fn fill(&mut self, crew: &Crew<'a>, claims: &mut VecDeque<Claim<'a>>) -> Result<(), Error> {
        let most = (crew.packet_max(PACKET_MAX * PAGE) / PAGE).clamp(1, PACKET_MAX);
        let detects = crew.dialect().zeros != ZeroPageDetection::None;
        while let Some(claim) = claims.front_mut() {
            if self.block.is_some_and(|block| block != claim.block()) {
                return Ok(());
            }
            let index = claim.block();
            self.block = Some(index);
            if !claim.is_begun() {
                crew.rearm(claim)?;
            }
            let block = crew.ram().block(index);
            while self.normal.len() + self.zero.len() < most {
                let Some(page) = claim.next_page() else { break };
                let zero = detects
                    && (crew.is_untouched(index, page)
                        || crew.may_be_zero() && block.is_zero(page));
                if zero { self.zero.push(page) } else { self.normal.push(page) }
            }
            if self.normal.len() + self.zero.len() == most && claim.remaining() > 0 {
                return Ok(());
            }
            self.whole.extend(claims.pop_front());
        }
        Ok(())
    }
}
