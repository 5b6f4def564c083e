//! Packets for the tests, as a guest sends them.

use etherparse::{IpNumber, PacketBuilder, PacketBuilderStep};

pub(super) const GUEST: [u8; 4] = [10, 0, 0, 1];
pub(super) const CLIENT: [u8; 4] = [10, 0, 0, 2];

/// A TCP segment from port 80 that is being put together.
#[derive(Clone, Copy)]
pub(super) struct Tcp {
    pub(super) to: u16,
    pub(super) sequence: u32,
    pub(super) acknowledges: Option<u32>,
    pub(super) flags: &'static str,
    pub(super) window: u16,
}

/// `flags` are the first letters of SYN, FIN and RST.
pub(super) fn tcp(flags: &'static str, sequence: u32, acknowledges: Option<u32>) -> Tcp {
    Tcp { to: 4000, sequence, acknowledges, flags, window: 1000 }
}

impl Tcp {
    pub(super) fn to(self, to: u16) -> Tcp {
        Tcp { to, ..self }
    }

    pub(super) fn window(self, window: u16) -> Tcp {
        Tcp { window, ..self }
    }

    pub(super) fn with(self, payload: impl AsRef<[u8]>) -> Vec<u8> {
        let mut step = ip().tcp(80, self.to, self.sequence, self.window);
        if let Some(number) = self.acknowledges {
            step = step.ack(number);
        }
        for flag in self.flags.chars() {
            step = match flag {
                's' => step.syn(),
                'f' => step.fin(),
                _ => step.rst(),
            };
        }
        written(|bytes| step.write(bytes, payload.as_ref()))
    }

    pub(super) fn bare(self) -> Vec<u8> {
        self.with([])
    }
}

pub(super) fn udp(from: u16, payload: impl AsRef<[u8]>) -> Vec<u8> {
    written(|bytes| ip().udp(from, 53).write(bytes, payload.as_ref()))
}

pub(super) fn echo(id: u16, sequence: u16, payload: impl AsRef<[u8]>) -> Vec<u8> {
    written(|bytes| ip().icmpv4_echo_reply(id, sequence).write(bytes, payload.as_ref()))
}

pub(super) fn ip_of(number: u8, payload: impl AsRef<[u8]>) -> Vec<u8> {
    written(|bytes| ip().write(bytes, IpNumber(number), payload.as_ref()))
}

pub(super) fn arp(last: u8) -> Vec<u8> {
    let mut frame = vec![0xff; 6];
    frame.extend([2, 0, 0, 0, 0, 1, 8, 6, 0, 1, 8, 0, 6, 4, 0, 1]);
    frame.extend([2, 0, 0, 0, 0, 1, 10, 0, 0, 1, 0, 0, 0, 0, 0, 0, 10, 0, 0, last]);
    frame
}

/// Sets the identification and the time to live of an untagged IPv4 packet.
pub(super) fn on_another_road(mut packet: Vec<u8>) -> Vec<u8> {
    packet[18..20].copy_from_slice(&[0x12, 0x34]);
    packet[22] = 3;
    packet[24..26].copy_from_slice(&[0xab, 0xcd]);
    packet
}

/// Makes a fragment of an untagged IPv4 packet, at so many times eight bytes.
pub(super) fn fragment(mut packet: Vec<u8>, offset: u8) -> Vec<u8> {
    packet[20..22].copy_from_slice(&[0x20, offset]);
    packet
}

pub(super) fn ip() -> PacketBuilderStep<etherparse::IpHeaders> {
    PacketBuilder::ethernet2([2, 0, 0, 0, 0, 1], [2, 0, 0, 0, 0, 2]).ipv4(GUEST, CLIENT, 64)
}

pub(super) fn written<E: std::fmt::Debug>(
    write: impl FnOnce(&mut Vec<u8>) -> Result<(), E>,
) -> Vec<u8> {
    let mut bytes = Vec::new();
    write(&mut bytes).expect("it is short enough");
    bytes
}
